"""Techniques of training, each against the same written by hand."""

import copy
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

from pellucid import Callback, DataLoaders, Learner, Loader
from pellucid.callbacks import (
    EMA,
    Accumulate,
    BatchSize,
    Debug,
    GradientCheckpointing,
    ImageSize,
    LabelSmoothing,
    Lookahead,
    MaxTime,
    MixUp,
    OneCycle,
    Precision,
    Progress,
)
from pellucid.data import ArrayDataset
from pellucid.errors import CallbackError, SetupError, UnknownName
from pellucid.gradient_checkpointing import gradient_checkpointing
from pellucid.losses import smooth_labels, smoothed
from pellucid.nn import (
    Residual,
    RunningBatchNorm,
    set_stochastic_depth,
)
from pellucid.randomness import uniforms
from pellucid.schedules import combine, constant, linear
from pellucid.stochastic_depth import StochasticDepth, drop_items
from pellucid.vision import (
    AlternatingFlip,
    Augment,
    RandomErasing,
    erase,
    flipped_now,
    resize,
    small_resnet,
    xresnet18,
)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 6), torch.randint(3, (n,))) for n in sizes]


def learner(train, *callbacks, model=mlp, loss_func=F.cross_entropy, valid=None) -> Learner:
    callbacks = [Progress("off"), *callbacks]
    data = train if isinstance(train, DataLoaders) else DataLoaders(train, valid)
    return Learner(model(), data, loss_func, SGD, 0.1, callbacks=callbacks, device="cpu")


def weights(learn: Learner) -> list[torch.Tensor]:
    return [param.detach() for param in learn.model.parameters()]


class Keep(Callback):
    """Keep what a function of the learner gives after each loss."""

    order = 90

    def __init__(self, what):
        self.what, self.kept = what, []

    def after_loss(self, learn):
        self.kept.append((learn.training, self.what(learn)))


# ── label smoothing ───────────────────────────────────────────────────────────────────────────


