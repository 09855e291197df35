"""Initial weights by data: LSUV."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import DataError, SetupError
from ..snapshot import preserved_buffers, preserved_modes, preserved_random_state
from .by_formula import WeightLayer, set_values, shown, weight_layers
from .outputs import Act, Output, Outputs, aligned, call

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LSUVReport:
    """What `lsuv` did; prints as a table.

    Attributes:
        before, after: mean, sd and number of calls of each layer that the batch reached, by name,
            in the order of their first call.
        left: of each layer that is not as it should be, by name, why.
        passes: how often the batch went through the model to set the layers.
    """

    before: dict[str, Output]
    after: dict[str, Output]
    left: dict[str, str]
    passes: int

    def __str__(self) -> str:
        rows = [("layer", "mean before", "sd before", "mean", "sd", "")]
        for name, was in self.before.items():
            now = self.after[name]
            numbers = [f"{value:.3g}" for value in (was.mean, was.sd, now.mean, now.sd)]
            rows.append((shown(name), *numbers, self.left.get(name, "")))
        rows += [
            (shown(name), *"----", why)
            for name, why in self.left.items()
            if name not in self.before
        ]
        return aligned(rows)

    def __repr__(self) -> str:
        left = "".join(f"; {shown(name)}: {why}" for name, why in self.left.items())
        return f"LSUVReport({len(self.before)} layers in {self.passes} passes{left})"


def lsuv(model: nn.Module, x: Any, tol: float = 1e-3, max_passes: int = 20) -> LSUVReport:
    """Scale each layer so that its output on a batch has mean 0 and sd 1 (Mishkin & Matas, 2016).

    One forward pass sets the layers as they are called, each on what those before it now put out:
    weights are divided by the output's standard deviation over all its values, biases lose its
    mean. Further passes check, and set again what is off, as it can be where one layer is called
    several times. The directions of the weights stay as they are; the paper begins with orthogonal
    ones (`init_orthogonal`).

    The batch goes through in training mode, without gradients. Weights and biases alone are
    changed, and not even those if an error is raised. Frozen layers are left as they are.

    Args:
        model: any, on the device of `x`.
        x: a batch of inputs as training gives them, `data.one_batch()[0]`; a tuple is passed on as
            arguments, a dict as keywords.
        tol: how far from 1 an sd may be, and from 0 the mean of a layer that has a bias.
        max_passes: that set layers, at most.

    Returns:
        A report. It also names each layer that is not as it should be: frozen, not reached by the
        batch, all its weights zero (as those of a last layer may be on purpose), its output
        constant (what comes before it is dead), or still off. Of the last two a warning tells.

    Raises:
        SetupError: the model has no layers to set, or the batch reaches none.
        DataError: an output is not finite.
    """
    if not 0 < tol < 1 or max_passes < 1:
        raise SetupError(
            "lsuv needs a tol between 0 and 1 and max_passes of 1 or more.",
            saw=f"tol={tol}, max_passes={max_passes}",
        )
    layers = weight_layers(model)
    with _all_or_nothing(layers), preserved_modes(model), torch.no_grad():
        model.train()
        before = after = _pass(model, x, layers)
        if not before:
            raise SetupError(
                "The batch reached no Linear and no convolution.",
                saw=f"{tree.describe(x)} through {type(model).__name__}",
                do="check that the model calls its layers as modules, not by their weights.",
            )
        free = {name: layers[name] for name in before if _is_free(layers[name])}
        at_once = {name for name in free if before[name].n_calls == 1}
        off, passes, shared = set(free), 0, _Shared()
        while off and passes < max_passes:
            after, passes = _pass(model, x, layers, _setter(free, at_once, tol)), passes + 1
            _check_finite(after, x)
            off = {name for name in free if _is_off(after[name], free[name], tol)}
            for name in off - at_once:
                shared.set(name, free[name], after[name])
        if off:
            after = _pass(model, x, layers)
            off = {name for name in free if _is_off(after[name], free[name], tol)}
    left = {name: _why(name, layer, after, off, passes) for name, layer in layers.items()}
    report = LSUVReport(before, after, {name: why for name, why in left.items() if why}, passes)
    _warn_of(report)
    return report


def _pass(
    model: nn.Module, x: Any, layers: Mapping[str, WeightLayer], act: Act | None = None
) -> dict[str, Output]:
    """Let the batch through, each time with the same random numbers and buffers."""
    with preserved_buffers(model), preserved_random_state(), Outputs(layers, act) as outputs:
        call(model, x)
    return outputs.read()


def _setter(layers: Mapping[str, WeightLayer], at_once: set[str], tol: float) -> Act:
    """Return what sets a layer that has just been called, and returns what it would give now."""

    def act(name: str, output: Tensor, seen: Output) -> Tensor | None:
        if name not in at_once or not _is_off(seen, layers[name], tol):
            return None
        return (output - _set(layers[name], seen.mean, seen.sd)) / seen.sd

    return act


class _Shared:
    """Sets layers that are called several times: by how far they came the last time.

    In k calls one after the other, a factor on the weights acts up to k times over on the output.
    """

    def __init__(self):
        self._last: dict[str, tuple[float, float]] = {}

    def set(self, name: str, layer: WeightLayer, seen: Output) -> None:
        size, power = math.log(seen.sd), float(seen.n_calls)
        if name in self._last:
            size_before, step = self._last[name]
            if abs(step) > 1e-6:
                power = min(max((size_before - size) / step, 1.0), power)
        self._last[name] = size, size / power
        _set(layer, seen.mean / power, math.exp(size / power))


def _set(layer: WeightLayer, shift: float, divisor: float) -> float:
    """Let a layer give (output - shift) / divisor, and return the shift: 0 without a bias."""
    set_values(layer, "weight", layer.weight / divisor)
    if layer.bias is None:
        return 0.0
    set_values(layer, "bias", (layer.bias - shift) / divisor)
    return shift


def _is_off(seen: Output, layer: WeightLayer, tol: float) -> bool:
    """Say whether a layer can and should be set."""
    if seen.constant or not _TINY < seen.sd < math.inf:
        return False
    return abs(seen.sd - 1) >= tol or (layer.bias is not None and abs(seen.mean) >= tol)


def _is_free(layer: WeightLayer) -> bool:
    return all(param.requires_grad for param in layer.parameters())


def _check_finite(seen: Mapping[str, Output], x: Any) -> None:
    for name, output in seen.items():
        if not math.isfinite(output.sd):
            raise DataError(
                f"lsuv: the output of {shown(name)} is not finite.",
                saw=f"mean {output.mean}, sd {output.sd} on {tree.describe(x)}",
                do="look for NaN in the batch and in that layer's weights.",
            )


def _why(
    name: str, layer: WeightLayer, after: Mapping[str, Output], off: set[str], passes: int
) -> str:
    if name not in after:
        return "not reached"
    if not _is_free(layer):
        return "frozen"
    if not layer.weight.any():
        return "its weights are zero"
    if after[name].constant or after[name].sd <= _TINY:
        return "constant output"
    return f"off after {passes} passes" if name in off else ""


def _warn_of(report: LSUVReport) -> None:
    amiss = {n: why for n, why in report.left.items() if why.startswith(("constant", "off"))}
    if amiss:
        named = ", ".join(f"{shown(name)} ({why})" for name, why in amiss.items())
        warnings.warn(f"lsuv could not set {named}; see its report", stacklevel=3)


@contextmanager
def _all_or_nothing(layers: Mapping[str, WeightLayer]) -> Generator[None]:
    params = [param for layer in layers.values() for param in layer.parameters()]
    copies = [param.detach().clone() for param in params]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for param, values in zip(params, copies, strict=True):
                param.copy_(values)
        raise
