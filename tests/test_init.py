"""Initial weights: the formulas, LSUV on any model, Fixup at any depth, a study without trace."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD

from pellucid import Callback, CancelStep, Learner
from pellucid.callbacks import LSUV, Progress
from pellucid.errors import DataError, SetupError, UnknownName
from pellucid.init import (
    fans,
    fixup,
    init_kaiming,
    init_orthogonal,
    init_xavier,
    lsuv,
    study_init,
)
from pellucid.nn import GeneralReLU, Residual, RunningBatchNorm, gain_of
from pellucid.vision import simple_cnn, small_resnet, xresnet, xresnet18


def bits(model):
    return [value.numpy().tobytes() for value in model.state_dict().values()]


def seeded(make, seed=1):
    torch.manual_seed(seed)
    return make()


# ── by formula ────────────────────────────────────────────────────────────────────────────────

LAYERS = [
    lambda: nn.Linear(20, 30),
    lambda: nn.Conv1d(6, 10, 3),
    lambda: nn.Conv2d(6, 10, (3, 5)),
    lambda: nn.Conv3d(6, 10, 3),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("fan", ["in", "out"])
@pytest.mark.parametrize("uniform", [False, True])
def test_kaiming_draws_what_torch_draws(make, fan, uniform):
    torchs = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
    for a in (0.0, 0.1, 5**0.5):
        layer, other = make(), make()
        torch.manual_seed(1)
        init_kaiming(layer, a, uniform=uniform, fan=fan)
        torch.manual_seed(1)
        torchs(other.weight, a, mode=f"fan_{fan}")
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-6, atol=0)
        assert not layer.bias.any()


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("uniform", [False, True])
def test_xavier_draws_what_torch_draws(make, uniform):
    layer, other = make(), make()
    torch.manual_seed(1)
    init_xavier(layer, 1.5, uniform)
    torch.manual_seed(1)
    (nn.init.xavier_uniform_ if uniform else nn.init.xavier_normal_)(other.weight, 1.5)
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-6, atol=0)
    assert not layer.bias.any()


@pytest.mark.parametrize("make", [*LAYERS, lambda: nn.Linear(30, 20)])
def test_orthogonal_weights_keep_lengths(make):
    layer = make()
    init_orthogonal(layer, gain=2.0)
    matrix = layer.weight.flatten(1) / 2
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    assert not layer.bias.any()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind, kernel", [(nn.Conv1d, (5,)), (nn.Conv2d, (3, 2)),
                                          (nn.ConvTranspose1d, (4,)),
                                          (nn.ConvTranspose2d, (3, 3))])  # fmt: skip
def test_fans_are_how_many_values_meet(kind, kernel, groups):
    layer = kind(6, 12, kernel, groups=groups)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.ones(1, 6, *[12] * len(kernel), requires_grad=True)
    out = layer(x)  # away from the borders: how many ones were added
    out.sum().backward()
    assert fans(layer) == (out.max(), x.grad.max())


def test_the_lessons_fans_and_gains():
    assert fans(nn.Conv2d(1, 32, 5)) == (25, 800)
    assert fans(nn.Linear(784, 50)) == (784, 50)
    layer = nn.Linear(400, 400)
    for a, gain in ((1, 1), (0, 1.414214), (0.1, 1.407195), (5**0.5, 0.577350)):
        init_kaiming(layer, a)
        assert layer.weight.std().item() == pytest.approx(gain / 20, rel=0.01)


def test_all_layers_are_set_and_nothing_else():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Sequential(shared, nn.BatchNorm1d(4), shared), nn.LSTM(4, 4)
    )
    nn.init.ones_(shared.bias)
    before = copy.deepcopy(model.state_dict())
    init_kaiming(model)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    shared_names = {"1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"}
    assert same == set(before) - shared_names
    torch.manual_seed(0)
    init_kaiming(model)
    torch.manual_seed(0)
    assert torch.equal(shared.weight, torch.randn(4, 4) * math.sqrt(2 / 4))  # drawn once


@pytest.mark.parametrize("init", [init_kaiming, init_xavier, init_orthogonal])
def test_torchs_attention_keeps_what_it_has(init):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    nn.init.ones_(model.self_attn.out_proj.bias)
    before = copy.deepcopy(model.self_attn.state_dict())
    init(model)
    torch.testing.assert_close(model.self_attn.state_dict(), before, rtol=0, atol=0)
    x = torch.randn(4, 5, 8)
    report, study = lsuv(model, x), study_init(model, x)
    assert list(report.before) == [layer.name for layer in study.layers] == ["linear1", "linear2"]
    assert not report.left and not study.unreached
    with pytest.raises(SetupError, match="no Linear and no convolution"):
        init(model.self_attn)


@pytest.mark.parametrize("init", [init_kaiming, init_xavier, init_orthogonal])
def test_low_precision_and_parametrized_weights_are_set(init):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = nn.Linear(50, 60, dtype=dtype)
        init(layer)
        assert layer.weight.dtype == dtype and layer.weight.isfinite().all()
    layer = parametrizations.weight_norm(nn.Linear(50, 60))
    plain = nn.Linear(50, 60)
    seeded(lambda: init(layer))
    seeded(lambda: init(plain))
    torch.testing.assert_close(layer.weight, plain.weight)


@pytest.mark.parametrize("init", [init_kaiming, init_xavier, init_orthogonal, fixup])
def test_what_cannot_be_set_is_refused(init):
    with pytest.raises(SetupError, match=r"no Linear and no convolution|no residual"):
        init(nn.Sequential(nn.ReLU()))
    if init is not fixup:
        with pytest.raises(SetupError, match="size of 0 is not known"):
            init(nn.Sequential(nn.LazyLinear(3)))
        pruned = nn.Sequential(prune.identity(nn.Linear(3, 3), "weight"))
        with pytest.raises(SetupError, match="weight of 0 cannot be set: a hook"):
            init(pruned)


def test_an_unknown_fan_is_refused():
    with pytest.raises(UnknownName, match="fan_in"):
        init_kaiming(nn.Linear(2, 2), fan="fan_in")


def deep_mlp(depth, width=64):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def test_kaiming_keeps_the_signal_through_depth_and_torchs_default_does_not():
    x = torch.randn(200, 1, 28, 28)
    ratios = []
    for seed in range(5):
        model = seeded(lambda: simple_cnn(1, 10, (8, 16, 32, 32), 5)[:-3], seed)
        default = model(x).std()
        init_kaiming(model, uniform=True)
        ratios.append((model(x).std() / default).item())
    assert min(ratios) > 5
    model, x = deep_mlp(50), torch.randn(200, 64)
    assert not model(x).std(0).max() > 1e-3
    init_kaiming(model)
    assert 0.1 < model(x).square().mean().sqrt() < 10
    selu = nn.Sequential(*[p for _ in range(50) for p in (nn.Linear(64, 64), nn.SELU())])
    init_kaiming(selu, a=1)
    assert 0.7 < selu(x).std() < 1.4


# ── LSUV ──────────────────────────────────────────────────────────────────────────────────────


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.late = nn.Linear(8, 3)  # defined first, called last
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.block = Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))

    def forward(self, x):
        return self.late(self.block(self.left(x).relu() * self.right(x).tanh()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.enter, self.head = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = x.new_zeros(len(x), 8)
        for _ in range(5):
            hidden = (self.step(hidden) + self.enter(x)).relu()
        return self.head(hidden)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.view(-1, 3, 2)))[:, 0])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)),
    "deep": lambda: nn.Sequential(nn.Linear(6, 64), *deep_mlp(100)),
    "batch norm and dropout": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    ),
    "running batch norm": lambda: nn.Sequential(
        nn.Linear(6, 8), RunningBatchNorm(8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "branches": Branches,
    "shared": Recurrent,
    "transformer": Transformer,
    "cnn": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), simple_cnn(1, 3, act=GeneralReLU)),
    "resnet": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), small_resnet(1, 3, (4, 8), 1)),
    "1-d and transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.ConvTranspose1d(4, 3, 2, bias=False)
    ),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "a layer alone": lambda: nn.Linear(6, 3),
}  # fmt: skip


def measured(model, x):
    """Measure mean and sd of each layer's output over all its calls, as training would see it."""
    calls, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)):
            keep = calls.setdefault(name, [])
            handles.append(module.register_forward_hook(lambda m, i, out, k=keep: k.append(out)))
    twin, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        model.train()(x)
    model.load_state_dict(twin)
    torch.set_rng_state(state)
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat([o.flatten() for o in outs]) for name, outs in calls.items() if outs}
    return {name: (v.mean().item(), v.std(correction=0).item()) for name, v in joined.items()}


