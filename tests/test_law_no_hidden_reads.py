"""Law 5, the device decides when to talk: nothing is read back inside the step.

On the CPU a reading waits for nothing, but it can be counted.
"""

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid import Callback, DataLoaders, Learner, tally
from pellucid.callbacks import (
    EMA,
    Accumulate,
    Best,
    Clip,
    EarlyStopping,
    Lookahead,
    MixUp,
    NonFinite,
    OneCycle,
    Precision,
    Progress,
    Telemetry,
    non_finite,
)
from pellucid.metrics import MacroF1, accuracy

N_TRAIN, N_VALID = 6, 3

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
"""Operations that make the host wait for a GPU; `item`, `float`, `bool` and `int` are the first."""

COPYING = {"tolist", "cpu", "__array__"}
"""Methods that do so without an operation of their own, on the CPU at least. `numpy` is none of
them: it copies nothing, it is a view of the host's own memory, and raises for a GPU's."""


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class CountCopies(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in COPYING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def readings(action: Any, *args: Any, **kwargs: Any) -> Counter[str]:
    """Return how often the device would have been waited for during an action, by the way."""
    with CountOperations() as operations, CountCopies() as copies:
        action(*args, **kwargs)
    return operations.counts + copies.counts


class Clock:
    """A clock that stands still, unless a batch moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tally, "perf_counter", clock)
    return clock


@pytest.fixture
def never_time_to_read(monkeypatch):
    monkeypatch.setattr(tally, "READ_INTERVAL", float("inf"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(8 * n, 6)
    return list(zip(x.split(8), x[:, :3].argmax(1).split(8), strict=True))


def learner(opt_func: Any = AdamW, **settings: Any) -> Learner:
    data = DataLoaders(batches(N_TRAIN), batches(N_VALID), classes=3)
    return Learner(network(), data, opt_func=opt_func, device="cpu", **settings)


def bare_loop(model: nn.Module, opt: torch.optim.Optimizer, data: DataLoaders) -> None:
    model.train()
    for x, y in data.train:
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    with torch.no_grad():
        for x, y in data.valid:
            F.cross_entropy(model(x), y)


class Asks(Callback):
    """Read the loss in every batch, as one should not."""

    def after_loss(self, learn):
        learn.loss.item()


def per_pass(counts: Counter[str]) -> dict[str, int]:
    """Leave out the one reading at the end of each pass."""
    assert counts["tolist"] >= 2
    return dict(counts - Counter(tolist=2))


@pytest.mark.parametrize("show", ["lines", "off", "live"])
@pytest.mark.parametrize("opt_func", [partial(SGD, momentum=0.9), AdamW, RMSprop])
def test_between_readings_nothing_is_read_but_by_the_bare_loop(
    show, opt_func, never_time_to_read, capsys
):
    callbacks = [OneCycle(0.01), Progress(show), Best(), EarlyStopping()]
    learn = learner(opt_func, metrics=[accuracy], callbacks=callbacks)
    learn.reset_optimizer()
    opt = copy.deepcopy(learn.opt)
    bare = readings(bare_loop, network(), opt, learn.data)
    assert per_pass(readings(learn.fit, 1)) == bare


@pytest.mark.parametrize("host", [True, False])
def test_the_default_optimiser_reads_nothing_at_all(host, never_time_to_read, quiet, monkeypatch):
    monkeypatch.setattr(non_finite, "_is_host", lambda device: host)  # False is a GPU's way
    learn = learner(callbacks=[quiet])
    assert per_pass(readings(learn.fit, 1)) == {}


def test_a_metric_object_is_asked_once_a_pass(never_time_to_read, quiet):
    learn = learner(metrics=[MacroF1(3)], callbacks=[quiet])
    assert per_pass(readings(learn.fit, 1)) == {"_local_scalar_dense": 2}


def test_a_callback_that_reads_every_batch_is_seen(never_time_to_read, quiet):
    # so that the tests above can fail
    learn = learner(callbacks=[Asks(), quiet])
    assert per_pass(readings(learn.fit, 1)) == {"_local_scalar_dense": N_TRAIN + N_VALID}


@pytest.mark.parametrize(
    "read", ["item", "tolist", "cpu", "__float__", "__bool__", "__int__", "nonzero"]
)
def test_every_way_of_reading_is_counted(read):
    assert readings(getattr(torch.ones(()), read)).total() == 1


class Ticks(Callback):
    """Let time go by, the same in every batch."""

    order = -100
    shows_progress = True

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds = clock, seconds
        self.n_readings: list[int] = []

    def before_batch(self, learn):
        self.clock.now += self.seconds

    def after_batch(self, learn):
        self.n_readings.append(learn.tally.n_readings)


def test_numbers_are_read_at_the_stated_interval_and_at_the_end_of_a_pass(clock, monkeypatch):
    monkeypatch.setattr(tally, "READ_INTERVAL", 1.0)
    # 0.375, 0.75, 1.125 (read, next at 2.125), 1.5, 1.875, 2.25 (read); then 0.375, 0.75, 1.125
    ticks = Ticks(clock, 0.375)
    learn = learner(callbacks=[ticks], metrics=[accuracy])
    counts = readings(learn.fit, 1)
    assert ticks.n_readings == [0, 0, 1, 1, 1, 2, 0, 0, 1]
    assert counts == Counter(tolist=2 + 1)  # what a reading finds nothing for, costs nothing


def test_a_reading_takes_all_numbers_in_one_transfer(clock):
    ticks = Ticks(clock, 0.0)
    learn = learner(callbacks=[ticks], metrics=[accuracy])
    assert readings(learn.fit, 3) == Counter(tolist=2 * 3)
    assert len(learn.record["train/accuracy"]) == 3 * N_TRAIN


def test_the_interval_is_a_tenth_of_a_second():
    assert tally.READ_INTERVAL == 0.1


def test_a_slow_loop_reads_every_batch(clock, quiet):
    ticks = Ticks(clock, 1.0)
    readings(learner(callbacks=[ticks]).fit, 1)
    assert ticks.n_readings == [1, 2, 3, 4, 5, 6, 1, 2, 3]


class Strict(Callback):
    """Let CUDA refuse to wait, from the third batch on: before, what is laid out once."""

    order = -2000  # around all others
    changes = True

    def around_batch(self, learn):
        strict = learn.training and learn.batch_index > 1
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def on_gpu(*callbacks: Callback) -> Learner:
    data = DataLoaders.from_arrays((torch.randn(400, 6), torch.randint(3, (400,))), batch_size=10)
    everything = [Strict(), *callbacks, Progress("off")]
    return Learner(network(), data.to("cuda"), metrics=[accuracy], callbacks=everything)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "names",
    ["", "Telemetry", "EMA", "Lookahead", "MixUp", "Clip", "Accumulate", "NonFinite",
     "Precision bf16", "Precision fp16", "Telemetry EMA MixUp Clip Accumulate NonFinite fp16"],
)  # fmt: skip
def test_on_a_gpu_no_batch_waits(names, never_time_to_read):
    of_names = {
        "Telemetry": Telemetry(every=1), "EMA": EMA(0.9), "Lookahead": Lookahead(2),
        "MixUp": MixUp(0.4), "Clip": Clip(norm=1.0), "Accumulate": Accumulate(2),
        "NonFinite": NonFinite("skip"), "bf16": Precision("bf16"), "fp16": Precision("fp16"),
    }  # fmt: skip
    on_gpu(*(of_names[name] for name in names.split() if name in of_names)).fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_batch_that_waits_is_refused():
    with pytest.raises(RuntimeError, match="synchronizing"):
        on_gpu(Asks()).fit(1)
