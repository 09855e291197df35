"""Losses as their formulas read, and the one that fits a kind of target.

Written for the last dimension being the classes, numerically stable, equal to torch's own; training
uses torch's fused forms (`torch.nn.functional`), these are to read, to check and to teach.
`nll` takes log-probabilities as torch does; what takes probabilities says so in its name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DataError, SetupError
from .tree import describe


def logsumexp(x: Tensor) -> Tensor:
    """Return log Σ exp(x) over the last dimension, as max + log Σ exp(x - max).

    Without the shift, exp overflows at 89 in float32.
    """
    highest = x.amax(-1, keepdim=True)
    return highest.squeeze(-1) + (x - highest).exp().sum(-1).log()


def log_softmax(x: Tensor) -> Tensor:
    """Return x - logsumexp(x): log-probabilities of the same shape."""
    return x - logsumexp(x).unsqueeze(-1)


def nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of int targets (n,) under log-probabilities (n, c).

    Picking the entry of the right class is the product with the one-hot target, not carried out.
    """
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


def nll_of_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return `nll` of probabilities (n, c), as a softmax gives them."""
    return nll(probabilities.log(), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of int targets (n,) and logits (n, c)."""
    return nll(log_softmax(logits), targets)


def binary_nll(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -y log p - (1 - y) log(1 - p) for targets y in [0, 1].

    Logarithms end at -100, as torch's do.
    """
    yes, no = probabilities.log().clamp(min=-100), (1 - probabilities).log().clamp(min=-100)
    return -(targets * yes + (1 - targets) * no).mean()


def mean_squared_error(preds: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors of one shape.

    Raises:
        DataError: the shapes differ. Torch would stretch (n, 1) against (n,) to (n, n) and train
            on nonsense.
    """
    if preds.shape != targets.shape:
        raise DataError(
            "Predictions and targets differ in shape.",
            saw=f"predictions {describe(preds)}, targets {describe(targets)}",
            do="end the model with nn.Flatten(0), or give targets of the predictions' shape.",
        )
    return F.mse_loss(preds, targets)


def ready_loss(loss_func: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Return a loss ready for use: a module (with class weights, say) is moved to the device.

    Raises:
        SetupError: a class was given, `nn.CrossEntropyLoss` for `nn.CrossEntropyLoss()`.
    """
    if isinstance(loss_func, type):
        name = loss_func.__name__
        raise SetupError("The loss is a class.", saw=name, do=f"make an instance: {name}().")
    return loss_func.to(device) if isinstance(loss_func, nn.Module) else loss_func
