"""A folder of images as data: read, split, kept, augmented, shown, trained on, predicted."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pellucid import Callback, DataLoaders, Learner, cli
from pellucid.data import (
    DecodedImages,
    ImageFiles,
    Loader,
    Normalize,
    PerSample,
    imagenette,
    read_labels,
)
from pellucid.data.folder_report import shared_files, usual_side
from pellucid.errors import DataError, DataNotFound, UnknownName
from pellucid.metrics import accuracy
from pellucid.vision import Augment, small_resnet

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_folder(root: Path, n: int = 12, parts: tuple[str, ...] = ("train", "valid")) -> Path:
    """Write n noisy images a class and part, each a colour, of 20×16 pixels."""
    rng = np.random.default_rng(0)
    for part in parts:
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(-20, 20, (16, 20, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "colours")


def epoch(loader: Loader, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*loader.batches(number), strict=True)
    return torch.cat(x), torch.cat(y)


# ── what it finds ───────────────────────────────────────────────────────────────────────────────


def test_a_folder_with_train_and_valid_becomes_loaders_and_a_report(images):
    data = DataLoaders.from_folder(images, size=16, batch_size=8)
    assert data.classes == ["blue", "green", "red"]
    assert (len(data.train.dataset), len(data.valid.dataset)) == (36, 36)
    assert (data.train.batch_size, data.valid.batch_size) == (8, 16)
    x, y = next(iter(data.valid))
    assert (x.shape, x.dtype, y.tolist()) == ((16, 3, 16, 16), torch.uint8, [0] * 12 + [1] * 4)
    assert str(data.report) == (
        "colours: 36 images to train on, 36 to validate, 3 classes\n"
        "  classes  blue, green, red; 12 training images each\n"
        "  split    by the folders train and valid\n"
        "  sizes    20×16 (of 72 looked at)"
    )


def test_without_such_folders_a_fifth_is_for_validation_and_new_files_move_nobody(tmp_path):
    root = make_folder(tmp_path / "plain", parts=(".",))
    names = [set(part.names) for part in splits(root)]
    assert len(names[0] | names[1]) == 36 and 2 <= len(names[1]) <= 14
    Image.new("RGB", (20, 16)).save(root / "red" / "new.png")
    again = [set(part.names) for part in splits(root)]
    assert again[0] - {"red/new.png"} == names[0]
    assert again[1] - {"red/new.png"} == names[1]


def splits(root: Path, **options: object) -> list[ImageFiles]:
    data = DataLoaders.from_folder(root, size=8, cache=None, **options)
    return [data.train.dataset, data.valid.dataset]


def test_splits_by_fraction_list_file_and_function(tmp_path):
    root = make_folder(tmp_path / "plain", parts=(".",))
    assert len(splits(root, split=0.5)[1]) > len(splits(root, split=0.1)[1])
    chosen = ["red/00.png", "blue/11.png"]
    assert sorted(splits(root, split=chosen)[1].names) == sorted(chosen)
    (tmp_path / "valid.txt").write_text("\n".join(chosen))
    assert sorted(splits(root, split=tmp_path / "valid.txt")[1].names) == sorted(chosen)

    def halves(names: object) -> tuple[range, range]:
        return range(18), range(18, len(names))

    parts = splits(root, split=halves, labels=lambda name: "one")
    assert parts[1].names[0] == "green/06.png"


@pytest.mark.parametrize(
    ("split", "answer"),
    [
        (lambda names: (range(36), range(30, 36)), "into both parts(.|\n)*6 such"),
        (lambda names: (range(36), []), "validation part must be numbers of files"),
        (lambda names: ([-1, 2], [3]), "training part must be numbers of files"),
        (lambda names: ([0, 1], [900]), "validation part must be numbers of files"),
        (lambda names: ([0, 0], [3]), "training part must be numbers of files"),
        ("random", "There is no split 'random'"),
        (None, "must be 'auto'"),
    ],
)
def test_a_split_that_cannot_be_is_refused(split, answer, tmp_path):
    root = make_folder(tmp_path / "plain", parts=(".",))
    with pytest.raises((DataError, ValueError), match=answer):
        DataLoaders.from_folder(root, 8, split=split)


def test_a_split_may_be_two_masks(tmp_path):
    root = make_folder(tmp_path / "plain", parts=(".",))

    def masks(names):
        chosen = np.array([name.endswith(("0.png", "1.png")) for name in names])
        return ~chosen, chosen

    parts = splits(root, split=masks)
    assert (len(parts[0]), len(parts[1])) == (24, 12)


def test_folders_in_capitals_are_train_and_valid_too(images):
    (images / "train").rename(images / "Train")
    (images / "valid").rename(images / "Val")
    report = DataLoaders.from_folder(images, 8).report
    assert report.split == "by the folders Train and Val"


def test_files_in_neither_part_need_no_label(images):
    Image.new("RGB", (9, 9)).save(images / "preview.png")
    report = DataLoaders.from_folder(images, 8).report
    assert "unused   1 file in neither part" in str(report)


def test_labels_by_pattern_function_table_and_csv(images, tmp_path):
    by_pattern = DataLoaders.from_folder(images, 8, labels=re.compile(r"/(\w)\w+/"))
    assert by_pattern.classes == ["b", "g", "r"]
    by_function = DataLoaders.from_folder(images, 8, labels=lambda name: name[-5])
    assert by_function.classes == [str(i) for i in range(10)]
    rows = [(name, "dark" if "blue" in name else "light") for part in splits(images)
            for name in part.names]  # fmt: skip
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    for table in (dict(rows), tmp_path / "labels.csv", str(tmp_path / "labels.csv")):
        assert DataLoaders.from_folder(images, 8, labels=table).classes == ["dark", "light"]
    assert read_labels(tmp_path / "labels.csv") == dict(rows)


def test_a_class_only_in_validation_is_named(images):
    (images / "valid" / "violet").mkdir()
    Image.new("RGB", (9, 9)).save(images / "valid" / "violet" / "a.png")
    with pytest.raises(DataError, match=r"'violet'(.|\n)*violet/a\.png"):
        DataLoaders.from_folder(images, 8)


def test_the_report_notes_what_often_is_a_slip(images):
    for file in sorted((images / "train" / "red").iterdir())[1:]:
        file.unlink()
    for file in (images / "valid" / "green").iterdir():
        file.unlink()
    (images / "extra").mkdir()
    Image.new("RGB", (99, 50)).save(images / "extra" / "a.png")
    text = str(DataLoaders.from_folder(images, 8).report)
    assert "training images from red 1 to " in text
    assert "20 to 99 wide, 16 to 50 high, 20×16 in the middle (of 50 looked at)" in text
    assert "unused   1 file in neither part" in text
    assert "note     one training image only: red" in text
    assert "note     no validation image: green" in text


def test_one_class_is_no_error_but_noted(tmp_path):
    root = make_folder(tmp_path / "plain", parts=(".",))
    report = DataLoaders.from_folder(root, 8, labels=lambda name: "thing").report
    assert "note     there is one class only: nothing can be learnt from it" in str(report)


@pytest.mark.parametrize(
    ("options", "error", "answer"),
    [
        ({"cache": "ram"}, UnknownName, "There is no cache 'ram'."),
        ({"bad": "skipp"}, UnknownName, "did you mean 'skip'?"),
        ({"labels": "foldr"}, UnknownName, "cannot be labelled by 'foldr'"),
        ({"split": 1.5}, ValueError, "1.5"),
        ({"size": 0}, ValueError, "size=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
    ],
)
def test_slips_are_answered(options, error, answer, images):
    with pytest.raises(error, match=re.escape(answer)):
        DataLoaders.from_folder(images, **{"size": 8} | options)


def test_a_missing_and_an_empty_folder(tmp_path):
    with pytest.raises(DataNotFound, match="nowhere"):
        DataLoaders.from_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no files under"):
        DataLoaders.from_folder(tmp_path)


def test_files_that_are_in_both_parts_are_found(images):
    copy = images / "valid" / "red" / "copy.png"
    copy.write_bytes((images / "train" / "red" / "03.png").read_bytes())
    train, valid = splits(images)
    assert shared_files(train.names, valid.names) == {"valid/red/copy.png": "train/red/03.png"}


def test_the_usual_side_is_the_median_of_the_shorter_sides(images, tmp_path):
    assert usual_side(images) == 16
    (tmp_path / "empty").mkdir()
    assert usual_side(tmp_path / "empty") == 64


def test_imagenette_is_found_and_its_classes_have_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PELLUCID_DATA", str(tmp_path))
    for part, n in (("train", 3), ("val", 2)):
        for code in ("n03888257", "n01440764"):
            folder = tmp_path / "imagenette2-160" / part / code
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    data = imagenette(size=32, batch_size=2)
    assert data.classes == ["tench", "parachute"]
    assert (len(data.train.dataset), len(data.valid.dataset)) == (6, 4)


# ── what is kept ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cache", ["memory", "disk", None])
def test_batches_are_the_same_however_the_images_are_kept(cache, images):
    data = DataLoaders.from_folder(images, size=12, batch_size=5, cache=cache)
    plain = DataLoaders.from_folder(images, size=12, batch_size=5, cache="auto")
    assert isinstance(data.train.dataset, DecodedImages if cache else ImageFiles)
    for a, b in ((data.train, plain.train), (data.valid, plain.valid)):
        for number in (0, 1):
            for found, expected in zip(epoch(a, number), epoch(b, number), strict=True):
                assert torch.equal(found, expected)
    assert data.transforms[0].mean.tolist() == plain.transforms[0].mean.tolist()


def test_statistics_are_those_of_the_training_images(images):
    data = DataLoaders.from_folder(images, size=(16, 20))
    expected = Normalize.of(epoch(data.train)[0])
    torch.testing.assert_close(data.transforms[0].mean, expected.mean)
    torch.testing.assert_close(data.transforms[0].std, expected.std)


def test_what_is_kept_on_disk_is_found_again_until_a_file_changes(images, own_cache, monkeypatch):
    first = epoch(DataLoaders.from_folder(images, 12, cache="disk").train)
    kept = {path.name for path in (own_cache / "decoded").glob("*.npy")}
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "read", lambda *_: pytest.fail("it decodes again"))
        again = epoch(DataLoaders.from_folder(images, 12, cache="disk").train)
    assert torch.equal(first[0], again[0])
    file = images / "train" / "red" / "00.png"
    Image.new("RGB", (20, 16), "white").save(file)
    os.utime(file, (1, 1))
    fresh = epoch(DataLoaders.from_folder(images, 12, cache="disk").train)
    assert not torch.equal(first[0], fresh[0])
    assert len({path.name for path in (own_cache / "decoded").glob("*.npy")} - kept) == 1


def test_a_cache_on_disk_that_was_not_finished_leaves_nothing(images, own_cache, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pellucid.data.decoded.decode_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DataLoaders.from_folder(images, 12, cache="disk")
    assert not list((own_cache / "decoded").glob("*.np*"))
    assert not list((own_cache / "decoded").glob("*.part"))
    assert len(DataLoaders.from_folder(images, 12, cache="disk").train.dataset) == 36


def test_a_damaged_cache_is_made_again(images, own_cache):
    first = epoch(DataLoaders.from_folder(images, 12, cache="disk").train)[0]
    kept = next((own_cache / "decoded").glob("*.npy"))
    for damage in (
        lambda: kept.with_suffix(".json").unlink(),
        lambda: kept.write_bytes(kept.read_bytes()[:100]),
    ):
        damage()
        assert torch.equal(epoch(DataLoaders.from_folder(images, 12, cache="disk").train)[0], first)


def test_another_seed_does_not_decode_again(tmp_path, own_cache):
    root = make_folder(tmp_path / "plain", parts=(".",))
    for seed in range(3):
        DataLoaders.from_folder(root, 12, cache="disk", seed=seed)
    assert len(list((own_cache / "decoded").glob("*.npy"))) == 1


def test_a_cache_that_cannot_be_written_says_so(images, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in(.|\n)*PELLUCID_HOME"):
        DataLoaders.from_folder(images, 12, cache="disk")


def test_a_full_disk_is_an_error_not_a_bus_error(images, monkeypatch, own_cache):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match="No space left"):
        DataLoaders.from_folder(images, 12, cache="disk")
    assert not list((own_cache / "decoded").glob("*.part"))


def test_a_changed_image_in_memory_never_reaches_the_file(images):
    data = DataLoaders.from_folder(images, 12, cache="disk")
    before = epoch(data.train)[0]
    for x, _ in data.train:
        x.zero_()
    assert torch.equal(epoch(DataLoaders.from_folder(images, 12, cache="disk").train)[0], before)


# ── broken files ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def broken(images: Path) -> Path:
    (images / "train" / "red" / "05.png").write_bytes(b"<html>not found</html>")
    whole = (images / "valid" / "blue" / "07.png").read_bytes()
    (images / "valid" / "blue" / "07.png").write_bytes(whole[: len(whole) // 2])
    return images


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_broken_files_are_all_named_before_training(cache, broken):
    with pytest.raises(DataError) as caught:
        DataLoaders.from_folder(broken, 12, cache=cache)
    text = str(caught.value)
    assert "2 files under" in text
    assert "train/red/05.png (it is no image" in text
    assert "valid/blue/07.png (" in text
    assert 'bad="skip"' in text


def test_without_a_cache_a_broken_file_is_named_where_it_is_met(broken):
    with pytest.raises(DataError, match=r"05\.png cannot be read as an image"):
        DataLoaders.from_folder(broken, 12, cache=None)  # it is one of those for the statistics
    (broken / "train" / "red" / "05.png").unlink()
    data = DataLoaders.from_folder(broken, 12, cache=None)
    with pytest.raises(DataError, match=r"07\.png cannot be read as an image"):
        list(data.valid)


@pytest.mark.parametrize("cache", ["memory", "disk", None])
def test_skipped_files_are_counted_and_the_rest_is_whole(cache, broken):
    for _ in range(2):  # the second time from the disk
        data = DataLoaders.from_folder(broken, 12, cache=cache, bad="skip")
        assert (len(data.train.dataset), len(data.valid.dataset)) == (35, 35)
        assert list(data.report.bad) == ["train/red/05.png", "valid/blue/07.png"]
        assert "broken   2 files left out: train/red/05.png (it is no image" in str(data.report)
        x, y = epoch(data.train)
        assert torch.bincount(y).tolist() == [12, 12, 11]
        assert (x.flatten(1).max(1).values > 0).all()  # none is the black of a broken file


def test_no_training_image_left_is_an_error(images):
    for file in (images / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="No training image can be read"):
        DataLoaders.from_folder(images, 12, bad="skip")


def test_what_a_link_leads_to_is_not_moved(broken, tmp_path):
    (broken / "train" / "red").rename(tmp_path / "elsewhere")
    (broken / "train" / "red").symlink_to(tmp_path / "elsewhere")
    data = DataLoaders.from_folder(broken, 12, bad="set-aside")
    assert len(data.train.dataset) == 35
    assert (tmp_path / "elsewhere" / "05.png").exists()
    assert (broken / ".set-aside" / "valid" / "blue" / "07.png").exists()


def test_files_set_aside_are_out_of_the_way_and_listed(broken):
    data = DataLoaders.from_folder(broken, 12, bad="set-aside")
    assert (len(data.train.dataset), len(data.valid.dataset)) == (35, 35)
    assert "2 files set aside in .set-aside" in str(data.report)
    aside = broken / ".set-aside"
    assert (aside / "train" / "red" / "05.png").read_bytes() == b"<html>not found</html>"
    rows = list(csv.reader((aside / "reasons.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["file", "train/red/05.png", "valid/blue/07.png"]
    again = DataLoaders.from_folder(broken, 12)
    assert (len(again.train.dataset), again.report.bad) == (35, {})


# ── augmentation, and what is shown ─────────────────────────────────────────────────────────────


class Stamp(PerSample):
    """Write the first draw of each sample into its first pixel."""

    n_draws = 2

    def apply(self, x, draws):
        x = x.float()
        x[:, 0, 0, 0] = draws[:, 0]
        return x


class Seen(nn.Module):
    """A model that keeps what it is given while it trains."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return self.layer(x.float().mean((2, 3)))


