"""Norms: keep a layer's values at mean 0 and variance 1, whatever the layers before it do.

While a model trains, the values inside it drift and grow, every layer chases a moving target, and
the learning rate must stay small. A norm subtracts the mean and divides by the standard deviation,
and then lets two learned numbers a channel, `weight` and `bias`, set the spread and mean that turn
out to be useful.

The norms differ in one thing: over which values mean and variance are taken.

| norm         | over                                        | in evaluation   |
|--------------|---------------------------------------------|-----------------|
| BatchNorm    | batch and places, for each channel          | running average |
| LayerNorm    | all of an item (or its last dimensions)     | the same        |
| InstanceNorm | places, for each item and channel           | the same        |
| GroupNorm    | places and some channels, for each item     | the same        |

Here are the three that treat each item for itself: the batch size cannot matter to them, and they
need no memory of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, SetupError
from ..tree import describe
from .module import Module
from .parameter import Parameter


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and variance over some dimensions, which stay with size 1.

    It is the population variance, Σ(x − mean)² / n. Dividing by n − 1 estimates the variance of a
    larger population from a sample; but the values that are normalised are all there are, and only
    so is their variance 1 afterwards. (Of a single value, n − 1 would make 0 / 0.)

    Both come in float32 at least: in float16 the square of 256 is infinite.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def standardised(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Return (x − mean) / √(variance + eps), in the dtype of x.

    `eps` keeps the division finite where all values are equal; a larger one also tames the guesses
    of very small batches.
    """
    return ((x - mean) / (variance + eps).sqrt()).to(x.dtype)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (c) so that they meet the channels, the second dimension of x (n, c, ...)."""
    return values.view(-1, *[1] * (x.ndim - 2))


def check_channels(x: Tensor, n_channels: int) -> None:
    """Refuse other channels than a norm was made for; torch would stretch one weight over all."""
    if x.ndim < 2 or x.shape[1] != n_channels:
        raise DataError(f"This norm takes (n, {n_channels}, ...).", saw=describe(x))


class LayerNorm(Module):
    """Normalise every item over its last dimensions, as transformers and recurrent models do.

    An item's scale and offset are lost: before the first layer it could not tell fog from sunshine.

    Args:
        shape: of the last dimensions, (c, h, w) for images, or one number, the features of a token.
        eps: see `standardised`.
    """

    def __init__(self, shape: int | Sequence[int], eps: float = 1e-5):
        self.shape, self.eps = (shape,) if isinstance(shape, int) else tuple(shape), eps
        self.weight = Parameter(torch.ones(self.shape))
        self.bias = Parameter(torch.zeros(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised, scaled and shifted."""
        if x.shape[-len(self.shape) :] != self.shape:
            raise DataError(f"This LayerNorm takes (..., {str(self.shape)[1:]}.", saw=describe(x))
        mean, variance = moments(x, tuple(range(-len(self.shape), 0)))
        return standardised(x, mean, variance, self.eps) * self.weight + self.bias


class GroupNorm(Module):
    """Normalise every item over groups of channels (Wu and He, 2018).

    With one group it goes over the whole item, with a group a channel it is an InstanceNorm.

    Args:
        n_groups: divides the number of channels.
        n_channels: the second dimension of (n, c, ...).
        eps: see `standardised`.
    """

    def __init__(self, n_groups: int, n_channels: int, eps: float = 1e-5):
        if n_channels % n_groups:
            raise SetupError("The groups must divide the channels.", saw=f"{n_channels}/{n_groups}")
        self.n_groups, self.eps = n_groups, eps
        self.weight = Parameter(torch.ones(n_channels))
        self.bias = Parameter(torch.zeros(n_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised, scaled and shifted."""
        check_channels(x, len(self.weight))
        groups = x.unflatten(1, (self.n_groups, -1)).flatten(2)
        y = standardised(groups, *moments(groups, (2,)), self.eps).view(x.shape)
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    def settings(self) -> str:
        """Return the number of groups."""
        return f"groups {self.n_groups}"


class InstanceNorm(Module):
    """Normalise every map of every item (Ulyanov et al., 2016), for style transfer.

    What makes a map strong in one image and weak in another is lost: bad for telling classes apart.

    Args:
        n_channels: the second dimension of (n, c, ...).
        eps: see `standardised`.
        affine: whether weight and bias are learned; as in torch, not unless it is said.
    """

    def __init__(self, n_channels: int, eps: float = 1e-5, affine: bool = False):
        self.n_channels, self.eps = n_channels, eps
        self.weight = Parameter(torch.ones(n_channels)) if affine else None
        self.bias = Parameter(torch.zeros(n_channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised, and scaled and shifted if that is learned."""
        check_channels(x, self.n_channels)
        if math.prod(x.shape[2:]) < 2:
            raise DataError(
                "InstanceNorm needs maps of more than one place; of one, only 0 would be left.",
                saw=describe(x),
            )
        y = standardised(x, *moments(x, tuple(range(2, x.ndim))), self.eps)
        if self.weight is None or self.bias is None:
            return y
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)
