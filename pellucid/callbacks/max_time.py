"""An end to the fit when its time is over."""

from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter

from ..distributed import as_the_first_says, is_first
from ..errors import SetupError, are_numbers
from ..events import Callback, CancelEpoch, CancelFit
from ..learner import Learner


class MaxTime(Callback):
    """End the fit after so many seconds: after a batch, with the validation of what was reached.

    The training pass that is under way ends with the batch, is validated, and goes on record; then
    the fit ends, and a line says where. So the fit takes as much longer as a batch and a validation
    take. Schedules are not shortened: they stop where they are.

    Args:
        seconds: from the beginning of the fit, above 0.

    Attributes:
        reached: epoch and batch (counted from 0) after which the last fit was ended; None if it
            was not.
    """

    changes = True
    order = 900  # when all others are done with the batch

    def __init__(self, seconds: float):
        if not are_numbers(seconds) or not seconds > 0:
            raise SetupError("MaxTime takes a number of seconds above 0.", saw=repr(seconds))
        self.seconds = seconds
        self.reached: tuple[int, int] | None = None
        self._began = 0.0

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Start the clock."""
        self.reached, self._began = None, perf_counter()
        yield

    def after_batch(self, learn: Learner) -> None:
        """Leave the training pass when the time is over."""
        if learn.training and as_the_first_says(perf_counter() - self._began) >= self.seconds:
            self.reached = learn.epoch, learn.batch_index
            raise CancelEpoch

    def after_epoch(self, learn: Learner) -> None:
        """Leave the fit when the time is over."""
        if self.reached is None:
            return
        epoch, batch = self.reached
        line = (
            f"MaxTime: {self.seconds:g} s were over in epoch {epoch} of {learn.n_epochs}, after "
            f"batch {batch} (counted from 0)"
        )
        if is_first():
            print(line, flush=True)
        raise CancelFit
