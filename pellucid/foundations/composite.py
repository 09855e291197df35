"""Composite: a thing made of parts that finds them by itself.

An optimiser wants all parameters of a model, a file all its tensors, a device all of them moved. A
composite finds them by looking at its own attributes at the moment of asking: an attribute that
holds a Parameter is a parameter, one that holds a composite is a part, and lists, tuples and dicts
are looked into. There is no register beside the attributes. So there is nothing that
`super().__init__()` would have to set up, a new value for `self.weight` replaces the old one, and a
layer appended to a list is found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..errors import SetupError
from .parameter import Parameter

if TYPE_CHECKING:
    from .module import Module

T = TypeVar("T")

HOOKS = "_forward_hooks"
"""The one attribute not looked into: a hook may be a module, but it watches and is no part."""


def held(owner: object, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Give name and thing for everything of a kind that the attributes of `owner` hold.

    What lies in a list is named by its position, `layers.0`, what lies in a dict by its key.
    """
    for name, value in tuple(vars(owner).items()):  # it may change while this goes on
        if name != HOOKS:
            yield from _within(name, value, kind)


def _within(name: str, value: Any, kind: type[T]) -> Iterator[tuple[str, T]]:
    if isinstance(value, kind):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _within(f"{name}.{key}", item, kind)
    else:
        _check_not_lost(name, value)


def _check_not_lost(name: str, value: Any) -> None:
    """Refuse what wants to be trained but is of another kind, or where nobody looks."""
    hidden = value if isinstance(value, (set, frozenset, deque)) else ()
    for item in (value, *hidden):
        bare = isinstance(item, Tensor) and item.is_leaf and item.requires_grad
        found = item is value and isinstance(item, Parameter | Composite)
        if (bare or hasattr(item, "named_parameters")) and not (found or isinstance(item, type)):
            raise SetupError(
                f"The attribute {name} holds what nobody would train.",
                saw=f"{type(item).__module__}.{type(item).__name__}",
                do="use Parameters and Modules of foundations, alone or in lists, tuples or dicts.",
            )


def once(pairs: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Give each thing once, under the first of its names."""
    seen = set()
    for name, thing in pairs:
        if id(thing) not in seen:
            seen.add(id(thing))
            yield name, thing


class Composite:
    """What Module is built on: parts, parameters and buffers, found through the attributes.

    Names of what lies deeper are joined by dots, `body.0.weight`. What can be reached in two ways
    is one thing: it is given once, under the first of its names.
    """

    _buffer_names: tuple[str, ...] = ()

    def register_buffer(self, name: str, tensor: Tensor) -> None:
        """Set `self.<name>` to a tensor that belongs to the model but is not trained.

        A running average is one. As a plain attribute it would be missing in a saved file, and
        stay behind when the model moves to another device.
        """
        setattr(self, name, tensor)
        self._buffer_names = tuple(dict.fromkeys([*self._buffer_names, name]))

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """What now lies under the names of the buffers; also torch's modules call it so."""
        found = {name: vars(self).get(name) for name in self._buffer_names}
        return {
            name: tensor
            for name, tensor in found.items()
            if isinstance(tensor, Tensor) and not isinstance(tensor, Parameter)
        }

    def _parts(self) -> Iterator[tuple[str, Any]]:
        return held(self, Composite)

    def _ways(
        self, prefix: str = "", above: tuple[Composite, ...] = ()
    ) -> Iterator[tuple[str, Any]]:
        """Give every way to this composite and into it, as the prefix of what lies there."""
        yield prefix, self
        for name, part in self._parts():
            if part is not self and part not in above:  # a part may know its parent
                yield from part._ways(f"{prefix}{name}.", (*above, self))

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Give the direct parts with their names."""
        return once(self._parts())

    def children(self) -> Iterator[Module]:
        """Give the direct parts."""
        return (part for _, part in self.named_children())

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Give the whole, named "", and all parts in it; a whole comes before its parts."""
        return once((prefix.rstrip("."), module) for prefix, module in self._ways())

    def modules(self) -> Iterator[Module]:
        """Give the whole and all parts in it."""
        return (module for _, module in self.named_modules())

    def _tensors(self, own: Callable[[Any], Iterable[Any]], recurse: bool) -> Iterator[Any]:
        ways = self._ways() if recurse else [("", self)]
        return once((prefix + name, tensor) for prefix, m in ways for name, tensor in own(m))

    def named_parameters(self, *, recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Give all parameters with their names, frozen ones too; or only this module's own."""
        return self._tensors(lambda module: held(module, Parameter), recurse)

    def parameters(self, *, recurse: bool = True) -> Iterator[Parameter]:
        """Give all parameters, frozen ones too; or only this module's own."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Give all buffers with their names, or only this module's own."""
        return self._tensors(lambda module: module._buffers.items(), recurse)

    def buffers(self, *, recurse: bool = True) -> Iterator[Tensor]:
        """Give all buffers, or only this module's own."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))
