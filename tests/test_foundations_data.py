"""foundations: data set, samplers, collate and DataLoader, beside lists and torch's own."""

import numpy as np
import pytest
import torch
import torch.utils.data as torchs
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import DataError, SetupError
from pellucid.foundations import BatchSampler, DataLoader, Dataset, Sampler, collate

ragged = {"n": st.integers(1, 40), "size": st.integers(1, 12), "drop_last": st.booleans()}


def dataset(n=10):
    return Dataset(torch.randn(n, 3, 2), torch.arange(n))


def test_a_data_set_gives_an_item_a_slice_or_several():
    data = dataset(50)
    x, y = data.arrays
    assert len(data) == 50
    assert torch.equal(data[7][0], x[7]) and data[7][1] == 7
    assert [part.shape for part in data[0:5]] == [(5, 3, 2), (5,)]
    assert torch.equal(data[torch.tensor([3, 1])][1], y[[3, 1]])
    with pytest.raises(IndexError):
        data[50]


def test_arrays_of_different_length_make_no_data_set():
    with pytest.raises(DataError, match=r"one length.*\n  saw: \(float32 3×1, float32 2\)"):
        Dataset(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(DataError):
        Dataset()


# ── which items ───────────────────────────────────────────────────────────────────────────────


def test_pieces_are_the_lessons():
    assert list(BatchSampler(Sampler(10), 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert list(BatchSampler(Sampler(10), 3, drop_last=True))[-1] == [6, 7, 8]
    assert len(BatchSampler(Sampler(50_000), 64)) == 782


@given(**ragged)
@settings(deadline=None, max_examples=80)
def test_pieces_equal_torchs_of_the_same_sampler(n, size, drop_last):
    for order in (Sampler(n), torchs.SequentialSampler(range(n)), list(range(n))[::-1]):
        ours = BatchSampler(order, size, drop_last)
        theirs = torchs.BatchSampler(order, size, drop_last)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs) == len(list(ours))


@given(n=st.integers(0, 60))
@settings(deadline=None, max_examples=30)
def test_a_shuffled_order_is_a_permutation_and_the_plain_one_is_not_shuffled(n):
    assert list(Sampler(n)) == list(range(n))
    assert sorted(Sampler(n, shuffle=True)) == list(range(n))


def test_every_pass_shuffles_anew_and_a_seed_repeats_it():
    sampler = Sampler(50, shuffle=True)
    torch.manual_seed(1)
    first, second = list(sampler), list(sampler)
    assert first != second
    torch.manual_seed(1)
    assert list(sampler) == first


# ── how they become a batch ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "item",
    [
        torch.arange(3.0), 7, True, np.arange(3), (torch.zeros(2), 5), [torch.zeros(2), (1, 2)],
        {"image": torch.zeros(2), "label": (3, np.float32(0.5))},
    ],
    ids=lambda item: type(item).__name__,
)  # fmt: skip
def test_collate_equals_torchs(item):
    items = [item] * 4
    ours, theirs = collate(items), torchs.default_collate(items)
    assert_same_batch(ours, theirs)


def assert_same_batch(ours, theirs):
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_batch(a, b)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_python_float_gets_the_dtype_that_models_compute_in():
    assert collate([0.5, 1.0]).dtype == torch.float32
    assert collate([np.float64(0.5)]).dtype == torch.float64
    assert collate([(torch.zeros(2), 0.5)])[1].dtype == torch.float32


def test_items_of_different_shape_or_form_make_no_batch():
    with pytest.raises(RuntimeError, match="equal size"):
        collate([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="zip"):
        collate([(1, 2), (1, 2, 3)])


# ── the loader ────────────────────────────────────────────────────────────────────────────────


@given(**ragged)
@settings(deadline=None, max_examples=60)
def test_a_loader_equals_torchs_of_the_same_order(n, size, drop_last):
    data, order = dataset(n), torch.randperm(n).tolist()
    for sampler in (None, order):
        ours = DataLoader(data, size, sampler=sampler, drop_last=drop_last)
        theirs = torchs.DataLoader(data, size, sampler=sampler, drop_last=drop_last)
        assert len(ours) == len(theirs)
        for batch, expected in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, batch, expected))


def test_training_is_shuffled_anew_each_pass_and_validation_never():
    train, valid = DataLoader(dataset(60), 7, shuffle=True), DataLoader(dataset(60), 14)
    passes = [torch.cat([y for _, y in loader]).tolist() for loader in (train, train)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(60))
    for _ in range(2):
        assert torch.cat([y for _, y in valid]).tolist() == list(range(60))
    assert (len(train), len(valid)) == (9, 5)


def test_collate_may_be_replaced():
    loader = DataLoader(range(5), 2, collate_fn=sum)
    assert list(loader) == [1, 5, 4]


def test_settings_without_effect_or_sense_are_refused():
    with pytest.raises(SetupError, match="no effect beside a sampler"):
        DataLoader(dataset(), 3, shuffle=True, sampler=[1, 2])
    with pytest.raises(SetupError, match=r"one item or more.*\n  saw: batch_size=0"):
        DataLoader(dataset(), 0)
