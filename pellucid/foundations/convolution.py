"""Convolution: the same small Linear layer at every place of an image.

A pattern is worth finding wherever it is. So a kernel of a few weights is laid on every place of
the image, and each time gives a weighted sum of what lies under it: a matrix product with all the
patches of the image, laid side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from ..tree import describe
from .initialisation import kaiming_normal
from .module import Module
from .parameter import Parameter

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of what may be given as one number for both."""
    return (size, size) if isinstance(size, int) else size


def windows(
    x: Tensor, kernel_size: Size, stride: Size = 1, padding: Size = 0, fill: float = 0.0
) -> Tensor:
    """Return every place where a kernel can lie: (n, c, h, w) to (n, c, h', w', kh, kw).

    There are h' = ⌊(h + 2·padding − kh) / stride⌋ + 1 places from top to bottom, likewise w'. The
    windows overlap, and are not copied: the result is the image's own memory, read several times.

    Args:
        x: images (n, c, h, w).
        kernel_size: the window's height and width.
        stride: steps between windows.
        padding: rows and columns added at each edge.
        fill: their value.

    Raises:
        DataError: no images, or smaller ones than the kernel.
    """
    (kh, kw), (down, right), (ph, pw) = pair(kernel_size), pair(stride), pair(padding)
    if x.ndim != 4 or x.shape[2] + 2 * ph < kh or x.shape[3] + 2 * pw < kw:
        raise DataError(
            f"A window of {kh}×{kw} needs images (n, c, h, w) of at least that size.",
            saw=f"{describe(x)}, padding {ph}, {pw}",
        )
    if ph or pw:
        x = torch.constant_pad_nd(x, (pw, pw, ph, ph), fill)
    return x.unfold(2, kh, down).unfold(3, kw, right)


def unfold(x: Tensor, kernel_size: Size, stride: Size = 1, padding: Size = 0) -> Tensor:
    """Return the patches of images as columns: (n, c, h, w) to (n, c·kh·kw, h'·w').

    Now they are copied; a pixel that lies in nine windows is there nine times.

    >>> unfold(torch.ones(1, 3, 28, 28), 3).shape
    torch.Size([1, 27, 676])
    """
    patches = windows(x, kernel_size, stride, padding)
    return patches.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


class Conv2d(Module):
    """Lay kernels on every place of images: (n, n_in, h, w) to (n, n_out, h', w').

    Its output is W patches + b, W with a row a kernel; `windows` says how large it is. It begins
    with `kaiming_normal` weights and b = 0.

    >>> Conv2d(3, 4, 3, stride=1, padding=1)(torch.ones(2, 3, 64, 64)).shape
    torch.Size([2, 4, 64, 64])

    Args:
        n_in: channels of the images.
        n_out: kernels, and channels of the output.
        kernel_size: height and width, or one number for both; likewise the others.
        stride: steps between two places.
        padding: rows and columns of zeros added at each edge; half the kernel keeps the size.
        bias: whether b, one number a kernel, is added; a norm behind this layer would take it out
            again.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
    ):
        self.kernel_size = pair(kernel_size)
        self.stride, self.padding = pair(stride), pair(padding)
        self.weight = Parameter(kaiming_normal(n_out, n_in, *self.kernel_size))
        self.bias = Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return W patches + b, as maps."""
        n_in = self.weight.shape[1]
        if x.ndim != 4 or x.shape[1] != n_in:
            raise DataError(f"This convolution takes images (n, {n_in}, h, w).", saw=describe(x))
        y = self.weight.flatten(1) @ unfold(x, self.kernel_size, self.stride, self.padding)
        if self.bias is not None:
            y = y + self.bias.unsqueeze(1)
        height = (x.shape[2] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        return y.unflatten(2, (height, -1))

    def settings(self) -> str:
        """Return stride and padding."""
        return f"stride {self.stride}, padding {self.padding}"
