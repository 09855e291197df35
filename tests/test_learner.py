"""The Learner: what it takes, what it keeps, what it leaves alone, and techniques by callback."""

import copy
import gc
import math
import weakref
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, TensorDataset

from pellucid import Callback, DataLoaders, Learner, Loader
from pellucid.callbacks import OneCycle, Progress
from pellucid.callbacks import progress as progress_module
from pellucid.data import ArrayDataset, Normalize, digits
from pellucid.errors import DataError, SetupError
from pellucid.losses import mean_squared_error
from pellucid.metrics import MacroF1, accuracy
from pellucid.vision import mlp

QUIET = Progress("off")
plain_sgd = partial(SGD, foreach=False)


def batches(n=4, size=6, seed=0, n_features=3, n_classes=2):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, n_features, generator=source)
    y = torch.randint(n_classes, (n, size), generator=source)
    return list(zip(x, y, strict=True))


def linear(n_in=3, n_out=2):
    torch.manual_seed(1)
    return nn.Linear(n_in, n_out)


def learner(model=None, train=None, valid=None, **settings):
    given = {"loss_func": F.cross_entropy, "opt_func": plain_sgd, "lr": 0.1, "device": "cpu"}
    model = model or linear()
    train = batches() if train is None else train
    return Learner(model, (train, valid), **(given | {"callbacks": [QUIET]} | settings))


def by_hand(model, train, epochs=1, lr=0.1, loss_func=F.cross_entropy, opt=None):
    opt = opt or SGD(model.parameters(), lr=lr, foreach=False)
    for _ in range(epochs):
        for x, y in train:
            loss_func(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return model


def same_weights(a, b):
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[k], others[k]) for k in mine)


# ── any iterable of batches ─────────────────────────────────────────────────────────────────────


class Stream(IterableDataset):
    def __iter__(self):
        return (item for x, y in batches() for item in zip(x, y, strict=True))


@pytest.mark.parametrize(
    "train",
    [
        batches(),
        tuple(batches()),
        [list(batch) for batch in batches()],
        TorchLoader(Stream(), batch_size=6),
        TorchLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=6),
        Loader(ArrayDataset(*map(torch.cat, zip(*batches(), strict=True))), 6),
        Loader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), 6),
    ],
    ids=["list", "tuple", "lists", "stream", "torch loader", "loader", "loader of items"],
)
def test_any_iterable_of_batches_will_do(train):
    learn = learner(train=train, valid=train)
    record = learn.fit(2)
    assert same_weights(learn.model, by_hand(linear(), batches(), 2))
    assert len(record.batches) == 8 and record["valid/loss"].shape == (2,)
    assert learn.progress == 1


def test_data_without_a_length_count_by_whole_epochs():
    class Watch(Callback):
        def before_batch(self, learn):
            seen.append((learn.progress, learn.n_batches, learn.batch_index))

    seen = []
    learn = learner(train=TorchLoader(Stream(), batch_size=12))
    learn.fit(2, callbacks=[Watch()])
    assert seen[0] == (0.0, None, 0) and seen[2] == (0.5, None, 0)
    assert learn.progress == 1


def test_a_generator_serves_one_epoch_and_then_is_used_up():
    learn = learner(train=iter(batches()))
    with pytest.raises(DataError, match="The training data gave no batch"):
        learn.fit(2)
    assert len(learn.record.epochs) == 1
    learn.data.train = batches()
    learn.fit(1)


def test_progress_goes_from_zero_to_the_last_batch_but_one():
    class Watch(Callback):
        def before_batch(self, learn):
            seen.append((learn.epoch, learn.batch_index, learn.n_batches, learn.progress))

    seen = []
    learner(train=batches(3)).fit(2, callbacks=[Watch()])
    assert [row[3] for row in seen] == pytest.approx([i / 6 for i in range(6)])
    assert [row[:3] for row in seen] == [(e, b, 3) for e in range(2) for b in range(3)]


# ── what a batch may be ─────────────────────────────────────────────────────────────────────────


