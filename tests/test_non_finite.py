"""NonFinite: no step on NaN, and an error that names where it came from."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop

from pellucid import Callback, CancelBatch, CancelEpoch, DataLoaders, Learner, Loader
from pellucid.callbacks import (
    EMA,
    Accumulate,
    Best,
    Clip,
    Lookahead,
    NonFinite,
    OneCycle,
    Precision,
    Progress,
    non_finite,
)
from pellucid.data import ArrayDataset
from pellucid.errors import NonFiniteLoss, SetupError
from pellucid.nn import RunningBatchNorm

AT = 5  # the batch in which something goes wrong
N = 12


class Logarithm(nn.Module):
    """Finite for positive numbers alone."""

    def forward(self, x):
        return x.log()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data(bad_item: int | None = None) -> DataLoaders:
    torch.manual_seed(1)
    x, y = torch.randn(8 * N, 6), torch.randint(3, (8 * N,))
    train = Loader(ArrayDataset(x, y), 8, shuffle=True, seed=3)
    if bad_item is not None:
        x[train.order(0)[8 * AT + bad_item], 2] = math.nan
    return DataLoaders(train)


class Spoils(Callback):
    """Put NaN or infinity somewhere, in one batch."""

    changes = True
    order = 5

    def __init__(self, what: str, value: float = math.nan):
        self.what, self.value = what, value

    def _now(self, learn):
        return learn.training and learn.epoch == 0 and learn.batch_index == AT

    def before_batch(self, learn):
        if self._now(learn) and self.what == "weight":
            learn.model[3].weight.data[1, 2] = self.value

    def after_loss(self, learn):
        if self._now(learn) and self.what == "loss":
            learn.loss = learn.loss * self.value

    def after_backward(self, learn):
        if self._now(learn) and self.what == "gradient":
            learn.model[3].weight.grad[1, 2] = self.value


@pytest.fixture(params=["host", "device"])
def everywhere(request, monkeypatch):
    """Run a test as on a CPU, where the host looks, and as on a GPU, where the device does."""
    monkeypatch.setattr(non_finite, "_is_host", lambda device: request.param == "host")


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(non_finite, "_is_host", lambda device: False)


def learner(*callbacks, opt_func=AdamW, loaders=None, model=None, loss_func=F.cross_entropy):
    return Learner(
        mlp() if model is None else model,
        data() if loaders is None else loaders,
        loss_func,
        opt_func,
        0.01,
        callbacks=[Progress("off"), *callbacks],
        device="cpu",
    )


def refused(learn: Learner) -> str:
    with pytest.raises(NonFiniteLoss) as caught:
        learn.fit(2)
    return str(caught.value)


WITH = {
    "alone": [],
    "accumulated": [lambda: Accumulate(3)],
    "bf16": [lambda: Precision("bf16")],
    "clipped, accumulated, bf16": [
        lambda: Accumulate(2), lambda: Precision("bf16"), lambda: Clip(norm=1.0)
    ],
    "scheduled": [lambda: OneCycle(0.01)],
}  # fmt: skip


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("more", WITH)
@pytest.mark.parametrize("opt_func", [AdamW, SGD, Adagrad])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_parameter_is_named(what, opt_func, more, value):
    if "clipped" in more and what == "gradient":
        pytest.skip("clipping spreads it over all of them")
    learn = learner(Spoils(what, value), *(make() for make in WITH[more]), opt_func=opt_func)
    text = refused(learn)
    assert "in the parameter '3.weight' 1 of 24 values are not finite" in text
    others = [p for name, p in learn.model.named_parameters() if name != "3.weight"]
    assert all(param.isfinite().all() for param in others)
    if what == "weight":
        assert f"epoch 0, batch {AT} " in text


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("more", WITH)
def test_the_item_of_the_data_set_is_named(more):
    loaders = data(bad_item=3)
    text = refused(learner(*(make() for make in WITH[more]), loaders=loaders))
    item = loaders.train.order(0)[8 * AT + 3].item()
    assert f"epoch 0, batch {AT} " in text
    assert f"the inputs are not finite in item {item} of the data set" in text


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("more", WITH)
def test_the_loss_is_named(more):
    def loss(preds, y):  # overflows once predictions are large
        return F.cross_entropy(preds, y) + preds.abs().amax().mul(1e4).exp()

    text = refused(learner(*(make() for make in WITH[more]), loss_func=loss))
    assert "epoch 0, batch 0 " in text
    assert "the loss is not finite, for predictions from -" in text and "an exponential" in text


def test_the_module_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), Logarithm()), nn.Linear(8, 3))
    text = refused(learner(model=model))
    assert "'1.1' (Logarithm) gives what is not finite, for inputs from -" in text
    assert "a logarithm or root of what is not positive" in text and "lower lr" not in text


def test_a_whole_model_that_gives_it():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 3))

        def forward(self, x):
            return (x @ self.weight).log()

    assert "the model gives what is not finite" in refused(learner(model=Whole()))


def test_a_loss_spoilt_by_a_callback_has_its_batch_named():
    text = refused(learner(Spoils("loss")))
    assert f"epoch 0, batch {AT} " in text
    assert "of the data set" not in text and "parameter" not in text


def test_augmentation_is_repeated_as_it_was():
    loaders = data()
    loaders.augment = [lambda x: torch.where(x > 2.3, math.inf, x)]
    assert re.search(r"the inputs are not finite in item \d+ of the data set", refused(
        learner(loaders=loaders)))  # fmt: skip


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("opt_func", [AdamW, SGD, Adagrad])
@pytest.mark.parametrize("n", [1, 3])
def test_no_step_is_taken_from_the_bad_batch_on(opt_func, n):
    torch.manual_seed(1)
    learn = learner(Accumulate(n), opt_func=opt_func, loaders=data(bad_item=0))
    text = refused(learn)
    assert "No step was taken since: the weights are those before that batch." in text
    whole = learner(Accumulate(n), opt_func=opt_func)
    whole.data.train = list(data().train)[: AT - AT % n]
    whole.fit(1)
    pairs = zip(learn.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("on_a_gpu")
def test_an_optimiser_that_cannot_be_stopped_has_that_said():
    text = refused(learner(Spoils("weight"), opt_func=RMSprop))
    assert "The weights may be spoilt" in text and "parameter" not in text
    loaders = data(bad_item=3)
    item = loaders.train.order(0)[8 * AT + 3].item()
    assert f"in item {item} of" in refused(learner(opt_func=RMSprop, loaders=loaders))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_on_a_cpu_any_optimiser_stops_at_a_loss_of_any_type(dtype):
    def loss(preds, y):
        return F.cross_entropy(preds, y).to(dtype) * (1.0 if preds.isfinite().all() else math.inf)

    learn = learner(opt_func=RMSprop, loaders=data(bad_item=0), loss_func=loss)
    assert "No step was taken since" in refused(learn)
    whole = learner(opt_func=RMSprop, loss_func=loss)
    whole.data.train = list(data().train)[:AT]
    whole.fit(1)
    assert learn.step == whole.step == AT
    assert all(map(torch.equal, learn.model.parameters(), whole.model.parameters()))


def test_batches_that_cannot_be_had_again():
    torch.manual_seed(1)
    given = list(data(bad_item=1).train)

    class Stream:
        def __iter__(self):
            return iter(given)

    learn = learner(loaders=DataLoaders(Stream()))
    text = refused(learn)
    assert f"batch {AT} " in text and "learn.find_lr().plot()" in text
    assert "item 1 of the batch" in refused(learner(loaders=DataLoaders(given)))


@pytest.mark.usefixtures("everywhere")
def test_nothing_is_left_and_a_mended_run_goes_on():
    learn = learner(loaders=data(bad_item=1))
    assert "Statistics that were not finite begin anew, in '1'." in refused(learn)
    assert "found_inf" not in vars(learn.opt)
    assert not any(module._forward_hooks for module in learn.model.modules())
    assert not learn.model.training
    learn.data = data()
    learn.data.valid = learn.data.train
    row = learn.fit(1).epochs[-1]
    assert math.isfinite(row["train/loss"]) and math.isfinite(row["valid/loss"])


def test_statistics_that_are_finite_stay():
    learn = learner(Spoils("loss"))
    assert "begin anew" not in refused(learn)
    assert learn.model[1].num_batches_tracked > AT


def test_the_librarys_own_norm_begins_anew_too():
    learn = learner(loaders=data(bad_item=1))
    learn.model[1] = RunningBatchNorm(8)
    assert "begin anew, in '1'." in refused(learn)
    assert all(buffer.isfinite().all() for buffer in learn.model.buffers())


def test_weights_that_are_spoilt_already_were_put_in_by_no_callback():
    def loss(preds, y):
        return F.cross_entropy(preds, y) + (preds - preds).abs().sqrt().sum()  # its slope is inf

    text = refused(learner(loss_func=loss))
    assert "in the parameter '0.weight'" in text and "a callback" not in text


@pytest.mark.parametrize("order", [0, 500])
@pytest.mark.parametrize("moment", ["after_predict", "after_loss"])
@pytest.mark.parametrize("action", ["stop", "skip", "log"])
def test_a_look_in_the_midst_of_a_batch_changes_nothing(action, moment, order):
    class Looks(Callback):
        changes = False

    def look(self, learn):
        if learn.training:
            learn.validate()

    setattr(Looks, moment, look)
    Looks.order, found = order, []
    for more in ([], [Looks()]):
        loaders = data()
        loaders.valid = loaders.train
        learn = learner(NonFinite(action), *more, loaders=loaders)
        learn.fit(1)
        found.append(learn.model.state_dict().values())
    assert all(map(torch.equal, *found))


class Root(nn.Module):
    """Finite until its parameter falls below 0, which every step brings nearer."""

    def __init__(self):
        super().__init__()
        self.below = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return x + self.below.sqrt()


@pytest.mark.parametrize("more", [[], [Best()], [EMA(0.9)], [Best(), EMA(0.9), Lookahead()]])
def test_the_weights_are_searched_that_the_batch_met_whatever_the_fit_ends_with(more):
    torch.manual_seed(0)
    loaders = DataLoaders([torch.zeros(4, 1)] * 5, [torch.zeros(2, 1)])
    model, down = nn.Sequential(nn.Identity(), Root()), partial(SGD, lr=0.02)
    learn = learner(*more, loaders=loaders, model=model, loss_func=torch.mean, opt_func=down)
    with pytest.raises(NonFiniteLoss) as caught:
        learn.fit(9)
    text = str(caught.value)
    assert "'1' (Root) gives what is not finite" in text
    assert ("the weights are those before that batch" in text) == (not more)
    assert ("a callback has put the weights in" in text) == bool(more)


@pytest.mark.usefixtures("everywhere")
def test_a_loss_of_one_element_is_looked_at_too():
    def loss(preds, y):
        return F.cross_entropy(preds, y).reshape(1)

    learn = learner(loss_func=loss, loaders=data(bad_item=3))
    assert "the inputs are not finite in item" in refused(learn)
    assert all(param.isfinite().all() for param in learn.model.parameters())


@pytest.mark.usefixtures("everywhere")
def test_a_loss_is_looked_at_as_the_last_who_assigns_it_leaves_it():
    spoils = Spoils("loss")
    spoils.order = 500
    learn = learner(spoils)
    assert "No step was taken since" in refused(learn)
    assert all(param.isfinite().all() for param in learn.model.parameters())


# ── the other actions ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("opt_func", [SGD, AdamW, RMSprop])
@pytest.mark.parametrize("what", ["input", "loss", "gradient"])
def test_skipping_is_leaving_the_batch_out(what, opt_func):
    spoils = [] if what == "input" else [Spoils(what)]
    loaders = data(bad_item=2 if what == "input" else None)
    learn = learner(NonFinite("skip"), *spoils, opt_func=opt_func, loaders=loaders)
    learn.fit(1)
    batches = list(data().train)
    without = learner(opt_func=opt_func)
    without.data.train = [batch for i, batch in enumerate(batches) if i != AT]
    without.fit(1)
    ours, theirs = learn.model.state_dict(), without.model.state_dict()
    for name in ours:
        if what == "input" or ("num_batches" not in name and "running" not in name):
            assert torch.equal(ours[name], theirs[name]), name
    losses = learn.record["train/loss"]
    assert math.isfinite(losses[AT]) == (what == "gradient")  # as it was
    row = learn.record.epochs[-1]
    assert row["train/skipped"] == 1
    finite = losses[torch.from_numpy(losses).isfinite().numpy()]
    assert row["train/loss"] == pytest.approx(finite.mean(), rel=1e-6)


def test_momentum_begins_at_zero_when_the_first_batch_is_skipped():
    junk = [torch.full((8, 6), 7.0) for _ in range(50)]  # what the memory may hold
    del junk
    batches = list(data().train)
    bad = (batches[0][0] * math.nan, batches[0][1])
    weights = []
    for train, more in (([bad, *batches[1:]], [NonFinite("skip")]), (batches[1:], [])):
        learn = learner(*more, opt_func=partial(SGD, momentum=0.9), loaders=DataLoaders(train))
        learn.fit(1)
        weights.append([param.detach() for param in learn.model.parameters()])
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("opt_func", [SGD, AdamW])
def test_a_whole_window_is_skipped(opt_func):
    learn = learner(NonFinite("skip"), Accumulate(3), opt_func=opt_func, loaders=data(bad_item=2))
    learn.fit(1)
    without = learner(Accumulate(3), opt_func=opt_func)
    batches = list(data().train)
    without.data.train = batches[:3] + batches[6:]
    without.fit(1)
    pairs = zip(learn.model.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert learn.record.epochs[-1]["train/skipped"] == 1


def test_logging_shows_what_was_there():
    learn = learner(NonFinite("log"), loaders=data(bad_item=2))
    learn.fit(2)
    losses = learn.record["train/loss"]
    assert len(losses) == 2 * N and math.isnan(losses[AT]) and math.isfinite(losses[AT - 1])
    assert math.isnan(learn.record.epochs[0]["train/loss"])


def test_skipping_where_nothing_is_wrong_changes_nothing():
    plain, skipping = learner(), learner(NonFinite("skip"))
    for learn in (plain, skipping):
        learn.fit(2)
    ours, theirs = skipping.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert skipping.record.epochs[-1]["train/skipped"] == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("action", ["stop", "skip"])
@pytest.mark.parametrize("opt_func", [SGD, AdamW])
def test_double_precision_by_default_goes_too(action, opt_func):
    torch.set_default_dtype(torch.float64)
    try:
        learn = learner(NonFinite(action), opt_func=opt_func)
        learn.fit(1)
        assert learn.model[0].weight.dtype == torch.float64
        assert math.isfinite(learn.record.epochs[-1]["train/loss"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_word_is_refused():
    with pytest.raises(SetupError, match='"stop", "skip" or "log"'):
        NonFinite("raise")


class AnotherForward(nn.Module):
    """Give NaN in one batch, and fail when that is computed again."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(6, 3), 0

    def forward(self, x):
        self.seen += 1
        if not torch.is_grad_enabled():
            raise TypeError("called again")
        return self.layer(x) * (math.nan if self.seen == AT else 1)


