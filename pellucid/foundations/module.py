"""Module: a composite that computes, and with all that is in it changes mode, place and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import recursive_repr
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import SetupError
from ..tree import describe
from .composite import HOOKS, Composite, held
from .handle import HookHandle
from .parameter import Parameter


def _no_forward(self: Module, *inputs: Any) -> Any:
    raise SetupError(f"{type(self).__name__} has no forward.", do="def forward(self, x): ...")


class Module(Composite):
    """A part of a model: a subclass sets its parameters and parts, and defines `forward`.

    >>> class Scale(Module):
    ...     def __init__(self):
    ...         self.factor = Parameter(torch.ones(3))
    ...
    ...     def forward(self, x):
    ...         return self.factor * x
    >>> Scale()
    Scale(factor 3)

    Attributes:
        training: whether this is training, which some layers must know; see `train`.
    """

    forward: Callable[..., Any] = _no_forward
    training: bool = True
    _forward_hooks: Mapping[object, Callable[..., Any]] = MappingProxyType({})

    def __call__(self, *inputs: Any) -> Any:
        """Return `forward(*inputs)`, or what a hook puts in its place."""
        output = self.forward(*inputs)
        for hook in tuple(self._forward_hooks.values()):
            answer = hook(self, inputs, output)
            output = output if answer is None else answer
        return output

    def register_forward_hook(self, hook: Callable[..., Any]) -> HookHandle:
        """Have `hook(module, inputs, output)` called after each forward, until it is removed.

        What it returns, unless None, takes the place of the output.
        """
        return HookHandle(vars(self).setdefault(HOOKS, {}), hook)

    def train(self, mode: bool = True) -> Self:
        """Switch this module and all in it to training, or with False to evaluation."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch this module and all in it to evaluation."""
        return self.train(False)

    def to(self, *target: Any) -> Self:
        """Move everything to a device, a dtype or both, in place: `to("cuda", torch.float64)`.

        A dtype is for the floating-point values; a counter stays a whole number. The parameters
        stay the same objects, so that an optimiser goes on holding them.
        """
        place = [part for part in target if not isinstance(part, torch.dtype)]
        gradients = [param.grad for param in self.parameters() if param.grad is not None]
        for tensor in [*self.parameters(), *gradients, *self.buffers()]:
            tensor.data = tensor.data.to(*(target if tensor.is_floating_point() else place))
        return self

    def zero_grad(self) -> None:
        """Drop the gradients; without this, the next `backward` adds to them."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, what is shared under each of its names.

        They are the model's own values, not copies: training goes on changing them.
        """
        state = {}
        for prefix, module in self._ways():
            own = {**dict(held(module, Parameter)), **module._buffers}
            state |= {prefix + name: tensor.detach() for name, tensor in own.items()}
        return state

    def load_state_dict(
        self, state: Mapping[str, Tensor], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Copy values into the parameters and buffers of the same names.

        Args:
            state: what `state_dict` returned, of this model or another one of the same structure.
            strict: refuse names that differ; otherwise they are passed over.

        Returns:
            The names missing in `state`, and those unexpected.

        Raises:
            SetupError: names differ, or shapes; nothing was copied then.
        """
        own = self.state_dict()
        missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
        wrong = [
            f"{n} ({describe(state[n])} for {describe(own[n])})"
            for n in own
            if n in state and own[n].shape != state[n].shape
        ]
        if wrong or (strict and (missing or unexpected)):
            seen = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
            raise SetupError(
                f"These weights do not fit {type(self).__name__}.",
                saw="; ".join(
                    f"{what}: {', '.join(names)}" for what, names in seen.items() if names
                ),
            )
        with torch.no_grad():
            for name in own.keys() & state.keys():
                own[name].copy_(state[name])
        return missing, unexpected

    def settings(self) -> str:
        """Return what `repr` shows of a layer besides the shapes of its parameters."""
        return ""

    @recursive_repr("...")
    def __repr__(self) -> str:
        shapes = [f"{n} {'×'.join(map(str, p.shape))}" for n, p in held(self, Parameter)]
        parts = [f"\n({n}): {part!r}".replace("\n", "\n  ") for n, part in self._parts()]
        inner = ", ".join(filter(None, [*shapes, self.settings()]))
        return f"{type(self).__name__}({inner}{''.join(parts)}" + ("\n)" if parts else ")")
