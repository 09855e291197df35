"""Law 4, what is opened is closed: errors, cancels and Ctrl-C leave nothing behind."""

import signal
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

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
)
from pellucid.callbacks import OneCycle, Schedule
from pellucid.errors import CallbackError, PellucidError
from pellucid.events import MOMENTS, SPANS, Cancel
from pellucid.schedules import linear

PACKAGE = Path(pellucid.__file__).parent

FAULTS = [RuntimeError, KeyboardInterrupt, CancelFit, CancelEpoch, CancelBatch, CancelStep]


# ── a learner that can fail anywhere ──────────────────────────────────────────────────────────


class Trap:
    """Raises once, at the `n`-th passage of the place where it was laid."""

    def __init__(self, place: str, fault: BaseException, n: int = 2):
        self.place, self.fault, self.left = place, fault, n

    def passing(self, place: str) -> None:
        if place == self.place and self.left:
            self.left -= 1
            if not self.left:
                raise self.fault

    def __deepcopy__(self, memo: Any) -> "Trap":
        return self


class Model(nn.Module):
    def __init__(self, trap: Trap):
        super().__init__()
        self.layer, self.norm, self.trap = nn.Linear(6, 3), nn.BatchNorm1d(3), trap

    def forward(self, x):
        self.trap.passing("model")
        return self.norm(self.layer(x))


class TrappedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, trap):
        ctx.trap = trap
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.trap.passing("backward")
        return gradient, None


class TrappedSGD(SGD):
    def __init__(self, params, lr, trap):
        super().__init__(params, lr, momentum=0.9)
        self.trap = trap

    def step(self, closure=None):
        self.trap.passing("optimizer")
        return super().step(closure)


class TrappedLoader:
    def __init__(self, batches, trap):
        self.batches, self.trap = batches, trap

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.trap.passing("loader")
            yield batch


def acting(name: str, trap: Trap, log: list[str], order: int = 0) -> Callback:
    """Make a callback that hears everything, logs its spans and moments, and may be trapped."""

    def moment_method(moment):
        def method(self, learn):
            log.append(f"{name} {moment}")
            if name == "b":
                trap.passing(moment)

        return method

    def span_method(span):
        @contextmanager
        def method(self, learn):
            if name == "b":
                trap.passing(f"entering {span}")
            log.append(f"+{name} {span}")
            # what leaves something in the process or on the model if it is not closed
            hook = learn.model.register_forward_hook(lambda *_: None)
            with torch.autocast("cpu", enabled=span == "around_forward"):
                try:
                    yield
                finally:
                    hook.remove()
                    log.append(f"-{name} {span}")
            if name == "b":
                trap.passing(f"leaving {span}")

        return method

    methods = {moment: moment_method(moment) for moment in MOMENTS}
    methods |= {span: span_method(span) for span in SPANS}
    methods |= {"order": order, "shows_progress": True, "__repr__": lambda self: f"Acting({name})"}
    return type("Acting", (Callback,), methods)()


def trapped_learner(trap: Trap, log: list[str], callbacks: tuple[Callback, ...] = ()) -> Learner:
    x = torch.randn(32, 6)
    batches = list(zip(x.split(8), x[:, :3].argmax(1).split(8), strict=True))

    def loss_func(preds, y):
        trap.passing("loss")
        return TrappedGradient.apply(F.cross_entropy(preds, y), trap)

    def metric(preds, y):
        trap.passing("metric")
        return preds.mean()

    def transform(x):
        trap.passing("transform")
        return x

    loaders = [TrappedLoader(part, trap) for part in (batches[:3], batches[3:])]
    learn = Learner(
        Model(trap),
        DataLoaders(*loaders, transforms=[transform]),
        loss_func,
        partial(TrappedSGD, trap=trap),
        lr=0.1,
        metrics=[metric],
        callbacks=[
            acting("a", trap, log, -1),
            acting("b", trap, log),
            *callbacks,
        ],
        device="cpu",
    )
    learn.reset_optimizer()
    return learn


PLACES = [
    *MOMENTS,
    *(f"{way} {span}" for span in SPANS for way in ("entering", "leaving")),
    "model", "loss", "backward", "optimizer", "loader", "metric", "transform",
]  # fmt: skip

ONCE = {"before_fit", "after_fit", "entering around_fit", "leaving around_fit"}

CANCELLED = {"after_cancel_batch": CancelBatch, "after_cancel_epoch": CancelEpoch,
             "after_cancel_fit": CancelFit}  # fmt: skip


class Cancelling(Callback):
    """Cancel in the second batch, so that a trap in after_cancel_... is reached."""

    changes = True

    def __init__(self, kind: type[Exception]):
        self.kind = kind

    def before_batch(self, learn):
        if learn.batch_index == 1:
            raise self.kind


