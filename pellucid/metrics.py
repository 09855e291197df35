"""Metrics: what a run is judged by, computed where the predictions are.

A metric is a function `(preds, targets) -> number` that gives the mean over a batch; the mean over
an epoch weighs each batch by its number of items, so ragged batches count right. Or it is an
object with `update(preds, targets)`, `compute()` and `reset()` (torchmetrics' objects are), for
what is no mean over items. Neither may read a value back from the device.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import DataError, SetupError
from .tree import describe


@runtime_checkable
class MetricObject(Protocol):
    """What gathers batch by batch and answers at the end."""

    def update(self, preds: Any, targets: Any) -> None:
        """Take in one batch."""

    def compute(self) -> Any:
        """Return the value over all batches since the last reset, a number or 0-d tensor."""

    def reset(self) -> None:
        """Forget all batches."""


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """Return the share of items whose highest prediction is the right class.

    Args:
        preds: (n, classes) or (n, classes, ...), logits or probabilities; two classes or more.
        targets: (n) or (n, ...), the class of each item as an integer.

    Returns:
        0-d float32 tensor in [0, 1].

    Raises:
        DataError: the shapes do not fit; comparing them anyway would stretch one along the other.
            Or there is one output, of which the highest is always the first.
    """
    if preds.ndim > 1 and preds.shape[1] == 1:
        raise DataError(
            "accuracy compares the outputs of an item, and there is one alone.",
            saw=f"predictions {describe(preds)}, targets {describe(targets)}",
            do="for two classes by one logit write a metric: "
            "def hits(preds, targets): "
            "return ((preds.flatten() > 0) == targets.flatten()).float().mean()",
        )
    guesses = preds.argmax(1) if preds.ndim > 1 else preds
    if guesses.shape != targets.shape or preds.ndim < 2:
        raise DataError(
            "accuracy compares predictions (n, classes) with targets (n).",
            saw=f"predictions {describe(preds)}, targets {describe(targets)}",
            do="give each item its class as an integer, or write a metric for these shapes.",
        )
    # a count and a division: the mean of a bool tensor needs a cast and takes twice as long
    return (guesses == targets).count_nonzero() / targets.numel()


class MacroF1:
    """The F1 score of each class, 2 tp / (2 tp + fp + fn), averaged over the classes.

    No mean over items, hence an object; the counts stay on the device. A class that is neither
    seen nor guessed is left out of the average.

    Args:
        n_classes: the number of classes, c.
    """

    def __init__(self, n_classes: int):
        self.n_classes = n_classes
        self.counts: Tensor | None = None  # int64 (c, c), rows the truth, columns the guess

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Take in predictions (n, c) and integer targets (n).

        Raises:
            DataError: they have other shapes.
        """
        if preds.shape != (*targets.shape, self.n_classes) or targets.ndim != 1:
            raise DataError(
                f"{self!r} compares predictions (n, {self.n_classes}) with targets (n).",
                saw=f"predictions {describe(preds)}, targets {describe(targets)}",
                do="give it the number of the model's outputs, and each item its class as an "
                "integer.",
            )
        pairs = targets * self.n_classes + preds.argmax(1)
        counts = pairs.new_zeros(
            self.n_classes**2
        )  # not bincount: on a GPU that waits for the host
        counts = counts.scatter_add_(0, pairs, torch.ones_like(pairs)).view(self.n_classes, -1)
        self.counts = counts if self.counts is None else self.counts + counts

    def compute(self) -> Tensor:
        """Return the score, a 0-d tensor in [0, 1]; NaN before the first batch."""
        if self.counts is None:
            return torch.tensor(torch.nan)
        truths_and_guesses = self.counts.sum(0) + self.counts.sum(1)
        return (2 * self.counts.diagonal() / truths_and_guesses).nanmean()

    def reset(self) -> None:
        """Forget all batches."""
        self.counts = None

    def __repr__(self) -> str:
        return f"MacroF1({self.n_classes})"


def named(metrics: Iterable[Any]) -> dict[str, Any]:
    """Return metrics by name, checked: a function's own name, an object's class in snake case.

    Raises:
        SetupError: something is no metric, or two share a name.
    """
    if isinstance(metrics, str):
        metrics = [metrics]
    if not isinstance(metrics, Iterable):
        raise SetupError("metrics takes a list.", saw=repr(metrics), do="metrics=[accuracy]")
    found: dict[str, Any] = {}
    for metric in metrics:
        name = _name_of(metric)
        if name in found or name == "loss":
            raise SetupError(
                f"Two columns of the record would be called {name!r}.",
                do="give one of the metrics another `__name__`.",
            )
        found[name] = metric
    return found


def _name_of(metric: Any) -> str:
    if isinstance(metric, str):
        raise SetupError(
            f"A metric is a function, not the name {metric!r}.",
            saw=f"metrics=[{metric!r}]",
            do="from pellucid.metrics import accuracy, and give metrics=[accuracy].",
        )
    if isinstance(metric, type) or not (callable(metric) or isinstance(metric, MetricObject)):
        raise SetupError(
            "A metric is a function (preds, targets) -> mean, or an object with update, compute "
            "and reset.",
            saw=repr(metric),
        )
    function: Callable[..., Any] = getattr(metric, "func", metric)  # a partial has its function's
    name = getattr(function, "__name__", None) or type(metric).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
