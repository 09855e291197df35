"""Keep the best weights of a fit, and end with them."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

from ..events import Callback
from ..learner import Learner
from ..tally import check_monitored


class Best(Callback):
    """Copy the model's state in memory when it is the best so far, and end the fit with the best.

    That holds however the fit ends.

    Args:
        monitor: a column of `record.epochs`.
        lower_is_better: None takes it from the name, see `record.Table.best_row`.

    Raises:
        UnknownName: the fit will have no such number; at its beginning.

    Attributes:
        row: the row of `record.epochs` that the copy was made at; None before the first.
    """

    changes = True

    def __init__(self, monitor: str = "valid/loss", lower_is_better: bool | None = None):
        self.monitor, self.lower_is_better = monitor, lower_is_better
        self.row: int | None = None
        self._state: dict[str, Tensor] = {}

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Forget the copy of an earlier fit, and end this one with its best state."""
        check_monitored(self.monitor, learn.metrics, learn.data.valid is not None)
        self.row, self._state = None, {}
        self._since = len(learn.record.epochs)
        try:
            yield
        finally:
            self.after_fit(learn)  # it was not heard if another's raised before

    def after_epoch(self, learn: Learner) -> None:
        """Copy the model's state if it is the best."""
        epochs = learn.record.epochs
        best = epochs.best_row(self.monitor, self._since, lower=self.lower_is_better)
        if best == len(epochs) - 1:
            self.row = best
            state = learn.model.state_dict()
            self._state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def after_fit(self, learn: Learner) -> None:
        """Put the best state into the model."""
        if self._state:
            learn.model.load_state_dict(self._state)
            self._state = {}
