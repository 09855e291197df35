"""Data sets that lie in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, SetupError
from ..tree import describe, sent

_BLOCK, _FEW_BYTES = 65536, 16


class ArrayDataset:
    """Arrays whose first dimension counts the items; item i is the i-th of each, as a tuple.

    `dataset[3]` is an item; `dataset[0:5]` and `dataset[indices]` are tuples of many. What the
    arrays are they stay: uint8 pixels are neither copied nor made floats, a memory-mapped numpy
    array stays on disk, and batches of what lies on a GPU are gathered there.

    Args:
        arrays: tensors or numpy arrays of one length.

    Raises:
        DataError: no arrays, or lengths that differ.
    """

    def __init__(self, *arrays: Tensor | np.ndarray):
        self.arrays = tuple(torch.as_tensor(array) for array in arrays)
        lengths = {array.shape[:1] for array in self.arrays}
        if len(lengths) != 1 or () in lengths:
            raise DataError(
                "The arrays of a data set must have the same number of items.",
                saw=describe(self.arrays),
            )

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Give the items in an order, `size` at a time, gathered by index.

        Arrays of a few bytes an item, labels for one, are gathered for many batches at once.

        Args:
            order: int64 tensor (n,), any indices.
            size: items a batch; the last one may have fewer.
        """
        block = max(_BLOCK // size, 1) * size
        places = {array.device for array in self.arrays}  # the order goes there once, whole
        orders = {place: sent(order, place).split(block) for place in places}
        for parts in zip(*(orders[array.device] for array in self.arrays), strict=True):
            gathered = map(partial(_gather, size), self.arrays, parts)
            yield from zip(*gathered, strict=True)

    def to(self, device: str | torch.device) -> ArrayDataset:
        """Return the data set with its arrays, whole, on a device.

        Raises:
            SetupError: they do not fit there.
        """
        moved = copy.copy(self)  # of a subclass, one of that
        try:
            moved.arrays = tuple(array.to(device) for array in self.arrays)
        except torch.OutOfMemoryError:
            raise SetupError(
                f"The data do not fit on {device}.",
                saw=f"{self.nbytes / 1e6:,.1f} MB wanted, {_free(device) / 1e6:,.1f} free",
                do="leave them where they are: batches are moved as they come.",
            ) from None
        return moved

    @property
    def nbytes(self) -> int:
        """What the arrays take, in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Any, ...]:
        return tuple(array[index] for array in self.arrays)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.arrays, strict=True)

    def __len__(self) -> int:
        return self.arrays[0].shape[0]

    def __repr__(self) -> str:
        places = dict.fromkeys(str(array.device) for array in self.arrays)
        away = "" if list(places) == ["cpu"] else f", {self.nbytes / 1e6:,.1f} MB on "
        return f"ArrayDataset{describe(self.arrays)}{away}{' and '.join(places) if away else ''}"


def _free(device: str | torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _gather(size: int, array: Tensor, items: Tensor) -> Iterable[Tensor]:
    if array[:1].nbytes <= _FEW_BYTES:
        return array.index_select(0, items).split(size)
    return map(partial(array.index_select, 0), items.split(size))