@pytest.mark.parametrize("name", MODELS)
def test_lsuv_brings_every_layer_to_mean_0_and_sd_1(name):
    model, x = MODELS[name](), torch.randn(64, 6) * 3 + 1
    report = lsuv(model, x)
    found = measured(model, x)
    assert found
    for layer, (mean, sd) in found.items():
        assert sd == pytest.approx(1, abs=2e-3), layer
        if model.get_submodule(layer).bias is not None:
            assert mean == pytest.approx(0, abs=2e-3), layer
    assert list(report.after) == list(report.before)
    for layer, (mean, sd) in found.items():
        assert report.after[layer].mean == pytest.approx(mean, abs=1e-4)
        assert report.after[layer].sd == pytest.approx(sd, abs=1e-4)
    assert not report.left


def test_lsuv_sets_in_the_order_of_the_calls_in_one_pass_and_checks_in_a_second():
    model = Branches()
    report = lsuv(model, torch.randn(64, 6))
    assert list(report.before) == ["left", "right", "block.body.0", "block.body.2", "late"]
    assert report.passes == 2
    assert lsuv(MODELS["deep"](), torch.randn(64, 6)).passes == 2


@pytest.mark.parametrize("name", MODELS)
def test_lsuv_a_second_time_changes_no_bit(name):
    model, x = MODELS[name](), torch.randn(64, 6)
    lsuv(model, x)
    before = bits(model)
    assert lsuv(model, x).passes == 1
    assert bits(model) == before


