"""Images decoded once and kept as bytes, in memory or in a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .datasets import ArrayDataset
from .fetch import cache_folder
from .images import ImageFiles, channels_first, engine
from .making import Job
from .workers import made

_BATCH, _TIMEOUT = 256, 60.0
_FORM = 1  # of what is kept on disk; another number makes old files unknown


class DecodedImages:
    """Images in memory, uint8 (n, h, w, 3), and their labels (n); batches are gathered by index.

    A batch is (uint8 (b, 3, h, w), labels), the images channels last in memory, as they lie here.

    Args:
        images: in memory, or mapped into it.
        labels: class numbers.
        items: which of them make up the data set, int64; None: all.
    """

    def __init__(self, images: Tensor | np.ndarray, labels: Tensor, items: Tensor | None = None):
        self._all, self._items = ArrayDataset(images, labels), items

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the items in an order, `size` at a time."""
        order = order if self._items is None else self._items[order]
        for images, labels in self._all.batches(order, size):
            yield channels_first(images), labels

    def to(self, device: str | torch.device) -> DecodedImages:
        """Return the data set on a device, its own items alone; see `ArrayDataset.to`."""
        if self._all.arrays[0].device == torch.device(device):
            return self
        own = self._all if self._items is None else ArrayDataset(*self._all[self._items])
        return DecodedImages(*own.to(device).arrays)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        image, label = self._all[item if self._items is None else int(self._items[item])]
        return channels_first(image), label

    def __len__(self) -> int:
        return len(self._all if self._items is None else self._items)

    def __repr__(self) -> str:
        images = self._all.arrays[0]
        height, width = images.shape[1:3]
        away = "" if images.is_cpu else f", {self._all.nbytes / 1e6:,.1f} MB on {images.device}"
        return f"DecodedImages({len(self):,} of {height}×{width}{away})"


def decode_all(
    files: ImageFiles, workers: int, advance: Callable[[int], None], out: np.ndarray | None = None
) -> dict[int, str]:
    """Decode every image into `out`, uint8 (n, h, w, 3), or only to see which ones are broken.

    Args:
        files: the images.
        workers: processes; 0 decodes in this one.
        advance: told after each batch how many images it had.
        out: where they go; None keeps nothing.

    Returns:
        The numbers of the broken images, which stay black, and what is wrong with each.
    """
    bad: dict[int, str] = {}
    job = Job(files, seed=0, epoch=0, on_bad=bad.__setitem__)
    parts = torch.arange(len(files)).split(_BATCH)
    for items, (images, _) in zip(parts, made(job, parts, workers, _TIMEOUT), strict=True):
        if out is not None:
            out[items[0] : items[-1] + 1] = images.permute(0, 2, 3, 1).numpy()
        advance(len(items))
    return bad


def decode_to_memory(
    files: ImageFiles, workers: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode every image into an array; return it, and which ones are broken."""
    images = np.empty((len(files), *files.shape), np.uint8)
    return images, decode_all(files, workers, advance, images)


def decode_to_disk(
    files: ImageFiles, workers: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode every image into a file in the cache, unless it is there, and map it into memory.

    The file is known by the names, sizes and times of change of all images and by how they are
    decoded. It appears under its name only when it is whole; of two processes one makes it. To
    have room again, remove the folder `decoded` in the cache.

    Raises:
        DataError: it cannot be written.
    """
    from filelock import FileLock

    path = cache_folder() / "decoded" / f"{_key(files)}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            return _read(path, files) or _write(path, files, workers, advance)
    except OSError as error:
        raise DataError(
            f"The decoded images cannot be kept in {path.parent}.",
            saw=error.strerror or str(error),
            do='make room there, set PELLUCID_HOME to another folder, or use cache="memory".',
        ) from error


def _read(path: Path, files: ImageFiles) -> tuple[np.ndarray, dict[int, str]] | None:
    """Return what was kept; None if there is nothing, or nothing that can be used."""
    try:
        bad = json.loads(path.with_suffix(".json").read_text())
        # copy on write: torch wants memory that it might write, and the file must never change
        images = np.load(path, mmap_mode="c")
    except (OSError, ValueError):
        return None
    if images.shape != (len(files), *files.shape):
        return None
    return images, {int(item): reason for item, reason in bad}


def _write(
    path: Path, files: ImageFiles, workers: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[int, str]]:
    part, shape = path.with_suffix(".part"), (len(files), *files.shape)
    try:
        with part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, _header(shape))
            start = file.tell()
            _reserve(file, start + int(np.prod(shape)))
        images = np.memmap(part, np.uint8, "r+", start, shape)
        bad = decode_all(files, workers, advance, images)
        images.flush()
        path.with_suffix(".json").write_text(json.dumps(sorted(bad.items())))
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return np.load(path, mmap_mode="c"), bad


def _header(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"descr": "|u1", "fortran_order": False, "shape": shape}


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room on disk now: where a mapped file finds none, the process is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _key(files: ImageFiles) -> str:
    """Return 40 digits that change when a file, its place or the way of decoding does."""
    found = hashlib.sha256(f"{_FORM} {files.shape} {files.fit} {engine()}".encode())
    for item, name in enumerate(files.names):
        try:
            stat = Path(files.names.path(item)).stat()
            found.update(os.fsencode(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
        except OSError:  # decoding will say what is wrong with it
            found.update(os.fsencode(f"{name}\0gone\0"))
    found.update(files.names.root.encode(errors="surrogateescape"))
    return found.hexdigest()[:40]
