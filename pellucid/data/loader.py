"""The Loader: whole batches by index, in an order that depends on seed and epoch alone."""

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError, SetupError
from ..randomness import checked_seed, permutation
from .making import Elsewhere, Job, without_our_frames
from .workers import made


@dataclass(frozen=True)
class Drawn:
    """Which items a batch is made of: on this and the seed their augmentation depends."""

    seed: int
    epoch: int
    items: Tensor


class Loader:
    """Batches of a data set.

    A data set with a method `batches(order, size)` (`ArrayDataset` has one) makes whole batches
    itself, `ImageFiles` are decoded straight into a batch, and of any other data set the items are
    taken one by one and collated as torch's DataLoader does.

    Every `iter()` begins the next epoch. Order and content are a pure function of (seed, epoch):
    the same on any machine, with any number of workers, whatever happened to other random numbers.
    Also what a data set itself draws from the generators of Python, numpy and torch is.

    Args:
        dataset: has `len()`, and `batches(order, size)` or `[i]`.
        batch_size: items a batch, 1 or more.
        shuffle: a new order every epoch; otherwise the data set's own.
        drop_last: leave out a last batch that is not full.
        seed: any integer.
        workers: processes that make batches beside the loop, two batches ahead each; 0: none.
            They live for one pass. Not on Linux, images are decoded in threads instead.

    Attributes:
        epoch: the number of the next pass, from 0.
        timeout: seconds that a worker may spend on one item before it counts as hanging.

    Raises:
        DataError: the data set is empty, or has no full batch and `drop_last` is set.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
    ):
        if not _is_whole(batch_size, 1):
            raise SetupError("A batch must have one item or more.", saw=f"batch_size={batch_size}")
        if not _is_whole(workers, 0):
            raise SetupError("Workers are counted: 0, 1, 2, ...", saw=f"workers={workers!r}")
        _check_numbered(dataset)
        self.dataset, self.batch_size = dataset, int(batch_size)
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, checked_seed(seed)
        self.workers, self.timeout = int(workers), 60.0
        self.epoch = 0
        self._given: tuple[int, Tensor, int, int] | None = None
        if hasattr(dataset, "batches"):
            _check_idle(workers, dataset)
        if not len(self):
            raise DataError(
                "The data set has no batch.",
                saw=f"{len(dataset)} items, batch_size {batch_size}, drop_last={drop_last}",
                do="check where the items should come from"
                + ("; or set drop_last=False." if len(dataset) else "."),
            )

    def __len__(self) -> int:
        n = len(self.dataset) / self.batch_size
        return math.floor(n) if self.drop_last else math.ceil(n)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.batches(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Give the batches of one epoch from the `start`-th on, without beginning a new one."""
        if start < 0:
            raise SetupError("Batches are numbered from 0.", saw=f"start={start}")
        failed: Exception
        order = self.order(epoch)[start * self.batch_size : len(self) * self.batch_size]
        try:
            for number, batch in enumerate(self._made(epoch, start, order)):
                # `drawn` only when it is asked for: 3 µs less
                self._given = epoch, order, number * self.batch_size, self.batch_size
                yield batch
            self._given = None
            return
        except Elsewhere as error:
            failed = error.error
        except Exception as error:
            error.__traceback__ = without_our_frames(error)
            raise
        # here, so that it does not drag along where it was unpacked
        raise failed

    def _made(self, epoch: int, start: int, order: Tensor) -> Iterable[Any]:
        if not len(order):  # torch would split nothing into one empty part
            return ()
        if hasattr(self.dataset, "batches"):
            _check_idle(self.workers, self.dataset)
            return self.dataset.batches(order, self.batch_size)
        job = Job(self.dataset, self.seed, epoch, start)
        return made(job, order.split(self.batch_size), self.workers, self.timeout)

    @property
    def drawn(self) -> Drawn | None:
        """What the batch given last is made of; None before and after a pass."""
        if self._given is None:
            return None
        epoch, order, first_item, n = self._given
        return Drawn(self.seed, epoch, order[first_item : first_item + n])

    def order(self, epoch: int) -> Tensor:
        """Return the order of the items in one epoch, an int64 tensor (n,)."""
        n = len(self.dataset)
        return (
            torch.from_numpy(permutation(self.seed, epoch, n)) if self.shuffle else torch.arange(n)
        )

    def __repr__(self) -> str:
        workers = f", {self.workers} workers" if self.workers else ""
        order = f"shuffled, seed {self.seed}" if self.shuffle else "in order"
        how = f"{len(self)} batches of {self.batch_size}, {order}{workers}"
        return f"Loader({how}, from {self.dataset!r})"


