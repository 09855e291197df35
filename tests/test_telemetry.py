"""Telemetry: what it records is so, when it records is stated, and the training does not notice."""

import copy
import gc
import math
import pickle
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.optim import LBFGS, SGD, AdamW
from torch.utils.checkpoint import checkpoint

from pellucid import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    DataLoaders,
    Learner,
    Record,
)
from pellucid.callbacks import LSUV, Compile, Debug, Precision, Progress, Telemetry, telemetry
from pellucid.errors import NonFiniteLoss, SetupError, UnknownName
from pellucid.foundations import Flatten
from pellucid.foundations import Linear as OurLinear
from pellucid.foundations import Sequential as OurSequential

N = 5
"""Batches in an epoch."""


def batches(*shape: int, n: int = N, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(8, *shape).to(dtype), torch.randint(3, (8,))) for _ in range(n)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def learner(
    *callbacks: Callback,
    model: nn.Module | None = None,
    train: Any = None,
    valid: Any = None,
    loss_func: Callable[..., torch.Tensor] = F.cross_entropy,
    opt_func: Callable[..., Any] = SGD,
) -> Learner:
    return Learner(
        mlp() if model is None else model,
        DataLoaders(batches(6) if train is None else train, valid),
        loss_func,
        opt_func,
        0.1,
        callbacks=[Progress("off"), *callbacks],
        device="cpu",
    )


def recorded(learn: Learner) -> list[int]:
    layers = learn.record.layers
    assert layers is not None
    assert (layers.batches[:, 0] == layers.batches[:, 1]).all()
    return layers.batches[:, 0].tolist()


# ── the training does not notice ──────────────────────────────────────────────────────────────


class Shared(nn.Module):
    """One layer called twice, one never, one under no_grad."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.still, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.shared(F.relu(self.shared(self.first(x)), inplace=True))
        with torch.no_grad():
            x = x + self.still(x)
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, 2, batch_first=True, dropout=0.3), nn.Linear(5, 3)

    def forward(self, x):
        out, (hidden, _) = self.lstm(x)
        return self.head(out[:, -1] + hidden[-1])


class Packed(nn.Module):
    """Sequences of several lengths, without padding."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        out, _ = self.lstm(pack_sequence(list(x), enforce_sorted=False))
        return self.head(unpack_sequence(out)[0][-1] + x[:, 0, :5])


