"""Unpack an archive that may be hostile: all of it appears at once, or nothing does.

Python's own extraction follows links that the archive brought along, and its filters against that
have been got round (CVE-2025-4517, CVE-2026-4360). Here a member is a name, which is checked, and
bytes, which we write ourselves into a file that was not there before. Nothing else is taken over.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import re
import secrets
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from ..errors import DataError, DataNotFound

_SMALL = 64 << 20  # bytes: what may always come out, however little goes in
_MAX_DEPTH = 64  # folders in each other
_BLOCK = 1 << 18
_MAX_HEADER = 1 << 20  # bytes of names and remarks before a member of a tar, read in one go

_WINDOWS_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?$", re.IGNORECASE
)
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError,
           NotImplementedError, RecursionError, IndexError, KeyError, MemoryError)  # fmt: skip


def unpack(
    archive: str | Path,
    folder: str | Path,
    *,
    max_entries: int = 1_000_000,
    max_bytes: int = 1 << 38,
    max_ratio: float = 100,
) -> Path:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into a new folder.

    Links, devices, pipes and encrypted members are refused, as are names that lead outside, that
    are there already or that the system cannot hold; permissions and times are not taken over. The
    folder appears when all of it is there and verified. If the archive has a single folder at its
    top, that folder's content becomes the content of `folder`.

    Args:
        archive: told by its content, not by its name.
        folder: must not exist; its parents are made.
        max_entries: files and folders.
        max_bytes: of all files together; each entry counts as 512 at least.
        max_ratio: of these bytes to those of the archive; 64 MiB may always come out.

    Returns:
        `folder`.

    Raises:
        DataNotFound: there is no such archive.
        DataError: it is broken, refused, or `folder` cannot be made. Nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    if os.path.lexists(folder):
        raise DataError(f"{folder} is there already.", do="remove it, or choose another folder.")
    if not archive.is_file():
        raise DataNotFound(f"There is no archive {archive}.")
    allowed = min(max_bytes, max(_SMALL, int(max_ratio * archive.stat().st_size)))
    temporary = part_of(folder)
    try:
        temporary.mkdir(parents=True)
        _unpack(archive, _Writer(archive, temporary, max_entries, allowed))
        top = list(temporary.iterdir())
        single = len(top) == 1 and top[0].is_dir()
        (top[0] if single else temporary).rename(folder)
    except DataError:
        raise
    except OSError as error:
        if error.errno in (
            None,
            errno.EINVAL,
        ):  # of the data, and of where a zip says that they lie
            raise _broken(archive, error) from None
        raise DataError(
            f"The archive {archive} could not be unpacked into {folder}.",
            saw=error.strerror or str(error),
            do="make room there, or choose another folder.",
        ) from None
    except _BROKEN as error:
        raise _broken(archive, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def why_refused(name: str, windows: bool = os.name == "nt") -> str:
    """Say why a member may not have this name; empty if it may.

    Args:
        name: as the archive has it, parts separated by slashes.
        windows: whether what Windows cannot hold, or would take for something else, is refused.
    """
    parts = name.split("/")
    if "\0" in name:
        return "its name has a NUL in it"
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return "its name is no Unicode"
    if name.startswith("/"):
        return "its name is absolute"
    if ".." in parts:
        return "its name leads upwards"
    if len(parts) > _MAX_DEPTH:
        return f"it lies in more than {_MAX_DEPTH} folders"
    if windows and any(part not in ("", ".") and _no_windows_name(part) for part in parts):
        return "its name is none on Windows"
    return ""


def _no_windows_name(part: str) -> bool:
    odd = any(character in '\\:<>"|?*' or character < " " for character in part)
    return odd or part[-1] in ". " or bool(_WINDOWS_DEVICE.match(part))


def part_of(path: Path) -> Path:
    """Return a new hidden name beside `path`, for what is to become `path` when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def remove_parts(path: Path) -> None:
    """Remove what killed processes have left of `path`; the caller sees to it that none is alive.

    Args:
        path: what `part_of` was given.
    """
    pattern = re.compile(rf"\.+{re.escape(path.name)}(\.[0-9a-f]{{8}}\.part)+")
    for found in path.parent.iterdir() if path.parent.is_dir() else ():
        if pattern.fullmatch(found.name):
            remove(found)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _broken(archive: Path, error: BaseException) -> DataError:
    return DataError(
        f"The archive {archive} is broken.",
        saw=str(error).splitlines()[0] if str(error) else type(error).__name__,
        do="remove it, and fetch it again.",
    )


