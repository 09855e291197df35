"""The Loader: whole batches by index, in an order that depends on seed and epoch alone."""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ..errors import DataError, SetupError
from ..randomness import permutation


class Loader:
    """Batches of a data set.

    A data set with a method `batches(order, size)` (`ArrayDataset` has one) makes whole batches
    itself; of any other the items are taken one by one and collated as torch's DataLoader does.

    Every `iter()` begins the next epoch. The order is a pure function of (seed, epoch): the same
    on any machine, whatever happened to other random numbers.

    Args:
        dataset: has `len()`, and `batches(order, size)` or `[i]`.
        batch_size: items a batch, 1 or more.
        shuffle: a new order every epoch; otherwise the data set's own.
        drop_last: leave out a last batch that is not full.
        seed: any integer.

    Attributes:
        epoch: the number of the next pass, from 0.

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
    ):
        if batch_size < 1:
            raise SetupError("A batch must have one item or more.", saw=f"batch_size={batch_size}")
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.epoch = 0
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
        size = self.batch_size
        order = self.order(epoch)[start * size : len(self) * size]
        if not len(order):  # torch would split nothing into one empty part
            return iter(())
        if hasattr(self.dataset, "batches"):
            return self.dataset.batches(order, size)
        item = self.dataset.__getitem__  # by map: no frames of ours above an error in a data set
        return (default_collate(list(map(item, c.tolist()))) for c in order.split(size))

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of the items in one epoch, an int64 tensor (n,)."""
        n = len(self.dataset)
        return (
            torch.from_numpy(permutation(self.seed, epoch, n)) if self.shuffle else torch.arange(n)
        )

    def __repr__(self) -> str:
        order = f"shuffled, seed {self.seed}" if self.shuffle else "in order"
        return f"Loader({len(self)} batches of {self.batch_size}, {order}, from {self.dataset!r})"


def first(loader: Iterable[Any]) -> Any:
    """Return the next pass's first batch; of a `Loader` it takes that one batch and nothing more.

    A `Loader` is left as it was: its next pass begins with this batch.
    """
    if isinstance(loader, Loader):
        return next(loader.batches(loader.epoch))
    return next(iter(loader))


@contextmanager
def preserved_order(*loaders: Any) -> Generator[None]:
    """Put back on the way out what decides the order of the next pass.

    That is the epoch of a `Loader`, and the generators of a torch DataLoader and its sampler. Of
    any other iterable nothing is known.
    """
    epochs = [(loader, loader.epoch) for loader in loaders if isinstance(loader, Loader)]
    holders = [loader for loader in loaders if isinstance(loader, DataLoader)]
    holders += [loader.sampler for loader in holders]
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = [(generator, generator.get_state()) for generator in generators if generator]
    try:
        yield
    finally:
        for loader, epoch in epochs:
            loader.epoch = epoch
        for generator, state in states:
            generator.set_state(state)


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
