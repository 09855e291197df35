"""Student's t against printed tables and closed forms, and intervals that hold what they say."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.ablation.intervals import mean_and_sd, mean_interval, t_probability, t_quantile
from pellucid.errors import SetupError

TABLE = {
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604),
    5: (2.015, 2.571, 4.032),
    9: (1.833, 2.262, 3.250),
    10: (1.812, 2.228, 3.169),
    19: (1.729, 2.093, 2.861),
    30: (1.697, 2.042, 2.750),
    60: (1.671, 2.000, 2.660),
    120: (1.658, 1.980, 2.617),
}
"""The 0.95, 0.975 and 0.995 quantiles, as every textbook prints them."""

EXACT = {  # by 40-digit arithmetic, through the incomplete beta function
    (0.975, 1): 12.70620473617469331410,
    (0.975, 3): 3.182446305283708435884,
    (0.975, 9): 2.262157162798204999203,
    (0.975, 120): 1.979930405082440456744,
    (0.9999, 5): 9.677566300882814164208,
    (0.975, 1000): 1.962339080826408103887,
    (0.51, 7): 0.025977941569516889794,
}


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_are_those_of_the_tables(df):
    assert tuple(round(t_quantile(p, df), 3) for p in (0.95, 0.975, 0.995)) == TABLE[df]


@pytest.mark.parametrize("p, df", EXACT)
def test_quantiles_hold_twelve_digits(p, df):
    assert t_quantile(p, df) == pytest.approx(EXACT[p, df], rel=1e-12)


def test_many_degrees_of_freedom_come_near_the_normal_quantile():
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959964, abs=3e-5)


@settings(deadline=None)
@given(st.floats(1e-6, 1 - 1e-6))
def test_one_and_two_degrees_of_freedom_have_closed_forms(p):
    a = 2 * p - 1
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-12)
    two = a * math.sqrt(2 / ((1 - a) * (1 + a)))
    assert t_quantile(p, 2) == pytest.approx(two, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.floats(1e-4, 1 - 1e-4), st.integers(1, 200))
def test_probability_and_quantile_undo_each_other(p, df):
    t = t_quantile(p, df)
    assert t_probability(abs(t), df) == pytest.approx(abs(2 * p - 1), abs=1e-12)
    assert t_quantile(1 - p, df) == pytest.approx(-t, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(st.floats(0, 50), st.integers(1, 60))
def test_the_probability_is_the_integral_of_the_density(t, df):
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(math.pi * df)
    n = 2000  # Simpson's rule in the angle, where nothing is far away
    width = math.atan(t / math.sqrt(df)) / n
    heights = [scale * math.sqrt(df) * math.cos(i * width) ** (df - 1) for i in range(n + 1)]
    area = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    assert t_probability(t, df) == pytest.approx(2 * area * width / 3, abs=1e-9)


def test_an_interval_is_the_mean_and_t_standard_errors():
    # Student's own data, hours of sleep gained: d̄ = 1.58, s = 1.23, t(0.975, 9) = 2.262
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, sd = mean_and_sd(gained)
    assert (round(mean, 2), round(sd, 2)) == (1.58, 1.23)
    low, high = mean_interval(gained)
    assert (round(low, 2), round(high, 2)) == (0.70, 2.46)
    wider = mean_interval(gained, 0.99)
    assert wider[0] < low < high < wider[1]


def test_few_values_have_no_interval():
    assert mean_interval([]) is None
    assert mean_interval([3.0]) is None
    assert mean_interval([3.0, 3.0]) == (3.0, 3.0)
    assert mean_and_sd([3.0])[0] == 3.0
    assert math.isnan(mean_and_sd([3.0])[1])
    assert math.isnan(mean_and_sd([])[0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_of_a_hundred_intervals_ninety_five_hold_the_true_mean(n):
    draw = random.Random(n)
    hits = 0
    for _ in range(4000):
        low, high = mean_interval([draw.gauss(7, 2) for _ in range(n)])
        hits += low <= 7 <= high
    assert hits / 4000 == pytest.approx(0.95, abs=0.014)  # four standard errors


@pytest.mark.parametrize("call", [
    lambda: t_quantile(0, 3), lambda: t_quantile(1, 3), lambda: t_quantile(0.9, 0),
    lambda: t_probability(1, 0), lambda: mean_interval([1, 2], 1), lambda: mean_interval([1], 95),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(call):
    with pytest.raises(SetupError):
        call()
