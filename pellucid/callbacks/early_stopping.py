"""Stop when a number no longer gets better."""

from ..errors import SetupError, are_numbers
from ..events import Callback, CancelFit
from ..learner import Learner
from ..tally import check_monitored


class EarlyStopping(Callback):
    """Stop the fit once `monitor` has not improved for `patience` epochs.

    Args:
        monitor: a column of `record.epochs`.
        patience: epochs without improvement that are allowed, 1 or more.
        min_delta: how much better counts as better, 0 or more.
        lower_is_better: None takes it from the name, see `record.Table.best_row`.

    Raises:
        SetupError: a setting is out of its range.
        UnknownName: the fit will have no such number; at its beginning.
    """

    order = 50  # after those that watch the epoch's end
    changes = True

    def __init__(
        self,
        monitor: str = "valid/loss",
        patience: int = 3,
        min_delta: float = 0.0,
        lower_is_better: bool | None = None,
    ):
        if not are_numbers(patience, min_delta) or patience < 1 or min_delta < 0:
            raise SetupError(
                "EarlyStopping needs patience, epochs of 1 or more, and min_delta of 0 or more.",
                saw=f"patience={patience!r}, min_delta={min_delta!r}",
            )
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.lower_is_better = lower_is_better

    def before_fit(self, learn: Learner) -> None:
        """Count from this fit's first epoch."""
        check_monitored(self.monitor, learn.metrics, learn.data.valid is not None)
        self._since = len(learn.record.epochs)

    def after_epoch(self, learn: Learner) -> None:
        """Raise CancelFit when patience is at its end."""
        epochs = learn.record.epochs
        best = epochs.best_row(self.monitor, self._since, self.min_delta, self.lower_is_better)
        last_good = self._since - 1 if best is None else best
        if len(epochs) - 1 - last_good >= self.patience:
            raise CancelFit