class Two(nn.Module):
    """A model of two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x, scale):
        return self.layer(x) * scale


def test_several_inputs_go_to_the_model_in_order():
    train = [(x, tensor(2.0), y) for x, y in batches()]
    learn = Learner(Two(), DataLoaders(train, n_inputs=2), F.cross_entropy, plain_sgd, 0.1,
                    callbacks=[QUIET], device="cpu")  # fmt: skip
    learn.fit(1)

    def loss(preds, y):
        return F.cross_entropy(preds * 2, y)

    hand = by_hand(linear(), batches(), loss_func=loss)
    assert same_weights(learn.model.layer, hand)


def test_nested_inputs_are_several_inputs_too():
    train = [((x, tensor(2.0)), y) for x, y in batches()]
    learn = learner(Two(), train)
    learn.fit(1)
    assert len(learn.record.batches) == 4


def test_the_inputs_of_a_dict_go_to_the_model_by_name():
    train = [{"scale": tensor(2.0), "x": x, "target": y} for x, y in batches()]
    learn = Learner(Two(), DataLoaders(train, train, n_inputs=2), F.cross_entropy, plain_sgd, 0.1,
                    metrics=[accuracy], callbacks=[QUIET], device="cpu")  # fmt: skip
    learn.fit(1)
    other = learner(Two(), [((x, tensor(2.0)), y) for x, y in batches()])
    other.fit(1)
    assert same_weights(learn.model, other.model)
    assert 0 <= learn.record["valid/accuracy"][0] <= 1


def test_several_targets_go_to_the_loss_in_order():
    def loss(preds, y, weight):
        return (F.cross_entropy(preds, y, reduction="none") * weight).mean()

    train = [(x, y, torch.ones(6) / 2) for x, y in batches()]
    learn = learner(train=train, loss_func=loss)
    learn.fit(1)
    assert same_weights(learn.model, by_hand(linear(), batches(), lr=0.05))


def test_data_without_targets_train_on_predictions_alone():
    def loss(preds):
        return preds.square().mean()

    for train in ([x for x, _ in batches()], [(x,) for x, _ in batches()]):
        learn = learner(train=train, loss_func=loss)
        learn.fit(1)
        hand = by_hand(linear(), batches(), loss_func=lambda preds, y: loss(preds))
        assert same_weights(learn.model, hand)


class Wordy(nn.Module):
    """A model with more than one output, by name."""

    def __init__(self, penalty):
        super().__init__()
        self.layer, self.penalty = linear(), penalty

    def forward(self, x):
        y = self.layer(x)
        return {"logits": y, "penalty": self.penalty(y)}


@pytest.mark.parametrize(
    "penalty",
    [lambda y: y.square().sum(1), lambda y: y.square().mean()],
    ids=["an item", "a batch"],
)
def test_a_model_may_give_several_outputs(penalty):
    def loss(preds, y):
        return F.cross_entropy(preds["logits"], y) + preds["penalty"].mean()

    learn = learner(Wordy(penalty), valid=batches(), loss_func=loss)
    learn.fit(1)
    x = torch.randn(5, 3)
    torch.testing.assert_close(learn.predict(x)["logits"], learn.model.layer(x).detach())


def test_floats_are_a_regression_by_default():
    x = torch.randn(12, 3)
    data = DataLoaders.from_arrays((x, x.sum(1)), batch_size=4)
    learn = Learner(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), data, callbacks=[QUIET])
    assert learn.loss_func is mean_squared_error
    learn.fit(1)


def test_what_is_loaded_as_bytes_is_normalised_on_its_way():
    images = np.random.default_rng(0).integers(0, 255, (20, 1, 4, 4), dtype=np.uint8)
    data = DataLoaders.from_arrays((images, np.arange(20) % 2), batch_size=5)
    learn = Learner(mlp(16, 2), data, callbacks=[QUIET])
    learn.fit(1)
    expected = learn.model(data.transforms[0](torch.as_tensor(images)))
    torch.testing.assert_close(learn.predict(images), expected.detach())


# ── the optimiser ───────────────────────────────────────────────────────────────────────────────


def test_the_learning_rate_of_a_fit_stays_until_the_next_is_given():
    learn = learner(lr=0.1)
    assert learn.opt is None
    learn.fit(1)
    assert learn.record["lr"].tolist() == [0.1] * 4
    learn.fit(1, lr=0.5)
    learn.fit(1)
    assert learn.record["lr"].tolist() == [0.1] * 4 + [0.5] * 8
    assert learn.lr == 0.5
    learn.reset_optimizer()
    assert learn.opt.param_groups[0]["lr"] == 0.5


def test_a_rate_set_on_the_optimiser_itself_is_left_alone():
    learn = learner()
    learn.reset_optimizer()
    learn.opt.param_groups[0]["lr"] = 0.7
    learn.fit(1)
    assert learn.record["lr"].tolist() == [0.7] * 4


def test_the_optimiser_lives_across_fits():
    for opt_func in (partial(SGD, momentum=0.9, foreach=False), partial(AdamW, fused=False)):
        once, twice = learner(opt_func=opt_func), learner(opt_func=opt_func)
        once.fit(2)
        twice.fit(1)
        opt = twice.opt
        twice.fit(1)
        assert twice.opt is opt
        assert same_weights(once.model, twice.model)


def test_a_new_optimiser_has_forgotten_its_momentum():
    momentum = partial(SGD, momentum=0.9, foreach=False)
    learn = learner(opt_func=momentum)
    learn.fit(1)
    learn.reset_optimizer()
    learn.fit(1)
    hand = linear()
    for _ in range(2):
        by_hand(hand, batches(), opt=momentum(hand.parameters(), lr=0.1))
    assert same_weights(learn.model, hand)


def test_an_optimiser_of_another_model_is_refused_until_it_is_made_anew():
    learn = learner()
    learn.fit(1)
    learn.model = linear()
    with pytest.raises(SetupError, match=r"call learn.reset_optimizer\(\) after exchanging"):
        learn.fit(1)
    learn.reset_optimizer()
    learn.fit(1)
    assert same_weights(learn.model, by_hand(linear(), batches()))


def test_parameter_groups_come_from_the_function_that_makes_the_optimiser():
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(2, 2))

    def groups(params, lr):
        params = list(params)
        body, head = params[:2], params[2:]
        return SGD([{"params": body, "lr": lr / 10}, {"params": head}], lr=lr, foreach=False)

    hand = copy.deepcopy(model)
    learn = learner(model, opt_func=groups)
    learn.fit(1)
    by_hand(hand, batches(), opt=groups(hand.parameters(), 0.1))
    assert same_weights(model, hand)
    assert learn.record["lr/0"].tolist() == pytest.approx([0.01] * 4)
    assert learn.record["lr/1"].tolist() == [0.1] * 4


def test_frozen_parameters_are_left_out_of_the_optimiser():
    model = nn.Sequential(linear(), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0])
    learn = learner(model)
    learn.fit(1)
    assert same_weights(model[0], before)
    assert len(learn.opt.param_groups[0]["params"]) == 2


def test_only_the_gradients_of_the_optimisers_parameters_are_dropped():
    model = nn.Sequential(linear(), nn.Linear(2, 2))

    def head_only(params, lr):
        return SGD(model[1].parameters(), lr=lr)

    learn = learner(model, opt_func=head_only)
    learn.fit(1)
    assert model[0].weight.grad is not None  # four batches' worth, added up
    assert model[1].weight.grad is None


def test_the_fastest_form_is_taken_unless_the_user_decides():
    def form(opt_func):
        learn = learner(opt_func=opt_func)
        learn.fit(1)
        [group] = learn.opt.param_groups
        return {name: bool(group.get(name)) for name in ("fused", "foreach")}

    assert any(form(AdamW).values())
    assert form(partial(AdamW, fused=False, foreach=False)) == {"fused": False, "foreach": False}
    assert form(partial(SGD, foreach=True)) == {"fused": False, "foreach": True}


def test_lbfgs_evaluates_a_batch_as_often_as_it_needs():
    x = torch.randn(30, 3)
    y = x @ tensor([1.0, -2.0, 0.5])
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    learn = learner(model, [(x, y)], loss_func=F.mse_loss, opt_func=LBFGS, lr=1.0)
    learn.fit(3)
    assert learn.record["train/loss"][-1] < 1e-6


def test_one_cycle_is_a_fit_with_the_schedule():
    one, other = learner(opt_func=Adam), learner(opt_func=Adam)
    record = one.fit_one_cycle(2, 0.3)
    other.fit(2, callbacks=[OneCycle(0.3)])
    assert record is one.record and same_weights(one.model, other.model)
    assert record["lr"].max() == pytest.approx(0.3)


# ── looks ───────────────────────────────────────────────────────────────────────────────────────


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_validation_over_ragged_batches_equals_one_pass_over_all_items(sizes, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=source)
    y = torch.randint(2, (sum(sizes),), generator=source)
    ragged = list(zip(x.split(sizes), y.split(sizes), strict=True))
    learn = learner(valid=ragged, metrics=[accuracy, MacroF1(2)])
    found = learn.validate()
    preds = learn.model(x).detach()
    f1 = MacroF1(2)
    f1.update(preds, y)
    assert found == pytest.approx(
        {
            "loss": F.cross_entropy(preds, y).item(),
            "accuracy": (preds.argmax(1) == y).float().mean().item(),
            "macro_f1": f1.compute().item(),
        },
        rel=1e-5,
    )
    assert learn.validate([(x, y)]) == pytest.approx(found, rel=1e-5)


def test_a_fit_and_a_validation_see_the_same_numbers(data, model, quiet):
    learn = Learner(model, data, metrics=[accuracy, MacroF1(3)], callbacks=[quiet])
    learn.fit(2)
    found = learn.validate()
    assert {f"valid/{k}": v for k, v in found.items()} == {
        name: learn.record.epochs.last(name) for name in learn.record.epochs if "valid/" in name
    }


def test_validation_needs_data():
    with pytest.raises(SetupError, match=r"learn.validate\(loader\)"):
        learner().validate()


def test_predictions_are_the_models_outputs_in_order(data, model, quiet):
    learn = Learner(model, data, callbacks=[quiet])
    learn.fit(1)
    model.train()
    x = torch.randn(41, 6)
    found = learn.predict(x)
    assert model.training and not found.requires_grad and found.device.type == "cpu"
    model.eval()
    torch.testing.assert_close(found, model(x).detach())
    torch.testing.assert_close(learn.predict(x.numpy()), found)
    torch.testing.assert_close(learn.predict(x[:1]), found[:1])


def test_predictions_for_a_loader_ignore_its_targets(data, model, quiet):
    learn = Learner(model, data, callbacks=[quiet])
    found = learn.predict(data.valid)
    model.eval()
    torch.testing.assert_close(found, model(data.valid.dataset.arrays[0]).detach())


def test_predictions_go_through_the_transforms_of_training():
    data = digits()
    learn = Learner(mlp(64, 10), data, callbacks=[QUIET])
    images, _ = data.valid.dataset[:7]
    [normalize] = data.transforms
    assert isinstance(normalize, Normalize)
    expected = learn.model.eval()(normalize(images)).detach()
    torch.testing.assert_close(learn.predict(images), expected)


def test_predictions_for_several_inputs():
    train = [(x, tensor(2.0), y) for x, y in batches()]
    learn = Learner(Two(), DataLoaders(train, n_inputs=2), F.cross_entropy, callbacks=[QUIET])
    found = learn.predict(train)
    expected = torch.cat([learn.model(x, scale) for x, scale, _ in train]).detach()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("items", [torch.zeros(0, 3), np.zeros((0, 3), np.float32), []])
def test_a_prediction_for_nothing_is_an_error_that_says_so(items):
    with pytest.raises(DataError):
        learner().predict(items)


# ── modes, graphs, devices ──────────────────────────────────────────────────────────────────────


def test_a_model_is_in_training_mode_for_training_alone():
    class Watch(Callback):
        def after_predict(self, learn):
            modes.append((learn.training, {m.training for m in learn.model.modules()}))
            graphs.append((learn.training, learn.preds.requires_grad, torch.is_grad_enabled()))

    modes, graphs = [], []
    model = nn.Sequential(linear(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    learn = learner(model, batches(2), batches(2))
    learn.fit(2, callbacks=[Watch()])
    assert [m for m in modes if m[0]] == [(True, {True})] * 4
    assert [m for m in modes if not m[0]] == [(False, {False})] * 4
    assert set(graphs) == {(True, True, True), (False, False, False)}
    assert not any(m.training for m in model.modules())


def test_the_model_is_left_in_evaluation_mode_after_an_error_too():
    class Fail(Callback):
        def after_step(self, learn):
            raise ValueError("spoilt")

    learn = learner()
    with pytest.raises(ValueError, match="spoilt"):
        learn.fit(1, callbacks=[Fail()])
    assert not learn.model.training and not learn.training
    assert learn.x is learn.y is learn.preds is learn.loss is None


def test_validation_keeps_no_predictions_alive():
    class Watch(Callback):
        def after_predict(self, learn):
            alive.append(sum(ref() is not None for ref in refs))
            refs.append(weakref.ref(learn.preds))

    refs, alive = [], []
    learner(train=batches(2), valid=batches(6)).fit(1, callbacks=[Watch()])
    assert max(alive) == 0


def test_a_batch_and_the_model_are_brought_to_the_device():
    learn = learner(device="cpu")
    assert learn.device == torch.device("cpu") and learn.device_reason == "as asked"
    learn.model.double()  # whatever else happens to it, it stays where it is
    assert Learner(linear(), (batches(), None), F.cross_entropy).device_reason != "as asked"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_says_so():
    reason = Learner(linear(), (batches(), None), F.cross_entropy).device_reason
    if not torch.backends.mps.is_available():
        assert reason == "no GPU that torch can use; 1 thread"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nested_batches_reach_the_gpu():
    train = [((x, tensor(2.0)), y) for x, y in batches()]
    learn = learner(Two(), train, train, device="cuda")
    learn.fit(1)
    assert next(learn.model.parameters()).is_cuda
    assert learn.predict(train).device.type == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "nonsense:0"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(SetupError, match=f"The device '{device}' cannot be used"):
        learner(device=device)


def test_the_device_is_announced_once(capsys):
    progress_module._announce.cache_clear()
    for _ in range(2):
        learn = learner(callbacks=[Progress("lines")])
        learn.fit(1)
        learn.fit(1)
    assert capsys.readouterr().out.count("training on cpu (as asked)") == 1
    progress_module._announce.cache_clear()


def test_processes_that_train_apart_are_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    progress_module._announce.cache_clear()
    learner(callbacks=[Progress("lines")]).fit(0)
    progress_module._announce.cache_clear()
    assert "2 processes were started, each of which trains a model of its own" in (
        capsys.readouterr().out
    )


# ── saving ──────────────────────────────────────────────────────────────────────────────────────


class Tied(nn.Module):
    """Two layers that share a weight, as language models do."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.outer(self.inner(x)))


