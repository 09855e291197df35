"""Data sets that lie in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..tree import describe


class ArrayDataset:
    """Arrays whose first dimension counts the items; item i is the i-th of each, as a tuple.

    `dataset[3]` is an item, `dataset[0:5]` a tuple of slices, `dataset.gather(indices)` a batch.
    What the arrays are they stay: uint8 pixels are neither copied nor made floats. A memory-mapped
    numpy array stays on disk.

    Args:
        arrays: tensors or numpy arrays of one length.

    Raises:
        DataError: no arrays, or lengths that differ.
    """

    def __init__(self, *arrays: Tensor | np.ndarray):
        self.arrays = tuple(torch.as_tensor(array) for array in arrays)
        if not arrays or len({array.shape[:1] for array in self.arrays}) != 1:
            raise DataError(
                "The arrays of a data set must have the same number of items.",
                saw=describe(self.arrays),
            )

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the items at `indices`, an int64 tensor (n,), as one batch: a copy."""
        return tuple([array.index_select(0, indices) for array in self.arrays])

    def __getitem__(self, index: int | slice) -> tuple[Any, ...]:
        return tuple(array[index] for array in self.arrays)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.arrays, strict=True)

    def __len__(self) -> int:
        return self.arrays[0].shape[0]

    def __repr__(self) -> str:
        return f"ArrayDataset{describe(self.arrays)}"