def test_lsuv_keeps_the_directions_of_the_weights():
    model = MODELS["mlp"]()
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    lsuv(model, torch.randn(64, 6))
    for layer, weight in zip((model[0], model[2]), before, strict=True):
        ratio = layer.weight / weight
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    n=st.integers(2, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_lsuv_on_any_mlp_sets_or_names_every_layer(widths, n, scale):
    torch.manual_seed(0)
    sizes = [3, *widths]
    pairs = zip(sizes, widths, strict=False)
    model = nn.Sequential(*[part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = lsuv(model, torch.randn(n, 3) * scale)
    for name, output in report.after.items():
        good = abs(output.sd - 1) < 2e-3 and abs(output.mean) < 2e-3
        assert good or name in report.left
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", ["batch norm and dropout", "running batch norm"])
def test_lsuv_changes_weights_and_nothing_else(name, mode):
    model = MODELS[name]().train(mode)
    model[1].eval()
    x = torch.randn(64, 6)
    model(x).sum().backward()
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    gradients = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    lsuv(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])
    for param, grad, values in gradients:
        assert param.grad is grad and torch.equal(grad, values) and param.requires_grad
    norm = model[1]
    assert torch.equal(norm.weight, torch.ones(8)) and torch.equal(norm.bias, torch.zeros(8))


def test_lsuv_takes_several_inputs():
    left, right = torch.randn(64, 6), torch.randn(64, 2) * 9
    for x in ((left, right), {"left": left, "right": right}):
        report = lsuv(TwoInputs(), x)
        assert set(report.after) == {"a", "b"}
        assert all(output.sd == pytest.approx(1, abs=1e-3) for output in report.after.values())


def test_lsuv_names_what_it_leaves_and_divides_by_no_zero():
    model = nn.ModuleDict(
        {"used": nn.Linear(6, 6), "frozen": nn.Linear(6, 6), "head": nn.Linear(6, 3)}
    )
    model.forward = lambda x: model["head"](model["frozen"](model["used"](x)))
    model["unused"] = nn.Linear(6, 6)
    model["frozen"].requires_grad_(False)
    nn.init.zeros_(model["head"].weight)
    before = copy.deepcopy(model.state_dict())
    report = lsuv(model, torch.randn(64, 6))
    assert report.left == {
        "frozen": "frozen", "head": "its weights are zero", "unused": "not reached"
    }  # fmt: skip
    for name in report.left:
        assert torch.equal(model[name].weight, before[f"{name}.weight"])
    assert report.after["used"].sd == pytest.approx(1, abs=1e-3)
    text = str(report)
    assert "not reached" in text and "its weights are zero" in text
    assert "3 layers in 2 passes; frozen: frozen; head" in repr(report)
    assert pickle.loads(pickle.dumps(report)) == report


class Dies(nn.Module):
    def forward(self, x):
        return (x - 100).relu()


def test_lsuv_warns_of_a_layer_behind_a_dead_one():
    model = nn.Sequential(nn.Linear(6, 6), Dies(), nn.Linear(6, 3))
    before = model[2].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"could not set 2 \(constant output\)") as caught:
        report = lsuv(model, torch.randn(64, 6))
    assert caught[0].filename == __file__
    assert report.left == {"2": "constant output"}
    assert torch.equal(model[2].weight, before)


def test_lsuv_says_when_it_did_not_get_there():
    # whatever is done to its weight, it is of norm 1
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6, bias=False)))
    with pytest.warns(UserWarning, match=r"could not set 0 \(off after 3 passes\)"):
        report = lsuv(model, torch.randn(64, 6) * 0.1, max_passes=3)
    assert report.passes == 3
    assert report.left == {"0": "off after 3 passes"}


