"""Files that survive being killed: lines of JSON added one by one, and a file replaced at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, none if there is no such file.

    A last line without its end was being written when its writer was killed: it is left out.

    Raises:
        DataError: a whole line is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            raise DataError(
                f"Line {number} of {path} cannot be read.",
                saw=repr(line[:60])[1:],
                do="delete that line, or the file.",
            ) from None
        rows.append(row)
    return rows


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without its end, so that the next one does not grow out of it."""
    if path.exists():
        whole = path.read_bytes()
        keep = whole.rfind(b"\n") + 1
        if keep < len(whole):
            os.truncate(path, keep)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row as one line; it is on the disk when this returns."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file: at any instant there is the old one in full or the new one in full."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    if sys.platform != "win32":  # the name, too, must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
