"""Data: items, the order they are taken in, and batches of them.

Three questions, each with an answer of its own, so that one can be changed without the others:
*what* is item i (a Dataset), *which* items make a batch (a Sampler and a BatchSampler), and *how*
do items become one tensor (`collate`). The DataLoader asks them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, SetupError
from ..tree import describe


class Dataset:
    """Arrays side by side: item i is the i-th of each, as a tuple.

    >>> Dataset(torch.arange(10) / 10, torch.arange(10))[2:5]
    (tensor([0.2000, 0.3000, 0.4000]), tensor([2, 3, 4]))

    Args:
        arrays: tensors of one length.
    """

    def __init__(self, *arrays: Tensor):
        if len({array.shape[:1] for array in arrays}) != 1:
            raise DataError("Arrays of one length make a data set.", saw=describe(arrays))
        self.arrays = arrays

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        return tuple(array[index] for array in self.arrays)

    def __len__(self) -> int:
        return len(self.arrays[0])


class Sampler:
    """Give the numbers 0 to n − 1 once each, in order or shuffled.

    In training the order must be random, and another one in every epoch: batches of similar items
    would pull the model one way and then another. In validation it must not be.

    Args:
        n: how many items there are.
        shuffle: whether each pass has a new order, drawn from torch's generator.
    """

    def __init__(self, n: int, shuffle: bool = False):
        self.n, self.shuffle = n, shuffle

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n).tolist() if self.shuffle else range(self.n))

    def __len__(self) -> int:
        return self.n


class BatchSampler:
    """Cut what a sampler gives into pieces of one size; the last piece may be smaller.

    >>> list(BatchSampler(Sampler(10), 3))
    [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]

    Args:
        sampler: gives numbers of items and has a length: a Sampler, one of torch's, or a list.
        batch_size: numbers a piece.
        drop_last: leave out a last piece that is smaller.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool = False):
        if batch_size < 1:
            raise SetupError("A batch must have one item or more.", saw=f"batch_size={batch_size}")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self.sampler)
        while piece := list(islice(numbers, self.batch_size)):
            if len(piece) == self.batch_size or not self.drop_last:
                yield piece

    def __len__(self) -> int:
        n = len(self.sampler)  # ty: ignore[invalid-argument-type]
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)


def collate(items: Sequence[Any]) -> Any:
    """Make one batch of items of the same form, each field stacked along a new first dimension.

    >>> collate([(torch.zeros(2), 1), (torch.ones(2), 0)])
    (tensor([[0., 0.],
            [1., 1.]]), tensor([1, 0]))

    Args:
        items: tensors of one shape, numbers, or tuples, lists or dicts of these. A Python float
            becomes what models compute in, torch's default dtype (its own loader makes float64).
    """
    if isinstance(items[0], dict):
        return {key: collate([item[key] for item in items]) for key in items[0]}
    if isinstance(items[0], (tuple, list)):
        return tuple(collate(field) for field in zip(*items, strict=True))
    return torch.stack([torch.as_tensor(item) for item in items])


class DataLoader:
    """Give a data set in batches; every `iter()` is a new pass.

    Args:
        dataset: has `[i]` and a length.
        batch_size: items a batch; the last may have fewer.
        shuffle: a new order each pass: for training.
        sampler: another order than the two, see `BatchSampler`.
        drop_last: leave out a last batch that is not full.
        collate_fn: makes a batch of a list of items.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] = collate,
    ):
        if shuffle and sampler is not None:
            raise SetupError("shuffle has no effect beside a sampler, which makes the order.")
        sampler = Sampler(len(dataset), shuffle) if sampler is None else sampler
        self.dataset, self.batch_size, self.collate_fn = dataset, batch_size, collate_fn
        self.batches = BatchSampler(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[Any]:
        for numbers in self.batches:
            yield self.collate_fn([self.dataset[number] for number in numbers])

    def __len__(self) -> int:
        return len(self.batches)
