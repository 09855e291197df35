"""Beginning with a convolution that whitens: its outputs are uncorrelated and of like size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, SetupError
from ..tree import describe
from .by_formula import set_values

_AT_A_TIME = 64
"""Images whose patches are held at once, in double precision."""


def whiten(conv: nn.Conv2d, x: Tensor, eps: float = 5e-4) -> Tensor:
    """Set a model's first convolution to whiten the patches of images, and freeze its weight.

    The filters are the eigenvectors of the covariance of patches, each divided by
    sqrt(eigenvalue + eps), and, as second half, their negatives: so that a ReLU behind them loses
    nothing. Where there are fewer filters, the largest eigenvalues come first. A bias is set to
    take the patches' mean away, and stays trainable. (Page, "How to train your ResNet", 2018;
    the negatives and the small kernel of Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024.)

    Call it before the first fit, or `learn.reset_optimizer()` after it.

    Args:
        conv: changed in place; 2 · c · kh · kw filters take all there is, `Conv2d(3, 24, 2)`.
        x: images (n, c, h, w), floats, as the model gets them: `data.one_batch()[0]`. A few
            hundred will do.
        eps: keeps directions with hardly any variance from being blown up.

    Returns:
        The eigenvalues, float64, largest first: all c · kh · kw.

    Raises:
        SetupError: the convolution has groups, an odd number of filters or too many.
        DataError: the images do not fit it, are not finite, or there are none.
    """
    c, (kh, kw), (dh, dw) = conv.in_channels, conv.kernel_size, conv.dilation
    if conv.groups != 1 or conv.out_channels % 2 or conv.out_channels > 2 * c * kh * kw:
        raise SetupError(
            "Whitening needs an even number of filters, twice the size of a patch at most.",
            saw=repr(conv),
            do=f"nn.Conv2d({c}, {2 * c * kh * kw}, ({kh}, {kw}))",
        )
    h, w = (kh - 1) * dh + 1, (kw - 1) * dw + 1  # the pixels from a patch's first to its last
    fits = x.ndim == 4 and len(x) and x.shape[1] == c and x.shape[2] >= h and x.shape[3] >= w
    if not fits or not x.is_floating_point() or not x.isfinite().all():
        raise DataError(
            f"Whitening takes finite images (n, {c}, h, w) of floats, of {h}×{w} pixels or more.",
            saw=describe(x),
            do="give them as the model gets them: data.one_batch()[0].",
        )
    mean, covariance = patch_moments(x, (kh, kw), (dh, dw))
    values, vectors = torch.linalg.eigh(covariance)  # ascending, vectors in columns
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
    rows = vectors[torch.arange(len(vectors)), vectors.abs().argmax(1)].sign()[:, None] * vectors
    rows = rows / (values + eps).sqrt()[:, None]  # the sign was anyone's choice; now it is ours
    half = rows[: conv.out_channels // 2]
    filters = torch.cat([half, -half])
    set_values(conv, "weight", filters.view_as(conv.weight).to(conv.weight))
    if conv.bias is not None:
        set_values(conv, "bias", -(filters @ mean).to(conv.bias))
    conv.weight.requires_grad_(False)
    return values


def patch_moments(
    x: Tensor, size: tuple[int, int], dilation: tuple[int, ...] = (1, 1)
) -> tuple[Tensor, Tensor]:
    """Return mean and population covariance of all patches of images, in float64 on the CPU.

    Args:
        x: images (n, c, h, w).
        size: height and width of a patch, at most those of the images.
        dilation: from one of a patch's pixels to the next, down and across.

    Returns:
        (p,) and (p, p) with p = c · height · width.
    """
    n_values = x.shape[1] * size[0] * size[1]
    total, squares = x.new_zeros(n_values).double(), x.new_zeros(n_values, n_values).double()
    count = 0
    for part in x.split(_AT_A_TIME):
        patches = F.unfold(part.double(), size, dilation).transpose(1, 2).flatten(0, 1)
        total, squares = total + patches.sum(0), squares + patches.T @ patches
        count += len(patches)
    mean = total / count
    return mean.cpu(), (squares / count - mean.outer(mean)).cpu()