def stamps(images: Path, epochs: int = 2, batch_size: int = 5, workers: int = 0) -> dict:
    """Train, and return {(epoch, item): stamp}."""
    data = DataLoaders.from_folder(images, 8, batch_size, cache=None)
    data.train.workers = workers
    data.augment, data.transforms = [Stamp()], []
    learn = Learner(Seen(), data, device="cpu")
    learn.fit(epochs)
    values = torch.cat([x[:, 0, 0, 0] for x in learn.model.seen]).tolist()
    items = [(e, i) for e in range(epochs) for i in data.train.order(e).tolist()]
    return dict(zip(items, values, strict=True))


def test_a_samples_draw_depends_on_seed_epoch_and_item_alone(images):
    reference = stamps(images)
    assert len(set(reference.values())) == len(reference)
    assert stamps(images, batch_size=7) == reference
    assert stamps(images, workers=2) == reference


def test_several_augmentations_draw_each_their_own(images):
    data = DataLoaders.from_folder(images, 8)
    seen = []

    class Keep(Stamp):
        def apply(self, x, draws):
            seen.append(draws)
            return x

    data.augment = [Keep(), Keep()]
    next(iter(data.train))
    data.prepare(torch.zeros(36, 3, 8, 8), training=True)
    assert not torch.equal(seen[0], seen[1])


