"""Clipping of gradients."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from ..errors import SetupError, are_numbers
from ..events import Callback
from ..learner import Learner
from ..optim import gradients, params_of, takes_one_gradient


class Clip(Callback):
    """Limit the gradient before each step: the norm of all of it, or each of its numbers.

    By the norm, a gradient that is too long is made shorter and keeps its direction (Pascanu et
    al., 2013, "On the difficulty of training recurrent neural networks").

    Args:
        norm: the longest gradient, over all parameters of the optimiser together.
        value: the largest number in it, by absolute value; instead of `norm`.

    Raises:
        SetupError: neither is given, or both, or one that is not positive; or, in the fit, the
            optimiser evaluates batches itself (LBFGS).
    """

    changes = True
    order = 50  # after the gradient is whole, see Accumulate

    def __init__(self, norm: float | None = None, value: float | None = None):
        if (norm is None) == (value is None):
            raise SetupError("Clip takes a norm or a value.", do="Clip(norm=1.0)")
        limit = (value if norm is None else norm) or 0
        if not are_numbers(limit) or not limit > 0:
            raise SetupError("Clip takes a positive limit.", saw=f"norm={norm!r}, value={value!r}")
        self.norm, self.value = norm, value

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Refuse an optimiser whose gradients would not pass here."""
        takes_one_gradient(learn.opt, "Clip")
        yield

    def after_backward(self, learn: Learner) -> None:
        """Clip."""
        if self.norm is not None:
            norm = get_total_norm(gradients(learn.opt))
            # by a norm that is no number all would be spoilt, and nobody could tell what was first
            norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
            clip_grads_with_norm_(params_of(learn.opt), self.norm, norm)
        elif self.value is not None:
            clip_grad_value_(params_of(learn.opt), self.value)
