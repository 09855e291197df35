"""Callbacks together, and fits within fits: what one does must not undo another's work."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, AdamW

from pellucid import Callback, CancelEpoch, CancelFit, DataLoaders, Learner
from pellucid.callbacks import (
    EMA,
    LSUV,
    SWA,
    Accumulate,
    Clip,
    Compile,
    ImageSize,
    Lookahead,
    MixUp,
    NonFinite,
    Precision,
    Progress,
    Schedule,
    TakeTurns,
    non_finite,
)
from pellucid.errors import NonFiniteLoss, UnknownName
from pellucid.gan import GAN, gan_batch, wasserstein
from pellucid.roles import ByRole
from pellucid.schedules import linear
from pellucid.sharding import zero_if_finite

QUIET = Progress("off")


def batches(n: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    return [(draw(4, 3), draw(4, 1)) for _ in range(n)]


def net(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *more, nn.Tanh(), nn.Linear(4, 1))


def learner(*callbacks: Callback, n: int = 4, **settings) -> Learner:
    model = settings.pop("model", None) or net()
    data = settings.pop("data", None) or DataLoaders(batches(n), batches(1, seed=1))
    settings = {"opt_func": SGD, "lr": 0.1, "loss_func": F.mse_loss, **settings}
    return Learner(model, data, callbacks=[QUIET, *callbacks], **settings)


def spoilt(found: list, batch: int) -> list:
    x, y = found[batch]
    return [*found[:batch], (x.index_fill(0, torch.tensor([2]), math.nan), y), *found[batch + 1 :]]


def weights(learn: Learner) -> torch.Tensor:
    return torch.cat([param.detach().flatten().clone() for param in learn.model.parameters()])


class At(Callback):
    """Call a function in a moment of training."""

    changes = True

    def __init__(self, moment: str, act, order: int = 0):
        self.order = order
        setattr(self, moment, lambda learn: act(learn) and None)


# ── what is not finite ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("more", [[], [Precision("fp16")]])
def test_a_fit_within_a_fit_leaves_the_guard_in_its_place(on_host, more, monkeypatch):
    monkeypatch.setattr(non_finite, "_is_host", lambda device: on_host)
    found = []
    for look in ([], [At("before_epoch", lambda learn: learn.find_lr(steps=3))]):
        data = DataLoaders(spoilt(batches(), 1))
        learn = learner(NonFinite("skip"), *look, *copy.deepcopy(more), data=data, opt_func=AdamW)
        learn.fit(2)
        found.append((weights(learn), learn.record.epochs["train/skipped"]))
        assert weights(learn).isfinite().all() and "found_inf" not in vars(learn.opt)
    (without, n_without), (within, n_within) = found
    assert torch.equal(without, within) and (n_without == n_within).all() and min(n_within) == 1


class RootOfZero(nn.Module):
    """Finite forward; its gradient is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.w.sqrt() * (x > 1e9)


def test_a_gradient_of_the_last_step_that_is_not_finite_is_told():
    learn = learner(model=net(RootOfZero()), n=1)
    with pytest.raises(NonFiniteLoss, match=r"last step of epoch 0") as told:
        learn.fit(1)
    assert "'1.w' 1 of 1" in str(told.value) and told.value.batch is None
    learn = learner(NonFinite("skip"), model=net(RootOfZero()), n=1)
    learn.fit(2)
    assert weights(learn).isfinite().all()


def test_in_half_precision_it_is_told_that_no_step_is_taken_any_more():
    learn = learner(Precision("fp16"), model=net(RootOfZero()), n=30)
    before = weights(learn)
    with pytest.raises(NonFiniteLoss, match="no step is taken any more"):
        learn.fit(1)
    assert torch.equal(weights(learn), before)
    learner(Precision("fp16"), NonFinite("log"), model=net(RootOfZero()), n=30).fit(1)
    learner(Precision("fp16"), n=30).fit(2)