def test_an_augmentation_of_ones_own_gets_floats_from_0_to_1(images):
    class Dim(PerSample):
        n_draws = 1

        def apply(self, x, draws):
            return x * (0.5 + 0.5 * draws.view(-1, 1, 1, 1))

    data = DataLoaders.from_folder(images, 8)
    data.augment = [Dim()]
    x = next(iter(data.train))[0]
    assert data.prepare(x, training=True).abs().max() < 5


def test_augmentation_is_for_training_only(images):
    data = DataLoaders.from_folder(images, 8)
    data.augment = [Augment(flip=1.0)]
    x = next(iter(data.train))[0]
    assert torch.equal(data.prepare(x), data.transforms[0](x))
    torch.testing.assert_close(data.prepare(x, True), data.transforms[0](x.flip(3)))


def test_any_module_is_accepted_as_augmentation_and_as_transform(images):
    data = DataLoaders.from_folder(images, 8)
    data.augment, data.transforms = [nn.Identity()], [*data.transforms, nn.AvgPool2d(2)]
    learn = Learner(small_resnet(3, 3, (4, 8), 1), data, metrics=[accuracy], device="cpu")
    learn.fit(1)
    assert learn.x is None and data.prepare(torch.zeros(2, 3, 8, 8), True).shape == (2, 3, 4, 4)


