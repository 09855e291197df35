"""The callbacks that ship: schedules at work, stopping, keeping the best, looking, progress."""

import copy
import io
import math
import re
import sys
import types
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.optim import SGD, AdamW

from pellucid import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from pellucid.callbacks import (
    EMA,
    SWA,
    Accumulate,
    Best,
    Clip,
    Debug,
    EarlyStopping,
    GradientCheckpointing,
    ImageSize,
    LabelSmoothing,
    Lookahead,
    MaxTime,
    MixUp,
    NonFinite,
    OneCycle,
    Precision,
    Progress,
    Schedule,
    TakeTurns,
    Unfreeze,
)
from pellucid.callbacks import progress as progress_module
from pellucid.errors import CallbackError, SetupError, UnknownName
from pellucid.events import CANCEL_MOMENTS, MOMENTS
from pellucid.metrics import accuracy
from pellucid.schedules import combine, constant, linear

X, Y = torch.linspace(-1, 1, 12).reshape(6, 2), tensor([0, 1, 1, 0, 1, 0])


def small(n_train=4, n_valid=2, callbacks=(), **settings):
    """A learner with so many batches of six items, and nothing shown."""
    data = [(X, Y)] * n_train, [(X, Y)] * n_valid or None
    settings = {"loss_func": F.cross_entropy, "lr": 0.1, "device": "cpu"} | settings
    return Learner(nn.Linear(2, 2), data, callbacks=[Progress("off"), *callbacks], **settings)


class Seen(Callback):
    """Note a hyper-parameter at each training step."""

    order = 500

    def __init__(self, name="lr"):
        self.name, self.values = name, []

    def after_backward(self, learn):
        self.values.append([group[self.name] for group in learn.opt.param_groups])


# ── schedules ───────────────────────────────────────────────────────────────────────────────────


def test_a_schedule_sees_the_fraction_of_the_run():
    learn, seen = small(4), Seen()
    learn.fit(1, callbacks=[Schedule("lr", linear(1, 0.2)), seen])
    assert [lr for [lr] in seen.values] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert learn.record["lr"] == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize(("epochs", "batches"), [(1, 12), (2, 6), (4, 3), (12, 1)])
def test_epochs_and_batches_cannot_bend_a_schedule(epochs, batches):
    learn = small(batches)
    learn.fit(epochs, callbacks=[Schedule("lr", linear(0, 12))])
    assert learn.record["lr"] == pytest.approx(range(12))


def test_a_schedule_is_undone_after_the_fit_and_recorded_by_batch_and_epoch():
    learn = small(4, opt_func=partial(SGD, momentum=0.9, weight_decay=0.5))
    parts = [Schedule("lr", linear(1, 0)), Schedule("momentum", linear(0.5, 0.7)),
             Schedule("weight_decay", linear(0, 0.4))]  # fmt: skip
    record = learn.fit(1, callbacks=parts)
    [group] = learn.opt.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.5)
    assert record["lr"] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert record["momentum"] == pytest.approx([0.5, 0.55, 0.6, 0.65])
    assert record["weight_decay"] == pytest.approx([0, 0.1, 0.2, 0.3])
    # an epoch's row shows what its last batch had
    last = [record.epochs.last(name) for name in ("lr", "momentum", "weight_decay")]
    assert last == pytest.approx([0.25, 0.65, 0.3])
    # the next fit goes without, and its record says so
    learn.fit(1)
    assert record["lr"][4:].tolist() == [0.1] * 4
    assert all(map(math.isnan, record["momentum"][4:]))


@pytest.mark.parametrize("stop", [CancelFit, RuntimeError, KeyboardInterrupt])
def test_a_schedule_is_undone_however_the_fit_ends(stop):
    class Stop(Callback):
        def after_step(self, learn):
            raise stop

    learn = small()
    schedules = [Schedule("lr", linear(1, 0)), Schedule("momentum", linear(0.5, 0.7)), Stop()]
    if stop is CancelFit:
        learn.fit(1, callbacks=schedules)
    else:
        with pytest.raises(stop):
            learn.fit(1, callbacks=schedules)
    assert learn.opt.param_groups[0]["lr"] == 0.1
    assert learn.opt.param_groups[0]["betas"] == (0.9, 0.999)


