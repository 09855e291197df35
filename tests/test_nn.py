"""Blocks that torch lacks: the sources' numbers, torch's own as oracle, and what they promise."""

import copy
import io
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, tensor
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid import DataLoaders, Learner
from pellucid.callbacks import Progress
from pellucid.data import digits
from pellucid.errors import SetupError
from pellucid.metrics import accuracy
from pellucid.nn import (
    AdaptivePool,
    GeneralReLU,
    Lambda,
    Residual,
    RunningBatchNorm,
    conv_norm_act,
    gain_of,
)
from pellucid.vision import simple_cnn

# ── GeneralReLU ───────────────────────────────────────────────────────────────────────────────

COMBINATIONS = list(itertools.product([None, 0.1], [None, 0.4], [None, 0.5]))


def test_general_relu_has_the_lessons_numbers():
    x = tensor([-2.0, 0.0, 1.0, 10.0])
    expected = tensor([-0.6, -0.4, 0.6, 6.0])
    torch.testing.assert_close(GeneralReLU(leak=0.1, sub=0.4, cap=6.0)(x), expected)


def test_general_relu_without_settings_is_relu():
    x = torch.randn(50)
    assert torch.equal(GeneralReLU()(x), x.relu())
    assert repr(GeneralReLU()) == "GeneralReLU()"
    assert repr(GeneralReLU(sub=0.4)) == "GeneralReLU(sub=0.4)"


@pytest.mark.parametrize("leak, sub, cap", COMBINATIONS)
def test_general_relu_trains_and_leaves_alone_what_others_hold(leak, sub, cap):
    model = nn.Sequential(nn.Linear(4, 8), GeneralReLU(leak, sub, cap), nn.Linear(8, 1))
    held = []
    for module in model:
        module.register_forward_hook(lambda m, inputs, out: held.append((out, out.clone())))
    x = torch.randn(32, 4)
    before = x.clone()
    opt = SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(20):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, copy) for tensor, copy in held)


@pytest.mark.parametrize("leak, sub, cap", COMBINATIONS)
def test_general_relu_has_the_right_gradient(leak, sub, cap):
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GeneralReLU(leak, sub, cap), x)


# ── gains ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "a, gain", [(1, 1), (0, 1.414214), (0.01, 1.414143), (0.1, 1.407195), (5**0.5, 0.577350)]
)
def test_the_gain_of_a_leaky_relu_is_the_formulas(a, gain):
    assert gain_of(nn.LeakyReLU(a)) == pytest.approx(gain, abs=1e-6)
    assert gain_of(GeneralReLU(leak=a)) == pytest.approx(math.sqrt(2 / (1 + a**2)), abs=1e-9)


def test_other_gains():
    assert gain_of(None) == 1
    assert gain_of(nn.SELU()) == pytest.approx(1, abs=1e-6)  # its constants were chosen for that
    assert gain_of(nn.PReLU(init=0.1).half()) == pytest.approx(gain_of(nn.LeakyReLU(0.1)), abs=1e-4)


@pytest.mark.parametrize("f", [torch.tanh, F.gelu, F.silu, partial(F.leaky_relu, negative_slope=2)])
def test_a_gain_keeps_the_mean_square(f):
    z = torch.randn(2_000_000, dtype=torch.float64)
    assert (gain_of(f) * f(z)).square().mean().item() == pytest.approx(1, abs=0.01)


# ── conv_norm_act ─────────────────────────────────────────────────────────────────────────────

NORMS = {
    "none": None,
    "batch": nn.BatchNorm2d,
    "layer": partial(nn.GroupNorm, 1),
    "group": partial(nn.GroupNorm, 2),
    "instance": nn.InstanceNorm2d,
    "running": RunningBatchNorm,
}


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_one_line_swaps_the_norm(norm, norm_last):
    layer = conv_norm_act(3, 4, stride=2, norm=NORMS[norm], norm_last=norm_last)
    out = layer(torch.randn(16, 3, 64, 64))
    assert out.shape == (16, 4, 32, 32)
    out.square().mean().backward()
    assert layer[0].weight.grad.abs().sum() > 0
    assert (layer[0].bias is None) == (norm != "none")
    kinds = [type(part) for part in layer]
    if norm == "none":
        assert kinds == [nn.Conv2d, nn.ReLU]
    else:
        assert kinds.index(nn.ReLU) == (1 if norm_last else 2)
        assert len(kinds) == 3


