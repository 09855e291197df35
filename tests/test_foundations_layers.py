"""foundations: Linear, convolution, pooling and activations, each beside torch's own."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.errors import DataError, SetupError
from pellucid.foundations import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    fans,
    kaiming_normal,
    unfold,
    xavier_normal,
)

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_same(ours, theirs, x, rtol=1e-5):
    """Compare outputs and all gradients of two layers with torch's weights, to 1e-5 and better."""
    double = x.dtype == torch.float64
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if double else {"rtol": rtol, "atol": 1e-5}
    ours, theirs = ours.to(x.dtype), theirs.to(x.dtype)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    torch.testing.assert_close(*outputs, **tolerance)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (same_name, q) in pairs:
        assert name == same_name
        torch.testing.assert_close(p.grad, q.grad, **tolerance)


# ── Linear, ReLU, Flatten, Sequential ─────────────────────────────────────────────────────────


@both_precisions
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
def test_linear_equals_torchs(shape, bias, dtype):
    assert_same(Linear(4, 5, bias), nn.Linear(4, 5, bias), torch.randn(shape, dtype=dtype))


def test_linear_without_bias_equals_torchs_to_the_bit():
    ours, theirs, x = Linear(50, 20, False), nn.Linear(50, 20, False), torch.randn(64, 50)
    ours.load_state_dict(theirs.state_dict())
    outputs = [layer(x) for layer in (ours, theirs)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_linear_has_a_row_an_output():
    layer = Linear(784, 50)
    assert (layer.weight.shape, layer.bias.shape) == ((50, 784), (50,))
    assert Linear(4, 2)(torch.ones(3, 4)).shape == (3, 2)
    assert Linear(4, 2, bias=False).bias is None


def test_a_wrong_number_of_features_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Linear(4, 2)(torch.ones(3, 5))


@both_precisions
def test_relu_equals_torchs_to_the_bit_also_at_zero_and_beyond_numbers(dtype):
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ReLU()(inputs[0]), nn.ReLU()(inputs[1])]
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
    for output in outputs:
        output.backward(torch.ones_like(x))
    assert torch.equal(inputs[0].grad[:6], inputs[1].grad[:6])


def test_a_model_of_several_layers_equals_torchs_and_shares_its_names():
    ours = Sequential(Flatten(), Linear(12, 7), ReLU(), Sequential(Linear(7, 3)))
    theirs = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 3))
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(5, 3, 2, 2))
    theirs.load_state_dict(ours.state_dict())


def test_a_layer_that_occurs_twice_is_computed_twice_and_trained_by_both():
    ours, theirs = Linear(3, 3), nn.Linear(3, 3)
    twice = [Sequential(ours, ReLU(), ours), nn.Sequential(theirs, nn.ReLU(), theirs)]
    assert_same(*twice, torch.randn(4, 3))


# ── convolution ───────────────────────────────────────────────────────────────────────────────

sizes = st.integers(1, 4)
shapes = st.fixed_dictionaries({
    "kernel_size": st.tuples(sizes, sizes),
    "stride": st.tuples(sizes, sizes),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
})  # fmt: skip
images = {"n": st.integers(0, 3), "h": st.integers(1, 9), "w": st.integers(1, 9)}


def check_fits(shape, h, w):
    assume(h + 2 * shape["padding"][0] >= shape["kernel_size"][0])
    assume(w + 2 * shape["padding"][1] >= shape["kernel_size"][1])


@given(shape=shapes, **images, channels=sizes, kernels=sizes, double=st.booleans())
@settings(deadline=None, max_examples=80)
def test_convolution_equals_torchs(shape, n, h, w, channels, kernels, double):
    check_fits(shape, h, w)
    x = torch.randn(n, channels, h, w, dtype=torch.float64 if double else torch.float32)
    assert_same(Conv2d(channels, kernels, **shape), nn.Conv2d(channels, kernels, **shape), x)


@given(shape=shapes, **images)
@settings(deadline=None, max_examples=40)
def test_unfold_equals_torchs_to_the_bit(shape, n, h, w):
    check_fits(shape, h, w)
    x = torch.randn(n + 1, 2, h, w)
    assert torch.equal(unfold(x, **shape), F.unfold(x, **shape))


def test_convolution_is_unfold_and_matmul_with_the_lessons_numbers():
    torch.manual_seed(42)
    x, w = torch.randn(1, 3, 28, 28), torch.randn(1, 3, 3, 3)
    four = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(
        x[0, 0, 0, :4], torch.tensor([1.9269, 1.4873, 0.9007, -2.1055]), **four
    )
    torch.testing.assert_close(x[0, 0, 1, :2], torch.tensor([-0.2316, 0.0418]), **four)
    patches = unfold(x, (3, 3))
    assert patches.shape == (1, 27, 676)
    product = patches.transpose(1, 2) @ w.view(1, -1).t()
    assert product.shape == (1, 676, 1)
    out = product.transpose(1, 2).view(1, 1, 26, 26)
    row = torch.tensor([2.1036, 3.9867, -11.0306, -4.8908, -5.1374, 0.4219])
    torch.testing.assert_close(out[0, 0, 0, :6], row, **four)
    layer = Conv2d(3, 1, 3, bias=False)
    layer.load_state_dict({"weight": w})
    for other in (layer(x), F.conv2d(x, w)):
        torch.testing.assert_close(other, out, rtol=0, atol=1e-5)


