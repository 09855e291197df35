"""Finding files: a folder of many, and their names in little memory."""

from __future__ import annotations

import errno
import mimetypes
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from io import BytesIO
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TextIO, overload

import numpy as np

from ..errors import DataError, DataNotFound, SetupError, did_you_mean

# Python's own table: what the host's /etc/mime.types adds would make data depend on the machine
IMAGE_EXTENSIONS: frozenset[str] = frozenset(
    extension.lower()
    for table in mimetypes.MimeTypes().types_map
    for extension, kind in table.items()
    if kind.startswith("image/")
)


class FileNames(Sequence[str]):
    """The names of files below a folder, as a sequence that never changes.

    A name is relative to the folder, with "/" between its parts; names that are no UTF-8 survive,
    as in `os.fsdecode`. All lie in one bytes object, each ended by a zero byte, which no name can
    contain: about 8 bytes a name on top of its letters, and no object that workers could copy by
    counting references. A part (`names[:100]`, `names[indices]`, `names[mask]`) shares the bytes.

    Args:
        root: the folder; a relative one is taken from the current folder, now and for good.
        names: relative names, in any order.

    Raises:
        DataError: a name is empty or contains a zero byte.
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str]):
        blob = BytesIO()
        for name in names:
            encoded = os.fsencode(name)
            if not encoded or b"\0" in encoded:
                raise DataError("A file's name is empty or contains a zero byte.", saw=repr(name))
            blob.write(encoded + b"\0")
        self._root = str(Path(root).absolute())
        self._blob = blob.getvalue()
        self._starts = _starts(self._blob)

    @classmethod
    def _of(cls, root: str, blob: bytes, starts: np.ndarray) -> FileNames:
        names = cls.__new__(cls)
        names._root, names._blob, names._starts = root, blob, starts
        return names

    @property
    def root(self) -> str:
        """The folder, as an absolute path."""
        return self._root

    def path(self, index: int) -> str:
        """Return the full path of a file, ready to be opened."""
        name = os.fsdecode(self._bytes(self._starts[index]))
        return f"{self._root.rstrip('/')}/{name}"

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> FileNames: ...
    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> str | FileNames:
        if isinstance(index, slice):
            return self._of(self._root, self._blob, self._starts[index])
        indices = np.asarray(index)
        if indices.ndim == 0:
            return os.fsdecode(self._bytes(self._starts[operator.index(indices.item())]))
        if indices.ndim > 1:
            raise IndexError(f"file names are numbered in one dimension, not {indices.ndim}")
        if not indices.size and indices.dtype != bool:
            indices = indices.astype(np.int64)  # of [] numpy makes floats
        return self._of(self._root, self._blob, self._starts[indices])

    def _bytes(self, start: int) -> bytes:
        return self._blob[start : self._blob.index(0, start)]

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self._bytes(start)) for start in self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileNames):
            return NotImplemented
        if self._root != other._root or len(self) != len(other):
            return False
        pairs = zip(self._starts, other._starts, strict=True)
        return all(self._bytes(a) == other._bytes(b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self._root, len(self), *islice(self, 3)))

    def __getstate__(self) -> dict[str, object]:
        # a part takes only its own names along
        whole = self._blob.count(0) <= len(self)
        return vars(self if whole else FileNames(self._root, self))

    def __repr__(self) -> str:
        n, folder = len(self), printable(Path(self._root).name or self._root)
        text = f"{n:,} file{'s' * (n != 1)} under {folder}"
        return f"{text}, {printable(self[0])}{' ...' * (n > 1)}" if n else text


def scan(
    folder: str | os.PathLike[str],
    extensions: Iterable[str] | None = IMAGE_EXTENSIONS,
    folders: Iterable[str] | None = None,
    recurse: bool = True,
) -> FileNames:
    """Find the files below a folder, by default all images.

    Hidden files and folders (".name") are skipped. Links are followed, but never into a folder
    that they lie in. A link that leads nowhere is listed if its name fits, so that opening it
    names it; pipes, sockets and devices are not.

    Args:
        folder: where to look.
        extensions: endings of names, ".jpg" or "jpg", in any case; None takes every file.
        folders: of the folders directly in `folder`, take only these; "." stands for the files
            that lie directly in it. None takes everything.
        recurse: False takes only the files that lie directly in `folder`.

    Returns:
        The names in the order of their bytes, so the order in which the files were made does not
        count. There may be none: what needs files says so.

    Raises:
        DataNotFound: there is no such folder.
        DataError: it is not a folder, a folder below it cannot be read (it is named), or one of
            `folders` is not in it.
        SetupError: `folders` are given, but `recurse` is False.
    """
    if folders is not None and not recurse:
        raise SetupError(
            "`folders` says which folders to enter, and recurse=False enters none.",
            do="leave one of the two out.",
        )
    root = Path(folder).absolute()
    blob = BytesIO()  # its value is handed over without a copy
    for name in _walk(os.fsencode(root), _identity(root), _endings(extensions), folders, recurse):
        blob.write(name)
    content = blob.getvalue()
    return FileNames._of(str(root), content, _starts(content))


def open_text(path: str | os.PathLike[str]) -> TextIO:
    """Open a text file in UTF-8; bytes that are none are kept as in the names that `scan` finds.

    Raises:
        DataNotFound: there is no such file.
        DataError: it cannot be read.
    """
    try:
        return Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except FileNotFoundError:
        raise DataNotFound(f"There is no file {os.fspath(path)!r}.", do="check the path.") from None
    except OSError as error:
        what = f"The file {os.fspath(path)!r} cannot be read."
        raise DataError(what, saw=str(error.strerror)) from None


# ── words for messages ──────────────────────────────────────────────────────────────────────────


def printable(text: object) -> str:
    """Return text that any terminal can print, whatever bytes a name in it consists of."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def few(items: Sequence[str], n: int = 10) -> str:
    """Return the first of many names: "a, b, c and 12 more"."""
    rest = len(items) - n
    text = ", ".join(printable(item) for item in items[:n])
    return f"{text} and {rest:,} more" if rest > 0 else text


