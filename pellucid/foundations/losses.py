"""Losses: from the numbers a model gives to the one number that training makes small.

A classifier gives one number a class, a *logit*, of any size. Softmax makes probabilities of them,
pᵢ = exp xᵢ / Σ exp xⱼ, and the loss is −log p of the right class: nothing if the model was sure of
it, much if it was sure of another. Computed in this order it fails, since exp overflows at 89 in
float32 and log of an underflow is −∞. In logarithms nothing is lost:
log p = x − log Σ exp x, and the sum is tamed by `logsumexp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..tree import describe


def logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """Return log Σ exp x over a dimension, as max + log Σ exp(x − max).

    This is the same number, since exp(x) = exp(max) · exp(x − max), but the largest exponent is now
    0: nothing overflows, and what underflows is too small to matter. The max is a constant to the
    gradient, which is softmax(x) whatever is subtracted.

    Args:
        x: any shape.
        dim: is summed over, and gone in the result.
    """
    peak = x.detach().amax(dim, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0)  # ∞ − ∞ is no number
    return (x - peak).exp().sum(dim).log() + peak.squeeze(dim)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Return the logarithms of the probabilities, x − logsumexp(x), of x's shape.

    >>> [round(logit, 4) for logit in log_softmax(torch.tensor([1000.0, 1001.0, 1002.0])).tolist()]
    [-2.4076, -1.4076, -0.4076]
    """
    return x - logsumexp(x, dim).unsqueeze(dim)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Return probabilities, exp x / Σ exp x, of x's shape: positive, with sum 1 over `dim`.

    Adding a constant to all logits changes nothing: it says which class it is if it is one of them,
    not whether it is any. Where several classes or none may be present, each needs its own
    probability: the sigmoid, and `binary_cross_entropy_with_logits`.
    """
    return log_softmax(x, dim).exp()


def nll(log_probabilities: Tensor, targets: Tensor, dim: int = -1) -> Tensor:
    """Return the mean negative log-likelihood, −log p of the right class, as a 0-d tensor.

    By definition it is −Σ y log p with y the one-hot target; all but one of these products are 0,
    so they are not carried out: the one entry is looked up.

    Args:
        log_probabilities: (..., classes); **not** probabilities.
        targets: int64, numbers of classes, of the same shape without `dim`.
        dim: the classes; 1 for a class a pixel, (n, classes, h, w).
    """
    _check_same_shape(log_probabilities.select(dim, 0), targets)
    return -log_probabilities.gather(dim, targets.unsqueeze(dim)).mean()


def cross_entropy(logits: Tensor, targets: Tensor, dim: int = -1) -> Tensor:
    """Return `nll` of `log_softmax`: the loss of a classifier, from its raw output.

    A model that knows nothing about 10 classes has a loss of log 10:

    >>> cross_entropy(torch.zeros(4, 10), torch.arange(4))
    tensor(2.3026)
    """
    return nll(log_softmax(logits, dim), targets, dim)


def binary_nll(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of −y log p − (1 − y) log(1 − p): yes-or-no questions, each for itself.

    Logarithms end at −100, as torch's do: a model that was sure and wrong is not punished with ∞.
    There the chain rule would make NaN of the gradient, 0 / 0, so this one is written out.

    Args:
        probabilities: in [0, 1], any shape.
        targets: y, of that shape, floats in [0, 1].
    """
    _check_same_shape(probabilities, targets)
    return _BinaryNLL.apply(probabilities, targets).mean()


class _BinaryNLL(torch.autograd.Function):
    """`binary_nll` of each item, its gradient (p − y) / (p (1 − p)) divided by 1e-12 at least.

    What is written as a Function autograd does not look into: it calls `backward`.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(p, y)
        return -(y * _bounded_log(p) + (1 - y) * _bounded_log(1 - p))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        [grad], (p, y) = grads, ctx.saved_tensors
        slope = (p - y) / (p * (1 - p)).clamp(min=1e-12)
        return grad * slope, grad * (_bounded_log(1 - p) - _bounded_log(p))


def _bounded_log(p: Tensor) -> Tensor:
    """Return log p, or −100 where it is less."""
    return p.log().clamp(min=-100)


def binary_cross_entropy_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `binary_nll` of the sigmoid of logits, without its overflow.

    The sigmoid of x is the softmax of the pair (0, x). So −log p is logsumexp(0, x) − x for a yes,
    logsumexp(0, x) for a no, and in between for targets in between.
    """
    _check_same_shape(logits, targets)
    both = logsumexp(torch.stack([torch.zeros_like(logits), logits]), 0)
    return (both - targets * logits).mean()


def mean_squared_error(preds: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors of one shape."""
    _check_same_shape(preds, targets)
    return (preds - targets).square().mean()


def _check_same_shape(preds: Tensor, targets: Tensor) -> None:
    # torch would stretch (n, 1) against (n) to (n, n), or look up the first few of n items alone,
    # and training would go on, on nonsense
    if preds.shape != targets.shape:
        raise DataError(
            "Predictions and targets differ in shape.",
            saw=f"predictions {describe(preds)}, targets {describe(targets)}",
        )