@pytest.mark.parametrize("clip", [[], [Clip(norm=1.0)], [Clip(value=1.0)]])
def test_clipping_does_not_hide_which_gradient_was_not_finite(clip):
    def spoil(learn):
        if learn.batch_index == 1:
            learn.model[2].weight.grad[0, 0] = math.nan

    with pytest.raises(NonFiniteLoss, match=r"'2.weight' 1 of 4 values"):
        learner(At("after_backward", spoil), *clip).fit(1)


class Log(nn.Module):
    def forward(self, x):
        return x.log()


@pytest.mark.parametrize(("part", "name"), [("generator", "generator.1"), ("critic", "critic.1")])
def test_in_a_gan_it_is_named_what_was_not_finite(part, name):
    torch.manual_seed(0)
    log = {part: [Log()]}
    generator = nn.Sequential(nn.Linear(2, 3), *log.get("generator", []))
    critic = nn.Sequential(nn.Linear(3, 1), *log.get("critic", []), nn.Flatten(0))
    turns = TakeTurns({"critic": 1, "generator": 1}, batch=gan_batch)
    data = DataLoaders([torch.rand(4, 3) for _ in range(4)])
    learn = learner(turns, model=GAN(generator, critic, 2), data=data, loss_func=wasserstein)
    loss_func = learn.loss_func
    with pytest.raises(NonFiniteLoss) as told:
        learn.fit(1)
    assert f"'{name}' (Log) gives what is not finite" in str(told.value)
    assert learn.loss_func is loss_func


def test_of_a_mixed_batch_the_item_is_named_that_was_bad_itself():
    learn = learner(MixUp(), data=DataLoaders(spoilt(batches(), 1)))
    loss_func = learn.loss_func
    with pytest.raises(NonFiniteLoss, match=r"the inputs are not finite in item 2 of the batch"):
        learn.fit(1)
    assert learn.loss_func is loss_func


def test_batch_norm_is_not_spoilt_by_a_batch_in_which_the_epoch_is_left():
    def leave(learn):
        if not learn.loss.isfinite():
            raise CancelEpoch

    model = net(nn.BatchNorm1d(4))
    data = DataLoaders(spoilt(batches(), 1))
    learn = learner(NonFinite("skip"), At("after_loss", leave, 30), model=model, data=data)
    learn.fit(1)
    assert model[1].running_mean.isfinite().all()


def test_on_the_host_a_skipped_step_does_not_count():
    for opt_func in (SGD, partial(SGD, foreach=True)):
        learn = learner(
            NonFinite("skip"), data=DataLoaders(spoilt(batches(), 1)), opt_func=opt_func
        )
        learn.fit(1)
        assert (learn.step, learn.n_batches_seen) == (3, 4)


def test_gradients_of_all_kinds_can_be_looked_at():
    large = torch.full((4,), 60_000.0, dtype=torch.float16)  # its norm is beyond float16
    sparse = torch.eye(3).to_sparse()
    assert zero_if_finite([large, torch.ones(2)], large.device) == 0
    assert zero_if_finite([sparse, torch.ones(2, dtype=torch.float64)], large.device) == 0
    assert zero_if_finite([sparse, sparse * math.nan], large.device).isnan()
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(4, 1))
    words = [(torch.randint(5, (4, 2)), torch.randn(4, 1)) for _ in range(3)]
    learner(NonFinite("skip"), model=model, data=DataLoaders(words)).fit(1)


# ── averages ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("average", [EMA(0.5), SWA(0.0)])
def test_a_fit_that_a_callback_ends_ends_with_the_average_and_not_with_lookaheads(average):
    trained, validated = [], []

    def end(learn):
        validated.append(weights(learn))
        if learn.epoch == 2:
            raise CancelFit

    note = At("after_train", lambda learn: trained.append(weights(learn)), 54)
    learn = learner(Lookahead(2), average, note, At("after_validate", end, 100))
    learn.fit(5)
    mean = torch.stack(trained).mean(0)
    expected = validated[-1] if isinstance(average, EMA) else mean
    torch.testing.assert_close(weights(learn), expected)


