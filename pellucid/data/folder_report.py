"""What a folder of images holds, told in plain words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .files import FileNames, few, printable, scan
from .images import image_size

ASIDE = ".set-aside"
"""Where broken files are moved to: hidden, so that the next scan passes it by."""

_LOOKED_AT = 500  # images whose size is read


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
        split: how training and validation were told apart.
    """

    root: str
    classes: list[str]
    counts: list[tuple[int, int]]
    n_elsewhere: int
    sizes: list[tuple[int, int]] = field(repr=False)
    bad: dict[str, str]
    aside: bool
    split: str

    def __str__(self) -> str:
        train, valid = (sum(part) for part in zip(*self.counts, strict=True))
        lines = [
            f"{printable(Path(self.root).name)}: {train:,} images to train on, {valid:,} to "
            f"validate, {len(self.classes)} classes",
            f"  classes  {self._classes()}",
            f"  split    {self.split}",
            f"  sizes    {_sizes(self.sizes)}",
        ]
        if self.n_elsewhere:
            lines.append(f"  unused   {files_counted(self.n_elsewhere)} in neither part")
        if self.bad:
            what = f"set aside in {ASIDE}" if self.aside else "left out"
            lines.append(f"  broken   {files_counted(len(self.bad))} {what}: {told(self.bad)}")
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
        for n, what in ((0, "no training image"), (1, "one training image only")):
            rare = [name for name, (k, _) in zip(self.classes, self.counts, strict=True) if k == n]
            if rare:
                yield f"{what}: {few(rare)}"
        pairs = zip(self.classes, self.counts, strict=True)
        unseen = [name for name, (_, n) in pairs if not n]
        if unseen:
            yield f"no validation image: {few(unseen)}"


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
    sides = [min(size) for size in some_sizes(scan(path))]
    return int(np.median(sides)) if sides else 64


def some_sizes(names: FileNames) -> list[tuple[int, int]]:
    """Return (height, width) of up to 500 images, evenly spread; unreadable ones are left out."""
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


def files_counted(n: int) -> str:
    """Return "1 file" or "3 files"."""
    return "1 file" if n == 1 else f"{n:,} files"


def told(broken: dict[str, str]) -> str:
    """Return the first few broken files with what is wrong with them."""
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
