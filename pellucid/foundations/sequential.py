"""Sequential: one layer after the other."""

from collections.abc import Iterator
from typing import Any

from .module import Module


class Sequential(Module):
    """Call layers in order, each with what the one before returned.

    The layers lie in a plain list, which may be changed: `model.layers.append(...)`. A layer that
    occurs twice is computed twice, and its parameters are trained once, by the sum of both
    gradients. On the list of parameters a layer goes by its position, `0.weight`, as in torch's
    Sequential, so that weights can go from one to the other.

    Args:
        layers: called one after the other.
    """

    def __init__(self, *layers: Module):
        self.layers = list(layers)

    def forward(self, x: Any) -> Any:
        """Return what the last layer makes of it."""
        for layer in self.layers:
            x = layer(x)
        return x

    def _parts(self) -> Iterator[tuple[str, Any]]:
        return ((name.removeprefix("layers."), part) for name, part in super()._parts())
