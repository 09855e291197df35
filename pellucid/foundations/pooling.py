"""Pooling: many places of a map become one.

What matters is often that a pattern is there, not where exactly. MaxPool2d and AvgPool2d take
windows of a given size; the adaptive ones divide the map into a given number of windows, so that
the layer behind them gets the same number of values whatever the size of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SetupError
from .convolution import Size, pair, windows
from .module import Module


def highest(x: Tensor, dim: int) -> Tensor:
    """Return the maximum along a dimension; the gradient goes to the first place that has it.

    `amax` would divide it among all of them, which torch's pooling does not. After a ReLU there are
    many such places, all zero.
    """
    return x.max(dim).values


class _Pool2d(Module):
    """What MaxPool2d and AvgPool2d share: the windows."""

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0):
        self.kernel_size, self.padding = pair(kernel_size), pair(padding)
        self.stride = self.kernel_size if stride is None else pair(stride)
        if any(2 * pad > size for pad, size in zip(self.padding, self.kernel_size, strict=True)):
            raise SetupError(
                "A padding of more than half the window makes windows with no pixel in them.",
                saw=f"kernel_size {self.kernel_size}, padding {self.padding}",
            )

    def places(self, x: Tensor, fill: float) -> Tensor:
        """Return the windows of a map with their pixels in a row, (n, c, h', w', kh·kw)."""
        return windows(x, self.kernel_size, self.stride, self.padding, fill).flatten(-2)

    def settings(self) -> str:
        """Return what the windows are."""
        return f"kernel {self.kernel_size}, stride {self.stride}, padding {self.padding}"


class MaxPool2d(_Pool2d):
    """Return the largest value of each window: (n, c, h, w) to (n, c, h', w').

    Args:
        kernel_size: height and width of a window, or one number for both; likewise the others.
        stride: steps between windows; by default they lie side by side.
        padding: rows and columns of -∞, which is never the largest, added at each edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima."""
        return highest(self.places(x, -torch.inf), -1)


class AvgPool2d(_Pool2d):
    """Return the mean of each window: (n, c, h, w) to (n, c, h', w').

    Args:
        kernel_size: height and width of a window, or one number for both; likewise the others.
        stride: steps between windows; by default they lie side by side.
        padding: rows and columns of zeros added at each edge; they count in the mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return self.places(x, 0.0).mean(-1)


class _AdaptivePool2d(Module):
    """What the adaptive pools share: the division of a map.

    Of n rows, window i of k goes from ⌊i·n/k⌋ to ⌈(i+1)·n/k⌉: it covers everything, and windows
    overlap where n is no multiple of k.
    """

    def __init__(self, output_size: Size):
        self.output_size = pair(output_size)

    def reduced(self, x: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return `reduce` of each window, first along the rows, then along the columns."""
        for dim, k in zip((-1, -2), reversed(self.output_size), strict=True):
            n = x.shape[dim]
            edges = [(i * n // k, -(-(i + 1) * n // k)) for i in range(k)]
            x = torch.stack([reduce(x.narrow(dim, a, b - a), dim) for a, b in edges], dim)
        return x

    def settings(self) -> str:
        """Return the size of the output."""
        return f"to {self.output_size}"


class AdaptiveMaxPool2d(_AdaptivePool2d):
    """Return maxima, as many as asked for: (n, c, h, w) to (n, c, *output_size).

    Args:
        output_size: height and width, or one number for both.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima."""
        return self.reduced(x, highest)


class AdaptiveAvgPool2d(_AdaptivePool2d):
    """Return means, as many as asked for: (n, c, h, w) to (n, c, *output_size).

    Args:
        output_size: height and width, or one number for both; 1 is the mean of the whole map.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return self.reduced(x, lambda part, dim: part.mean(dim))
