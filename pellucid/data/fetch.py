"""Download a file whose checksum is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def fetch_file(url: str, sha256: str, folder: Path) -> Path:
    """Download `url` into `folder` unless it is there already, and return its path.

    A bar shows the progress on a terminal. The file appears under its name only when it is whole
    and its checksum is right.

    Args:
        url: http or https.
        sha256: the checksum, 64 hexadecimal digits.
        folder: made if it does not exist.

    Raises:
        OSError: the download failed.
        ValueError: what came has another checksum.
    """
    import pooch

    bar: Any = _Bar() if sys.stderr.isatty() else False
    downloader: Any = pooch.HTTPDownloader(progressbar=bar)
    name = url.rsplit("/", 1)[-1]
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # where it comes from is told by the bar
    try:
        found = pooch.retrieve(url, f"sha256:{sha256}", name, folder, downloader=downloader)
    finally:
        logger.setLevel(level)
    return Path(found)


class _Bar:
    """What pooch wants of a bar: `total`, `update(n)`, `reset()`, `close()`, drawn by rich."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        columns = ("downloading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=None)
        self._finished = False
        self.total = 0

    def update(self, n: int) -> None:
        """Move on by `n` bytes; the call after `reset` only repeats the total."""
        self._progress.start()
        if not self._finished:
            self._progress.update(self._task, advance=n, total=self.total)

    def reset(self) -> None:
        """Note that the download is complete."""
        self._finished = True

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