def test_momentum_is_the_first_of_adams_betas():
    learn, seen = small(2, opt_func=AdamW), Seen("betas")
    learn.fit(1, callbacks=[Schedule("momentum", linear(0.8, 0.9)), seen])
    assert [betas for [betas] in seen.values] == [(0.8, 0.999), (pytest.approx(0.85), 0.999)]


def two_groups(params, lr):
    weight, bias = params
    return SGD([{"params": [weight]}, {"params": [bias], "lr": lr / 10}], lr=lr)


def test_every_parameter_group_may_have_its_schedule():
    learn, seen = small(2, opt_func=two_groups), Seen()
    learn.fit(1, callbacks=[Schedule("lr", [linear(1, 0), constant(3.0)]), seen])
    assert seen.values == [[1.0, 3.0], [0.5, 3.0]]
    assert learn.record["lr/0"].tolist() == [1, 0.5]
    assert learn.record["lr/1"].tolist() == [3, 3]
    learn.fit(1, callbacks=[Schedule("lr", constant(2.0))])
    assert learn.record["lr/1"][2:].tolist() == [2, 2]
    assert [group["lr"] for group in learn.opt.param_groups] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("n", [0, 1, 3])
def test_another_number_of_schedules_than_of_groups_is_an_error(n):
    learn = small(opt_func=two_groups)
    with pytest.raises(SetupError, match=f"{n} schedules, 2 groups"):
        learn.fit(1, callbacks=[Schedule("lr", [constant(1.0)] * n)])
    assert len(learn.record.batches) == 0
    learn.fit(1)


def test_a_schedule_of_something_unknown_is_an_error_before_anything_is_trained():
    learn = small()
    with pytest.raises(UnknownName, match="did you mean 'weight_decay'"):
        learn.fit(1, callbacks=[Schedule("weigth_decay", constant(0.0))])
    assert len(learn.record.batches) == 0
    learn.fit(1)


def test_validation_does_not_move_a_schedule():
    class Watch(Callback):
        def before_batch(self, learn):
            if not learn.training:
                values.append(learn.opt.param_groups[0]["lr"])

    values = []
    small(2, 2).fit(1, callbacks=[Schedule("lr", linear(1, 0)), Watch()])
    assert values == [0.5, 0.5]


def test_one_cycle_has_592_values_with_the_maximum_at_148():
    n = 8 * 74
    learn = small(74, 0, opt_func=partial(SGD, momentum=0.9))
    learn.fit(8, callbacks=[OneCycle(0.1)])
    lrs, momenta = learn.record["lr"], learn.record["momentum"]
    assert len(lrs) == n and lrs.argmax() == 148 and lrs.max() == pytest.approx(0.1)
    low, end = 0.1 / 25, 0.1 / 1e5
    assert lrs[0] == pytest.approx(low)
    assert lrs[74] == pytest.approx((low + 0.1) / 2)
    position = (n - 1 - 148) / (n - 148)
    assert lrs[-1] == pytest.approx(end + (0.1 - end) * (1 + math.cos(math.pi * position)) / 2)
    assert lrs[-1] < 1e-5
    # momentum mirrored
    assert momenta.argmin() == 148 and momenta.min() == pytest.approx(0.85)
    assert momenta[0] == pytest.approx(0.95) and momenta[-1] == pytest.approx(0.95, abs=1e-5)
    assert (learn.opt.param_groups[0]["lr"], learn.opt.param_groups[0]["momentum"]) == (0.1, 0.9)


def test_one_cycle_leaves_an_optimiser_without_momentum_without():
    learn = small(4, opt_func=SGD)
    learn.fit(1, callbacks=[OneCycle(1.0)])
    assert "momentum" not in learn.record.batches
    assert learn.opt.param_groups[0]["momentum"] == 0


def test_one_cycle_takes_a_rate_for_each_group():
    learn = small(4, opt_func=two_groups)
    learn.fit(1, callbacks=[OneCycle([1.0, 0.1], warmup=0.5)])
    assert learn.record["lr/0"].max() == pytest.approx(1.0)
    assert learn.record["lr/1"] == pytest.approx(learn.record["lr/0"] / 10)


