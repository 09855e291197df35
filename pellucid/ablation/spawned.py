"""Calls in fresh processes beside this one: results as they come, nothing left on any way out.

The processes are spawned, not forked: they share nothing with this one, may use a GPU, and know a
function by its name only. Each has a pipe of its own, so that one that dies blocks nobody. They end
when this process ends, also if it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import PellucidError, SetupError

_READY = "ready"

_PATIENCE = 5.0
"""Seconds a process has to end when asked to, before it is killed."""


@dataclass(frozen=True)
class Died:
    """What comes of a call whose process ended in the midst of it.

    Attributes:
        exitcode: as Python counts them: -9 for signal 9.
    """

    exitcode: int | None

    def __str__(self) -> str:
        if self.exitcode is None or self.exitcode >= 0:
            return f"the process ended with exit code {self.exitcode}"
        meaning = signal.strsignal(-self.exitcode)
        guess = "; out of memory?" if self.exitcode == -9 else ""
        return f"the process was ended by signal {-self.exitcode} ({meaning}{guess})"


def check_travels(thing: Any, name: str) -> None:
    """Check that a function or a value can be rebuilt in a fresh process.

    Args:
        thing: what shall travel; a function travels by its name.
        name: what to call it in the error.

    Raises:
        SetupError: it cannot be pickled, or it is defined where no file can be imported; or this
            is itself a worker that reads the main script and should not have come here.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SetupError(
            "A worker process read the main script and came to the call that started it.",
            do='put that call under `if __name__ == "__main__":`.',
        )
    try:
        whole = pickle.dumps(thing)
    except Exception as error:  # whatever its parts raise when they are taken apart
        raise SetupError(
            f"Worker processes cannot be given {name}.",
            saw=f"{type(error).__name__}: {error}",
            do="define it by def or class at the top level of a file, or use workers=0.",
        ) from None
    home = sys.modules["__main__"]
    file = getattr(home, "__file__", None)
    findable = getattr(home, "__spec__", None) is not None or (file and Path(file).is_file())
    if b"__main__" in whole and not findable:
        raise SetupError(
            f"Worker processes cannot find {name}: it is defined in a notebook or at a prompt.",
            saw=f"{thing!r}, and __main__ is no file",
            do="move it to a .py file and import it from there, or use workers=0.",
        )


def calls(
    fn: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], n_workers: int
) -> Generator[tuple[int, Any]]:
    """Call `fn(*job)` for every job in spawned processes, and give results as they are finished.

    Closing the generator, an error and Ctrl-C end all processes at once.

    Args:
        fn: a function that `check_travels` lets pass.
        jobs: arguments that pickle.
        n_workers: processes, 1 or more.

    Yields:
        (number of the job, what `fn` returned); `Died` for a job whose process died, which is
        then replaced.

    Raises:
        SetupError: a process could not begin: it cannot import `fn`, for one.
        Exception: what `fn` raised.
    """
    what, waiting = pickle.dumps(fn), list(range(len(jobs)))[::-1]
    workers: list[_Worker] = []
    try:
        while n_left := len(waiting) + sum(worker.job is not None for worker in workers):
            while len(workers) < min(n_workers, n_left):
                workers.append(_Worker(what))
            for worker in _that_speak(workers):
                job, answer = worker.job, worker.hear()
                if isinstance(answer, Died):
                    workers.remove(worker)
                    worker.end()
                if job is not None:
                    yield job, answer  # to be kept before more is begun
                if waiting and worker in workers:
                    worker.begin(waiting.pop(), jobs)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Worker:
    """One process, seen from this side."""

    def __init__(self, what: bytes):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        # not a daemon: those may have no processes of their own, such as a DataLoader's
        self.process = spawn.Process(target=_serve, args=(theirs, what), daemon=False)
        self.ready = False
        self.job: int | None = None
        try:
            with _deaf_to_ctrl_c():
                self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            theirs.close()

    def begin(self, job: int, jobs: Sequence[tuple[Any, ...]]) -> None:
        self.job = job
        with suppress(OSError):  # it died while idle: heard next, as a death in this job
            self.pipe.send(jobs[job])

    def hear(self) -> Any:
        """Return the result of the job, or `Died`; raise what went wrong otherwise."""
        try:
            answer = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            self.process.join(_PATIENCE)  # the pipe closes first
            died = Died(self.process.exitcode)
            if self.ready:
                return died
            raise SetupError(
                "A worker process ended before it began.",
                saw=f"{died}; what it said itself is above, on stderr",
                do='in a script, call under `if __name__ == "__main__":`; or use workers=0.',
            )
        kind, content = answer
        if kind == "raised":
            raise content
        self.ready, self.job = True, None
        return content

    def end(self) -> None:
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self.pipe.close()


def _that_speak(workers: list[_Worker]) -> list[_Worker]:
    """Wait until some workers answered or died, and return them."""
    # by the process too: a grandchild may hold the pipe of a dead worker open
    heard = wait([*(w.pipe for w in workers), *(w.process.sentinel for w in workers)])
    return [w for w in workers if w.pipe in heard or w.process.sentinel in heard]


@contextmanager
def _deaf_to_ctrl_c() -> Generator[None]:
    """Block SIGINT for the processes that begin in this block; their parent ends them."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, what: bytes) -> None:
    """Live as a worker: get ready, then call the function for each job until ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        fn = pickle.loads(what)
    except BaseException as error:
        pipe.send(("raised", _portable(SetupError(
            "A worker process cannot import what it shall call.",
            saw=f"{type(error).__name__}: {error}",
            do="define it at the top level of a file that can be imported, or use workers=0.",
        ))))  # fmt: skip
        return
    pipe.send((_READY, None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", fn(*job)))
        except Exception as error:
            pipe.send(("raised", _portable(error)))


def _portable(error: Exception) -> Exception:
    """Return an error that pickles: the same, or one of ours with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PellucidError(f"{type(error).__name__} in a worker process.", saw=str(error))
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed, it could end nobody
