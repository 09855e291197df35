"""Losses as their formulas read, and a loss made ready for use.

Those of `foundations` and one more; training uses torch's fused forms (`torch.nn.functional`),
which these equal. `nll` takes log-probabilities as torch does; what takes probabilities says so in
its name.
"""

import copy
from collections.abc import Callable
from functools import partial

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
    "smooth_labels",
    "smoothed",
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


def smooth_labels(targets: Tensor, n_classes: int, smoothing: float = 0.1) -> Tensor:
    """Return targets as probabilities that leave something to every class (Szegedy et al., 2016).

    smoothing / c for each of the c classes, and 1 - smoothing more for the right one.

    >>> smooth_labels(torch.tensor([0, 2]), 4, smoothing=0.2)
    tensor([[0.8500, 0.0500, 0.0500, 0.0500],
            [0.0500, 0.0500, 0.8500, 0.0500]])

    Args:
        targets: (n), numbers of classes.
        n_classes: c.
        smoothing: 0 to 1.

    Returns:
        (n, c) float32, a target that `torch.nn.functional.cross_entropy` takes.
    """
    return F.one_hot(targets, n_classes) * (1 - smoothing) + smoothing / n_classes


def smoothed(loss_func: Callable[..., Tensor], smoothing: float) -> Callable[..., Tensor]:
    """Return a cross entropy that smooths its targets; `loss_func` itself stays as it is.

    Its class weights and the rest of its settings are kept. (1 - s) · -log p of the right class
    + s · the mean of -log p over all classes: the same as with `smooth_labels`.

    Args:
        loss_func: torch's `F.cross_entropy`, or an `nn.CrossEntropyLoss`.
        smoothing: s, 0 to 1.

    Raises:
        SetupError: another loss, one that smooths already, or a smoothing out of range.
    """
    if not 0 <= smoothing <= 1:
        raise SetupError("Labels are smoothed by a share from 0 to 1.", saw=f"{smoothing!r}")
    if isinstance(loss_func, nn.CrossEntropyLoss) and not loss_func.label_smoothing:
        soft = copy.copy(loss_func)
        soft.label_smoothing = smoothing
        return soft
    if loss_func is F.cross_entropy:
        return partial(F.cross_entropy, label_smoothing=smoothing)
    raise SetupError(
        "Labels can be smoothed where the loss is torch's cross entropy and does not do so itself.",
        saw=repr(loss_func),
        do="give such a loss, nn.CrossEntropyLoss(weight=...) for one with class weights.",
    )