class SharedActivation(nn.Module):
    """One ReLU behind layers of two widths, as in the blocks of many a residual net."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(4, 3)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.activation(self.other(self.activation(self.one(x)))))


class SeveralPrecisions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6).double(), nn.Linear(6, 6).bfloat16()
        self.third, self.head = nn.Linear(6, 6).half(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.other(self.one(x.double()).bfloat16())
        return self.head(self.third(x.half()).float())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, 0.1, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.body, self.head, self.reentrant = mlp(), nn.Linear(3, 3), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 4, sparse=True)
        self.place = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return (self.words(x) + self.place).sum(1)[:, :3]


def dropout_and_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(inplace=True), nn.Dropout2d(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


WORDS = [(x.abs().mul(3).long().clamp(max=9), y) for x, y in batches(5)]
IMAGES = batches(2, 9, 9)

MODELS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "MLP": (mlp, batches(6)),
    "dropout, batch norm, in place": (dropout_and_norm, batches(6)),
    "CNN": (cnn, IMAGES),
    "CNN, channels last": (
        cnn, [(x.to(memory_format=torch.channels_last), y) for x, y in IMAGES]
    ),
    "shared, never called, without gradients": (Shared, batches(6)),
    "LSTM": (Recurrent, batches(4, 6)),
    "LSTM of packed sequences": (Packed, batches(4, 6)),
    "shared activation": (SharedActivation, batches(6)),
    "several precisions": (SeveralPrecisions, batches(6)),
    "attention": (Attending, batches(4, 6)),
    "sparse embedding": (Words, WORDS),
    "checkpointed": (partial(Checkpointed, False), batches(6)),
    "checkpointed, reentrant": (
        partial(Checkpointed, True), [(x.requires_grad_(), y) for x, y in batches(6)]
    ),
    "double precision": (lambda: mlp().double(), batches(6, dtype=torch.float64)),
    "bfloat16": (lambda: mlp().bfloat16(), batches(6, dtype=torch.bfloat16)),
    "one layer": (lambda: nn.Linear(6, 3), batches(6)),
}  # fmt: skip


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_bit_for_bit_what_they_are_without(name):
    make, train = MODELS[name]
    weights = []
    for callbacks in ([], [Telemetry(every=1)]):
        torch.manual_seed(0)
        learn = learner(*callbacks, model=make(), train=train, valid=train[:2])
        learn.fit(2)
        weights.append(bits(learn.model))
        assert torch.rand(()) is not None
    assert all(map(torch.equal, *weights))
    layers = learn.record.layers
    assert recorded(learn) == list(range(2 * N))
    measured = {n for i, n in enumerate(layers.names) if layers.of_kind("activations")[0][0, i, 0]}
    assert measured == set(layers.names) - {"unused", "layer.dropout", "layer.self_attn.out_proj"}
    for kind in ("activations", "gradients"):
        sums, histograms = layers.of_kind(kind)
        np.testing.assert_array_equal(histograms.sum(-1), sums[..., 5])
        np.testing.assert_array_equal(sums[..., 5], sums[..., 0])  # all of so few values


@pytest.mark.parametrize("opt_func", [AdamW, partial(LBFGS, max_iter=3)])
def test_other_optimisers_do_not_notice_either(opt_func):
    weights = []
    for callbacks in ([], [Telemetry(every=2)]):
        learn = learner(*callbacks, opt_func=opt_func)
        learn.fit(2)
        weights.append(bits(learn.model))
    assert all(map(torch.equal, *weights))
    # also where the optimiser evaluates a batch several times, it is counted once
    assert (learn.record.layers.of_kind("activations")[0][:, 0, 0] == 8 * 8).all()


def test_the_random_state_is_left_alone():
    after = []
    for callbacks in ([], [Telemetry(every=1)]):
        torch.manual_seed(0)
        learner(*callbacks, model=dropout_and_norm()).fit(1)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_a_foundations_model_is_seen_too():
    weights = []
    for callbacks in ([], [Telemetry(every=1)]):
        torch.manual_seed(0)
        model = OurSequential(OurLinear(6, 8), torch.relu, OurLinear(8, 3))
        learn = learner(*callbacks, model=model)
        learn.fit(1)
        weights.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *weights))
    assert recorded(learn) == list(range(N))
    assert len(learn.record.layers.names) >= 2
    assert (learn.record.layers["gradients/sd"] > 0).all()


# ── what it records is so ─────────────────────────────────────────────────────────────────────


def by_hand(model: nn.Sequential, train: list[Any]) -> dict[str, np.ndarray]:
    """Train with plain SGD and note what telemetry should."""
    found: dict[str, list[Any]] = {}
    for x, y in train:
        outs = [x]
        for part in model:
            outs.append(part(outs[-1]))
            outs[-1].retain_grad()
        F.cross_entropy(outs[-1], y).backward()
        outs, params = outs[1:], list(model.parameters())
        for kind, tensors in (
            ("activations", [out.detach() for out in outs]),
            ("gradients", [out.grad for out in outs]),
        ):
            found.setdefault(f"{kind}/mean", []).append([t.mean() for t in tensors])
            found.setdefault(f"{kind}/sd", []).append([t.std(correction=0) for t in tensors])
            found.setdefault(f"{kind}/abs_max", []).append([t.abs().max() for t in tensors])
            limit = 2.0**-10 if kind == "activations" else 2.0**-28
            near = [(t.abs() < limit).float().mean() for t in tensors]
            found.setdefault(f"{kind}/near_zero", []).append(near)
        sizes = [p.detach().norm() for p in params]
        found.setdefault("parameters/norm", []).append(sizes)
        found.setdefault("parameters/gradient", []).append([p.grad.norm() for p in params])
        ratios = [0.1 * p.grad.norm() / p.detach().norm() for p in params]
        found.setdefault("parameters/update", []).append(ratios)
        with torch.no_grad():
            for param in params:
                param -= 0.1 * param.grad
                param.grad = None
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def test_all_numbers_equal_those_taken_by_hand():
    expected = by_hand(mlp(), batches(6))
    layers = learner(Telemetry(every=1)).fit(1).layers
    assert layers.names == ["0", "1", "2"] and layers.types == ["Linear", "ReLU", "Linear"]
    assert layers.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, values in expected.items():
        np.testing.assert_allclose(layers[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_update_of_a_large_parameter_is_that_of_entries_all_over_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3000), nn.ReLU(), nn.Linear(3000, 3))
    before = copy.deepcopy(model)
    layers = learner(Telemetry(every=1), model=model, train=batches(6, n=1)).fit(1).layers
    for i, (one, other) in enumerate(zip(before.parameters(), model.parameters(), strict=True)):
        expected = ((one - other).norm() / one.norm()).item()
        assert layers["parameters/update"][0, i] == pytest.approx(expected, rel=0.1)


def test_the_update_of_a_convolution_is_that_of_all_places_of_its_kernel():
    """Images of one pixel move the middle of each 3 by 3 kernel, and nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64, 3))
    before = copy.deepcopy(model)
    layers = learner(Telemetry(every=1), model=model, train=batches(64, 1, 1, n=1)).fit(1).layers
    one, other = before[0].weight, model[0].weight
    expected = ((one - other).norm() / one.norm()).item()
    assert layers["parameters/update"][0, 0] == pytest.approx(expected, rel=0.1)


