"""A first convolution that whitens, and convolutions that pass on what comes in."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid import DataLoaders, Learner
from pellucid.callbacks import Progress
from pellucid.errors import DataError, SetupError
from pellucid.init import init_identity, whiten
from pellucid.init.whitening import patch_moments


def images(n: int = 70, c: int = 3, side: int = 12) -> torch.Tensor:
    """Return smooth images: neighbours and channels go together."""
    torch.manual_seed(1)
    smooth = F.interpolate(torch.randn(n, 1, 4, 4), (side, side), mode="bilinear")
    return 0.7 * smooth + 0.3 * torch.randn(n, c, side, side) + torch.arange(c).view(1, c, 1, 1)


def responses(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return all outputs of a convolution, (places, filters), in double precision."""
    return copy.deepcopy(conv).double()(x.double()).transpose(0, 1).flatten(1).T.detach()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 130), c=st.integers(1, 3), h=st.integers(1, 3), w=st.integers(1, 3))
def test_the_moments_are_those_of_all_patches(n, c, h, w):
    x = images(n, c, 5)
    patches = x.double().unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    patches = patches.flatten(0, 2)
    mean, covariance = patch_moments(x, (h, w))
    torch.testing.assert_close(mean, patches.mean(0))
    expected = patches.T.cov(correction=0).reshape(covariance.shape)
    torch.testing.assert_close(covariance, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("c, size", [(3, 2), (1, 3), (3, (1, 2))])
def test_what_comes_out_is_white(c, size):
    h, w = size if isinstance(size, tuple) else (size, size)
    p = c * h * w
    conv, x = nn.Conv2d(c, 2 * p, (h, w)), images(c=c)
    values = whiten(conv, x, eps=1e-9)
    out = responses(conv, x)
    torch.testing.assert_close(out.mean(0), torch.zeros(2 * p).double(), atol=1e-5, rtol=0)
    covariance = out[:, :p].T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(p).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:, p:], -out[:, :p], atol=1e-5, rtol=0)
    assert (values.diff() <= 0).all() and len(values) == p


@pytest.mark.parametrize("dilation", [2, (1, 3)])
def test_what_comes_out_of_a_dilated_convolution_is_white(dilation):
    conv, x = nn.Conv2d(3, 24, 2, dilation=dilation), images()
    whiten(conv, x, eps=1e-9)
    covariance = responses(conv, x)[:, :12].T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(12).double(), atol=1e-4, rtol=0)


def test_each_filter_is_an_eigenvector_over_the_root_of_its_eigenvalue():
    conv, x, eps = nn.Conv2d(3, 24, 2, bias=False), images(), 0.05
    values = whiten(conv, x, eps)
    _, covariance = patch_moments(x, (2, 2))
    rows = conv.weight.detach().flatten(1).double()[:12]
    torch.testing.assert_close(
        rows @ covariance, values[:, None] * rows, atol=1e-5, rtol=1e-5
    )  # fmt: skip
    torch.testing.assert_close(rows.square().sum(1), 1 / (values + eps), atol=1e-5, rtol=1e-5)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


def test_fewer_filters_are_those_of_the_largest_eigenvalues():
    x, few, all_of_them = images(), nn.Conv2d(3, 8, 2), nn.Conv2d(3, 24, 2)
    whiten(few, x), whiten(all_of_them, x)
    expected = torch.cat([all_of_them.weight[:4], all_of_them.weight[12:16]])
    torch.testing.assert_close(few.weight, expected)


def test_padding_and_strides_do_not_change_the_filters():
    x, plain, other = images(), nn.Conv2d(3, 24, 2), nn.Conv2d(3, 24, 2, stride=2, padding=1)
    whiten(plain, x), whiten(other, x)
    assert torch.equal(plain.weight, other.weight)


def test_the_weight_is_frozen_and_the_bias_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)
    )
    x, y = images(16), torch.arange(16) % 3
    whiten(model[0], x)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    learn = Learner(
        model, DataLoaders([(x, y)] * 3), F.cross_entropy, callbacks=[Progress("off")], device="cpu"
    )
    learn.fit(2)
    assert torch.equal(model[0].weight, weight) and not torch.equal(model[0].bias, bias)


def test_a_constant_image_does_not_blow_up():
    conv = nn.Conv2d(1, 8, 2)
    whiten(conv, torch.ones(4, 1, 6, 6))
    assert conv.weight.isfinite().all() and conv(torch.ones(1, 1, 6, 6)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 9, 2), nn.Conv2d(3, 26, 2), nn.Conv2d(4, 8, 2, groups=2)]
)
def test_a_convolution_that_cannot_is_told_what_would(conv):
    with pytest.raises(SetupError, match="even number of filters"):
        whiten(conv, images())


@pytest.mark.parametrize(
    "x",
    [torch.rand(4, 1, 6, 6), torch.rand(4, 3), torch.full((4, 3, 6, 6), torch.nan),
     torch.zeros(4, 3, 6, 6, dtype=torch.uint8), torch.rand(0, 3, 6, 6), torch.rand(4, 3, 6, 1),
     torch.rand(4, 3, 1, 6)],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(x):
    conv = nn.Conv2d(3, 24, 2)
    before = conv.weight.clone()
    with pytest.raises(DataError, match="Whitening takes"):
        whiten(conv, x)
    assert torch.equal(conv.weight, before) and conv.weight.requires_grad


def test_a_dilated_patch_must_fit_into_the_images():
    with pytest.raises(DataError, match="of 1×5 pixels or more"):
        whiten(nn.Conv2d(3, 12, (1, 2), dilation=(1, 4)), torch.rand(4, 3, 6, 4))


# ── identity ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 7, 3, padding=1), nn.Conv1d(4, 4, 5, padding=2)])
def test_the_first_filters_pass_on_the_input_and_the_others_stay(conv):
    n, before = conv.in_channels, conv.weight.detach().clone()
    nn.init.zeros_(conv.bias)
    init_identity(conv)
    x = torch.randn(2, n, *[9] * (conv.weight.ndim - 2))
    torch.testing.assert_close(conv(x)[:, :n], x)
    assert torch.equal(conv.weight[n:], before[n:])


def test_fewer_filters_than_channels_pass_on_the_first_channels():
    conv, x = nn.Conv2d(5, 2, 3, padding=1, bias=False), torch.randn(2, 5, 4, 4)
    init_identity(conv)
    torch.testing.assert_close(conv(x), x[:, :2])


def test_frozen_grouped_even_and_transposed_ones_are_left():
    left = [
        nn.Conv2d(3, 24, 2), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(3, 3, 3),
        nn.Conv2d(3, 3, 3).requires_grad_(False), nn.Linear(3, 3),
    ]  # fmt: skip
    before = [layer.weight.clone() for layer in left]
    init_identity(nn.Sequential(*left, nn.Conv2d(3, 3, 3)))
    assert all(torch.equal(layer.weight, was) for layer, was in zip(left, before, strict=True))
    with pytest.raises(SetupError, match="no convolution that could"):
        init_identity(nn.Sequential(*left))
