"""Batches made beside the loop: in order, bounded in memory, and never waited for in vain.

Worker processes are forked for one pass and end with it. Images are decoded straight into memory
that is shared with the workers; it is anonymous and made before the fork, so it has no name that
could be left behind. Each worker has a pipe of its own and shares no lock: one that is killed
blocks nobody, and its pipe closes, which is heard at once.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..tree import map_leaves
from .making import Job

_PREFETCH = 2
"""Batches that each worker may be ahead."""


def in_processes(
    job: Job, parts: Sequence[Tensor], n_workers: int, timeout: float
) -> Generator[Any]:
    """Make batches in worker processes, and give them in the order of `parts`.

    However the generator ends, the processes end with it.

    Args:
        job: makes the batches.
        parts: the items of each batch.
        n_workers: processes, 1 or more.
        timeout: seconds that a worker may spend on one item.

    Raises:
        DataError: a worker was killed, or hangs; it is said which, and over which item.
    """
    pool = _Pool(job, parts, n_workers, timeout)
    try:
        pool.start()
        for number in range(len(parts)):
            yield pool.batch(number)
    finally:
        pool.close()


def in_threads(job: Job, parts: Sequence[Tensor], n_workers: int) -> Generator[Any]:
    """Make batches in threads, where processes cannot be forked, and give them in order."""
    numbers = iter(range(len(parts)))
    with ThreadPoolExecutor(n_workers) as pool:
        futures = deque(
            pool.submit(job.batch, number, parts[number])
            for number, _ in zip(numbers, range(n_workers * _PREFETCH), strict=False)
        )
        try:
            while futures:
                yield futures.popleft().result()
                futures.extend(
                    pool.submit(job.batch, number, parts[number])
                    for number, _ in zip(numbers, range(1), strict=False)
                )
        finally:
            for future in futures:
                future.cancel()


class _Worker:
    """One process, seen from the loop's side."""

    def __init__(self, pool: _Pool, index: int):
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        inherited = [worker.pipe for worker in pool.workers] + [self.pipe]
        self.process = fork.Process(
            target=_serve, args=(pool, index, theirs, inherited), daemon=True
        )
        with warnings.catch_warnings():  # of threads at the fork: the child touches none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.n_tasks = 0

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class _Pool:
    """The workers of one pass, the memory they share, and what they are at."""

    def __init__(self, job: Job, parts: Sequence[Tensor], n_workers: int, timeout: float):
        self.job, self.parts, self.n_workers, self.timeout = job, parts, n_workers, timeout
        self.workers: list[_Worker] = []
        self.free = list(range(min(n_workers * _PREFETCH, len(parts))))
        self.slots: dict[int, int] = {}  # number of a batch -> its place in the shared memory
        self.answers: dict[int, Any] = {}
        self.marks = _shared((n_workers,), np.int64)  # the item that each worker is at
        self.memory = _shared((len(self.free), len(parts[0]), *job.shape), np.uint8)
        self.next, self.owner = 0, os.getpid()

    def start(self) -> None:
        with _deaf():
            for index in range(self.n_workers):
                self.workers.append(_Worker(self, index))

    def batch(self, number: int) -> Any:
        """Return a batch, numbers in turn, while the workers are ahead with the next ones."""
        self._hand_out()
        while number not in self.answers:
            self._listen()
            self._hand_out()
        slot, (index, answer) = self.slots.pop(number), self.answers.pop(number)
        where = f"in worker {index} of {self.n_workers}"
        if isinstance(answer, _Failure):
            raise answer.error(where)
        if self.job.in_place:
            items = self.parts[number]
            images = torch.from_numpy(self.memory[slot, : len(items)]).clone()
            self.free.append(slot)
            return self.job.finished(items, images, answer, where)
        self.free.append(slot)
        return _unpacked(answer)

    def _hand_out(self) -> None:
        while self.free and self.next < len(self.parts):
            worker = min(self.workers, key=lambda worker: worker.n_tasks)
            if worker.n_tasks == _PREFETCH:
                return
            self.slots[self.next] = self.free.pop()
            worker.n_tasks += 1
            try:
                worker.pipe.send((self.next, self.slots[self.next]))
            except OSError:
                raise self._dead(worker) from None
            self.next += 1

    def _listen(self) -> None:
        before = self.marks.copy()
        ready = wait([worker.pipe for worker in self.workers], self.timeout)
        for index, worker in enumerate(self.workers):
            if worker.pipe in ready:
                try:
                    number, answer = worker.pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    raise self._dead(worker) from None
                worker.n_tasks -= 1
                self.answers[number] = index, answer
            elif not ready and worker.n_tasks and self.marks[index] == before[index]:
                raise self._hangs(index)

    def _dead(self, worker: _Worker) -> DataError:
        worker.process.join(5)
        code, index = worker.process.exitcode or 0, self.workers.index(worker)
        how = (
            f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
        )
        return DataError(
            f"Worker {index} of {self.n_workers} stopped in epoch {self.job.epoch}.",
            saw=f"{how}, at {self._place(index)}",
            do="SIGKILL often means that the machine had no memory left: fewer workers or smaller "
            "batches; after another signal, look at that item with workers=0.",
        )

    def _hangs(self, index: int) -> DataError:
        return DataError(
            f"Worker {index} of {self.n_workers} has not moved on for {self.timeout:g} seconds "
            f"in epoch {self.job.epoch}.",
            saw=f"it is at {self._place(index)}",
            do="look at that item with workers=0, or give it more time: loader.timeout = 600.",
        )

    def _place(self, index: int) -> str:
        item = int(self.marks[index])
        return "its start" if item < 0 else self.job.named(item)

    def close(self) -> None:
        """End the processes; a pool inherited by another process is not its to end."""
        if os.getpid() == self.owner:
            with _deaf():
                while self.workers:
                    self.workers.pop().close()