def test_a_fit_that_ends_before_an_average_begins_ends_with_lookaheads_weights():
    def end(learn):
        raise CancelFit

    ends = [At("after_validate", end), At("after_batch", end), At("after_train", end)]
    for at in ends:
        found = []
        for more in ([], [SWA(0.75)]):
            learn = learner(Lookahead(3), at, *more)
            learn.fit(8)
            found.append(weights(learn))
        plain = learner(at)
        plain.fit(8)
        assert torch.equal(*found) and not torch.equal(found[0], weights(plain))


@pytest.mark.parametrize("order", [-50, 0, 12, 18, 500])
@pytest.mark.parametrize("more", [Precision("fp16"), Accumulate(2)])
def test_a_loss_is_weighed_and_scaled_as_the_last_who_assigns_it_leaves_it(more, order):
    def penalise(learn):
        if learn.training:
            squares = sum(param.square().sum() for param in learn.model.parameters())
            learn.loss = learn.loss + squares

    ragged = [(x[:size], y[:size]) for (x, y), size in zip(batches(4), (4, 1, 2, 3), strict=True)]
    found = []
    for at in (order, -100):
        learn = learner(more, At("after_loss", penalise, at), data=DataLoaders(ragged))
        learn.fit(1)
        found.append(weights(learn))
    assert torch.equal(*found)


def test_a_look_in_the_midst_of_half_precision_sees_the_average():
    found = {}

    def look(learn):
        if learn.training and learn.batch_index == 3:
            found[moment] = learn.validate()["loss"]

    for moment in ("before_batch", "after_loss"):
        learner(Precision("bf16"), EMA(0.99), At(moment, look, 200), lr=0.5).fit(1)
    learner(Precision("bf16"), At("after_loss", look, 200), lr=0.5).fit(1)
    averaged, plain = found["before_batch"], found.pop("after_loss")
    assert plain != averaged
    moment = "after_loss"
    learner(Precision("bf16"), EMA(0.99), At(moment, look, 200), lr=0.5).fit(1)
    assert found["after_loss"] == averaged


# ── parts of a batch, of an epoch, of a model ─────────────────────────────────────────────────


def test_a_window_left_in_the_midst_does_not_weigh_in_the_next():
    def leave(learn):
        if learn.epoch == 0 and learn.batch_index == 1:
            raise CancelEpoch

    found: list[list[torch.Tensor]] = []
    keep = At(
        "after_step",
        lambda learn: found.append([p.grad.clone() for p in learn.model.parameters()]),
        90,
    )
    learner(Accumulate(3), At("after_backward", leave), keep, n=3, lr=0.0).fit(2)
    model = net()
    (sum(F.mse_loss(model(x), y) for x, y in batches(3)) / 3).backward()
    for own, param in zip(found[-1], model.parameters(), strict=True):
        torch.testing.assert_close(own, param.grad)


def test_a_learner_that_accumulates_predicts_before_its_first_fit():
    assert learner(Accumulate(2)).predict(torch.randn(5, 3)).shape == (5, 1)