def test_a_schedule_over_data_without_a_length_is_an_error():
    class Stream:
        def __iter__(self):
            return iter([(X, Y)] * 3)

    learn = Learner(nn.Linear(2, 2), (Stream(), None), F.cross_entropy, device="cpu",
                    callbacks=[Progress("off")])  # fmt: skip
    with pytest.raises(SetupError, match="must know how many batches there are"):
        learn.fit(1, callbacks=[OneCycle(0.1)])
    learn.fit(1)
    assert len(learn.record.epochs) == 1


# ── rivals ──────────────────────────────────────────────────────────────────────────────────────


RIVALS = {
    "the schedule of lr": [OneCycle(0.1), Schedule("lr", constant(0.1))],
    "which weights the fit ends with": [EMA(), SWA()],
    "the precision": [Precision("bf16"), Precision("fp32")],
    "how many batches a step takes": [Accumulate(2), Accumulate(3)],
    "what becomes of NaN": [NonFinite("skip"), NonFinite("log")],
}


@pytest.mark.parametrize("what", RIVALS)
def test_two_of_which_one_would_have_no_effect_are_refused(what):
    one, other = RIVALS[what]
    learn = small(callbacks=[one])
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(CallbackError, match=f"Two callbacks decide {what}") as caught:
        learn.fit(1, callbacks=[other])
    assert repr(one) in str(caught.value) and repr(other) in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    small(callbacks=[one]).fit(1)
    small(opt_func=partial(SGD, momentum=0.9)).fit(
        1, callbacks=[Schedule("lr", constant(0.1)), Schedule("momentum", constant(0.9))]
    )


@pytest.mark.parametrize("first", [True, False])
def test_two_schedules_of_momentum_are_refused(first):
    given = [OneCycle(0.1), Schedule("momentum", constant(0.5))]
    learn = small(opt_func=partial(SGD, momentum=0.9))
    with pytest.raises(CallbackError, match="Two callbacks decide the schedule of momentum"):
        learn.fit(1, callbacks=given if first else given[::-1])
    assert learn.step == 0
    assert [group["momentum"] for group in learn.opt.param_groups] == [0.9]


def test_a_callback_may_come_after_all_others_in_a_moment(capsys):
    class Early(Callback):
        order = -5
        comes_last = ("after_batch", "around_epoch")

        def before_batch(self, learn):
            came.append(f"{type(self).__name__} before_batch")

        def after_batch(self, learn):
            came.append(f"{type(self).__name__} after_batch")

        @contextmanager
        def around_epoch(self, learn):
            came.append(f"{type(self).__name__} in")
            yield
            came.append(f"{type(self).__name__} out")

    class Late(Early):
        order = 400
        comes_last = ()

    came: list[str] = []
    learn = small(1, 1, callbacks=[Early(), Late()])
    learn.data.valid = None
    learn.fit(1)
    batch = ["Early before_batch", "Late before_batch", "Late after_batch", "Early after_batch"]
    assert came == ["Late in", "Early in", *batch, "Early out", "Late out"]
    learn.show_loop()
    shown = capsys.readouterr().out
    assert re.search(r"before_batch +← Early, Late\n", shown)
    assert re.search(r"after_batch +← .*Late, Early\n", shown)


@pytest.mark.parametrize("given", [None, 0.5, "after_loss", ["after_loss"], ("after_losss",)])
def test_to_come_last_in_what_is_no_moment_is_refused(given):
    class Wrong(Debug):
        comes_last = given

    with pytest.raises(CallbackError, match=r"Wrong\.comes_last must be a tuple of moments"):
        small().fit(1, callbacks=[Wrong("after_loss", print)])


# ── what makes no sense is refused when a callback is made ──────────────────────────────────────


SLIPS = [
    (lambda: MixUp("0.4"), "takes an alpha above 0"),
    (lambda: LabelSmoothing("0.1"), "a share from 0 to 1"),
    (lambda: SWA("a"), "a share of the epochs"),
    (lambda: Clip("1"), "a positive limit"),
    (lambda: MaxTime("600"), "a number of seconds"),
    (lambda: ImageSize(constant(1), multiple="4"), "a multiple of 1 or more"),
    (lambda: Unfreeze(True), "a number of epochs"),
    (lambda: Accumulate(2.0), "a number of batches"),
    (lambda: EMA(True), "a decay in"),
    (lambda: Lookahead(pull="half"), "a pull in"),
    (lambda: GradientCheckpointing([]), "names of modules, one or more"),
    (lambda: TakeTurns(["critic", "generator"]), "each of 1 step or more"),
    (lambda: TakeTurns({"critic": 5.0, "generator": 1}), "each of 1 step or more"),
    (lambda: Schedule("lr", [0.1]), "must be a function of the position"),
    (lambda: Schedule("lr", "cosine"), "must be a function of the position"),
    (lambda: OneCycle("0.1"), "must be a finite number"),
    (lambda: OneCycle(0.1, momentum=0.9), "highest and lowest value"),
    (lambda: combine([0.5, 0.5], [128, 512]), "a function of the position"),
]


