"""foundations: a Learner trains their models unchanged, as it does torch's."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from pellucid import CancelFit, DataLoaders, Learner
from pellucid.callbacks import Best, Debug, OneCycle, Progress
from pellucid.errors import DataError, SetupError
from pellucid.foundations import (
    LAMB,
    SGD,
    AdamW,
    BatchNorm,
    Conv2d,
    DataLoader,
    Dataset,
    Flatten,
    Linear,
    MaxPool2d,
    Module,
    ReLU,
    Sequential,
    cross_entropy,
)
from pellucid.metrics import accuracy


class PlainLinear(nn.Linear):
    """Torch's Linear with the product and the sum in two steps, as ours has them."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


def mlp(linear, relu, sequential, bias=True):
    return sequential(linear(6, 20, bias), relu(), linear(20, 3, bias))


def cnn():
    return Sequential(
        Conv2d(1, 8, 3, padding=1, bias=False),
        BatchNorm(8),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(32, 3),
    )


def torchs_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def pictures(dtype=torch.float32):
    x, y = torch.randn(58, 1, 4, 4, dtype=dtype), torch.randint(3, (58,))
    return DataLoaders.from_arrays((x[:38], y[:38]), (x[38:], y[38:]), batch_size=8, classes=3)


def learner(model, data, opt_func=AdamW, **more):
    callbacks = [Progress("off"), *more.pop("callbacks", [])]
    return Learner(model, data, opt_func=opt_func, device="cpu", callbacks=callbacks, **more)


def assert_trained_alike(ours, theirs, data, opt_funcs, **tolerance):
    ours.load_state_dict(theirs.state_dict())
    begin = copy.deepcopy(ours.state_dict())
    learners = [
        learner(model, copy.deepcopy(data), opt_func, metrics=[accuracy])
        for model, opt_func in zip((ours, theirs), opt_funcs, strict=True)
    ]
    for learn in learners:
        learn.fit(3, lr=0.05)
    states = ours.state_dict(), dict(theirs.state_dict())
    torch.testing.assert_close(*states, **(tolerance or {"rtol": 0, "atol": 0}))
    assert not torch.equal(states[0]["0.weight"], begin["0.weight"])
    rows = [learn.record.epochs[-1] for learn in learners]
    for name in set(rows[0]) - {"seconds"}:
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5)


# ── the same weights ──────────────────────────────────────────────────────────────────────────

TORCHS = {
    "AdamW": torch.optim.AdamW,
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01, foreach=False),
}


@pytest.mark.parametrize("opt_func", TORCHS.values(), ids=TORCHS)
def test_an_mlp_gets_the_weights_of_torchs_to_the_bit(opt_func, data):
    ours, same = mlp(Linear, ReLU, Sequential), mlp(PlainLinear, nn.ReLU, nn.Sequential)
    assert_trained_alike(ours, same, data, [opt_func, opt_func])
    ours, same = mlp(Linear, ReLU, Sequential, False), mlp(nn.Linear, nn.ReLU, nn.Sequential, False)
    assert_trained_alike(ours, same, data, [opt_func, opt_func])


def test_with_torchs_own_linear_it_gets_them_within_rounding(data):
    ours, theirs = mlp(Linear, ReLU, Sequential), mlp(nn.Linear, nn.ReLU, nn.Sequential)
    assert_trained_alike(ours, theirs, data, [TORCHS["SGD"]] * 2, rtol=1e-5, atol=1e-5)


def test_our_sgd_gets_the_weights_of_torchs_to_the_bit(data):
    ours, same = mlp(Linear, ReLU, Sequential), mlp(PlainLinear, nn.ReLU, nn.Sequential)
    own = partial(SGD, momentum=0.9, weight_decay=0.01)
    assert_trained_alike(ours, same, data, [own, TORCHS["SGD"]])
    # and it trains torch's models as well as ours
    assert_trained_alike(same, copy.deepcopy(same), data, [own, TORCHS["SGD"]])


