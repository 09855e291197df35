"""Linear: every output is a weighted sum of all inputs; and Flatten, which makes inputs of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from .initialisation import xavier_normal
from .module import Module
from .parameter import Parameter


class Linear(Module):
    """Return x Wᵀ + b, (..., n_in) to (..., n_out).

    A row of W holds the weights of one output, so W is (n_out, n_in), as torch has it, and is
    transposed to be multiplied; that costs nothing, a transposed matrix is the same memory read in
    another order.

    The gradients, which autograd finds by itself: with G = ∂L/∂y, ∂L/∂x = G W, ∂L/∂W = Gᵀ x and
    ∂L/∂b = the sum of G over the batch.

    It begins with `xavier_normal` weights and b = 0. (Torch draws both from ±1 / √n_in,
    evenly: variance 1 / (3 n_in), a third of what keeps a signal alive.)

    >>> Linear(4, 2)(torch.ones(3, 4)).shape
    torch.Size([3, 2])

    Args:
        n_in: values an item.
        n_out: values an item of the output.
        bias: whether b is added; a norm behind this layer would take it out again.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        self.weight = Parameter(xavier_normal(n_out, n_in))
        self.bias = Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


class Flatten(Module):
    """Lay the dimensions after the first in one row: (n, c, h, w) to (n, c·h·w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x as rows."""
        return x.flatten(1)
