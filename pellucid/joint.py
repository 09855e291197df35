"""Several optimisers as one, and groups that each go at their own multiple of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from .errors import SetupError
from .optim import guards

_FOR_A_STEP = ("found_inf", "grad_scale")
"""What torch's GradScaler and `optim.guard` leave on an optimiser for its next step."""


class Joint(Optimizer):
    """One optimiser made of several, which see the same parameter groups and share one state.

    A group's "lr" is the common rate, which schedules, `fit(lr=...)` and the learning-rate finder
    set; a step of the group is made with lr · lr_factor. State and groups are saved and loaded in
    torch's form, as of one optimiser. A group that is added later is the last part's.

    Args:
        parts: optimisers with parameters of their own; their groups, in this order, are this one's.
            A group may have an "lr_factor"; those without get 1.

    Raises:
        SetupError: a part is none of torch's, or is LBFGS, which evaluates batches itself.
    """

    def __init__(self, parts: Iterable[Optimizer]):
        self.parts = list(parts)
        for part in self.parts:
            if not isinstance(part, Optimizer) or isinstance(part, LBFGS):
                raise SetupError(
                    "Joint takes torch's optimisers, LBFGS excepted.", saw=type(part).__name__
                )
        super().__init__([g for part in self.parts for g in part.param_groups], {"lr_factor": 1.0})
        for part in self.parts:
            self.state.update(part.state)  # what they began with: `fastest` gives SGD its momentum
        self._share()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(map(guards, self.parts))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each part step once, at its groups' own rates; return what the closure gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._own_rates(), ExitStack() as stack:
            for part in self.parts:
                for name in _FOR_A_STEP:
                    if name in vars(self):
                        vars(part)[name] = vars(self)[name]
                        stack.callback(vars(part).pop, name)
                part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give a group to the last part."""
        if not any(param_group is group for part in self.parts for group in part.param_groups):
            self.parts[-1].add_param_group(param_group)
        super().add_param_group(param_group)

    @contextmanager
    def _own_rates(self) -> Generator[None]:
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * group["lr_factor"]
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _share(self) -> None:
        """Let the parts hold this one's groups, each its own, and the state of all."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict comes here too
        super().__setstate__(state)
        self._share()