class Stream:
    def __iter__(self):
        return iter([(torch.randn(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(4)])


def test_over_data_without_length_the_position_in_the_run_is_that_of_the_epoch():
    seen = []
    note = At("after_loss", lambda learn: seen.append((learn.progress, learn.x.shape[-1])), 300)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = DataLoaders(Stream(), classes=3)
    Learner(model, data, callbacks=[QUIET, ImageSize(linear(0.5, 1)), note]).fit(2)
    assert seen == [(0, 4)] * 4 + [(0.5, 8)] * 4


@pytest.mark.parametrize("optimizers", [None, {"critic": SGD, "generator": AdamW}])
def test_looks_in_a_generators_turn_leave_it_its_turn(optimizers):
    turns, after = [], []

    def look(learn):
        if learn.training and learn.data.valid:  # not in find_lr's own fit
            learn.validate()
            turns.append(learn.model.turn)
            if learn.batch_index == 1:
                learn.find_lr(steps=2)
            turns.append(learn.model.turn)

    for more in ([], [At("before_batch", look)]):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
        take = TakeTurns({"critic": 1, "generator": 1}, gan_batch, optimizers)
        data = DataLoaders([torch.randn(4, 3) for _ in range(4)], [torch.randn(4, 3)])
        model = GAN(nn.Linear(3, 3), critic, 3)
        learn = learner(take, *more, model=model, data=data, loss_func=wasserstein)
        learn.fit(1)
        after.append(weights(learn))
    assert turns == ["critic"] * 2 + ["generator"] * 2 + ["critic"] * 2 + ["generator"] * 2
    assert torch.equal(*after)


# ── compiled, traced, copied ──────────────────────────────────────────────────────────────────


def test_lsuv_sets_the_layers_before_anything_is_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    learner(LSUV(), Compile(backend="eager")).fit(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # to train, to validate


def test_a_trace_sees_a_step_that_is_compiled_as_a_whole():
    torch._dynamo.reset()
    acts = learner(Compile("step", backend="eager")).trace(1)
    assert [act.event for act in acts if act.by == "loop"][:2] == ["forward", "compute_loss"]


def test_a_copy_of_a_callback_holds_the_models_own_parameters():
    model, same = net(), []

    class Holds(Callback):
        changes = True

        def __init__(self):
            self.params = list(model.parameters())

        def before_batch(self, learn):
            own = learn.model.parameters()
            same.append(all(a is b for a, b in zip(self.params, own, strict=True)))

    learner(Holds(), model=model).find_lr(steps=3)
    assert same and all(same)


# ── parameters of other kinds ─────────────────────────────────────────────────────────────────


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.w).abs().sum(1, keepdim=True)


@pytest.mark.parametrize("opt_func", [SGD, AdamW])
def test_complex_parameters_train_by_default(opt_func):
    learn = learner(model=Turned(), opt_func=opt_func)
    learn.fit(1)
    assert not torch.equal(learn.model.w.detach(), torch.ones(3, dtype=torch.complex64))


def test_half_precision_lays_out_only_weights_that_are_there():
    images = [(torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)) for _ in range(2)]
    conv = spectral_norm(nn.Conv2d(3, 4, 3))
    state = conv.parametrizations.weight[0]._u.clone()
    seen = []
    note = At(
        "before_fit", lambda learn: seen.append(state.equal(conv.parametrizations.weight[0]._u))
    )
    learner(Precision("bf16"), note, model=conv, data=DataLoaders(images)).fit(1)
    assert seen == [True]
    lazy = nn.LazyConv2d(4, 3)
    learner(
        Precision("bf16"),
        model=nn.Sequential(nn.Conv2d(3, 3, 1), lazy),
        data=DataLoaders(images),
        lr=1e-3,
    ).fit(1)


def test_a_schedule_of_decay_spares_what_has_none():
    found = []
    opt_func = ByRole(partial(AdamW, weight_decay=0.1))
    note = At("after_step", lambda learn: found.append(
        {g["role"]: g["weight_decay"] for g in learn.opt.param_groups}), 90)  # fmt: skip
    schedule = Schedule("weight_decay", linear(0.1, 0.05))
    learn = learner(schedule, note, model=net(nn.BatchNorm1d(4)), opt_func=opt_func)
    learn.plan(1)
    learn.fit(1)
    assert found[-1]["norm"] == found[-1]["bias"] == 0
    assert found[-1]["head"] == pytest.approx(0.0625)


def test_a_group_may_come_while_a_schedule_is_at_work():
    def add(learn):
        if learn.epoch == 1:
            learn.opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})

    learn = learner(At("before_epoch", add), Schedule("lr", linear(0.1, 0)))
    learn.fit(2)
    assert learn.opt.param_groups[0]["lr"] == 0.1


def test_a_decay_that_an_optimiser_does_not_know_is_told_by_name():
    schedule = Schedule("weight_decay", linear(0.1, 0))
    with pytest.raises(UnknownName, match="no hyper-parameter 'weight_decay'"):
        learner(schedule, opt_func=ByRole(NoDecay)).fit(1)


class NoDecay(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        pass
