"""Muon: momentum whose every matrix is made orthogonal before the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .device import choose_precision
from .errors import SetupError, are_numbers, are_whole
from .optim import checked_lr

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, chosen for its slope at zero (Jordan et al., 2024)."""

_FACTORS: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
}


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of matrices near 1, by Newton-Schulz iterations.

    About U Vᵀ where a matrix is U S Vᵀ; what it was multiplied by makes no difference. After 5
    steps the singular values are about 0.7 to 1.2, those that were tiny excepted (Jordan et al.,
    2024, "Muon: an optimizer for hidden layers in neural networks"). Computed in bfloat16 where the
    device gains by it (`device.choose_precision`), else in float32.

    Args:
        matrices: (..., rows, columns), floating point.
        steps: iterations.

    Returns:
        (..., rows, columns), of that dtype.
    """
    half = choose_precision(matrices.device)[0] == "bf16"
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if half else torch.float32).reshape(-1, *matrices.shape[-2:])
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(Optimizer):
    """SGD with momentum, its direction made orthogonal matrix by matrix (Jordan et al., 2024).

    For weights of two dimensions as torch.optim.Muon, to rounding; those of more, convolutions,
    are taken as matrices (out, all others). Weights of one shape are handled together. It is for
    the hidden layers: biases, norms, embeddings and the head want another optimiser, see
    `roles.ByRole`. A step can be switched off on the device, as a fused one's (`optim.guard`).

    Args:
        params: parameters of two dimensions or more, or groups of them.
        lr: learning rate.
        weight_decay: decoupled: w loses lr · weight_decay of itself.
        momentum: share of the old direction in the new.
        nesterov: look ahead by Nesterov's rule.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: multiplies a matrix's rate by: "match_rms_adamw", 0.2 √max(rows, columns), a
            step of the size of AdamW's, so that both take one rate and one decay (Liu et al., 2025,
            "Muon is scalable for LLM training"); "original", √max(1, rows / columns), which is
            torch's default; "none", 1.
        reset_norm: before each step, scale every weight to a Frobenius norm of √rows, as the
            CIFAR-10 speed recipe airbench94_muon does to filters followed by batch norm.

    Raises:
        SetupError: a parameter has fewer than two dimensions, or a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        reset_norm: bool = False,
    ):
        checked_lr(lr)
        numbers = are_numbers(momentum, weight_decay) and are_whole(ns_steps)
        in_range = numbers and 0 <= momentum < 1 and 0 <= weight_decay < math.inf and ns_steps >= 1
        if adjust_lr_fn not in _FACTORS or not in_range:
            raise SetupError(
                f"Muon needs adjust_lr_fn of {', '.join(_FACTORS)}, momentum in [0, 1), a "
                "weight_decay of 0 or more, and 1 or more whole ns_steps.",
                saw=f"adjust_lr_fn {adjust_lr_fn!r}, momentum {momentum}, weight_decay "
                f"{weight_decay}, ns_steps {ns_steps}",
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "reset_norm": reset_norm,
        }
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of matrices."""
        super().add_param_group(param_group)
        for param in param_group["params"]:
            if param.ndim < 2 or not param.is_floating_point():
                self.param_groups.pop()
                raise SetupError(
                    "Muon takes real parameters of two dimensions or more.",
                    saw=f"{param.dtype} of shape {tuple(param.shape)}",
                    do='ByRole(AdamW, {"matrix": Muon, "conv": Muon}) gives others to AdamW.',
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return what the closure gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    key = (tuple(param.shape), param.dtype, param.device)
                    by_shape.setdefault(key, []).append(param)
            for params in by_shape.values():
                self._move(params, group)
        return loss

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step with parameters of one shape."""
        gradients = [param.grad for param in params if param.grad is not None]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        buffers = [self._momentum(param) for param in params]
        momentum, rate = group["momentum"], group["lr"]
        share, decay = 1 - momentum, rate * group["weight_decay"]
        bad = getattr(self, "found_inf", None)
        if bad is not None:  # then nothing may move, not even by NaN times zero
            pairs = zip(gradients, buffers, strict=True)  # towards themselves momenta stay
            gradients = [torch.where(bad != 0, buffer, gradient) for gradient, buffer in pairs]
            decay, rate = ((1 - bad) * factor for factor in (decay, rate))
        torch._foreach_lerp_(buffers, gradients, share)
        ahead = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        matrices = torch.stack([direction.flatten(1) for direction in ahead])
        directions = orthogonalized(matrices, group["ns_steps"]).to(matrices.dtype)
        if group["reset_norm"]:
            self._reset_norms(params, bad)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - decay)
        rate = rate * _FACTORS[group["adjust_lr_fn"]](*matrices.shape[1:])
        steps = (directions * rate).unbind()
        shaped = [step.view(param.shape) for step, param in zip(steps, params, strict=True)]
        torch._foreach_sub_(params, shaped)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]

    @staticmethod
    def _reset_norms(params: list[Tensor], bad: Tensor | None) -> None:
        for param, norm in zip(params, torch._foreach_norm(params), strict=True):
            factor = len(param) ** 0.5 / norm.clamp(min=1e-7)
            param.mul_(factor if bad is None else torch.where(bad != 0, 1, factor))
