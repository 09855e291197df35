"""foundations: losses beside torch's, their gradients, and how they behave far out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from pellucid.errors import DataError
from pellucid.foundations import (
    binary_cross_entropy_with_logits,
    binary_nll,
    cross_entropy,
    log_softmax,
    logsumexp,
    mean_squared_error,
    nll,
    softmax,
)

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def assert_same(ours, theirs, x, *rest, double=1e-12):
    """Compare values and input gradients, to 1e-5 and better."""
    tolerance = dict.fromkeys(["rtol", "atol"], double if x.dtype == torch.float64 else 1e-5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    values = [ours(inputs[0], *rest), theirs(inputs[1], *rest)]
    torch.testing.assert_close(*values, **tolerance)
    gradient = torch.randn_like(values[0])
    for value in values:
        value.backward(gradient)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)


@given(shape=shapes, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=80)
def test_logsumexp_and_softmax_equal_torchs_for_any_rank_and_dimension(shape, data, dtype):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    scale = data.draw(st.sampled_from([1, 30]))
    x = torch.randn(shape, dtype=dtype) * scale
    assert_same(logsumexp, torch.logsumexp, x, dim)
    assert_same(log_softmax, F.log_softmax, x, dim)
    assert_same(softmax, F.softmax, x, dim)


@both_precisions
@pytest.mark.parametrize(
    "row",
    [
        [1000.0, 1001.0, 1002.0],
        [-1000.0, -1001.0, -1002.0],
        [-torch.inf, 0.0, 1.0],
        [0.0, 0.0, 0.0],
        [88.8, -1e30, 1e30],
    ],
)
def test_far_out_log_softmax_and_its_gradient_stay_torchs(row, dtype):
    assert_same(log_softmax, F.log_softmax, tensor(row, dtype=dtype), -1)


def test_where_everything_is_infinite_logsumexp_is_too():
    x = tensor([[-torch.inf] * 3, [torch.inf, 0, 0], [torch.nan, 0, 0]])
    torch.testing.assert_close(logsumexp(x), x.logsumexp(-1), equal_nan=True)


@both_precisions
def test_the_naive_softmax_fails_where_ours_has_the_lessons_numbers(dtype):
    x = tensor([1000.0, 1001.0, 1002.0], dtype=dtype)
    assert not (x.exp() / x.exp().sum()).isfinite().any()
    expected = tensor([-2.4076, -1.4076, -0.4076], dtype=dtype)
    torch.testing.assert_close(log_softmax(x), expected, atol=5e-5, rtol=0)


def test_log_softmax_is_one_number_however_it_is_written():
    x = torch.randn(50, 10)
    for other in (
        (x.exp() / x.exp().sum(-1, keepdim=True)).log(),
        x - x.exp().sum(-1, keepdim=True).log(),
        x - logsumexp(x)[:, None],
    ):
        torch.testing.assert_close(log_softmax(x), other, rtol=1e-3, atol=1e-5)


# ── one class of several ──────────────────────────────────────────────────────────────────────


@both_precisions
def test_cross_entropy_equals_torchs_and_the_definition(dtype):
    logits, targets = torch.randn(33, 10, dtype=dtype) * 3, torch.randint(10, (33,))
    assert_same(cross_entropy, F.cross_entropy, logits, targets)
    assert_same(nll, F.nll_loss, logits.log_softmax(-1), targets)
    by_definition = -(F.one_hot(targets, 10) * softmax(logits).log()).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), by_definition)


@both_precisions
def test_cross_entropy_of_a_class_a_pixel_and_a_class_a_token(dtype):
    logits, targets = torch.randn(2, 5, 3, 4, dtype=dtype), torch.randint(5, (2, 3, 4))

    def by_pixel(logits, targets):
        return cross_entropy(logits, targets, dim=1)

    assert_same(by_pixel, F.cross_entropy, logits, targets)
    tokens = logits.movedim(1, -1)
    assert cross_entropy(tokens, targets) == by_pixel(logits, targets)


def test_nll_has_the_lessons_numbers_and_takes_log_probabilities():
    probabilities, targets = tensor([[0.01, 0.98, 0.01], [0.001, 0.001, 0.998]]), tensor([1, 2])
    assert nll(probabilities.log(), targets).item() == pytest.approx(0.0111023, abs=1e-6)
    # given probabilities by mistake it would be negative
    assert nll(probabilities, targets) < 0


def test_targets_of_another_length_or_form_are_refused():
    for targets in (torch.zeros(2).long(), torch.zeros(4, 3), torch.zeros(4, 1).long()):
        with pytest.raises(DataError, match="differ in shape"):
            cross_entropy(torch.randn(4, 3), targets)


def test_a_label_out_of_range_is_an_error():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        cross_entropy(torch.randn(2, 3), tensor([0, 3]))


# ── yes or no ─────────────────────────────────────────────────────────────────────────────────


@both_precisions
def test_binary_losses_equal_torchs(dtype):
    logits = torch.randn(40, 3, dtype=dtype) * 4
    logits[:4] = tensor([0.0, 100.0, -100.0], dtype=dtype)
    for targets in (torch.randint(2, (40, 3)).to(dtype), torch.rand(40, 3, dtype=dtype)):
        assert_same(
            binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, logits, targets
        )
        middle = logits.clamp(-4, 4).sigmoid()
        assert_same(binary_nll, F.binary_cross_entropy, middle, targets)


def test_a_sure_and_wrong_yes_costs_its_logit_and_not_infinity():
    logits = tensor([1000.0, -1000.0]).requires_grad_()
    loss = binary_cross_entropy_with_logits(logits, tensor([0.0, 1.0]))
    loss.backward()
    assert loss == 1000 and logits.grad.tolist() == [0.5, -0.5]
    assert binary_nll(tensor([1.0]), tensor([0.0])) == 100
    assert binary_nll(tensor([0.0]), tensor([1.0])) == 100


@both_precisions
def test_binary_nll_and_its_gradients_stay_torchs_at_the_ends_where_logs_are_infinite(dtype):
    p = tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1e-20, 1e-13, 1e-7, 1 - 1e-7], dtype=dtype)
    y = tensor([0.0, 0.3, 1.0, 0.0, 0.3, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=dtype)
    # torch has its 1e-12 in float32 even for float64
    assert_same(binary_nll, F.binary_cross_entropy, p, y, double=1e-8)


@both_precisions
def test_binary_nll_can_be_differentiated_by_its_targets_and_twice(dtype):
    def for_targets(loss):
        return lambda y, p: loss(p, y)

    p, y = torch.rand(5, dtype=dtype) * 0.9 + 0.05, torch.rand(5, dtype=dtype)
    assert_same(for_targets(binary_nll), for_targets(F.binary_cross_entropy), y, p)
    inside = [t.double().requires_grad_() for t in (p, y)]
    assert torch.autograd.gradgradcheck(binary_nll, inside)


@pytest.mark.parametrize(("y", "p", "log10"), [(1.0, 0.98, 0.00877), (0.0, 0.9, 1.0)])
def test_binary_nll_has_the_spreadsheets_numbers(y, p, log10):
    loss = binary_nll(tensor([p]).double(), tensor([y]).double())
    assert loss.item() / 2.302585093 == pytest.approx(log10, abs=5e-6)


def test_softmax_forgets_a_shift_that_the_sigmoid_sees():
    one = tensor([0.0218, -2.4881, -1.7506, 2.0704, 1.2503])
    shares = tensor([0.0805, 0.0065, 0.0137, 0.6244, 0.2749])
    for logits in (one, one - 1.4428):
        torch.testing.assert_close(softmax(logits), shares, atol=1e-4, rtol=0)
    assert (one.sigmoid() - (one - 1.4428).sigmoid()).min() > 0.05


# ── numbers ───────────────────────────────────────────────────────────────────────────────────


@both_precisions
def test_mean_squared_error_equals_torchs(dtype):
    x, y = torch.randn(6, 2, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    assert_same(mean_squared_error, F.mse_loss, x, y)


@pytest.mark.parametrize("loss", [mean_squared_error, binary_nll, binary_cross_entropy_with_logits])
def test_shapes_that_torch_would_stretch_are_refused(loss):
    with pytest.raises(DataError, match="differ in shape"):
        loss(torch.rand(6, 1), torch.rand(6))