@pytest.mark.parametrize("fault", ["batch", "weights", "model", "Ctrl-C"])
def test_lsuv_that_fails_changes_nothing(fault):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    error = {"model": RuntimeError("broken"), "Ctrl-C": KeyboardInterrupt()}.get(fault)
    calls = iter(range(2))
    if fault == "batch":
        x[3, 2] = math.nan
    elif fault == "weights":
        model[2].weight.data[1, 1] = math.inf
    else:

        def fail(module, inputs):
            if next(calls, None) == 1:
                raise error

        hook = model[3].register_forward_pre_hook(fail)
    before, state = bits(model), torch.get_rng_state()
    expected = DataError if error is None else type(error)
    with pytest.raises(expected) as caught:
        lsuv(model, x)
    if error is None:
        at = {"batch": "0", "weights": "2"}[fault]
        assert f"the output of {at} is not finite" in str(caught.value)
        assert "float32 64×6" in str(caught.value)
    else:
        assert caught.value is error
        hook.remove()
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_lsuv_cures_weights_under_which_the_signal_overflows():
    model = deep_mlp(60)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0, 100)
    x = torch.randn(64, 64)
    assert not model(x).isfinite().all()
    report = lsuv(model, x)
    assert report.left == {}
    assert model(x).isfinite().all()


