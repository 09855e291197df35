"""Law 3 and the timetable: the moments come as `events.TIMETABLE` says, and no slip is silent."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pellucid import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    DataLoaders,
    Learner,
    PellucidError,
)
from pellucid.callbacks import Progress
from pellucid.errors import CallbackError
from pellucid.events import MOMENTS, SPANS, TIMETABLE

N_TRAIN, N_VALID = 3, 2

# ── what the timetable says ───────────────────────────────────────────────────────────────────


def as_tree(text: str) -> list[tuple[str, list[Any]]]:
    """Read indented lines as nested (line, lines below it)."""
    root: list[Any] = []
    levels = [(-1, root)]
    for line in text.strip("\n").splitlines():
        depth = len(line) - len(line.lstrip())
        while levels[-1][0] >= depth:
            levels.pop()
        below: list[Any] = []
        levels[-1][1].append((line.strip(), below))
        levels.append((depth, below))
    return root


def played(lines: list[Any], epochs: int, n: int, m: int | None) -> list[str]:
    """Return what happens, line for line: moments, the loop's acts, and spans as +span, -span."""
    events: list[str] = []
    for line, below in lines:
        inside = played(below, epochs, n, m)
        if "validat" in line and m is None:
            continue
        if line.startswith("for each"):
            times = {"epoch": epochs, "training": n, "validation": m}
            [count] = [count for word, count in times.items() if f"each {word}" in line]
            events += inside * count
        elif below:
            events += [f"+{line}", *inside, f"-{line}"]
        elif act := re.search(r"(\w+)\(", line):
            events.append(act[1])
        else:
            events.append(line)
    return events


def timetable(epochs: int, n: int = N_TRAIN, m: int | None = N_VALID) -> list[str]:
    return played(as_tree(TIMETABLE), epochs, n, m)


# ── what is seen ──────────────────────────────────────────────────────────────────────────────


class Recorder(Callback):
    """Hear everything and write it down; raise `fault` at the n-th coming of a moment."""

    order = -10

    def __init__(self, moment: str = "", fault: type[Exception] = Exception, n: int = 1):
        self.seen: list[str] = []
        self.moment, self.fault, self.left = moment, fault, n

    def note(self, event: str) -> None:
        self.seen.append(event)
        if event == self.moment:
            self.left -= 1
            if self.left == 0:
                raise self.fault


def hearing(moment: str) -> Callable[[Recorder, Learner], None]:
    def method(self, learn):
        self.note(moment)

    return method


def spanning(span: str) -> Callable[[Recorder, Learner], Any]:
    @contextmanager
    def method(self, learn):
        self.note(f"+{span}")
        try:
            yield
        finally:
            self.note(f"-{span}")

    return method


for _name in MOMENTS:
    setattr(Recorder, _name, hearing(_name))
for _name in SPANS:
    setattr(Recorder, _name, spanning(_name))


class Loud(Learner):
    """Tell the recorder of the loop's own acts."""

    recorder: Recorder

    def forward(self):
        self.recorder.seen.append("forward")
        return super().forward()

    def compute_loss(self):
        self.recorder.seen.append("compute_loss")
        return super().compute_loss()

    def backward(self):
        self.recorder.seen.append("backward")
        super().backward()

    def take_step(self):
        self.recorder.seen.append("take_step")
        super().take_step()

    def zero_grad(self):
        if "-around_fit" not in self.recorder.seen:  # what is tidied up later is no part of the fit
            self.recorder.seen.append("zero_grad")
        super().zero_grad()


def loud_learner(recorder: Recorder, m: int | None = N_VALID, kind: type[Learner] = Loud) -> Any:
    x = torch.randn(40, 6)
    batches = list(zip(x.split(8), x[:, :3].argmax(1).split(8), strict=True))
    data = DataLoaders(batches[:N_TRAIN], None if m is None else batches[N_TRAIN : N_TRAIN + m])
    learn = kind(
        nn.Linear(6, 3), data, F.cross_entropy, partial(SGD, momentum=0.9), device="cpu",
        callbacks=[recorder, Progress("off")],
    )  # fmt: skip
    learn.recorder = recorder
    return learn


