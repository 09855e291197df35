"""Lookahead: slow weights that follow the fast ones, and call them back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch.optim import Optimizer

from ..averaging import Averages
from ..errors import SetupError, are_numbers, are_whole
from ..events import Callback, CancelFit
from ..learner import Learner
from ..schedules import Schedule


class Lookahead(Callback):
    """Every few steps, go part of the way from the slow weights to the trained, and train on there.

    Zhang et al., 2019, "Lookahead optimizer: k steps forward, 1 step back". Batch norm's statistics
    go along. The fit ends with the slow weights, put in place before the last validation; earlier
    epochs are validated as training stands. Where a callback ends the fit before, it ends with them
    too; after an error with the trained ones.

    Args:
        every: steps from one meeting to the next.
        pull: share of the way, in (0, 1]; or a schedule of it, a function of the fraction of the
            run: `lambda p: 1 - 0.95**5 * p**3` is the airbench94 recipe's.

    Raises:
        SetupError: every or pull is out of its range.
    """

    changes = True
    order = 52  # before those that average what was trained

    def __init__(self, every: int = 5, pull: float | Schedule = 0.5):
        in_range = callable(pull) or (are_numbers(pull) and 0 < pull <= 1)
        if not in_range or not are_whole(every) or every < 1:
            raise SetupError(
                "Lookahead takes a number of steps, 1 or more, and a pull in (0, 1].",
                saw=f"every={every!r}, pull={pull!r}",
            )
        self.every = every
        self.pull: float | Schedule = pull if callable(pull) else float(pull)
        self._slow: Averages | None = None

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, Schedule]:
        """Return the pull by the position in the run, where it is a schedule."""
        return {} if isinstance(self.pull, float | int) else {"Lookahead pull": self.pull}

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Forget the slow weights at the end."""
        try:
            yield
        finally:
            self._slow = None

    def before_fit(self, learn: Learner) -> None:
        """Begin with the weights as they are."""
        self._slow, self._step = Averages(learn.model), learn.step

    @contextmanager
    def around_epoch(self, learn: Learner) -> Generator[None]:
        """End with the slow weights if the fit is ended early."""
        try:
            yield
        except CancelFit:
            others = [callback for callback, _ in learn.spans["around_epoch"]]
            if self._slow and not any(getattr(other, "holds_average", False) for other in others):
                self._slow.put_into(learn.model)
            raise

    def after_batch(self, learn: Learner) -> None:
        """Meet, if it is time."""
        if learn.training and self._slow and learn.step >= self._step + self.every:
            self._step = learn.step
            number = isinstance(self.pull, float | int)
            self._slow.draw(learn.model, self.pull if number else self.pull(learn.progress))
            self._slow.put_into(learn.model)

    def after_train(self, learn: Learner) -> None:
        """Meet, if the last step comes now; and end with the slow weights."""
        self.after_batch(learn)
        if self._slow and learn.epoch + 1 == learn.n_epochs:
            self._slow.put_into(learn.model)
