"""Samples of tensors, and what is counted in them, for many tensors at once.

An operation on a few thousand numbers costs as much as one on ten times as many: so samples wait
until a batch is over, and then one histogram is made of all, each in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .histograms import N_BEGINNINGS, Octaves, upper_half

N_SAMPLED = 2048
"""Values of a tensor that go into its histogram, about; a share has a standard error of 1 %."""

_STEPS = (
    *(2, 3, 5, 7, 11, 13, 17, 23, 29, 37, 47, 61, 79, 103, 137, 179, 233, 307, 401, 523, 683, 887),
    *(1153, 1499, 1949, 2539, 3301, 4297, 5591, 7283, 9467, 12301, 16001, 20807, 27059, 35171),
    *(45737, 59467, 77317, 100517, 130681, 169889, 220859, 287117, 373273),
)
"""Primes, each about 1.3 times the one before."""


def sample(x: Tensor, n: int = N_SAMPLED) -> Tensor:
    """Return at most `2 * n` values of `x`, evenly spread over all of it, flat.

    Other places of each item are met, since the step shares no factor with the size of an item.
    """
    values = x.reshape(-1)
    if len(values) <= 2 * n:
        return values
    size = x.numel() // len(x)
    for step in _STEPS:  # rather than by gcd, which torch.compile does not follow
        if step * n >= x.numel() - n and size % step:
            break
    return values[::step]


class _Layout(NamedTuple):
    """Where values of samples come from and go to, as they lie one after the other.

    Attributes:
        sample: the number of the sample that each value is of, (values,).
        table: where the table of its kind begins, (values,).
        bins: where the bins of its row begin, (values,).
        row: of each sample, (samples,).
        first: where each sample begins, (samples,).
        n: how many values each sample has, (samples,).
    """

    sample: Tensor
    table: Tensor
    bins: Tensor
    row: Tensor
    first: Tensor
    n: Tensor


class Samples:
    """Samples that wait, and are counted into a table together, each in a row of its own.

    Args:
        rows: where to count, float32 (kinds, tensors, columns); the last columns are the bins.
        squares: the column for the sum of squares about the mean of a sample.
        bins: of each kind; all have one number of bins.
    """

    def __init__(self, rows: Tensor, squares: int, bins: Sequence[Octaves]):
        _, self._n_tensors, self._n_columns = rows.shape
        self._rows, self._squares = rows.flatten(0, 1), squares
        self._first_bin = self._n_columns - bins[0].n_bins
        self._table = torch.cat([each.table(rows.device) for each in bins])
        self._numbers: list[int] = []
        self._waiting: list[Tensor] = []
        self._known: tuple[list[tuple[int, int]], _Layout] | None = None

    def add(self, number: int, values: Tensor) -> None:
        """Take in a sample, to count it later; under `torch.compile`, where nothing can wait, now.

        Args:
            number: its row, counted over all kinds.
            values: single precision, (n,), 1 or more.
        """
        if torch.compiler.is_compiling():
            self._count(self._lay_out([(number, len(values))]), values)
        else:
            self._numbers.append(number)
            self._waiting.append(values.clone())  # the tensor may yet be changed in place

    def count(self) -> None:
        """Count all that waits."""
        if not self._waiting:
            return
        samples = list(zip(self._numbers, map(len, self._waiting), strict=True))
        if self._known is None or self._known[0] != samples:  # most batches are like the one before
            self._known = samples, self._lay_out(samples)
        self._count(self._known[1], torch.cat(self._waiting))
        self.clear()

    def clear(self) -> None:
        """Forget what waits."""
        self._numbers, self._waiting = [], []

    def _lay_out(self, samples: Sequence[tuple[int, int]]) -> _Layout:
        """Lay samples out, given the row and the size of each."""
        full = partial(torch.full, dtype=torch.int64, device=self._rows.device)
        number = torch.cat([full((size,), i) for i, (_, size) in enumerate(samples)])
        row = torch.cat([full((size,), row) for row, size in samples])
        n = full((len(samples),), 0).index_add_(0, number, torch.ones_like(row))
        first = n.cumsum(0) - n
        table = row // self._n_tensors * N_BEGINNINGS
        bins = row * self._n_columns + self._first_bin
        return _Layout(number, table, bins, row[first], first, n.float())

    def _count(self, layout: _Layout, values: Tensor) -> None:
        firsts = values.index_select(0, layout.first)
        shifted = values - firsts.index_select(0, layout.sample)  # so that squares keep digits
        sums = torch.zeros_like(layout.n).index_add_(0, layout.sample, shifted)
        squares = torch.zeros_like(layout.n).index_add_(0, layout.sample, shifted.square())
        squares = (squares - sums.square() / layout.n).clamp(min=0)
        self._rows[:, self._squares].index_add_(0, layout.row, squares)
        bins = self._table.index_select(0, upper_half(values) + layout.table) + layout.bins
        self._rows.view(-1).scatter_add_(0, bins, torch.ones_like(values))