@pytest.mark.parametrize("make", [linear, Tied, partial(mlp, 3, 2)])
def test_weights_are_saved_and_come_back(tmp_path, make):
    learn = learner(make(), lr=0.5)
    learn.fit(1)
    path = learn.save(tmp_path / "weights.safetensors")
    assert path == tmp_path / "weights.safetensors" and path.is_file()
    other = learner(make())
    assert not same_weights(other.model, learn.model)
    other.load(path)
    assert same_weights(other.model, learn.model)
    other.load(str(path))
    if make is Tied:
        assert other.model.outer.weight is other.model.inner.weight


def test_loaded_weights_are_trained_by_the_optimiser_that_is_there(tmp_path):
    learn = learner()
    learn.fit(1)
    path = learn.save(tmp_path / "weights.safetensors")
    expected = by_hand(copy.deepcopy(learn.model), batches())
    learn.fit(1)
    learn.load(path)
    learn.fit(1)
    assert same_weights(learn.model, expected)


def test_weights_of_another_shape_are_an_error_that_leaves_the_model_alone(tmp_path):
    path = learner(linear(3, 4)).save(tmp_path / "weights.safetensors")
    learn = learner()
    before = copy.deepcopy(learn.model)
    with pytest.raises(DataError, match="nothing was loaded"):
        learn.load(path)
    assert same_weights(learn.model, before)


