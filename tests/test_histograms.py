"""Histograms by magnitude: every float lands in the bin that arithmetic says, and none is lost."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.histograms import ACTIVATIONS, GRADIENTS, Octaves, upper_half

BINS = [ACTIVATIONS, GRADIENTS, Octaves(-3, 2, 8), Octaves(0, 1, 1), Octaves(-126, 127, 4)]
each = pytest.mark.parametrize("bins", BINS, ids=lambda bins: repr(bins)[7:])

floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
by_bits = st.integers(0, 2**32 - 1).map(
    lambda bits: float(np.array(bits, np.uint32).view(np.float32))
)
"""Any float at all, NaN with a sign and every subnormal as likely as the rest."""


def by_arithmetic(bins: Octaves, x: np.ndarray) -> np.ndarray:
    """Return the bins by the definition, in double precision, without a look at bits."""
    x = x.astype(np.float64)
    steps = np.arange(bins.span + 1)
    edges = 2.0 ** (bins.lowest + steps // bins.parts) * (1 + steps % bins.parts / bins.parts)
    size = np.where(np.isnan(x), bins.span + 1, np.searchsorted(edges, np.abs(x), side="right"))
    return np.where(np.signbit(x), -size, size) + bins.zero


def index(bins: Octaves, x: np.ndarray) -> np.ndarray:
    return bins.index(torch.from_numpy(x)).numpy()


@given(st.lists(floats | by_bits, min_size=1, max_size=50))
@settings(deadline=None, max_examples=200)
def test_every_float_is_where_arithmetic_puts_it(values):
    x = np.array(values, np.float32)
    for bins in BINS:
        np.testing.assert_array_equal(index(bins, x), by_arithmetic(bins, x))


@each
def test_edges_and_their_neighbours_are_on_the_right_side(bins):
    edges = bins.edges()[1:-1].astype(np.float32)
    outside = np.copysign(np.float32(np.inf), edges)
    for x in (edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, outside)):
        np.testing.assert_array_equal(index(bins, x), by_arithmetic(bins, x))


@each
def test_the_extremes(bins):
    tiny = np.finfo(np.float32).smallest_subnormal
    x = np.array([0, -0.0, tiny, -tiny, np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)
    zero, last = bins.zero, bins.n_bins - 1
    assert index(bins, x).tolist() == [zero, zero, zero, zero, last, 0, last, last, 0]
    assert index(bins, -x)[6] == 0  # a NaN too has a sign


@each
def test_edges_enclose_the_bins(bins):
    edges = bins.edges()
    assert len(edges) == bins.n_bins + 1 and (np.diff(edges) > 0).all()
    assert edges[0] == -math.inf and edges[-1] == math.inf
    assert edges[bins.zero] == -(2.0**bins.lowest) and edges[bins.zero + 1] == 2.0**bins.lowest
    assert edges[-2] == 2.0**bins.highest
    middles = ((edges[1:-1] + edges[2:]) / 2)[:-1].astype(np.float32)
    np.testing.assert_array_equal(index(bins, middles), np.arange(1, bins.n_bins - 1))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_go_by_their_value_in_single(bins, dtype):
    x = torch.cat([torch.randn(500), torch.randn(500) * 1e-6, torch.randn(500) * 1e4]).to(dtype)
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, 0.0, -0.0], dtype=dtype)])
    expected = by_arithmetic(bins, x.to(torch.float32).numpy())
    np.testing.assert_array_equal(bins.index(x).numpy(), expected)


def test_beyond_single_precision_doubles_are_infinite_or_zero():
    x = torch.tensor([1e300, -1e300, 1e-300], dtype=torch.float64)
    assert ACTIVATIONS.index(x).tolist() == [ACTIVATIONS.n_bins - 1, 0, ACTIVATIONS.zero]


@given(st.lists(floats | by_bits, max_size=60))
@settings(deadline=None, max_examples=60)
def test_every_value_has_a_bin(values):
    x = torch.tensor(np.array(values, np.float32))
    for bins in BINS:
        np.testing.assert_array_equal(bins.index(x), by_arithmetic(bins, x.numpy()))
        np.testing.assert_array_equal(bins.table(x.device)[upper_half(x)], bins.index(x))


@given(st.lists(st.integers(1, 4), max_size=4), st.booleans())
@settings(deadline=None, max_examples=40)
def test_any_shape_and_layout(shape, transposed):
    x = torch.randn(shape)
    x = x.permute(tuple(reversed(range(x.ndim)))) if transposed else x
    assert ACTIVATIONS.index(x).shape == x.shape and ACTIVATIONS.index(x).dtype == torch.int64


def test_the_two_kinds_share_one_layout():
    # which a record of layers relies on
    assert ACTIVATIONS.n_bins == GRADIENTS.n_bins and ACTIVATIONS.zero == GRADIENTS.zero
    assert 2.0**ACTIVATIONS.lowest < 1e-3 and 2.0**ACTIVATIONS.highest == 64
    assert 2.0**GRADIENTS.lowest < 4e-9 and 2.0**GRADIENTS.highest == 16