def test_a_convolution_refuses_what_is_no_image_of_its_channels():
    with pytest.raises(DataError, match=r"takes images \(n, 3, h, w\)\.\n  saw: float32 2×1×8×8"):
        Conv2d(3, 4, 3)(torch.ones(2, 1, 8, 8))
    with pytest.raises(DataError, match=r"window of 5×3 needs images .*\n  saw: float32 2×3×4×8"):
        Conv2d(3, 4, (5, 3))(torch.ones(2, 3, 4, 8))


def simple_cnn():
    """Make the model of the lessons: four convolutions that halve the map, then the mean of it."""
    widths = [3, 16, 32, 64, 128]
    layers = []
    for before, after in pairwise(widths):
        layers += [Conv2d(before, after, 3, stride=2, padding=1), ReLU()]
    return Sequential(*layers, AdaptiveAvgPool2d(1), Flatten(), Linear(128, 10))


@pytest.mark.parametrize("size", [28, 32, 64])
def test_simple_cnn_has_10_parameters_of_98730_numbers_and_takes_any_size(size):
    model = simple_cnn()
    counts = [p.numel() for p in model.parameters()]
    assert (len(counts), sum(counts)) == (10, 98_730)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert len(list(Conv2d(3, 4, 3).parameters())) == 2
    assert len(list(Sequential(Conv2d(3, 4, 3), Linear(3, 2)).parameters())) == 4


# ── pooling ───────────────────────────────────────────────────────────────────────────────────


@given(shape=shapes, **images, ties=st.booleans(), double=st.booleans())
@settings(deadline=None, max_examples=80)
def test_pooling_equals_torchs(shape, n, h, w, ties, double):
    kernel = shape["kernel_size"]
    shape["padding"] = tuple(min(p, k // 2) for p, k in zip(shape["padding"], kernel, strict=True))
    check_fits(shape, h, w)
    x = torch.randn(n, 2, h, w, dtype=torch.float64 if double else torch.float32)
    x = x.relu() if ties else x  # where many are the largest, the first one gets the gradient
    assert_same(MaxPool2d(**shape), nn.MaxPool2d(**shape), x)
    assert_same(AvgPool2d(**shape), nn.AvgPool2d(**shape), x)


@given(**images, size=st.tuples(st.integers(1, 6), st.integers(1, 6)), ties=st.booleans())
@settings(deadline=None, max_examples=60)
def test_adaptive_pooling_equals_torchs(n, h, w, size, ties):
    x = torch.randn(n + 1, 2, h, w)
    x = x.relu() if ties else x
    assert_same(AdaptiveAvgPool2d(size), nn.AdaptiveAvgPool2d(size), x)
    assert_same(AdaptiveMaxPool2d(size), nn.AdaptiveMaxPool2d(size), x)


def test_pools_lie_side_by_side_unless_a_stride_is_given():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert MaxPool2d(2)(x).flatten().tolist() == [5, 7, 13, 15]
    assert AvgPool2d(2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert MaxPool2d(2, stride=1)(x).shape == (1, 1, 3, 3)
    assert repr(MaxPool2d(2)) == "MaxPool2d(kernel (2, 2), stride (2, 2), padding (0, 0))"


def test_a_window_of_padding_alone_is_refused():
    with pytest.raises(SetupError, match="more than half the window"):
        MaxPool2d(2, padding=2)


# ── initialisation ────────────────────────────────────────────────────────────────────────────


def test_fans_are_the_lessons():
    assert fans(32, 1, 5, 5) == (25, 800)
    assert fans(50, 784) == (784, 50)


@pytest.mark.parametrize("shape", [(300, 200), (64, 32, 5, 5)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (kaiming_normal, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        (xavier_normal, nn.init.xavier_normal_),
    ],
)
def test_initial_weights_are_torchs_from_the_same_seed(ours, theirs, shape):
    torch.manual_seed(3)
    w = ours(*shape)
    torch.manual_seed(3)
    torch.testing.assert_close(w, theirs(torch.empty(shape)))


def test_layers_begin_as_they_say():
    linear, convolution = Linear(400, 100), Conv2d(16, 64, 5)
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert not linear.bias.any() and not convolution.bias.any()
    # a signal that went through ten layers with ReLU is as strong as before
    x = torch.randn(200, 400)
    for _ in range(10):
        x = (x @ kaiming_normal(400, 400).t()).relu()
    assert 0.5 < x.square().mean() < 2