# ── callbacks come and go ───────────────────────────────────────────────────────────────────────


def test_callbacks_of_a_fit_serve_that_fit_alone():
    class Count(Callback):
        n = 0

        def after_batch(self, learn):
            self.n += 1

    mine, theirs = Count(), Count()
    learn = learner(callbacks=[QUIET, mine])
    learn.fit(1, callbacks=[theirs])
    learn.fit(1)
    assert len(learn.callbacks) == 2
    assert (mine.n, theirs.n) == (8, 4)


def test_a_callback_that_validates_in_mid_epoch_does_not_disturb_the_run(data, model, quiet):
    class Validate(Callback):
        def after_step(self, learn):
            found.append(learn.validate()["accuracy"])
            assert learn.model.training and learn.training and learn.preds is not None

    def run(*callbacks):
        torch.manual_seed(3)
        data.train.epoch = 0
        learn = Learner(copy.deepcopy(model), data, metrics=[accuracy, MacroF1(3)],
                        callbacks=[quiet])  # fmt: skip
        learn.fit(2, callbacks=callbacks)
        return learn

    found = []
    plain, watched = run(), run(Validate())
    assert same_weights(plain.model, watched.model)
    assert len(found) == 10 and found[-1] == plain.record["valid/accuracy"][-1]
    for table, other in ((plain.record.batches, watched.record.batches),
                         (plain.record.epochs, watched.record.epochs)):  # fmt: skip
        assert list(table) == list(other)
        for name in set(table) - {"seconds"}:
            np.testing.assert_array_equal(table[name], other[name])