@pytest.mark.parametrize(("make", "told"), SLIPS)
def test_another_kind_of_setting_is_refused(make, told):
    with pytest.raises(SetupError, match=told):
        make()


def test_numbers_of_numpy_are_numbers():
    two, half = np.int64(2), np.float32(0.5)
    EarlyStopping(patience=two, min_delta=half)
    EarlyStopping(patience=math.inf)
    ImageSize(constant(1), multiple=two)
    TakeTurns({"critic": two, "generator": two})
    OneCycle(0.1, momentum=np.array([0.95, 0.85]))
    for callback in (Accumulate(two), EMA(half, every=two), Lookahead(two, half), MixUp(half)):
        small(callbacks=[callback, NonFinite("log")]).fit(1)


class Watched(Learner):
    """Puts columns of its own into the table of the epochs."""

    def one_pass(self, kind, loader):
        return super().one_pass(kind, loader) | {"valid2/loss": 1.0, "value": 1.0}


@pytest.mark.parametrize("name", ["valid2/loss", "value"])
def test_a_column_of_a_learners_own_may_be_monitored(name):
    learn = Watched(nn.Linear(2, 2), ([(X, Y)], [(X, Y)]), F.cross_entropy)
    learn.fit(1, callbacks=[Best(name), EarlyStopping(name), Progress("off")])
    assert len(learn.record.epochs) == 1


# ── stopping, and keeping the best ──────────────────────────────────────────────────────────────


def scripted(values, *callbacks, metric=None):
    """Fit so many epochs; their validation losses are what was written down before."""

    def loss(preds, targets):
        return F.cross_entropy(preds, targets) if learn.training else tensor(values[learn.epoch])

    def accuracy(preds, targets):
        return tensor(metric[learn.epoch])

    learn = small(3, 1, loss_func=loss, metrics=[accuracy] if metric else ())
    learn.fit(len(values), callbacks=callbacks)
    return learn


@pytest.mark.parametrize(
    ("losses", "patience", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.2, 1.0], 2, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.0, 0.0], 2, 6),
        ([3.0, 3.0, 1.0], 1, 2),
        ([3.0, 2.0, 1.0], 1, 3),
        ([1.0, 1.0, 1.0, 1.0], 3, 4),
        ([math.nan, math.nan, 1.0], 2, 2),
        ([math.nan, 1.0, math.nan, 1.0, 0.0], 3, 5),
    ],
)
def test_a_fit_stops_when_patience_is_at_its_end(losses, patience, epochs):
    learn = scripted(losses, EarlyStopping(patience=patience))
    assert len(learn.record.epochs) == epochs


def test_what_is_not_much_better_does_not_count():
    losses = [1.0, 0.95, 0.92, 0.91, 0.5]
    assert len(scripted(losses, EarlyStopping(patience=2)).record.epochs) == 5
    assert len(scripted(losses, EarlyStopping(patience=2, min_delta=0.1)).record.epochs) == 3


def test_an_accuracy_shall_rise():
    stop = EarlyStopping("valid/accuracy", patience=2)
    learn = scripted([1.0] * 5, stop, metric=[0.5, 0.6, 0.6, 0.4, 0.9])
    assert learn.record["valid/accuracy"] == pytest.approx([0.5, 0.6, 0.6, 0.4])


def test_a_second_fit_counts_anew():
    stop = EarlyStopping(patience=2)
    learn = scripted([1.0, 2.0, 2.0], stop)
    assert len(learn.record.epochs) == 3
    learn.fit(3, callbacks=[stop])  # the same scripted losses again
    assert len(learn.record.epochs) == 6