def test_norms_are_not_those_of_half_precision():
    model = nn.Linear(4, 3)
    model.big = nn.Parameter(torch.full((10_000,), 1000.0).half())  # of norm 1e5: too much for it
    model.small = nn.Parameter(torch.full((3,), 1.001).bfloat16())
    layers = learner(Telemetry(every=1), model=model, train=batches(4)).fit(1).layers
    norms = dict(zip(layers.parameters, layers["parameters/norm"][0], strict=True))
    assert norms["big"] == pytest.approx(1e5, rel=1e-4)
    assert norms["small"] == pytest.approx(math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("more", [[], [Compile(backend="aot_eager")]], ids=["plain", "compiled"])
def test_gradients_in_half_precision_are_without_the_factor_that_makes_them_larger(more):
    exact = learner(Telemetry(every=1)).fit(2).layers
    halves = learner(Telemetry(every=1), Precision("fp16"), *more).fit(2).layers
    for name in ("gradients/abs_max", "gradients/sd", "parameters/gradient"):
        known = slice(1, None)  # a compiled model's first batch has none
        np.testing.assert_allclose(halves[name][known], exact[name][known], 0.02, err_msg=name)
    moved = halves["gradients/histogram"][1:] - exact["gradients/histogram"][1:]
    assert np.abs(moved).sum(-1).mean() < 0.1  # of 2, where all are in other bins


def test_a_device_by_another_name_is_the_same():
    model = mlp()
    data = DataLoaders(batches(6))
    learn = Learner(
        model, data, F.cross_entropy, callbacks=[Progress("off"), Telemetry()], device="cpu:0"
    )
    assert learn.device == model[0].weight.device  # on a GPU "cuda" is "cuda:0"
    assert len(learn.fit(1).layers) == N


def test_a_weight_of_zeros_has_no_update_ratio():
    model = mlp()
    nn.init.zeros_(model[2].bias)
    layers = learner(Telemetry(every=1), model=model).fit(1).layers
    assert np.isnan(layers["parameters/update"][0, 3])
    assert np.isfinite(layers["parameters/update"][1:, 3]).all()


def test_what_is_frozen_is_no_parameter_that_could_move():
    model = mlp()
    model[0].requires_grad_(False)
    layers = learner(Telemetry(every=1), model=model).fit(1).layers
    assert layers.parameters == ["2.weight", "2.bias"]
    assert np.isnan(layers["gradients/sd"][:, :2]).all()
    assert np.isfinite(layers["activations/sd"]).all()


def test_a_parameter_without_a_gradient_has_none_on_record():
    layers = learner(Telemetry(every=1), model=Shared()).fit(1).layers
    i = layers.parameters.index("unused.weight")
    assert np.isnan(layers["parameters/gradient"][:, i]).all()
    assert (layers["parameters/update"][:, i] == 0).all()
    assert np.isnan(layers["activations/mean"][:, layers.names.index("unused")]).all()


def test_dead_units_are_those_of_a_whole_window():
    class Waking(nn.Module):
        """Units 0 to 3 rest always, 4 and 5 all but once in 16 batches."""

        def __init__(self):
            super().__init__()
            self.scale, self.n = nn.Parameter(torch.ones(8)), 0

        def forward(self, x):
            on = torch.ones(8)
            on[:4] = 0
            on[4:6] = float(self.n % 16 == 3)
            self.n += 1
            return (x * self.scale * on).relu()

    model = nn.Sequential(Waking(), nn.Linear(8, 3))
    layers = learner(Telemetry(every=1), model=model, train=batches(8, n=35)).fit(1).layers
    dead = layers["activations/dead"][:, 0]
    assert dead[:32].tolist() == [0.5] * 32
    assert dead[32:].tolist() == [0.75] * 3  # of the last three


def test_a_nan_in_the_midst_is_on_record_in_its_batch_and_layer():
    train = batches(6)
    train[3][0][2, 1] = math.nan
    learn = learner(Telemetry(every=1), train=train)
    with pytest.raises(NonFiniteLoss):
        learn.fit(1)
    layers = learn.record.layers
    assert recorded(learn)[:4] == [0, 1, 2, 3]
    assert np.isfinite(layers["activations/mean"][:3]).all()
    assert np.isnan(layers["activations/mean"][3]).all()
    assert np.isnan(layers["activations/abs_max"][3]).all()


def test_the_batch_whose_loss_stops_the_run_is_on_record(monkeypatch):
    monkeypatch.setattr("pellucid.tally.READ_INTERVAL", 0.0)  # each batch is read at once
    train = batches(6)
    train[3][0][2, 1] = math.nan
    learn = learner(Telemetry(every=1), train=train)
    with pytest.raises(NonFiniteLoss):
        learn.fit(1)
    assert len(learn.record.batches) == 4 and recorded(learn) == [0, 1, 2, 3]
    assert np.isnan(learn.record.layers["activations/mean"][3]).all()


# ── when it records ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_every_so_manieth_batch_over_the_epochs(every):
    learn = learner(Telemetry(every=every), valid=batches(6, n=2))
    learn.fit(4)
    assert recorded(learn) == list(range(0, 4 * N, every))


def test_numbers_do_not_depend_on_how_often():
    often, seldom = (learner(Telemetry(every=k)).fit(4).layers for k in (1, 3))
    for name in often:
        if "dead" not in name:
            np.testing.assert_array_equal(often[name][::3], seldom[name])


class Clock:
    """A clock that only a batch moves, and more if it is recorded."""

    def __init__(self, plain: float, extra: float):
        self.now, self.plain, self.extra = 0.0, plain, extra

    def __call__(self) -> float:
        return self.now


def chosen_batches(monkeypatch: Any, plain: float, extra: float, n: int, **settings: Any) -> Any:
    """Run the choice alone, for n batches that take so long; return which are recorded."""
    clock = Clock(plain, extra)
    monkeypatch.setattr(telemetry, "perf_counter", clock)
    pace = telemetry._Pace(settings.get("every", "auto"), settings.get("budget", 0.05))
    found = []
    for batch in range(n):
        recording = pace.begin()
        # at times the machine is busy, whatever the rhythm of the recordings
        clock.now += clock.plain + recording * clock.extra * (1 + (batch % 7 == 4))
        pace.end(recording)
        found += [batch] * recording
    return np.array(found)


@pytest.mark.parametrize(
    ("plain", "extra", "gap"),
    [(1.0, 0.5, 11), (1.0, 0.01, 3), (1.0, -0.1, 3), (1.0, 3.0, 61), (1.0, 100.0, 199),
     (1e-4, 1e-4, 21), (1.0, 0.101, 3), (1.0, 9.76, 197)],
)  # fmt: skip
def test_auto_records_the_first_8_and_then_within_its_budget(monkeypatch, plain, extra, gap):
    found = chosen_batches(monkeypatch, plain, extra, 4000)
    assert found[:8].tolist() == list(range(8))
    assert found[8:11].tolist() == [10, 13, 16]  # to learn what a plain batch costs
    gaps = np.diff(found[10:])
    assert set(gaps[1:]) == {gap}
    assert extra * len(gaps) / (plain * gaps.sum()) <= 0.0501 or gap == 199


@pytest.mark.parametrize("period", [2, 4, 8])
def test_auto_meets_the_steps_of_accumulated_batches(monkeypatch, period):
    found = chosen_batches(monkeypatch, 1.0, 0.5, 999)
    assert set(found[11:] % period) == set(range(period))


def test_auto_is_not_misled_by_a_machine_that_is_busier_at_times(monkeypatch):
    # from batch 100 on all takes three times as long, from 200 on as before
    clock = Clock(1.0, 0.5)
    monkeypatch.setattr(telemetry, "perf_counter", clock)
    pace, found = telemetry._Pace("auto", 0.05), []
    for batch in range(900):
        recording = pace.begin()
        clock.now += (1.0 + 0.5 * recording) * (3 if 100 <= batch < 200 else 1)
        pace.end(recording)
        found += [batch] * recording
    assert set(np.diff(found[10:])[1:]) == {11}


def test_another_budget_is_kept_too(monkeypatch):
    assert np.diff(chosen_batches(monkeypatch, 1.0, 0.5, 999, budget=0.1))[-1] == 5
    assert np.diff(chosen_batches(monkeypatch, 1.0, 0.5, 999, budget=0.01))[-1] == 51


def test_a_fixed_number_is_kept_whatever_it_costs(monkeypatch):
    assert set(np.diff(chosen_batches(monkeypatch, 1.0, 50.0, 99, every=4))) == {4}


def test_the_fit_asks_the_clock(monkeypatch):
    clock = Clock(1.0, 1.0)
    monkeypatch.setattr(telemetry, "perf_counter", clock)

    class Ticks(Callback):
        order = 200

        def before_batch(self, learn):
            clock.now += 1.0

        def after_step(self, learn):
            [watching] = [cb for cb in learn.callbacks if isinstance(cb, Telemetry)]
            clock.now += 1.0 * watching._run.recording

    # moments after Telemetry's own: a batch takes one second, two if recorded
    learn = learner(Telemetry(), Ticks(), train=batches(6, n=100))
    learn.fit(1)
    assert recorded(learn) == [*range(8), 10, 13, 16, 37, 58, 79]


def test_validation_is_not_recorded():
    learn = learner(Telemetry(every=1), valid=batches(6, n=3))
    learn.fit(2)
    assert recorded(learn) == list(range(2 * N))
    assert (learn.record.layers.of_kind("activations")[0][:, 0, 0] == 64).all()


class Looks(Callback):
    """Validate at some moment of every batch."""

    def look(self, learn):
        learn.validate(batches(6, n=2))


@pytest.mark.parametrize("moment", ["before_batch", "after_step", "after_batch", "before_epoch"])
def test_a_look_within_the_fit_is_not_recorded(moment):
    kind = type("At", (Looks,), {moment: Looks.look})
    alone, looking = (learner(Telemetry(every=1), *more) for more in ([], [kind()]))
    for learn in (alone, looking):
        learn.fit(1)
    for name in alone.record.layers:
        np.testing.assert_array_equal(alone.record.layers[name], looking.record.layers[name])


def test_what_lsuv_does_with_the_first_batch_is_not_recorded():
    learn = learner(Telemetry(every=1), LSUV())
    learn.fit(1)
    assert (learn.record.layers.of_kind("activations")[0][:, 0, 0] == 64).all()
    assert learn.record.layers["activations/sd"][0, 0] == pytest.approx(1, abs=0.01)


# ── steps, batches and epochs that are cancelled ──────────────────────────────────────────────


def raising(moment: str, kind: type[Exception], at: Callable[[Learner], bool], order: int = 0):
    def act(learn):
        if learn.training and at(learn):
            raise kind

    members = {"changes": True, "order": order, moment: lambda self, learn: act(learn)}
    return type("Raising", (Callback,), members)()


@pytest.mark.parametrize("order", [0, 200], ids=["before it", "after it"])
def test_accumulated_steps(order):
    accumulate = raising("after_backward", CancelStep, lambda learn: learn.batch_index % 2 == 0,
                         order)  # fmt: skip
    learn = learner(Telemetry(every=1), accumulate, train=batches(6, n=6))
    learn.fit(1)
    layers = learn.record.layers
    assert recorded(learn) == list(range(6))
    assert np.isfinite(layers["activations/mean"]).all()
    assert np.isfinite(layers["gradients/mean"]).all()
    update = layers["parameters/update"]
    assert np.isnan(update[::2]).all() and (update[1::2] > 0).all()
    assert np.isfinite(layers["parameters/gradient"][1::2]).all()


@pytest.mark.parametrize("order", [0, 200], ids=["before it", "after it"])
@pytest.mark.parametrize(
    "moment", ["before_batch", "after_predict", "after_backward", "after_step"]
)
def test_nothing_remains_of_a_cancelled_batch(moment, order):
    cancel = raising(moment, CancelBatch, lambda learn: learn.batch_index in (0, 2), order)
    learn = learner(Telemetry(every=1), cancel)
    learn.fit(2)
    # the numbers of batches are those of the record's rows
    assert recorded(learn) == list(range(len(learn.record.batches))) == list(range(6))
    sums, _ = learn.record.layers.of_kind("activations")
    assert (sums[:, 0, 0] == 64).all()
    means = learn.record.layers["activations/mean"]
    assert len(np.unique(means[:, 0])) == 6


def test_a_cancelled_batch_is_made_up_for_by_the_next():
    cancel = raising("after_loss", CancelBatch, lambda learn: learn.batch_index == 0)
    learn = learner(Telemetry(every=4), cancel)
    learn.fit(1)
    assert recorded(learn) == [0]
    [expected] = learn.record.layers["activations/mean"][:, 0]
    assert expected == pytest.approx(mlp()[0](batches(6)[1][0]).mean().item(), abs=1e-6)


@pytest.mark.parametrize("moment", ["before_batch", "after_predict", "after_step"])
def test_after_a_cancelled_epoch_nothing_is_mixed_up(moment):
    cancel = raising(moment, CancelEpoch, lambda learn: learn.epoch == 0 and learn.batch_index == 2,
                     200)  # fmt: skip
    learn = learner(Telemetry(every=1), cancel, valid=batches(6, n=3))
    learn.fit(2)
    assert recorded(learn) == list(range(len(learn.record.batches))) == list(range(2 + N))
    assert (learn.record.layers.of_kind("activations")[0][:, 0, 0] == 64).all()


def test_a_cancelled_fit_keeps_what_was_recorded():
    cancel = raising("after_loss", CancelFit, lambda learn: learn.batch_index == 3)
    learn = learner(Telemetry(every=1), cancel)
    learn.fit(2)
    assert recorded(learn) == [0, 1, 2]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [3, 16, 20])