def test_a_loss_exchanged_by_a_callback_is_used_from_the_next_batch():
    class Exchange(Callback):
        changes = True

        def before_batch(self, learn):
            learn.loss_func = lambda preds, y: preds.sum() * 0 + learn.batch_index

    learn = learner()
    learn.fit(1, callbacks=[Exchange()])
    assert learn.record["train/loss"].tolist() == [0, 1, 2, 3]


def test_no_epochs_are_no_error():
    learn = learner(valid=batches())
    before = copy.deepcopy(learn.model)
    record = learn.fit(0)
    assert len(record.epochs) == 0 and same_weights(learn.model, before)


def test_a_fit_within_a_fit_is_refused():
    class Nested(Callback):
        def after_batch(self, learn):
            learn.fit(1)

    learn = learner()
    with pytest.raises(SetupError, match="running already"):
        learn.fit(1, callbacks=[Nested()])
    learn.fit(1)


def test_a_misspelt_keyword_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword"):
        learner(metric=[accuracy])
    with pytest.raises(TypeError, match="unexpected keyword"):
        learner().fit(1, callback=[])


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(SetupError, match="must be a torch module"):
        Learner(lambda x: x, (batches(), None), F.cross_entropy)


def test_a_learner_shows_what_it_is(data, model):
    assert repr(Learner(model, data, device="cpu", lr=0.25)) == (
        f"Learner(Sequential, {data!r}, lr=0.25, on cpu)"
    )


