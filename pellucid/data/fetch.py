"""Download files and data sets whose checksums are known."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ..errors import DataError, DataNotFound, SetupError, UnknownName, did_you_mean
from .archives import part_of, remove, remove_parts, unpack, why_refused
from .sources import SOURCES, Source

_TRIES = 3
_PAUSE = 0.5  # seconds before the second try, twice that before the third
_CONNECT, _READ = 10.0, 30.0  # seconds without an answer

_ENDINGS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tbz2", ".tbz", ".txz", ".tar", ".zip")


def cache_folder() -> Path:
    """Return where downloads are kept: $PELLUCID_HOME, else pellucid in the user's cache folder."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"


def fetch(
    url: str,
    sha256: str,
    folder: str | Path | None = None,
    *,
    name: str | None = None,
    max_bytes: int | None = None,
    force: bool = False,
) -> Path:
    """Download a file unless it is there already, and return its path.

    A bar shows the progress on a terminal. The file appears under its name only when it is whole
    and its checksum is right; one that is there with another checksum is downloaded again. Two
    processes that ask at once make one download.

    Args:
        url: http or https.
        sha256: the checksum, 64 hexadecimal digits.
        folder: made if it does not exist; by default archives in the cache.
        name: of the file in it; by default as in `url`.
        max_bytes: break off when more come; None for no limit.
        force: download it also if it is there.

    Raises:
        SetupError: the address, name or checksum is none.
        DataNotFound: after three tries (one, if another cannot help) there is no such file.
    """
    sha256 = _checked(url, sha256)
    target = _place(folder or cache_folder() / "archives", name or _file_name(url))
    if not force and _has_sum(target, sha256):
        return target
    with _disk_trouble(url, target), _alone(target):
        _get(url, sha256, target, max_bytes, force)
    return target


def fetch_dataset(name_or_url: str, sha256: str | None = None, *, force: bool = False) -> Path:
    """Download and unpack a data set unless it is there already, and return its folder.

    It is data/NAME in the cache, where NAME is the data set's or that of the archive without its
    ending; the archive is kept beside it. The folder appears when all of it is there. What a killed
    process has left half done is cleared away by the next call. Two processes that ask at once
    make one download.

    Args:
        name_or_url: one of `pellucid.data.sources.SOURCES`, or the address of an archive.
        sha256: the checksum of that archive; of a named one, only to replace the one known.
        force: download and unpack it also if it is there.

    Raises:
        UnknownName: no data set has this name.
        SetupError: the checksum is missing or is none.
        DataNotFound: it cannot be downloaded.
        DataError: the archive is broken or refused, or the folder holds another one's content.
    """
    name, sources = _resolve(name_or_url, sha256)
    sums = [_checked(source.url, source.sha256) for source in sources]
    folder = _place(cache_folder() / "data", name)
    note = folder.with_name(f".{name}.sha256")
    if not force and _is_there(folder, note, sums):
        return folder
    with _disk_trouble(sources[0].url, folder), _alone(folder):
        if not force and _is_there(folder, note, sums):
            return folder  # another process was quicker
        fresh = part_of(folder)
        try:
            _fill(fresh, sources, force)
            if folder.exists():
                folder.rename(part_of(folder))
            note.write_text("\n".join(sums))
            fresh.rename(folder)
        finally:
            remove_parts(folder)
    return folder


def remove_dataset(name_or_url: str, archive: bool = True, data: bool = True) -> None:
    """Remove a data set from the cache; what is not there is no error.

    Args:
        name_or_url: as for `fetch_dataset`.
        archive: whether the archive is removed.
        data: whether the unpacked folder is removed.
    """
    name, sources = _resolve(name_or_url, None)
    folder = _place(cache_folder() / "data", name)
    packed = _place(cache_folder() / "archives", _file_name(sources[0].url))
    if data and folder.parent.is_dir():
        with _alone(folder):
            if folder.exists():
                folder.rename(part_of(folder))  # at once, since removing it takes time
            remove_parts(folder)
            remove(folder.with_name(f".{name}.sha256"))
    if archive and len(sources) == 1 and packed.parent.is_dir():
        with _alone(packed):
            remove(packed)


def _resolve(name_or_url: str, sha256: str | None) -> tuple[str, tuple[Source, ...]]:
    known = {sources[0].url: name for name, sources in SOURCES.items() if len(sources) == 1}
    name = known.get(name_or_url, name_or_url)
    if name in SOURCES:
        sources = SOURCES[name]
        if sha256 and len(sources) > 1:
            raise SetupError(f"{name} has {len(sources)} files, each with its own checksum.")
        return name, (replace(sources[0], sha256=sha256, size=None),) if sha256 else sources
    if "://" not in name:
        raise UnknownName(f"There is no data set {name!r}.", do=did_you_mean(name, SOURCES))
    file = _file_name(name)
    ending = next((end for end in _ENDINGS if file.lower().endswith(end)), "")
    return file[: len(file) - len(ending)], (Source(name, sha256, None),)


