"""Compile: the same numbers, one graph a mode, everything given back; what fails is explained.

"aot_eager" goes every way that inductor goes and computes with torch's own kernels, so it must
agree bit for bit; inductor itself compiles two tiny models here.
"""

import copy
import math
import pickle
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import LBFGS, SGD, AdamW

from pellucid import Callback, CancelFit, DataLoaders, Learner, foundations
from pellucid.callbacks import (
    EMA,
    LSUV,
    Accumulate,
    BatchSize,
    Clip,
    Clocks,
    Compile,
    GradientCheckpointing,
    LabelSmoothing,
    MixUp,
    NonFinite,
    OneCycle,
    Precision,
    Progress,
    Telemetry,
    Unfreeze,
    clocks,
)
from pellucid.errors import NonFiniteLoss, SetupError, UnknownName
from pellucid.metrics import accuracy
from pellucid.schedules import constant, linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
both = pytest.mark.parametrize("what", ["model", "step"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting() -> Any:
    return CompileCounterWithBackend("aot_eager")


def arrays(n: int = 58) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def loaders(n: int = 38) -> DataLoaders:
    """Batches of 8 to train on, the last of 6; of 16 to validate, the last of 4."""
    x, y = arrays(n + 20)
    return DataLoaders.from_arrays((x[:n], y[:n]), (x[n:], y[n:]), batch_size=8, classes=3)


def net(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Dropout(dropout), nn.Linear(8, 3))


def learner(*callbacks: Callback, model: Any = None, **settings: Any) -> Learner:
    settings = {"lr": 0.05, "metrics": [accuracy], "device": "cpu"} | settings
    data = settings.pop("data", None) or loaders()
    model = model or net()
    return Learner(model, data, callbacks=[Progress("off"), *callbacks], **settings)


def fitted(*callbacks: Callback, epochs: int = 2, **settings: Any) -> Learner:
    learn = learner(*callbacks, **settings)
    torch.manual_seed(1)
    learn.fit(epochs)
    return learn


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()]


def losses(learn: Learner) -> list[float]:
    return learn.record.batches["train/loss"].tolist()


def assert_same(one: Learner, other: Learner) -> None:
    assert bits(one.model) == bits(other.model)
    assert losses(one) == losses(other)
    for name in ("valid/loss", "valid/accuracy"):
        assert one.record.epochs[name].tolist() == other.record.epochs[name].tolist()


# ── the same numbers ──────────────────────────────────────────────────────────────────────────


def by_hand(model: nn.Module, data: DataLoaders, epochs: int, opt_func: Any = AdamW) -> list[float]:
    opt, found = opt_func(model.parameters(), lr=0.05, fused=True), []
    for _ in range(epochs):
        model.train()
        for x, y in data.train:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            found.append(loss.item())
    return found


@both
def test_bit_for_bit_what_the_loop_by_hand_gives(what):
    model = net()
    torch.manual_seed(1)
    expected = by_hand(model, loaders(), 2)
    learn = fitted(Compile(what, backend="aot_eager"))
    assert bits(learn.model) == bits(model)
    assert losses(learn) == pytest.approx(expected, abs=0, rel=1e-6)


TOGETHER = {
    "Accumulate": lambda: [Accumulate(2)],
    "BatchSize": lambda: [BatchSize(linear(8, 16))],
    "EMA, Clip": lambda: [EMA(0.9), Clip(norm=0.1)],
    "GradientCheckpointing": lambda: [GradientCheckpointing(["0", "3"])],
    "LSUV": lambda: [LSUV()],
    "MixUp, LabelSmoothing": lambda: [MixUp(), LabelSmoothing()],
    "NonFinite, bf16": lambda: [NonFinite("skip"), Precision("bf16")],
    "Telemetry": lambda: [Telemetry(["0"])],
    "Unfreeze, OneCycle": lambda: [Unfreeze(every=1), OneCycle(0.1)],
}


OF_A_STEP = ["Accumulate", "MixUp, LabelSmoothing", "NonFinite, bf16"]
"""Those that have to do with the loss."""


@pytest.mark.parametrize(
    "what, name", [*(("model", name) for name in TOGETHER), *(("step", name) for name in OF_A_STEP)]
)
def test_with_others_it_is_what_they_give_without(what, name):
    compiled = fitted(Compile(what, backend="aot_eager"), *TOGETHER[name]())
    assert_same(compiled, fitted(*TOGETHER[name]()))


@both
def test_an_optimiser_that_evaluates_again(what):
    settings = {"opt_func": LBFGS, "lr": 0.1, "model": net(0.0)}
    compiled = fitted(Compile(what, backend="aot_eager"), epochs=1, **settings)
    assert_same(compiled, fitted(epochs=1, **settings | {"model": net(0.0)}))


class Sum(nn.Module):
    """Take inputs by position and by name, and give them back in a dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.linear(a + b), "sum": a + b}


@both
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_outputs_and_targets(what, form):
    def loss(preds: dict[str, torch.Tensor], y: torch.Tensor, weight: torch.Tensor):
        return (F.cross_entropy(preds["out"], y, reduction="none") * weight).mean()

    def run(*callbacks: Callback) -> Learner:
        torch.manual_seed(0)
        x, y = arrays(16)
        inputs = (x, x + 1) if form == "tuple" else {"b": x, "a": x + 1}
        batch = (*inputs, y, x[:, 0].abs()) if form == "tuple" else (inputs, y, x[:, 0].abs())
        data = DataLoaders([batch] * 3, n_inputs=2 if form == "tuple" else 1)
        return fitted(*callbacks, model=Sum(), data=data, loss_func=loss, metrics=())

    compiled, plain = run(Compile(what, backend="aot_eager")), run()
    assert bits(compiled.model) == bits(plain.model)
    assert losses(compiled) == losses(plain)


# ── graphs ────────────────────────────────────────────────────────────────────────────────────


@both
def test_one_graph_for_training_and_one_for_validation(what):
    # of all of the model: of a Sequential, model.compile() alone would compile nothing
    backend = counting()
    fitted(Compile(what, backend=backend), epochs=3)
    assert backend.frame_count == 2  # and none for the last batches, of 6 and of 4
    assert backend.op_count >= 2 * 5


def test_each_is_for_a_size_of_its_own():
    shapes: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        shapes.extend(tensor.shape for tensor in inputs if not isinstance(tensor, torch.SymInt))
        assert not any(isinstance(tensor, torch.SymInt) for tensor in inputs)
        return graph.forward

    for _ in range(2):  # in a later fit too, when torch has seen both
        fitted(Compile(backend=backend))
    assert {shape[0] for shape in shapes if shape[1:] == (6,)} >= {8, 16}


def test_other_sizes_cost_one_graph_more():
    backend = CompileCounterWithBackend("eager")
    data = loaders(100)
    fitted(
        Compile(backend=backend), BatchSize(linear(5, 30)), data=data, model=net(0.0)[0], epochs=6
    )
    assert backend.frame_count == 3


def test_a_loss_of_each_batch_is_not_compiled_anew():
    backend = CompileCounterWithBackend("eager")
    fitted(MixUp(), LabelSmoothing(), Compile("step", backend=backend), epochs=3)
    assert backend.frame_count == 2


def test_many_models_do_not_use_up_the_limit():
    backend, data = CompileCounterWithBackend("eager"), DataLoaders([arrays(8)], classes=3)
    for _ in range(10):
        fitted(Compile(backend=backend), epochs=1, data=data, model=nn.Linear(6, 3))
    assert backend.frame_count == 10


def test_the_loss_is_in_the_graph_of_a_step():
    counts = {what: CompileCounterWithBackend("eager") for what in ("model", "step")}
    for what, backend in counts.items():
        fitted(Compile(what, backend=backend), epochs=1)
    assert counts["step"].op_count == counts["model"].op_count + 2


def test_telemetry_of_a_later_fit_is_heard():
    learn = learner(Compile(backend="eager"), model=nn.Sequential(nn.Linear(6, 3)))
    learn.fit(1)
    for _ in range(2):
        learn.fit(1, callbacks=[Telemetry(every=1)])
    assert len(learn.record.layers["activations/mean"]) == 2 * 5


# ── given back ────────────────────────────────────────────────────────────────────────────────


class Within(Callback):
    """Look at the learner in the midst of a fit, and end it as told."""

    changes = True

    def __init__(self, fault: BaseException | None = None):
        self.fault, self.keys = fault, []

    def after_backward(self, learn):
        self.keys = list(learn.model.state_dict())
        assert type(learn.model) is nn.Sequential
        if self.fault:
            raise self.fault


@both
@pytest.mark.parametrize("fault", [None, CancelFit(), RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_the_users_and_given_back(what, fault):
    within = Within(fault)
    model, backend = net(), CompileCounterWithBackend("eager")
    keys, attributes = list(model.state_dict()), set(vars(model))
    learn = learner(Compile(what, backend=backend), within, model=model)
    learn.fit(0)
    known = set(vars(learn))
    try:
        learn.fit(1)
    except (RuntimeError, KeyboardInterrupt) as error:
        assert error is fault
    assert within.keys == keys
    assert set(vars(learn)) == known
    assert model._compiled_call_impl is None
    assert set(vars(model)) <= attributes | {"_compiled_call_impl"}
    n = backend.frame_count
    model(arrays()[0])
    assert learn.validate()
    assert backend.frame_count == n > 0


@both
def test_a_search_within_a_fit_is_a_fit_of_its_own(what):
    class Searches(Callback):
        changes = True

        def after_epoch(self, learn):
            if not learn.epoch:
                learn.find_lr(steps=3)

    backend = CompileCounterWithBackend("aot_eager")
    searched = fitted(Searches(), Compile(what, backend=backend))
    assert_same(searched, fitted())
    assert searched.model._compiled_call_impl is None and "forward" not in vars(searched)


@both
def test_looks_within_a_fit_are_plain_and_leave_no_trace(what):
    class Looks(Callback):
        def __init__(self):
            self.seen: list[float] = []

        def after_loss(self, learn):
            if learn.training:
                self.seen.append(learn.validate()["loss"])
                copy.deepcopy(learn.callbacks)
                pickle.dumps(learn.callbacks[-1])

    backend = "aot_eager"
    looks = Looks()
    looked = fitted(looks, Compile(what, backend=backend))
    assert_same(looked, fitted())
    assert len(looks.seen) == 10


@both
def test_who_changes_predictions_changes_the_loss(what):
    class Cools(Callback):
        changes = True

        def __init__(self, in_place: bool):
            self.in_place = in_place

        def after_predict(self, learn):
            if self.in_place:
                learn.preds.mul_(0.5)
            else:
                learn.preds = learn.preds * 0.5

    for in_place in (True, False):
        compiled = fitted(Cools(in_place), Compile(what, backend="aot_eager"), epochs=1)
        assert_same(compiled, fitted(Cools(in_place), epochs=1))


@both
def test_who_changes_targets_changes_the_loss(what):
    class Turns(Callback):
        changes = True

        def after_predict(self, learn):
            learn.y = (learn.y + 1) % 3

    compiled = fitted(Turns(), Compile(what, backend="aot_eager"), epochs=1)
    assert_same(compiled, fitted(Turns(), epochs=1))


# ── clocks ────────────────────────────────────────────────────────────────────────────────────


def test_compiling_is_on_the_clock_of_the_start(monkeypatch):
    class Time:
        now = 0.0

        def __call__(self):
            return self.now

    time, watch = Time(), Clocks()
    monkeypatch.setattr(clocks, "perf_counter", time)

    def slow(graph: Any, inputs: Any) -> Any:
        time.now += 60.0
        return graph.forward

    class Batch(Callback):
        def after_loss(self, learn):
            time.now += 1.0

    fitted(watch, Compile(backend=slow), Batch(), epochs=1)
    assert watch.cold == 61.0
    assert watch.warm == 4.0  # the code for validation is on no clock of training
    assert watch.verdict.startswith("compute-bound: 0% of the time is waiting for data")
    assert "the first batch took 61.00 s" in watch.verdict


# ── what is refused, and explained ────────────────────────────────────────────────────────────


def test_choices_that_there_are_not():
    with pytest.raises(UnknownName, match=r"(?s)knows no 'modle'.*did you mean 'model'"):
        Compile("modle")
    with pytest.raises(SetupError, match="Only inductor records CUDA graphs"):
        Compile(graphs=True, backend="aot_eager")
    with pytest.raises(UnknownName, match=r"(?s)no backend 'inducter'.*did you mean 'inductor'"):
        fitted(Compile(backend="inducter"))


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(SetupError, match=r"(?s)need an NVIDIA GPU.*cpu.*leave graphs out"):
        fitted(Compile(graphs=True))


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_model_that_is_compiled_is_refused(way):
    model: Any = net()
    if way == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(SetupError, match="compiled already"):
        fitted(Compile(backend="eager"), model=model)


def test_a_model_that_is_not_torchs_is_refused():
    model = foundations.Sequential(foundations.Linear(6, 3))
    with pytest.raises(SetupError, match=r"(?s)needs a torch module.*Sequential"):
        fitted(Compile(backend="eager"), model=model)


def test_a_step_of_ones_own_is_compiled_as_a_model():
    class Mine(Learner):
        def forward(self):
            return super().forward() * 2

    def run(*callbacks: Callback) -> Learner:
        quiet = Progress("off")
        learn = Mine(net(0.0), loaders(), callbacks=[quiet, *callbacks], device="cpu")
        learn.fit(1)
        return learn

    with pytest.raises(SetupError, match=r'(?s)another forward, of Mine.*Compile\("model"\)'):
        run(Compile("step", backend="eager"))
    assert losses(run(Compile(backend="aot_eager"))) == losses(run())


def test_a_model_of_which_nothing_is_compiled_is_refused():
    class Odd(nn.Linear):
        forward = torch.compiler.disable(nn.Linear.forward)

    with pytest.raises(SetupError, match=r"(?s)nothing in the model.*saw: Odd.*TORCH_LOGS"):
        fitted(Compile(backend="eager"), model=Odd(6, 3))


@both
def test_an_error_of_the_model_is_its_own(what):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(9, 3)

        def forward(self, x):
            return self.second(self.first(x))

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as caught:
        fitted(Compile(what, backend="aot_eager"), model=Wrong())
    shown = "".join(traceback.format_exception(caught.value))
    assert "return self.second(self.first(x))" in shown and "_dynamo" not in shown
    assert "a Linear layer expects another number of features" in shown


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    import torch._inductor.config as config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    learn = learner(Compile())
    nowhere = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with nowhere, pytest.raises(SetupError, match=r"install a C\+\+ compiler") as caught:
        learn.fit(1)
    shown = "".join(traceback.format_exception(caught.value))
    assert "No working C++ compiler found" in shown
    assert len(shown.splitlines()) < 60 and "_inductor/" not in shown
    learn.callbacks = [Progress("off")]
    learn.fit(1)  # and the learner can be used


def test_a_backend_that_fails_is_named():
    def broken(graph: Any, inputs: Any) -> Any:
        raise ArithmeticError("no such thing\nand much more")

    with pytest.raises(SetupError, match="saw: ArithmeticError: no such thing\n"):
        fitted(Compile(backend=broken))


def test_a_backend_that_fails_without_a_word_is_named_too():
    def broken(graph: Any, inputs: Any) -> Any:
        raise AssertionError

    with pytest.raises(SetupError, match="saw: AssertionError"):
        fitted(Compile(backend=broken))


def test_nan_is_found_where_it_is():
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x - 1e9)

    model = nn.Sequential(nn.Linear(6, 3), Log())
    with pytest.raises(NonFiniteLoss, match=r"'1' \(Log\) gives what is not finite"):
        fitted(Compile(backend="aot_eager"), model=model)


# ── inductor ──────────────────────────────────────────────────────────────────────────────────


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def conv_data() -> DataLoaders:
    x, y = torch.randn(54, 1, 6, 6, generator=torch.Generator().manual_seed(0)), arrays(54)[1]
    return DataLoaders.from_arrays((x[:38], y[:38]), (x[38:], y[38:]), batch_size=8, classes=3)


@both
def test_inductor_agrees_with_the_loop_by_hand_to_rounding(what):
    model = conv_net()
    expected = by_hand(model, conv_data(), 2, SGD)  # AdamW makes steps of rounding errors
    learn = fitted(Compile(what), model=conv_net(), data=conv_data(), opt_func=SGD)
    assert losses(learn) == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ── CUDA graphs ───────────────────────────────────────────────────────────────────────────────


def on_gpu(*callbacks: Callback, **settings: Any) -> Learner:
    torch.manual_seed(0)
    settings = {"model": conv_net(), "data": conv_data(), "opt_func": SGD} | settings
    return fitted(*callbacks, device="cuda", epochs=3, lr=0.05, **settings)


@needs_gpu
@both
@pytest.mark.parametrize("name", ["alone", "Accumulate", "EMA, Clip", "NonFinite, bf16"])
def test_replayed_graphs_compute_the_same(what, name, monkeypatch):
    callbacks = TOGETHER.get(name, list)
    # nothing is read before the end of a pass, when a graph has long written over its memory
    monkeypatch.setattr("pellucid.tally.READ_INTERVAL", math.inf)
    replayed, plain = on_gpu(*callbacks(), Compile(what, graphs=True)), on_gpu(*callbacks())
    tolerance = 3e-2 if "bf16" in name else 1e-3
    assert losses(replayed) == pytest.approx(losses(plain), rel=tolerance)
    assert len(set(losses(replayed))) == len(losses(replayed))
    for column in ("valid/loss", "valid/accuracy"):
        found, expected = (run.record.epochs[column].tolist() for run in (replayed, plain))
        assert found == pytest.approx(expected, rel=tolerance, abs=0.1 * ("acc" in column))
    for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=tolerance)


@needs_gpu
@both
def test_graphs_are_recorded(what):
    from torch._inductor.cudagraph_trees import get_manager

    class Counts(Callback):
        n = 0

        def after_epoch(self, learn):  # torch drops them with the code, when the fit ends
            manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
            self.n = sum(map(len, manager.roots.values())) if manager else 0

    counts = Counts()
    torch._dynamo.utils.counters.clear()
    on_gpu(counts, Compile(what, graphs=True))
    assert counts.n >= 2
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@needs_gpu
def test_predictions_that_are_kept_stay():
    class Keeps(Callback):
        def __init__(self):
            self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def after_predict(self, learn):
            self.kept.append((learn.preds, learn.preds.detach().clone()))

    keeps = Keeps()
    on_gpu(keeps, Compile("step", graphs=True), OneCycle(0.1), Accumulate(2), EMA(0.9))
    assert all(torch.equal(now, then) for now, then in keeps.kept)


@needs_gpu
def test_a_schedule_moves_replayed_graphs_too():
    callbacks = [OneCycle(0.1), BatchSize(constant(8))]
    replayed, plain = on_gpu(*callbacks, Compile(graphs=True)), on_gpu(*callbacks)
    assert losses(replayed) == pytest.approx(losses(plain), rel=1e-3)
