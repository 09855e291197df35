"""Schedules: the curves' values, their joints, and what is refused."""

import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import SetupError
from pellucid.schedules import (
    combine,
    constant,
    cosine,
    exponential,
    linear,
    one_cycle,
    phases,
)

KINDS = [linear, cosine, exponential]
positive = st.floats(1e-6, 1e3)
position = st.floats(0, 1)


def near(value):
    return pytest.approx(value, abs=5e-7)


def test_linear_goes_in_a_straight_line():
    assert linear(1, 2)(0.3) == 1.3
    assert [linear(1, 0.2)(i / 4) for i in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize(
    ("at", "value"), [(0, 1), (0.25, 1.146447), (0.3, 1.206107), (0.5, 1.5), (1, 2)]
)
def test_cosine_follows_half_a_wave(at, value):
    assert cosine(1, 2)(at) == near(value)


def test_exponential_multiplies_by_the_same_factor_in_equal_stretches():
    assert exponential(1, 2)(0.3) == near(1.231144)
    assert exponential(1, 2)(0.5) == near(1.414214)
    assert exponential(1e-6, 10)(0.5) == pytest.approx(0.00316228, rel=1e-6)
    assert exponential(-1, -4)(0.5) == pytest.approx(-2)


def test_constant_stays_where_it_is():
    assert [constant(0.7)(p) for p in (0, 0.4, 1)] == [0.7] * 3


@pytest.mark.parametrize("kind", KINDS)
@given(start=positive, end=positive)
@settings(deadline=None, max_examples=40)
def test_every_curve_begins_at_its_start_and_ends_at_its_end(kind, start, end):
    assert kind(start, end)(0.0) == pytest.approx(start, rel=1e-9)
    assert kind(start, end)(1.0) == pytest.approx(end, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(start=positive, end=positive, here=position, there=position)
@settings(deadline=None, max_examples=60)
def test_every_curve_stays_between_its_ends_and_never_turns(kind, start, end, here, there):
    curve, slack = kind(start, end), 1e-9 * max(start, end)
    assert min(start, end) - slack <= curve(here) <= max(start, end) + slack
    step = curve(max(here, there)) - curve(min(here, there))
    assert step * math.copysign(1, end - start) >= -slack


@pytest.mark.parametrize("kind", KINDS)
def test_floats_go_in_and_floats_come_out(kind):
    assert type(kind(1, 2)(0.3)) is float


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (-1, 1)])
def test_an_exponential_that_touches_zero_is_refused(start, end):
    with pytest.raises(SetupError, match="cannot reach or cross 0"):
        exponential(start, end)


def test_combined_cosines_have_the_course_values():
    schedule = combine([0.3, 0.7], [cosine(0.3, 0.6), cosine(0.6, 0.2)])
    values = [schedule(p) for p in (0, 0.15, 0.3, 0.65, 1)]
    assert values == pytest.approx([0.3, 0.45, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (combine([0.5, 0.5], [cosine(0.2, 1.0), cosine(1.0, 0.1)]), [0.2, 0.6, 1.0, 0.55, 0.1]),
        (combine([0.3, 0.7], [linear(0.6, 2.0), linear(2.0, 0.1)]), [0.6, 1.3, 2.0, 1.05, 0.1]),
    ],
)
def test_the_lessons_warm_up_and_anneal_are_one_line_each(schedule, values):
    joint = schedule.fractions[0]
    places = [0, joint / 2, joint, (1 + joint) / 2, 1]
    assert [schedule(p) for p in places] == pytest.approx(values)


def test_any_number_of_schedules_can_be_combined():
    stairs = combine([0.2] * 5, [constant(level) for level in range(5)])
    assert [stairs(p) for p in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)] == [0, 0, 1, 2, 3, 4, 4]


def test_a_plain_function_may_stand_among_the_combined():
    half = combine([0.5, 0.5], [lambda p: p, lambda p: 10 + p])
    assert [half(p) for p in (0.25, 0.5, 0.75, 1.0)] == [0.5, 10, 10.5, 11]


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=80)
def test_combined_schedules_are_continuous_at_their_joints(weights, data):
    levels = data.draw(st.lists(positive, min_size=len(weights) + 1, max_size=len(weights) + 1))
    kinds = data.draw(
        st.lists(st.sampled_from(KINDS), min_size=len(weights), max_size=len(weights))
    )
    fractions = [weight / sum(weights) for weight in weights]
    parts = [kind(a, b) for kind, (a, b) in zip(kinds, pairwise(levels), strict=True)]
    schedule = combine(fractions, parts)
    joint, highest = 0.0, max(levels)
    for fraction, level in zip([0, *fractions], levels, strict=True):
        joint = min(joint + fraction, 1.0)
        for here in (max(joint - 1e-9, 0), joint, min(joint + 1e-9, 1)):
            assert schedule(here) == pytest.approx(level, abs=1e-4 * highest)
    assert schedule(0.0) == pytest.approx(levels[0])
    assert schedule(1.0) == pytest.approx(levels[-1])


