"""Seeing inside the model while it trains: statistics of activations, gradients and updates."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import foundations
from ..errors import SetupError, UnknownName, did_you_mean
from ..events import Callback, Cancel
from ..hooks import find, leaves
from ..layers import LayerRecord
from ..meters import Meters
from ..samples import sample
from ..sharding import in_shards
from ..stats import norms

if TYPE_CHECKING:
    from ..learner import Learner

_WINDOW = 16
"""Recorded batches between two copies to the host, and in which a dead unit has to be dead."""

_AT_ONCE = 8
"""The first batches, all of which are recorded: what goes wrong early goes wrong fast."""

_LEAST, _SLOWEST = 3, 198
"""Batches from one recording to the next when the time budget chooses, at least and at most. Some
are never recorded, so that what a batch costs by itself stays known."""

_ENOUGH = 3
"""Recorded batches after one that was not, from which on their cost is taken as known."""

_N_WEIGHTS = 4096
"""Entries of each parameter whose update is measured, about; see `samples.sample`."""

_PASS_ON = (
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd),
    foundations.Flatten,
)


class Telemetry(Callback):
    """Record per layer mean, sd, extremes, histogram, dead and saturated share, per batch.

    The same of the gradients with respect to the layers' outputs, and for each parameter the norms
    of itself, its gradient and its update: all in `learn.record.layers`, which draws itself, see
    `layers.LayerRecord`. Only training batches are recorded. Weights are bit for bit what they are
    without. Everything is summed up on the device and read a window of 16 recordings later, without
    waiting for it; how things are measured is in `meters`.

    Fits that watch the same modules and train the same parameters go on in one record; others begin
    a new one. Modules and parameters are those of the fit's beginning: what comes later, a layer
    that is put in another's place or unfrozen, is not seen.

    In many processes (`Distributed("ddp")`) each has a record of its own, of its part of the batch;
    norms and updates of parameters are those of the whole.

    Works with `torch.compile` if the compiled model has not been called before the fit.

    Args:
        modules: what to watch: names as in `model.named_modules()`, or modules of the model; None
            for all without modules in them, but for those that pass on what comes in (Flatten,
            Dropout, ...).
        every: record each so-manieth batch; "auto" records the first 8, and then as often as the
            budget allows.
        budget: the share of the time of training that recording may take, for "auto".

    Raises:
        UnknownName: the model has no module of a name.
        SetupError: a setting is out of range; a module is not the model's, the model was compiled
            before, or it is in shards (FSDP).
    """

    order = 100  # after those that change gradients

    def __init__(
        self,
        modules: Iterable[str | nn.Module] | None = None,
        every: int | str = "auto",
        budget: float = 0.05,
    ):
        if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise SetupError('every must be "auto" or 1 or more.', saw=repr(every))
        if not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise SetupError("budget must lie between 0 and 1.", saw=repr(budget))
        if isinstance(modules, str) or not isinstance(modules, Iterable | None):
            raise SetupError("modules takes several.", saw=repr(modules), do="modules=[...]")
        self.modules = None if modules is None else list(modules)
        self.every, self.budget = every, budget
        self._run: _Run | None = None

    def around_fit(self, learn: Learner) -> Generator[None]:
        """Hook the modules for the time of a fit."""
        if sum(isinstance(other, Telemetry) for other, _ in learn.spans["around_fit"]) > 1:
            raise SetupError(
                "There can be one Telemetry in a fit, its numbers go to learn.record.layers.",
                do="name all modules in one.",
            )
        if in_shards(learn.model):
            raise SetupError(
                "Telemetry cannot watch a model in shards.",
                do='leave it out, or train with Distributed("ddp").',
            )
        modules = chosen(learn.model, self.modules)
        pace = _Pace(self.every, self.budget)
        with Meters(modules, learn.device) as meters:
            self._run = run = _Run(learn, meters, pace)
            try:
                yield
            except BaseException:
                with suppress(Exception):  # the device may be what failed
                    run.finish()
                raise
            else:
                run.finish()
            finally:
                self._run = None

    def around_batch(self, learn: Learner) -> Generator[None]:
        """Take what was recorded of a batch, or drop it with a batch that was left."""
        try:
            yield
        except Cancel:
            if self._run:
                self._run.drop()
            raise
        if learn.training and self._run:
            self._run.end()

    def before_batch(self, learn: Learner) -> None:
        """Decide whether this batch is recorded."""
        if learn.training and self._run:
            self._run.begin()

    def after_backward(self, learn: Learner) -> None:
        """Keep what the step will change."""
        if self._run and self._run.recording:
            self._run.keep_weights()

    def after_step(self, learn: Learner) -> None:
        """Measure what the step changed."""
        if self._run and self._run.recording:
            self._run.measure_updates()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_run": None}  # a copy made in the midst of a fit records nothing


def chosen(model: nn.Module, wanted: Iterable[str | nn.Module] | None) -> dict[str, nn.Module]:
    """Return the modules to watch, by name."""
    if wanted is None:
        found = leaves(model).items()
        picked = {name: module for name, module in found if not isinstance(module, _PASS_ON)}
    else:
        picked = _named(model, wanted)
    if not picked:
        raise SetupError(
            "Telemetry has no module to watch.", do="leave out `modules`, or name some."
        )
    return {name or type(module).__name__: module for name, module in picked.items()}


def _named(model: nn.Module, wanted: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    known = find(model, lambda module: True)
    names = {id(module): name for name, module in known.items()}
    picked = {}
    for thing in wanted:
        name = thing if isinstance(thing, str) else names.get(id(thing))
        if name is None:
            raise SetupError(
                "Telemetry watches modules of the model.",
                saw=repr(thing),
                do="give names, or what hooks.find(model, condition).values() finds.",
            )
        if name not in known:
            others = filter(None, known)  # the model's own name is empty
            raise UnknownName(f"The model has no module {name!r}.", do=did_you_mean(name, others))
        picked[name] = known[name]
    return picked


class _Pace:
    """Which batches to record."""

    def __init__(self, every: int | str, budget: float):
        self.every = every if isinstance(every, int) else 1
        self._chooses, self._budget = every == "auto", budget
        self._extra: deque[float] = deque(maxlen=_WINDOW)  # shares of the time of a batch
        self._before: float | None = None  # seconds of the batch before, if it was not recorded
        self._n = self._n_recorded = 0
        self._began = 0.0

    def begin(self) -> bool:
        """Say whether the batch that begins is to be recorded."""
        self._began = perf_counter()
        return self._n % self.every == 0

    def end(self, recorded: bool) -> None:
        """Take note of a batch that is over."""
        seconds = perf_counter() - self._began
        self._n += 1
        self._n_recorded += recorded
        if recorded and self._before:  # neighbours, as the machine may be busier at other times
            self._extra.append(seconds / self._before - 1)
        self._before = None if recorded else seconds
        if self._chooses and recorded and self._n_recorded >= _AT_ONCE:
            self._choose()

    def _choose(self) -> None:
        self.every = _LEAST
        if len(self._extra) >= _ENOUGH:
            chosen = math.ceil(statistics.median_low(self._extra) / self._budget)
            # odd: where steps are taken each second or fourth batch, those with a step are met too
            self.every = min(max(chosen, _LEAST), _SLOWEST) | 1
        self._n = 1  # the batch just recorded is the first of the new count


class _Run:
    """The recording of one fit.

    Attributes:
        recording: whether the current batch is recorded.
    """

    def __init__(self, learn: Learner, meters: Meters, pace: _Pace):
        self._meters, self._pace, self.recording = meters, pace, False
        others = [callback for callback, _ in learn.spans["around_fit"]]
        self._scaling: Any = next(filter(_scales, others), None)
        self._factor = torch.ones((), device=meters.device)
        meters.factor = self._factor if self._scaling else None
        trained = [(name, p) for name, p in learn.model.named_parameters() if p.requires_grad]
        names = [name.removeprefix("_orig_mod.") for name, _ in trained]
        self._params = [param for _, param in trained]
        self._weights: list[Tensor] = []
        layers = learn.record.layers
        if layers is None or (layers.names, layers.parameters) != (meters.names, names):
            layers = learn.record.layers = LayerRecord(meters.names, meters.types, names)
        self._layers, self._window = layers, _Window(meters, len(names))
        self._batch = len(learn.record.batches)

    def begin(self) -> None:
        self.recording = self._meters.recording = self._pace.begin()
        if self.recording and self._scaling:
            self._factor.copy_(self._scaling.gradient_factor)

    def keep_weights(self) -> None:
        """Keep some of each parameter, and take the norms of all and of the gradients."""
        self._meters.recording = False  # the model may be called for a look now
        with torch.no_grad():
            self._weights = [sample(param, _N_WEIGHTS).clone() for param in self._params]
            self._window.updates[:, 0] = norms(self._params)
            self._window.updates[:, 1] = norms([_gradient(param) for param in self._params])

    def measure_updates(self) -> None:
        """Compare with the parameters as they are now."""
        with torch.no_grad():
            now = [sample(param, _N_WEIGHTS) for param in self._params]
            changes = torch._foreach_sub(now, self._weights)
            size = norms(self._weights)
            self._window.updates[:, 2] = torch.where(size > 0, norms(changes) / size, math.nan)

    def drop(self) -> None:
        """Forget the batch that began, if one did."""
        self.recording = self._meters.recording = False
        self._meters.clear()
        self._window.updates.fill_(math.nan)

    def end(self) -> None:
        """Take what was recorded of the batch that is over."""
        recorded = self.recording
        if recorded:
            self.recording = self._meters.recording = False
            self._check_fired()
            self._window.take(self._batch)
            if self._window.full:
                self._window.read_into(self._layers)
                self._window.send()
        self._batch += 1
        self._pace.end(recorded)

    def finish(self) -> None:
        """Bring home what is on its way."""
        self._window.read_into(self._layers)
        self._window.send()
        self._window.read_into(self._layers)

    def _check_fired(self) -> None:
        if not self._meters.fired:
            raise SetupError(
                "None of the watched modules was seen at work.",
                saw=f"{len(self._meters.names)} modules with hooks, in a whole batch no call",
                do="call torch.compiler.reset() before the fit: code compiled earlier, for this "
                "model or another of its kind, knows no hooks. If nothing is compiled, choose "
                "modules that the forward pass calls and that give real floats, as a tensor or as "
                "tensors in tuples, lists and dicts.",
            )


class _Window:
    """Recordings that wait on the device, and those on their way to the host.

    Attributes:
        updates: (parameters, 3), where the current batch's are written.
    """

    def __init__(self, meters: Meters, n_params: int):
        self._meters = meters
        device = meters.rows.device
        self._rows = torch.zeros(_WINDOW, *meters.rows.shape, device=device)
        self._updates = torch.full((_WINDOW, n_params, 3), math.nan, device=device)
        self._dead = torch.zeros(2, len(meters.names), device=device)
        self.updates = self._updates[0]
        self._batches: list[int] = []
        self._sent: list[int] = []
        on_gpu = device.type == "cuda"
        self._on_device = (self._rows, self._dead, self._updates)
        self._on_host = [torch.zeros(t.shape, pin_memory=on_gpu) for t in self._on_device]
        self._arrays = [host.numpy() for host in self._on_host]
        self._arrived = torch.cuda.Event() if on_gpu else None

    @property
    def full(self) -> bool:
        return len(self._batches) == _WINDOW

    def take(self, batch: int) -> None:
        """Keep what the meters show as the recording of a batch."""
        self._rows[len(self._batches)].copy_(self._meters.rows)
        self._meters.clear()
        self._batches.append(batch)
        if not self.full:
            self.updates = self._updates[len(self._batches)]

    def send(self) -> None:
        """Begin to copy to the host, and begin anew."""
        if self._batches:
            self._dead.copy_(self._meters.take_dead())
        for host, device in zip(self._on_host, self._on_device, strict=True):
            host.copy_(device, non_blocking=bool(self._arrived))
        if self._arrived:  # on the stream of the copies: another GPU may be the current one
            self._arrived.record(torch.cuda.current_stream(self._rows.device))
        self._sent, self._batches = self._batches, []
        self._updates.fill_(math.nan)
        self.updates = self._updates[0]

    def read_into(self, layers: LayerRecord) -> None:
        """Move what was sent before into a record."""
        if self._arrived and self._sent:
            self._arrived.synchronize()  # long since: a window ago
        rows, dead, updates = self._arrays
        for i, batch in enumerate(self._sent):
            layers.append((batch, batch), rows[i], dead, updates[i])
        self._sent = []


def _scales(callback: Callback) -> bool:
    return getattr(callback, "gradient_factor", None) is not None  # fp16's `Precision`


def _gradient(param: Tensor) -> Tensor:
    """Return the values of a parameter's gradient, NaN if it has none."""
    gradient = param.grad
    if gradient is None:
        return param.new_full((), math.nan)
    return gradient.coalesce().values() if gradient.is_sparse else gradient