def test_an_error_in_the_model_keeps_what_was_recorded(fault, n):
    class Failing(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > n:
                raise fault("broken")
            return super().forward(x)

    watching, raised = Telemetry(every=1), fault("broken")
    learn = learner(watching, model=nn.Sequential(Failing(6, 3)), train=batches(6, n=25))
    with pytest.raises(fault) as caught:
        learn.fit(1)
    assert str(caught.value) == str(raised) and caught.value.__cause__ is None
    assert recorded(learn) == list(range(n))
    assert not any(module._forward_hooks for module in learn.model.modules())
    Failing.forward = nn.Linear.forward  # mended
    learn.fit(1)
    assert recorded(learn) == list(range(n + 25))


def test_a_record_that_cannot_be_written_does_not_hide_the_error(monkeypatch):
    def broken(self, layers):
        raise OSError("the device is gone")

    monkeypatch.setattr(telemetry._Window, "read_into", broken)
    stop = Debug("after_epoch", lambda learn: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner(Telemetry(every=1), stop).fit(1)


# ── one record for several fits ───────────────────────────────────────────────────────────────


def test_several_fits_go_on_in_one_record():
    learn = learner(Telemetry(every=1))
    learn.fit(1)
    layers = learn.record.layers
    learn.fit(2)
    assert learn.record.layers is layers
    assert recorded(learn) == list(range(3 * N))
    learn.callbacks.pop()
    learn.fit(1)  # not watched
    learn.fit(1, callbacks=[Telemetry(every=2)])
    assert learn.record.layers is layers
    assert recorded(learn) == [*range(3 * N), 4 * N, 4 * N + 2, 4 * N + 4]


def test_other_modules_or_parameters_begin_a_new_record():
    learn = learner()
    learn.fit(1, callbacks=[Telemetry(every=1)])
    learn.fit(1, callbacks=[Telemetry(["0"], every=1)])
    assert learn.record.layers.names == ["0"] and recorded(learn) == list(range(N, 2 * N))
    learn.model[2].requires_grad_(False)
    learn.reset_optimizer()
    learn.fit(1, callbacks=[Telemetry(["0"], every=1)])
    assert learn.record.layers.parameters == ["0.weight", "0.bias"]


def test_a_learner_copied_after_a_fit_goes_on_by_itself():
    learn = learner(Telemetry(every=1))
    learn.fit(1)
    twin = copy.deepcopy(learn)
    for other in (twin, learn):
        other.fit(1)
        assert recorded(other) == list(range(2 * N))
    assert twin.record.layers is not learn.record.layers
    for name in learn.record.layers:
        np.testing.assert_array_equal(learn.record.layers[name], twin.record.layers[name])


def test_a_module_put_in_the_place_of_another_is_seen_from_the_next_fit_on():
    def replace(learn):
        if learn.batch_index == 1:
            learn.model[1] = nn.ReLU()

    learn = learner(Telemetry(every=1))
    learn.fit(1, callbacks=[Debug("after_batch", replace)])
    unseen = np.isnan(learn.record.layers["activations/mean"][:, 1])
    assert unseen.tolist() == [False, False, True, True, True]
    assert not learn.model[1]._forward_hooks
    learn.fit(1)
    assert np.isfinite(learn.record.layers["activations/mean"][N:]).all()


def test_an_optimiser_that_puts_new_values_into_parameters_is_followed():
    class Replacing(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.data = param.data * 1.5

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    layers = learner(Telemetry(every=1), model=model, opt_func=Replacing).fit(1).layers
    np.testing.assert_allclose(layers["parameters/update"], 0.5, rtol=1e-6)
    assert layers["parameters/norm"][-1] == pytest.approx(layers["parameters/norm"][0] * 1.5**4)


def test_two_in_one_fit_are_refused():
    with pytest.raises(SetupError, match="one Telemetry in a fit"):
        learner(Telemetry(), Telemetry(["0"])).fit(1)


def test_the_record_is_saved_and_drawn(tmp_path):
    record = learner(Telemetry(every=1)).fit(1)
    loaded = Record.load(record.save(tmp_path / "run.json")).layers
    for name in record.layers:
        np.testing.assert_array_equal(loaded[name], record.layers[name])
    assert loaded.plot_levels().axes


# ── what it watches ───────────────────────────────────────────────────────────────────────────


def test_by_itself_it_watches_what_computes():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Identity()),
        nn.MultiheadAttention(8, 2),
    )  # fmt: skip
    assert list(telemetry.chosen(model, None)) == ["1", "2.0", "3"]
    assert list(telemetry.chosen(nn.Linear(2, 2), None)) == ["Linear"]
    ours: Any = OurSequential(Flatten(), OurLinear(6, 8))
    assert [type(module) for module in telemetry.chosen(ours, None).values()] == [OurLinear]


def test_modules_by_name_or_as_they_are():
    model = mlp()
    assert telemetry.chosen(model, ["2", model[0]]) == {"2": model[2], "0": model[0]}
    assert telemetry.chosen(model, [model]) == {"Sequential": model}
    assert telemetry.chosen(model, iter(["1"])) == {"1": model[1]}
    layers = learner(Telemetry(["2", model[0]], every=1), model=model).fit(1).layers
    assert layers.names == ["2", "0"] and layers.types == ["Linear", "Linear"]
    assert np.isfinite(layers["gradients/sd"]).all()


def test_a_misspelt_module_names_the_nearest():
    model = nn.ModuleDict({"encoder": nn.Linear(6, 3), "head": nn.Linear(3, 3)})
    with pytest.raises(UnknownName, match=r"no module 'encodr'.*\n.*did you mean 'encoder'"):
        telemetry.chosen(model, ["head", "encodr"])
    with pytest.raises(UnknownName, match="choose one of encoder, head"):
        telemetry.chosen(model, ["fc"])


def test_a_module_of_another_model_is_refused():
    with pytest.raises(SetupError, match="watches modules of the model"):
        learner(Telemetry([nn.Linear(6, 8)])).fit(1)
    with pytest.raises(SetupError, match=r"hooks\.find"):
        telemetry.chosen(mlp(), [nn.Linear])  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("modules", ["0", nn.Linear(2, 2), 3])
def test_one_module_is_given_as_a_list(modules):
    with pytest.raises(SetupError, match="modules takes several"):
        Telemetry(modules)


def test_nothing_to_watch_is_refused():
    with pytest.raises(SetupError, match="no module to watch"):
        learner(Telemetry([])).fit(1)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "always", None])
