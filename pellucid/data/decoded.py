"""Images decoded once and kept as bytes, in memory or in a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .datasets import ArrayDataset
from .fetch import cache_folder
from .images import ImageFiles, channels_first, engine
from .making import Job
from .workers import in_processes

_BATCH = 256
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

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        image, label = self._all[item if self._items is None else int(self._items[item])]
        return channels_first(image), label

    def __len__(self) -> int:
        return len(self._all if self._items is None else self._items)

    def __repr__(self) -> str:
        height, width = self._all.arrays[0].shape[1:3]
        return f"DecodedImages({len(self):,} of {height}×{width})"


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
    batches: Iterable = (
        in_processes(job, parts, workers, timeout=60)
        if workers
        else map(job.batch, range(len(parts)), parts)
    )
    for items, (images, _) in zip(parts, batches, strict=True):
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
    decoded. It appears under its name only when it is whole; of two processes one makes it.
    """
    from filelock import FileLock

    folder = cache_folder() / "decoded"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(files)}.npy"
    told = path.with_suffix(".json")
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            bad = _write(files, workers, advance, path)
            told.write_text(json.dumps(sorted(bad.items())))
            path.with_suffix(".part").replace(path)
        bad = {int(item): reason for item, reason in json.loads(told.read_text())}
    # copy on write: torch wants memory that it might write, and the file must never change
    return np.load(path, mmap_mode="c"), bad


def _write(
    files: ImageFiles, workers: int, advance: Callable[[int], None], path: Path
) -> dict[int, str]:
    part = path.with_suffix(".part")
    try:
        shape = (len(files), *files.shape)
        images = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        bad = decode_all(files, workers, advance, images)
        images.flush()
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return bad


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
