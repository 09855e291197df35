"""One rank's part of each batch, for processes that train on the batches together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

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
        mark: see `SlicedBatches`; 0, since these batches cannot differ.
    """

    def __init__(self, loader: Loader, rank: int, world: int):
        vars(self).update(vars(loader))
        self._whole, self._rank, self._world = loader, rank, world
        self.share: Share | None = None
        self.mark = 0.0

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Give this rank's part of the batches of one epoch from the `start`-th on."""
        n = min(len(self.dataset), len(self) * self.batch_size)
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

    def _made(self, epoch: int, start: int, order: Tensor) -> Iterable[Any]:
        parts = [
            items[Share(len(items), self._rank, self._world).taken]
            for items in order.split(self.batch_size)
        ]
        loader = copy.copy(self._whole)
        loader.batch_size = max(map(len, parts), default=1)  # all but the last are of one size
        return loader._made(epoch, start, torch.cat([order[:0], *parts]))


class SlicedBatches:
    """One rank's part of each batch of any iterable; every rank loads the whole batches.

    Args:
        batches: the same in every process, see `same_random`.
        rank: of this process.
        world: how many there are.
        same_random: a context manager in which a pass begins, that the order may be drawn alike.

    Attributes:
        share: of the batch given last, None after the pass.
        mark: the sum of the whole batch's last integers, most often its labels.
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
            began = [batch for _, batch in zip(range(1), batches, strict=False)]  # draws the order
        try:
            for batch in chain(began, batches):
                self.share = share = Share(n_items(batch), self._rank, self._world)
                integers = [leaf for leaf in leaves(batch) if _counts(leaf)]
                self.mark = float(integers[-1].sum()) if integers else 0.0
                yield map_leaves(lambda leaf, share=share: _cut(leaf, share), batch)
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


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.dtype in (torch.int32, torch.int64)


def _cut(leaf: Any, share: Share) -> Any:
    cuts = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == share.n_whole
    return leaf[share.taken] if cuts else leaf