class _Failure:
    """An exception on its way from a worker, if it can travel, else what it said."""

    def __init__(self, error: Exception):
        self.text = "".join(traceback.format_exception(error)).rstrip()
        self.name, self.message = type(error).__name__, str(error)
        try:
            self.packed: bytes | None = pickle.dumps(error)
            pickle.loads(self.packed)
        except Exception:
            self.packed = None  # an odd constructor, or something in it that does not pickle

    def error(self, where: str) -> Exception:
        """Return the exception, with a note of the place and of the traceback over there."""
        if self.packed is None:
            error: Exception = DataError(f"{self.name}: {self.message}")
        else:
            error = pickle.loads(self.packed)
        error.add_note(f"{where}; its traceback there:\n{self.text}")
        return error


def _serve(pool: _Pool, index: int, pipe: Connection, inherited: list[Connection]) -> None:
    """Work in a process of its own until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for other in inherited:  # else a pipe would stay open when the loop's process is killed
        other.close()
    gc.freeze()  # what was inherited is not ours to collect
    torch.set_num_threads(1)

    def mark(item: int) -> None:
        pool.marks[index] = item

    mark(-1)
    try:
        while _asked(pipe, pool.owner):
            number, slot = pipe.recv()
            pipe.send((number, _answer(pool, number, slot, mark)))
    except (EOFError, OSError):
        return


def _asked(pipe: Connection, parent: int) -> bool:
    """Wait for a task; False if there can be none any more."""
    while not pipe.poll(2):
        if os.getppid() != parent:
            return False
    return True


def _answer(pool: _Pool, number: int, slot: int, mark: Any) -> Any:
    items = pool.parts[number]
    try:
        if pool.job.in_place:
            return pool.job.write(items, pool.memory[slot], mark)
        return _packed(pool.job.collate(number, items, mark))
    except Exception as error:
        return _Failure(error)


def _packed(batch: Any) -> Any:
    """Return a batch with numpy arrays for tensors, which travel faster."""

    def pack(leaf: Any) -> Any:
        plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided
        return leaf.numpy() if plain and leaf.dtype != torch.bfloat16 else leaf

    return map_leaves(pack, batch)


def _unpacked(batch: Any) -> Any:
    return map_leaves(
        lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, batch
    )


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array whose memory a forked process shares."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), dtype, int(np.prod(shape))).reshape(shape)


@contextmanager
def _deaf() -> Generator[None]:
    """Let Ctrl-C wait until the block is done: no process is begun and then forgotten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
