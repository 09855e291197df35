"""A folder of images as data: its files found, labelled, split, checked, and told about."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, UnknownName, did_you_mean
from .bar import bar
from .decoded import DecodedImages, decode_all, decode_to_disk, decode_to_memory
from .files import FileNames, few, no_files, printable, scan
from .images import ImageFiles, image_size
from .labels import encode, label_files, read_labels, vocabulary
from .splits import Split, split_at_random, split_by_folder, split_by_list

CACHES = ("auto", "memory", "disk", None)
POLICIES = ("raise", "skip", "set-aside")
_ASIDE = ".set-aside"  # hidden, so that the next scan passes it by
_LOOKED_AT = 500  # images whose size is read for the report

Labels = str | re.Pattern[str] | Callable[[str], str] | Mapping[str, str] | os.PathLike[str]
Splitting = str | float | Callable[[Sequence[str]], Split] | Iterable[str]
Images = ImageFiles | DecodedImages


@dataclass(frozen=True)
class FolderReport:
    """What a folder of images holds, in plain words by `str()`.

    Attributes:
        root: the folder.
        classes: of the training images.
        counts: training and validation images of each class.
        n_elsewhere: files that are in neither part.
        sizes: (height, width) of up to 500 images, evenly spread.
        bad: name of each broken file, and what is wrong with it; those that were looked for.
        aside: whether the broken files were set aside.
    """

    root: str
    classes: list[str]
    counts: list[tuple[int, int]]
    n_elsewhere: int
    sizes: list[tuple[int, int]]
    bad: dict[str, str]
    aside: bool = False

    def __str__(self) -> str:
        train, valid = (sum(part) for part in zip(*self.counts, strict=True))
        lines = [
            f"{printable(Path(self.root).name)}: {train:,} images to train on, {valid:,} to "
            f"validate, {len(self.classes)} classes",
            f"  classes  {self._classes()}",
            f"  sizes    {_sizes(self.sizes)}",
        ]
        if self.n_elsewhere:
            lines.append(f"  unused   {self.n_elsewhere:,} files in other folders")
        if self.bad:
            what = f"set aside in {_ASIDE}" if self.aside else "left out"
            lines.append(f"  broken   {_files(len(self.bad))} {what}: {_told(self.bad)}")
        return "\n".join([*lines, *(f"  note     {note}" for note in self._notes())])

    def _classes(self) -> str:
        trains = [train for train, _ in self.counts]
        if min(trains) == max(trains):
            return f"{few(self.classes)}; {trains[0]:,} training images each"
        order = np.argsort(trains)
        least, most = (f"{printable(self.classes[i])} {trains[i]:,}" for i in order[[0, -1]])
        return f"{few(self.classes)}; training images from {least} to {most}"

    def _notes(self) -> Iterable[str]:
        """Say what often is a slip."""
        if len(self.classes) == 1:
            yield "there is one class only: nothing can be learnt from it"
        alone = [name for name, (n, _) in zip(self.classes, self.counts, strict=True) if n == 1]
        if alone:
            yield f"one training image only: {few(alone)}"
        pairs = zip(self.classes, self.counts, strict=True)
        unseen = [name for name, (_, n) in pairs if not n]
        if unseen:
            yield f"no validation image: {few(unseen)}"


def read_folder(
    path: str | os.PathLike[str],
    size: int | tuple[int, int],
    split: Splitting,
    labels: Labels,
    cache: str | None,
    bad: str,
    seed: int,
    workers: int,
) -> tuple[Images, Images, FolderReport]:
    """Do what `DataLoaders.from_folder` says: training and validation images, and the report."""
    if cache not in CACHES:
        raise UnknownName(f"There is no cache {cache!r}.", do="choose one of 'auto', 'memory', "
                          "'disk', None.")  # fmt: skip
    if bad not in POLICIES:
        raise UnknownName(
            f"Broken files cannot be treated by {bad!r}.", do=did_you_mean(str(bad), POLICIES)
        )
    names = scan(path)
    if not len(names):
        raise no_files(names)
    parts = _split(names, split, seed)
    found = np.array(_labels(names, labels), dtype=object)
    classes = vocabulary(found[parts[0]])
    files = [
        ImageFiles(names[part], encode(found[part], classes, names[part]), size) for part in parts
    ]
    decoded, broken = _decoded(files, cache, bad, workers)
    whole = [_without(part, broken) for part in files]
    counts = [np.bincount(part.labels, minlength=len(classes)).tolist() for part in whole]
    report = FolderReport(
        names.root,
        classes,
        list(zip(*counts, strict=True)),
        len(names) - len(parts[0]) - len(parts[1]),
        _some_sizes(names),
        broken,
        bad == "set-aside",
    )
    return decoded[0] or whole[0], decoded[1] or whole[1], report


def find_broken(files: ImageFiles, workers: int) -> dict[str, str]:
    """Decode every image to see which ones are broken.

    Returns:
        Their names, and what is wrong with each.
    """
    with bar("looking at the images", len(files)) as advance:
        bad = decode_all(files, workers, advance)
    return {files.names[item]: reason for item, reason in sorted(bad.items())}


def shared_files(train: FileNames, valid: FileNames) -> dict[str, str]:
    """Find validation files whose content is also that of a training file.

    Only files of the same length are read, so this takes long where many small files are.

    Returns:
        Name in `valid`: name in `train`.
    """
    lengths: dict[int, list[str]] = {}
    for name in train:
        lengths.setdefault(_length(train, name), []).append(name)
    sums: dict[int, dict[bytes, str]] = {}
    found = {}
    for name in valid:
        length = _length(valid, name)
        if length in lengths and length not in sums:
            sums[length] = {_sum(train, other): other for other in reversed(lengths[length])}
        same = length in lengths and sums[length].get(_sum(valid, name))
        if same:
            found[name] = same
    return found


def usual_side(path: str | os.PathLike[str]) -> int:
    """Return the median of the shorter sides of the images in a folder; 64 if none tells."""
    sides = [min(size) for size in _some_sizes(scan(path))]
    return int(np.median(sides)) if sides else 64


def _split(names: FileNames, split: Splitting, seed: int) -> Split:
    if isinstance(split, str) and split in ("auto", "folder"):
        tops = {name.partition("/")[0] for name in names}
        if split == "folder" or ("train" in tops and tops & {"valid", "val", "validation", "test"}):
            return split_by_folder(names)
        return split_at_random(names, seed=seed)
    if isinstance(split, (int, float)):
        return split_at_random(names, split, seed)
    if isinstance(split, (str, os.PathLike, Iterable)):
        return split_by_list(names, split)
    train, valid = split(names)
    return np.asarray(train, np.int64), np.asarray(valid, np.int64)


def _labels(names: FileNames, labels: Labels) -> list[str]:
    if isinstance(labels, os.PathLike) or (isinstance(labels, str) and labels.endswith(".csv")):
        return label_files(names, read_labels(labels))
    return label_files(names, labels)


def _decoded(
    files: list[ImageFiles], cache: str | None, bad: str, workers: int
) -> tuple[list[DecodedImages | None], dict[str, str]]:
    """Decode what is to be kept; return it without the broken files, and those by name."""
    if cache == "auto":
        n_bytes = sum(len(part) * int(np.prod(part.shape)) for part in files)
        cache = "memory" if n_bytes <= _affordable() else None
    broken: dict[str, str] = {}
    kept: list[DecodedImages | None] = []
    for part in files:
        if cache is None:
            broken |= find_broken(part, workers) if bad != "raise" else {}
            kept.append(None)
            continue
        decode = decode_to_memory if cache == "memory" else decode_to_disk
        with bar("decoding", len(part)) as advance:
            images, wrong = decode(part, workers, advance)
        broken |= {part.names[item]: reason for item, reason in sorted(wrong.items())}
        whole = np.setdiff1d(np.arange(len(part)), list(wrong)) if wrong else None
        items = None if whole is None else torch.from_numpy(whole)
        kept.append(DecodedImages(images, part.labels, items))
    _treat(files[0].names.root, broken, bad)
    return kept, broken


def _treat(root: str, broken: dict[str, str], bad: str) -> None:
    if broken and bad == "raise":
        raise DataError(
            f"{_files(len(broken))} under {printable(root)} cannot be read as images.",
            saw=_told(broken),
            do='mend or remove them; or bad="skip" leaves them out, bad="set-aside" moves them '
            f"into the hidden folder {_ASIDE}.",
        )
    if broken and bad == "set-aside":
        _set_aside(Path(root), broken)


def _set_aside(root: Path, broken: dict[str, str]) -> None:
    """Move files into a hidden folder of the data set, with a table of reasons."""
    table = root / _ASIDE / "reasons.csv"
    table.parent.mkdir(exist_ok=True)
    fresh = not table.exists()
    with table.open("a", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(["file", "reason"])
        for name, reason in broken.items():
            place = root / _ASIDE / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (root / name).replace(place)
            rows.writerow([name, reason])


def _without(files: ImageFiles, broken: dict[str, str]) -> ImageFiles:
    if not broken:
        return files
    whole = np.array([name not in broken for name in files.names])
    return files if whole.all() else files.subset(np.flatnonzero(whole))


def _affordable() -> int:
    """Return how many bytes of images may be kept in memory unasked: an eighth of it, or 1 GiB."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2**30


