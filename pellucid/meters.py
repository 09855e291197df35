"""Measuring what flows through modules, and back: on the device, into memory laid out before.

Nothing is read back here and nothing grows: hooks add to preallocated sums, whoever uses them
copies the rows out when it suits. Hooks that only add in place also survive `torch.compile`, in
one graph (installed before the first compiled call; later ones are never called).

    meters = Meters(leaves(model), device)
    with meters:
        meters.recording = True
        loss_func(model(x), y).backward()
        rows = meters.rows.clone()
        meters.clear()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import foundations
from .histograms import ACTIVATIONS, GRADIENTS
from .hooks import Hooks, tensors_in
from .samples import Samples, sample
from .tree import sent

FIELDS = ("n", "sum", "squares", "low", "high", "sampled", "sampled_squares", "saturated")
"""The sums of one tensor: number of values, their sum and sum of squares, smallest and largest;
of the values in the histogram their number, the sum of squares about their mean (right where the
mean is so large that the difference of the full sums loses its digits), and how many of them are
saturated, NaN for a module that does not saturate."""

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LARGE_MAP = 256
"""Values of a channel from which on it is faster to reduce items and places in one go."""

_START = (0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, math.nan)


class Meters:
    """Sums and histograms of the outputs of modules, and of the gradients that come back to them.

    A context manager: hooks act within the `with`. Sums, extremes and hence NaN and infinity are
    taken over all values, histograms over at most `2 * N_SAMPLED`, spread evenly over items and
    places. Several calls of a module before `clear` add up. Of an output with several tensors the
    first of floats is measured; what is complex, sparse, empty or on another device is passed over,
    and so are calls within a transform of `torch.func`.

    Args:
        modules: by name.
        device: of their outputs.

    Attributes:
        names, types: of the modules.
        device: where they are measured.
        recording: whether the hooks measure; switch it per batch.
        fired: whether any hook has measured anything yet.
        factor: what gradients come in larger by, 0-d, and are measured without; None: by nothing.
            To be set before the first batch, and filled before each forward pass.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device):
        self.names = list(modules)
        self.types = [type(module).__name__ for module in modules.values()]
        self.device = device
        self._modules = list(modules.values())
        start = torch.tensor([*_START, *[0.0] * ACTIVATIONS.n_bins])
        self._start = start.repeat(2, len(self.names), 1)
        for i, module in enumerate(self._modules):
            if bounds(module) is not None:
                self._start[0, i, FIELDS.index("saturated")] = 0.0
        self._start = self._start.to(device)
        self._rows = self._start.clone()
        squares = FIELDS.index("sampled_squares")
        self._samples = Samples(self._rows, squares, (ACTIVATIONS, GRADIENTS))
        self._meters = [
            (
                _Meter(self._rows[0, i], partial(self._samples.add, i), last, bounds(module)),
                _Meter(self._rows[1, i], partial(self._samples.add, i + len(modules)), last, None),
            )
            for i, (module, last) in enumerate(
                zip(self._modules, units_last(self._modules), strict=True)
            )
        ]
        self._sizes = [0] * 2 * len(self.names)
        self._no_units = torch.tensor([[math.inf], [-math.inf]], device=device)
        self._units = self._seen = self._rows.new_empty(2, 0)
        self._owners = torch.empty(0, dtype=torch.int64, device=device)
        self._hooks: Hooks | None = None
        self.recording = self.fired = False
        self.factor: Tensor | None = None

    def __enter__(self) -> Meters:
        self._hooks = Hooks(self._modules, _measure)
        for hook, (activation, gradient) in zip(self._hooks, self._meters, strict=True):
            hook.meters, hook.activation, hook.gradient = self, activation, gradient
            hook.on_gradient = _gradient_hook(self, gradient)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks, self.recording = None, False

    @property
    def rows(self) -> Tensor:
        """Return what was measured since the last `clear`, always in the same memory.

        Returns:
            float32 (2, modules, fields + bins): first the activations, then the gradients, of each
            the sums named in `FIELDS` and the histogram, by `ACTIVATIONS` and `GRADIENTS`.
        """
        self._gather()
        return self._rows

    def clear(self) -> None:
        """Set the rows to what they are when nothing was measured, and forget what was not read."""
        self._lay_out()
        self._samples.clear()
        self._rows.copy_(self._start)
        self._units.copy_(self._no_units)

    def take_dead(self) -> Tensor:
        """Return the share of dead units since the last call, and begin anew.

        A unit (a channel; of an output (n, features) a feature) is dead if it gave one and the
        same value for every item and place: nothing that comes in moves it.

        Returns:
            float32 (2, modules), NaN where nothing was measured.
        """
        self._gather()
        low, high = self._seen
        n_dead, n_seen = self._rows.new_zeros(2, len(self._sizes))
        n_dead.index_add_(0, self._owners, (low == high).float())
        n_seen.index_add_(0, self._owners, (~(low > high)).float())  # NaN was seen
        self._units.copy_(self._no_units)
        self._seen.copy_(self._no_units)
        return (n_dead / n_seen).view(2, -1)  # of no units, NaN

    def _gather(self) -> None:
        """Work out what follows from the hooks' sums, with a few operations for all modules.

        A hook takes 22 for each tensor, most of them on a few numbers: there each one counts.
        """
        self._lay_out()
        self._samples.count()
        (low, high), (seen_low, seen_high) = self._units, self._seen
        self._field("low").scatter_reduce_(0, self._owners, low, "amin")
        self._field("high").scatter_reduce_(0, self._owners, high, "amax")
        torch.minimum(seen_low, low, out=seen_low)
        torch.maximum(seen_high, high, out=seen_high)
        self._field("sampled").copy_(self._rows[..., len(FIELDS) :].sum(-1).flatten())

    def _field(self, name: str) -> Tensor:
        """Return a field of all rows, (2 · modules,)."""
        return self._rows.flatten(0, 1)[:, FIELDS.index(name)]

    @torch.inference_mode(False)  # it will be written to outside, too
    def _lay_out(self) -> None:
        """Put the units of all meters side by side, if there are new ones."""
        meters = [meter for kind in zip(*self._meters, strict=True) for meter in kind]
        if not any(meter.grown for meter in meters):
            return
        sizes = [len(meter.unit_low) for meter in meters]
        ends = [(meter.unit_low, meter.unit_high) for meter in meters]
        self._units = torch.stack([torch.cat(end) for end in zip(*ends, strict=True)])
        seen = self._no_units.repeat(1, sum(sizes))
        for old, new in zip(self._seen.split(self._sizes, 1), seen.split(sizes, 1), strict=True):
            new[:, : old.shape[1]] = old
        for meter, units in zip(meters, self._units.split(sizes, 1), strict=True):
            meter.unit_low, meter.unit_high = units
            meter.grown = False
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._seen, self._sizes, self._owners = seen, sizes, sent(numbers, self.device)


