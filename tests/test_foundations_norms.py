"""foundations: BatchNorm, LayerNorm, GroupNorm and InstanceNorm beside torch's own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.errors import DataError, SetupError
from pellucid.foundations import (
    BatchNorm,
    Conv2d,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Sequential,
    moments,
)

TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
precisions = st.sampled_from([torch.float32, torch.float64])
places = st.lists(st.integers(1, 4), max_size=3)


def well_spread(shape, dtype):
    """Make values that differ along every dimension: of equal ones only rounding is left."""
    x = torch.randn(shape, dtype=dtype) / 2
    signs = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij")) % 2
    return x + 6 * signs - 2


def prepared(ours, theirs, dtype):
    """Give both layers the same weights, away from 1 and 0, where errors could hide."""
    with torch.no_grad():
        for p in theirs.parameters():
            p += torch.randn_like(p)
    assert ours.to(dtype).load_state_dict(theirs.to(dtype).state_dict()) == ([], [])
    return ours, theirs


def assert_same(ours, theirs, x):
    """Compare outputs, all gradients and all buffers, to 1e-5 and better."""
    tolerance = dict.fromkeys(["rtol", "atol"], 1e-10 if x.dtype == torch.float64 else 1e-5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    torch.testing.assert_close(*outputs, **tolerance)
    gradient = torch.randn_like(outputs[0])
    for layer, output in zip((ours, theirs), outputs, strict=True):
        layer.zero_grad()
        output.backward(gradient)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (same_name, q) in pairs:
        assert name == same_name
        torch.testing.assert_close(p.grad, q.grad, **tolerance)
    torch.testing.assert_close(ours.state_dict(), dict(theirs.state_dict()), **tolerance)


@given(rest=places, n=st.integers(2, 5), c=st.integers(1, 4), dtype=precisions)
@settings(deadline=None, max_examples=60)
def test_batchnorm_equals_torchs_in_training_and_after_it(rest, n, c, dtype):
    ours, theirs = prepared(BatchNorm(c), TORCHS[2 + len(rest)](c), dtype)
    for _ in range(3):
        assert_same(ours, theirs, well_spread((n, c, *rest), dtype))
    for layer in (ours, theirs):
        layer.eval()
    before = copy.deepcopy(ours.state_dict())
    assert_same(ours, theirs, torch.randn(1, c, *rest, dtype=dtype))
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    assert ours.num_batches_tracked == 3


@given(rest=places, n=st.integers(1, 5), kept=st.integers(0, 3), dtype=precisions)
@settings(deadline=None, max_examples=60)
def test_layernorm_equals_torchs(rest, n, kept, dtype):
    rest = [*rest, 4]  # of a single value only rounding is left
    shape = rest[min(kept, len(rest) - 1) :]
    ours, theirs = prepared(LayerNorm(shape), nn.LayerNorm(shape), dtype)
    assert_same(ours, theirs, well_spread((n, *rest), dtype))


@given(
    rest=places, n=st.integers(2, 5), groups=st.integers(1, 3), each=st.integers(1, 3),
    dtype=precisions,
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_groupnorm_equals_torchs(rest, n, groups, each, dtype):
    c, rest = groups * each, [*rest, 2]
    ours, theirs = prepared(GroupNorm(groups, c), nn.GroupNorm(groups, c), dtype)
    assert_same(ours, theirs, well_spread((n, c, *rest), dtype))


@given(
    rest=places, n=st.integers(1, 5), c=st.integers(1, 4), affine=st.booleans(), dtype=precisions
)
@settings(deadline=None, max_examples=60)
def test_instancenorm_equals_torchs(rest, n, c, affine, dtype):
    rest = [*rest[:2], 2]
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[len(rest)]
    ours, theirs = prepared(InstanceNorm(c, affine=affine), kind(c, affine=affine), dtype)
    assert_same(ours, theirs, well_spread((n, c, *rest), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_ordinary_images_all_four_equal_torchs(dtype):
    x = torch.randn(20, 6, 10, 10, dtype=dtype) * 2 + 1
    for ours, theirs in (
        (BatchNorm(6), nn.BatchNorm2d(6)),
        (LayerNorm((6, 10, 10)), nn.LayerNorm((6, 10, 10))),
        (LayerNorm(10), nn.LayerNorm(10)),
        (InstanceNorm(6), nn.InstanceNorm2d(6)),
        *[(GroupNorm(g, 6), nn.GroupNorm(g, 6)) for g in (1, 3, 6)],
    ):
        assert_same(*prepared(ours, theirs, dtype), x)


def test_one_group_is_a_layernorm_and_a_group_a_channel_an_instancenorm():
    x = torch.randn(20, 6, 10, 10)
    torch.testing.assert_close(GroupNorm(1, 6)(x), LayerNorm((6, 10, 10))(x))
    torch.testing.assert_close(GroupNorm(6, 6)(x), InstanceNorm(6)(x))


# ── what the norms promise ────────────────────────────────────────────────────────────────────


def test_after_batchnorm_every_channel_has_mean_0_and_variance_1():
    out = BatchNorm(3)(torch.randn(50, 3, 4, 4) * 7 + 5)
    mean, variance = moments(out, (0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, torch.ones_like(mean), rtol=0, atol=1e-5)


def test_the_variance_of_layers_is_the_populations():
    t = torch.tensor([1.0, 2.0, 4.0, 18.0])
    mean, variance = moments(t, (0,))
    assert (mean.item(), variance.item()) == (6.25, 47.1875)


def test_batchnorm_keeps_running_averages_with_weight_momentum():
    layer = BatchNorm(1, momentum=0.1)
    layer.running_mean.fill_(3)
    means = []
    for mean in (5.0, 4.0):
        layer(torch.tensor([[mean - 1], [mean + 1]]))
        means.append(round(layer.running_mean.item(), 6))
    assert means == [3.2, 3.28]
    # unbiased: two values one off the mean have variance 2
    assert layer.running_var.item() == pytest.approx(1 * 0.81 + 2 * 0.19)


def test_the_running_averages_are_buffers_that_move_and_are_saved_and_not_trained():
    layer = BatchNorm(2)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.state_dict())[2:] == ["running_mean", "running_var", "num_batches_tracked"]
    layer.to(torch.float64)(torch.randn(4, 2, dtype=torch.float64))
    assert layer.running_var.dtype == torch.float64 and not layer.running_var.requires_grad


def test_only_batchnorm_lets_an_item_depend_on_the_others():
    x = torch.randn(8, 6, 5, 5)
    for layer in (LayerNorm((6, 5, 5)), GroupNorm(3, 6), InstanceNorm(6)):
        torch.testing.assert_close(layer(x)[:2], layer(x[:2]))
        torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    layer = BatchNorm(6)
    assert (layer(x)[:2] - layer(x[:2])).abs().max() > 0.1


def test_layernorm_cannot_tell_fog_from_sunshine():
    sunny = torch.rand(4, 3, 8, 8)
    foggy = sunny * 0.1 + 0.6
    layer = LayerNorm((3, 8, 8), eps=1e-12)
    torch.testing.assert_close(layer(sunny), layer(foggy), rtol=0, atol=1e-4)


def test_a_larger_eps_tames_a_batch_of_nearly_equal_values():
    x = torch.tensor([[1.0], [1.001]])
    assert BatchNorm(1)(x).abs().max() > 0.1
    assert BatchNorm(1, eps=1.0)(x).abs().max() < 0.001


@pytest.mark.parametrize("make", [
    BatchNorm, lambda n: GroupNorm(1, n), InstanceNorm, lambda n: InstanceNorm(n, affine=True),
])  # fmt: skip
@pytest.mark.parametrize("n", [1, 2, 4])
def test_other_channels_are_refused_and_leave_the_running_averages_alone(make, n):
    layer = make(n)
    before = copy.deepcopy(layer.state_dict())
    for mode in (layer.train(), layer.eval()):
        with pytest.raises(DataError, match=rf"takes \(n, {n}, \.\.\.\)\.\n  saw: float32 2×3×4×4"):
            mode(torch.randn(2, 3, 4, 4))
        with pytest.raises(DataError, match=rf"takes \(n, {n}, \.\.\.\)"):
            mode(torch.randn(n))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


NORMS = [
    (BatchNorm(4), nn.BatchNorm2d(4)),
    (LayerNorm((4, 5, 5)), nn.LayerNorm((4, 5, 5))),
    (GroupNorm(2, 4), nn.GroupNorm(2, 4)),
    (InstanceNorm(4), nn.InstanceNorm2d(4)),
]
norms = pytest.mark.parametrize(("ours", "theirs"), NORMS, ids=lambda n: type(n).__name__)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_as_torch_does_it_where_squares_overflow(ours, theirs, dtype):
    ours, theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
    x = (torch.randn(8, 4, 5, 5) * 300 + 500).to(dtype)
    for _ in range(2):
        out = ours(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, theirs(x), rtol=0.02, atol=0.02)
        ours, theirs = ours.eval(), theirs.eval()


@norms
def test_under_autocast_norms_keep_their_averages_in_float32(ours, theirs):
    twins = [Sequential(Conv2d(4, 4, 3, bias=False), copy.deepcopy(ours)),
             nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), copy.deepcopy(theirs))]  # fmt: skip
    twins[0].load_state_dict(twins[1].state_dict())
    x = torch.randn(8, 4, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [model(x) for model in twins]
    torch.testing.assert_close(*outs, rtol=0.05, atol=0.05, check_dtype=False)
    states = twins[0].state_dict(), dict(twins[1].state_dict())
    torch.testing.assert_close(*states, rtol=0.02, atol=0.02)


def test_a_group_norm_takes_an_empty_batch():
    assert GroupNorm(2, 4)(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(DataError, match="single value a channel"):
        BatchNorm(3)(torch.ones(1, 3))
    with pytest.raises(DataError, match="maps of more than one place"):
        InstanceNorm(3)(torch.ones(5, 3, 1, 1))
    with pytest.raises(DataError, match=r"takes \(\.\.\., 3, 4\)\.\n  saw: float32 2×4×3"):
        LayerNorm((3, 4))(torch.ones(2, 4, 3))
    with pytest.raises(SetupError, match="divide the channels"):
        GroupNorm(4, 6)
