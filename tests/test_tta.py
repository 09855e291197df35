"""Test-time augmentation: views of the declared training augmentation, and of nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pellucid import DataLoaders, Learner, Loader
from pellucid.callbacks import Progress
from pellucid.data import ArrayDataset, Normalize, PerSample
from pellucid.errors import SetupError
from pellucid.metrics import MacroF1, accuracy
from pellucid.vision import AlternatingFlip, Augment, RandomErasing, flip_and_shift, tta, views


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(8 * 36, 3),
    )  # fmt: skip


def loaders(augment=(), n: int = 50, shuffle: bool = False) -> DataLoaders:
    torch.manual_seed(1)
    x = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8)
    items = ArrayDataset(x, torch.randint(3, (n,)))
    train, valid = Loader(items, 8, shuffle=True), Loader(items, 16, shuffle=shuffle)
    data = DataLoaders(train, valid, classes=3, transforms=[Normalize(0.5, 0.3)])
    data.augment = list(augment)
    return data


def learner(data: DataLoaders, *metrics) -> Learner:
    learn = Learner(
        model(), data, F.cross_entropy, metrics=metrics, callbacks=[Progress("off")], device="cpu"
    )
    learn.fit(1)
    return learn


def outputs(learn: Learner, see) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict by hand what an image looks like through a function."""
    x, y = learn.data.valid.dataset.arrays
    with torch.no_grad():
        return learn.model.eval()(Normalize(0.5, 0.3)(see(x))), y