class _Meter:
    """The sums of one tensor, as views into those of all.

    Attributes:
        unit_low, unit_high: extremes of each unit; `Meters` empties them.
        grown: whether room for units was made since `Meters` last looked.
    """

    def __init__(
        self,
        row: Tensor,
        add_sample: Callable[[Tensor], None],
        last: bool,
        bounds: tuple[float, float] | None,
    ):
        self.add_sample, self.last, self.bounds = add_sample, last, bounds
        field = {name: row[i] for i, name in enumerate(FIELDS)}
        self.n, self.sum, self.squares = field["n"], field["sum"], field["squares"]
        self.saturated = field["saturated"]
        self.unit_low = self.unit_high = row.new_empty(0)
        self.grown = False

    def add(self, x: Tensor) -> None:
        """Measure a tensor."""
        x = x.detach()
        self.n.add_(x.numel())
        self.sum.add_(x.sum(dtype=torch.float32))
        self.squares.add_(sum_of_squares(x))
        low, high = unit_extremes(x, self.last)
        unit_low, unit_high = self.unit_low, self.unit_high
        if len(low) < len(unit_low):
            unit_low, unit_high = unit_low[: len(low)], unit_high[: len(low)]
        torch.minimum(unit_low, low, out=unit_low)
        torch.maximum(unit_high, high, out=unit_high)
        values = sample(x).float()  # half precision cannot hold what follows
        self.add_sample(values)
        if self.bounds is not None:
            below, above = self.bounds
            self.saturated.add_(((values <= below) | (values >= above)).sum())

    def make_room(self, x: Tensor) -> None:
        """Have room for the units of a tensor of this shape, and of all those before.

        A module may be called with several numbers of units, as a ReLU that layers share.
        """
        more = (1 if x.ndim < 2 else x.shape[-1 if self.last else 1]) - len(self.unit_low)
        if more <= 0:
            return
        with torch.inference_mode(False):  # it will be written to outside, too
            unseen = self.n.new_full((more,), math.inf)
            self.unit_low = torch.cat([self.unit_low, unseen])
            self.unit_high = torch.cat([self.unit_high, -unseen])
        self.grown = True


