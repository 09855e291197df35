"""A batch size that changes from epoch to epoch."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from ..data import Loader
from ..errors import SetupError
from ..events import Callback
from ..learner import Learner
from ..schedules import Schedule


class BatchSize(Callback):
    """Load batches of a size that follows the fraction of the run, epoch by epoch.

    Larger batches at the end do what a lower learning rate does, in fewer steps (Smith et al.,
    2018, "Don't decay the learning rate, increase the batch size"). The order of the items is that
    of the loader, and each item still comes once an epoch. Positions in the run are those of whole
    epochs, so schedules are not bent. The learning rate is left alone. The loader gets its size
    back when the fit ends.

    Args:
        schedule: from the position in the run, 0 to 1, to the size, which is rounded: for instance
            `combine([0.5, 0.5], [constant(128), constant(512)])`.

    Raises:
        SetupError: no schedule, a size below 1, or a training loader that is no `Loader`.
    """

    changes = True
    decides = "the batch size"

    def __init__(self, schedule: Schedule):
        if not callable(schedule):
            raise SetupError(
                "BatchSize takes a schedule of the size.",
                saw=repr(schedule),
                do="BatchSize(schedules.linear(64, 512))",
            )
        self.schedule = schedule

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Give the loader its own size back at the end."""
        loader = _checked(learn.data.train)
        size = loader.batch_size
        try:
            yield
        finally:
            loader.batch_size = size

    def before_epoch(self, learn: Learner) -> None:
        """Set the size for this epoch."""
        learn.data.train.batch_size = self._size(learn.epoch / learn.n_epochs)

    def sized(self, loader: Any, position: float) -> Loader:
        """Return a loader as it will be in the epoch that begins at a position in the run."""
        loader = copy.copy(_checked(loader))
        loader.batch_size = self._size(position)
        return loader

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, Schedule]:
        """Return the size by the position in the run; it changes where an epoch begins."""
        return {"batch size": lambda position: self._size(int(position * epochs + 1e-9) / epochs)}

    def _size(self, position: float) -> int:
        size = round(self.schedule(position))
        if size < 1:
            raise SetupError("A batch must have one item or more.", saw=f"a size of {size}")
        return size


def _checked(loader: Any) -> Loader:
    if not isinstance(loader, Loader):
        raise SetupError(
            "BatchSize changes the size of a pellucid.data.Loader alone.",
            saw=type(loader).__name__,
            do="load with Loader(dataset, batch_size=64, shuffle=True).",
        )
    return loader
