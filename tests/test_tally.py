"""The tally: an epoch's averages equal one pass over all items, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from pellucid.errors import NonFiniteLoss
from pellucid.losses import cross_entropy
from pellucid.metrics import MacroF1, accuracy, named
from pellucid.record import Record
from pellucid.tally import Tally

ragged = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def batches(sizes, seed=0, classes=4):
    source = torch.Generator().manual_seed(seed)
    for n in sizes:
        yield (
            torch.randn(n, classes, generator=source, dtype=torch.float64),
            torch.randint(classes, (n,), generator=source),
        )


def tallied(sizes, metrics, seed=0, read_after=()):
    tally = Tally(named(metrics))
    for i, (preds, targets) in enumerate(batches(sizes, seed)):
        tally.add(cross_entropy(preds, targets), preds, targets, len(targets), ())
        if i in read_after:
            tally.read()
    return tally.results()


class Spread:
    """As torchmetrics' objects: update, compute, reset, and more methods besides."""

    def __init__(self):
        self.reset()

    def update(self, preds, target):
        self.differences.append(preds[:, 0] - target)

    def compute(self):
        return torch.cat(self.differences).abs().amax()

    def reset(self):
        self.differences = []

    def __call__(self, preds, target):
        raise AssertionError("an object is updated, not called")

    def forward(self, preds, target):
        raise AssertionError("an object is updated, not called")


@given(sizes=ragged, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_averages_of_ragged_batches_equal_one_pass_over_all_items(sizes, seed):
    results = tallied(sizes, [accuracy, MacroF1(4), Spread()], seed)
    preds, targets = map(torch.cat, zip(*batches(sizes, seed), strict=True))
    assert results["valid/loss"] == pytest.approx(cross_entropy(preds, targets).item())
    right = (preds.argmax(1) == targets).sum().item()
    assert results["valid/accuracy"] == pytest.approx(right / len(targets), abs=1e-7)
    whole = MacroF1(4)
    whole.update(preds, targets)
    assert results["valid/macro_f1"] == pytest.approx(whole.compute().item(), nan_ok=True)
    assert results["valid/spread"] == (preds[:, 0] - targets).abs().max().item()


@given(sizes=ragged, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_accuracy_times_the_number_of_items_is_an_integer(sizes, seed):
    total = tallied(sizes, [accuracy], seed)["valid/accuracy"] * sum(sizes)
    assert total == pytest.approx(round(total), abs=1e-5 * max(total, 1))


def test_the_printed_averages_of_the_sources_are_counts_over_items():
    assert tallied_count(840, 3925) == pytest.approx(0.2140127388535032, abs=1e-7)
    assert tallied_count(2234, 9469) == pytest.approx(0.23592776428345127, abs=1e-7)


def tallied_count(right, n, batch_size=256):
    tally = Tally({"accuracy": accuracy})
    hits = torch.zeros(n, dtype=torch.long)
    hits[torch.randperm(n)[:right]] = 1
    for part in hits.split(batch_size):
        preds = torch.stack([1 - part, part], 1).float()
        tally.add(tensor(0.0), preds, torch.ones_like(part), len(part), ())
    return tally.results()["valid/accuracy"]


@given(sizes=ragged, when=st.sets(st.integers(0, 11)))
@settings(deadline=None, max_examples=30)
def test_when_the_numbers_are_read_makes_no_difference(sizes, when):
    read_often = tallied(sizes, [accuracy], read_after=when)
    assert read_often == pytest.approx(tallied(sizes, [accuracy]), rel=1e-12)


@pytest.mark.parametrize("n", [1, 42, 43, 63, 64, 65, 127, 128, 129, 300])
def test_no_number_is_lost_at_the_edge_of_a_chunk(n):
    record = Record()
    tally = Tally({"index": lambda preds, targets: preds}, record)
    tally.read()
    for i in range(n):
        tally.add(tensor(float(i)), tensor(10.0 * i), None, 1, (i,))
    results = tally.results()
    assert record["train/loss"].tolist() == list(range(n))
    assert record["train/index"].tolist() == [10.0 * i for i in range(n)]
    assert record["batch"].tolist() == list(range(n))
    assert results["train/loss"] == pytest.approx((n - 1) / 2)


def test_a_metric_may_return_a_plain_number():
    tally = Tally({"share": lambda preds, targets: 0.25, "number": lambda preds, targets: 2})
    tally.add(tensor(1.0), torch.zeros(3, 2), torch.zeros(3), 3, ())
    assert tally.results() == {"valid/loss": 1.0, "valid/share": 0.25, "valid/number": 2.0}


def test_a_metric_may_come_in_another_precision_than_the_loss():
    tally = Tally({"count": lambda preds, targets: tensor(3), "half": lambda p, t: p.half().mean()})
    tally.add(tensor(1.0, dtype=torch.float64), torch.ones(3), None, 3, ())
    tally.add(tensor(1.0, dtype=torch.float64), torch.ones(3), None, 3, ())
    assert tally.results() == {"valid/loss": 1.0, "valid/count": 3.0, "valid/half": 1.0}


def test_metrics_see_predictions_without_their_graph():
    seen = []

    def watch(preds, targets):
        seen.append(preds)
        return 0.0

    weight = torch.ones(3, requires_grad=True)
    preds = {"a": weight * 2, "b": (weight * 3, "text")}
    Tally({"watch": watch}).add((weight * 2).sum(), preds, None, 3, ())
    assert not seen[0]["a"].requires_grad and not seen[0]["b"][0].requires_grad
    assert seen[0]["b"][1] == "text"


def test_objects_are_reset_for_every_pass():
    spread = Spread()
    for value in (5.0, 2.0):
        tally = Tally(named([spread]))
        tally.add(tensor(0.0), tensor([[value]]), tensor([0]), 1, ())
        assert tally.results()["valid/spread"] == value


def test_a_pass_without_batches_has_no_numbers():
    assert math.isnan(Tally({}).results()["valid/loss"])
    assert math.isnan(Tally({"accuracy": accuracy}).averages()["valid/accuracy"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_training_loss_that_is_no_number_is_refused_with_what_came_before(bad):
    record = Record()
    tally = Tally({}, record, ["lr"])
    for i, loss in enumerate([1.0, 2.0, 3.0, 4.0, bad, 5.0]):
        tally.add(tensor(loss), None, None, 1, (i, 0.5))
    with pytest.raises(NonFiniteLoss) as caught:
        tally.read()
    assert "epoch 0, batch 4" in str(caught.value)
    assert "the losses before it 2, 3, 4, lr 0.5" in str(caught.value)
    np.testing.assert_array_equal(record["train/loss"], [1, 2, 3, 4, bad, 5])


def test_a_validation_loss_that_is_no_number_is_shown_as_it_is():
    tally = Tally({})
    tally.add(tensor(math.nan), None, None, 1, ())
    assert math.isnan(tally.results()["valid/loss"])