@pytest.mark.parametrize("kind", [EarlyStopping, Best])
def test_a_number_that_the_fit_will_not_have_is_refused_before_it_begins(kind):
    learn = small(metrics=[accuracy])
    slips = {
        "valid/acuracy": "did you mean 'valid/accuracy'",
        "loss": "valid/loss",
        "val_loss": "did you mean 'valid/loss'",
        "valid_accuracy": "did you mean 'valid/accuracy'",
        "validation/accuracy": "did you mean 'valid/accuracy'",
        3: "choose one of",
    }
    for slip, meant in slips.items():
        with pytest.raises(UnknownName, match=meant):
            learn.fit(1, callbacks=[kind(slip)])
    learn.data.valid, valid = None, learn.data.valid
    with pytest.raises(UnknownName, match="train/accuracy"):
        learn.fit(1, callbacks=[kind("valid/accuracy")])
    assert learn.step == 0
    learn.data.valid = valid
    for name in ("valid/accuracy", "valid/loss", "train/loss", "lr", "seconds"):
        learn.fit(1, callbacks=[kind(name)])


@pytest.mark.parametrize(
    "settings",
    [
        {"patience": 0},
        {"patience": True},
        {"patience": "3"},
        {"min_delta": -0.1},
        {"min_delta": "0"},
    ],
)
def test_a_patience_or_a_difference_that_makes_no_sense_is_refused(settings):
    with pytest.raises(SetupError):
        EarlyStopping(**settings)


class Weights(Callback):
    """Keep a copy of the model's state after every epoch."""

    def __init__(self):
        self.states = []

    def after_epoch(self, learn):
        self.states.append({k: v.clone() for k, v in learn.model.state_dict().items()})


def has_state(model, state):
    return all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([math.nan, 2.0, 2.0], 1)],
)
def test_a_fit_ends_with_the_weights_of_its_best_epoch(losses, best):
    weights, keep = Weights(), Best()
    learn = scripted(losses, weights, keep)
    assert has_state(learn.model, weights.states[best])
    assert keep.row == best
    assert not has_state(learn.model, weights.states[best - 1])


def test_the_best_is_kept_by_any_column():
    weights = Weights()
    learn = scripted([3.0, 2.0, 1.0], weights, Best("valid/accuracy"), metric=[0.1, 0.9, 0.5])
    assert has_state(learn.model, weights.states[1])


def test_where_no_epoch_has_a_number_the_last_weights_stay():
    weights, keep = Weights(), Best()
    learn = scripted([math.nan, math.nan], weights, keep)
    assert keep.row is None and has_state(learn.model, weights.states[1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CancelFit])
def test_the_best_weights_come_back_after_an_error_too(error):
    class Fail(Callback):
        def after_step(self, learn):
            if learn.epoch == 2:
                raise error

    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    weights, keep = Weights(), Best()
    learn = Learner(model, ([(X, Y)] * 3, [(X, Y)]), F.cross_entropy, device="cpu", lr=0.1,
                    callbacks=[Progress("off")])  # fmt: skip
    try:
        learn.fit(4, callbacks=[weights, keep, Fail()])
    except error:
        assert error is not CancelFit
    assert len(weights.states) == 2
    assert has_state(learn.model, weights.states[keep.row])
    learn.fit(1)


def test_stopping_early_and_keeping_the_best_go_together():
    weights = Weights()
    losses = [3.0, 1.0, 2.0, 2.0, 0.0]
    learn = scripted(losses, weights, Best(), EarlyStopping(patience=2))
    assert len(learn.record.epochs) == 4 and has_state(learn.model, weights.states[1])


# ── looking around ──────────────────────────────────────────────────────────────────────────────

ONCE = {"fit": 1, "epoch": 2, "train": 2, "validate": 2, "batch": 12, "predict": 12, "loss": 12,
        "backward": 8, "step": 8}  # fmt: skip


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name not in CANCEL_MOMENTS])
def test_a_function_is_called_at_its_moment(moment):
    seen = []
    learn = small(4, 2)
    learn.fit(2, callbacks=[Debug(moment, seen.append)])
    assert seen == [learn] * ONCE[moment.split("_")[1]]


