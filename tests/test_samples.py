"""Samples: evenly spread over items and places; counted together as each by itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pellucid.histograms import ACTIVATIONS, GRADIENTS
from pellucid.samples import N_SAMPLED, Samples, sample

BINS = (ACTIVATIONS, GRADIENTS)
N_TENSORS, N_COLUMNS, SQUARES = 3, 2 + ACTIVATIONS.n_bins, 1

items = st.integers(1, 400)
places = st.lists(st.integers(1, 40), min_size=0, max_size=3)


@given(items, places)
@example(20, [20, 21])
@example(4, [2310])
@settings(deadline=None, max_examples=150)
def test_a_sample_is_all_or_a_stated_number(n, shape):
    x = torch.arange(n * math.prod(shape)).reshape(n, *shape)
    values = sample(x)
    assert len(values.unique()) == len(values) <= 2 * N_SAMPLED
    if x.numel() <= 2 * N_SAMPLED:
        assert len(values) == x.numel()
    else:
        # fewest where an item's size is divisible by all small primes
        assert len(values) >= N_SAMPLED / 7


@pytest.mark.parametrize(
    "shape",
    [(512, 50), (64, 784), (512, 8, 14, 14), (64, 512, 4, 4), (64, 64, 32, 32), (50, 210, 4),
     (40, 30, 28, 28), (2, 64, 112, 112), (16, 100, 768), (60_000, 3), (40_000,)],
)  # fmt: skip
def test_a_sample_is_of_all_items_and_all_places(shape):
    place, item = torch.meshgrid(
        torch.arange(math.prod(shape[1:])), torch.arange(shape[0]), indexing="xy"
    )
    of_places, of_items = (sample(t.reshape(shape)) for t in (place, item))
    assert N_SAMPLED / 3 <= len(of_places) <= 2 * N_SAMPLED
    n_places = place.shape[1]
    assert len(of_places.unique()) == min(n_places, len(of_places))
    assert len(of_items.unique()) >= min(shape[0], len(of_places)) * 0.99
    # evenly: no half of the places or the items is preferred
    for found, all_of_them in ((of_places, place), (of_items, item)):
        middle = all_of_them.float().mean()
        expected = (all_of_them >= middle).float().mean().item()
        assert (found >= middle).float().mean() == pytest.approx(expected, abs=0.05)


def test_a_share_is_known_to_1_percent_even_if_items_differ():
    """Each image dark or light as a whole: a sample of one image would tell 0 or 1."""
    x = torch.rand(64, 1, 1, 1).expand(64, 32, 32, 32) + 0.01 * torch.randn(64, 32, 32, 32)
    share = (x < 0.3).float().mean().item()
    assert (sample(x) < 0.3).float().mean().item() == pytest.approx(share, abs=0.01)


# ── counting ──────────────────────────────────────────────────────────────────────────────────

added = st.lists(
    st.tuples(st.integers(0, 2 * N_TENSORS - 1), st.integers(1, 300), st.booleans()), max_size=8
)


def by_itself(rows: torch.Tensor, number: int, values: torch.Tensor) -> None:
    kind, tensor = divmod(number, N_TENSORS)
    row = rows[kind, tensor]
    row[SQUARES] += values.double().var(correction=0) * len(values)
    found = np.bincount(BINS[kind].index(values), minlength=BINS[kind].n_bins)
    row[-BINS[kind].n_bins :] += torch.from_numpy(found)


@settings(deadline=None, max_examples=60)
@given(st.lists(added, max_size=3), st.integers(0, 2**32))
def test_samples_of_any_sizes_are_counted_together_as_each_by_itself(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(2, N_TENSORS, N_COLUMNS)
    expected, samples = rows.double(), Samples(rows, SQUARES, BINS)
    for batch in batches:
        for number, n, forgotten in batch:
            values = torch.randn(n, generator=generator) * 10.0 ** (number - 2) + number
            samples.add(number, values)
            if forgotten:
                samples.clear()
                samples.add(number, values)
        waiting = list(samples._waiting)
        for number, values in zip(samples._numbers, waiting, strict=True):
            by_itself(expected, number, values)
        samples.count()
        samples.count()  # nothing waits
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows[..., -ACTIVATIONS.n_bins :].double(), expected[..., 2:])
    assert not rows[..., 0].any()


def test_a_sample_is_what_it_was_when_it_came_whatever_becomes_of_the_tensor():
    rows = torch.zeros(2, N_TENSORS, N_COLUMNS)
    samples, values = Samples(rows, SQUARES, BINS), torch.full((5,), -3.0)
    samples.add(0, values)
    values.relu_()
    samples.count()
    assert rows[0, 0, 2 + ACTIVATIONS.index(torch.tensor(-3.0))] == 5


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_counted_and_stays_in_its_row(strange):
    rows = torch.zeros(2, N_TENSORS, N_COLUMNS)
    samples = Samples(rows, SQUARES, BINS)
    for number, values in enumerate([[1.0, strange], [1.0, 3.0], [strange, 1.0]]):
        samples.add(number, torch.tensor(values))
    samples.count()
    assert rows[0, :, 2:].sum(-1).tolist() == [2, 2, 2]
    assert rows[0, :, SQUARES].isnan().tolist() == [True, False, True]
    assert rows[0, 1, SQUARES] == 2


def test_a_small_spread_far_from_zero_keeps_its_digits():
    rows = torch.zeros(2, N_TENSORS, N_COLUMNS)
    samples, values = Samples(rows, SQUARES, BINS), 1e6 + torch.randn(N_SAMPLED)
    samples.add(1, values)
    samples.count()
    exact = values.double().var(correction=0) * len(values)
    assert rows[0, 1, SQUARES].item() == pytest.approx(exact.item(), rel=1e-4)
