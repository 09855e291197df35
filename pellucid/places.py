"""The modules of a model where they stand: a tree in which what is shared stands several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .foundations import Parameter
from .foundations.composite import Composite, held


@dataclass(eq=False)
class Place:
    """A module where it stands in the tree, and what was seen of it there.

    Iterating gives the place itself and all places below it, from the top.

    Attributes:
        module: torch's or one of `foundations`.
        name: from the top, joined by dots; "" is the whole.
        above: the places that this one is in, from the top.
        parts: the places directly below.
        n_calls: how often it was called here.
        outputs: of the first call and the last, in words.
        flops: of its own forward, without its parts.
        kept: bytes that its own forward saved for backward, without its parts.
    """

    module: Any
    name: str = ""
    above: tuple[Place, ...] = ()
    parts: list[Place] = field(default_factory=list)
    n_calls: int = 0
    outputs: list[str] = field(default_factory=list)
    flops: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        outer = [*(place.module for place in self.above), self.module]
        for label, module in _children(self.module):
            if not any(module is one for one in outer):  # a part may know its parent
                name = f"{self.name}.{label}".lstrip(".")
                self.parts.append(Place(module, name, (*self.above, self)))

    def __iter__(self) -> Iterator[Place]:
        yield self
        for part in self.parts:
            yield from part

    def is_in(self, other: Place) -> bool:
        """Say whether this is the other place or lies below it."""
        return self is other or other in self.above


def parameters_of(module: Any) -> list[tuple[str, Tensor]]:
    """Return the parameters that a module itself holds, without its parts, with their names."""
    if isinstance(module, Composite):
        return list(held(module, Parameter))
    return [(name, param) for name, param in module._parameters.items() if param is not None]


def _children(module: Any) -> list[tuple[str, Any]]:
    """Return the direct parts with their names, one with two names twice."""
    if isinstance(module, Composite):
        return list(module._parts())
    return [(name, part) for name, part in module._modules.items() if part is not None]
