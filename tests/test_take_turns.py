"""Parts of a model in turn: a GAN by the ordinary fit, bit for bit as by hand."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from pellucid import Callback, CancelBatch, DataLoaders, Learner
from pellucid.callbacks import Accumulate, NonFinite, OneCycle, Progress, TakeTurns, Unfreeze
from pellucid.errors import NonFiniteLoss, SetupError, UnknownName
from pellucid.gan import GAN, gan_batch, wasserstein
from pellucid.roles import ByRole


def gan() -> GAN:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
    critic = nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))
    return GAN(generator, critic, 3)


def real(*sizes: int) -> list[tuple[torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 5) + 2,) for n in sizes]


def learner(train, *callbacks, opt_func=RMSprop, valid=None) -> Learner:
    return Learner(
        gan(), DataLoaders(train, valid), wasserstein, opt_func, 0.01,
        callbacks=[Progress("off"), *callbacks], device="cpu",
    )  # fmt: skip


def turns(**more) -> TakeTurns:
    return TakeTurns({"critic": 5, "generator": 1}, batch=gan_batch, **more)


class Watch(Callback):
    """Note whose turn it was and whose bits changed."""

    def __init__(self):
        self.rows = []

    def before_batch(self, learn):
        self.before = copy.deepcopy(learn.model.state_dict())

    def after_batch(self, learn):
        now = learn.model.state_dict()
        moved = {
            name.split(".")[0] for name in now if not torch.equal(now[name], self.before[name])
        }
        self.rows.append((learn.model.turn, moved))


def by_hand(train, epochs, opts) -> GAN:
    model = gan()
    opts = {part: make(getattr(model, part).parameters()) for part, make in opts.items()}
    torch.manual_seed(5)
    step = 0
    for _ in range(epochs):
        for (x,) in train:
            noise, ones = torch.randn(len(x), 3), torch.ones(len(x))
            model.zero_grad()
            if step % 6 < 5:
                scores = model.critic(torch.cat([x, model.generator(noise).detach()]))
                wasserstein(scores, torch.cat([ones, -ones])).backward()
                opts["critic"].step()
            else:
                wasserstein(model.critic(model.generator(noise)), ones).backward()
                opts["generator"].step()
            step += 1
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_who_waits_does_not_change_by_a_bit():
    watch = Watch()
    learn = learner(real(*[8] * 7), turns(), watch, opt_func=AdamW)  # with weight decay
    learn.fit(2)
    expected = (["critic"] * 5 + ["generator"]) * 2 + ["critic"] * 2
    assert watch.rows == [(part, {part}) for part in expected]


@pytest.mark.parametrize("opt_func", [RMSprop, AdamW, SGD])
def test_a_fit_is_the_loop_by_hand_with_two_optimisers(opt_func):
    train = real(8, 8, 5, 8, 3)
    learn = learner(train, turns(), opt_func=opt_func)
    torch.manual_seed(5)
    learn.fit(4)
    form = "foreach" if opt_func is RMSprop else "fused"

    def make(params):
        return opt_func(params, lr=0.01, **{form: True})

    assert_same(learn.model, by_hand(train, 4, {"critic": make, "generator": make}))


@pytest.mark.parametrize("fits", [[4], [1, 3]])
def test_each_part_may_have_an_optimiser_of_its_own_that_lives_across_fits(fits):
    train = real(8, 8, 5, 8, 3)

    def slow(params, lr, fused=None):
        return Adam(params, lr=lr / 10, betas=(0.5, 0.9), fused=fused)

    learn = learner(train, turns(opt_funcs={"critic": SGD, "generator": slow}))
    torch.manual_seed(5)
    for epochs in fits:
        learn.fit(epochs)
    makers = {
        "critic": lambda params: SGD(params, 0.01, fused=True),
        "generator": lambda params: slow(params, 0.01, fused=True),
    }
    assert_same(learn.model, by_hand(train, 4, makers))
    assert isinstance(learn.opt, RMSprop)


@pytest.mark.parametrize("own", [False, True])
def test_everything_is_put_back(own):
    opt_funcs = {"critic": SGD, "generator": SGD} if own else None
    take = turns(opt_funcs=opt_funcs)
    learn = learner(real(*[8] * 7), take)
    learn.model.critic[0].bias.requires_grad_(False)
    frozen = learn.model.critic[0].bias.clone()
    learn.fit(1)
    opt = learn.opt

    class Raising(Callback):
        def after_loss(self, learn):
            if learn.batch_index == 5:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learn.fit(1, callbacks=[Raising()])
    assert learn.opt is opt and take.turn is None
    trainable = {name for name, p in learn.model.named_parameters() if not p.requires_grad}
    assert trainable == {"critic.0.bias"} and torch.equal(learn.model.critic[0].bias, frozen)
    assert not own or not any("found_inf" in vars(opt) for opt in [take._opt, *take._opt.parts])


def test_accumulated_batches_belong_to_one_turn():
    watch = Watch()
    learner(real(*[4] * 14), turns(), Accumulate(2), watch).fit(1)
    assert [part for part, _ in watch.rows] == ["critic"] * 10 + ["generator"] * 2 + ["critic"] * 2
    assert [moved for _, moved in watch.rows[1::2]] == [{"critic"}] * 5 + [
        {"generator"},
        {"critic"},
    ]


def test_a_cancelled_batch_does_not_use_up_a_turn():
    class Cancelling(Callback):
        changes = True

        def after_loss(self, learn):
            if learn.batch_index == 2:
                raise CancelBatch

    watch = Watch()
    learner(real(*[4] * 7), turns(), Cancelling(), watch).fit(1)
    assert [part for part, _ in watch.rows] == ["critic"] * 6 + ["generator"]


def test_validation_is_the_first_parts_and_leaves_turns_alone():
    valid = real(6, 6)
    plain, validated = (
        learner(real(*[8] * 7), turns()),
        learner(real(*[8] * 7), turns(), valid=valid),
    )
    rows = []

    class Note(Callback):
        def after_loss(self, learn):
            rows.append((learn.training, learn.model.turn, len(learn.preds)))

    torch.manual_seed(5)
    validated.fit(1, callbacks=[Note()])
    torch.manual_seed(5)
    plain.fit(1)
    assert rows[-2:] == [(False, "critic", 12)] * 2
    assert validated.record["train/loss"].tolist() == plain.record["train/loss"].tolist()


@pytest.mark.parametrize("own", [False, True])
def test_no_step_is_taken_on_a_loss_that_is_not_finite(own):
    opt_funcs = {"critic": SGD, "generator": SGD} if own else None
    train = real(4, 4, 4)
    train[1][0][2, 3] = torch.inf
    learn = learner(train, turns(opt_funcs=opt_funcs), opt_func=SGD)
    with pytest.raises(NonFiniteLoss):
        learn.fit(1)
    assert all(param.isfinite().all() for param in learn.model.parameters())


def test_schedules_move_what_steps():
    learn = learner(real(*[8] * 12), turns(), OneCycle(0.02), opt_func=SGD)
    learn.fit(1)
    assert learn.record["lr"].max() == pytest.approx(0.02, rel=0.1)
    assert learn.opt.param_groups[0]["lr"] == 0.01


def test_rates_move_the_optimisers_of_the_parts_and_come_back():
    take = turns(opt_funcs={"critic": partial(SGD, momentum=0.9), "generator": SGD})
    learn = learner(real(*[8] * 12), take)
    learn.fit(1, callbacks=[OneCycle(0.02)])
    assert learn.record["lr/0"].max() == pytest.approx(0.02, rel=0.1)

    def used():
        learn.fit(1)
        return {learn.record[name][-1] for name in ("lr/0", "lr/1")}

    assert used() == {0.01}  # a schedule ends with the fit
    learn.fit(1, lr=0.03)
    assert used() == {0.03}


def test_optimisers_of_parts_may_have_groups_of_their_own():
    take = turns(opt_funcs={"critic": ByRole(AdamW, lr_factors={"bias": 0}), "generator": SGD})
    learn = learner(real(*[8] * 7), take)
    biases = [learn.model.critic[i].bias.clone() for i in (0, 2)]
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1)
    assert all(map(torch.equal, biases, [learn.model.critic[i].bias for i in (0, 2)]))
    same = {n for n, value in learn.model.state_dict().items() if torch.equal(value, before[n])}
    assert same == {"critic.0.bias", "critic.2.bias"}


def test_what_thaws_between_fits_is_trained():
    take = turns(opt_funcs={"critic": SGD, "generator": SGD})
    learn = learner(real(*[8] * 7), take)
    frozen = learn.model.critic[0].weight.requires_grad_(False)
    before = frozen.detach().clone()
    learn.fit(1)
    assert torch.equal(frozen, before)
    frozen.requires_grad_(True)
    learn.reset_optimizer()
    learn.fit(1)
    assert not torch.equal(frozen, before)


def test_one_callback_serves_two_learners():
    take = turns(opt_funcs={"critic": SGD, "generator": SGD})
    first, second = (learner(real(*[8] * 7), take) for _ in range(2))
    for learn in (first, second):
        torch.manual_seed(5)
        learn.fit(1)
    assert_same(first.model, second.model)


@pytest.mark.parametrize("own", [False, True])
def test_a_first_step_that_is_skipped_leaves_no_momentum(own):
    make = partial(SGD, momentum=0.9)
    train = real(*[4] * 7)
    train[0][0][2, 3] = torch.inf
    take = turns(opt_funcs={"critic": make, "generator": make} if own else None)
    learn = learner(train, take, NonFinite("skip"), opt_func=make)
    learn.fit(1)
    params = [learn.model.critic[0].weight, learn.model.generator[0].weight]
    assert all(param.isfinite().all() and param.abs().max() < 10 for param in params)


def test_parts_and_what_is_in_none_may_train_with_momentum(data, model):
    learn = Learner(
        model, data, F.cross_entropy, partial(SGD, momentum=0.9), device="cpu",
        callbacks=[TakeTurns({"0": 1, "4": 2}), Progress("off")],
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    learn.fit(1)
    now = model.state_dict()
    assert not any(
        torch.equal(now[name], before[name]) for name in ("0.weight", "1.weight", "4.weight")
    )


def test_parts_of_any_model_take_turns_without_a_batch_of_their_own(data, model):
    watch = Watch()
    model.turn = "either"
    learn = Learner(
        model, data, F.cross_entropy, device="cpu",
        callbacks=[TakeTurns({"0": 1, "4": 2}), watch, Progress("off")],
    )  # fmt: skip
    learn.fit(1)
    changed = [moved - {"1"} for _, moved in watch.rows[:5]]  # the norm is in no part
    assert changed == [{"0"}, {"4"}, {"4"}, {"0"}, {"4"}]
    assert all("1" in moved for _, moved in watch.rows[:5])


def test_who_waits_stays_as_it_is_while_others_thaw(data):
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    model.turn = "either"
    watch, parts = Watch(), {"0": 3, "1": 2}
    learn = Learner(
        model, DataLoaders(data.train), F.cross_entropy, SGD, device="cpu",
        callbacks=[TakeTurns(parts), Unfreeze(), watch, Progress("off")],
    )  # fmt: skip
    learn.fit(3)
    free = [{"2"}] * 5 + [{"1", "2"}] * 5 + [{"0", "1", "2"}] * 5
    waits = [set()] * 10 + [{"1"}, {"1"}, {"1"}, {"0"}, {"0"}]  # who is frozen gets no turn
    assert [moved for _, moved in watch.rows] == [a - b for a, b in zip(free, waits, strict=True)]
    assert all(param.requires_grad for param in model.parameters())


def test_wrong_turns_are_refused():
    with pytest.raises(SetupError, match="Two parts or more"):
        TakeTurns({"critic": 5})
    with pytest.raises(SetupError, match="Two parts or more"):
        TakeTurns({"critic": 5, "generator": 0})
    with pytest.raises(SetupError, match="needs an optimiser"):
        TakeTurns({"critic": 5, "generator": 1}, opt_funcs={"critic": SGD})
    shared = learner(real(4), turns())
    shared.model.critic[0].bias = shared.model.generator[0].bias
    with pytest.raises(SetupError, match="share parameters"):
        shared.fit(1)
    parts = {"critic": SGD, "generator.0": SGD}
    with pytest.raises(SetupError, match="in no part"):
        learner(real(4), TakeTurns(dict.fromkeys(parts, 1), opt_funcs=parts)).fit(1)
    with pytest.raises(UnknownName, match="no part 'crtic'"):
        learner(real(4), TakeTurns({"crtic": 5, "generator": 1})).fit(1)
    with pytest.raises(SetupError, match="for a GAN"):
        gan_batch(nn.Linear(2, 2), torch.rand(2, 2), "critic")
    with pytest.raises(SetupError, match="1 number or more"):
        GAN(nn.Identity(), nn.Identity(), 0)