def test_show_batch_shows_what_the_model_gets_next(images):
    data = DataLoaders.from_folder(images, 16, batch_size=6)
    data.augment = [Augment(flip=1.0)]
    figure = data.show_batch(4)
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert data.train.epoch == 0 and data.train.drawn is None
    x, y = next(iter(data.train))
    expected = (x.float() / x.max())[:4].flip(3).permute(0, 2, 3, 1)
    np.testing.assert_allclose(np.stack(shown), expected.numpy(), atol=1e-5)
    assert titles == [data.classes[label] for label in y[:4]]


def test_show_batch_refuses_what_is_no_image():
    data = DataLoaders.from_arrays((torch.randn(9, 4), torch.arange(9) % 3))
    with pytest.raises(ValueError, match="no images"):
        data.show_batch()


def trained(images: Path, look: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    data = DataLoaders.from_folder(images, 16, batch_size=8)
    data.augment = [Augment(flip=0.5, shift=0.2, brightness=0.3, cutout=0.2)]
    model = nn.Sequential(small_resnet(3, 8, (4, 8), 1), nn.Dropout(0.5), nn.Linear(8, 3))
    learn = Learner(model, data, device="cpu")

    class Look(Callback):
        def after_batch(self, learn):
            if learn.training:
                learn.data.show_batch()

    learn.fit(2, callbacks=[Look()] if look else [])
    return list(model.state_dict().values())


def test_looking_at_a_batch_in_the_middle_of_training_changes_nothing(images):
    pairs = zip(trained(images, look=True), trained(images, look=False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ── the whole way ───────────────────────────────────────────────────────────────────────────────


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pellucid", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_folder_is_shown_trained_on_and_predicted_from_the_command_line(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "show", str(images)) == 0
    said = capsys.readouterr().out
    assert "colours: 36 images to train on" in said and "an image: 3×16×16" in said
    assert (tmp_path / "runs" / "colours" / "batch.png").read_bytes()[:4] == b"\x89PNG"

    options = ("--epochs", "4", "--batch-size", "9", "--flip", "--shift", "0.1")
    assert command(monkeypatch, "train", str(images), *options) == 0
    rows = re.findall(r"^\s+\d+  .*$", capsys.readouterr().out, re.MULTILINE)
    assert float(rows[-1].split()[4]) >= 0.9

    wanted = [str(images / "valid" / name / "01.png") for name in COLOURS]
    assert command(monkeypatch, "predict", "runs/colours", *wanted) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(COLOURS)
    assert all(re.fullmatch(r"\w+  \d+\.\d%  .*01\.png", line) for line in lines)


def test_predict_names_a_broken_image_and_goes_on(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "train", str(images), "--epochs", "1") == 0
    (tmp_path / "broken.jpg").write_bytes(b"no")
    capsys.readouterr()
    good = str(images / "valid" / "red" / "00.png")
    assert command(monkeypatch, "predict", "runs/colours", "broken.jpg", "gone.jpg", good) == 1
    said = capsys.readouterr()
    assert "broken.jpg cannot be read as an image" in said.err and "gone.jpg" in said.err
    assert len(said.out.splitlines()) == 1


def test_predict_tells_of_a_folder_without_images(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "train", str(images), "--epochs", "1") == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    capsys.readouterr()
    good = str(images / "valid" / "red")
    assert command(monkeypatch, "predict", "runs/colours", good, "empty") == 1
    said = capsys.readouterr()
    assert "There are no images in empty." in said.err and not said.out
    assert command(monkeypatch, "predict", "runs/colours", good) == 0


def test_what_is_saved_may_not_lie_among_the_images(images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    assert command(monkeypatch, "show", ".") == 2
    assert "would lie among the images" in capsys.readouterr().err
    assert not (images / "runs").exists()


def test_options_without_effect_are_refused(images, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for option in (("--size", "32"), ("--cache", "disk"), ("--bad", "skip")):
        assert command(monkeypatch, "train", "digits", *option) == 2
        assert "are for folders of images" in capsys.readouterr().err
    for option in (("--cache", "disk"), ("--bad", "set-aside")):
        assert command(monkeypatch, "show", str(images), *option) == 2
        assert "leave out --cache and --bad" in capsys.readouterr().err


def test_a_model_whose_facts_were_tampered_with_is_refused(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "train", str(images), "--epochs", "1") == 0
    facts = json.loads((tmp_path / "runs/colours/model.json").read_text())
    for slip in ({"name": "warp"}, {"std": [0, 1, 1]}, {"brightest": "x"}, {"classes": "ab"},
                 {"shape": [3, 200_000, 200_000]}, {"mean": [0.1, 0.2]}):  # fmt: skip
        (tmp_path / "runs/colours/model.json").write_text(json.dumps(facts | slip))
        capsys.readouterr()
        assert command(monkeypatch, "predict", "runs/colours", "a.jpg") == 1
        assert "cannot be read" in capsys.readouterr().err


def test_predict_without_a_run(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "predict", str(tmp_path), "a.jpg") == 1
    assert "There is no trained model in" in capsys.readouterr().err
    (tmp_path / "model.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert command(monkeypatch, "predict", str(tmp_path), "a.jpg") == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_name_that_is_neither_data_set_nor_folder(monkeypatch, capsys):
    assert command(monkeypatch, "train", "digit") == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert command(monkeypatch, "train", "no/where") == 1
    assert "no folder of that name" in capsys.readouterr().err