def test_conv_norm_act_keeps_or_halves_the_map():
    x = torch.randn(2, 3, 28, 28)
    for kernel in (1, 3, 5, 7):
        assert conv_norm_act(3, 4, kernel)(x).shape == (2, 4, 28, 28)
        assert conv_norm_act(3, 4, kernel, stride=2)(x).shape == (2, 4, 14, 14)
    assert len(conv_norm_act(3, 4, norm=None, act=None)) == 1


@pytest.mark.parametrize(
    "act, gain", [(nn.ReLU, 2**0.5), (partial(nn.LeakyReLU, 0.1), 1.407195), (None, 1.0)]
)
def test_conv_norm_act_begins_as_its_activation_asks(act, gain):
    convolution = conv_norm_act(64, 64, norm=None, act=act)[0]
    sd = gain / math.sqrt(64 * 9)
    assert convolution.weight.std().item() == pytest.approx(sd, rel=0.02)
    assert convolution.weight.mean().abs() < 0.05 * sd
    assert not convolution.bias.any()


@pytest.mark.parametrize("norm", [n for n in NORMS.values() if n not in (None, nn.InstanceNorm2d)])
def test_a_branch_that_ends_in_a_zero_norm_begins_as_nothing(norm):
    layer = conv_norm_act(3, 4, norm=norm, act=None, zero_norm=True)
    assert not layer(torch.randn(4, 3, 8, 8)).any()
    layer(torch.randn(4, 3, 8, 8)).sum().backward()
    assert layer[1].bias.grad.any()


def test_conv_norm_act_refuses_what_cannot_work():
    with pytest.raises(SetupError, match=r"act=nn\.ReLU"):
        conv_norm_act(3, 4, act=nn.ReLU())
    with pytest.raises(SetupError, match="norm must make a module"):
        conv_norm_act(3, 4, norm=nn.BatchNorm2d(4))
    with pytest.raises(SetupError, match="norm=RunningBatchNorm,"):
        conv_norm_act(3, 4, norm=RunningBatchNorm(4))
    with pytest.raises(SetupError, match=r"'relu'\n.*act=nn\.ReLU"):
        conv_norm_act(3, 4, act="relu")  # ty: ignore[invalid-argument-type]
    with pytest.raises(SetupError, match="odd"):
        conv_norm_act(3, 4, kernel=4)
    with pytest.raises(SetupError, match="norm with a weight"):
        conv_norm_act(3, 4, norm=nn.InstanceNorm2d, zero_norm=True)
    with pytest.raises(SetupError, match="norm with a weight"):
        conv_norm_act(3, 4, norm=None, zero_norm=True)


# ── RunningBatchNorm ──────────────────────────────────────────────────────────────────────────


class BySums:
    """The definition: exponential averages of sums, squares and counts, debiased, in float64."""

    def __init__(self, n_channels, momentum=0.1, eps=1e-5):
        self.momentum, self.eps = momentum, eps
        self.sums = self.squares = torch.zeros(n_channels, dtype=torch.float64)
        self.count = self.debias = 0.0
        self.n_seen = 0

    def __call__(self, x):
        dims = [i for i in range(x.ndim) if i != 1]
        shape = (1, -1, *[1] * (x.ndim - 2))
        m = 1 - (1 - self.momentum) / math.sqrt(max(len(x) - 1, 1))
        self.sums = self.sums.detach() * (1 - m) + m * x.sum(dims)
        self.squares = self.squares.detach() * (1 - m) + m * x.square().sum(dims)
        self.count = self.count * (1 - m) + m * (x.numel() / x.shape[1])
        self.debias = self.debias * (1 - m) + m
        self.n_seen += len(x)
        count = self.count / self.debias
        mean = self.sums / self.debias / count
        var = self.squares / self.debias / count - mean.square()
        if self.n_seen < 20:
            var = var.clamp(min=0.01)
        return (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()


SHAPES = st.sampled_from([(), (5,), (3, 4), (1, 1), (2, 1, 3)])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    rest=SHAPES,
    momentum=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_running_batch_norm_is_its_definition_by_sums(sizes, rest, momentum):
    torch.manual_seed(0)
    ours = RunningBatchNorm(3, momentum).double().requires_grad_(False)
    definition = BySums(3, momentum)
    for size in sizes:
        x = (torch.randn(size, 3, *rest, dtype=torch.float64) * 2 + 1).requires_grad_()
        out, expected = ours(x), definition(x)
        torch.testing.assert_close(out, expected)
        weights = torch.randn_like(out)
        [gradient] = torch.autograd.grad((out * weights).sum(), x)
        [right] = torch.autograd.grad((expected * weights).sum(), x)
        torch.testing.assert_close(gradient, right)


def test_the_first_batch_comes_out_normal():
    out = RunningBatchNorm(4)(torch.randn(64, 4, 6, 6) * 3 + 5)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1), (1, 4, 6), (1, 4, 5, 5), (2, 4, 3, 3)])
