"""Batches made beside the loop: in order, bounded in memory, and never waited for in vain.

Worker processes are forked for one pass and end with it. Images are decoded straight into memory
that is shared with the workers; it is anonymous and made before the fork, so it has no name that
could be left behind. Each worker has a pipe of its own and shares no lock: one that is killed
blocks nobody, and its pipe closes, which is heard at once.
"""

from __future__ import annotations

import gc
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, SetupError
from .making import Elsewhere, Failure, Job, packed

_PREFETCH = 2
"""Batches that each worker may be ahead."""

_IDLE = -1
"""The mark of a worker that is at no item."""

_ENDING = (signal.SIGINT, signal.SIGTERM)


def can_fork() -> bool:
    """Whether this process may have worker processes; a worker itself may not."""
    return not multiprocessing.current_process().daemon


def made(job: Job, parts: Sequence[Tensor], n_workers: int, timeout: float) -> Iterable[Any]:
    """Make batches, beside the loop if there are workers, and give them in the order of `parts`.

    Args and errors are those of `in_processes`; with 0 workers, or within a worker, the batches
    are made in this process.
    """
    if not n_workers or not parts or not can_fork():
        return map(job.batch, range(len(parts)), parts)
    if sys.platform == "linux":  # elsewhere a fork may break what the system's libraries hold
        return in_processes(job, parts, n_workers, timeout)
    if job.in_place:
        return in_threads(job, parts, n_workers)
    raise SetupError(
        "Worker processes need a safe fork, which Linux alone has.",
        do="use workers=0, or torch's DataLoader.",
    )


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
        Elsewhere: a user's data set raised an error in a worker.
        SetupError: a worker cannot be started.
    """
    pool = _Pool(job, parts, min(n_workers, len(parts)), timeout)
    try:
        pool.start()
        for number in range(len(parts)):
            yield pool.batch(number)
    finally:
        try:
            pool.close()
        except BaseException:  # Ctrl-C as it was about to begin, or what it had kept waiting
            pool.close()
            raise


def in_threads(job: Job, parts: Sequence[Tensor], n_workers: int) -> Generator[Any]:
    """Make batches in threads, where processes cannot be forked, and give them in order."""
    numbers = iter(range(len(parts)))
    with ThreadPoolExecutor(n_workers) as pool:
        ahead = deque(
            pool.submit(job.batch, number, parts[number])
            for number in islice(numbers, n_workers * _PREFETCH)
        )
        try:
            while ahead:
                yield ahead.popleft().result()
                for number in islice(numbers, 1):
                    ahead.append(pool.submit(job.batch, number, parts[number]))
        finally:
            for future in ahead:
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
        self.n_tasks = 0
        try:
            with warnings.catch_warnings():  # of threads at the fork: the child touches none
                warnings.simplefilter("ignore", DeprecationWarning)
                self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            theirs.close()


class _Pool:
    """The workers of one pass, the memory they share, and what they are at."""

    def __init__(self, job: Job, parts: Sequence[Tensor], n_workers: int, timeout: float):
        self.job, self.parts, self.n_workers, self.timeout = job, parts, n_workers, timeout
        self.workers: list[_Worker] = []
        self.free = list(range(min(n_workers * _PREFETCH, len(parts))))
        self.slots: dict[int, int] = {}  # number of a batch -> its place in the shared memory
        self.answers: dict[int, tuple[int, bytes, list[slice]]] = {}  # -> its maker, what it is
        self.next, self.owner = 0, os.getpid()

    def start(self) -> None:
        """Begin the processes, after the memory that they share with this one."""
        try:
            self.marks = _shared((self.n_workers,), np.int64)  # the item that each worker is at
            self.marks[:] = _IDLE
            room = self.job.room(len(self.parts[0]))
            self.memory = _shared((len(self.free), *room), np.uint8)
            with _undisturbed():
                _check_room_for_files(3 * self.n_workers + 3)
                for index in range(self.n_workers):
                    self.workers.append(_Worker(self, index))
        except OSError as error:
            raise SetupError(
                f"The system does not let worker {len(self.workers)} of {self.n_workers} start.",
                saw=str(error),
                do="use fewer workers, or raise the limit: `ulimit -n` of open files, `ulimit -u` "
                "of processes, `ulimit -v` of memory.",
            ) from None

    def batch(self, number: int) -> Any:
        """Return a batch, numbers in turn, while the workers are ahead with the next ones."""
        self._hand_out()
        while number not in self.answers:
            self._listen()
            self._hand_out()
        slot, (index, content, filled) = self.slots.pop(number), self.answers.pop(number)
        where, memory = f"in worker {index} of {self.n_workers}", self.memory[slot]
        answer = pickle.loads(content, buffers=[memory[part].copy() for part in filled])
        self.free.append(slot)  # for the next task, which is not yet handed out
        if isinstance(answer, Failure):
            raise Elsewhere(answer.error(where))
        if not self.job.in_place:
            return answer
        images = torch.from_numpy(memory[: len(self.parts[number])]).clone()
        return self.job.finished(self.parts[number], images, answer, where)

    def _hand_out(self) -> None:
        while self.free and self.next < len(self.parts):
            worker = min(self.workers, key=lambda worker: worker.n_tasks)
            if worker.n_tasks == _PREFETCH:
                return
            self.slots[self.next] = self.free.pop()
            worker.n_tasks += 1
            try:
                worker.pipe.send_bytes(pickle.dumps((self.next, self.slots[self.next])))
            except OSError:
                raise self._dead(worker) from None
            self.next += 1

    def _listen(self) -> None:
        before = self.marks.copy()
        ready = wait([worker.pipe for worker in self.workers], self.timeout)
        for index, worker in enumerate(self.workers):
            if worker.pipe in ready:
                try:
                    content = worker.pipe.recv_bytes()
                except (EOFError, OSError):
                    raise self._dead(worker) from None
                number, answer, filled = pickle.loads(content)
                worker.n_tasks -= 1
                self.answers[number] = index, answer, filled
            elif not ready and worker.n_tasks and self.marks[index] == before[index]:
                raise self._hangs(worker) if worker.process.is_alive() else self._dead(worker)

    def _dead(self, worker: _Worker) -> DataError:
        worker.process.join(5)
        code, index = worker.process.exitcode, self.workers.index(worker)
        look = "look at that item with workers=0"
        if code is not None and code < 0:
            with suppress(ValueError):  # a signal without a name
                code = signal.Signals(-code).name
            how = f"it was killed by {code if isinstance(code, str) else f'signal {-code}'}"
        else:
            how = "it closed its pipe" if code is None else f"it ended itself with code {code}"
        if code == "SIGKILL":
            look = "most often the machine ran out of memory: use fewer workers or smaller batches"
        return DataError(
            f"Worker {index} of {self.n_workers} stopped in epoch {self.job.epoch}.",
            saw=f"{how}, {self._place(index)}",
            do=f"{look}.",
        )

    def _hangs(self, worker: _Worker) -> DataError:
        index = self.workers.index(worker)
        return DataError(
            f"Worker {index} of {self.n_workers} has not moved on for {self.timeout:g} seconds "
            f"in epoch {self.job.epoch}.",
            saw=f"it is {self._place(index)}",
            do="look at that item with workers=0, or give it more time: loader.timeout = 600.",
        )

    def _place(self, index: int) -> str:
        item = int(self.marks[index])
        return "between two batches" if item == _IDLE else f"at {self.job.named(item)}"

    def close(self) -> None:
        """End the processes; a pool inherited by another process is not its to end."""
        if os.getpid() != self.owner:
            return
        try:
            with _undisturbed():
                self._end()
        except BaseException:
            if self.workers:  # Ctrl-C came just before it was made to wait
                self.close()
            raise

    def _end(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()  # they hold nothing that would have to be put in order
        for worker in workers:
            worker.process.join(5)
            with suppress(ValueError):  # the system waits for a disk, say: it ends later
                worker.process.close()


def _serve(pool: _Pool, index: int, pipe: Connection, inherited: list[Connection]) -> None:
    """Work in a process of its own until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)  # it is the event loop's of the other process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    for other in inherited:  # else a pipe would stay open when the loop's process is killed
        other.close()
    gc.freeze()  # what was inherited is not ours to collect
    torch.set_num_threads(1)  # OpenMP's threads did not come along; it would wait for them

    try:
        while _asked(pipe, pool.owner):
            number, slot = pickle.loads(pipe.recv_bytes())
            answer = pickle.dumps((number, *_answer(pool, index, number, slot)))
            pool.marks[index] = _IDLE
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # what items print must not wait for an end by force
                    stream.flush()
            pipe.send_bytes(answer)
    except (EOFError, OSError):
        return


