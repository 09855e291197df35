"""A folder of images as data: its files found, split, labelled, checked, and kept."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, SetupError, UnknownName, did_you_mean
from ..randomness import checked_seed
from .bar import bar
from .decoded import DecodedImages, decode_all, decode_to_disk, decode_to_memory
from .files import FileNames, no_files, printable, scan
from .folder_report import ASIDE, FolderReport, files_counted, some_sizes, told
from .images import ImageFiles
from .labels import encode, label_files, read_labels, vocabulary
from .splits import Split, split_at_random, split_by_folder, split_by_list

CACHES = ("auto", "memory", "disk", None)
POLICIES = ("raise", "skip", "set-aside")
_VALID = ("valid", "val", "validation", "test")

Labels = str | re.Pattern[str] | Callable[[str], str] | Mapping[str, str] | os.PathLike[str]
Splitting = str | float | Callable[[Sequence[str]], Split] | Iterable[str]
Images = ImageFiles | DecodedImages


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
    _check(path, cache, bad)
    seed = checked_seed(seed)
    names = scan(Path(path).expanduser())
    if not len(names):
        raise no_files(names)
    parts, how = _split(names, split, seed)
    used: np.ndarray = np.sort(np.concatenate(parts))
    found = [_labels(names[part], labels) for part in parts]
    classes = vocabulary(found[0])
    numbers = np.empty(len(names), np.int64)
    for part, texts in zip(parts, found, strict=True):
        numbers[part] = encode(texts, classes, names[part])
    files = ImageFiles(names[used], numbers[used], size)
    pixels, broken = _decoded(files, cache, bad, workers)
    # numbers of the whole files of each part, among those used
    whole = [np.setdiff1d(np.searchsorted(used, part), list(broken)) for part in parts]
    if not len(whole[0]):
        raise DataError("No training image can be read.", saw=told(_named(files, broken)))
    counts = [np.bincount(files.labels[part], minlength=len(classes)).tolist() for part in whole]
    report = FolderReport(
        names.root,
        classes,
        list(zip(*counts, strict=True)),
        len(names) - len(used),
        some_sizes(names),
        _named(files, broken),
        bad == "set-aside",
        how,
    )
    if pixels is None:
        train, valid = (files.subset(part) for part in whole)
    else:
        items = map(torch.from_numpy, whole)
        train, valid = (DecodedImages(pixels, files.labels, part) for part in items)
    return train, valid, report


def _check(path: Any, cache: Any, bad: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise SetupError("The folder must be given as a path.", saw=repr(path))
    if cache not in CACHES:
        do = "choose one of 'auto', 'memory', 'disk', None."
        raise UnknownName(f"There is no cache {cache!r}.", do=do)
    if bad not in POLICIES:
        what = f"Broken files cannot be treated by {bad!r}."
        raise UnknownName(what, do=did_you_mean(str(bad), POLICIES))


# ── which files, and what they are ──────────────────────────────────────────────────────────────


def _split(names: FileNames, split: Splitting, seed: int) -> tuple[Split, str]:
    """Return the two parts, and how they came about."""
    if isinstance(split, str) and split in ("auto", "folder"):
        tops = {top.casefold(): top for top in {name.partition("/")[0] for name in names}}
        valid = [tops[word] for word in _VALID if word in tops]
        if split == "folder" or ("train" in tops and valid):
            parts = split_by_folder(names, tops.get("train", "train"), valid or _VALID)
            top = names[int(parts[1][0])].partition("/")[0]
            return parts, f"by the folders {tops['train']} and {printable(top)}"
        split = 0.2
    if isinstance(split, (int, float)) and not isinstance(split, bool):
        return split_at_random(names, split, seed), f"{split:.0%} at random for validation"
    if isinstance(split, str) and not Path(split).exists():
        raise UnknownName(
            f"There is no split {split!r}, and no file of that name.",
            do="say 'auto', 'folder' or a fraction such as 0.2, or give the names of the "
            "validation files, or a text file of them.",
        )
    if isinstance(split, (str, os.PathLike, Iterable)):
        return split_by_list(names, split), "validation by a list"
    if not callable(split):
        raise SetupError(
            "The split must be 'auto', 'folder', a fraction, a list of files, or a function.",
            saw=repr(split),
        )
    train, valid = split(names)
    parts = _checked(train, names, "training"), _checked(valid, names, "validation")
    if len(both := np.intersect1d(*parts)):
        raise DataError(
            "The split puts files into both parts.",
            saw=f"{len(both):,} such, the first {printable(names[int(both[0])])}",
        )
    return parts, "by function"


def _checked(part: Any, names: FileNames, what: str) -> np.ndarray:
    """Return what a user's function gave as indices into `names`, ascending."""
    items = np.asarray(part)
    if items.dtype == bool and items.shape == (len(names),):
        items = np.flatnonzero(items)
    fits = items.ndim == 1 and items.size and np.issubdtype(items.dtype, np.integer)
    fits = fits and items.min() >= 0 and items.max() < len(names)
    if not fits or len(np.unique(items)) != len(items):
        raise DataError(
            f"The split's {what} part must be numbers of files, each once, or a mask of them all.",
            saw=f"{items.dtype} {items.shape} of {len(names):,} files",
        )
    return np.sort(items).astype(np.int64)


