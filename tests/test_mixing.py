"""Mixup and cutmix: mixed items have the loss of both, and metrics the greater part's target."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_law_no_hidden_reads import readings
from torch import nn
from torch.optim import SGD

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import Accumulate, CutMix, MixUp, Progress
from pellucid.errors import SetupError
from pellucid.metrics import accuracy
from pellucid.mixing import (
    beta_quantile,
    cut_box,
    cutmix,
    dominant,
    draw_pairing,
    mixed_loss,
    mixup,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(n, 3, 4, 4), torch.randint(3, (n,))) for n in sizes]


def learner(train, *callbacks, loss_func=F.cross_entropy, valid=None, **more) -> Learner:
    callbacks = [Progress("off"), *callbacks]
    data = DataLoaders(train, valid)
    return Learner(
        model(), data, loss_func, SGD, 0.1, callbacks=callbacks, device="cpu", **more
    )  # fmt: skip


class Keep(Callback):
    """Keep what the model and the loss got, batch by batch."""

    order = 90

    def __init__(self):
        self.x, self.y, self.losses, self.training = [], [], [], []

    def after_loss(self, learn):
        self.x.append(learn.x.clone())
        self.y.append(learn.y)
        self.losses.append(learn.loss.detach())
        self.training.append(learn.training)


def weights(learn: Learner) -> list[torch.Tensor]:
    return [param.detach() for param in learn.model.parameters()]


# ── the functions ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 1.0, 2.0, 5.0, 8.0, 32.0, 2000.0])
def test_the_quantiles_of_the_beta_distribution(alpha):
    """Numbers drawn by inverting are as those that numpy draws: the largest gap of both."""
    uniform = (np.arange(20000) + 0.5) / 20000
    ours = np.array([beta_quantile(alpha, p) for p in uniform[::20]])
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    below = np.searchsorted(theirs, ours[:500]) / len(theirs)
    assert np.abs(below - uniform[:10000:20]).max() < 0.004
    assert beta_quantile(alpha, 0.3) + beta_quantile(alpha, 0.7) == pytest.approx(1)
    assert ours[0] >= 0 and ours[-1] <= 1 and (np.diff(ours) >= 0).all()


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.7, 0.999])
def test_the_quantiles_that_have_formulas(p):
    assert beta_quantile(1.0, p) == pytest.approx(p, abs=1e-9)
    assert beta_quantile(0.5, p) == pytest.approx(math.sin(math.pi * p / 2) ** 2, abs=1e-6)
    q = beta_quantile(2.0, p)
    assert 3 * q**2 - 2 * q**3 == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_an_item_is_never_its_own_partner(n):
    rolls = {draw_pairing(0, 0, batch, n, 0.4)[1] for batch in range(200)}
    assert rolls == (set(range(1, n)) if n > 1 else {0})


def test_draws_depend_on_seed_epoch_and_batch():
    one = draw_pairing(3, 1, 2, 64, 1.0)
    assert draw_pairing(3, 1, 2, 64, 1.0) == one
    others = [draw_pairing(*where, 64, 1.0) for where in ((4, 1, 2), (3, 2, 2), (3, 1, 3))]
    assert len({one, *others}) == 4


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), share=st.floats(0, 1), by=st.integers(-8, 8))
def test_mixup_is_the_formula(n, share, by):
    x = torch.rand(n, 3, 2)
    mixed, kept = mixup(x, share, by), x.clone()
    for i in range(n):
        expected = share * x[i] + (1 - share) * x[(i - by) % n]
        torch.testing.assert_close(mixed[i], expected, atol=1e-6, rtol=0)
    assert torch.equal(x, kept)


@settings(max_examples=100, deadline=None)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    share=st.floats(0, 1),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    by=st.integers(0, 3),
)
def test_a_box_is_pasted_and_its_area_is_told(h, w, share, place, by):
    x = torch.rand(4, 2, h, w)
    box, true_share = cut_box((h, w), share, place)
    mixed = cutmix(x, box, by)
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[box] = True
    expected = torch.where(inside, x[[(i - by) % 4 for i in range(4)]], x)
    assert torch.equal(mixed, expected)
    assert true_share == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
    assert true_share >= share - 1e-9


def test_a_box_in_the_middle_has_the_area_asked_for():
    box, share = cut_box((100, 50), 0.36, (0.5, 0.5))
    assert box == (slice(10, 90), slice(5, 45)) and share == pytest.approx(0.36)
    assert cut_box((10,), 0.7, (0.0,)) == ((slice(0, 2),), 0.8)  # half of it sticks out
    assert cut_box((4, 4), 0.0, (0.5, 0.5))[1] == 0
    assert cut_box((4, 4), 1.0, (0.5, 0.5))[1] == 1


def test_the_mixed_cross_entropy_is_that_of_the_mixed_one_hot_targets():
    preds, y = torch.randn(8, 3), torch.randint(3, (8,))
    soft = 0.3 * F.one_hot(y, 3) + 0.7 * F.one_hot(y.roll(2), 3)
    ours = mixed_loss(F.cross_entropy, 0.3, 2)(preds, y)
    torch.testing.assert_close(ours, F.cross_entropy(preds, soft))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_greater_part_comes_first_and_the_mixture_stays(share):
    preds, y = torch.randn(8, 3), torch.randint(3, (8,))
    first, greater, by = dominant(y, share, 3)
    assert greater >= 0.5 and torch.equal(first, y if share >= 0.5 else y.roll(3))
    torch.testing.assert_close(
        mixed_loss(F.cross_entropy, greater, by)(preds, first),
        mixed_loss(F.cross_entropy, share, 3)(preds, y),
    )


# ── in a fit ──────────────────────────────────────────────────────────────────────────────────


def by_hand(train, mixes, epochs=2):
    """Train with soft targets; `mixes(epoch, batch, x)` gives pairs of inputs and (share, by)."""
    net, kept = model(), []
    opt = SGD(net.parameters(), lr=0.1)
    for epoch in range(epochs):
        for i, (x, y) in enumerate(train):
            soft = F.one_hot(y, 3).float()
            for mix in mixes:
                x, share, by = mix(epoch, i, x)
                soft = share * soft + (1 - share) * soft.roll(by, 0)
            loss = F.cross_entropy(net(x), soft)
            opt.zero_grad()
            loss.backward()
            opt.step()
            kept.append((loss.item(), soft))
    return [param.detach() for param in net.parameters()], kept


def mix_up(seed, alpha):
    def mix(epoch, i, x):
        share, by = draw_pairing(seed, epoch, i, len(x), alpha)
        return share * x + (1 - share) * x.roll(by, 0), share, by

    return mix


def cut_mix(alpha):
    """Take boxes from a callback of its own, and find share and roll in what it did."""
    probe = CutMix(alpha)

    def mix(epoch, i, x):
        numbers = torch.arange(len(x)).view(-1, 1, 1, 1).expand_as(x)
        pasted = probe._mixed(numbers, (0, epoch, i))[0]
        inside = pasted != numbers
        share = 1 - inside[0].float().mean().item()
        by = 0 if share == 1 else int((numbers - pasted)[inside][0]) % len(x)
        return torch.where(inside, x.roll(by, 0), x), share, by

    return mix


MIXES = {
    "mixup": ([MixUp(1.0, seed=3)], [mix_up(3, 1.0)]),
    "cutmix": ([CutMix(1.0)], [cut_mix(1.0)]),
    "both": ([MixUp(0.4), CutMix(1.0)], [mix_up(0, 0.4), cut_mix(1.0)]),
    "both the other way round": ([CutMix(1.0), MixUp(0.4)], [cut_mix(1.0), mix_up(0, 0.4)]),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_fit_is_that_with_soft_targets_by_hand(name):
    callbacks, mixes = MIXES[name]
    train = batches(8, 8, 5, 1, 2)
    learn = learner(train, *callbacks)
    learn.fit(2)
    expected, kept = by_hand(train, mixes)
    for ours, theirs in zip(weights(learn), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert learn.record["train/loss"].tolist() == pytest.approx(
        [loss for loss, _ in kept], abs=1e-5
    )


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_metrics_see_the_target_of_the_greater_part(name):
    callbacks, mixes = MIXES[name]
    train, keep = batches(8, 8, 5), Keep()
    learner(train, *callbacks, keep).fit(3)
    _, kept = by_hand(train, mixes, 3)
    for y, (_, soft) in zip(keep.y, kept, strict=True):
        assert y.dtype == torch.int64
        assert (soft[range(len(y)), y] >= 0.5 - 1e-6).all()


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_any_loss_will_do(mix):
    def loss_func(preds, y):
        return (preds.softmax(1)[range(len(y)), y] - 1).square().mean()

    [(x, y)] = batches(8)
    learn, keep = learner([(x, y)], mix(1.0), loss_func=loss_func), Keep()
    mixed, share, by = mix(1.0)._mixed(x, (0, 0, 0))
    preds = learn.model(mixed).detach()
    expected = share * loss_func(preds, y) + (1 - share) * loss_func(preds, y.roll(by))
    learn.fit(1, callbacks=[keep])
    assert learn.record["train/loss"][0] == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(keep.x[0], mixed)
    assert learn.loss_func is loss_func


def test_squared_errors_are_mixed():
    torch.manual_seed(2)
    x, y = torch.randn(8, 1, 4, 4), torch.randn(8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    share, by = draw_pairing(0, 0, 0, 8, 1.0)
    preds = net(share * x + (1 - share) * x.roll(by, 0)).detach()
    expected = share * F.mse_loss(preds, y) + (1 - share) * F.mse_loss(preds, y.roll(by))
    learn = Learner(
        net, DataLoaders([(x, y)]), callbacks=[MixUp(1.0), Progress("off")], device="cpu"
    )
    learn.fit(1)
    assert learn.record["train/loss"][0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_validation_and_looks_are_plain(mix):
    train, valid, keep = batches(8, 8), batches(7, 7), Keep()

    class Look(Callback):
        def after_step(self, learn):
            self.found = learn.validate(valid), plain_loss(learn.model, valid)

    look = Look()
    learn = learner(train, mix(), keep, look, valid=valid, metrics=[accuracy])
    learn.fit(1)
    for x, y, (x_plain, y_plain) in zip(keep.x[2:], keep.y[2:], valid, strict=True):
        assert torch.equal(x, x_plain) and torch.equal(y, y_plain)
    assert look.found[0]["loss"] == pytest.approx(look.found[1], abs=1e-6)
    assert learn.validate()["loss"] == pytest.approx(plain_loss(learn.model, valid), abs=1e-6)


@torch.no_grad()
def plain_loss(net, valid) -> float:
    net.eval()
    loss = sum(F.cross_entropy(net(x), y).item() for x, y in valid) / len(valid)
    net.train()
    return loss


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_a_run_is_the_same_again_and_another_with_another_seed(mix):
    kept = []
    for seed in (0, 0, 1):
        keep = Keep()
        torch.manual_seed(len(kept))  # of the global generator nothing depends
        learner(batches(8, 8), mix(1.0, seed=seed), keep).fit(2)
        kept.append(keep.x)
    assert all(map(torch.equal, kept[0], kept[1]))
    assert not all(map(torch.equal, kept[0], kept[2]))
    assert not torch.equal(kept[0][0], kept[0][2])  # the same batch, an epoch later


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_a_second_fit_goes_on_as_one_long_fit(mix):
    long, short = learner(batches(8, 8), mix(1.0)), learner(batches(8, 8), mix(1.0))
    long.fit(3)
    short.fit(1)
    short.fit(2)
    assert all(map(torch.equal, weights(long), weights(short)))


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_accumulated_pieces_are_each_mixed(mix):
    learn = learner(batches(8, 8, 4), mix(), Accumulate(2))
    learn.fit(1)
    assert learn.step == 2 and np.isfinite(learn.record["train/loss"]).all()


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_nothing_is_read_back(mix, monkeypatch):
    monkeypatch.setattr("pellucid.tally.READ_INTERVAL", math.inf)  # but at the end of the pass
    learn, plain = learner(batches(*[8] * 20), mix()), learner(batches(*[8] * 20))
    assert readings(learn.fit, 1) == readings(plain.fit, 1)


def test_several_inputs_are_mixed_alike():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, b):
            self.seen = a, b
            return self.layer(torch.cat([a, b], 1))

    a, b, y = torch.rand(6, 2), torch.rand(6, 3), torch.randint(3, (6,))
    data = DataLoaders([(a, b, y)], n_inputs=2)
    learn = Learner(
        Two(), data, F.cross_entropy, callbacks=[MixUp(1.0), Progress("off")], device="cpu"
    )
    learn.fit(1)
    share, by = draw_pairing(0, 0, 0, 6, 1.0)
    for seen, x in zip(learn.model.seen, (a, b), strict=True):
        torch.testing.assert_close(seen, share * x + (1 - share) * x.roll(by, 0))


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_alpha_is_above_0(mix, alpha):
    with pytest.raises(SetupError, match="alpha above 0"):
        mix(alpha)


def test_what_cannot_be_mixed_is_refused():
    words = [(torch.randint(9, (4, 5)), torch.randint(3, (4,)))]
    with pytest.raises(SetupError, match="must be floats"):
        learner(words, MixUp()).fit(1)
    with pytest.raises(SetupError, match="CutMix cuts one tensor"):
        learner([(torch.rand(4), torch.randint(3, (4,)))], CutMix()).fit(1)
