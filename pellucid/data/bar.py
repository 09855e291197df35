"""A progress bar for what takes longer than a moment, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

_MOMENT = 1.0  # seconds


@contextmanager
def bar(what: str, total: int) -> Generator[Callable[[int], None]]:
    """Give a function to call with the number of things done; nothing shows where nobody looks."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began = progress.add_task("", total=total), time.monotonic()
    with ExitStack() as shown:

        def advance(n: int) -> None:
            if not progress.live.is_started and time.monotonic() - began > _MOMENT:
                shown.enter_context(progress)
            progress.advance(task, n)

        yield advance