def _file_name(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SetupError("This is no address of the web.", saw=repr(url), do="begin with https://.")
    return parts.path.rsplit("/", 1)[-1]


def _place(folder: str | Path, name: str) -> Path:
    if name in ("", ".") or "/" in name or why_refused(name):
        raise SetupError("This is no name of a file.", saw=repr(name), do='give one: name="...".')
    return Path(folder) / name


def _checked(url: str, sha256: str | None) -> str:
    if sha256 is None:
        raise SetupError(
            f"The checksum of {url} is not known, and nothing is unpacked on trust.",
            do="download it by hand, look whether it is what you want, run `sha256sum FILE`, and "
            'pass what it says: sha256="...".',
        )
    if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise SetupError("sha256 is 64 hexadecimal digits.", saw=repr(sha256))
    return sha256.lower()


def _is_there(folder: Path, note: Path, sums: list[str]) -> bool:
    """Tell whether the data set is there; the note beside it says of which archive it is."""
    if not folder.is_dir():
        return False
    if note.is_file() and note.read_text().split() != sums:
        raise DataError(
            f"The folder {folder} holds the content of another archive.",
            saw=f"sha256 {note.read_text()[:8]}…, wanted {sums[0][:8]}…",
            do="move it away, or replace it: force=True.",
        )
    return True


def _fill(folder: Path, sources: tuple[Source, ...], force: bool) -> None:
    """Make a folder of the one archive's content, or of the files."""
    if len(sources) == 1:
        [source] = sources
        archive = fetch(source.url, source.sha256 or "", max_bytes=source.size, force=force)
        unpack(archive, folder)
        return
    folder.mkdir()
    for source in sources:
        target = folder / _file_name(source.url)
        _get(source.url, source.sha256 or "", target, source.size, force)


@contextmanager
def _alone(target: Path) -> Generator[None]:
    """Keep other processes from making `target`, and clear away what they left when killed."""
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process, which is at work on {target}")
        lock.acquire()
    try:
        remove_parts(target)
        yield
    finally:
        lock.release()


@contextmanager
def _disk_trouble(url: str, target: Path) -> Generator[None]:
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataNotFound(
            f"{url} could not be saved.",
            saw=f"{error.strerror or error}: {error.filename or target.parent}",
            do="make room and have the right to write there, or set PELLUCID_HOME to a folder "
            "where both are so.",
        ) from None


def _get(url: str, sha256: str, target: Path, max_bytes: int | None, force: bool) -> None:
    """Download `url` to `target`, unless it is there; up to three times. Nobody else may do so."""
    import requests

    if not force and target.exists():
        if _has_sum(target, sha256):
            return
        _say(f"{target} has another checksum than it should: fetching it again")
    reason, again = "", True
    for n_tries in range(1, _TRIES + 1):
        part = part_of(target)
        try:
            _transfer(url, part, max_bytes)
            if _has_sum(part, sha256):
                part.replace(target)
                return
            reason, again = _what_came(part), True
        except _TooMuch:
            reason, again = f"more came than the {max_bytes:,} bytes that it should have", False
        except requests.RequestException as error:
            reason, again = _explain(error, url)
        finally:
            part.unlink(missing_ok=True)
        if not again:
            break
        if n_tries < _TRIES:
            time.sleep(_PAUSE * n_tries)
    tried = f" (tried {n_tries} times)" if n_tries > 1 else ""
    raise DataNotFound(
        f"{url} could not be downloaded.",
        saw=reason + tried,
        do=f"try again later; or get it in another way, and put it at {target} (sha256 {sha256}).",
    )


def _transfer(url: str, path: Path, max_bytes: int | None) -> None:
    import pooch

    bar = _Bar() if sys.stderr.isatty() else None
    downloader: Any = pooch.HTTPDownloader(
        progressbar=bar or False,
        chunk_size=1 << 17,
        timeout=(_CONNECT, _READ),
        headers={"Accept-Encoding": "identity"},  # else a server may pack or unpack on the way
    )
    try:
        with path.open("xb") as file:
            downloader(url, _Capped(file, max_bytes), None)
    finally:
        if bar:
            bar.close()


def _has_sum(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _what_came(path: Path) -> str:
    with path.open("rb") as file:
        page = file.read(100).lstrip()[:1] == b"<"
    if page:
        return "a web page (HTML) came instead of it"
    return f"what came, {path.stat().st_size:,} bytes, has another checksum"


def _explain(error: Any, url: str) -> tuple[str, bool]:
    """Say in a few words why a request failed, and whether another try may help."""
    import requests

    host = urlsplit(url).netloc
    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        error.response.close()
        return f"the server answers {status} {error.response.reason}", (
            status >= 500 or status in (408, 429)
        )
    if isinstance(error, requests.TooManyRedirects):
        return "the server redirects without end", False
    if isinstance(error, requests.ConnectTimeout):  # a wall, as a rule: waiting thrice is no help
        return f"{host} does not answer within {_CONNECT:g} s", False
    if isinstance(error, requests.exceptions.SSLError):
        return f"{host} could not prove who it is (TLS)", False
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"{host} sent nothing for {_READ:g} s", True
    if isinstance(error, requests.ConnectionError):
        return f"{host} cannot be reached", True
    if isinstance(error, ValueError):  # InvalidSchema and its like
        return "the server redirects to what is no address of the web", False
    return "the transfer was cut", True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _TooMuch(Exception):
    """More bytes than allowed."""


class _Capped:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: IO[bytes], max_bytes: int | None):
        self._file, self._max_bytes, self._n_bytes = file, max_bytes, 0

    def write(self, block: bytes) -> None:
        self._n_bytes += len(block)
        if self._max_bytes is not None and self._n_bytes > self._max_bytes:
            raise _TooMuch
        self._file.write(block)

    def flush(self) -> None:
        self._file.flush()


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
