"""Optimizer: what moves parameters against their gradients, by any list of steppers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SetupError, UnknownName, did_you_mean

Stepper = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], Tensor]
Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Optimizer:
    """Move parameters by w −= lr · direction, the direction being made by steppers.

    Args:
        params: the parameters, or groups of them: dicts with "params" and those hyper-parameters
            that differ from the others'.
        steppers: each makes a new direction of the last one's, the first of the gradient; see
            `steppers`.
        hypers: names and values of the hyper-parameters; "lr", and those that the steppers read.

    Attributes:
        param_groups: dicts of "params" and hyper-parameters. A schedule writes into them.
        state: for each parameter, what its steppers remember.

    Raises:
        SetupError: no parameters, something else, or one that occurs twice.
        UnknownName: a group has a hyper-parameter that the optimiser does not know.
    """

    def __init__(self, params: Params, steppers: Sequence[Stepper], hypers: dict[str, Any]):
        given: list[Any] = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = [
            {**hypers, **group, "params": list(group["params"])} for group in groups
        ]
        self.steppers = tuple(steppers)
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._check(hypers)

    def _check(self, hypers: dict[str, Any]) -> None:
        held = [param for group in self.param_groups for param in group["params"]]
        if not held or not all(isinstance(param, Tensor) and param.is_leaf for param in held):
            raise SetupError(
                "An optimiser needs parameters: tensors that were not computed from others.",
                saw=", ".join(sorted({type(param).__name__ for param in held})) or "none at all",
            )
        if len(set(map(id, held))) < len(held):
            raise SetupError("A parameter is given twice, and would move twice a step.")
        for name in {name for group in self.param_groups for name in group}:
            if name not in hypers and name != "params":
                raise UnknownName(
                    f"The optimiser has no hyper-parameter {name!r}.", do=did_you_mean(name, hypers)
                )

    @torch.no_grad()  # the step is no part of what is differentiated
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    direction = param.grad
                    for stepper in self.steppers:
                        direction = stepper(direction, param, self.state[param], group)
                    param.add_(direction, alpha=-group["lr"])

    def zero_grad(self) -> None:
        """Drop the gradients of these parameters, and of no others.

        Not done by `step`: `backward` adds to a gradient that is there, and so several batches, or
        several losses, can make one step together.
        """
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def __repr__(self) -> str:
        groups = [
            ", ".join(f"{name}={value}" for name, value in group.items() if name != "params")
            for group in self.param_groups
        ]
        return f"{type(self).__name__}({'; '.join(groups)})"