def test_tiny_batches_work_and_evaluation_equals_training_right_after_a_step(shape):
    norm = RunningBatchNorm(4)
    for _ in range(30):
        x = torch.randn(shape) * 2 + 1
        trained = norm.train()(x)
        assert trained.isfinite().all()
        assert torch.equal(norm.eval()(x), trained)


def test_before_any_training_it_passes_on_what_comes_and_an_empty_batch_changes_nothing():
    norm = RunningBatchNorm(3)
    x = torch.randn(5, 3, 2)
    torch.testing.assert_close(norm.eval()(x), x, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(norm.state_dict())
    assert norm.train()(x[:0]).shape == (0, 3, 2)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_small_variances_are_not_believed_at_first():
    norm = RunningBatchNorm(1)
    x = torch.tensor([[0.0], [1e-4]])
    assert norm(x).abs().max() < 0.01  # and not 1
    for _ in range(10):
        out = norm(x)
    assert out.abs().max() > 0.01


def test_a_large_mean_costs_no_digits():
    norm = RunningBatchNorm(2)
    x = torch.randn(64, 2, 8, 8)
    out = norm(x + 10_000)  # by sums of squares the variance would be lost in float32
    torch.testing.assert_close(out, BySums(2)(x.double()).float(), atol=2e-3, rtol=0)


def test_history_is_not_differentiated_and_forwards_may_pile_up_before_a_backward():
    norm = RunningBatchNorm(3)
    first, second = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
    outs = [norm(first), norm(second)]  # buffers have moved on when the first goes back
    outs[1].square().sum().backward()
    assert first.grad is None
    outs[0].square().sum().backward()
    assert first.grad.isfinite().all()
    assert not any(buffer.requires_grad for buffer in norm.buffers())


class CountReadings(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def test_the_device_is_never_asked():
    norm = RunningBatchNorm(3)
    with CountReadings() as readings:
        for n in (1, 2, 30):
            norm(torch.randn(n, 3, 4, 4, requires_grad=True)).sum().backward()
        norm.eval()(torch.randn(2, 3, 4, 4))
    assert readings.n == 0


def test_a_loaded_one_goes_on_exactly():
    norm = RunningBatchNorm(3)
    for _ in range(5):
        norm(torch.randn(3, 3, 4))
    loaded = RunningBatchNorm(3)
    loaded.load_state_dict(norm.state_dict())
    pickled = pickle.loads(pickle.dumps(norm))
    for n in (1, 4, 2):
        x = torch.randn(n, 3, 4) + n
        outs = [one(x) for one in (norm, loaded, pickled)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert norm.n_seen == 15 + 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_normalised_in_float32(dtype):
    x = (torch.randn(8, 3, 5, 5) * 2 + 30).to(dtype)
    low, wide = RunningBatchNorm(3), RunningBatchNorm(3)
    out = low(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide(x.float()).to(dtype))
    assert low.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_of_low_precision_counts_large_maps(dtype):
    low, wide = RunningBatchNorm(3).to(dtype), RunningBatchNorm(3)
    for i in range(40):  # 90,000 values a channel: float16 ends at 65,504
        x = (torch.randn(9, 3, 100, 100) + i % 2).to(dtype)
        out = low(x)
        torch.testing.assert_close(out, wide(x.float()).to(dtype), atol=0.05, rtol=0.05)
    assert low.running_mean.dtype == out.dtype == dtype
    out.sum().backward()
    assert low.weight.grad.isfinite().all()


def test_it_works_under_autocast():
    model = conv_norm_act(1, 4, norm=RunningBatchNorm)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 1, 8, 8))
        assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_it_is_written_for_its_channels():
    for x in (torch.randn(4), torch.randn(4, 2), torch.randn(4, 2, 3)):
        with pytest.raises(SetupError, match=r"RunningBatchNorm\(3\) takes \(n, 3, \.\.\.\)"):
            RunningBatchNorm(3)(x)
    with pytest.raises(SetupError, match=r"RunningBatchNorm\(1\) takes"):
        RunningBatchNorm(1)(torch.randn(4, 2))  # would stretch silently
    for momentum in (0, 1.5, -1):
        with pytest.raises(SetupError, match="momentum"):
            RunningBatchNorm(3, momentum)
    assert repr(RunningBatchNorm(3)) == "RunningBatchNorm(3, momentum=0.1, eps=1e-05)"


def test_with_two_images_at_a_time_it_learns_where_batch_norm_does_not():
    # on 4,000 MNIST images the margin is 0.55 or more, see benchmarks; this is the quick form
    whole = digits(2)
    (x, y), (x_valid, y_valid) = (part.dataset.arrays for part in (whole.train, whole.valid))
    reached = {}
    for norm in (nn.BatchNorm2d, RunningBatchNorm):
        data = DataLoaders.from_arrays((x[:1000], y[:1000]), (x_valid, y_valid), 2, classes=10)
        data.transforms = whole.transforms
        torch.manual_seed(0)
        model = simple_cnn(1, 10, widths=(8, 16, 32, 32), norm=norm)
        learn = Learner(model, data, opt_func=SGD, lr=0.05, metrics=[accuracy], device="cpu")
        record = learn.fit(1, callbacks=[Progress("off")])
        reached[norm] = record.epochs.last("valid/accuracy")
    assert reached[RunningBatchNorm] > 0.65
    assert reached[RunningBatchNorm] > reached[nn.BatchNorm2d] + 0.3


# ── Lambda ────────────────────────────────────────────────────────────────────────────────────


def double(x):
    return 2 * x


def test_a_lambda_module_with_a_named_function_survives_pickling_and_saving():
    model = nn.Sequential(
        nn.Linear(3, 3), Lambda(double), Lambda(partial(torch.flatten, start_dim=1))
    )
    x = torch.randn(2, 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
    assert torch.equal(Lambda(double)(x), 2 * x)
    assert torch.equal(Lambda(torch.add)(x, x), 2 * x)  # as many inputs as it is called with


def test_a_lambda_that_cannot_be_pickled_says_so_and_what_to_do():
    model = nn.Sequential(nn.Linear(3, 3), Lambda(lambda x: 2 * x))
    with pytest.raises(SetupError) as caught:
        pickle.dumps(model)
    text = str(caught.value)
    assert "A Lambda's function cannot be pickled" in text
    assert "<lambda>" in text and __file__ in text
    assert "define it with def at the top of a file" in text
    with pytest.raises(SetupError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())


def test_any_lambda_copies_in_memory_with_its_hooks_and_mode():
    seen = []
    model = nn.Sequential(Lambda(lambda x: 2 * x)).eval()
    model[0].register_forward_hook(lambda *args: seen.append(1))
    twin = copy.deepcopy(model)
    assert twin[0] is not model[0]
    assert torch.equal(twin(torch.ones(2)), tensor([2.0, 2.0]))
    assert seen == [1] and not twin[0].training


def test_a_lambda_shows_its_functions_name():
    assert repr(Lambda(double)) == "Lambda(double)"
    assert "<lambda>" in repr(Lambda(lambda x: x))
    with pytest.raises(SetupError, match="needs a function"):
        Lambda(3)


# ── pooling and residual ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 6), (2, 3, 2, 2, 2), (0, 3, 4, 4)])
def test_adaptive_pool_is_the_mean_over_what_follows_the_channels(shape):
    x = torch.randn(shape)
    flat = x.reshape(*shape[:2], math.prod(shape[2:]))
    torch.testing.assert_close(AdaptivePool()(x), flat.mean(-1))
    both = torch.cat([flat.amax(-1), flat.mean(-1)], 1)
    torch.testing.assert_close(AdaptivePool(concat=True)(x), both)
    kept = AdaptivePool(flatten=False)(x)
    assert kept.shape == (*shape[:2], *[1] * (len(shape) - 2))
    assert torch.equal(kept.flatten(1), AdaptivePool()(x))


def test_adaptive_pool_equals_torchs():
    x = torch.randn(4, 3, 7, 5)
    torch.testing.assert_close(AdaptivePool(flatten=False)(x), nn.AdaptiveAvgPool2d(1)(x))


def test_residual_adds_body_and_shortcut():
    x = torch.randn(4, 3)
    body, shortcut = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.testing.assert_close(
        Residual(body, shortcut, nn.ReLU())(x), (body(x) + shortcut(x)).relu()
    )
    square = nn.Linear(3, 3)
    torch.testing.assert_close(Residual(square)(x), square(x) + x)
