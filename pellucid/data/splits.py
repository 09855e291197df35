"""Which files are for training and which for validation: by folder, at random, by a list.

All are plain functions of names: relative to the data set's folder, "/" between the parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from ..errors import DataError, SetupError
from .files import few, nearest, no_files, open_text

_MASK = 2**64 - 1

Split = tuple[np.ndarray, np.ndarray]


def split_by_folder(
    names: Sequence[str],
    train: str = "train",
    valid: str | Sequence[str] = ("valid", "val", "validation", "test"),
) -> Split:
    """Split files by the top folder they lie in.

    Files in neither folder are in neither part: `len(names)` less both lengths says how many.

    Args:
        names: relative names.
        train: the folder of the training files.
        valid: the folder of the validation files; of several, the first that has files.

    Returns:
        Indices into `names` of the training and of the validation files, int64, ascending.

    Raises:
        DataError: a part would be empty; the folders that there are are told.
    """
    wanted = [valid] if isinstance(valid, str) else list(valid)
    if train in wanted:
        raise SetupError(f"The folder {train!r} cannot be both for training and for validation.")
    if not len(names):
        raise no_files(names)
    numbers: dict[str, int] = {}  # of the top folders, in the order they are met
    tops = (name.partition("/")[0] if "/" in name else "." for name in names)
    found = np.fromiter((numbers.setdefault(top, len(numbers)) for top in tops), int, len(names))
    parts = []
    for part, words, folders in (("train", "training", [train]), ("valid", "validation", wanted)):
        chosen = next((numbers[folder] for folder in folders if folder in numbers), None)
        if chosen is None:
            counts = zip(numbers, np.bincount(found), strict=True)
            raise DataError(
                f"There are no {words} files in {' or '.join(map(repr, folders))}.",
                saw=f"top folders: {few([f'{top} ({n:,} files)' for top, n in sorted(counts)])}",
                do=f"name the folder, {part}=...; or split at random.",
            )
        parts.append(np.flatnonzero(found == chosen))
    return parts[0], parts[1]


def split_at_random(names: Sequence[str], fraction: float = 0.2, seed: int = 0) -> Split:
    """Split files at random, but always the same way.

    Where a file goes depends on the seed and its own name alone: files that come or go never move
    another, a name that is listed twice is in one part, and a larger fraction only adds to the
    validation files. So the fraction is met on average: of 10,000 files to about ±1 %.

    Args:
        names: relative names.
        fraction: for validation, above 0 and below 1.
        seed: any integer; its lowest 64 bits count.

    Returns:
        Indices into `names` of the training and of the validation files, int64, ascending.

    Raises:
        DataError: a part would be empty.
        SetupError: the fraction is out of range.
    """
    if not 0 < fraction < 1:
        raise SetupError(f"fraction={fraction} must lie above 0 and below 1.")
    key, limit = (seed & _MASK).to_bytes(8, "little"), int(fraction * 2**64)
    digests = (blake2b(os.fsencode(name), digest_size=8, key=key).digest() for name in names)
    chosen = (int.from_bytes(digest, "little") < limit for digest in digests)
    do = "take another fraction or seed; few files are better split by a list."
    return _parts(names, np.fromiter(chosen, bool, len(names)), do)


def split_by_list(names: Sequence[str], valid: str | os.PathLike[str] | Iterable[str]) -> Split:
    """Split files by a list of those for validation; all others are for training.

    Args:
        names: relative names.
        valid: names; or the path of a text file in UTF-8 with one name a line.

    Returns:
        Indices into `names` of the training and of the validation files, int64, ascending.

    Raises:
        DataNotFound: there is no such text file.
        DataError: a name is not among `names` (the nearest is told), or a part would be empty.
    """
    if isinstance(valid, (str, os.PathLike)):
        with open_text(valid) as file:
            valid = [line.rstrip("\r\n") for line in file if line.strip()]
    listed = dict.fromkeys(valid)
    left = set(listed).difference(names)
    unknown = [name for name in listed if name in left]
    if unknown:
        raise DataError(
            f"The file {unknown[0]!r} of the list for validation is not in the data set.",
            saw=f"{len(unknown):,} such of {len(listed):,} listed; {len(names):,} files",
            do=_nearest_file(unknown[0], names),
        )
    chosen = np.fromiter((name in listed for name in names), bool, len(names))
    return _parts(names, chosen, "list some files, but not all.")


def _nearest_file(name: str, names: Sequence[str]) -> str:
    """Advise on a file's name; comparing letters with a million others would take half a minute."""
    last = name.rpartition("/")[2]
    same = next((other for other in names if other.rpartition("/")[2] == last), None)
    if same is not None:
        return f"did you mean {same!r}?"
    return nearest(name, list(islice(names, 10_000)))


def _parts(names: Sequence[str], chosen: np.ndarray, do: str) -> Split:
    train, valid = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if not len(names):
        raise no_files(names)
    if not len(train) or not len(valid):
        raise DataError(
            f"No file is left for {'validation' if len(train) else 'training'}.",
            saw=f"{len(train):,} files to train on, {len(valid):,} to validate",
            do=do,
        )
    return train, valid
