"""Making one batch of a data set: the same wherever and in whatever order it is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..snapshot import preserved_random_state
from .images import ImageFiles, channels_first

Mark = Callable[[int], None]


def _unmarked(item: int) -> None: ...


@dataclass(frozen=True)
class Job:
    """Makes the batches of one epoch.

    Args:
        dataset: images in files, or anything with `[i]`.
        seed: of the loader.
        epoch: number of the pass.
        start: number of the epoch's batch that is number 0 here.
        on_bad: told the number of each broken image, and why; it stays black. Without it the
            first one is raised.
    """

    dataset: Any
    seed: int
    epoch: int
    start: int = 0
    on_bad: Callable[[int, str], None] | None = None

    @property
    def in_place(self) -> bool:
        """Whether items are written into given memory."""
        return isinstance(self.dataset, ImageFiles)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an item that is written in place; (0,) for others."""
        return self.dataset.shape if self.in_place else (0,)

    def batch(self, number: int, items: Tensor) -> Any:
        """Make a batch in this process, and leave the global random state as it was."""
        if self.in_place:
            images = torch.empty((len(items), *self.shape), dtype=torch.uint8)
            return self.finished(items, images, self.write(items, images.numpy()))
        with preserved_random_state():
            return self.collate(number, items)

    def write(
        self, items: Tensor, out: np.ndarray, mark: Mark = _unmarked
    ) -> list[tuple[int, str]]:
        """Decode images into `out`; return the numbers of those that are broken, and why."""
        bad = []
        for item, place in zip(items.tolist(), out, strict=False):
            mark(item)
            if reason := self.dataset.read(item, place):
                bad.append((item, reason))
        return bad

    def finished(
        self, items: Tensor, images: Tensor, bad: list[tuple[int, str]], where: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, h, w) with their labels, or raise over the first broken one."""
        for item, reason in bad:
            if self.on_bad:
                self.on_bad(item, reason)
                continue
            error = self.dataset.refusal(item, reason)
            error.add_note(
                f"item {item} of the data set, epoch {self.epoch}{where and f', {where}'}"
            )
            raise error
        return channels_first(images), self.dataset.labels[items]

    def collate(self, number: int, items: Tensor, mark: Mark = _unmarked) -> Any:
        """Take the items one by one and collate them as torch's DataLoader does.

        What they draw from Python's, numpy's and torch's generators depends on (seed, epoch,
        number of the batch) alone.
        """
        self._seed(self.start + number)
        found = []
        for item in items.tolist():
            mark(item)
            try:
                found.append(self.dataset[item])
            except Exception as error:
                error.add_note(f"raised by item {item} of the data set, epoch {self.epoch}")
                raise
        return default_collate(found)

    def _seed(self, number: int) -> None:
        # the last word of the counter keeps clear of the words that order the items
        key = [self.seed & 2**64 - 1, self.epoch & 2**64 - 1]
        philox = np.random.Philox(key=np.array(key, np.uint64), counter=[number, 0, 0, 1])
        words = philox.random_raw(3).tolist()
        random.seed(words[0])
        np.random.seed(words[1] & 2**32 - 1)
        torch.default_generator.manual_seed(words[2] >> 1)

    def named(self, item: int) -> str:
        """Name an item for a message: its number, and its file."""
        return f"item {item}" + (f", {self.dataset.names.path(item)}" if self.in_place else "")


def without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins in a user's data set; all of it if none does."""
    ours = str(Path(__file__).parent)
    inner = trace
    while inner is not None and str(Path(inner.tb_frame.f_code.co_filename).parent) == ours:
        inner = inner.tb_next
    return inner or trace
