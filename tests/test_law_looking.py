"""Law 2, looking changes nothing: after every look all state is bit for bit what it was."""

import copy
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from pellucid import Callback, DataLoaders, Learner, Record
from pellucid.callbacks import Best, EarlyStopping, OneCycle, Progress, Schedule
from pellucid.data import ArrayDataset, Loader, first
from pellucid.init import study_init
from pellucid.metrics import MacroF1, accuracy
from pellucid.schedules import linear
from pellucid.summary import summary

# ── all that a look could disturb ─────────────────────────────────────────────────────────────


def plain(value: Any) -> Any:
    """Turn anything into nested plain values that compare with ==; tensors by their bits."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.detach().contiguous().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, Record):
        return {
            name: plain(vars(table) if table is not None else None)
            for name, table in vars(value).items()
        }
    return copy.copy(value) if isinstance(value, (set, bytearray)) else value


def hooks_of(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hook" in key:
                found[f"{name}.{key}"] = plain(dict(value) if hasattr(value, "items") else value)
    shared = torch.nn.modules.module
    for key in [key for key in vars(shared) if key.startswith("_global_") and "hook" in key]:
        found[key] = plain(getattr(shared, key))
    for name, param in model.named_parameters():
        found[f"{name} hooks"] = (param._backward_hooks, param._post_accumulate_grad_hooks)
    return found


def state_of_tensors(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: {
            "identity": (id(tensor), tensor.data_ptr()),
            "bits": plain(tensor),
            "gradient": plain(tensor.grad),
            "gradient's identity": id(tensor.grad),
            "requires_grad": tensor.requires_grad,
        }
        for name, tensor in tensors
    }


def state_of_optimizer(opt: Any) -> Any:
    if opt is None:
        return {}
    return {
        "state": {id(param): plain(values) for param, values in opt.state.items()},
        "groups": [plain({k: v for k, v in g.items() if k != "params"}) for g in opt.param_groups],
        "params": [[id(param) for param in group["params"]] for group in opt.param_groups],
        "hooks": plain({key: vars(opt)[key] for key in vars(opt) if "hook" in key}),
    }


def state_of_process() -> dict[str, Any]:
    return {
        "python's random": random.getstate(),
        "numpy's random": plain(np.random.get_state()),
        "torch's random": plain(torch.get_rng_state()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly mode": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "threads": threading.enumerate(),
    }


def state_of_loader(loader: Any) -> Any:
    return plain(vars(loader)) if isinstance(loader, Loader) else id(loader)


def all_state(learn: Learner) -> dict[str, Any]:
    return {
        "tensors": state_of_tensors(learn.model),
        "modules": {name: id(module) for name, module in learn.model.named_modules()},
        "modes": {name: module.training for name, module in learn.model.named_modules()},
        "hooks": hooks_of(learn.model),
        "optimizer": state_of_optimizer(learn.opt),
        "process": state_of_process(),
        "learner": {name: (id(value), plain(value)) for name, value in vars(learn).items()},
        "record": plain(learn.record),
        "data": plain(vars(learn.data)),
        "loaders": {
            "train": state_of_loader(learn.data.train),
            "valid": state_of_loader(learn.data.valid),
        },
        "callbacks": {repr(cb): (id(cb), plain(vars(cb))) for cb in learn.callbacks},
        "metrics": {
            name: plain(getattr(metric, "__dict__", None)) for name, metric in learn.metrics.items()
        },
    }


def assert_untouched(before: dict[str, Any], learn: Learner) -> None:
    after = all_state(learn)
    changed = [
        f"{part}: {name}"
        for part in before
        for name in before[part]
        if before[part][name] != after[part].get(name)
    ]
    assert not changed
    assert before == after


# ── a learner in the middle of things ─────────────────────────────────────────────────────────


class RunningMean(nn.Module):
    """Subtract a running mean whose buffer is a new tensor after every training batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Counter(Callback):
    """Watch, and count what was seen."""

    def __init__(self):
        self.seen = []

    def after_batch(self, learn):
        self.seen.append(learn.batch_index)


class Jitter(Callback):
    """Change inputs at random, and remember how often."""

    changes = True

    def __init__(self):
        self.times = 0

    def before_batch(self, learn):
        self.times += 1
        learn.x = learn.x + 0.01 * torch.randn_like(learn.x)


CALLBACKS: tuple[Callable[[], Callback], ...] = (
    Counter,
    Best,
    EarlyStopping,
    partial(Progress, "off"),
    partial(Schedule, "lr", linear(0.1, 0.05)),
)


MOMENTUM = partial(SGD, momentum=0.9)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.Dropout(0.3), nn.Linear(8, 3),
    )  # fmt: skip