@pytest.mark.parametrize("m", [N_VALID, 1, None])
@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
def test_a_fit_runs_as_the_timetable_says(epochs, m):
    recorder = Recorder()
    loud_learner(recorder, m).fit(epochs)
    assert recorder.seen == timetable(epochs, m=m)


def test_the_reading_of_the_timetable_is_itself_right():
    assert timetable(0) == ["+around_fit", "before_fit", "after_fit", "-around_fit"]
    assert timetable(1, n=1, m=None) == [
        "+around_fit", "before_fit",
        "+around_epoch", "before_epoch", "before_train",
        "+around_batch", "before_batch",
        "+around_forward", "forward", "after_predict", "compute_loss", "after_loss",
        "-around_forward",
        "backward", "after_backward", "take_step", "after_step", "zero_grad",
        "-around_batch", "after_batch",
        "after_train", "after_epoch", "-around_epoch",
        "after_fit", "-around_fit",
    ]  # fmt: skip


def test_validating_alone_runs_the_validation_part_of_the_timetable(quiet):
    class Changing(Recorder):
        changes = True  # else a look leaves it out

        def __deepcopy__(self, memo):  # a look may let copies act
            return self

    recorder = Changing()
    learn = loud_learner(recorder)
    learn.validate()
    whole = timetable(1)
    assert recorder.seen == whole[whole.index("before_validate") : whole.index("after_epoch")]


# ── cancels ───────────────────────────────────────────────────────────────────────────────────

IN_BATCH = ["before_batch", "after_predict", "after_loss"]
IN_STEP = ["after_backward", "after_step"]
ANYWHERE = ["before_epoch", "before_train", *IN_BATCH, *IN_STEP, "after_batch",
            "after_train", "before_validate", "after_validate", "after_epoch"]  # fmt: skip


def without_zeroing(events: list[str]) -> list[str]:
    return [event for event in events if event != "zero_grad"]


def nth(events: list[str], event: str, n: int) -> int:
    return [i for i, e in enumerate(events) if e == event][n - 1]


def cut(moment: str, n: int, level: str) -> tuple[list[str], list[str]]:
    """Play two epochs up to the n-th `moment`, then leave all spans opened inside `level`.

    Returns:
        What was played, and what the timetable would have gone on with; both without zero_grad,
        since dropping gradients once too often does no harm.
    """
    events = without_zeroing(timetable(2))
    end = nth(events, moment, n) + 1
    done, rest = events[:end], events[end:]
    opened = []
    for event in done:
        if event[0] == "+":
            opened.append(event[1:])
        if event[0] == "-":
            opened.pop()
    inner = ["around_forward", "around_batch", "around_epoch"]
    inner = inner[: inner.index(level) + 1] if level else []
    return [*done, *(f"-{span}" for span in reversed(opened) if span in inner)], rest


def seen_with(moment: str, fault: type[Exception], n: int) -> tuple[list[str], Learner]:
    recorder = Recorder(moment, fault, n)
    learn = loud_learner(recorder)
    learn.fit(2)
    return recorder.seen, learn


# in the validation pass the moments of a batch come after those of 3 training batches
CASES_IN_BATCH = [
    *((moment, n) for moment in IN_BATCH for n in (1, 2, 3, 4, 5)),
    *((moment, n) for moment in IN_STEP for n in (1, 3)),
]


@pytest.mark.parametrize("moment, n", CASES_IN_BATCH)
def test_cancel_batch_leaves_the_batch(moment, n):
    seen, _ = seen_with(moment, CancelBatch, n)
    done, rest = cut(moment, n, "around_batch")
    assert without_zeroing(seen) == [
        *done,
        "after_cancel_batch",
        *rest[rest.index("after_batch") :],
    ]


@pytest.mark.parametrize("moment, n", [*CASES_IN_BATCH, ("after_batch", 2), ("after_batch", 4)])
def test_cancel_epoch_leaves_the_pass(moment, n):
    seen, _ = seen_with(moment, CancelEpoch, n)
    done, rest = cut(moment, n, "around_batch")
    end = "after_train" if n <= N_TRAIN else "after_validate"
    assert without_zeroing(seen) == [*done, "after_cancel_epoch", *rest[rest.index(end) :]]