@pytest.mark.parametrize("augment", [Augment(flip=0.5), AlternatingFlip], ids=["coin", "in turn"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_views_of_a_flip_are_the_image_and_its_mirror_image(augment, shuffle):
    data = loaders(shuffle=shuffle)
    data.augment = [augment if isinstance(augment, Augment) else augment(data.train)]
    learn = learner(data, accuracy)
    report = tta(learn, 2)
    plain, y = outputs(learn, lambda x: x)
    mirrored, _ = outputs(learn, lambda x: x.flip(3))
    mean = (plain + mirrored) / 2
    assert report.plain["accuracy"] == pytest.approx(accuracy(plain, y).item())
    assert report.tta["accuracy"] == pytest.approx(accuracy(mean, y).item())
    order = data.valid.order(data.valid.epoch)
    torch.testing.assert_close(report.preds, mean[order], atol=1e-5, rtol=1e-5)
    assert report.plain["accuracy"] == pytest.approx(learn.validate()["accuracy"])


def test_shifts_are_seen_too_each_with_its_mirror_image():
    x = torch.rand(3, 1, 8, 8)
    seen = [view(x) for view in views([Augment(flip=0.5, shift=0.25)], 8)]
    assert torch.equal(seen[0], x) and torch.equal(seen[1], x.flip(3))
    shifted = {}
    for right in range(-2, 3):
        for down in range(-2, 3):
            for flip in (False, True):
                move = torch.tensor([right] * 3), torch.tensor([down] * 3)
                key = flip, right, down
                shifted[key] = flip_and_shift(x, torch.tensor([flip] * 3), *move)
    found = [next(k for k, v in shifted.items() if torch.equal(v, s)) for s in seen]
    assert [flip for flip, _, _ in found] == [False, True] * 4
    assert len({found[i][1:] for i in (2, 4, 6)}) > 1  # other shifts, not one again and again


@pytest.mark.parametrize(
    "augment",
    [[Augment(rotate=20, crop=0.6)], [Augment(shift=0.2)], [Augment(flip=0.5, brightness=0.3)],
     [lambda x: x + torch.randn(())]],
)  # fmt: skip
def test_views_differ_and_are_the_same_in_any_batch_and_every_time(augment):
    x = torch.rand(6, 1, 8, 8)
    before = torch.get_rng_state()
    every = [view(x) for view in views(augment, 5)]
    again = [torch.cat([view(x[:4]), view(x[4:])]) for view in views(augment, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(every, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert torch.equal(every[0], x)
    assert all(not torch.equal(every[i], every[j]) for i in range(5) for j in range(i))


def test_no_flip_without_its_declaration():
    x = torch.rand(3, 1, 8, 8)
    for view in views([Augment(shift=0.1)], 8):
        seen = view(x)
        middle = slice(2, 6)
        moved = [
            torch.equal(seen[..., middle, middle], x.roll((d, r), (2, 3))[..., middle, middle])
            for d in (-1, 0, 1)
            for r in (-1, 0, 1)
        ]
        assert sum(moved) == 1


def test_a_flip_declared_twice_mirrors_once():
    loader = Loader(ArrayDataset(torch.rand(8, 1, 4, 4)), 8)
    x = torch.rand(3, 1, 4, 4)
    for both in (
        [AlternatingFlip(loader), Augment(flip=0.5)],
        [Augment(flip=0.5), AlternatingFlip(loader)],
    ):
        assert torch.equal(views(both, 2)[1](x), x.flip(3))


class Dim(PerSample):
    n_draws = 1

    def apply(self, x, draws):
        return x * (0.5 + 0.5 * draws.view(-1, 1, 1, 1))


def test_ones_own_augmentation_makes_views():
    x = torch.ones(3, 1, 2, 2)
    shades = [view(x).unique() for view in views([Dim()], 4)]
    assert all(len(shade) == 1 and 0.5 <= shade <= 1 for shade in shades)
    assert len({shade.item() for shade in shades}) == 4
    mirrored_only = views([Augment(flip=0.5), Dim()], 2)[1]
    assert torch.equal(mirrored_only(x), x)


@pytest.mark.parametrize(
    "augment", [[], [RandomErasing()], [Augment(cutout=0.3)], [Augment(), RandomErasing()]]
)
def test_without_a_declaration_there_is_an_error_that_says_so(augment):
    learn = learner(loaders(augment))
    with pytest.raises(SetupError, match="declare none that makes views") as caught:
        tta(learn)
    assert "data.augment = [Augment(flip=0.5)]" in str(caught.value)


def test_what_hides_makes_no_views():
    x = torch.rand(3, 1, 8, 8)
    augment = [Augment(flip=0.5, cutout=0.5), RandomErasing(1.0)]
    for one, other in zip(views(augment, 6), views([Augment(flip=0.5)], 6), strict=True):
        assert torch.equal(one(x), other(x))
    assert augment[0].cutout == 0.5


def test_the_report_shows_both_side_by_side():
    learn = learner(loaders([Augment(flip=0.5)]), accuracy, MacroF1(3))
    report = tta(learn, 2)
    assert set(report.plain) == set(report.tta) == {"accuracy", "macro_f1"}
    head, first, _ = str(report).splitlines()
    assert head.split()[:3] == ["plain", "TTA", "change"]
    assert "2 views by Augment(flip=0.5)" in head
    plain, of_views = report.plain["accuracy"], report.tta["accuracy"]
    assert first.split() == [
        "accuracy",
        f"{plain:.4f}",
        f"{of_views:.4f}",
        f"{of_views - plain:+.4f}",
    ]
    assert report.plain["macro_f1"] == pytest.approx(learn.validate()["macro_f1"])


def test_accuracy_is_shown_without_being_asked_for_where_there_are_classes():
    assert set(tta(learner(loaders([Augment(flip=0.5)])), 2).plain) == {"accuracy"}


def test_looking_changes_nothing():
    learn = learner(loaders([Augment(flip=0.5, shift=0.1)], shuffle=True), accuracy, MacroF1(3))
    state, data = copy.deepcopy(learn.model.state_dict()), learn.data
    kept = copy.copy(vars(learn)), copy.copy(vars(data)), data.valid.epoch, torch.get_rng_state()
    tta(learn, 3)
    assert (vars(learn), vars(data), data.valid.epoch) == kept[:3]
    assert torch.equal(torch.get_rng_state(), kept[3])
    assert all(map(torch.equal, learn.model.state_dict().values(), state.values()))
    with pytest.raises(RuntimeError):
        tta(learn, 3, loader=[(torch.rand(2, 5, 8, 8), torch.zeros(2))])
    assert learn.data is data


def test_what_cannot_be_is_refused():
    learn = learner(loaders([Augment(flip=0.5)]))
    with pytest.raises(SetupError, match="2 or more"):
        tta(learn, 1)
    learn.data.valid = None
    with pytest.raises(SetupError, match="no validation data"):
        tta(learn)
