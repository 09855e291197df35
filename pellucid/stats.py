"""Small statistics of tensors, each as its formula reads.

All use the population form (divide by n), the one that normalisation layers use; only where the
same form stands in all of its parts is a correlation of a thing with itself 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def variance(t: Tensor) -> Tensor:
    """Return the variance in one pass, E[x²] - E[x]², over all elements.

    The elements are shifted by the first one and summed in float64: a large mean then costs no
    digits (unshifted float32 sums of values near 10,000 lose the variance's second digit).
    """
    shifted = t.flatten().double() - t.flatten()[0].double()
    return (shifted.square().mean() - shifted.mean().square()).to(_result_dtype(t))


def standard_deviation(t: Tensor) -> Tensor:
    """Return the square root of the variance."""
    return variance(t).sqrt()


def mean_absolute_deviation(t: Tensor) -> Tensor:
    """Return E[|x - E[x]|]: like the standard deviation, but an outlier counts once."""
    t = t.to(_result_dtype(t))
    return (t - t.mean()).abs().mean()


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Return E[ab] - E[a]E[b] over the paired elements of two tensors of one shape."""
    if a.shape != b.shape:
        raise ValueError(f"covariance pairs elements: shapes {tuple(a.shape)}, {tuple(b.shape)}")
    left = a.flatten().double() - a.flatten()[0].double()
    right = b.flatten().double() - b.flatten()[0].double()
    return ((left * right).mean() - left.mean() * right.mean()).to(_result_dtype(a))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation, cov(a, b) / (σ(a) σ(b)), in [-1, 1]."""
    return covariance(a, b) / (standard_deviation(a) * standard_deviation(b))


def norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor of floats, float32 (tensors,); one or more."""
    tensors = list(tensors)
    # half precision cannot hold the norm of many values; wider numbers refuse to be narrowed
    narrow = all(tensor.dtype in (torch.float32, *HALVES) for tensor in tensors)
    found = torch._foreach_norm(tensors, 2, torch.float32 if narrow else None)
    return torch.stack([norm.float() for norm in found])


def _result_dtype(t: Tensor) -> torch.dtype:
    return t.dtype if t.is_floating_point() else torch.get_default_dtype()