@pytest.mark.parametrize("part", ["train", "validate"])
def test_cancel_epoch_before_the_first_batch_leaves_the_whole_pass(part):
    seen, _ = seen_with(f"before_{part}", CancelEpoch, 1)
    done, rest = cut(f"before_{part}", 1, "around_batch")
    assert without_zeroing(seen) == [
        *done,
        "after_cancel_epoch",
        *rest[rest.index(f"after_{part}") :],
    ]


@pytest.mark.parametrize(
    "moment, n", [("before_fit", 1), *((moment, n) for moment in ANYWHERE for n in (1, 2))]
)
def test_cancel_fit_leaves_the_fit(moment, n):
    seen, _ = seen_with(moment, CancelFit, n)
    done, _ = cut(moment, n, "around_epoch")
    assert without_zeroing(seen) == [*done, "after_cancel_fit", "after_fit", "-around_fit"]


@pytest.mark.parametrize("moment, n", [(moment, n) for moment in IN_STEP for n in (1, 2, 6)])
def test_cancel_step_skips_the_rest_of_the_step(moment, n):
    seen, _ = seen_with(moment, CancelStep, n)
    done, rest = cut(moment, n, "")
    assert without_zeroing(seen) == [*done, *rest[rest.index("-around_batch") :]]
    assert seen.count("zero_grad") == 2 * N_TRAIN - 1


def test_a_cancel_within_a_cancel_moment_leaves_more():
    class Both(Recorder):
        def after_cancel_batch(self, learn):
            self.note("after_cancel_batch")
            raise CancelEpoch

        def after_cancel_epoch(self, learn):
            self.note("after_cancel_epoch")
            raise CancelFit

    recorder = Both("before_batch", CancelBatch)
    loud_learner(recorder).fit(1)
    assert without_zeroing(recorder.seen) == [
        "+around_fit", "before_fit", "+around_epoch", "before_epoch", "before_train",
        "+around_batch", "before_batch", "-around_batch", "after_cancel_batch",
        "after_cancel_epoch", "-around_epoch", "after_cancel_fit", "after_fit", "-around_fit",
    ]  # fmt: skip


STRAY = [
    *((moment, CancelStep) for moment in MOMENTS if moment not in IN_STEP),
    *((m, CancelBatch) for m in MOMENTS if m not in [*IN_BATCH, *IN_STEP]),
    *((m, CancelEpoch) for m in ["before_fit", "before_epoch", "after_train", "after_validate",
                                 "after_epoch", "after_fit"]),
    ("after_fit", CancelFit),
]  # fmt: skip


@pytest.mark.parametrize("moment, kind", STRAY)
def test_a_stray_cancel_is_an_error(moment, kind):
    first = {"after_cancel_batch": CancelBatch, "after_cancel_epoch": CancelEpoch,
             "after_cancel_fit": CancelFit}.get(moment)  # fmt: skip

    class Cancels(Callback):
        def before_batch(self, learn):
            if first:
                raise first

    class Strays(Callback):
        """Raise the wrong thing."""

    setattr(Strays, moment, raising(kind))
    learn = loud_learner(Recorder())
    with pytest.raises(CallbackError, match=f"{kind.__name__} was raised where") as caught:
        learn.fit(1, callbacks=[Cancels(), Strays()])
    assert moment in str(caught.value)
    assert "Strays" in str(caught.value)


def raising(kind: type[Exception]) -> Callable[[Callback, Learner], None]:
    def method(self, learn):
        raise kind

    return method


@pytest.mark.parametrize("moment", IN_STEP)
def test_cancel_step_keeps_the_gradients(moment):
    class Keep(Callback):
        gradients: tuple[torch.Tensor, ...] = ()

        def after_batch(self, learn):
            if learn.training and learn.batch_index == 0:
                self.gradients = tuple(p.grad.clone() for p in learn.model.parameters())

        def after_backward(self, learn):
            if learn.batch_index == 1 and learn.epoch == 0:
                own = torch.autograd.grad(
                    F.cross_entropy(learn.model(learn.x), learn.y), list(learn.model.parameters())
                )
                sums = [a + b for a, b in zip(self.gradients, own, strict=True)]
                for param, expected in zip(learn.model.parameters(), sums, strict=True):
                    torch.testing.assert_close(param.grad, expected)
                self.compared = True

    keep = Keep()
    learn = loud_learner(Recorder(moment, CancelStep, 1))
    learn.fit(1, callbacks=[keep])
    assert keep.compared
    assert len(learn.record.batches) == N_TRAIN  # the batch counts