def test_lsuv_refuses_what_cannot_work():
    class Bypassed(nn.Linear):
        pass

    model = Bypassed(6, 3)
    wrapper = nn.Sequential(model)
    wrapper.forward = lambda x: F.linear(x, model.weight)
    with pytest.raises(SetupError, match="reached no Linear"):
        lsuv(wrapper, torch.randn(4, 6))
    with pytest.raises(SetupError, match="no Linear and no convolution"):
        lsuv(nn.ReLU(), torch.randn(4, 6))
    for wrong in ({"tol": 0}, {"tol": 2}, {"max_passes": 0}):
        with pytest.raises(SetupError, match="lsuv needs"):
            lsuv(model, torch.randn(4, 6), **wrong)


@pytest.mark.parametrize("look", [lsuv, study_init])
def test_a_batch_that_the_model_cannot_take_is_told_with_where_to_find_one(look):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        look(simple_cnn(1, 10), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    assert "saw: uint8 4×1×8×8" in caught.value.__notes__[0]
    assert "one_batch()" in caught.value.__notes__[0]


def test_a_study_takes_a_batch_and_no_loader():
    with pytest.raises(SetupError, match=r"takes one batch(.|\n)*one_batch\(\)"):
        study_init(simple_cnn(1, 10), iter([torch.zeros(4, 1, 8, 8)]))


def test_a_deep_net_learns_after_lsuv_and_not_before():
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    losses = []
    for init in (lambda model: None, lambda model: lsuv(model, x)):
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 64), *deep_mlp(20), nn.Linear(64, 3)))
        init(model)
        opt = SGD(model.parameters(), 0.03)
        for _ in range(40):
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[1] < 0.7 * losses[0]


# ── the callback ──────────────────────────────────────────────────────────────────────────────


class FirstBatch(Callback):
    """Keep the batch and the weights of each step until the first two are taken."""

    order = 96

    def __init__(self):
        self.seen = []

    def before_batch(self, learn):
        if learn.training:
            self.seen.append((learn.x.clone(), copy.deepcopy(learn.model.state_dict())))


class Stretch(Callback):
    """Change the batch, later than any of ours does."""

    order = 80
    changes = True

    def before_batch(self, learn):
        learn.x = learn.x * 10