def test_a_learner_is_copied_with_its_optimiser():
    learn = learner(opt_func=partial(SGD, momentum=0.9, foreach=False), callbacks=[QUIET])
    learn.fit(1)
    twin = copy.deepcopy(learn)
    learn.fit(1)
    twin.fit(1)
    assert twin.model is not learn.model and same_weights(twin.model, learn.model)


def test_a_learner_is_freed_when_it_is_let_go(data, model, quiet):
    gc.collect()
    gc.disable()
    try:
        learn = Learner(model, data, metrics=[accuracy], callbacks=[quiet])
        learn.fit(1)
        learn.validate()
        learn.predict(torch.zeros(3, 6))
        learn.find_lr(steps=4)
        gone = weakref.ref(learn)
        del learn
        assert gone() is None
    finally:
        gc.enable()


def test_a_learner_is_freed_after_an_error_once_the_error_is_gone():
    class Fail(Callback):
        def after_loss(self, learn):
            raise ValueError("spoilt")

    gc.collect()
    gc.disable()
    try:
        learn = learner()
        with suppress(ValueError):
            learn.fit(1, callbacks=[Fail()])
        gone = weakref.ref(learn)
        del learn
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_left_hanging_on_the_model():
    model = linear()
    learn = learner(model, valid=batches(), metrics=[accuracy])
    learn.fit(1)
    gone = weakref.ref(model)
    assert all(param.grad is None for param in model.parameters())
    assert not model._forward_hooks and not model._backward_hooks
    del learn, model
    gc.collect()
    assert gone() is None


def test_an_mlp_of_digits_learns_what_it_should():
    learn = Learner(mlp(64, 10), digits(), metrics=[accuracy], callbacks=[QUIET])
    learn.fit_one_cycle(5, 0.01)
    assert learn.record["valid/accuracy"][-1] > 0.93


def test_an_mlp_of_mnist_is_right_nine_times_in_ten_after_one_epoch(real_data):
    from pellucid.data import mnist

    data = mnist(split="course", batch_size=64)
    learn = Learner(mlp(784, 10), data, opt_func=SGD, lr=0.1, metrics=[accuracy],
                    callbacks=[QUIET])  # fmt: skip
    learn.fit(1)
    total = learn.record["valid/accuracy"][0] * 10_000
    assert total > 9000 and total == pytest.approx(round(total), abs=0.01)


# ── techniques that leave the loop alone ────────────────────────────────────────────────────────