@pytest.mark.parametrize("moment, n", [case for case in CASES_IN_BATCH if case[1] <= N_TRAIN])
def test_cancel_batch_leaves_no_gradient_and_no_row(moment, n):
    class Check(Callback):
        checked = False

        def after_cancel_batch(self, learn):
            self.checked = True
            assert all(param.grad is None for param in learn.model.parameters())

    check = Check()
    learn = loud_learner(Recorder(moment, CancelBatch, n))
    learn.fit(1, callbacks=[check])
    assert check.checked
    assert learn.record["batch"].tolist() == [i for i in range(N_TRAIN) if i != n - 1]


def test_a_cancelled_batch_weighs_nothing_in_the_averages():
    learn = loud_learner(Recorder("after_loss", CancelBatch, 2))
    learn.fit(1)
    losses = learn.record.batches["train/loss"]
    assert learn.record.epochs["train/loss"][0] == pytest.approx(losses.mean())


def test_steps_that_were_not_taken_are_not_counted():
    learn = loud_learner(Recorder("after_backward", CancelStep, 1))
    learn.fit(2)
    assert learn.step == 2 * N_TRAIN - 1


# ── who acts when ─────────────────────────────────────────────────────────────────────────────


def named(name: str, log: list[str], order: int = 0, **methods: Any) -> Callback:
    methods = methods or {"before_fit": lambda self, learn: log.append(name)}
    return type(name, (Callback,), {"order": order, **methods})()


def test_callbacks_act_in_ascending_order_then_as_given():
    log: list[str] = []
    learn = loud_learner(Recorder())
    learn.callbacks += [named("b", log), named("late", log, 5), named("a", log)]
    learn.fit(0, callbacks=[named("early", log, -5), named("c", log), named("later", log, 6)])
    assert log == ["early", "b", "a", "c", "late", "later"]


def test_spans_nest_in_the_same_order():
    log: list[str] = []

    def span(name):
        @contextmanager
        def around_fit(self, learn):
            log.append(f"+{name}")
            yield
            log.append(f"-{name}")

        return around_fit

    learn = loud_learner(Recorder())
    orders = {"late": 5, "a": 0, "b": 0}
    callbacks = [named(n, log, order, around_fit=span(n)) for n, order in orders.items()]
    learn.fit(0, callbacks=callbacks)
    assert log == ["+a", "+b", "+late", "-late", "-b", "-a"]


def test_handlers_are_bound_once_a_fit():
    log: list[str] = []

    class Adds(Callback):
        def before_epoch(self, learn):
            learn.callbacks.append(named("added", log))
            self.after_epoch = lambda learn: log.append("replaced")

        def after_epoch(self, learn):
            log.append("bound")

    learn = loud_learner(Recorder())
    learn.fit(1, callbacks=[Adds()])
    assert log == ["bound"]
    learn.fit(0)
    assert log == ["bound", "added"]


def test_the_callbacks_of_a_fit_serve_that_fit_alone():
    log: list[str] = []
    learn = loud_learner(Recorder())
    callbacks = list(learn.callbacks)
    learn.fit(0, callbacks=[named("guest", log)])
    learn.fit(0)
    assert log == ["guest"]
    assert learn.callbacks == callbacks
    assert not any([*learn.handlers.values(), *learn.spans.values()])


def test_a_fit_within_a_fit_is_refused():
    learn = loud_learner(Recorder())
    inner = named("inner", [], before_epoch=lambda self, learn: learn.fit(1) and None)
    with pytest.raises(PellucidError, match="running already"):
        learn.fit(1, callbacks=[inner])
    learn.fit(1)