def test_every_is_auto_or_a_whole_number(every):
    with pytest.raises(SetupError, match="every must be"):
        Telemetry(every=every)


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, math.nan, "5%", None])
def test_the_budget_is_a_share(budget):
    with pytest.raises(SetupError, match="budget must lie"):
        Telemetry(budget=budget)


def test_modules_that_never_work_are_told():
    with pytest.raises(SetupError, match="None of the watched modules was seen at work"):
        learner(Telemetry(["unused"]), model=Shared()).fit(1)


# ── copies ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_it_copies_also_in_the_midst_of_a_fit(way):
    twins = []

    def take(learn):
        if learn.batch_index == 2:
            twins.append(way(learn.callbacks[1]))

    learn = learner(Telemetry(["0"], 2, 0.1), Debug("after_step", take))
    learn.fit(1)
    [twin] = twins
    assert repr(twin) == repr(learn.callbacks[1]) == "Telemetry(modules=['0'], every=2, budget=0.1)"
    assert twin._run is None
    assert recorded(learn) == [0, 2, 4]
    other = learner(twin)
    other.fit(1)
    assert recorded(other) == [0, 2, 4]


def test_a_model_copied_in_the_midst_of_a_fit_is_not_watched():
    twins = []
    learn = learner(
        Telemetry(every=1), Debug("after_loss", lambda learn: twins.append(copy.deepcopy(mlp())))
    )
    learn.fit(1)

    def copied(learn):
        twins.append(copy.deepcopy(learn.model))
        twins[-1](torch.randn(50, 6)).sum().backward()

    learn = learner(Telemetry(every=1), Debug("before_batch", copied))
    learn.fit(1)
    twins[-1](torch.randn(50, 6)).sum().backward()
    assert (learn.record.layers.of_kind("activations")[0][:, 0, 0] == 64).all()


