"""The table of a run: live in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from html import escape
from time import perf_counter
from typing import Protocol

import torch.distributed as dist

from ..distributed import world_size
from ..errors import UnknownName, did_you_mean
from ..events import Callback
from ..learner import Learner

_INTERVAL = 0.1
"""Seconds between two updates of what is shown."""

_LINE_INTERVAL = 60.0
"""Seconds between two plain lines within an epoch."""


class View(Protocol):
    """One way to show a run: a head, a row an epoch, and what runs right now."""

    def rows(self, rows: list[list[str]]) -> None:
        """Add finished rows."""

    def running(self, done: int, total: int | None, text: str) -> None:
        """Show how far the pass is."""

    def close(self) -> None:
        """End the show, leaving the rows."""


class Progress(Callback):
    """Show losses and metrics of each epoch, and how far the run is.

    Every learner shows this table unless one is given: `Progress("off")` shows nothing. It is
    updated at most ten times a second, with numbers that were read anyway.

    Args:
        show: "live" for a terminal, "notebook", "lines" for a file, "off", or "auto", which sees
            where the output goes.
    """

    order = 100  # after those that raise: what they refuse is not shown
    shows_progress = True

    def __init__(self, show: str = "auto"):
        if show not in ("auto", "live", "notebook", "lines", "off"):
            raise UnknownName(
                f"Progress cannot show {show!r}.",
                do=did_you_mean(show, ["auto", "live", "notebook", "lines", "off"]),
            )
        self.show = show
        self._view: View | None = None

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Open the view, and close it in whatever way the fit ends."""
        show = _place() if self.show == "auto" else self.show
        if show != "off":
            _announce(str(learn.device), learn.device_reason)
            heads = ["epoch", *map(_title, _columns(learn)), "seconds"]
            self._view = {"live": _Terminal, "notebook": _Notebook, "lines": _Lines}[show](heads)
        self._n_rows = len(learn.record.epochs)
        self._shown_at, self._n_seen = perf_counter(), 0
        try:
            yield
        finally:
            if self._view is not None:
                self._show_rows(learn)
                self._view.close()
                self._view = None

    def after_batch(self, learn: Learner) -> None:
        """Show the running averages, if new ones were read."""
        readings = learn.tally.n_readings
        if readings > self._n_seen and self._view is not None:
            self._update(learn)

    def before_train(self, learn: Learner) -> None:
        """Wait for the first reading of the pass."""
        self._n_seen = 0

    def before_validate(self, learn: Learner) -> None:
        """Wait for the first reading of the pass."""
        self._n_seen = 0

    def after_epoch(self, learn: Learner) -> None:
        """Add the epoch's row."""
        self._update(learn)

    def _update(self, learn: Learner) -> None:
        now = perf_counter()
        if self._view is None or now - self._shown_at < _INTERVAL:
            return
        self._shown_at, self._n_seen = now, learn.tally.n_readings
        self._show_rows(learn)
        part = "training" if learn.training else "validating"
        averages = learn.tally.averages().items()
        numbers = "  ".join(f"{_title(name.split('/')[1])} {v:.4f}" for name, v in averages)
        text = f"epoch {learn.epoch + 1} of {learn.n_epochs}, {part}  {numbers}"
        self._view.running(learn.batch_index + 1, learn.n_batches, text)

    def _show_rows(self, learn: Learner) -> None:
        """Show the epochs that came on record since the last time, also one that ends the fit."""
        epochs, names = learn.record.epochs[self._n_rows :], _columns(learn)
        rows = [epochs[i] for i in range(len(epochs))]
        if self._view is not None and rows:
            self._view.rows(
                [
                    [str(number), *(f"{row[n]:.4f}" for n in names), f"{row['seconds']:.2f}"]
                    for number, row in enumerate(rows, self._n_rows + 1)
                ]
            )
        self._n_rows += len(rows)


def _columns(learn: Learner) -> list[str]:
    parts = ["train"] if learn.data.valid is None else ["train", "valid"]
    return [f"{part}/{name}" for name in ["loss", *learn.metrics] for part in parts]


def _title(column: str) -> str:
    return column.replace("/", " ").replace("_", " ")


def _place() -> str:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if shell is not None and "IPKernelApp" in shell.config:
        return "notebook"
    return "live" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "lines"


@cache
def _announce(device: str, reason: str) -> None:
    """Say once where this process trains, and why there."""
    print(f"training on {device} ({reason})", flush=True)
    if world_size() > 1 and not (dist.is_available() and dist.is_initialized()):
        print(
            f"{world_size()} processes were started, each of which trains a model of its own; "
            'callbacks=[Distributed("ddp")] lets them train one',
            flush=True,
        )


class _Lines:
    """A line an epoch, and one a minute within a long epoch."""

    def __init__(self, heads: list[str]):
        self._widths = [max(len(head), 7) for head in heads]
        self._said_at = perf_counter()
        self._print(heads)

    def rows(self, rows: list[list[str]]) -> None:
        for row in rows:
            self._print(row)

    def running(self, done: int, total: int | None, text: str) -> None:
        if perf_counter() - self._said_at >= _LINE_INTERVAL:
            self._said_at = perf_counter()
            print(f"  {text}, batch {done} of {total or '?'}", flush=True)

    def close(self) -> None:
        pass

    def _print(self, cells: list[str]) -> None:
        line = zip(cells, self._widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in line), flush=True)


class _Terminal:
    """Rows that stay, and below them one line that moves."""

    def __init__(self, heads: list[str]):
        from rich.console import Console
        from rich.live import Live

        self._widths = [max(len(head), 7) for head in heads]
        self._console = Console(highlight=False)
        # no thread of its own: it would fight the loop for the interpreter
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._print(heads, "bold")
        self._print(["─" * width for width in self._widths], "dim")

    def rows(self, rows: list[list[str]]) -> None:
        for row in rows:
            self._print(row, "")

    def running(self, done: int, total: int | None, text: str) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=total, completed=done, width=24, pulse=total is None)
        line.add_row("", bar, f"{done}/{total or '?'}", f"[dim]{text}")
        self._live.update(line, refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _print(self, cells: list[str], style: str) -> None:
        line = zip(cells, self._widths, strict=True)
        text = "  ".join(cell.rjust(width) for cell, width in line)
        self._console.print(text, style=style, no_wrap=True, crop=False)


class _Notebook:
    """One HTML table, replaced in place; its last state stays in the saved notebook."""

    def __init__(self, heads: list[str]):
        from IPython.display import HTML, display  # ty: ignore[import-not-found]

        self._html = HTML
        self._heads, self._rows, self._line = heads, [], ""
        self._handle = display(HTML(self._page()), display_id=True)

    def rows(self, rows: list[list[str]]) -> None:
        self._rows += rows
        self._handle.update(self._html(self._page()))

    def running(self, done: int, total: int | None, text: str) -> None:
        bar = f'<progress value="{done}" max="{total}"></progress>' if total else ""
        self._line = f"<div>{bar} {done}/{total or '?'} {text}</div>"
        self._handle.update(self._html(self._page()))

    def close(self) -> None:
        self._line = ""
        self._handle.update(self._html(self._page()))

    def _page(self) -> str:
        head = "".join(f"<th>{escape(head)}</th>" for head in self._heads)
        body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in self._rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{self._line}"