def test_a_span_may_be_any_context_manager():
    log: list[str] = []

    @contextmanager
    def noted(learn):
        log.append("in")
        yield
        log.append("out")

    class Plain(Callback):
        def around_fit(self, learn):
            return noted(learn)

    class Generator(Callback):
        def around_fit(self, learn):
            with noted(learn):
                yield

    learn = loud_learner(Recorder())
    learn.fit(0, callbacks=[Plain(), Generator()])
    assert log == ["in", "in", "out", "out"]


# ── where in the run ──────────────────────────────────────────────────────────────────────────


class Where(Callback):
    """Note state at every moment of which it makes a difference."""

    def __init__(self):
        self.seen: list[tuple[Any, ...]] = []

    def before_fit(self, learn):
        self.seen.append(("fit", learn.progress))

    def before_batch(self, learn):
        if learn.training:
            self.seen.append((learn.epoch, learn.batch_index, learn.step, learn.progress))

    def before_validate(self, learn):
        self.seen.append(("validate", learn.progress))

    def after_fit(self, learn):
        self.seen.append(("end", learn.progress))


EXPECTED = [
    ("fit", 0), (0, 0, 0, 0), (0, 1, 1, 1 / 6), (0, 2, 2, 2 / 6), ("validate", 3 / 6),
    (1, 0, 3, 3 / 6), (1, 1, 4, 4 / 6), (1, 2, 5, 5 / 6), ("validate", 1), ("end", 1),
]  # fmt: skip


def test_progress_goes_from_0_in_the_first_batch_to_almost_1_in_the_last():
    where = Where()
    loud_learner(Recorder()).fit(2, callbacks=[where])
    assert where.seen == EXPECTED


def test_a_second_fit_begins_from_the_beginning():
    class AtTheStart(Callback):
        def before_fit(self, learn):
            state = (learn.progress, learn.epoch, learn.training, learn.x, learn.loss)
            assert state == (0, 0, False, None, None)

        def before_epoch(self, learn):
            assert learn.progress == learn.epoch / 2

    learn = loud_learner(Recorder())
    for _ in range(2):
        learn.fit(2, callbacks=[AtTheStart()])


def test_progress_counts_whole_epochs_where_the_number_of_batches_is_unknown():
    class Endless:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    where = Where()
    learn = loud_learner(Recorder())
    learn.data.train = Endless(learn.data.train)
    learn.fit(2, callbacks=[where])
    assert [row[-1] for row in where.seen if row[0] == "validate"] == [0.5, 1]
    assert where.seen[1][-1] == 0


def test_a_cancelled_pass_is_a_whole_one_for_progress():
    where = Where()
    learn = loud_learner(Recorder("after_step", CancelEpoch, 1))
    learn.fit(2, callbacks=[where])
    assert ("validate", 0.5) in where.seen
    assert where.seen[-1] == ("end", 1)


def test_batches_are_there_within_a_batch_and_gone_between():
    class Look(Callback):
        def after_batch(self, learn):
            assert None not in (learn.x, learn.y, learn.preds, learn.loss)
            assert learn.training == torch.is_grad_enabled() == learn.model.training

        def after_train(self, learn):
            assert learn.x is learn.y is learn.preds is learn.loss is None

        after_validate = after_epoch = after_train

    loud_learner(Recorder()).fit(1, callbacks=[Look()])


# ── what is refused ───────────────────────────────────────────────────────────────────────────

SLIPS = {
    "after_bacth": "after_batch", "before_bacth": "before_batch", "after_batchs": "after_batch",
    "befor_fit": "before_fit", "before_fitt": "before_fit", "afterfit": "after_fit",
    "after_epochs": "after_epoch", "after_ephoc": "after_epoch", "aftr_epoch": "after_epoch",
    "before_training": "before_train", "before_validation": "before_validate",
    "after_validation": "after_validate", "after_prediction": "after_predict",
    "after_losses": "after_loss", "after_backwards": "after_backward",
    "after_cancel_batches": "after_cancel_batch", "around_epochs": "around_epoch",
    "aroundbatch": "around_batch", "around_forwards": "around_forward", "batch_ends": None,
    "on_epoch_end": None, "on_train_start": None, "epoch_start": None, "on_batch_begin": None,
    "before_everything": None, "around_validate": None, "train_begin": None, "end_epoch": None,
    "after_forward": None, "before_step": None,
}  # fmt: skip

