"""Accumulate: pieces of any size give the step of the whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from pellucid import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelStep,
    DataLoaders,
    Learner,
)
from pellucid.callbacks import Accumulate, Clip, OneCycle, Progress
from pellucid.errors import SetupError
from pellucid.optim import params_of


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def items(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 6), torch.randint(3, (n,))


def pieces(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = items(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


class Unsized:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Steps(Callback):
    """Keep the gradients of each step."""

    order = 40

    def __init__(self):
        self.gradients = []

    def after_backward(self, learn):
        self.gradients.append([param.grad.clone() for param in params_of(learn.opt)])


def learner(train, *callbacks, opt_func=SGD, loss_func=F.cross_entropy, lr=0.1) -> Learner:
    data = DataLoaders(train)
    return Learner(
        mlp(), data, loss_func, opt_func, lr, callbacks=[Progress("off"), *callbacks], device="cpu"
    )


def windows(batches, n):
    """Join every n batches into one."""
    parts = [batches[i : i + n] for i in range(0, len(batches), n)]
    return [tuple(torch.cat(column) for column in zip(*part, strict=True)) for part in parts]


def largest_difference(ours, theirs) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    n=st.integers(1, 5),
    sized=st.booleans(),
)
def test_the_gradient_is_that_of_the_whole_batch(sizes, n, sized):
    batches = pieces(sizes)
    whole, parts = Steps(), Steps()
    learner(windows(batches, n), whole).fit(1)
    learn = learner(batches if sized else Unsized(batches), Accumulate(n), parts)
    learn.fit(1)
    assert len(parts.gradients) == len(whole.gradients) == learn.step == -(-len(sizes) // n)
    for ours, theirs in zip(parts.gradients, whole.gradients, strict=True):
        assert largest_difference(ours, theirs) <= 1e-6


@pytest.mark.parametrize("n_batches", [12, 13])
def test_schedules_momentum_and_clipping_go_as_with_large_batches(n_batches):
    batches = pieces([4] * n_batches)
    weights = []
    for train, more in ((windows(batches, 3), []), (batches, [Accumulate(3)])):
        learn = learner(train, OneCycle(0.05), Clip(norm=0.3), *more, opt_func=AdamW)
        learn.fit(3)
        weights.append([param.detach() for param in learn.model.parameters()])
    assert learn.step == 3 * -(-n_batches // 3)
    if (
        n_batches == 12
    ):  # else a window of one is a smaller share of the run in one than in the other
        assert largest_difference(*weights) <= 1e-6


def test_a_window_of_one_changes_nothing_but_rounding():
    batches = pieces([8, 8, 8])  # by a power of two, not even that
    plain, one = learner(batches), learner(batches, Accumulate(1))
    for learn in (plain, one):
        learn.fit(2)
    assert largest_difference(plain.model.parameters(), one.model.parameters()) == 0


def test_what_is_counted():
    learn = learner(pieces([3, 4, 5, 2]), Accumulate(3))
    learn.fit(2)
    assert (learn.step, learn.n_batches_seen, learn.n_items_seen) == (4, 8, 28)


def test_losses_on_record_are_the_means_of_the_pieces():
    batches = pieces([3, 5, 4])
    learn = learner(batches, Accumulate(3))
    learn.fit(1)
    model = mlp()
    expected = [F.cross_entropy(model(x), y).item() for x, y in batches]
    assert learn.record["train/loss"].tolist() == pytest.approx(expected, abs=1e-7)
    assert learn.record.epochs[-1]["train/loss"] == pytest.approx(
        sum(loss * n for loss, n in zip(expected, (3, 5, 4), strict=True)) / 12, abs=1e-6
    )


def test_weighed_by_the_tokens_that_count():
    def per_token(preds, targets):
        return F.cross_entropy(preds.flatten(0, 1), targets.flatten(), ignore_index=-100)

    torch.manual_seed(1)
    x, y = torch.randn(6, 5, 6), torch.randint(3, (6, 5))
    y[:2, 1:] = -100  # so the pieces hold 2, 8 and 10 tokens of 20
    y[2, :2] = -100
    batches = list(zip(x.split(2), y.split(2), strict=True))
    whole, parts = Steps(), Steps()
    learner([(x, y)], whole, loss_func=per_token).fit(1)
    count = Accumulate(3, weigh=lambda learn: (learn.y != -100).sum())
    learner(batches, count, parts, loss_func=per_token).fit(1)
    assert largest_difference(parts.gradients[0], whole.gradients[0]) <= 1e-6


def raising(moment: str, kind: type[Exception], at: int, order: int):
    def act(self, learn):
        if learn.training and learn.batch_index == at and learn.epoch == 0:
            raise kind

    return type("Raising", (Callback,), {"changes": True, "order": order, moment: act})()


@pytest.mark.parametrize("order", [0, 30])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("moment", ["before_batch", "after_loss"])
def test_a_batch_cancelled_before_its_gradient_is_left_out_of_the_mean(moment, at, order):
    batches, found = pieces([4, 4, 4, 4]), Steps()
    learner(batches, Accumulate(4), found, raising(moment, CancelBatch, at, order)).fit(1)
    [ours] = found.gradients
    model, kept = mlp(), [batch for i, batch in enumerate(batches) if i != at]
    x, y = (torch.cat(column) for column in zip(*kept, strict=True))
    F.cross_entropy(model(x), y).backward()
    assert largest_difference(ours, [param.grad for param in model.parameters()]) <= 1e-6


def test_a_batch_cancelled_after_its_gradient_drops_the_window():
    batches, found = pieces([4, 4, 4, 4]), Steps()
    cancel = raising("after_backward", CancelBatch, 1, 5)
    learner(batches, Accumulate(4), found, cancel).fit(1)
    model = mlp()
    x, y = (torch.cat(column) for column in zip(*batches[2:], strict=True))
    F.cross_entropy(model(x), y).backward()
    [ours] = found.gradients
    assert largest_difference(ours, [param.grad for param in model.parameters()]) <= 1e-6


@pytest.mark.parametrize("moment", ["before_batch", "after_loss"])
def test_a_cancelled_epoch_steps_with_what_it_has(moment):
    batches, found = pieces([4, 4, 4, 4]), Steps()
    learn = learner(batches, Accumulate(3), found, raising(moment, CancelEpoch, 1, 30))
    learn.fit(1)
    model = mlp()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    [ours] = found.gradients
    assert largest_difference(ours, [param.grad for param in model.parameters()]) <= 1e-6
    assert learn.step == 1 and all(param.grad is None for param in params_of(learn.opt))


def test_another_who_keeps_gradients_is_reckoned_with():
    batches, found = pieces([4, 4]), Steps()
    learner(batches, Accumulate(1), found, raising("after_backward", CancelStep, 0, 0)).fit(1)
    [(x, y)] = windows(batches, 2)
    model = mlp()
    F.cross_entropy(model(x), y).backward()
    [ours] = found.gradients
    assert largest_difference(ours, [param.grad for param in model.parameters()]) <= 1e-6


def test_nothing_is_left_after_an_error():
    learn = learner(pieces([4] * 5), Accumulate(3))
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, callbacks=[raising("after_loss", ZeroDivisionError, 1, 0)])
    assert all(param.grad is None for param in learn.model.parameters())
    fresh = learner(pieces([4] * 5), Accumulate(3))
    for one in (learn, fresh):
        one.fit(1)
    assert largest_difference(learn.model.parameters(), fresh.model.parameters()) == 0


def test_looks_within_the_fit_do_not_disturb_the_window():
    class Looks(Callback):
        def after_batch(self, learn):
            learn.validate(pieces([2, 2]))

    plain, looking = (
        learner(pieces([4] * 5), Accumulate(3)),
        learner(pieces([4] * 5), Accumulate(3)),
    )
    plain.fit(1)
    looking.fit(1, callbacks=[Looks()])
    assert largest_difference(plain.model.parameters(), looking.model.parameters()) == 0


def test_sparse_gradients_are_accumulated_too():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(10, 3, mode="sum", sparse=True)
    batches = [(torch.randint(10, (n, 4)), torch.randint(3, (n,))) for n in (3, 5)]
    learns = []
    for train, more in ((windows(batches, 2), []), (batches, [Accumulate(2)])):
        learn = Learner(
            copy.deepcopy(model), DataLoaders(train), F.cross_entropy, SGD, 0.1,
            callbacks=[Progress("off"), *more], device="cpu",
        )  # fmt: skip
        learn.fit(2)
        learns.append(learn)
    first, second = (learn.model.parameters() for learn in learns)
    assert largest_difference(first, second) <= 1e-6


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_a_window_is_a_number_of_batches(n):
    with pytest.raises(SetupError, match="1 or more"):
        Accumulate(n)


def test_lbfgs_is_refused():
    with pytest.raises(SetupError, match="LBFGS"):
        learner(pieces([4]), Accumulate(2), opt_func=LBFGS).fit(1)


# ── clipping ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", [{"norm": 0.01}, {"norm": 100.0}, {"value": 0.001}])
def test_clip_is_that_of_torch(limit):
    batches = pieces([8, 8, 8])
    learn = learner(batches, Clip(**limit))
    learn.fit(1)
    model = mlp()
    opt = SGD(model.parameters(), lr=0.1, fused=True)
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        if "norm" in limit:
            nn.utils.clip_grad_norm_(model.parameters(), limit["norm"])
        else:
            nn.utils.clip_grad_value_(model.parameters(), limit["value"])
        opt.step()
        opt.zero_grad()
    assert largest_difference(learn.model.parameters(), model.parameters()) == 0


@pytest.mark.parametrize("limit", [{}, {"norm": 1.0, "value": 1.0}, {"norm": 0}, {"value": -1}])
def test_clip_takes_one_positive_limit(limit):
    with pytest.raises(SetupError, match="Clip takes"):
        Clip(**limit)


def test_a_window_without_weight_leaves_the_weights_alone():
    class Padding(Callback):  # of which a masked mean makes 0
        changes = True

        def after_loss(self, learn):
            learn.loss = learn.loss * (learn.batch_index >= 2)

    def weigh(learn):
        return learn.y.new_tensor(len(learn.y) if learn.batch_index >= 2 else 0)

    steps = Steps()
    learn = learner(pieces([4, 4, 4, 4]), Accumulate(2, weigh), Padding(), steps)
    learn.fit(1)
    first, second = steps.gradients
    assert all(not gradient.any() for gradient in first)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in second)