@pytest.mark.parametrize(
    ("moment", "raised", "times"),
    [
        ("after_cancel_batch", CancelBatch, 12),
        ("after_cancel_epoch", CancelEpoch, 4),
        ("after_cancel_fit", CancelFit, 1),
    ],
)
def test_a_function_is_called_after_a_cancel(moment, raised, times):
    def leave(learn):
        raise raised

    seen = []
    learn = small(4, 2)
    learn.fit(2, callbacks=[Debug("after_loss", leave), Debug(moment, seen.append)])
    assert seen == [learn] * times


def test_the_debugger_is_started_where_the_learner_is_at_hand(monkeypatch):
    def hook():
        seen.append(sys._getframe(1).f_locals["learn"])

    seen = []
    monkeypatch.setattr(sys, "breakpointhook", hook)
    learn = small(1, 0)
    learn.fit(1, callbacks=[Debug("after_loss")])
    assert seen == [learn]


def test_a_function_may_return_what_it_likes():
    small(1, 0).fit(1, callbacks=[Debug("after_loss", lambda learn: "ignored")])


def test_a_moment_nobody_knows_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'after_loss'"):
        Debug("after_los")
    with pytest.raises(UnknownName):
        Debug("around_fit", print)


# ── progress ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def announce_again():
    progress_module._announce.cache_clear()
    yield
    progress_module._announce.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told: `clock.tick(seconds)`."""

    class Clock:
        now = 100.0

        def tick(self, seconds):
            self.now += seconds

    clock = Clock()
    for module in ("pellucid.callbacks.progress", "pellucid.tally", "pellucid.learner"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: clock.now)
    return clock


class Tick(Callback):
    """Let every batch take so many seconds."""

    order = -1

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def before_batch(self, learn):
        self.clock.tick(self.seconds)


def shown(show, epochs=2, n_valid=2, callbacks=(), **settings):
    data = [(X, Y)] * 4, [(X, Y)] * n_valid or None
    settings = {"metrics": [accuracy]} | settings
    learn = Learner(nn.Linear(2, 2), data, F.cross_entropy, device="cpu", **settings)
    learn.fit(epochs, callbacks=[Progress(show), *callbacks] if show else callbacks)
    return learn


def masked(text):
    return re.sub(r"\d+\.\d+", lambda number: re.sub(r"\d", "#", number[0]), text)


TABLE = """\
  epoch  train loss  valid loss  train accuracy  valid accuracy  seconds
      1      #.####      #.####          #.####          #.####     #.##
      2      #.####      #.####          #.####          #.####     #.##
"""


def test_lines_are_a_table_that_a_file_can_hold(capsys):
    learn = shown("lines")
    captured = capsys.readouterr()
    assert masked(captured.out) == "training on cpu (as asked)\n" + TABLE
    assert captured.err == ""
    assert f"{learn.record['valid/loss'][1]:.4f}" in captured.out.splitlines()[-1]


def test_without_validation_there_are_no_columns_of_it(capsys):
    shown("lines", epochs=1, n_valid=0)
    head, row = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["epoch", "train", "loss", "train", "accuracy", "seconds"]
    assert len(row.split()) == 4


def test_epochs_are_counted_over_all_fits(capsys):
    learn = shown("lines", epochs=2)
    learn.fit(1, callbacks=[Progress("lines")])
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "3"


def test_a_long_epoch_says_once_a_minute_where_it_is(capsys, clock):
    shown("lines", epochs=1, callbacks=[Tick(clock, 25)])
    lines = masked(capsys.readouterr().out).splitlines()[2:]
    assert lines == [
        "  epoch 1 of 1, training  loss #.####  accuracy #.####, batch 3 of 4",
        "  epoch 1 of 1, validating  loss #.####  accuracy #.####, batch 2 of 2",
        "      1      #.####      #.####          #.####          #.####   ###.##",
    ]


def test_the_default_is_lines_where_there_is_no_terminal(capsys):
    shown(None)
    assert masked(capsys.readouterr().out) == "training on cpu (as asked)\n" + TABLE


def test_off_shows_nothing(capsys):
    shown("off")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_what_was_finished_is_shown_also_when_the_fit_fails(capsys):
    def fail(learn):
        if learn.epoch == 1:
            raise ValueError("spoilt")

    with pytest.raises(ValueError, match="spoilt"):
        shown("lines", callbacks=[Debug("after_loss", fail)])
    assert masked(capsys.readouterr().out).splitlines()[1:] == TABLE.splitlines()[:2]


def test_a_way_to_show_that_nobody_knows_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'lines'"):
        Progress("line")


class Terminal(io.StringIO):
    """What looks like a terminal to whoever asks."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def plain(text):
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("show", ["live", None])
def test_on_a_terminal_rows_stay_and_one_line_moves(terminal, clock, show):
    with redirect_stdout(terminal):
        shown(show, callbacks=[Tick(clock, 0.2)])
    text = masked(plain(terminal.getvalue()))
    for row in TABLE.splitlines():
        assert text.count(row) == 1
    assert "epoch 1 of 2, training  loss #.####  accuracy #.####" in text
    assert "3/4" in text and "epoch 2 of 2, validating" in text
    # the cursor is hidden while the line moves, and shown again
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_cursor_comes_back_after_an_error(terminal, error):
    def fail(learn):
        raise error

    with pytest.raises(error), redirect_stdout(terminal):
        shown("live", callbacks=[Debug("after_loss", fail)])
    text = terminal.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stdout(terminal):
        shown(None)
    assert masked(terminal.getvalue()) == "training on cpu (as asked)\n" + TABLE