def in_mid_training(
    model: nn.Module,
    data: DataLoaders,
    callbacks: tuple[Callable[[], Callback], ...] = CALLBACKS,
    opt_func: Callable[..., Any] = MOMENTUM,
) -> Learner:
    """Fit, then freeze a part, leave modes mixed, gradients behind and random state anywhere."""
    learn = Learner(
        model,
        data,
        opt_func=opt_func,
        lr=0.1,
        metrics=[accuracy, MacroF1(3)],
        callbacks=[make() for make in callbacks],
        device="cpu",
    )
    learn.fit(2)
    model[0].requires_grad_(False)
    model.train()
    model[1].eval()
    x, y = first(data.train)
    F.cross_entropy(model(x), y).backward()
    random.random(), np.random.rand(), torch.rand(3)
    return learn


# ── the looks ─────────────────────────────────────────────────────────────────────────────────


def fail_at(learn: Learner, n: int, error: BaseException) -> None:
    """Let the model raise in its n-th call, from a forward hook of the test."""
    calls = iter(range(n))

    def hook(module, inputs):
        if next(calls, None) is None:
            raise error

    return learn.model[-1].register_forward_pre_hook(hook)


def meet_nan(learn: Learner) -> None:
    learn.data.train.dataset.arrays[0][::3] = torch.nan
    learn.find_lr(steps=12)


