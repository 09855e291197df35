"""Losses as their formulas read, and a loss made ready for use.

Those of `foundations` and one more; training uses torch's fused forms (`torch.nn.functional`),
which these equal. `nll` takes log-probabilities as torch does; what takes probabilities says so in
its name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DataError, SetupError
from .foundations.losses import binary_nll, cross_entropy, log_softmax, logsumexp, nll
from .tree import describe

__all__ = [
    "binary_nll",
    "cross_entropy",
    "log_softmax",
    "logsumexp",
    "mean_squared_error",
    "nll",
    "nll_of_probabilities",
    "ready_loss",
]


def nll_of_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return `nll` of probabilities (n, c), as a softmax gives them."""
    return nll(probabilities.log(), targets)


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