class _Writer:
    """Writes members below a folder, within limits."""

    def __init__(self, archive: Path, folder: Path, max_entries: int, max_bytes: int):
        self.archive, self.folder = archive, folder
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.n_entries = self.n_bytes = self.n_files = 0
        self._made = {"": folder}

    def refuse(self, name: str, why: str) -> NoReturn:
        raise DataError(
            f"The archive {self.archive} is refused; nothing was unpacked.",
            saw=f"the member {name!r}: {why}" if name else why,
            do="get it from where you trust it, or look into it and unpack it by hand.",
        )

    def admit(self, n_entries: int, n_bytes: int, name: str = "") -> None:
        """Refuse what would go beyond the limits, before anything of it is written."""
        if self.n_entries + n_entries > self.max_entries:
            self.refuse(name, f"more than {self.max_entries:,} files and folders")
        if self.n_bytes + max(n_bytes, 512 * n_entries) > self.max_bytes:
            packed = self.archive.stat().st_size
            self.refuse(name, f"{packed:,} bytes would become more than {self.max_bytes:,}")
        if n_bytes > _SMALL and n_bytes > shutil.disk_usage(self.folder).free:
            self.refuse(name, f"{n_bytes:,} bytes are more than the disk has left")

    def add_folder(self, name: str) -> None:
        self._make(name, self._parts(name))

    def add_file(self, name: str, size: int, source: IO[bytes]) -> None:
        """Write a member, of which `size` bytes were announced."""
        parts = self._parts(name)
        if not parts:
            self.refuse(name, "it has no name")
        folder = self._make(name, parts[:-1])
        self._count(name, size)
        n_left = size
        try:
            with (folder / parts[-1]).open("xb") as file:
                while block := source.read(min(_BLOCK, n_left + 1)):
                    n_left -= len(block)
                    if n_left < 0:
                        break
                    file.write(block)
        except FileExistsError:
            self._refuse_twin(name)
        if n_left:
            raise EOFError(f"the member {name!r} has not the {size:,} bytes that were announced")
        self.n_files += 1

    def _parts(self, name: str) -> list[str]:
        if why := why_refused(name):
            self.refuse(name, why)
        return [part for part in name.split("/") if part not in ("", ".")]

    def _make(self, name: str, parts: list[str]) -> Path:
        place = "/".join(parts)
        if place not in self._made:
            path = self._make(name, parts[:-1]) / parts[-1]
            self._count(name, 0)
            try:
                path.mkdir()  # exclusively: one that we did not make is another's, see _refuse_twin
            except FileExistsError:
                self._refuse_twin(name)
            self._made[place] = path
        return self._made[place]

    def _count(self, name: str, size: int) -> None:
        self.admit(1, size, name)
        self.n_entries += 1
        self.n_bytes += max(size, 512)

    def _refuse_twin(self, name: str) -> NoReturn:
        self.refuse(name, "its place is taken by a member of that name, maybe in other letters")


def _unpack(archive: Path, writer: _Writer) -> None:
    with archive.open("rb") as file:
        head = file.read(512)
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        _unpack_zip(archive, writer)
    else:
        if head.lstrip()[:1] == b"<":
            raise ValueError("it is a web page (HTML), not an archive")
        _unpack_tar(archive, head, writer)
    if not writer.n_files:
        raise ValueError("it holds no files")


def _unpack_zip(archive: Path, writer: _Writer) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        writer.admit(len(members), sum(member.file_size for member in members))
        for member in members:
            name = member.orig_filename  # as it was, before Python cut it at a NUL
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                writer.refuse(name, "it is a link, a device or a pipe")
            if member.flag_bits & 1:
                writer.refuse(name, "it is encrypted")
            if name.endswith("/"):
                writer.add_folder(name)
            elif why := why_refused(name):
                writer.refuse(name, why)  # before zipfile looks for what it calls by another name
            else:
                with file.open(member) as source:
                    writer.add_file(name, member.file_size, source)


def _unpack_tar(archive: Path, head: bytes, writer: _Writer) -> None:
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opener: Any = next((o for magic, o in openers.items() if head.startswith(magic)), open)
    with opener(archive, "rb") as packed:
        stream: Any = _Stream(packed, writer)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, encoding="utf-8") as file:
            while member := file.next():
                name = member.name
                if member.isdir():
                    writer.add_folder(name)
                elif not member.isreg() or member.issparse():
                    writer.refuse(name, "it is a link, a device, a pipe or a sparse file")
                elif member.size < 0:
                    writer.refuse(name, "it claims a negative size")
                elif source := file.extractfile(member):
                    writer.add_file(name, member.size, source)
        while stream.read(_BLOCK):  # the checksum stands at the end
            pass


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a broken one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == 512 and not any(buf):
                raise  # the block of zeros that stands at the end
            why = "cut off" if len(buf) < 512 else f"damaged ({error})"
            raise tarfile.ReadError(f"it is {why}, or not an archive") from None
        long = header.size > _MAX_HEADER
        if long and header.type in (b"x", b"g", b"X", b"L", b"K"):  # names that tarfile reads whole
            raise tarfile.ReadError("a name or remark is longer than 1 MiB")
        return header


class _Stream:
    """What comes out of a decompressor, up to a limit."""

    def __init__(self, source: IO[bytes], writer: _Writer):
        self._source, self._writer = source, writer
        self._n_bytes = self._n_empty = 0

    def read(self, n: int = -1) -> bytes:
        block = self._source.read(n)
        self._n_bytes += len(block)
        self._n_empty += not block
        if self._n_empty > 100:  # tarfile asks for ever when a map of holes has no end
            raise EOFError("it is cut off")
        # each entry has its head of 512 bytes and may be filled up by as many
        if self._n_bytes > self._writer.max_bytes + 1024 * self._writer.n_entries + _SMALL:
            self._writer.refuse("", "far more bytes come out than its members have")
        return block
