"""Errors explained after the fact: where in a fit, what was seen there, and what to do.

Asked only once something failed, so none of it costs a run anything.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import CallbackError, NonFiniteLoss, three_parts
from .events import Cancel
from .tree import describe, leaves

if TYPE_CHECKING:
    from .learner import Learner

_ADVICE = [
    (
        r"mat1 and mat2 shapes cannot be multiplied",
        "a Linear layer expects another number of features; images need an nn.Flatten() before it.",
    ),
    (
        r"expected input\[.*\] to have \d+ channels",
        "the first convolution's in_channels must be the images' second dimension.",
    ),
    (
        r"expected target dtype",
        "cross entropy wants int64 for classes: targets.long().",
    ),
    (
        r"Input type \(unsigned char|not implemented for 'Byte'|but got Byte|dtype.*unsigned char"
        r"|[Ee]xpected .*(Byte|unsigned char)",
        "the inputs are uint8; let the data carry a transform, for instance "
        "transforms=[Normalize.of(train_images)].",
    ),
    (
        r"must have the same dtype|expected scalar type|[Ee]xpected .* to be (Float|Double|Half)",
        "model, inputs and targets differ in dtype; use float32 inputs, float32 targets for a "
        "regression and int64 for classes.",
    ),
    (
        r"multi-target not supported|Expected input batch_size|Expected target size",
        "cross entropy wants predictions (n, classes) and one integer a target, shape (n).",
    ),
    (
        r"grad can be implicitly created only for scalar",
        "the loss must be one number, the mean over the batch; set its reduction to 'mean'.",
    ),
    (
        r"'(float|int|NoneType)' object has no attribute '(backward|detach)'",
        "the loss must return a 0-d tensor, the mean over the batch.",
    ),
    (
        r"argument 'input' .* must be Tensor, not numpy",
        "the batches hold numpy arrays; use DataLoaders.from_arrays, or make tensors of them.",
    ),
    (
        r"does not require grad and does not have a grad_fn",
        "nothing that can be trained reaches the loss: every parameter is frozen, or the model "
        "detaches its output.",
    ),
    (
        r"Expected more than 1 value per channel when training",
        "batch norm cannot train on a batch of one item; use drop_last=True or another batch size.",
    ),
    (
        r"forward\(\) (missing|takes)|got an unexpected keyword argument",
        "the batch and the model's forward disagree about the inputs; n_inputs of DataLoaders "
        "says how many parts of a batch are inputs, and a dict's are passed by name.",
    ),
    (
        r"modified by an inplace operation",
        "an operation such as x += y or relu_ changed a tensor that backward needs.",
    ),
    (
        r"on the same device",
        "a tensor that the model makes itself sits on another device; make it with "
        "device=x.device, or register it as a buffer.",
    ),
    (
        r"out of memory",
        "use a smaller batch size.",
    ),
]


@contextmanager
def located(learn: Learner) -> Generator[None]:
    """Note on every error that leaves the block where it happened, what was seen and what helps.

    The error stays the same object with the same traceback.
    """
    try:
        yield
    except Cancel as stray:
        raise CallbackError(
            f"{type(stray).__name__} was raised where it has no meaning.",
            saw="; ".join(getattr(stray, "__notes__", [])),
            do="pellucid/events.py says which Cancel can be raised in which moment.",
        ) from None
    except NonFiniteLoss:  # says itself where it was, which is not where it was read
        raise
    except Exception as error:
        tensors = {"x": learn.x, "y": learn.y, "preds": learn.preds}
        saw = [f"{name} {describe(value)}" for name, value in tensors.items() if value is not None]
        error.add_note(
            three_parts(_place(learn), ", ".join(saw), advice(error, learn.y, learn.preds))
        )
        raise


def _place(learn: Learner) -> str:
    part = "training" if learn.training else "validation"
    if learn.n_batches is None and learn.batch_index <= 0 and learn.x is None:
        return "at the start of the fit"
    batch = f"batch {learn.batch_index} of {learn.n_batches or '?'}"
    if not learn.n_epochs:
        return f"in {part}, {batch} (counted from 0)"
    if learn.batch_index < 0:
        return f"in {part}, epoch {learn.epoch} of {learn.n_epochs} (counted from 0), at its start"
    return f"in {part}, epoch {learn.epoch} of {learn.n_epochs}, {batch} (both counted from 0)"


def advice(error: Exception, targets: Any, preds: Any) -> str:
    """Say what to do about an error in a model or a loss; empty where nothing is recognised."""
    text = str(error)
    if re.search(r"Target -?\d+ is out of bounds|index .* out of (range|bounds)|device-side", text):
        return _label_range(targets, preds)
    return next((line for pattern, line in _ADVICE if re.search(pattern, text)), "")


def _label_range(targets: Any, preds: Any) -> str:
    labels = next((leaf for leaf in leaves(targets) if isinstance(leaf, Tensor)), None)
    if labels is None or not isinstance(preds, Tensor) or preds.ndim < 2 or not labels.numel():
        return ""
    try:
        low, high = int(labels.min()), int(labels.max())
    except RuntimeError:  # a GPU that hit an assertion answers nothing any more
        return "a label is outside the model's classes; run on the CPU to see which."
    return (
        f"the labels of this batch go from {low} to {high}, the model gives {preds.shape[1]} "
        f"classes, 0 to {preds.shape[1] - 1}; mend the labels or the model's last layer."
    )