@pytest.mark.parametrize("opt_func", [AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_a_convolutional_model_with_batchnorm_gets_those_of_torchs(opt_func):
    ours, theirs = cnn().to(torch.float64), torchs_cnn().double()
    data, opt_funcs = pictures(torch.float64), [opt_func, torch.optim.AdamW]
    assert_trained_alike(ours, theirs, data, opt_funcs, rtol=1e-9, atol=1e-9)


def test_a_foundations_loader_and_loss_serve_too():
    torch.manual_seed(3)
    x = torch.randn(300, 6)
    y = x[:, :3].argmax(1)
    train = DataLoader(Dataset(x[:200], y[:200]), 16, shuffle=True)
    pair = train, DataLoader(Dataset(x[200:], y[200:]), 32)
    model = mlp(Linear, ReLU, Sequential)
    learn = learner(model, pair, AdamW, loss_func=cross_entropy, metrics=[accuracy])
    record = learn.fit(15, lr=0.01)
    assert record.epochs[-1]["valid/accuracy"] > 0.85
    assert learn.validate()["accuracy"] == pytest.approx(record.epochs[-1]["valid/accuracy"])


@pytest.mark.parametrize("opt_func", [partial(SGD, momentum=0.9), AdamW, LAMB])
def test_schedules_reach_our_optimisers(opt_func):
    heard = []
    group = Debug("after_step", lambda learn: heard.append(dict(learn.opt.param_groups[0])))
    learn = learner(cnn(), pictures(), opt_func)
    learn.fit(2, callbacks=[OneCycle(0.05), group])
    assert len({g["lr"] for g in heard}) > 5
    momenta = {g["momentum"] if "momentum" in g else g["betas"][0] for g in heard}
    assert len(momenta) > 5 and 0.85 <= min(momenta) < max(momenta) <= 0.95
    assert learn.record.batches["momentum"][0] == pytest.approx(0.95)


# ── looks leave no trace ──────────────────────────────────────────────────────────────────────


class Drifting(Module):
    """Gives its buffer a new tensor in every forward pass, in evaluation too."""

    def __init__(self):
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x):
        self.passes = self.passes + 1
        return x


def everything(learn):
    state = copy.deepcopy(learn.model.state_dict())
    memory = [copy.deepcopy(dict(kept)) for kept in learn.opt.state.values()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups]
    modes = [module.training for module in learn.model.modules()]
    hooks = [len(module._forward_hooks) for module in learn.model.modules()]
    grads = [p.grad for p in learn.model.parameters()]
    tensors = [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]
    numbers = torch.get_rng_state()
    return state, memory, groups, modes, hooks, grads, tensors, numbers, len(learn.record.batches)


LOOKS = {
    "find_lr": lambda learn: learn.find_lr(steps=20),
    "validate": lambda learn: learn.validate(),
    "predict": lambda learn: learn.predict(torch.ones(5, 1, 4, 4)),
    "trace": lambda learn: learn.trace(2),
}


@pytest.mark.parametrize("opt_func", [AdamW, torch.optim.AdamW], ids=["our AdamW", "torch's"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_look_leaves_no_trace(look, opt_func):
    learn = learner(Sequential(Drifting(), cnn()), pictures(), opt_func)
    learn.fit(1)
    learn.model.train()
    learn.model.layers[1].layers[0].eval()
    before = everything(learn)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    LOOKS[look](learn)
    assert torch.equal(torch.get_rng_state(), random)
    after = everything(learn)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    assert before[2:7] == after[2:7] and before[8] == after[8]


def test_predictions_are_the_models():
    learn = learner(cnn(), pictures())
    x = torch.randn(5, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(learn.predict(x), learn.model.eval()(x))


# ── files, copies, errors ─────────────────────────────────────────────────────────────────────


def test_weights_are_saved_and_loaded_also_to_and_from_torchs_model(tmp_path):
    data = pictures()
    learn = learner(cnn(), data)
    learn.fit(1)
    path = learn.save(tmp_path / "weights.safetensors")
    for model in (cnn(), torchs_cnn()):
        other = learner(model, data)
        other.load(path)
        ours, theirs = learn.model.state_dict(), dict(other.model.state_dict())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert learn.validate() == pytest.approx(other.validate(), abs=1e-5)
    path = other.save(tmp_path / "torchs.safetensors")
    learner(cnn(), pictures()).load(path)
    with pytest.raises(DataError, match=r"0\.bias in the file alone;.*and \d more"):
        learner(mlp(Linear, ReLU, Sequential, False), pictures()).load(with_other_names(tmp_path))


def with_other_names(tmp_path):
    model = Sequential(Linear(6, 20), ReLU(), ReLU(), Linear(20, 3))
    return learner(model, pictures()).save(tmp_path / "others.safetensors")


def test_shared_weights_are_saved_once_and_come_back_shared(tmp_path):
    def tied():
        one, two = Linear(6, 6), Linear(6, 3)
        return Sequential(one, ReLU(), one, two)

    learn, other = learner(tied(), pictures()), learner(tied(), pictures())
    other.load(learn.save(tmp_path / "w.safetensors"))
    assert other.model.layers[0] is other.model.layers[2]
    assert torch.equal(learn.model.layers[2].weight, other.model.layers[2].weight)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_learner_copies_and_the_copy_trains_alike(way):
    learn = learner(cnn(), pictures(), callbacks=[Best("valid/loss")])
    learn.fit(1)
    twin = way(learn)
    for one in (learn, twin):
        torch.manual_seed(1)
        one.fit(2)
    ours, theirs = learn.model.state_dict(), twin.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_layer_that_was_exchanged_is_noticed():
    learn = learner(cnn(), pictures())
    learn.fit(1)
    learn.model.layers[5] = Linear(32, 3)
    with pytest.raises(SetupError, match=r"unfrozen or exchanged(?s:.*)saw: 5\.weight, 5\.bias"):
        learn.fit(1)
    learn.reset_optimizer()
    learn.fit(1)


def test_frozen_parameters_stay():
    model = cnn()
    for p in model.layers[0].parameters():
        p.requires_grad_(False)
    before = model.layers[0].weight.clone()
    learner(model, pictures()).fit(1, lr=0.1)
    assert torch.equal(model.layers[0].weight, before)
    assert model.layers[0].weight.grad is None


def test_a_cancelled_fit_leaves_no_gradients_and_goes_on():
    def stop(learn):
        raise CancelFit

    learn = learner(cnn(), pictures())
    learn.fit(1, callbacks=[Debug("after_backward", stop)])
    assert all(p.grad is None for p in learn.model.parameters())
    learn.fit(1)


@pytest.mark.parametrize("thing", [Linear, nn.Linear, torch.ones(2), len, None])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(SetupError, match=r"The model must be a torch module\."):
        Learner(thing, pictures())


def test_an_error_in_a_model_of_ours_is_explained():
    learn = learner(Sequential(Flatten(), Linear(17, 3)), pictures())
    with pytest.raises(RuntimeError) as caught:
        learn.fit(1)
    assert "a Linear layer expects another number of features" in caught.value.__notes__[-1]
    with pytest.raises(SetupError, match="must return a torch optimiser"):
        learner(cnn(), pictures(), lambda params, lr: list(params)).fit(1)
    with pytest.raises(SetupError, match="no parameters to train"):
        learner(Sequential(Flatten()), pictures()).fit(1)