def nearest(name: str, names: Sequence[str]) -> str:
    """Return advice as `did_you_mean` does, for names that may be too many to list.

    Of more than ten, only one that is near is told; the answer may be empty.
    """
    if len(names) > 10:
        names = get_close_matches(name, names, n=1)
    return did_you_mean(name, map(printable, names)) if names else ""


def no_files(names: Sequence[str]) -> DataError:
    """Return the error that there are no files."""
    where = f" under {printable(names.root)}" if isinstance(names, FileNames) else ""
    return DataError(
        f"There are no files{where}.",
        do="check the folder, and which extensions and folders are looked for.",
    )


# ── scanning ────────────────────────────────────────────────────────────────────────────────────


def _starts(blob: bytes) -> np.ndarray:
    """Return where each of the names begins, int64 (n,)."""
    ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
    return np.concatenate([ends[:0], [0], ends[:-1] + 1])[: len(ends)].astype(np.int64, copy=False)


def _endings(extensions: Iterable[str] | None) -> tuple[bytes, ...]:
    if extensions is None:
        return (b"",)
    if isinstance(extensions, str):
        extensions = [extensions]
    return tuple({b"." + os.fsencode(ending).lower().lstrip(b".") for ending in extensions})


def _identity(root: Path) -> tuple[int, int]:
    """Return device and inode of the folder to look in, or say what is wrong with it."""
    try:
        found = root.stat()
    except (FileNotFoundError, NotADirectoryError):
        above = next((folder for folder in root.parents if folder.is_dir()), root.anchor)
        raise DataNotFound(
            f"There is no folder {printable(str(root))}.",
            saw=f"the nearest that exists is {printable(str(above))}",
            do="check the path; a relative one is taken from the current folder.",
        ) from None
    except OSError as error:
        raise _unreadable(error) from None
    if not S_ISDIR(found.st_mode):
        raise DataError(
            f"{printable(str(root))} is not a folder.",
            do="give the folder that the files lie in; unpack an archive first.",
        )
    return found.st_dev, found.st_ino


def _walk(
    root: bytes,
    identity: tuple[int, int],
    endings: tuple[bytes, ...],
    folders: Iterable[str] | None,
    recurse: bool,
) -> Iterator[bytes]:
    """Give the names below a folder in the order of their bytes, each ended by a zero byte."""
    entries = _entries(root, endings)
    if folders is not None:
        entries = _chosen(root, entries, [folders] if isinstance(folders, str) else folders)
    # what is entered and not yet done; a list, as folders may be nested deeper than Python's calls
    entered = [(b"", identity, iter(entries))]
    while entered:
        prefix, _, rest = entered[-1]
        for name in rest:
            if not name.endswith(b"/"):
                yield prefix + name + b"\0"
            elif recurse:
                folder = root + b"/" + prefix + name
                try:
                    found = os.stat(folder)  # noqa: PTH116, bytes are no Path
                except OSError as error:
                    raise _unreadable(error) from None
                identity = found.st_dev, found.st_ino
                if all(identity != above for _, above, _ in entered):
                    entered.append((prefix + name, identity, iter(_entries(folder, endings))))
                    break
        else:
            entered.pop()


def _entries(folder: bytes, endings: tuple[bytes, ...]) -> list[bytes]:
    """Return what lies directly in a folder; folders end in "/", which puts them in order too."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    found.append(name + b"/")
                elif name.lower().endswith(endings) and _is_file(entry):
                    found.append(name)
    except OSError as error:
        raise _unreadable(error) from None
    found.sort()
    return found


def _chosen(root: bytes, entries: list[bytes], folders: Iterable[str]) -> list[bytes]:
    kept = {os.fsencode(folder.rstrip("/")): folder for folder in folders}
    there = [entry[:-1] for entry in entries if entry.endswith(b"/")]
    for name, folder in kept.items():
        if name != b"." and name not in there:
            text = [os.fsdecode(other) for other in there]
            raise DataError(
                f"There is no folder {folder!r} directly in {printable(os.fsdecode(root))}.",
                saw=f"folders: {few(text) or 'none'}",
                do=nearest(folder, text),
            )
    return [e for e in entries if (e[:-1] if e.endswith(b"/") else b".") in kept]


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself leads nowhere
            return False
        raise


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    """Say whether something is a file, leads to one, or leads nowhere."""
    if not entry.is_symlink():
        return entry.is_file()
    try:
        return S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _unreadable(error: OSError) -> DataError:
    path = os.fsdecode(error.filename or b"a folder")
    return DataError(
        f"{printable(path)} cannot be read, so the files below it are unknown.",
        saw=f"{type(error).__name__}: {error.strerror}",
        do="mend its permissions, or move it away or give it a name that begins with a dot.",
    )