@given(weights=st.lists(st.integers(0, 5), min_size=1, max_size=6), at=position)
@settings(deadline=None, max_examples=80)
def test_a_combined_schedule_stays_within_its_parts_also_where_a_share_is_empty(weights, at):
    if not sum(weights):
        weights[0] = 1
    fractions = [weight / sum(weights) for weight in weights]
    schedule = combine(fractions, [linear(i, i + 1) for i in range(len(weights))])
    assert 0 <= schedule(at) <= len(weights)


@pytest.mark.parametrize("fractions", [[0.3, 0.6], [0.6, 0.6], [1.5, -0.5], []])
def test_fractions_that_are_no_shares_of_a_whole_are_refused(fractions):
    with pytest.raises(SetupError, match=r"must be >= 0 and add up to 1"):
        combine(fractions, [constant(1)] * len(fractions))


def test_another_number_of_schedules_than_of_fractions_is_refused():
    with pytest.raises(SetupError, match="2 fractions, 1 schedules"):
        combine([0.5, 0.5], [constant(1)])


def test_phases_complete_the_shares():
    assert phases(0.3) == pytest.approx((0.3, 0.7))
    assert phases(0.3, 0.2) == pytest.approx((0.3, 0.2, 0.5))
    assert len(combine(phases(0.3, 0.2), [constant(1)] * 3).fractions) == 3


def test_one_cycle_has_its_end_points_and_its_peak_where_it_says():
    schedule = one_cycle(0.1)
    assert schedule(0.0) == pytest.approx(0.1 / 25)
    assert schedule(0.25) == pytest.approx(0.1)
    assert schedule(1.0) == pytest.approx(0.1 / 1e5)
    assert max(schedule(i / 1000) for i in range(1001)) == pytest.approx(0.1)
    other = one_cycle(1.0, start=10, end=100, warmup=0.5)
    assert [other(p) for p in (0, 0.5, 1)] == pytest.approx([0.1, 1.0, 0.01])


@given(high=positive, warmup=st.floats(0.01, 0.99), at=position)
@settings(deadline=None, max_examples=60)
def test_one_cycle_never_leaves_its_bounds(high, warmup, at):
    assert high / 1e5 * (1 - 1e-9) <= one_cycle(high, warmup=warmup)(at) <= high * (1 + 1e-9)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_cycle_without_a_rise_or_without_a_fall_is_still_a_schedule(warmup):
    schedule = one_cycle(0.1, warmup=warmup)
    assert all(math.isfinite(schedule(p)) for p in (0.0, 0.5, 1.0))


def test_the_one_cycle_of_the_chapter_has_592_values_with_the_maximum_at_148():
    n = 8 * 74
    values = [one_cycle(0.1)(i / n) for i in range(n)]
    assert values.index(max(values)) == 148
    assert values[0] == pytest.approx(0.004)
    assert values[74] == pytest.approx((0.004 + 0.1) / 2)
    # in the linear form of the chapter, from the same parts
    line = combine(phases(0.25), [linear(0.01, 0.1), linear(0.1, 0)])
    values = [line(i / n) for i in range(n)]
    assert values.index(max(values)) == 148
    assert [values[0], values[74], values[-1]] == pytest.approx([0.01, 0.055, 2.2523e-4], rel=1e-4)


def test_schedules_pickle_compare_and_show_their_arguments():
    schedule = combine([0.25, 0.75], [linear(0.1, 1), cosine(1, 0.001)])
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule != combine([0.25, 0.75], [linear(0.1, 1), cosine(1, 0.002)])
    assert repr(schedule) == "combine([0.25, 0.75], [linear(0.1, 1), cosine(1, 0.001)])"
    assert repr(constant(3)) == "constant(3, 3)" or repr(constant(3)) == "constant(3)"