def first(loader: Iterable[Any]) -> Any:
    """Return the next pass's first batch; of a `Loader` it takes that one batch and nothing more.

    A `Loader` is left as it was: its next pass begins with this batch.
    """
    if isinstance(loader, Loader):
        loader = copy.copy(loader)
        loader.workers = 0  # they would be as many batches ahead, for nothing
    return next(iter(loader))


@contextmanager
def preserved_order(*loaders: Any) -> Generator[None]:
    """Put back on the way out what decides the order of the next pass.

    That is the epoch of a `Loader` (and what its last batch was made of), and the generators of a
    torch DataLoader and its sampler. Of any other iterable nothing is known.
    """
    ours = [loader for loader in loaders if isinstance(loader, Loader)]
    epochs = [(loader, loader.epoch, loader._given) for loader in ours]
    holders = [loader for loader in loaders if isinstance(loader, DataLoader)]
    holders += [loader.sampler for loader in holders]
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = [(generator, generator.get_state()) for generator in generators if generator]
    try:
        yield
    finally:
        for loader, epoch, given in epochs:
            loader.epoch, loader._given = epoch, given
        for generator, state in states:
            generator.set_state(state)


def _check_idle(workers: int, dataset: Any) -> None:
    if workers:
        raise SetupError(
            "Workers have nothing to do: these data make whole batches at once, in memory.",
            saw=f"workers={workers}, {dataset!r}",
            do="leave workers out.",
        )


def _is_whole(number: Any, least: int) -> bool:
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return whole and number >= least


def _check_numbered(dataset: Any) -> None:
    """Refuse what has no length or no items by number: a generator, a stream."""
    makes_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "batches")
    if not makes_items or not hasattr(dataset, "__len__"):
        raise SetupError(
            "A Loader needs a data set with len() and items by number.",
            saw=f"{type(dataset).__name__} without "
            + ("__len__" if makes_items else "__getitem__"),
            do="give it both methods, or a list; for a stream use torch's DataLoader.",
        )


def length(loader: Iterable[Any]) -> int | None:
    """Return how many batches a loader says it has; None if it does not say."""
    try:
        return len(loader)  # ty: ignore[invalid-argument-type]
    except TypeError:  # no __len__, or a torch DataLoader over a stream
        return None


def check_length(seen: int, said: int | None, kind: str) -> None:
    """Refuse a pass without batches, or with another number of them than was said.

    Args:
        seen: batches that came.
        said: what `length` said before.
        kind: of the pass, "train" or "validate".

    Raises:
        DataError: as said.
    """
    part = "training" if kind == "train" else "validation"
    if seen == 0:
        raise DataError(
            f"The {part} data gave no batch.",
            saw=f"len() says {said}" if said else "",
            do="a generator is used up after one pass: give a list, a Loader or a torch "
            "DataLoader; with drop_last, one batch must be full.",
        )
    if said is not None and seen != said:
        raise DataError(
            f"The {part} data gave another number of batches than they said.",
            saw=f"len() says {said}, {seen} came{' and more may follow' * (seen > said)}",
            do="mend its __len__; schedules and progress are reckoned from it.",
        )