LOOKS: dict[str, Callable[[Learner], Any]] = {
    "find_lr": lambda learn: learn.find_lr(steps=12),
    "find_lr to the bitter end": lambda learn: learn.find_lr(1e-2, 1e8, 30),
    "find_lr, plotted": lambda learn: learn.find_lr(steps=12).plot(),
    "find_lr meets NaN": meet_nan,
    "validate": lambda learn: learn.validate(),
    "validate on training data": lambda learn: learn.validate(learn.data.train),
    "validate on a list": lambda learn: learn.validate([first(learn.data.valid)]),
    "predict a tensor": lambda learn: learn.predict(torch.ones(5, 6)),
    "predict an array": lambda learn: learn.predict(np.ones((70, 6), np.float32)),
    "predict a loader": lambda learn: learn.predict(learn.data.valid),
    "predict the training data": lambda learn: learn.predict(learn.data.train),
    "trace": lambda learn: learn.trace(3),
    "trace over an epoch's end": lambda learn: learn.trace(7),
    "plan": lambda learn: learn.plan(3),
    "plan with one cycle": lambda learn: learn.plan(3, [OneCycle(0.1)]),
    "show_loop": lambda learn: learn.show_loop(),
    "show_loop with another": lambda learn: learn.show_loop(
        [Schedule("momentum", linear(0.9, 0.8))]
    ),
    "record.plot": lambda learn: learn.record.plot(),
    "record.plot_loss": lambda learn: learn.record.plot_loss(),
    "record.plot_schedule": lambda learn: learn.record.plot_schedule(),
    "study_init": lambda learn: study_init(learn.model, first(learn.data.train), F.cross_entropy),
    "study_init without a loss": lambda learn: study_init(learn.model, torch.ones(5, 6)).plot(),
    "summary": lambda learn: learn.summary(),
    "summary of the model alone": lambda learn: summary(learn.model, torch.ones(5, 6)),
    "first of training": lambda learn: first(learn.data.train),
    "first of validation": lambda learn: first(learn.data.valid),
    "repr": lambda learn: (repr(learn), repr(learn.data), repr(learn.record), repr(learn.opt)),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_changes_nothing(name, data, capsys):
    learn = in_mid_training(network(), data)
    before = all_state(learn)
    LOOKS[name](learn)
    if name == "find_lr meets NaN":  # which the test put there itself
        before["loaders"] = all_state(learn)["loaders"]
    assert_untouched(before, learn)


def test_saving_changes_nothing(data, tmp_path):
    learn = in_mid_training(network(), data)
    before = all_state(learn)
    learn.save(tmp_path / "model.safetensors")
    learn.record.save(tmp_path / "record.json")
    assert_untouched(before, learn)


@pytest.mark.parametrize("name", [name for name in LOOKS if "record" not in name])
def test_a_look_before_the_first_fit_changes_nothing(name, data, capsys):
    callbacks = [Schedule("lr", linear(0.1, 0.05)), Progress("off")]
    learn = Learner(network(), data, callbacks=callbacks, device="cpu")
    before = all_state(learn)
    LOOKS[name](learn)
    if name == "find_lr meets NaN":
        before["loaders"] = all_state(learn)["loaders"]
    assert_untouched(before, learn)
    assert learn.opt is None


FAILING = [
    *product(["find_lr", "validate", "predict a loader", "trace"], [0, 1]),
    ("predict a tensor", 0),  # one batch is all it takes
    ("summary", 0),
]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name, after", FAILING)
def test_a_look_that_fails_changes_nothing(name, after, error, data):
    learn = in_mid_training(network(), data)
    hook = fail_at(learn, after, error)
    before = all_state(learn)
    with pytest.raises(type(error)) as caught:
        LOOKS[name](learn)
    assert caught.value is error
    del before["hooks"]["6._forward_pre_hooks"]  # the test's own
    hook.remove()
    after_all = all_state(learn)
    del after_all["hooks"]["6._forward_pre_hooks"]
    assert before == after_all


@pytest.mark.parametrize(
    "name", [name for name in LOOKS if "NaN" not in name]
)  # it spoils the data
def test_training_goes_on_after_a_look_as_if_there_had_been_none(name, data, capsys):
    looked, alone = (in_mid_training(network_of(1), copy.deepcopy(data)) for _ in range(2))
    LOOKS[name](looked)
    torch.manual_seed(7)
    looked.fit(1)
    torch.manual_seed(7)
    alone.fit(1)
    assert plain(looked.model.state_dict()) == plain(alone.model.state_dict())


def network_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


@pytest.mark.parametrize(
    "name, moment",
    [
        *product(["find_lr", "trace"], ["before_batch", "after_batch", "after_epoch"]),
        # between forward and backward nothing may be trained, but something may be looked up
        *product(["validate", "predict a loader"], ["before_batch", "after_loss", "after_epoch"]),
    ],
)
def test_a_look_within_a_fit_does_not_bend_it(name, moment, data):
    class Looking(Callback):
        """Look once, in the second batch of a training pass or at an epoch's end."""

    def look(self, learn):
        if learn.batch_index == 1 and not vars(self).setdefault("done", False):
            self.done = True
            before = all_state(learn)
            LOOKS[name](learn)
            assert_untouched(before, learn)

    setattr(Looking, moment, look)
    learners = []
    for callbacks in ([Looking()], []):
        learn = Learner(network_of(1), copy.deepcopy(data), callbacks=callbacks, device="cpu")
        torch.manual_seed(7)
        learn.fit(2, callbacks=[Progress("off")])
        learners.append(learn)
    looked, alone = learners
    assert looked.callbacks[0].done
    assert plain(looked.model.state_dict()) == plain(alone.model.state_dict())
    assert looked.record["train/loss"].tolist() == alone.record["train/loss"].tolist()


@pytest.mark.parametrize("name", ["find_lr", "find_lr meets NaN", "trace", "validate"])
def test_a_buffer_that_the_model_replaces_is_put_back(name, data):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), RunningMean(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    learn = Learner(model, data, callbacks=[Progress("off")], device="cpu")
    learn.fit(1)
    before = all_state(learn)
    LOOKS[name](learn)
    before["loaders"] = all_state(learn)["loaders"]
    assert_untouched(before, learn)


@pytest.mark.parametrize("name", ["find_lr", "trace", "validate", "predict a loader"])
def test_a_callback_that_changes_things_is_itself_unchanged_by_a_look(name, data):
    learn = in_mid_training(network(), data, (Jitter, partial(Progress, "off")))
    before = all_state(learn)
    LOOKS[name](learn)
    assert_untouched(before, learn)


@pytest.mark.parametrize("name", ["find_lr", "trace", "validate", "predict a loader"])
def test_adams_state_is_put_back(name, data):
    learn = in_mid_training(network(), data, opt_func=partial(AdamW, amsgrad=True))
    before = all_state(learn)
    LOOKS[name](learn)
    assert_untouched(before, learn)


@pytest.mark.parametrize("name", ["find_lr", "trace", "validate", "predict a loader"])
def test_the_generator_of_a_torch_loader_is_put_back(name):
    x = torch.randn(40, 6)
    items = TensorDataset(x, x[:, :3].argmax(1))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(items, 8, shuffle=True, generator=generator)
    learn = Learner(
        network(), (loader, loader), F.cross_entropy, callbacks=[Progress("off")], device="cpu"
    )
    learn.fit(1)
    before = plain(generator.get_state())
    LOOKS[name](learn)
    assert plain(generator.get_state()) == before


def test_validating_on_another_loader_leaves_its_order_alone(data):
    learn = in_mid_training(network(), data)
    x = torch.randn(20, 6)
    other = Loader(ArrayDataset(x, x[:, :3].argmax(1)), 8, shuffle=True)
    learn.validate(other)
    learn.predict(other)
    assert other.epoch == 0


def test_the_looks_of_this_file_are_all_there_are(data):
    # whoever adds a look to the learner adds it to LOOKS as well
    no_looks = {"fit", "fit_one_cycle", "reset_optimizer", "load", "save", "untouched", "one_pass",
                "forward", "compute_loss", "backward", "take_step", "zero_grad", "fire",
                "around"}  # fmt: skip
    public = {name for name in vars(Learner) if name[0] != "_" and callable(getattr(Learner, name))}
    assert public - no_looks == {
        "find_lr", "validate", "predict", "trace", "plan", "show_loop", "summary",
    }  # fmt: skip


def test_untouched_undoes_a_whole_fit_and_an_error(data):
    learn = in_mid_training(network(), data, (partial(Progress, "off"),))
    before = all_state(learn)
    with suppress(ZeroDivisionError), learn.untouched():
        learn.fit(1, lr=0.5)
        learn.model[0].weight.requires_grad_(True)
        learn.surprise = 1 / 0
    before["callbacks"] = all_state(learn)["callbacks"]  # real ones acted: no promise about them
    assert_untouched(before, learn)