def _asked(pipe: Connection, parent: int) -> bool:
    """Wait for a task; False if there can be none any more."""
    while not pipe.poll(2):
        if os.getppid() != parent:
            return False
    return True


def _answer(pool: _Pool, index: int, number: int, slot: int) -> tuple[bytes, list[slice]]:
    items, mark = pool.parts[number], partial(pool.marks.__setitem__, index)
    try:
        if pool.job.in_place:
            return packed(pool.job.write(items, pool.memory[slot], mark))
        batch = pool.job.collate(number, items, mark)
        try:
            return packed(batch, pool.memory[slot])
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise DataError(
                f"Batch {pool.job.start + number} cannot be sent from a worker.",
                saw=f"{type(error).__name__}: {error}",
                do="define the types of its parts at the top of a module, or use workers=0.",
            ) from None
    except BaseException as error:
        if not isinstance(error, Exception):  # SystemExit, say: it would end this process alone
            item = pool.job.named(int(pool.marks[index]))
            error.add_note(f"raised by {item} of the data set, epoch {pool.job.epoch}")
        return packed(Failure(error))


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array, all 0, whose memory a forked process shares."""
    n = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, n * np.dtype(dtype).itemsize), dtype).reshape(shape)


def _check_room_for_files(n: int) -> None:
    """Raise OSError if `n` files cannot be opened; multiprocessing would lose some half-way."""
    opened = []
    try:
        for _ in range(n):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for file in opened:
            os.close(file)


@contextmanager
def _undisturbed() -> Generator[None]:
    """Let Ctrl-C and SIGTERM wait until the block is done: no process is begun and then forgotten.

    They are blocked in this thread, and so at first in a process that it forks. Another thread
    may take them all the same, and what Python then does it does in the main thread: so there the
    handlers are exchanged too.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    heard: list[int] = []
    with ExitStack() as stack:  # unwound from the bottom to the top, whatever any step raises
        stack.callback(lambda: signal.raise_signal(max(heard)) if heard else None)
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                if callable(handler):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, _: heard.append(number))
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        yield