@pytest.mark.parametrize(("seconds", "n_batches"), [(0.01, 100), (0.033, 60), (0.5, 8)])
def test_there_are_at_most_ten_updates_a_second(monkeypatch, clock, seconds, n_batches):
    class View:
        def __init__(self, heads):
            pass

        def rows(self, rows):
            pass

        def running(self, done, total, text):
            updates.append(clock.now)

        def close(self):
            pass

    updates = []
    monkeypatch.setattr(progress_module, "_Terminal", View)
    small(n_batches, 5).fit(3, callbacks=[Progress("live"), Tick(clock, seconds)])
    gaps = [b - a for a, b in pairwise(updates)]
    assert min(gaps) >= 0.1 - 1e-9
    # and it is not asleep either
    assert max(gaps) <= 0.2 + seconds


@pytest.fixture
def notebook(monkeypatch):
    """A fake IPython: `pages` is what the one display showed, from first to last."""
    pages = []

    class Handle:
        def update(self, html):
            pages.append(html.data)

    def display(html, display_id):
        assert display_id is True
        pages.append(html.data)
        return Handle()

    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    ipython, displaying = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell
    displaying.HTML, displaying.display = lambda data: types.SimpleNamespace(data=data), display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displaying)
    return pages


def cells(page):
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in page.split("<tr>")[1:]]


@pytest.mark.parametrize("show", ["notebook", None])
def test_in_a_notebook_one_table_is_replaced_in_place(notebook, clock, capsys, show):
    learn = shown(show, callbacks=[Tick(clock, 0.2)])
    assert cells(notebook[0]) == [
        ["epoch", "train loss", "valid loss", "train accuracy", "valid accuracy", "seconds"]
    ]
    assert any('<progress value="3" max="4">' in page for page in notebook)
    assert any("epoch 2 of 2, validating" in page for page in notebook)
    assert "<progress" not in notebook[-1]
    rows = cells(notebook[-1])[1:]
    assert [row[0] for row in rows] == ["1", "2"]
    assert [row[2] for row in rows] == [f"{loss:.4f}" for loss in learn.record["valid/loss"]]
    assert capsys.readouterr().out == "training on cpu (as asked)\n"


def test_a_notebook_is_not_flooded(notebook, clock):
    small(200, 0).fit(1, callbacks=[Progress("notebook"), Tick(clock, 0.01)])
    assert len(notebook) <= 200 * 0.01 * 10 + 4


def test_a_metric_without_a_proper_name_is_still_seen_in_a_notebook(notebook):
    shown("notebook", metrics=[lambda preds, targets: 0.0])
    assert "train &lt;lambda&gt;" in cells(notebook[0])[0]


def test_in_a_shell_that_is_no_notebook_lines_are_shown(notebook, capsys):
    sys.modules["IPython"].get_ipython = lambda: None
    shown(None)
    assert not notebook and masked(capsys.readouterr().out).endswith(TABLE)


def test_only_one_table_is_shown(capsys):
    shown(None, callbacks=[Progress("lines")])
    assert capsys.readouterr().out.count("epoch") == 1