def _measure(hook: Any, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    if not hook.meters.recording or _transformed():
        return
    measurable = [x for x in tensors_in(output) if _is_measurable(x, hook.meters.device)]
    if not measurable:
        return
    x = measurable[0]
    hook.meters.fired = True
    hook.activation.make_room(x)
    hook.activation.add(x)
    if not x.requires_grad or x.is_leaf or not torch.is_grad_enabled():
        return  # a parameter given back as it is would keep the hook
    hook.gradient.make_room(x)
    # a compiled backward writes only to what was there before its forward: in the first batch of a
    # compiled model gradients are not measured
    if not (hook.gradient.grown and torch.compiler.is_compiling()):
        x.register_hook(hook.on_gradient)


def _transformed() -> bool:
    """Tell whether this happens within vmap, grad or the like, where nothing may be added to."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None


def _is_measurable(x: Tensor, device: torch.device) -> bool:
    dense = x.layout == torch.strided and not x.is_nested and x.device == device
    return dense and x.dtype in _FLOATS and x.numel() > 0


def _gradient_hook(meters: Meters, meter: _Meter) -> Callable[[Tensor], None]:
    def arrived(grad: Tensor) -> None:
        if not meters.recording:
            return
        if meters.factor is not None:  # half precision cannot hold what comes of it
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32)) / meters.factor
        meter.add(grad)

    return arrived


def unit_extremes(x: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each unit.

    Args:
        x: (n, units, ...), or (..., units) if `last`; one dimension is one unit.
        last: where the units are.

    Returns:
        Two tensors (units,).
    """
    if x.ndim < 2:
        return x.amin().reshape(1), x.amax().reshape(1)
    if last:
        x = x.flatten(0, -2)
    elif x.ndim > 2 and math.prod(x.shape[2:]) >= _LARGE_MAP:
        over = (0, *range(2, x.ndim))
        return x.amin(over), x.amax(over)
    low, high = x.amin(0), x.amax(0)
    return (low.flatten(1).amin(1), high.flatten(1).amax(1)) if low.ndim > 1 else (low, high)


def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares in single precision, 0-d.

    Item by item: the norm of a whole large tensor adds naively and is off by 1e-3.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)) or None, dtype=dtype).flatten()
    return norms.dot(norms).float()


def bounds(module: nn.Module) -> tuple[float, float] | None:
    """Return below and above what a bounded activation is saturated, else None.

    That is within 1 % of its range from where its slope vanishes; the zero of a ReLU is no such
    place, it counts as near zero.
    """
    if isinstance(module, (nn.Tanh, nn.Softsign)):
        return -0.98, 0.98
    if isinstance(module, (nn.Sigmoid, nn.Hardsigmoid)):
        return 0.01, 0.99
    if isinstance(module, nn.ReLU6):
        return -math.inf, 5.94
    if isinstance(module, nn.Hardtanh):
        margin = 0.01 * (module.max_val - module.min_val)
        return module.min_val + margin, module.max_val - margin
    return None


_UNITS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


def units_last(modules: Iterable[nn.Module]) -> list[bool]:
    """Tell where the units of each module's output are: in the last dimension, or in the second.

    What has a matrix of its own multiplies the last dimension, as a Linear does, also one from
    elsewhere. Activations and whatever else has no weight to tell it follow the module before them.
    """
    answers = [False]
    for module in modules:
        own = _has_units_last(module)
        answers.append(answers[-1] if own is None else own)
    return answers[1:]


def _has_units_last(module: nn.Module) -> bool | None:
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1  # of images, (c, h, w)
    if isinstance(module, foundations.LayerNorm):
        return len(module.shape) == 1
    if isinstance(module, _UNITS_LAST):
        return True
    own = [0 if is_lazy(param) else param.ndim for param in module.parameters(recurse=False)]
    return max(own) == 2 if own else None