def test_tracing_a_watched_learner_leaves_its_record_alone():
    learn = learner(Telemetry(every=1))
    learn.fit(1)
    acts = learn.trace(3)
    assert {act.event for act in acts if act.by == "Telemetry"} >= {"before_batch", "after_step"}
    assert recorded(learn) == list(range(N))


# ── torch.compile ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compiled_learner(*callbacks: Callback) -> Learner:
    model: Any = torch.compile(nn.Sequential(nn.Linear(6, 3)), backend="aot_eager")
    torch.manual_seed(0)
    model._orig_mod[0].reset_parameters()
    return learner(*callbacks, model=model)


def test_a_compiled_model_is_watched_too(fresh_compiler):
    learn = compiled_learner(Telemetry(every=2))
    model = compiled_learner().model._orig_mod
    for fit in range(2):  # the second goes on with the code of the first
        learn.fit(1)
        layers = learn.record.layers
        assert not torch._dynamo.utils.counters["graph_break"]
        assert layers.names == ["0"] and layers.parameters == ["0.weight", "0.bias"]
        assert recorded(learn)[3 * fit :] == [N * fit, N * fit + 2, N * fit + 4]
        for name, values in by_hand(model, batches(6)).items():
            known = slice(1 if "gradients" in name else 0, None)  # not those of the first batch
            np.testing.assert_allclose(
                layers[name][3 * fit :][known], values[::2][known], 1e-4, 1e-6, err_msg=name
            )