def test_the_number_of_the_course():
    loss = smoothed(F.cross_entropy, 0.1)(torch.tensor([[2.0, 0, 0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.372878, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_is_the_formula_and_the_loss_of_soft_targets(smoothing):
    preds, y = torch.randn(7, 4), torch.randint(4, (7,))
    logs = preds.log_softmax(1)
    by_hand = -((1 - smoothing) * logs[range(7), y] + smoothing * logs.mean(1)).mean()
    torch.testing.assert_close(smoothed(F.cross_entropy, smoothing)(preds, y), by_hand)
    soft = smooth_labels(y, 4, smoothing)
    torch.testing.assert_close(F.cross_entropy(preds, soft), by_hand)
    torch.testing.assert_close(soft.sum(1), torch.ones(7))


def test_a_loss_with_class_weights_keeps_them_and_stays_as_it_was():
    preds, y = torch.randn(7, 4), torch.randint(4, (7,))
    plain = nn.CrossEntropyLoss(torch.rand(4), reduction="sum")
    expected = F.cross_entropy(preds, y, plain.weight, reduction="sum", label_smoothing=0.2)
    assert torch.equal(smoothed(plain, 0.2)(preds, y), expected)
    assert plain.label_smoothing == 0


@pytest.mark.parametrize("loss_func", [F.mse_loss, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_other_losses_are_not_smoothed(loss_func):
    with pytest.raises(SetupError, match="cross entropy"):
        smoothed(loss_func, 0.1)
    with pytest.raises(SetupError, match="cross entropy"):
        learner(batches(4), LabelSmoothing(), loss_func=loss_func).fit(1)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(SetupError, match="share from 0 to 1"):
        LabelSmoothing(smoothing)
    with pytest.raises(SetupError, match="share from 0 to 1"):
        smoothed(F.cross_entropy, smoothing)


def test_a_fit_is_smoothed_in_training_alone():
    train, valid = batches(8, 5), batches(7)

    class Look(Callback):
        def after_step(self, learn):
            self.within = learn.validate(valid)["loss"]
            self.plain = F.cross_entropy(learn.model(valid[0][0]), valid[0][1]).item()

    look = Look()
    learn = learner(train, LabelSmoothing(0.2), look, valid=valid)
    learn.fit(2)
    by_hand = mlp()
    opt = SGD(by_hand.parameters(), 0.1, fused=True)
    for _ in range(2):
        for x, y in train:
            opt.zero_grad()
            F.cross_entropy(by_hand(x), y, label_smoothing=0.2).backward()
            opt.step()
    assert all(map(torch.equal, weights(learn), by_hand.parameters()))
    [(x, y)] = valid
    plain = F.cross_entropy(by_hand(x), y).item()
    assert learn.record.epochs[-1]["valid/loss"] == pytest.approx(plain, abs=1e-6)
    assert look.within == pytest.approx(look.plain, abs=1e-6)
    assert learn.loss_func is F.cross_entropy


@pytest.mark.parametrize("first", [True, False])
def test_smoothing_and_mixing_go_together_in_any_order(first):
    class Soft(Callback):
        changes = True
        order = -20

        def around_batch(self, learn):
            assert learn.loss_func is F.cross_entropy
            yield
            assert learn.loss_func is F.cross_entropy

    both = [MixUp(1.0), LabelSmoothing(0.2)]
    learn = learner(batches(8, 8), Soft(), *(reversed(both) if first else both))
    by_loss = learner(
        batches(8, 8), MixUp(1.0), loss_func=lambda p, y: F.cross_entropy(p, y, label_smoothing=0.2)
    )
    learn.fit(2), by_loss.fit(2)
    assert all(map(torch.equal, weights(learn), weights(by_loss)))


# ── random erasing ────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), h=st.integers(1, 12), w=st.integers(1, 12), seed=st.integers(0, 99))
def test_what_is_erased_is_one_rectangle_of_the_channels_mean(n, h, w, seed):
    x = torch.rand(n, 3, h, w)
    draws = torch.from_numpy(uniforms(seed, 0, np.arange(n), 5))
    y = RandomErasing(p=0.7)(x, draws)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    for i in range(n):
        changed = (y[i] != x[i]).any(0)
        if draws[i, 0] >= 0.7:
            assert not changed.any()
            continue
        assert torch.equal(y[i][:, changed], mean[i][:, changed])
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        if len(rows) and h * w > 1:
            box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all()


def test_areas_ratios_and_places_are_those_asked_for():
    n, side = 4000, 100
    draws = torch.from_numpy(uniforms(0, 0, np.arange(n), 5))
    x = torch.linspace(0, 1, side * side).view(1, 1, side, side)
    erased = RandomErasing(0.5, (0.05, 0.2), 2.0)(x.expand(n, -1, -1, -1), draws) != x
    areas = erased.sum((1, 2, 3)) / side**2
    assert areas[areas > 0].min() > 0.045 and areas.max() < 0.21
    assert (areas > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert areas[areas > 0].mean() == pytest.approx(0.125, abs=0.003)
    high, wide = (erased.any(d).sum(-1).flatten().float() for d in (3, 2))
    ratios = (high / wide)[areas > 0]
    assert ratios.min() > 0.48 and ratios.max() < 2.08
    assert ratios.log().mean() == pytest.approx(0, abs=0.03)
    seen = erased.float().mean((0, 1))
    assert (seen.amax(0) > 0).all() and (seen.amax(1) > 0).all()  # the last row and column too
    assert (seen / seen.flip(0)).sub(1).abs()[20:80, 20:80].max() < 0.35  # no side is preferred


def test_an_image_is_erased_alike_in_any_batch_and_in_any_epoch_by_its_own_draws():
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40)
    seen = {}
    for size in (8, 11):
        loader = Loader(ArrayDataset(x, y), size, shuffle=True)
        data = DataLoaders(loader, augment=[RandomErasing(0.9)])
        seen[size] = {}
        for epoch in range(2):
            for images, numbers in data.train:
                for number, image in zip(numbers.tolist(), data.prepare(images, True), strict=True):
                    seen[size][epoch, number] = image
    assert all(torch.equal(seen[8][key], seen[11][key]) for key in seen[8])
    assert not all(torch.equal(seen[8][0, i], seen[8][1, i]) for i in range(40))


def test_erasing_reads_nothing_back_and_leaves_the_batch_alone():
    x, draws = torch.rand(4, 3, 8, 8), torch.rand(4, 5)
    kept = x.clone()
    assert not readings(RandomErasing(1.0), x, draws)
    assert torch.equal(x, kept)
    zero, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    assert torch.equal(erase(x, zero, zero, zero, one), x)


@pytest.mark.parametrize(
    "wrong", [{"p": 1.1}, {"area": (0.4, 0.1)}, {"area": (0, 1)}, {"ratio": 0.5}]
)
def test_wrong_settings_of_erasing_are_refused(wrong):
    with pytest.raises(SetupError, match="RandomErasing takes"):
        RandomErasing(**wrong)


def test_only_images_are_erased():
    with pytest.raises(SetupError, match="takes images"):
        RandomErasing()(torch.rand(4, 6))


# ── the alternating flip ──────────────────────────────────────────────────────────────────────


def test_every_image_is_mirrored_in_every_second_epoch():
    x = torch.rand(37, 1, 4, 4)
    loader = Loader(ArrayDataset(x, torch.arange(37)), 8, shuffle=True, seed=3)
    data = DataLoaders(loader)
    data.augment = [AlternatingFlip(data.train), Augment(brightness=0.0, flip=0.0)]
    table = torch.zeros(5, 37, dtype=torch.bool)
    for epoch in range(5):
        for images, numbers in data.train:
            seen = data.prepare(images, training=True)
            table[epoch, numbers] = (seen != images).flatten(1).any(1)
            expected = torch.where(table[epoch, numbers].view(-1, 1, 1, 1), images.flip(3), images)
            assert torch.equal(seen, expected)
    assert 10 < table[0].sum() < 27
    for epoch in range(1, 5):
        assert torch.equal(table[epoch], ~table[epoch - 1])
    assert table[0].tolist() == flipped_now(3, 0, np.arange(37)).tolist()
    assert table[0].tolist() != flipped_now(4, 0, np.arange(37)).tolist()


def test_the_first_flips_are_those_of_a_coin_and_of_no_other_draw():
    flips = flipped_now(0, 0, np.arange(10000))
    assert flips.mean() == pytest.approx(0.5, abs=0.02)
    other = uniforms(0, 0, np.arange(10000), 1)[:, 0] < 0.5
    assert (flips == other).mean() == pytest.approx(0.5, abs=0.02)


def test_in_a_fit_the_flip_follows_the_loader():
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    loader = Loader(ArrayDataset(x, y), 20)
    data = DataLoaders(loader, loader, classes=3)
    data.augment = [AlternatingFlip(loader)]
    keep = Keep(lambda learn: learn.x.clone())

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    learn = learner(data, keep, model=model)
    learn.fit(1), learn.find_lr(steps=3), learn.fit(1)
    trained = [seen for training, seen in keep.kept if training]
    plain = [seen for training, seen in keep.kept if not training]
    first = torch.from_numpy(flipped_now(0, 0, np.arange(20))).view(-1, 1, 1, 1)
    assert torch.equal(trained[0], torch.where(first, x.flip(3), x))
    assert torch.equal(plain[0], x)
    twin = copy.deepcopy(data)
    assert twin.augment[0].loader is twin.train


def test_the_alternating_flip_wants_the_loader_that_trains():
    with pytest.raises(SetupError, match="which items"):
        AlternatingFlip([1, 2])
    loader = Loader(ArrayDataset(torch.rand(8, 1, 2, 2)), 4)
    flip = AlternatingFlip(loader)
    with pytest.raises(SetupError, match="another batch"):
        flip(torch.rand(4, 1, 2, 2))
    next(iter(loader))
    flip(torch.rand(4, 1, 2, 2))
    with pytest.raises(SetupError, match="another batch"):
        flip(torch.rand(3, 1, 2, 2))
    list(loader)  # and after its last batch another's may be as large
    with pytest.raises(SetupError, match="another batch"):
        flip(torch.rand(4, 1, 2, 2))


# ── stochastic depth ──────────────────────────────────────────────────────────────────────────


def test_whole_items_are_dropped_and_the_mean_stays():
    y = drop_items(torch.ones(20000, 3), 0.2)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert (y[:, :1] == y).all()
    assert y.mean() == pytest.approx(1, abs=0.02)
    assert (y[:, 0] == 0).float().mean() == pytest.approx(0.2, abs=0.02)


def test_a_residual_block_is_the_formula():
    body = nn.Linear(4, 4)
    block, x = Residual(body, act=nn.ReLU(), drop=0.4), torch.randn(16, 4)
    torch.manual_seed(5)
    ours = block(x)
    torch.manual_seed(5)
    kept = (torch.rand(16, 1) >= 0.4) / 0.6
    torch.testing.assert_close(ours, (body(x) * kept + x).relu())
    block.eval()
    assert torch.equal(block(x), (body(x) + x).relu())
    assert "drop=0.4" in repr(block) and "drop" not in repr(Residual(body))


def test_a_branch_of_ones_own_ends_with_the_module():
    drop, x = StochasticDepth(0.5), torch.randn(8, 2, 3, 3)
    torch.manual_seed(1)
    ours = drop(x)
    torch.manual_seed(1)
    assert torch.equal(ours, drop_items(x, 0.5))
    assert drop.eval()(x) is x
    assert StochasticDepth(0.0)(x) is x


@pytest.mark.parametrize("make", [small_resnet, xresnet18])
def test_later_blocks_of_a_model_are_left_out_more_often(make):
    model = make(1, 10, (8, 8, 8, 8))
    set_stochastic_depth(model, 0.4)
    rates = [block.drop for block in model.modules() if isinstance(block, Residual)]
    assert rates == pytest.approx([0.4 * (i + 1) / len(rates) for i in range(len(rates))])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # else the branches of xresnet begin as nothing
    x = torch.randn(4, 1, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    set_stochastic_depth(model, 0)
    model.train()
    assert torch.equal(model(x), model(x))


def test_dropping_in_half_precision_keeps_it():
    assert drop_items(torch.ones(4, 2, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_is_below_1(rate):
    for make in (StochasticDepth, lambda rate: Residual(nn.Identity(), drop=rate)):
        with pytest.raises(SetupError, match="0 to below 1"):
            make(rate)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(SetupError, match="no residual blocks"):
        set_stochastic_depth(mlp(), 0.1)


# ── image size ────────────────────────────────────────────────────────────────────────────────


def pictures(n: int = 4, h: int = 16, w: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(n, 1, h, w), torch.randint(3, (n,))) for _ in range(4)]


def pooled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_half_the_size_is_the_mean_of_what_a_pixel_covers_in_smooth_images():
    x = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(1, 1, 8, 16)
    half = resize(x, (4, 8))
    pairs = F.avg_pool2d(x, 2)
    torch.testing.assert_close(half[..., 1:-1], pairs[..., 1:-1])
    assert resize(x, (8, 16)) is x
    with pytest.raises(SetupError, match="images"):
        resize(torch.rand(4, 6), (2, 2))


def test_the_size_follows_the_run_in_training_alone():
    keep = Keep(lambda learn: tuple(learn.x.shape[2:]))
    size = ImageSize(combine([0.5, 0.5], [linear(0.5, 1), constant(1)]))
    learn = learner(pictures(), keep, size, model=pooled, valid=pictures()[:1])
    learn.fit(2)
    trained = [shape for training, shape in keep.kept if training]
    assert trained == [(8, 12), (12, 16), (12, 20), (16, 20), *[(16, 24)] * 4]
    assert [shape for training, shape in keep.kept if not training] == [(16, 24)] * 2
    assert learn.validate()["loss"] == pytest.approx(learn.record.epochs[-1]["valid/loss"])


def test_a_fit_on_small_images_is_that_by_hand():
    learn = learner(pictures(), ImageSize(constant(0.5), multiple=1), model=pooled)
    learn.fit(1)
    small = [(F.interpolate(x, (8, 12), mode="bilinear", antialias=True), y) for x, y in pictures()]
    by_hand = learner(small, model=pooled)
    by_hand.fit(1)
    assert all(map(torch.equal, weights(learn), weights(by_hand)))


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(SetupError, match="schedule"):
        ImageSize(0.5)
    with pytest.raises(SetupError, match="images"):
        learner(batches(4), ImageSize(constant(0.5))).fit(1)
    with pytest.raises(SetupError, match="above 0"):
        learner(pictures(), ImageSize(constant(0)), model=pooled).fit(1)


# ── batch size ────────────────────────────────────────────────────────────────────────────────


def test_the_batch_size_follows_the_run_and_comes_back():
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    loader = Loader(ArrayDataset(x, y), 7, shuffle=True, seed=2)
    keep = Keep(lambda learn: (learn.x.clone(), learn.progress))
    size = BatchSize(combine([0.5, 0.5], [constant(8), constant(15)]))
    learn = learner(DataLoaders(loader), keep, size)
    learn.fit(4)
    seen = [pair for _, pair in keep.kept]
    assert [len(x) for x, _ in seen] == [8, 8, 8, 6] * 2 + [15, 15] * 2
    expected = [(e + i / n) / 4 for e, n in enumerate((4, 4, 2, 2)) for i in range(n)]
    assert [progress for _, progress in seen] == pytest.approx(expected)
    order = Loader(ArrayDataset(x, y), 30, shuffle=True, seed=2).order
    epochs = [torch.cat([x for x, _ in part]) for part in (seen[:4], seen[4:8], seen[8:10])]
    for epoch, items in enumerate(epochs):  # each item once, in the loader's order
        assert torch.equal(items, x[order(epoch)])
    assert loader.batch_size == 7
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, callbacks=[Raising()])
    assert loader.batch_size == 7


class Raising(Callback):
    def after_step(self, learn):
        raise ZeroDivisionError


def test_schedules_are_not_bent_by_the_batch_size():
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    rates = []
    for size in (constant(8), combine([0.5, 0.5], [constant(8), constant(32)])):
        learn = learner(DataLoaders(Loader(ArrayDataset(x, y), 8)), BatchSize(size), OneCycle(0.1))
        learn.fit(4)
        epochs = np.unique(learn.record["epoch"], return_index=True)[1]
        rates.append(learn.record["lr"][epochs].tolist())
    assert rates[0] == pytest.approx(rates[1])


class Shown(Callback):
    """Has a schedule of its own."""

    def after_batch(self, learn):
        pass

    def curves(self, opt, epochs):
        return {"own": lambda position: 3 * position}


def test_the_plan_is_what_the_fit_does():
    x, y = torch.rand(30, 1, 16, 24), torch.arange(30) % 3
    loader = Loader(ArrayDataset(x, y), 7, shuffle=True)
    seen = {"batch size": [], "image size": [], "own": []}

    def note(learn):
        seen["batch size"].append(loader.batch_size)
        seen["image size"].append(learn.x.shape[3] / x.shape[3])
        seen["own"].append(3 * learn.progress)

    callbacks = [
        BatchSize(combine([0.4, 0.6], [constant(8), constant(13)])),
        ImageSize(combine([0.5, 0.5], [linear(0.5, 1), constant(1)]), multiple=1),
        OneCycle(0.1), EMA(lambda p: 0.9 * p), Lookahead(2, lambda p: 1 - p), EMA(0.5), Shown(),
    ]  # fmt: skip
    learn = learner(DataLoaders(loader), model=pooled)
    panels = learn.plan(3, callbacks).axes
    drawn = {axes.get_title(): list(line.get_ydata()) for axes in panels for line in axes.lines}
    assert (loader.batch_size, loader.epoch) == (7, 0)
    learn.fit(3, callbacks=[*callbacks[:3], Debug("after_predict", note)])
    positions = [(epoch + i / n) / 3 for epoch, n in enumerate((4, 4, 3)) for i in range(n)]
    assert drawn["lr"] == learn.record["lr"].tolist()
    assert drawn["batch size"] == seen["batch size"] == [8] * 8 + [13] * 3
    assert drawn["image size"] == pytest.approx(seen["image size"], abs=0.5 / x.shape[3])
    assert drawn["EMA decay"] == pytest.approx([0.9 * p for p in positions])
    assert drawn["Lookahead pull"] == pytest.approx([1 - p for p in positions])
    assert drawn["own"] == pytest.approx(seen["own"])
    assert set(drawn) == {"lr", "batch size", "image size", "EMA decay", "Lookahead pull", "own"}
    with pytest.raises(SetupError, match="Loader alone"):
        learner(batches(4)).plan(1, callbacks[:1])
    with pytest.raises(CallbackError, match="takes a list"):
        learner(batches(4)).plan(1, callbacks[0])


def test_a_size_that_cannot_be_set_is_refused():
    with pytest.raises(SetupError, match="schedule"):
        BatchSize(64)
    with pytest.raises(SetupError, match="Loader alone"):
        learner(batches(4, 4), BatchSize(constant(4))).fit(1)
    loader = Loader(ArrayDataset(torch.randn(8, 6), torch.arange(8) % 3), 4)
    with pytest.raises(SetupError, match="one item or more"):
        learner(DataLoaders(loader), BatchSize(constant(0))).fit(1)


# ── the end of time ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch):
    """Let a batch take a second."""
    seconds = iter(range(1000))
    monkeypatch.setattr("pellucid.callbacks.max_time.perf_counter", lambda: next(seconds))


@pytest.mark.parametrize(
    "seconds, batch, n_epochs", [(1, (0, 0), 1), (5, (0, 4), 1), (7, (1, 1), 2)]
)
def test_the_fit_ends_after_a_batch_and_is_validated(clock, capsys, seconds, batch, n_epochs):
    stop = MaxTime(seconds)
    learn = learner(batches(*[4] * 5), stop, valid=batches(4))
    learn.fit(9)
    assert stop.reached == batch
    assert learn.step == seconds == learn.n_batches_seen
    assert len(learn.record.epochs) == n_epochs
    assert math.isfinite(learn.record.epochs[-1]["valid/loss"])
    out = capsys.readouterr().out
    assert f"{seconds} s were over in epoch {batch[0]} of 9, after batch {batch[1]}" in out
    assert len(out.splitlines()) == 1


def test_a_fit_in_time_says_nothing(clock, capsys):
    stop = MaxTime(11)
    learn = learner(batches(*[4] * 5), stop)
    learn.fit(2)
    assert (stop.reached, learn.step, capsys.readouterr().out) == (None, 10, "")
    assert math.isfinite(learn.validate(batches(4, 4))["loss"])


def test_an_unfinished_window_is_stepped_with(clock):
    learn = learner(batches(*[4] * 5), Accumulate(3), MaxTime(4))
    learn.fit(2)
    assert (learn.n_batches_seen, learn.step) == (4, 2)


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_time_is_above_0(seconds):
    with pytest.raises(SetupError, match="above 0"):
        MaxTime(seconds)


# ── gradient checkpointing ────────────────────────────────────────────────────────────────────


def deep(norm=nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(6, 6), norm(6), nn.ReLU(), nn.Dropout(0.3)) for _ in range(3)]
    return nn.Sequential(*parts, nn.Linear(6, 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_gradients_and_buffers_are_bit_for_bit_the_same(norm):
    x, y = batches(8)[0]
    found = []
    for checkpointed in (False, True):
        model = deep(norm)
        torch.manual_seed(7)
        with gradient_checkpointing(model[:3] if checkpointed else []):
            for _ in range(3):
                F.cross_entropy(model(x), y).backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
        assert all("forward" not in vars(module) for module in model.modules())
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_a_module_that_is_called_twice_keeps_the_buffers_of_its_last_call(norm):
    (x, y), found = batches(8)[0], []
    for checkpointed in (False, True):
        model = deep(norm)
        torch.manual_seed(7)
        with gradient_checkpointing(model[:1] if checkpointed else []):
            F.cross_entropy(model(model[0](x)), y).backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("checkpointed, n_calls", [(False, 1), (True, 2)])
def test_what_lies_within_is_not_kept_and_computed_twice(checkpointed, n_calls):
    (x, y), model, calls, kept = batches(8)[0], deep(nn.Identity), [], []
    model[0][0].register_forward_hook(lambda *_: calls.append(0))

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with (
        gradient_checkpointing(model[:3] if checkpointed else []),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = F.cross_entropy(model(x), y)
        within = kept.count((8, 6))
        loss.backward()
    assert len(calls) == n_calls
    assert within == 4 if checkpointed else within >= 7  # the inputs of four parts


def test_a_fit_is_the_same_and_the_modules_come_back():
    plain, twice = (
        learner(batches(8, 8, 5), *more, model=deep)
        for more in ([], [GradientCheckpointing(["0", "1", "2"])])
    )
    for learn in (plain, twice):
        torch.manual_seed(3)
        learn.fit(3)
    assert all(
        map(torch.equal, plain.model.state_dict().values(), twice.model.state_dict().values())
    )
    assert all("forward" not in vars(module) for module in twice.model.modules())
    with pytest.raises(ZeroDivisionError):
        twice.fit(1, callbacks=[Raising()])
    assert all("forward" not in vars(module) for module in twice.model.modules())


def test_half_precision_is_that_of_the_first_pass():
    found = []
    for more in ([], [GradientCheckpointing(["0", "1", "2"])]):
        mixed = [Precision("bf16"), MixUp(1.0), LabelSmoothing(), *more]
        learn = learner(batches(8, 8, 5), *mixed, model=deep)
        torch.manual_seed(3)
        learn.fit(2)
        found.append(weights(learn))
    assert all(map(torch.equal, *found))


def test_a_copy_made_within_computes_by_itself():
    model, x = deep(nn.Identity).eval(), batches(8)[0][0]
    with gradient_checkpointing(model[:3]):
        twin = copy.deepcopy(model)
        before = twin(x)
        for param in model.parameters():
            param.data.zero_()
        assert torch.equal(twin(x), before)
        twin(x).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    assert all(param.grad is not None for param in twin.parameters())


def test_a_forward_of_its_own_is_put_back():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x * 2
    with gradient_checkpointing([layer]):
        assert torch.equal(layer(torch.ones(1)), torch.full((1,), 2.0))
    assert layer.forward is own


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(UnknownName, match="no module 'nought'"):
        learner(batches(4), GradientCheckpointing(["nought"])).fit(1)
