"""Losses: the numbers of the sources, equality with torch, stability far out."""

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from pellucid.errors import DataError
from pellucid.losses import (
    binary_nll,
    cross_entropy,
    log_softmax,
    logsumexp,
    mean_squared_error,
    nll,
    nll_of_probabilities,
)

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
PROBABILITIES = tensor([[0.01, 0.98, 0.01], [0.001, 0.001, 0.998]])


def test_cross_entropy_is_the_product_with_the_one_hot_targets():
    logits, targets = torch.randn(7, 4), torch.randint(4, (7,))
    one_hot = F.one_hot(targets, 4)
    by_definition = -(one_hot * logits.softmax(-1).log()).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), by_definition)


def test_nll_of_probabilities_has_the_lessons_numbers():
    table = -PROBABILITIES.log()
    expected = tensor([[4.6052, 0.0202, 4.6052], [6.9078, 6.9078, 0.0020]])
    torch.testing.assert_close(table, expected, atol=5e-5, rtol=0)
    loss = nll_of_probabilities(PROBABILITIES, tensor([1, 2]))
    assert loss.item() == pytest.approx(0.0111023, abs=1e-6)


def test_nll_takes_log_probabilities_as_torch_does():
    logs, targets = PROBABILITIES.log(), tensor([1, 2])
    assert nll(logs, targets) == F.nll_loss(logs, targets)
    assert nll(logs, targets) == nll_of_probabilities(PROBABILITIES, targets)
    # the slip that the two names guard against
    assert nll(PROBABILITIES, targets) < 0


@both_precisions
def test_log_softmax_agrees_however_it_is_written(dtype):
    x = torch.randn(50, 10, dtype=dtype)
    three = [
        (x.exp() / x.exp().sum(-1, keepdim=True)).log(),
        x - x.exp().sum(-1, keepdim=True).log(),
        x - x.logsumexp(-1, keepdim=True),
    ]
    for other in three:
        torch.testing.assert_close(log_softmax(x), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (2, 1, 3, 6)])
@both_precisions
def test_logsumexp_and_log_softmax_equal_torch_for_any_rank(shape, dtype):
    x = torch.randn(shape, dtype=dtype) * 5
    torch.testing.assert_close(logsumexp(x), torch.logsumexp(x, -1))
    torch.testing.assert_close(log_softmax(x), x.log_softmax(-1))


@both_precisions
def test_log_softmax_is_stable_at_a_thousand_where_the_naive_form_is_not(dtype):
    x = tensor([1000.0, 1001.0, 1002.0], dtype=dtype)
    assert not (x.exp() / x.exp().sum()).log().isfinite().any()
    expected = tensor([-2.4076, -1.4076, -0.4076], dtype=dtype)
    torch.testing.assert_close(log_softmax(x), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(log_softmax(-x), expected.flip(0), atol=5e-5, rtol=0)
    assert cross_entropy(x[None], tensor([0])).item() == pytest.approx(2.4076, abs=5e-5)


@both_precisions
def test_cross_entropy_equals_torch_in_value_and_gradient(dtype):
    logits = (torch.randn(33, 10, dtype=dtype) * 3).requires_grad_()
    targets = torch.randint(10, (33,))
    ours, torchs = cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(ours, F.nll_loss(F.log_softmax(logits, -1), targets))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    assert ours.ndim == 0 and ours.dtype == dtype


def test_a_clueless_guess_among_ten_costs_log_ten():
    loss = cross_entropy(torch.zeros(8, 10), torch.arange(8))
    assert loss.item() == pytest.approx(2.302585, abs=1e-6)


@pytest.mark.parametrize(("y", "p", "log10"), [(1.0, 0.98, 0.00877), (0.0, 0.9, 1.0)])
def test_binary_nll_has_the_spreadsheets_numbers(y, p, log10):
    loss = binary_nll(tensor([p], dtype=torch.float64), tensor([y], dtype=torch.float64))
    assert (loss / torch.tensor(10.0, dtype=torch.float64).log()).item() == pytest.approx(
        log10, abs=5e-6
    )


@both_precisions
def test_binary_nll_equals_torchs_binary_cross_entropy(dtype):
    p, y = torch.rand(40, dtype=dtype) * 0.98 + 0.01, torch.randint(2, (40,)).to(dtype)
    torch.testing.assert_close(binary_nll(p, y), F.binary_cross_entropy(p, y))


def test_softmax_forgets_a_shift_that_sigmoid_sees():
    one = tensor([0.0218, -2.4881, -1.7506, 2.0704, 1.2503])
    two = tensor([-1.4210, -3.9309, -3.1932, 0.6276, -0.1926])
    for logits in (one, two):
        expected = tensor([0.0805, 0.0065, 0.0137, 0.6244, 0.2749])
        torch.testing.assert_close(log_softmax(logits).exp(), expected, atol=1e-4, rtol=0)
    sigmoids = [tensor([0.505, 0.077, 0.148, 0.888, 0.777]),
                tensor([0.194, 0.019, 0.039, 0.652, 0.452])]  # fmt: skip
    for logits, expected in zip((one, two), sigmoids, strict=True):
        torch.testing.assert_close(logits.sigmoid(), expected, atol=6e-4, rtol=0)


@both_precisions
def test_mean_squared_error_equals_torch(dtype):
    preds, targets = torch.randn(6, 2, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    assert mean_squared_error(preds, targets) == F.mse_loss(preds, targets)


def test_mean_squared_error_refuses_to_stretch():
    with pytest.raises(DataError, match="differ in shape"):
        mean_squared_error(torch.zeros(6, 1), torch.zeros(6))
