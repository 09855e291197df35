"""One rank's part of each batch, for processes that train on the batches together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ..errors import SetupError
from ..tree import leaves, map_leaves, n_items
from .loader import Loader


class Share(NamedTuple):
    """One rank's part of a batch of `n_whole` items: consecutive items, the first ranks one more.

    >>> [Share(7, rank, 3).part for rank in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """

    n_whole: int
    rank: int
    world: int

    @property
    def part(self) -> slice:
        """Which items these are; none, where there are fewer items than ranks."""
        each, more = divmod(self.n_whole, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    @property
    def sizes(self) -> list[int]:
        """How many items each rank has."""
        each, more = divmod(self.n_whole, self.world)
        return [each + (rank < more) for rank in range(self.world)]

    @property
    def n_own(self) -> int:
        """How many items this rank has."""
        return self.sizes[self.rank]

    @property
    def taken(self) -> slice:
        """What is loaded: the part, or the first item where it is empty, to stand in for it."""
        return self.part if self.n_own else slice(0, 1)


class SlicedLoader(Loader):
    """One rank's part of each batch of a `Loader`; only these items are made.

    Order, epochs and `batch_size` are those of the whole batches; `drawn` is of the part, also the
    whole loader's.

    Attributes:
        share: of the batch given last, None after the pass.
        mark: see `SlicedBatches`; here a number made of what decides the order of the items. What
            lies in a data set is not compared.
    """

    def __init__(self, loader: Loader, rank: int, world: int):
        vars(self).update(vars(loader))
        self._whole, self._rank, self._world = loader, rank, world
        self.share: Share | None = None
        self.mark = 0.0

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Give this rank's part of the batches of one epoch from the `start`-th on."""
        n = min(len(self.dataset), len(self) * self.batch_size)
        order = (self.seed, epoch) if self.shuffle else ()
        self.mark = float(crc32(repr((len(self.dataset), *order)).encode()))
        try:
            for number, batch in enumerate(super().batches(epoch, start), start):
                n_whole = min(self.batch_size, n - number * self.batch_size)
                self.share = Share(n_whole, self._rank, self._world)
                drawn: Any = self.drawn
                own = drawn.items[self.share.taken]
                # the whole loader says so too, to whoever holds it (`AlternatingFlip`)
                self._given = self._whole._given = epoch, own, 0, len(own)
                yield batch
            self._whole._given = None
        finally:
            self.share = None

    def whole(self) -> Loader:
        """Return a loader of the whole batches, whose next pass is the one that is next here."""
        loader = copy.copy(self._whole)
        loader.epoch, loader.batch_size = self.epoch, self.batch_size
        return loader

    def _made(self, epoch: int, start: int, order: Tensor) -> Iterable[Any]:
        parts = [
            items[Share(len(items), self._rank, self._world).taken]
            for items in order.split(self.batch_size)
        ]
        loader = copy.copy(self._whole)
        loader.batch_size = max(map(len, parts), default=1)  # all but the last are of one size
        return loader._made(epoch, start, torch.cat([order[:0], *parts]))


_ENDED = object()
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SlicedBatches:
    """One rank's part of each batch of any iterable; every rank loads the whole batches.

    Args:
        batches: the same in every process, see `same_random`.
        rank: of this process.
        world: how many there are.
        same_random: a context manager in which batches are made, that order and items may be drawn
            alike.

    Attributes:
        share: of the batch given last, None after the pass.
        mark: of the whole batch given last, a number that another batch hardly has: a sum over its
            last tensor, most often its labels.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        rank: int,
        world: int,
        same_random: Callable[[], AbstractContextManager[None]],
    ):
        if isinstance(getattr(batches, "sampler", None), DistributedSampler):
            raise SetupError(
                "Each process would take a part of its part of the data.",
                saw="a DataLoader with a DistributedSampler",
                do="leave the sampler out (shuffle=True): Distributed cuts the batches itself.",
            )
        self.batches, self._rank, self._world = batches, rank, world
        self._same_random = same_random
        self.share: Share | None = None
        self.mark = 0.0
        self.batch_size = getattr(batches, "batch_size", None)

    def __iter__(self) -> Iterator[Any]:
        with self._same_random():
            batches = iter(self.batches)
        try:
            while True:
                with self._same_random():
                    batch = next(batches, _ENDED)
                if batch is _ENDED:
                    return
                self.share = Share(n_items(batch), self._rank, self._world)
                self.mark = _mark(batch)
                yield _cut(batch, self.share)
        finally:
            self.share = None

    def __len__(self) -> int:
        return len(self.batches)  # ty: ignore[invalid-argument-type]


def sliced(
    loader: Any, rank: int, world: int, same_random: Callable[[], AbstractContextManager[None]]
) -> Any:
    """Return one rank's part of a loader; of what is one already, itself."""
    if isinstance(loader, SlicedLoader | SlicedBatches):
        return loader
    if isinstance(loader, Loader):
        return SlicedLoader(loader, rank, world)
    return SlicedBatches(loader, rank, world, same_random)


def whole(loader: Any) -> Any:
    """Return the loader of whole batches behind one rank's part; any other, as it is."""
    if isinstance(loader, SlicedLoader):
        return loader.whole()
    return loader.batches if isinstance(loader, SlicedBatches) else loader


def _mark(batch: Any) -> float:
    """Return a sum over the last tensor that can be summed without waiting, or is of integers.

    Floats are summed as the integers that their bits are: so the sum does not depend on the order
    of the additions, which is another with another number of threads, and none is NaN.
    """
    for leaf in reversed(leaves(batch)):
        if _can_be_summed(leaf):
            return float(leaf.detach().view(_INTEGERS[leaf.itemsize]).sum())
    return 0.0


def _can_be_summed(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.layout != torch.strided:
        return False
    if leaf.is_complex():
        return False
    return leaf.is_cpu or leaf.dtype in (torch.int32, torch.int64)  # elsewhere the host waits


def _cut(batch: Any, share: Share) -> Any:
    """Return the share of each tensor and array, and of each list of strings, one an item."""

    def cut(leaf: Any) -> Any:
        is_array = isinstance(leaf, Tensor | np.ndarray) and leaf.ndim
        has_items = (is_array or is_texts(leaf)) and len(leaf) == share.n_whole
        return leaf[share.taken] if has_items else leaf

    return map_leaves(cut, batch, is_texts)


def is_texts(part: Any) -> bool:
    """Tell whether this is a list of strings, which a batch may have, one an item."""
    is_list = type(part) in (list, tuple) and len(part) > 0
    return is_list and all(isinstance(item, str | bytes) for item in part)
