"""Law 9, nobody is forgotten: whatever the package holds is found by walking it, and tried."""

import copy
import importlib
import inspect
import io
import math
import pickle
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import pellucid
from pellucid import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    DataLoaders,
    Learner,
    Loader,
    Record,
)
from pellucid.callbacks import (
    Accumulate,
    BatchSize,
    Clip,
    Compile,
    Debug,
    GradientCheckpointing,
    ImageSize,
    MaxTime,
    OneCycle,
    Progress,
    Schedule,
    TakeTurns,
)
from pellucid.data import Normalize, Reshape
from pellucid.errors import DataNotFound
from pellucid.metrics import MacroF1, accuracy
from pellucid.schedules import constant, cosine, linear


def modules() -> list[ModuleType]:
    """Import every file of the package but the one that runs the command line when imported."""
    found = pkgutil.walk_packages(pellucid.__path__, "pellucid.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return [importlib.import_module(name) for name in names]


def own(module: ModuleType, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the public things of a kind that a module itself defines."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if name[0] != "_" and wanted(thing) and thing.__module__ == module.__name__
    }


def is_callback(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Callback) and thing is not Callback


def do_nothing(learn: Learner) -> None:
    pass


CALLBACKS = {name: c for module in modules() for name, c in own(module, is_callback).items()}

EXAMPLES: dict[str, Callable[[], Callback]] = {
    "Debug": lambda: Debug("after_loss", do_nothing),
    "OneCycle": lambda: OneCycle(0.05),
    "Accumulate": lambda: Accumulate(2),
    "BatchSize": lambda: BatchSize(linear(8, 16)),
    "Clip": lambda: Clip(norm=1.0),
    "Compile": lambda: Compile(backend="eager"),
    "GradientCheckpointing": lambda: GradientCheckpointing(["0", "3"]),
    "ImageSize": lambda: ImageSize(constant(1)),
    "MaxTime": lambda: MaxTime(3600),
    "TakeTurns": lambda: TakeTurns({"0": 2, "4": 1}),
    "Schedule": lambda: Schedule("lr", linear(0.1, 0.01)),
}
"""Callbacks that cannot be made without arguments; a new one of these needs a line here."""


def make(name: str) -> Callback:
    return EXAMPLES.get(name, CALLBACKS[name])()


def settings(callback: Callback) -> dict[str, Any]:
    return {name: value for name, value in vars(callback).items() if name[0] != "_"}


def learner(data: DataLoaders, *callbacks: Callback) -> Learner:
    """Make a learner of what is hard to copy: dropout, batch norm, a metric with a memory."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    metrics = [accuracy, MacroF1(3)]
    if not any(callback.shows_progress for callback in callbacks):
        callbacks = (*callbacks, Progress("off"))
    return Learner(model, data, metrics=metrics, callbacks=callbacks, device="cpu")


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


def same(a: Any, b: Any) -> bool:
    """Compare settings of callbacks: schedules and plain values compare, others by their repr."""
    return a == b or repr(a) == repr(b)


# ── callbacks ─────────────────────────────────────────────────────────────────────────────────


def test_the_walk_finds_the_callbacks():
    assert set(pellucid.callbacks.__all__) == set(CALLBACKS)
    assert set(EXAMPLES) <= set(CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_survives_an_empty_fit(name, data):
    learn = learner(data, make(name))
    before = bits(learn.model)
    learn.fit(0)
    assert bits(learn.model) == before
    learn.fit(1)
    learn.fit(0)


class Raising(Callback):
    """Raise at the second coming of a moment, or at the first of what comes once a pass or fit."""

    changes = True

    def __init__(self, moment: str, fault: BaseException, order: int):
        self.fault, self.order = fault, order
        self.left = 1 if moment.endswith(("fit", "epoch", "train")) else 2
        setattr(self, moment, self._raise)

    def _raise(self, learn: Learner) -> None:
        self.left -= 1
        if not self.left:
            raise self.fault


CANCELS = [
    ("before_batch", CancelBatch), ("after_loss", CancelBatch), ("after_step", CancelBatch),
    ("after_backward", CancelStep), ("before_batch", CancelEpoch), ("after_batch", CancelEpoch),
    ("before_epoch", CancelFit), ("before_batch", CancelFit), ("after_loss", CancelFit),
    ("after_step", CancelFit), ("after_train", CancelFit), ("after_epoch", CancelFit),
]  # fmt: skip


@pytest.mark.parametrize("order", [-2000, 2000], ids=["before it", "after it"])
@pytest.mark.parametrize("moment, kind", CANCELS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_survives_a_cancel(name, moment, kind, order, data):
    learn = learner(data, make(name))
    learn.fit(2, callbacks=[Raising(moment, kind(), order)])
    learn.fit(1)
    assert len(learn.record.epochs) >= 1


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["before_fit", "after_predict", "after_epoch", "after_fit"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_survives_an_error(name, moment, kind, data):
    fault, learn = kind("broken"), learner(data, make(name))
    heard = list(learn.callbacks)
    with pytest.raises(kind) as caught:
        learn.fit(2, callbacks=[Raising(moment, fault, 2000)])
    assert caught.value is fault
    assert learn.callbacks == heard
    assert not any(module._forward_hooks for module in learn.model.modules())
    [group] = learn.opt.param_groups
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.999))
    learn.fit(1)


@pytest.mark.parametrize("fitted", [False, True], ids=["new", "after a fit"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_pickles_and_copies(name, way, fitted, data):
    callback = make(name)
    if fitted:
        learner(data, callback).fit(1)
    twin = copies(callback, way)
    assert type(twin) is type(callback)
    assert repr(twin) == repr(callback)
    assert set(settings(twin)) == set(settings(callback))
    assert all(same(settings(twin)[k], v) for k, v in settings(callback).items() if not callable(v))
    learner(data, twin).fit(1)


def copies(thing: Any, way: str) -> Any:
    return pickle.loads(pickle.dumps(thing)) if way == "pickle" else copy.deepcopy(thing)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_shows_its_class_and_its_settings(name):
    callback = make(name)
    shown = repr(callback)
    assert shown.startswith(f"{name}(")
    assert " at 0x" not in shown.replace(repr(do_nothing), "")
    for setting in inspect.signature(type(callback)).parameters:
        assert f"{setting}=" in shown


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_takes_at_most_six_arguments(name):
    assert len(inspect.signature(CALLBACKS[name]).parameters) <= 6


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_can_serve_several_learners_in_turn(name, data):
    callback = make(name)
    learner(data, callback).fit(1)
    one, other = learner(copy.deepcopy(data), callback), learner(copy.deepcopy(data), make(name))
    torch.manual_seed(1)
    one.fit(1)
    torch.manual_seed(1)
    other.fit(1)
    assert bits(one.model) == bits(other.model)


# ── a learner with everything on ──────────────────────────────────────────────────────────────


def with_everything(data: DataLoaders) -> Learner:
    # compiling what all the others do takes a minute; tests/test_compile.py pairs it with some
    every = map(make, sorted(set(CALLBACKS) - {"Progress", "Compile"}))
    free = {callback.decides or callback: callback for callback in every}  # no rivals
    return learner(data, Progress("off"), *free.values())


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_learner_with_every_callback_copies_and_the_copy_trains_alike(way, data):
    learn = with_everything(data)
    learn.fit(2)
    before = bits(learn.model)
    twin = copies(learn, way)
    assert repr(twin) == repr(learn)
    torch.manual_seed(1)
    twin.fit(2)
    # the copy is independent: training it left the original alone
    assert bits(learn.model) == before
    assert len(learn.record.epochs) == 2
    torch.manual_seed(1)
    learn.fit(2)
    assert bits(learn.model) == bits(twin.model) != before
    ours, theirs = learn.record.batches, twin.record.batches
    assert {name: ours[name].tolist() for name in ours} == {n: theirs[n].tolist() for n in theirs}


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_learner_that_never_trained_copies_too(way, data):
    learn = with_everything(data)
    twin = copies(learn, way)
    for one in (learn, twin):
        torch.manual_seed(1)
        one.fit(1)
    assert bits(learn.model) == bits(twin.model)


def test_a_learner_copies_after_an_error(data):
    learn = with_everything(data)
    with pytest.raises(RuntimeError):
        learn.fit(1, callbacks=[Raising("after_loss", RuntimeError(), 0)])
    copies(learn, "pickle").fit(1)


# ── schedules ─────────────────────────────────────────────────────────────────────────────────


def makes_a_schedule(thing: Any) -> bool:
    if not inspect.isfunction(thing):
        return False
    home = importlib.import_module("pellucid.schedules")
    return inspect.signature(thing, eval_str=True).return_annotation in (home.Curve, home.Sequel)


SCHEDULES = own(importlib.import_module("pellucid.schedules"), makes_a_schedule)

SCHEDULE_EXAMPLES: dict[str, tuple[Any, ...]] = {
    "combine": ([0.3, 0.7], [linear(0.1, 1.0), cosine(1.0, 0.0)]),
    "constant": (0.5,),
    "cosine": (0.1, 1.0),
    "exponential": (1e-6, 10.0),
    "linear": (1.0, 2.0),
    "one_cycle": (0.1,),
}


def test_every_schedule_has_an_example():
    assert set(SCHEDULES) == set(SCHEDULE_EXAMPLES)


@pytest.mark.parametrize("name", SCHEDULE_EXAMPLES)
def test_a_schedule_pickles_compares_and_copies(name):
    schedule = SCHEDULES[name](*SCHEDULE_EXAMPLES[name])
    for way in ("pickle", "deepcopy"):
        twin = copies(schedule, way)
        assert twin == schedule
        assert [twin(i / 10) for i in range(11)] == [schedule(i / 10) for i in range(11)]


@pytest.mark.parametrize("name", SCHEDULE_EXAMPLES)
def test_a_schedule_is_finite_from_0_to_1(name):
    schedule = SCHEDULES[name](*SCHEDULE_EXAMPLES[name])
    values = [schedule(i / 1000) for i in range(1001)]
    assert all(type(value) is float and math.isfinite(value) for value in values)


@pytest.mark.parametrize("name", SCHEDULE_EXAMPLES)
def test_a_schedule_shows_its_arguments(name):
    schedule = SCHEDULES[name](*SCHEDULE_EXAMPLES[name])
    shown = repr(schedule)
    assert " at 0x" not in shown
    space = {
        name: getattr(importlib.import_module("pellucid.schedules"), name) for name in SCHEDULES
    }
    assert eval(shown, space) == schedule  # it can be pasted back


# ── transforms ────────────────────────────────────────────────────────────────────────────────

TRANSFORMS = own(importlib.import_module("pellucid.data.transforms"), inspect.isclass)

TRANSFORM_EXAMPLES: dict[str, Callable[[], Any]] = {
    "Normalize": lambda: Normalize([0.4], [0.2]),
    "Reshape": lambda: Reshape(16, 1, 1),
}


def test_every_transform_has_an_example():
    made = {name for name, kind in TRANSFORMS.items() if not inspect.isabstract(kind)}
    assert made == set(TRANSFORM_EXAMPLES)


@pytest.mark.parametrize("name", TRANSFORM_EXAMPLES)
def test_a_transform_copies_and_leaves_its_input_alone(name):
    transform = TRANSFORM_EXAMPLES[name]()
    for dtype in (torch.uint8, torch.float32):
        x = torch.randint(0, 255, (5, 1, 4, 4)).to(dtype)
        before, out = x.clone(), transform(x)
        assert len(out) == 5
        assert torch.equal(x, before)
        for way in ("pickle", "deepcopy"):
            assert torch.equal(copies(transform, way)(x), out)


@pytest.mark.parametrize("name", TRANSFORM_EXAMPLES)
def test_a_transform_shows_its_settings(name):
    transform = TRANSFORM_EXAMPLES[name]()
    assert repr(transform).startswith(f"{name}(")
    assert " at 0x" not in repr(transform)
    assert any(character.isdigit() for character in repr(transform))


# ── data sets ─────────────────────────────────────────────────────────────────────────────────


def makes_data(thing: Any) -> bool:
    if not inspect.isfunction(thing):
        return False
    return inspect.signature(thing, eval_str=True).return_annotation is DataLoaders


DATASETS = own(importlib.import_module("pellucid.data.named"), makes_data)

EMBEDDED = {"digits"}
"""Those that ship with the package; the others need files."""

FOLDERS = {"fashion_mnist": "fashion-mnist", "imagenette": "imagenette2-160"}


def needs_files(name: str, request: pytest.FixtureRequest) -> None:
    if name not in EMBEDDED:
        folder = request.getfixturevalue("real_data") / FOLDERS.get(name, name)
        if not folder.is_dir():
            pytest.skip(f"no {folder.name} in PELLUCID_DATA")


def test_the_walk_finds_the_data_sets():
    assert {"digits", "mnist", "fashion_mnist"} <= set(DATASETS)
    assert set(DATASETS) <= set(pellucid.data.__all__)


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_what_every_data_set_is(name, request):
    needs_files(name, request)
    data = DATASETS[name](batch_size=32)
    assert data.n_classes == len(data.classes) == 10
    assert len(data.train.dataset) > len(data.valid.dataset) > 0
    x, y = pellucid.data.first(data.train)
    assert (x.dtype, x.ndim, len(x), y.dtype) == (torch.uint8, 4, 32, torch.int64)
    assert 0 <= int(y.min()) <= int(y.max()) < 10
    for transform in data.transforms:
        x = transform(x)
    assert x.dtype == torch.float32
    assert abs(x.mean()) < 0.5 and 0.5 < x.std() < 2
    assert data.default_loss() is F.cross_entropy


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_depends_on_its_seed_alone(name, request):
    needs_files(name, request)
    batches = [pellucid.data.first(DATASETS[name](seed=seed).train) for seed in (0, 0, 1)]
    assert torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][1], batches[2][1])


@pytest.mark.parametrize("name", sorted(set(DATASETS) - EMBEDDED))
def test_a_data_set_that_is_not_there_says_so(name, tmp_path):
    with pytest.raises(DataNotFound, match="not on this machine"):
        DATASETS[name](path=tmp_path)


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_an_embedded_data_set_pickles_and_copies(name):
    data = DATASETS[name]()
    for way in ("pickle", "deepcopy"):
        twin = copies(data, way)
        assert repr(twin) == repr(data)
        assert all(map(torch.equal, next(iter(twin.valid)), pellucid.data.first(data.valid)))


# ── plots ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_pyplot(monkeypatch):
    # pyplot holds on to figures and may want a display: importing it now raises
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def record(data) -> Record:
    learn = learner(data)
    return learn.fit(2, callbacks=[OneCycle(0.05)])


PLOTS = own(
    importlib.import_module("pellucid.plots"),
    lambda thing: inspect.isfunction(thing) and thing.__name__.startswith("plot"),
)

PLOT_EXAMPLES: dict[str, Callable[[Record], tuple[Any, ...]]] = {
    "plot_columns": lambda r: ({"lr/0": [1.0, 2.0], "lr/1": [2.0, 3.0], "momentum": [0.9, 0.8]},),
    "plot_init_study": lambda r: (
        ["a", "b"],
        {"one": {"sd": [1.0, 0.0], "grad_sd": [0.1, math.nan], "weight_sd": [0.2, 0.3]}},
    ),
    "plot_images": lambda r: (np.random.rand(5, 3, 4, 4), list("abcde"), 3),
    "plot_loss": lambda r: (r.batches, r.epochs),
    "plot_lr_search": lambda r: ([0.1, 1.0, 10.0], [3.0, 2.0, math.nan], [3.0, 2.5, 2.9], 1.0),
    "plot_run": lambda r: (r.batches, r.epochs),
    "plot_schedule": lambda r: (r.batches,),
}


def assert_draws(figure: Any) -> None:
    assert isinstance(figure, Figure)
    assert all(axes.has_data() for axes in figure.axes if axes.axison)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue()[:4] == b"\x89PNG"


def test_every_plot_has_an_example():
    assert set(PLOTS) == set(PLOT_EXAMPLES)


@pytest.mark.parametrize("name", PLOT_EXAMPLES)
def test_a_plot_is_a_figure_made_without_pyplot(name, record, no_pyplot):
    assert_draws(PLOTS[name](*PLOT_EXAMPLES[name](record)))


def plot_methods(kind: type) -> list[str]:
    return [name for name in vars(kind) if name.startswith("plot")]


@pytest.mark.parametrize("name", plot_methods(Record))
def test_a_record_draws_itself_without_pyplot(name, record, no_pyplot):
    assert_draws(getattr(record, name)())


def test_a_search_and_a_plan_are_drawn_without_pyplot(data, no_pyplot):
    learn = learner(data)
    assert_draws(learn.find_lr(steps=20).plot())
    assert_draws(learn.plan(2, [OneCycle(0.05)]))


def test_a_record_without_validation_or_with_one_batch_is_drawn_too(data, no_pyplot):
    data.train = Loader(data.train.dataset, batch_size=64)
    data.valid = None
    record = learner(data).fit(1)
    for name in plot_methods(Record):
        assert_draws(getattr(record, name)())
