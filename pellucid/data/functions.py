"""An attribute that holds functions for batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import SetupError

Transform = Callable[..., Any]


class Functions:
    """An attribute that is always a list of functions for batches, though one alone be given."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        if holder is not None and self.name not in vars(holder):
            raise AttributeError(f"{type(holder).__name__} has no {self.name} yet")
        return self if holder is None else vars(holder)[self.name]

    def __set__(self, holder: Any, given: Transform | Iterable[Transform]) -> None:
        is_list = isinstance(given, nn.ModuleList) or not callable(given)  # it only looks callable
        parts = list(given) if is_list and isinstance(given, Iterable) else [given]
        for part in parts:
            if not callable(part):
                raise SetupError(
                    f"`{self.name}` takes a function of a batch of inputs, or a list of such.",
                    saw=f"{self.name} = {given!r}",
                    do=f"{self.name} = [] for none.",
                )
        vars(holder)[self.name] = parts
