"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from ..averaging import Averages, warm_decay
from ..errors import SetupError, are_numbers, are_whole
from ..events import Callback
from ..learner import Learner
from ..schedules import Schedule


class EMA(Callback):
    """Keep a moving average of the weights, validate with it, and end the fit with it.

    After a step the average becomes decay · average + (1 - decay) · weights, batch norm's
    statistics included. Training itself goes on with the plain weights. From the end of a training
    pass to the end of the epoch the model holds the average, so that `Best` and others see what
    was validated. However the fit ends, the model holds it then; a later fit begins anew from it.

    Args:
        decay: in [0, 1); in the first updates less, see `averaging.warm_decay`. Or a schedule: a
            function of the fraction of the run, taken as it is; `lambda p: 0.95**5 * p**3` with
            every=5 is the airbench94 recipe's, without its copying back, which `Lookahead` does.
        every: steps between updates.

    Attributes:
        holds_average: whether the model holds the average now, and this callback the weights.

    Raises:
        SetupError: decay or every is out of its range.
    """

    changes = True
    decides = "which weights the fit ends with"
    order = 60  # when the steps of an epoch and what a skipped one leaves behind are settled

    def __init__(self, decay: float | Schedule = 0.999, every: int = 1):
        in_range = callable(decay) or (are_numbers(decay) and 0 <= decay < 1)
        if not in_range or not are_whole(every) or every < 1:
            raise SetupError(
                "EMA takes a decay in [0, 1) and a number of steps, 1 or more.",
                saw=f"decay={decay!r}, every={every!r}",
            )
        self.decay: float | Schedule = decay if callable(decay) else float(decay)
        self.every = every
        self._averages: Averages | None = None
        self.holds_average = False

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, Schedule]:
        """Return the decay by the position in the run, where it is a schedule."""
        return {} if isinstance(self.decay, float | int) else {"EMA decay": self.decay}

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Forget everything at the end."""
        try:
            yield
        finally:
            self._averages, self.holds_average = None, False

    def before_fit(self, learn: Learner) -> None:
        """Begin with the weights as they are."""
        self._averages, self._n_updates, self._step = Averages(learn.model), 0, learn.step

    @contextmanager
    def around_epoch(self, learn: Learner) -> Generator[None]:
        """Give the model its weights back, unless this was the end of the fit."""
        try:
            yield
        except BaseException:
            self._bring(learn, inside=True)
            raise
        self._bring(learn, inside=learn.epoch + 1 == learn.n_epochs)

    @contextmanager
    def around_batch(self, learn: Learner) -> Generator[None]:
        """Let a look in the midst of training, `learn.validate()`, see the average too."""
        looked_at = not learn.training and not self.holds_average
        if looked_at:
            self._bring(learn, inside=True)
        try:
            yield
        finally:
            if looked_at:
                self._bring(learn, inside=False)

    def after_batch(self, learn: Learner) -> None:
        """Follow a step, if one was taken."""
        if learn.training and self._averages and learn.step >= self._step + self.every:
            self._step = learn.step
            self._averages.draw(learn.model, 1 - self._decay_now(learn.progress))
            self._n_updates += 1

    def after_train(self, learn: Learner) -> None:
        """Follow the last step, and let the model hold the average."""
        self.after_batch(learn)
        self._bring(learn, inside=True)

    def _decay_now(self, progress: float) -> float:
        if isinstance(self.decay, float | int):
            return warm_decay(self.decay, self._n_updates)
        return self.decay(progress)

    def _bring(self, learn: Learner, inside: bool) -> None:
        if self._averages and inside != self.holds_average:
            self._averages.exchange(learn.model)
            torch.clear_autocast_cache()  # it keeps weights in half precision for a whole block
            self.holds_average = inside
