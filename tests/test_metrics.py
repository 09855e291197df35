"""Metrics: against numpy and formulas, with their shapes and names checked."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from pellucid.errors import DataError, SetupError
from pellucid.metrics import MacroF1, MetricObject, accuracy, named


@given(n=st.integers(1, 200), classes=st.integers(2, 12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_accuracy_equals_numpy(n, classes, seed):
    source = np.random.default_rng(seed)
    preds, targets = source.normal(size=(n, classes)), source.integers(classes, size=n)
    share = accuracy(torch.from_numpy(preds), torch.from_numpy(targets))
    assert share.item() == pytest.approx((preds.argmax(1) == targets).mean())
    assert share.ndim == 0 and share.dtype == torch.float32


def test_accuracy_is_one_for_the_right_and_zero_for_the_wrong():
    targets = tensor([2, 0, 1])
    assert accuracy(F.one_hot(targets, 3), targets) == 1
    assert accuracy(F.one_hot((targets + 1) % 3, 3).float(), targets) == 0


def test_accuracy_of_images_counts_pixels():
    preds, targets = torch.randn(2, 5, 4, 4), torch.randint(5, (2, 4, 4))
    by_hand = (preds.numpy().argmax(1) == targets.numpy()).mean()
    assert accuracy(preds, targets).item() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("preds", "targets"),
    [
        (torch.zeros(8, 3), torch.zeros(8, 1, dtype=torch.long)),
        (torch.zeros(8, 3), torch.zeros(8, 3)),  # one-hot
        (torch.zeros(8, 3), torch.zeros(1, dtype=torch.long)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.long)),  # no classes
        (torch.zeros(8, 5, 3), torch.zeros(8, dtype=torch.long)),
    ],
)
def test_shapes_that_would_be_stretched_are_an_error(preds, targets):
    with pytest.raises(DataError, match=r"accuracy compares predictions \(n, classes\)"):
        accuracy(preds, targets)


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_the_accuracy_of_one_output_is_refused_with_what_to_write(shape):
    with pytest.raises(DataError, match="there is one alone") as caught:
        accuracy(torch.randn(8, 1), torch.ones(shape, dtype=torch.long))
    written: dict = {"accuracy": None}
    exec(str(caught.value).split("write a metric: ")[1], written)
    assert written["hits"](tensor([[2.0], [-1.0]]), tensor([[1], [1]])) == 0.5


@pytest.mark.parametrize(
    ("preds", "targets"),
    [
        (torch.zeros(8, 5), torch.zeros(8, dtype=torch.long)),
        (torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)),
        (torch.zeros(8, 3), torch.zeros(8, 1, dtype=torch.long)),
        (torch.zeros(8, 3, 2), torch.zeros(8, 2, dtype=torch.long)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.long)),
    ],
)
def test_macro_f1_of_other_shapes_is_refused(preds, targets):
    with pytest.raises(DataError, match=r"MacroF1\(3\) compares predictions \(n, 3\)"):
        MacroF1(3).update(preds, targets)


def macro_f1_by_hand(guesses, targets, n_classes):
    scores = []
    for c in range(n_classes):
        hits = ((guesses == c) & (targets == c)).sum()
        wrong = ((guesses == c) & (targets != c)).sum() + ((guesses != c) & (targets == c)).sum()
        if hits + wrong:
            scores.append(2 * hits / (2 * hits + wrong))
    return np.mean(scores)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    classes=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_macro_f1_over_ragged_batches_equals_a_direct_computation(sizes, classes, seed):
    source = np.random.default_rng(seed)
    metric, guesses, truths = MacroF1(classes), [], []
    for n in sizes:
        preds, targets = source.normal(size=(n, classes)), source.integers(classes, size=n)
        metric.update(torch.from_numpy(preds), torch.from_numpy(targets))
        guesses.append(preds.argmax(1))
        truths.append(targets)
    by_hand = macro_f1_by_hand(np.concatenate(guesses), np.concatenate(truths), classes)
    assert metric.compute().item() == pytest.approx(by_hand)


def test_macro_f1_starts_anew_after_a_reset():
    metric = MacroF1(3)
    assert metric.compute().isnan()
    metric.update(torch.eye(3), tensor([1, 2, 0]))
    assert metric.compute() == 0
    metric.reset()
    assert metric.compute().isnan()
    metric.update(torch.eye(3), tensor([0, 1, 2]))
    assert metric.compute() == 1
    assert repr(metric) == "MacroF1(3)"


def test_metrics_are_named_after_functions_and_classes():
    def top_two(preds, targets):
        return tensor(0.0)

    found = named([accuracy, MacroF1(3), partial(top_two)])
    assert list(found) == ["accuracy", "macro_f1", "top_two"]
    assert isinstance(found["macro_f1"], MetricObject)


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(SetupError, match="would be called 'accuracy'"):
        named([accuracy, accuracy])


def test_a_metric_called_loss_is_refused():
    def loss(preds, targets):
        return tensor(0.0)

    with pytest.raises(SetupError, match="would be called 'loss'"):
        named([loss])


@pytest.mark.parametrize("thing", [MacroF1, 3, None, object()])
def test_what_is_no_metric_is_refused(thing):
    with pytest.raises(SetupError, match="A metric is a function"):
        named([thing])


def test_a_metric_given_by_its_name_is_refused():
    with pytest.raises(SetupError, match="not the name 'accuracy'"):
        named(["accuracy"])
