"""Small statistics: the sources' numbers, numpy's, and the case that loses digits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from pellucid.stats import (
    correlation,
    covariance,
    mean_absolute_deviation,
    standard_deviation,
    variance,
)

T = tensor([1.0, 2.0, 4.0, 18.0])


def test_the_lessons_numbers():
    assert T.mean() == 6.25
    assert variance(T).item() == 47.1875
    assert mean_absolute_deviation(T).item() == 5.8750
    assert standard_deviation(T).item() == pytest.approx(6.8693, abs=5e-5)
    assert covariance(T, T).item() == 47.1875


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_large_offset_costs_no_digits(offset):
    shifted = T + offset
    naive = shifted.square().mean() - shifted.mean().square()
    assert abs(naive.item() - 47.1875) > 0.5  # what the shift is for
    assert variance(shifted).item() == 47.1875
    assert covariance(shifted, T).item() == 47.1875
    assert correlation(shifted, T).item() == pytest.approx(1, abs=1e-6)


def test_a_thing_is_fully_correlated_with_itself():
    assert correlation(T, T).item() == pytest.approx(1, abs=1e-6)
    assert correlation(T, -T).item() == pytest.approx(-1, abs=1e-6)
    assert correlation(T, 3 * T + 7).item() == pytest.approx(1, abs=1e-6)
    # with torch's unbiased deviation, as in the lesson, it would be three quarters
    assert (covariance(T, T) / (T.std() * T.std())).item() == pytest.approx(0.75)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_everything_equals_numpy(values, seed):
    a = tensor(values, dtype=torch.float64)
    b = torch.from_numpy(np.random.default_rng(seed).normal(size=len(values)))
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(variance(a), np.var(a.numpy()), **close)
    np.testing.assert_allclose(standard_deviation(b), np.std(b.numpy()), **close)
    np.testing.assert_allclose(covariance(a, b), np.cov(a, b, ddof=0)[0, 1], **close)
    deviation = np.abs(a.numpy() - a.numpy().mean()).mean()
    np.testing.assert_allclose(mean_absolute_deviation(a), deviation, **close)


def test_any_shape_and_any_dtype_will_do():
    whole = torch.arange(12).reshape(3, 2, 2)
    assert variance(whole).item() == pytest.approx(np.var(np.arange(12)))
    assert variance(whole).dtype == torch.float32
    assert mean_absolute_deviation(whole.to(torch.uint8)).item() == 3.0
    assert variance(T.double()).dtype == torch.float64
    assert variance(T.reshape(2, 2)) == variance(T)


def test_integers_do_not_overflow():
    pixels = torch.full((1000,), 255, dtype=torch.uint8)
    pixels[::2] = 0
    assert variance(pixels).item() == 127.5**2
    assert covariance(pixels, pixels).item() == 127.5**2


def test_a_covariance_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match="covariance pairs elements"):
        covariance(torch.zeros(3), torch.zeros(1))
