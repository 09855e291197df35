"""Numerical precision of the forward pass: float32, or half of it where that is faster."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..device import choose_precision
from ..errors import NonFiniteLoss, SetupError
from ..events import Callback, CancelStep
from ..learner import Learner
from ..optim import gradients, guard, guard_also, guards, takes_one_gradient
from ..sharding import in_shards, zero_if_finite

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_SMALLEST_FACTOR = 2.0**-10
"""Gradients that overflow even so much smaller would overflow in single precision too, nearly."""


class Precision(Callback):
    """Compute forward pass and loss in half precision by torch's autocast; weights stay float32.

    "bf16" has float32's range, "fp16" has not: there the gradient is made larger before the
    backward pass and smaller again after it, by a factor that adapts (Micikevicius et al., 2018,
    "Mixed precision training"). A step whose gradients overflow all the same is not taken; a
    non-finite loss is another matter, see `NonFinite`. Clipping sees true gradients. With both,
    models with 2-d convolutions are laid out channels-last for the time of the fit, unless they are
    in shards.

    Validation is in the same precision. (In fp16 an optimiser that is not fused costs one number
    read back in every step.)

    Args:
        dtype: "bf16", "fp16", "fp32", or "auto": bf16 where the device computes in it faster, see
            `device.choose_precision`; the progress table says what was chosen and why.

    Attributes:
        gradient_factor: what the gradients of the next backward pass are larger by, 0-d; None: by
            nothing.

    Raises:
        SetupError: there is no such precision; or, in the fit and for all but "fp32", the optimiser
            evaluates batches itself (LBFGS).
    """

    changes = True
    decides = "the precision"
    order = 15  # unscaled before anyone looks at the gradient of a step
    comes_last = ("after_loss",)  # it is the loss as all have left it that backward starts from

    def __init__(self, dtype: str = "auto"):
        if dtype not in ("auto", *_DTYPES):
            raise SetupError('Precision takes "auto", "bf16", "fp16" or "fp32".', saw=repr(dtype))
        self.dtype = dtype
        self._chosen = "fp32" if dtype == "auto" else dtype
        self._scaler: GradScaler | None = None
        self._guard: Tensor | None = None
        self.gradient_factor: Tensor | None = None

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Choose, lay the model out for it, and lay it back at the end."""
        if self.dtype != "fp32":
            takes_one_gradient(learn.opt, "Precision")
        known = learn.device_reason
        if self.dtype == "auto":
            self._chosen, reason = choose_precision(learn.device)
            learn.device_reason = f"{known}; {self._chosen}: {reason}"
        self._scaler, self._guard, self.gradient_factor = None, None, None
        if self._chosen == "fp16":
            self._scaler = GradScaler(learn.device.type)
            self.gradient_factor = self._scaler.scale(torch.ones((), device=learn.device))
        laid_out = self._chosen != "fp32" and isinstance(learn.model, nn.Module)
        laid_out = laid_out and not in_shards(learn.model)  # which are gathered in their own layout
        try:
            with ExitStack() as stack:
                if laid_out:
                    stack.enter_context(_channels_last(learn.model, learn.opt))
                if self._scaler:
                    stack.enter_context(guard(learn.opt, torch.zeros((), device=learn.device)))
                yield
        finally:
            learn.device_reason = known

    def around_forward(self, learn: Learner) -> AbstractContextManager[None]:
        """Let torch compute in the precision."""
        if self._chosen == "fp32":
            return nullcontext()
        return torch.autocast(learn.device.type, _DTYPES[self._chosen])

    def after_loss(self, learn: Learner) -> None:
        """Let the gradient be larger by the scaler's factor; the loss stays what it is."""
        factor = self.gradient_factor
        if factor is not None and learn.training and learn.loss.requires_grad:
            learn.loss.register_hook(lambda gradient: (gradient * factor).to(gradient.dtype))

    def after_backward(self, learn: Learner) -> None:
        """Make the gradients smaller again, and take no step if they have overflowed."""
        if self._scaler is None or not gradients(learn.opt):
            return
        self._scaler.unscale_(learn.opt)
        self._scaler.update()
        self.gradient_factor = self._scaler.scale(torch.ones((), device=learn.device))
        overflowed = torch.ne(zero_if_finite(gradients(learn.opt), learn.device), 0).float()
        if guards(learn.opt):
            self._guard = guard_also(learn.opt, overflowed, self._guard)
        elif learn.tally.non_finite != "skip" and overflowed.item():  # else NonFinite looks
            learn.zero_grad()
            raise CancelStep

    def after_train(self, learn: Learner) -> None:
        """Tell if the gradients overflow however small they are made: nothing is trained any more.

        Raises:
            NonFiniteLoss: that is so, and the fit is to stop for what is not finite.
        """
        if self._scaler is None or learn.tally.non_finite != "stop":
            return
        if self._scaler.get_scale() < _SMALLEST_FACTOR:
            error = NonFiniteLoss(
                "Gradients are not finite in batch after batch, so in half precision no step is "
                "taken any more.",
                saw=f"gradients made {1 / _SMALLEST_FACTOR:.0f} times smaller, and not finite yet",
                do='Precision("fp32") stops at the first; look for a square root, a logarithm or a '
                "division at zero.",
            )
            error.batch = None
            raise error


@contextmanager
def _channels_last(model: nn.Module, opt: Optimizer) -> Generator[None]:
    """Lay the weights of 2-d convolutions out channels-last in a block, and then as they were."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    # a parametrised weight is computed anew each time, a lazy one is not there yet
    own = [dict(conv.named_parameters(recurse=False)).get("weight") for conv in convs]
    strides = {w: w.stride() for w in own if w is not None and not is_lazy(w)}
    try:
        for weight in strides:
            last = torch.empty_like(weight, memory_format=torch.channels_last)
            _lay_out(weight, last.stride(), opt)
        yield
    finally:
        for weight, stride in strides.items():
            _lay_out(weight, stride, opt)


def _lay_out(weight: Tensor, stride: tuple[int, ...], opt: Optimizer) -> None:
    """Lay out a weight, and what the optimiser keeps of it: fused steps go by places in memory."""
    weight.data = _laid_out(weight.data, stride)
    state: dict[str, Any] = opt.state.get(weight, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            state[name] = _laid_out(value, stride)


def _laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor
    new = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return new.copy_(tensor)