def test_a_search_that_fails_is_told_and_hides_nothing(quiet):
    learn = Learner(AnotherForward(), data(), F.cross_entropy, SGD, 0.05, device="cpu")
    with pytest.raises(NonFiniteLoss, match="became nan in epoch 0, batch 4") as caught:
        learn.fit(1, callbacks=[quiet])
    [note] = [n for n in caught.value.__notes__ if "culprit" in n]
    assert note == "Looking for the culprit failed: TypeError: called again"
    assert "No step was taken since" in str(caught.value)


def test_a_search_that_ends_leaves_no_note(quiet):
    learn = Learner(mlp(), data(3), F.cross_entropy, SGD, 0.05, device="cpu")
    with pytest.raises(NonFiniteLoss, match="not finite in item") as caught:
        learn.fit(1, callbacks=[quiet])
    assert not any("culprit" in n for n in getattr(caught.value, "__notes__", ()))


@pytest.mark.parametrize("cancel", [CancelBatch, CancelEpoch])
@pytest.mark.parametrize("moment, order", [("after_loss", 30), ("after_backward", 6)])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_batch_that_is_cancelled_for_its_loss_does_not_count(
    action, moment, order, cancel, everywhere
):
    """Nothing of it is on record; if it counted, no step would be taken again and nobody told."""

    class Cancels(Callback):
        changes = True

        def _cancel(self, learn):
            if learn.training and not learn.loss.isfinite():
                raise cancel

    class Steps(Callback):
        order = 100

        def __init__(self):
            self.moved = []

        def before_batch(self, learn):
            self.before = [param.detach().clone() for param in learn.model.parameters()]

        def after_batch(self, learn):
            pairs = zip(self.before, learn.model.parameters(), strict=True)
            self.moved.append(not all(before.equal(param) for before, param in pairs))

    cancels, steps = Cancels(), Steps()
    cancels.order = order
    setattr(cancels, moment, cancels._cancel)
    learn = learner(Spoils("loss"), cancels, NonFinite(action), steps)
    learn.fit(2)
    n_left = 1 if cancel is CancelBatch else N - AT
    moved = [True] * AT + [False] * (cancel is CancelBatch) + [True] * (2 * N - AT - n_left)
    assert steps.moved == moved
    assert len(learn.record["train/loss"]) == 2 * N - n_left


def test_a_cancelled_batch_does_not_hide_the_one_before_it(everywhere):
    class Cancels(Callback):
        changes = True
        order = 30

        def after_loss(self, learn):
            if learn.batch_index == AT + 1:
                raise CancelBatch

    learn = learner(Spoils("loss"), Cancels())
    with pytest.raises(NonFiniteLoss, match=f"batch {AT} "):
        learn.fit(1)
    assert all(param.isfinite().all() for param in learn.model.parameters())