HELPERS = [
    "plot", "reset", "state_dict", "load_state_dict", "summary", "update", "compute", "log", "save",
    "load", "step", "fit", "batch", "backward", "close", "draw", "rows", "curves", "report",
    "running", "announce", "monitor", "better", "best_row", "attach", "detach", "one_line", "once",
]  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_the_pen_is_refused_when_the_class_is_made(slip):
    with pytest.raises(CallbackError, match="looks like a moment") as caught:
        type("Mine", (Callback,), {slip: lambda self, learn: None})
    assert f"Mine.{slip}" in str(caught.value)
    told = re.search(r"did you mean '(\w+)'", str(caught.value))
    assert told and told[1] in (*MOMENTS, *SPANS)
    assert SLIPS[slip] in (None, told[1])


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_of_an_ordinary_name_is_accepted(name):
    methods = {name: lambda self: None, "after_fit": lambda self, learn: None}
    type("Mine", (Callback,), methods)


def test_private_helpers_and_plain_values_are_accepted():
    class Mine(Callback):
        on_start = True

        def _after_bacth(self):
            pass

        def after_fit(self, learn):
            pass

    Mine()


@pytest.mark.parametrize(
    "method",
    [
        lambda: None,
        lambda self: None,
        lambda self, learn, extra: None,
        lambda self, *, learn: None,
        lambda self, learn, *, extra: None,
    ],
)
@pytest.mark.parametrize("name", ["after_batch", "around_batch"])
def test_a_handler_that_cannot_take_the_learner_alone_is_refused(name, method):
    with pytest.raises(CallbackError, match=r"must take the learner and nothing else") as caught:
        type("Mine", (Callback,), {name: method})
    assert f"def {name}(self, learn)" in str(caught.value)


@pytest.mark.parametrize(
    "method", [lambda self, learn: None, lambda self, learn, n=1: None, lambda *args: None]
)
def test_a_handler_that_can_is_accepted(method):
    type("Mine", (Callback,), {"after_batch": method})


@pytest.mark.parametrize("answer", [0, False, "", CancelBatch, ...])
def test_a_handler_that_returns_something_is_an_error(answer):
    learn = loud_learner(Recorder())
    answers = named("Answers", [], after_loss=lambda self, learn: answer)
    with pytest.raises(CallbackError, match=r"Answers.after_loss returned something") as caught:
        learn.fit(1, callbacks=[answers])
    assert repr(answer) in str(caught.value)


def test_a_moment_written_as_a_generator_is_an_error():
    class Yields(Callback):
        def after_loss(self, learn):
            yield

    with pytest.raises(CallbackError, match=r"Yields.after_loss returned something"):
        loud_learner(Recorder()).fit(1, callbacks=[Yields()])


def test_a_span_without_a_yield_is_an_error_of_ours():
    class Pointless(Callback):
        def around_batch(self, learn):
            pass

    with pytest.raises(CallbackError, match="around_batch") as caught:
        loud_learner(Recorder()).fit(1, callbacks=[Pointless()])
    assert "Pointless" in str(caught.value)


class Deaf(Callback):
    """Hear nothing."""

    def report(self):
        pass


@pytest.mark.parametrize(
    "wrong, words",
    [
        (Deaf(), "Deaf hears no moment"),
        (Progress, r"Progress\(\) makes an instance"),
        (print, "must be instances of pellucid.Callback"),
        ("Progress", "must be instances of pellucid.Callback"),
        (None, "must be instances of pellucid.Callback"),
    ],
)
def test_what_is_no_callback_is_refused_at_once(wrong, words, data, model):
    with pytest.raises(CallbackError, match=words):
        Learner(model, data, callbacks=[wrong])
    learn = Learner(model, data)
    with pytest.raises(CallbackError, match=words):
        learn.fit(1, callbacks=[wrong])
    assert len(learn.record.batches) == 0


def test_a_handler_set_on_the_instance_is_heard():
    class Late(Callback):
        def __init__(self, log):
            self.after_fit = lambda learn: log.append("heard")

    log: list[str] = []
    loud_learner(Recorder()).fit(0, callbacks=[Late(log)])
    assert log == ["heard"]