def _some_sizes(names: FileNames) -> list[tuple[int, int]]:
    if not len(names):
        return []
    chosen = np.unique(np.linspace(0, len(names) - 1, _LOOKED_AT).astype(int))
    sizes = (image_size(names.path(int(item))) for item in chosen)
    return [size for size in sizes if size]


def _sizes(sizes: list[tuple[int, int]]) -> str:
    """Describe sizes as width × height, as pictures are usually described."""
    if not sizes:
        return "unknown"
    common = Counter(sizes).most_common(1)[0]
    heights, widths = zip(*sizes, strict=True)
    if common[1] == len(sizes):
        return f"{widths[0]}×{heights[0]}" + f" (of {len(sizes)} looked at)" * (len(sizes) > 1)
    return (
        f"{min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high, "
        f"{int(np.median(widths))}×{int(np.median(heights))} in the middle "
        f"(of {len(sizes)} looked at)"
    )


def _files(n: int) -> str:
    return "1 file" if n == 1 else f"{n:,} files"


def _told(broken: dict[str, str]) -> str:
    return few([f"{name} ({reason})" for name, reason in broken.items()], 5)


def _length(names: FileNames, name: str) -> int:
    try:
        return Path(names.root, name).stat().st_size
    except OSError:
        return -1


def _sum(names: FileNames, name: str) -> bytes:
    try:
        return blake2b(Path(names.root, name).read_bytes(), digest_size=16).digest()
    except OSError:
        return os.urandom(16)  # like no other
