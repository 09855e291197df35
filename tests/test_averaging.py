"""Averages of weights: EMA, SWA and lookahead, each against the loop by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, update_bn

from pellucid import Callback, CancelBatch, CancelEpoch, CancelFit, DataLoaders, Learner
from pellucid.averaging import Averages, renew_batch_norm, warm_decay
from pellucid.callbacks import EMA, SWA, Accumulate, Best, Lookahead, NonFinite
from pellucid.errors import SetupError
from pellucid.freezing import freeze


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(a[name].equal(b[name]) for name in a)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def by_hand(model: nn.Module, data: DataLoaders, epochs: int, after_step, after_epoch=None):
    """Train as a learner does, calling functions with the number of the step, from 1."""
    opt, loader, step = AdamW(model.parameters(), lr=0.05, fused=True), copy.deepcopy(data.train), 0
    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            step += 1
            after_step(step)
        if after_epoch:
            after_epoch(epoch)


class Averaged:
    """What an exponential average is, tensor by tensor."""

    def __init__(self, model: nn.Module, decay_of, every: int = 1):
        self.model, self.decay_of, self.every = model, decay_of, every
        self.values, self.t = state(model), 0

    def __call__(self, step: int) -> None:
        if step % self.every:
            return
        decay = self.decay_of(self.t, step)
        self.t += 1
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


def learner(model: nn.Module, data: DataLoaders, *callbacks: Callback) -> Learner:
    return Learner(model, data, lr=0.05, callbacks=callbacks, device="cpu")


# ── EMA ───────────────────────────────────────────────────────────────────────────────────────


def test_the_decay_warms_up():
    assert [round(warm_decay(0.5, t), 3) for t in (0, 1, 8, 100)] == [0.1, 0.182, 0.5, 0.5]


@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_the_average_by_hand(every, model, data, quiet):
    theirs = copy.deepcopy(model)
    average = Averaged(theirs, lambda t, step: min(0.9, (1 + t) / (10 + t)), every)
    validated = []

    def validate(epoch: int) -> None:
        twin = copy.deepcopy(theirs)
        twin.load_state_dict(average.values)
        x, y = data.valid.dataset[:]
        validated.append(F.cross_entropy(twin.eval()(x), y).item())

    by_hand(theirs, data, 3, average, validate)
    learn = learner(model, data, quiet, EMA(0.9, every))
    learn.fit(3)
    assert same(state(model), average.values)
    assert not same(state(model), state(theirs))
    assert learn.record.epochs["valid/loss"].tolist() == pytest.approx(validated, rel=1e-6)


def test_a_scheduled_decay_sees_the_fraction_of_the_run(model, data, quiet):
    theirs = copy.deepcopy(model)
    average = Averaged(theirs, lambda t, step: 0.95**5 * ((step - 1) / 10) ** 3, every=5)
    by_hand(theirs, data, 2, average)
    learner(model, data, quiet, EMA(lambda p: 0.95**5 * p**3, every=5)).fit(2)
    assert same(state(model), average.values)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_accumulated_batches_make_one_update(n, model, data, quiet):
    seen = []

    class Steps(Callback):
        def after_step(self, learn: Learner) -> None:
            seen.append(state(learn.model))

    ema = EMA(0.5)
    learn = learner(model, data, quiet, Accumulate(n), ema, Steps())
    average = Averaged(model, None)
    learn.fit(2)
    assert len(seen) == learn.step == 2 * -(-5 // n)
    for t, values in enumerate(seen):
        for name in ("0.weight", "3.bias"):
            average.values[name].lerp_(values[name], 1 - warm_decay(0.5, t))
    assert model[0].weight.equal(average.values["0.weight"])
    assert model[3].bias.equal(average.values["3.bias"])


def test_a_step_that_comes_after_the_last_batch_counts(model, data, quiet):
    class Stops(Callback):  # in the midst of a window
        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.batch_index == 2:
                raise CancelEpoch

    seen, average = [], Averaged(model, None)

    class Steps(Callback):
        def after_step(self, learn: Learner) -> None:
            seen.append(state(learn.model))

    learner(model, data, quiet, Accumulate(2), EMA(0.5), Steps(), Stops()).fit(1)
    assert len(seen) == 2
    for t, values in enumerate(seen):
        average.values["0.weight"].lerp_(values["0.weight"], 1 - warm_decay(0.5, t))
    assert model[0].weight.equal(average.values["0.weight"])


class Watching(Callback):
    """Notes the weights in the moments of an epoch, and what looks in them say."""

    order = 70

    def __init__(self):
        self.seen: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}

    def _note(self, learn: Learner, moment: str) -> None:
        self.seen[moment] = learn.model[0].weight.detach().clone()
        self.losses[moment] = learn.validate()["loss"]
        assert learn.model[0].weight.equal(self.seen[moment])

    def after_step(self, learn: Learner) -> None:
        self._note(learn, "step")

    def before_validate(self, learn: Learner) -> None:
        self._note(learn, "validate")

    def after_epoch(self, learn: Learner) -> None:
        self._note(learn, "epoch")

    def before_epoch(self, learn: Learner) -> None:
        self._note(learn, "next")


def test_the_average_is_inside_from_the_end_of_training_to_the_end_of_the_epoch(model, data, quiet):
    watching = Watching()
    learn = learner(model, data, quiet, EMA(0.9), watching)
    learn.fit(2)
    assert watching.seen["validate"].equal(watching.seen["epoch"])
    assert not watching.seen["validate"].equal(watching.seen["step"])
    assert model[0].weight.equal(watching.seen["epoch"])
    assert watching.losses["validate"] == watching.losses["epoch"]
    assert learn.validate()["loss"] == learn.record.epochs["valid/loss"][-1]
    assert watching.losses["epoch"] == learn.record.epochs["valid/loss"][-1]


@pytest.mark.parametrize("moment", ["before_batch", "after_predict", "after_backward"])
@pytest.mark.parametrize("of_fit", [False, True])
def test_a_look_in_the_midst_of_training_sees_the_average_and_leaves_the_weights(
    moment, of_fit, model, data, quiet
):
    ema, losses = EMA(0.9), []

    class Looks(Callback):
        def _look(self, learn: Learner) -> None:
            if learn.training and learn.batch_index == 3:
                weights = state(learn.model)
                losses.append(learn.validate()["loss"])
                twin = copy.deepcopy(learn.model)
                ema._averages.put_into(twin)
                x, y = data.valid.dataset[:]
                losses.append(F.cross_entropy(twin.eval()(x), y).item())
                with pytest.raises(RuntimeError):
                    learn.validate([(torch.zeros(2, 5), torch.zeros(2))])
                assert same(weights, state(learn.model))

    looks = Looks()
    setattr(looks, moment, looks._look)
    both = [[ema, looks], []]
    learner(model, data, quiet, *both[of_fit]).fit(1, callbacks=both[not of_fit])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training_goes_on_with_the_plain_weights(model, data, quiet):
    plain = copy.deepcopy(model)
    seen = {}

    class Last(Callback):
        def __init__(self, name):
            self.name = name

        def after_step(self, learn: Learner) -> None:
            seen[self.name] = state(learn.model)

    learner(plain, copy.deepcopy(data), quiet, Last("plain")).fit(3)
    learner(model, data, quiet, EMA(0.9), Last("with")).fit(3)
    assert same(seen["plain"], seen["with"])


PLACES = ["before_validate", "after_epoch", "before_train", "after_step", "after_train"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, CancelFit])
@pytest.mark.parametrize("moment", PLACES)
@pytest.mark.parametrize("order", [-2000, 2000])
def test_however_the_fit_ends_the_model_holds_the_average(fault, moment, order, model, data, quiet):
    at = []

    class Raises(Callback):
        def _raise(self, learn: Learner) -> None:
            if learn.epoch == 1:
                twin = copy.deepcopy(ema)
                at.append((twin._averages, twin.holds_average, state(learn.model)))
                raise fault

    Raises.order = order
    raises, ema = Raises(), EMA(0.9)
    setattr(raises, moment, raises._raise)
    learn = learner(model, data, quiet, ema)
    try:
        learn.fit(3, callbacks=[raises])
    except (RuntimeError, KeyboardInterrupt) as error:
        assert isinstance(error, fault)
    [(averages, inside, values)] = at
    if not inside:
        averages.put_into(model_of_average := copy.deepcopy(model))
        values = state(model_of_average)
    assert same(state(model), values)
    assert ema._averages is None
    learn.fit(1)


@pytest.mark.parametrize("fault", [CancelEpoch, CancelBatch])
@pytest.mark.parametrize("moment", ["before_batch", "after_loss"])
def test_a_cancelled_validation_gives_the_weights_back(fault, moment, model, data, quiet):
    class Raises(Callback):
        def _raise(self, learn: Learner) -> None:
            if not learn.training:
                raise fault

    raises, watching = Raises(), Watching()
    setattr(raises, moment, raises._raise)
    ema, plain = EMA(0.9), copy.deepcopy(model)
    learn = learner(model, data, quiet, ema)

    seen = {}

    class Last(Callback):
        def after_step(self, learn: Learner) -> None:
            seen[id(learn)] = state(learn.model)

    other = learner(plain, copy.deepcopy(data), quiet)
    other.fit(3, callbacks=[Last()])
    learn.fit(3, callbacks=[raises, Last()])
    assert same(seen[id(learn)], seen[id(other)])
    assert watching.seen == {}


def test_best_keeps_the_average_that_was_validated(model, data, quiet):
    for callbacks in ([EMA(0.9), Best()], [Best(), EMA(0.9)]):
        learn = learner(copy.deepcopy(model), copy.deepcopy(data), quiet, *callbacks)
        learn.lr = 0.5  # so that the last is not the best
        record = learn.fit(6)
        assert learn.validate()["loss"] == min(record.epochs["valid/loss"].tolist())


@pytest.mark.parametrize("kind", [EMA, Lookahead])
def test_nan_in_a_skipped_batch_does_not_reach_the_statistics(kind, model, data, quiet):
    count = []

    def spoilt(x):
        count.append(x)
        return x * float("nan") if len(count) == 2 else x

    data.transforms.append(spoilt)
    learner(model, data, quiet, kind(), NonFinite("skip")).fit(2)
    assert all(value.isfinite().all() for value in state(model).values())


@pytest.mark.parametrize("kind", [EMA, SWA, Lookahead])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_callback_in_mid_fit_copies(kind, way, model, data, quiet):
    ours, twins = kind(), []

    class Copies(Callback):
        def after_epoch(self, learn: Learner) -> None:
            make = copy.deepcopy if way == "deepcopy" else lambda t: pickle.loads(pickle.dumps(t))
            twins.append(make(ours))

    learner(model, data, quiet, ours).fit(2, callbacks=[Copies()])
    assert repr(twins) == repr([ours] * 2)
    learner(model, data, quiet, twins[0]).fit(1)


def test_a_second_fit_begins_anew(model, data, quiet):
    ema = EMA(0.9)
    learn = learner(model, data, quiet, ema)
    learn.fit(2)
    twin = learner(copy.deepcopy(model), copy.deepcopy(data), quiet, EMA(0.9))
    twin.opt = copy.deepcopy((learn.model, learn.opt))[1]
    learn.reset_optimizer()
    twin.reset_optimizer()
    learn.fit(2)
    twin.fit(2)
    assert same(state(model), state(twin.model))


def test_ema_without_validation_data_ends_with_the_average(model, data, quiet):
    theirs = copy.deepcopy(model)
    average = Averaged(theirs, lambda t, step: warm_decay(0.9, t))
    by_hand(theirs, data, 1, average)
    data.valid = None
    learner(model, data, quiet, EMA(0.9)).fit(1)
    assert same(state(model), average.values)


# ── SWA ───────────────────────────────────────────────────────────────────────────────────────


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_swa_is_torchs(model, data, quiet):
    theirs = copy.deepcopy(model)
    averaged = AveragedModel(theirs)

    def after_epoch(epoch: int) -> None:
        if epoch >= 2:
            averaged.update_parameters(theirs)

    by_hand(theirs, data, 5, lambda step: None, after_epoch)
    loader = copy.deepcopy(data.train)
    loader.epoch = 5
    update_bn(loader, averaged)
    learn = learner(model, data, quiet, SWA(start=0.4))
    learn.fit(5)
    close(state(model), averaged.module.state_dict())
    assert learn.validate()["loss"] == learn.record.epochs["valid/loss"][-1]
    assert data.train.epoch == 5  # the pass for the statistics left the order alone


@pytest.mark.parametrize("moment", ["after_epoch", "after_step"])
def test_swa_ended_early_ends_with_the_mean_so_far(moment, model, data, quiet):
    kept = []

    class Stops(Callback):
        order = 54

        def after_train(self, learn: Learner) -> None:
            kept.append(state(learn.model))

        def _stop(self, learn: Learner) -> None:
            if learn.epoch == 3:
                raise CancelFit

    stops = Stops()
    setattr(stops, moment, stops._stop)
    learner(model, data, quiet, SWA(0.25)).fit(8, callbacks=[stops])
    counted = kept[2:]
    mean = torch.stack([values["0.weight"] for values in counted]).mean(0)
    torch.testing.assert_close(model[0].weight.detach(), mean, rtol=1e-5, atol=1e-6)


def test_swa_leaves_frozen_batch_norm_alone(model, data, quiet):
    freeze(model[1])
    model[1].running_mean += 0.3
    before = state(model[1])
    learner(model, data, quiet, SWA(0.5)).fit(4)
    assert same(before, state(model[1]))


def test_an_error_leaves_the_plain_weights(model, data, quiet):
    class Raises(Callback):
        def before_batch(self, learn: Learner) -> None:
            if learn.epoch == 3:
                weights.append(state(learn.model))
                raise RuntimeError

    weights: list[dict[str, Tensor]] = []
    with pytest.raises(RuntimeError):
        learner(model, data, quiet, SWA(0.25)).fit(8, callbacks=[Raises()])
    assert same(weights[0], state(model))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=5), st.booleans())
def test_statistics_are_renewed_as_torch_does(sizes, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.0))
    model.train(training)
    theirs = copy.deepcopy(model)
    batches = [torch.randn(n, 3) for n in sizes]
    renew_batch_norm(model, iter(batches), model)
    update_bn(batches, theirs)
    assert same(state(model), state(theirs))
    assert model.training == training and model[1].momentum == 0.3


def test_statistics_stay_where_nothing_goes_through():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "not": nn.BatchNorm1d(3)})
    for norm in model.values():
        norm(torch.randn(8, 3) + 1)
    before = state(model)
    renew_batch_norm(model, [], model["used"])
    assert same(before, state(model))
    renew_batch_norm(model, [torch.randn(8, 3) + 5], model["used"])
    assert same(state(model["not"]), {k[4:]: v for k, v in before.items() if k[:4] == "not."})
    assert model["used"].running_mean.mean() > 4


def test_swa_of_a_loader_that_gives_its_batches_once_keeps_the_statistics(model, data, quiet):
    batches = list(copy.deepcopy(data.train))
    twin = copy.deepcopy(model)
    for net, train, callbacks in ((model, iter(batches), [SWA()]), (twin, batches, [])):
        Learner(net, DataLoaders(train), F.cross_entropy, callbacks=[quiet, *callbacks]).fit(1)
    assert same(state(model), state(twin))


# ── lookahead ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pull", [0.5, lambda p: 1 - 0.95**5 * p**3], ids=["zhang", "airbench"])
def test_lookahead_is_the_loop_by_hand(pull, model, data, quiet):
    theirs = copy.deepcopy(model)
    slow = state(theirs)

    def meet(step: int) -> None:
        if step % 3 == 0:
            share = pull((step - 1) / 10) if callable(pull) else pull
            for name, value in theirs.state_dict().items():
                if value.is_floating_point():
                    slow[name].lerp_(value, share)
                    value.copy_(slow[name])
                else:
                    slow[name].copy_(value)

    by_hand(theirs, data, 2, meet)
    learner(model, data, quiet, Lookahead(3, pull)).fit(2)
    assert same(state(model), slow)
    assert not same(state(theirs), slow)  # ten steps: one more than three meetings


@pytest.mark.parametrize("moment", ["after_epoch", "after_step"])
def test_lookahead_ended_early_ends_with_the_slow_weights(moment, model, data, quiet):
    lookahead, slow = Lookahead(3), []

    class Stops(Callback):
        changes = True
        order = 900

        def _stop(self, learn: Learner) -> None:
            if learn.epoch == 1:
                twin = copy.deepcopy(learn.model)
                lookahead._slow.put_into(twin)
                slow.append(state(twin))
                assert not same(slow[0], state(learn.model))
                raise CancelFit

    stops = Stops()
    setattr(stops, moment, stops._stop)
    learner(model, data, quiet, lookahead).fit(4, callbacks=[stops])
    assert same(state(model), slow[0])


# ── the plain parts ───────────────────────────────────────────────────────────────────────────


def test_an_exchange_twice_changes_no_bit(model):
    averages = Averages(model)
    model.train()(torch.randn(7, 6))
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    before = state(model)
    averages.exchange(model)
    assert not same(before, state(model))
    averages.exchange(model)
    assert same(before, state(model))


def test_tied_weights_and_models_without_any_are_averaged_too():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    averages = Averages(tied)
    with torch.no_grad():
        tied[0].weight.zero_()
    averages.draw(tied, 1.0)
    averages.put_into(tied)
    assert not tied[1].weight.any() and tied[1].weight is tied[0].weight
    Averages(nn.ReLU()).draw(nn.ReLU(), 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(1.0), lambda: EMA(-0.1), lambda: EMA(0.9, 0), lambda: SWA(1.0),
        lambda: SWA(-1), lambda: Lookahead(0), lambda: Lookahead(5, 0.0), lambda: Lookahead(5, 2),
        lambda: EMA("0.9"), lambda: Lookahead(5, "0.5"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(SetupError):
        make()


@pytest.mark.parametrize("make", [EMA, lambda share: Lookahead(2, share)], ids=["EMA", "Lookahead"])
def test_a_share_may_be_a_number_of_numpys(make, model, data, quiet):
    found = []
    for share in (0.5, np.float32(0.5)):
        data.train.epoch = 0
        learn = learner(copy.deepcopy(model), data, quiet, make(share))
        learn.fit(1)
        found.append(state(learn.model))
    assert same(*found)