def fit_into(
    place: str, fault: BaseException, callbacks: tuple[Callback, ...] = ()
) -> tuple[Learner, list[str], BaseException | None]:
    """Fit with a trap, which is sprung, and return what came of it."""
    trap = Trap(place, fault, 1 if place in {*ONCE, "after_cancel_fit"} else 2)
    log: list[str] = []
    learn = trapped_learner(trap, log, callbacks)
    extra = [Cancelling(CANCELLED[place])] if place in CANCELLED else []
    try:
        learn.fit(2, callbacks=extra)
    except BaseException as error:
        assert not trap.left
        return learn, log, error
    assert not trap.left
    return learn, log, None


# ── nothing is left ───────────────────────────────────────────────────────────────────────────


def assert_nothing_is_left(learn: Learner) -> None:
    for module in learn.model.modules():
        assert not any(value for key, value in vars(module).items() if "hooks" in key)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert learn.x is learn.y is learn.preds is learn.loss is None
    assert not any(learn.handlers.values())
    assert not any(learn.spans.values())
    assert not learn.training
    assert not any(module.training for module in learn.model.modules())


def assert_spans_unwound(log: list[str]) -> None:
    open_spans = []
    for entry in log:
        if entry[0] == "+":
            open_spans.append(entry[1:])
        if entry[0] == "-":
            assert open_spans.pop() == entry[1:]
    assert not open_spans


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_raised_wherever_leaves_nothing_behind(place, fault):
    raised = fault()
    learn, log, caught = fit_into(place, raised)
    assert_spans_unwound(log)
    assert_nothing_is_left(learn)
    assert all(param.grad is None for param in learn.model.parameters())
    # a fit that could not be entered has no end; any other has one, whatever happened
    assert log.count("a after_fit") == (place != "entering around_fit")
    if issubclass(fault, Cancel):  # either it steers, or it is told to be out of place
        assert caught is None or isinstance(caught, CallbackError)
    else:
        assert caught is raised


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_the_learner_can_be_used_again(place, fault):
    learn, log, _ = fit_into(place, fault())
    n_batches, n_epochs = len(learn.record.batches), len(learn.record.epochs)
    log.clear()
    before = learn.model.layer.weight.clone()
    learn.fit(1)
    assert not torch.equal(before, learn.model.layer.weight)
    assert len(learn.record.batches) == n_batches + 3
    assert len(learn.record.epochs) == n_epochs + 1
    assert log.count("a after_batch") == 4
    assert_spans_unwound(log)
    assert_nothing_is_left(learn)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, CancelFit, CancelEpoch])
@pytest.mark.parametrize("place", PLACES)
def test_schedules_put_hyper_parameters_back(place, fault):
    schedules = (Schedule("lr", linear(0.5, 0.2)), Schedule("momentum", linear(0.5, 0.6)))
    learn, _, _ = fit_into(place, fault(), schedules)
    [group] = learn.opt.param_groups
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)


@pytest.mark.parametrize("place", ["model", "after_step", "after_fit", "leaving around_fit"])
def test_one_cycle_puts_hyper_parameters_back(place):
    learn, _, error = fit_into(place, RuntimeError(), (OneCycle(0.5),))
    [group] = learn.opt.param_groups
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    assert error is not None


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, CancelFit])
def test_gradients_that_were_being_gathered_are_dropped_too(fault):
    class Gather(Callback):
        changes = True

        def after_backward(self, learn):
            raise CancelStep

    learn, _, _ = fit_into("model", fault("in the second batch"), (Gather(),))
    assert all(param.grad is None for param in learn.model.parameters())


def test_a_real_ctrl_c_leaves_nothing_behind():
    class Impatient(Callback):
        def after_loss(self, learn):
            if learn.batch_index == 1:
                signal.raise_signal(signal.SIGINT)

    log: list[str] = []
    learn = trapped_learner(Trap("nowhere", RuntimeError()), log, (Impatient(),))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    assert log.count("a after_fit") == 1
    assert_spans_unwound(log)
    assert_nothing_is_left(learn)
    assert learn.record["batch"].tolist() == [0]


def test_what_was_not_read_yet_still_goes_on_record():
    learn, _, _ = fit_into("before_batch", RuntimeError())
    assert len(learn.record["train/loss"]) == 1


def test_the_spans_of_all_callbacks_nest():
    log: list[str] = []
    trapped_learner(Trap("nowhere", RuntimeError()), log).fit(1)
    spans = [entry for entry in log if "around_batch" in entry or "around_forward" in entry]
    assert spans[:8] == [
        "+a around_batch", "+b around_batch", "+a around_forward", "+b around_forward",
        "-b around_forward", "-a around_forward", "-b around_batch", "-a around_batch",
    ]  # fmt: skip


# ── the error stays what it is, and says where ────────────────────────────────────────────────

USERS = [place for place in PLACES if place not in CANCELLED]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_the_error_is_the_same_object_with_its_traceback(place, fault):
    raised = fault("the original")
    _, _, caught = fit_into(place, raised)
    assert caught is raised
    assert caught.__cause__ is None
    assert traceback.extract_tb(caught.__traceback__)[-1].name == "passing"


