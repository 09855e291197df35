"""What layers put out: mean and standard deviation, as one forward pass goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import three_parts
from .by_formula import WeightLayer

_ROUNDING = 1e-6
"""Values that differ by this share of the largest, and less, differ by rounding alone."""


@dataclass(frozen=True)
class Output:
    """What one or several calls of a layer gave.

    Attributes:
        mean, sd: over all values; the population form.
        constant: whether each unit (feature or channel) gave one and the same value throughout, so
            that nothing of the input comes through.
        n_calls: how many calls.
    """

    mean: float
    sd: float
    constant: bool = False
    n_calls: int = 1


Act = Callable[[str, Tensor, Output], Tensor | None]
"""What may be done to an output, given the layer's name; what it returns replaces the output."""


class Outputs:
    """Watches layers within a `with`; `read()` tells what they put out.

    Args:
        layers: by name.
        act: is called with each output.
    """

    def __init__(self, layers: Mapping[str, WeightLayer], act: Act | None = None):
        self._layers, self._act = layers, act
        self._calls: dict[str, list[tuple[int, Output]]] = {}

    def __enter__(self) -> Outputs:
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                # torch's own hook: `hooks.Hook` only watches, this one may replace the output
                handle = layer.register_forward_hook(partial(self._arrived, name))
                stack.callback(handle.remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.close()

    def _arrived(self, name: str, layer: WeightLayer, inputs: Any, output: Tensor) -> Tensor | None:
        wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        sd, mean = torch.stack(torch.std_mean(wide, correction=0)).tolist()
        seen = Output(mean, sd, _is_constant(wide, layer, sd))
        self._calls.setdefault(name, []).append((wide.numel(), seen))
        return None if self._act is None else self._act(name, output, seen)

    def read(self) -> dict[str, Output]:
        """Return each layer that was called, in the order of its first call."""
        return {name: _pooled(calls) for name, calls in self._calls.items()}


def _is_constant(output: Tensor, layer: WeightLayer, sd: float) -> bool:
    units = output.ndim - 1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)
    others = [i for i in range(output.ndim) if i != units % output.ndim]
    if math.prod(output.shape[i] for i in others) <= 1:  # one value a unit: it cannot be seen
        return sd == 0
    spread = (output.amax(others) - output.amin(others)).amax()
    return bool(spread <= _ROUNDING * output.abs().amax())


def _pooled(calls: list[tuple[int, Output]]) -> Output:
    if len(calls) == 1:
        return calls[0][1]
    n = sum(count for count, _ in calls)
    mean = sum(count * seen.mean for count, seen in calls) / n
    variance = sum(count * (seen.sd**2 + (seen.mean - mean) ** 2) for count, seen in calls) / n
    constant = all(seen.constant for _, seen in calls)
    return Output(mean, math.sqrt(variance), constant, len(calls))


def call(model: nn.Module, x: Any) -> Any:
    """Call a model: a tuple of inputs as arguments, a dict as keywords."""
    model = getattr(model, "_orig_mod", model)  # a compiled model may pass hooks over
    try:
        if isinstance(x, tuple):
            return model(*x)
        return model(**x) if isinstance(x, dict) else model(x)
    except Exception as error:
        do = "DataLoaders.one_batch() gives inputs, as the model gets them, and targets."
        error.add_note(three_parts("when the model was called", tree.describe(x), do))
        raise


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of words as lines with the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
