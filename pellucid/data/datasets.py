"""Data sets that lie in memory."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..tree import describe

_BLOCK, _FEW_BYTES = 65536, 16


class ArrayDataset:
    """Arrays whose first dimension counts the items; item i is the i-th of each, as a tuple.

    `dataset[3]` is an item; `dataset[0:5]` and `dataset[indices]` are tuples of many. What the
    arrays are they stay: uint8 pixels are neither copied nor made floats, and a memory-mapped
    numpy array stays on disk.

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
        for items in order.split(block):
            yield from zip(*(_gather(array, items, size) for array in self.arrays), strict=True)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Any, ...]:
        return tuple(array[index] for array in self.arrays)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.arrays, strict=True)

    def __len__(self) -> int:
        return self.arrays[0].shape[0]

    def __repr__(self) -> str:
        return f"ArrayDataset{describe(self.arrays)}"


def _gather(array: Tensor, items: Tensor, size: int) -> Iterable[Tensor]:
    if array[:1].nbytes <= _FEW_BYTES:
        return array.index_select(0, items).split(size)
    return map(partial(array.index_select, 0), items.split(size))