def test_gradient_clipping_is_a_callback():
    class Clip(Callback):
        changes = True

        def after_backward(self, learn):
            nn.utils.clip_grad_norm_(learn.model.parameters(), 0.05)

    learn, hand = learner(), linear()
    learn.fit(2, callbacks=[Clip()])
    opt = plain_sgd(hand.parameters(), lr=0.1)
    for _ in range(2):
        for x, y in batches():
            F.cross_entropy(hand(x), y).backward()
            nn.utils.clip_grad_norm_(hand.parameters(), 0.05)
            opt.step()
            opt.zero_grad()
    assert same_weights(learn.model, hand)
    assert not same_weights(learn.model, by_hand(linear(), batches(), 2))


def mixed(x, y, source):
    """Return a batch mixed with its own shuffle, and the loss of it."""
    share = np.float32(source.beta(0.4, 0.4))
    order = torch.from_numpy(source.permutation(len(x)))

    def loss(preds, _):
        one, other = F.cross_entropy(preds, y), F.cross_entropy(preds, y[order])
        return share * one + (1 - share) * other

    return share * x + (1 - share) * x[order], loss


def test_mixup_is_a_callback():
    class MixUp(Callback):
        changes = True

        def __init__(self):
            self.source = np.random.default_rng(7)

        def before_batch(self, learn):
            if learn.training:
                learn.x, self.loss = mixed(learn.x, learn.y, self.source)

        def after_loss(self, learn):
            if learn.training:
                learn.loss = self.loss(learn.preds, learn.y)

    learn, hand = learner(valid=batches(2)), linear()
    learn.fit(2, callbacks=[MixUp()])
    opt, source = plain_sgd(hand.parameters(), lr=0.1), np.random.default_rng(7)
    for _ in range(2):
        for x, y in batches():
            x, loss = mixed(x, y, source)
            loss(hand(x), y).backward()
            opt.step()
            opt.zero_grad()
    assert same_weights(learn.model, hand)
    expected = np.mean([F.cross_entropy(hand(x), y).item() for x, y in batches(2)])
    assert learn.record["valid/loss"][-1] == pytest.approx(expected)


class GAN(nn.Module):
    """A generator and a critic; the one that is trained answers."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(2, 3), nn.Linear(3, 1)
        self.generates = False

    def forward(self, real, noise):
        if self.generates:
            return self.critic(self.generator(noise))
        with torch.no_grad():
            fake = self.generator(noise)
        return self.critic(fake) - self.critic(real)


class GANTraining(Callback):
    """Five steps for the critic, one for the generator, each with its own optimiser."""

    changes = True
    order = -20

    def before_fit(self, learn):
        model = learn.model
        self.critic = SGD(model.critic.parameters(), lr=0.01)
        self.generator = SGD(model.generator.parameters(), lr=0.05)
        self.updates, self.moved = [], []
        self.before = copy.deepcopy(model.state_dict())

    def before_batch(self, learn):
        model = learn.model
        model.generates = learn.batch_index % 6 == 5
        model.generator.requires_grad_(model.generates)
        model.critic.requires_grad_(not model.generates)
        learn.opt = self.generator if model.generates else self.critic
        learn.x = learn.x, torch.randn(len(learn.x), 2)

    def after_step(self, learn):
        self.updates.append("generator" if learn.model.generates else "critic")
        state = copy.deepcopy(learn.model.state_dict())
        changed = {n.split(".")[0] for n in state if not torch.equal(state[n], self.before[n])}
        self.moved.append(changed)
        self.before = state
        if not learn.model.generates:
            with torch.no_grad():
                for param in learn.model.critic.parameters():
                    param.clamp_(-0.5, 0.5)
            self.before = copy.deepcopy(learn.model.state_dict())


def test_a_gan_with_two_optimisers_is_a_callback():
    def critic_or_generator(preds):
        return -preds.mean() if model.generates else preds.mean()

    model, gan = GAN(), GANTraining()
    real = [torch.randn(8, 3) + 2 for _ in range(12)]
    learn = learner(model, real, loss_func=critic_or_generator)
    learn.fit(2, callbacks=[gan])
    assert gan.updates == (["critic"] * 5 + ["generator"]) * 4
    assert gan.moved == ([{"critic"}] * 5 + [{"generator"}]) * 4
    assert learn.step == 24
    assert math.isfinite(learn.record["train/loss"][-1])