def test_a_model_that_was_called_compiled_before_is_refused(fresh_compiler):
    learn = compiled_learner(Telemetry(every=3))
    learn.model.train()
    learn.model(batches(6)[0][0]).sum().backward()
    learn.model.zero_grad()
    with pytest.raises(SetupError, match=r"torch\.compiler\.reset\(\)"):
        learn.fit(1)
    torch.compiler.reset()
    learn.fit(1)
    assert len(recorded(learn)) == 2


# ── memory ────────────────────────────────────────────────────────────────────────────────────


class Weighs(Callback):
    """Ask what memory the process holds, at two batches."""

    def __init__(self, first: int, last: int):
        self.at, self.bytes = (first, last), []

    def after_batch(self, learn):
        if len(learn.record.batches) and learn.step in self.at:
            gc.collect()  # what refers in a circle is gone now or later, as chance has it
            self.bytes.append(tracemalloc.get_traced_memory()[0])


def grown(n: int, *callbacks: Callback) -> int:
    """Return what a fit takes more after n batches than after a fifth of them, in bytes."""
    one = batches(6, n=1)[0]
    weighs = Weighs(n // 5, n - 1)

    class Same:
        def __len__(self):
            return n

        def __iter__(self):
            return (one for _ in range(n))

    learn = learner(weighs, *callbacks, train=Same())
    tracemalloc.start()
    try:
        learn.fit(1)
    finally:
        tracemalloc.stop()
    first, last = weighs.bytes
    return last - first


def test_telemetry_adds_nothing_as_the_run_goes_on():
    # 700 recordings: the 192 rows are joined twice meanwhile
    grown(300, Telemetry(every=1))  # what is imported and kept at the first use
    assert grown(1200, Telemetry(every=1)) - grown(1200) < 20_000