def _labels(names: FileNames, labels: Labels) -> list[str]:
    if isinstance(labels, os.PathLike) or (isinstance(labels, str) and labels.endswith(".csv")):
        return label_files(names, read_labels(labels))
    return label_files(names, labels)


# ── decoding what is kept, and what becomes of broken files ─────────────────────────────────────


def _decoded(
    files: ImageFiles, cache: str | None, bad: str, workers: int
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Decode what is to be kept; return it, and the broken images by number."""
    if cache == "auto":
        n_bytes = len(files) * int(np.prod(files.shape))
        cache = "memory" if n_bytes <= _affordable() else None
    if cache is None and bad == "raise":
        return None, {}  # told when they are met
    pixels: np.ndarray | None = None
    with bar("decoding", len(files)) as advance:
        if cache is None:
            broken = decode_all(files, workers, advance)
        elif cache == "memory":
            pixels, broken = decode_to_memory(files, workers, advance)
        else:
            pixels, broken = decode_to_disk(files, workers, advance)
    named = _named(files, broken)
    if broken and bad == "raise":
        raise DataError(
            f"{files_counted(len(broken))} under {printable(files.names.root)} cannot be read as "
            "images.",
            saw=told(named),
            do=f'mend or remove them; or bad="skip" leaves them out, bad="set-aside" moves them '
            f"into the hidden folder {ASIDE}.",
        )
    if broken and bad == "set-aside":
        _set_aside(Path(files.names.root), named)
    return pixels, broken


def _named(files: ImageFiles, broken: dict[int, str]) -> dict[str, str]:
    return {files.names[item]: reason for item, reason in sorted(broken.items())}


def _set_aside(root: Path, broken: dict[str, str]) -> None:
    """Move files into a hidden folder of the data set, with a table of reasons.

    What is reached through a link out of the data set stays where it is.
    """
    table = root / ASIDE / "reasons.csv"
    try:
        table.parent.mkdir(exist_ok=True)
        fresh = not table.exists()
        with table.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerows([["file", "reason"]] if fresh else [])
            for name, reason in broken.items():
                if (root / name).parent.resolve() == root.resolve() / Path(name).parent:
                    _move(root / name, root / ASIDE / name)
                    rows.writerow([name, reason])
    except OSError as error:
        raise DataError(
            f"The broken files under {printable(root)} cannot be set aside.",
            saw=str(error),
            do='make the folder writable, or leave them out: bad="skip".',
        ) from error


def _move(file: Path, place: Path) -> None:
    """Move a file, and overwrite none that was moved before."""
    place.parent.mkdir(parents=True, exist_ok=True)
    taken = 0
    while place.exists():
        taken += 1
        place = place.with_name(f"{file.stem}-{taken}{file.suffix}")
    file.rename(place)


def _affordable() -> int:
    """Return how many bytes of images may be kept in memory unasked: an eighth of it."""
    limits = [2**33]
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container
    except (AttributeError, ValueError, OSError):
        pass  # not on this system, or no limit
    return min(limits) // 8