def test_the_callback_acts_before_the_first_step_on_the_batch_the_model_gets(data, model):
    model[3].p = 0.0  # else the masks would differ
    data.transforms.append(lambda x: x * 5 + 7)
    first = FirstBatch()
    acting = LSUV()
    callbacks = [acting, first, Stretch(), Progress("off")]
    learn = Learner(model, data, callbacks=callbacks, device="cpu")
    assert acting.report is None
    start = copy.deepcopy(model.state_dict())
    learn.fit(1)
    (x, state), *_ = first.seen
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    assert x.std() > 10
    torch.testing.assert_close(twin[0](x).std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    # with the callback or by hand: the same bits
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(start)
    report = lsuv(by_hand, x)
    assert bits(by_hand) == [value.numpy().tobytes() for value in state.values()]
    assert acting.report == report


def test_the_callback_leaves_a_learner_that_has_trained_alone(data, model, quiet):
    learn = Learner(model, data, callbacks=[quiet], device="cpu")
    learn.fit(1)
    twin = copy.deepcopy(learn)
    late = LSUV()
    for one, callbacks in ((learn, [late]), (twin, [])):
        torch.manual_seed(3)
        one.fit(1, callbacks=callbacks)
    assert bits(learn.model) == bits(twin.model)
    assert late.report is None


def test_the_callback_acts_once_however_many_batches_a_step_takes(data, model, quiet):
    class Gather(Callback):
        changes = True

        def after_backward(self, learn):
            if learn.batch_index % 2 == 0:
                raise CancelStep

    class Reports(Callback):
        order = 96

        def before_batch(self, learn):
            if learn.training:
                self.found = {*vars(self).get("found", ()), id(acting.report)}

    acting, reports = LSUV(), Reports()
    learn = Learner(model, data, callbacks=[acting, Gather(), reports, quiet], device="cpu")
    learn.fit(2)
    assert len(reports.found) == 1
    assert acting.report.left == {}


def test_looks_go_through_the_callback_and_leave_no_trace(data, model, quiet):
    acting = LSUV()
    learn = Learner(model, data, callbacks=[acting, quiet], device="cpu")
    before = bits(model)
    learn.validate()
    learn.find_lr(steps=5)
    learn.trace(2)
    assert bits(model) == before
    assert acting.report is None
    learn.fit(1)
    assert acting.report is not None


# ── Fixup ─────────────────────────────────────────────────────────────────────────────────────


def residual_mlp(n_branches, width=8, per_branch=2):
    def body():
        inner = [p for _ in range(per_branch - 1) for p in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*inner, nn.Linear(width, width))

    blocks = [Residual(body()) for _ in range(n_branches)]
    return nn.Sequential(nn.Linear(6, width), *blocks, nn.Linear(width, 3))


@pytest.mark.parametrize("per_branch", [1, 2, 3])
def test_fixup_scales_branches_and_begins_their_ends_and_the_head_at_zero(per_branch):
    model = residual_mlp(16, 64, per_branch)
    fixup(model)
    assert not model[-1].weight.any()
    for block in model[1:-1]:
        *inner, last = block.body[::2]
        assert not last.weight.any()
        for layer in inner:
            sd = math.sqrt(2 / 64) * 16 ** (-1 / (2 * per_branch - 2))
            assert layer.weight.std().item() == pytest.approx(sd, rel=0.05)
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(2 / 6), rel=0.15)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_fixup_fits_our_residual_networks_without_norms():
    model = xresnet(1, 10, (2, 2), 4, (8, 16), norm=None)
    fixup(model)
    x = torch.randn(4, 1, 28, 28)
    for _ in range(2):
        F.cross_entropy(model(x), torch.arange(4)).backward()
        SGD(model.parameters(), 0.1).step()
    assert model(x).isfinite().all() and model(x).any()


def test_fixup_trains_thousands_of_layers_where_kaiming_overflows():
    x = torch.randn(32, 6)
    y = x[:, :3].argmax(1)
    model = residual_mlp(1_000, 4)
    init_kaiming(model)
    with torch.no_grad():
        assert not model(x).isfinite().all()
    fixup(model)
    opt, losses = SGD(model.parameters(), 0.03), []
    for _ in range(6):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert losses == sorted(losses, reverse=True)


def test_fixup_takes_the_branches_of_any_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(Block(), Block())
    with pytest.raises(SetupError, match=r"branches=\[block.body"):
        fixup(model)
    fixup(model, [block.inner for block in model])
    x = torch.randn(3, 6)
    assert torch.equal(model(x), x)


def test_fixup_tells_why_not():
    with pytest.raises(SetupError, match=r"(?s)without normalisation.*1: BatchNorm2d.*norm=None"):
        fixup(small_resnet(1, 10))
    with pytest.raises(SetupError, match=r"RunningBatchNorm.*and \d+ more"):
        fixup(xresnet18(1, 10, (4, 4, 4, 4), norm=RunningBatchNorm))
    with pytest.raises(SetupError, match="no residual branches"):
        fixup(deep_mlp(3))
    model = residual_mlp(2)
    with pytest.raises(SetupError, match="share no layers"):
        fixup(model, [model[1].body, model[1].body])


# ── the study ─────────────────────────────────────────────────────────────────────────────────


def test_the_study_has_the_right_numbers(model):
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    model[3].p = 0.0
    study = study_init(model, (x, y), F.cross_entropy)
    first, last = study.layers
    out = model[0](x)
    assert (first.name, first.kind, last.name) == ("0", "Linear", "4")
    assert first.mean == pytest.approx(out.mean().item(), abs=1e-6)
    assert first.sd == pytest.approx(out.std(correction=0).item(), rel=1e-5)
    F.cross_entropy(model(x), y).backward()
    for layer, module in ((first, model[0]), (last, model[4])):
        assert layer.weight_sd == pytest.approx(module.weight.std(correction=0).item(), rel=1e-5)
        assert layer.grad_sd == pytest.approx(module.weight.grad.std(correction=0).item(), rel=1e-4)


