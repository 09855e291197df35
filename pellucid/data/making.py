"""Making one batch of a data set: the same wherever and in whatever order it is made."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from traceback import TracebackException
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import DataError, PellucidError
from ..snapshot import preserved_random_state
from ..tree import describe
from .images import ImageFiles, channels_first

Mark = Callable[[int], None]

_ROOM = 2**27
"""Bytes kept for a collated batch, 256 images of 128×128 in float32; memory only once used."""


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

    def room(self, n_items: int) -> tuple[int, ...]:
        """Return the shape of the bytes that a batch may fill."""
        return (n_items, *self.dataset.shape) if self.in_place else (_ROOM,)

    def batch(self, number: int, items: Tensor) -> Any:
        """Make a batch in this process, and leave the global random state as it was."""
        if self.in_place:
            images = torch.empty(self.room(len(items)), dtype=torch.uint8)
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
            except StopIteration as error:  # would end the pass as if nothing more were to come
                raise DataError(
                    f"Item {item} of the data set came to the end of an iterator.",
                    saw=f"StopIteration in epoch {self.epoch}",
                    do="an item must not depend on how many were taken before: let it be computed "
                    "from its number.",
                ) from error
            except Exception as error:
                error.add_note(f"raised by item {item} of the data set, epoch {self.epoch}")
                raise
        try:
            return default_collate(found)
        except Exception as error:
            error.add_note(self._put_together(items.tolist(), found))
            raise

    def _put_together(self, items: list[int], found: list[Any]) -> str:
        """Say which items a batch was to be made of, and how they differ."""
        kinds: dict[str, int] = {}
        for item, content in zip(items, found, strict=True):
            kinds.setdefault(describe(content), item)
        several = [f"item {item} is {kind}" for kind, item in kinds.items()]
        return (
            f"raised in making one batch of {len(items)} items of the data set, "
            f"epoch {self.epoch}: {', '.join(several[:4])}{', ...' * (len(several) > 4)}"
        )

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


def without_our_frames(error: BaseException) -> TracebackType | None:
    """Return the part of an error's traceback that begins in a user's data set.

    If none does: None for an error that we meant, whose text says all, else the whole.
    """
    ours = str(Path(__file__).parent)
    inner = error.__traceback__
    while inner is not None and str(Path(inner.tb_frame.f_code.co_filename).parent) == ours:
        inner = inner.tb_next
    return inner if inner or isinstance(error, PellucidError) else error.__traceback__


# ── what travels from a worker process ──────────────────────────────────────────────────────────


class Elsewhere(Exception):
    """Carries an error from a worker process, for its catcher to raise.

    Args:
        error: a user's, as far as it can travel; its notes say what happened where.
    """

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


class Failure:
    """An exception on its way from a worker, if it can travel, else what it said."""

    def __init__(self, error: BaseException):
        notes, error.__notes__ = getattr(error, "__notes__", []), []
        error.__traceback__ = without_our_frames(error)
        told = TracebackException.from_exception(error)
        last = list(told.format_exception_only())
        self.message = "".join(last).rstrip()
        trace = list(told.format())[: -len(last)]  # the last line is told with the error itself
        if told.__cause__ and not error.__traceback__:
            trace = list(told.__cause__.format())
        self.trace = "".join(trace).rstrip()
        self.notes, self.packed = notes, _travelling(error)

    def error(self, where: str) -> Exception:
        """Return the exception, with notes of the place and of the traceback over there."""
        try:
            if self.packed is None:
                raise TypeError("it cannot travel")
            error = pickle.loads(self.packed)
        except Exception:  # also when what was imported over there cannot be here
            error = DataError(
                f"A worker raised {self.message}",
                do="with workers=0 it comes as it is: this one cannot be sent between processes.",
            )
        if self.notes:
            where = f"{self.notes.pop()}, {where}"
        trace = f"; the traceback there:\n{self.trace}" if self.trace else ""
        error.__notes__ = [*self.notes, where + trace]
        return error


def _travelling(error: BaseException) -> bytes | None:
    """Return an exception as bytes; None if it would not arrive as what it is."""
    try:
        packed = pickle.dumps(error)
        arrives = isinstance(error, Exception) and type(pickle.loads(packed)) is type(error)
    except Exception:  # an odd constructor, or something in it that does not pickle
        return None
    return packed if arrives else None


class _Pickler(pickle.Pickler):
    """Sends tensors as numpy arrays: faster than torch's way, and without files or descriptors."""

    def reducer_override(self, found: Any) -> Any:
        if type(found) is Tensor:
            with suppress(TypeError, RuntimeError):  # bfloat16, sparse, requires a gradient
                return torch.from_numpy, (found.numpy(),)
        return NotImplemented


def packed(content: Any, room: np.ndarray | None = None) -> tuple[bytes, list[slice]]:
    """Return what a worker made as bytes, and which parts of `room` (bytes) it filled.

    Large arrays go there, as many as it takes.
    """
    filled: list[slice] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = np.frombuffer(buffer.raw(), np.uint8)
        begin = -(-filled[-1].stop // 64) * 64 if filled else 0
        if room is None or len(raw) < 4096 or begin + len(raw) > len(room):
            return True
        filled.append(slice(begin, begin + len(raw)))
        room[filled[-1]] = raw
        return False

    stream = BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=stays).dump(content)
    return stream.getvalue(), filled