WHERE = {
    # place: part, epoch, batch
    "model": ("training", 0, 1), "loss": ("training", 0, 1), "backward": ("training", 0, 1),
    "optimizer": ("training", 0, 1), "loader": ("training", 0, 0), "metric": ("training", 0, 1),
    "transform": ("training", 0, 1), "before_batch": ("training", 0, 1),
    "after_predict": ("training", 0, 1), "after_loss": ("training", 0, 1),
    "after_backward": ("training", 0, 1), "after_step": ("training", 0, 1),
    "after_batch": ("training", 0, 1), "entering around_batch": ("training", 0, 1),
    "leaving around_batch": ("training", 0, 1), "entering around_forward": ("training", 0, 1),
    "leaving around_forward": ("training", 0, 1), "before_train": ("training", 1, None),
    "after_train": ("training", 1, None), "before_validate": ("validation", 1, None),
    "after_validate": ("validation", 1, None), "before_epoch": (None, 1, None),
    "after_epoch": (None, 1, None),
}  # fmt: skip


@pytest.mark.parametrize("place", WHERE)
def test_the_note_says_in_which_part_epoch_and_batch(place):
    _, _, error = fit_into(place, RuntimeError("broken"))
    note = "\n".join(error.__notes__)
    part, epoch, batch = WHERE[place]
    assert part is None or f"in {part}" in note
    assert f"epoch {epoch} of 2" in note
    assert batch is None or f"batch {batch} of 3" in note


@pytest.mark.parametrize("place", [*MOMENTS, *(f"entering {span}" for span in SPANS),
                                   *(f"leaving {span}" for span in SPANS)])  # fmt: skip
def test_the_note_names_moment_and_callback(place):
    _, _, error = fit_into(place, RuntimeError("broken"))
    note = "\n".join(error.__notes__)
    assert place.split()[-1] in note
    assert "Acting(b)" in note


def test_the_note_of_a_second_fit_does_not_speak_of_the_first():
    class Failing(Callback):
        def before_fit(self, learn):
            raise RuntimeError("at the very start")

    learn = trapped_learner(Trap("nowhere", RuntimeError()), [])
    learn.fit(2)
    with pytest.raises(RuntimeError) as caught:
        learn.fit(1, callbacks=[Failing()])
    note = "\n".join(caught.value.__notes__)
    assert "epoch 1 of 1" not in note  # there is none: they are counted from 0
    assert "in validation" not in note


def test_the_shapes_seen_are_told():
    _, _, error = fit_into("loss", RuntimeError("broken"))  # within the test's own autocast
    assert "x float32 8×6, y int64 8, preds bfloat16 8×3" in "\n".join(error.__notes__)


@pytest.mark.parametrize("kind", [CancelEpoch, CancelBatch, CancelStep])
def test_a_stray_cancel_names_moment_and_callback(kind):
    _, _, error = fit_into("after_epoch", kind())
    assert isinstance(error, CallbackError)
    for word in (kind.__name__, "after_epoch", "Acting(b)"):
        assert word in str(error)


# ── at most three frames of ours stand between the user's fit and the user's fault ────────────


def our_frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.name for frame in frames if PACKAGE in Path(frame.filename).parents]


@pytest.mark.parametrize("place", USERS)
def test_a_traceback_has_at_most_three_frames_of_ours(place):
    _, _, error = fit_into(place, RuntimeError("broken"))
    assert len(our_frames(error)) <= 3, our_frames(error)


class BrokenItems:
    """Images that cannot be read, as a user would write them."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        raise OSError(f"item {i} cannot be read")


class BrokenBatches(BrokenItems):
    def batches(self, order, size):
        raise OSError("the batches cannot be read")
        yield


@pytest.mark.parametrize("items", [BrokenItems, BrokenBatches])
def test_a_users_data_set_in_our_loader_has_at_most_three_frames_of_ours(items, quiet):
    learn = Learner(nn.Linear(6, 3), (Loader(items(), 8), None), F.cross_entropy, device="cpu")
    with pytest.raises(OSError, match="cannot be read") as caught:
        learn.fit(1, callbacks=[quiet])
    assert len(our_frames(caught.value)) <= 3, our_frames(caught.value)


def test_the_frames_counted_are_real():
    # if the package moved, the tests above would count nothing
    _, _, error = fit_into("model", RuntimeError("broken"))
    assert our_frames(error)[:2] == ["fit", "one_pass"]


# ── looks unwind too ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("look", ["validate", "find_lr", "trace"])
@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, CancelFit])
def test_a_look_that_fails_leaves_nothing_behind(look, fault):
    looks: dict[str, Callable[[Learner], Any]] = {
        "validate": lambda learn: learn.validate(learn.data.train),
        "find_lr": lambda learn: learn.find_lr(steps=6),
        "trace": lambda learn: learn.trace(3),
    }
    trap, log = Trap("model", fault()), []
    learn = trapped_learner(trap, log)
    with suppress(PellucidError, RuntimeError, KeyboardInterrupt):
        looks[look](learn)
    assert not trap.left
    assert_spans_unwound(log)
    learn.model.eval()  # a look puts the mode back that it found
    assert_nothing_is_left(learn)
    assert all(param.grad is None for param in learn.model.parameters())