def test_the_study_without_a_loss_sends_noise_back_and_repeats_itself(model):
    x = torch.randn(4000, 6)
    one, again = study_init(model, x), study_init(model, (x, None))
    assert one == again
    # a last layer's gradient is the mean of (noise × input): sd = rms of its inputs / sqrt(n)
    line = nn.Linear(6, 200, bias=False)
    [only] = study_init(line, x).layers
    assert only.grad_sd == pytest.approx(1 / math.sqrt(4000), rel=0.05)


def test_the_study_takes_several_inputs_and_any_outputs():
    class Outputs(TwoInputs):
        def forward(self, left, right):
            return {"a": self.a(left), "b": (self.b(right), right)}

    left, right = torch.randn(8, 6), torch.randn(8, 2)
    for batch in ((left, right, left), {"left": left, "right": right, "y": left}):
        study = study_init(Outputs(), batch, n_inputs=2)
        assert [layer.name for layer in study.layers] == ["a", "b"]
        assert all(layer.grad_sd > 0 for layer in study.layers)


def test_the_study_prints_a_table_and_draws_itself():
    model = simple_cnn(1, 10, (8, 16))
    model.unused = nn.Linear(2, 2)
    model.forward = nn.Sequential(*list(model)[:-1]).forward
    model[0].requires_grad_(False)
    study = study_init(model, torch.randn(8, 1, 28, 28))
    lines = str(study).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[1].split()[:2] == ["0", "Conv2d"] and lines[1].split()[-1] == "-"
    assert lines[-1] == "unused  not reached"
    assert study.unreached == ("unused",)
    assert repr(study).startswith("InitStudy(3 layers; output sd ")
    assert pickle.loads(pickle.dumps(study)).layers[1:] == study.layers[1:]
    figure = study.plot("before", {"after": study})
    assert [axes.get_title() for axes in figure.axes] == [
        "sd of outputs", "sd of gradients of weights", "sd of weights"
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "before",
        "after",
    ]


def test_a_study_that_reached_no_layer_says_so():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    model.forward = model[0].forward
    study = study_init(model, torch.randn(4, 3))
    assert repr(study) == "InitStudy(0 layers; none reached)"
    assert str(study).splitlines()[1:] == ["1  not reached"]


def test_studies_of_different_depth_are_not_drawn_side_by_side():
    short, long = (study_init(deep_mlp(n), torch.randn(4, 64)) for n in (3, 4))
    with pytest.raises(SetupError, match=r"3 in 'short', 4 in 'long'"):
        short.plot("short", {"long": long})


def test_a_plot_of_one_study_and_of_a_deep_one():
    assert study_init(nn.Linear(3, 3), torch.randn(4, 3)).plot().axes[0].get_legend() is None
    deep = study_init(deep_mlp(40), torch.randn(4, 64)).plot()
    assert deep.axes[0].get_xlabel() == "layer"


def test_a_study_of_a_frozen_model_has_no_gradients(model):
    study = study_init(model.requires_grad_(False), torch.randn(8, 6))
    assert all(math.isnan(layer.grad_sd) for layer in study.layers)
    assert not any(p.requires_grad for p in model.parameters())


def test_gain_of_is_what_init_xavier_wants():
    # an all-tanh net keeps its size with its own gain
    model = nn.Sequential(*[p for _ in range(30) for p in (nn.Linear(100, 100), nn.Tanh())])
    init_xavier(model, gain_of(torch.tanh))
    sds = [layer.sd for layer in study_init(model, torch.randn(200, 100)).layers]
    assert 0.7 < min(sds[5:]) < max(sds[5:]) < 1.3
