"""Labels of files: from their folders, by a pattern, from a table; and the classes they make up.

All are plain functions of names: relative to the data set's folder, "/" between the parts. What
goes wrong is told with the file, the line or the label that it goes wrong at.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TextIO

import numpy as np

from ..errors import DataError, SetupError, UnknownName, did_you_mean
from .files import few, nearest, no_files, open_text, printable

# ── labels ──────────────────────────────────────────────────────────────────────────────────────


def folder_label(name: str) -> str:
    """Return the name of the folder that a file lies in: "n01440764" of "train/n01440764/a.JPEG".

    Raises:
        DataError: it lies in none, but right in the data set's folder.
    """
    label = name.rpartition("/")[0].rpartition("/")[2]
    if not label:
        raise DataError(
            f"The file {name!r} lies in no folder that could be its label.",
            do="put it into one, leave it out (scan(..., folders=...)), or label by a pattern.",
        )
    return label


def pattern_label(pattern: str | re.Pattern[str]) -> Callable[[str], str]:
    r"""Return a function from a file's name to its label, the pattern's first group.

    Args:
        pattern: a regular expression, searched for in the whole relative name: r"(\w+)_\d+\.jpg$"
            finds "cat" in "images/cat_12.jpg".

    Raises:
        SetupError: the pattern is none, or has no group. The function itself raises a DataError
            that names the file if nothing is found.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SetupError(f"{pattern!r} is no regular expression.", saw=str(error)) from None
    if not compiled.groups:
        raise SetupError(
            f"The pattern {compiled.pattern!r} has no group that could be the label.",
            do=r"put round brackets about it: r'/([^/]+)_\d+\.jpg$'.",
        )
    return partial(_first_group, compiled)


def _first_group(pattern: re.Pattern[str], name: str) -> str:
    found = pattern.search(name)
    if not found or not found[1]:
        raise DataError(
            f"The pattern {pattern.pattern!r} finds no label in the file name {name!r}.",
            saw="it does not match" if not found else "its first group is empty",
        )
    return found[1]


def read_labels(
    csv_path: str | os.PathLike[str], file_column: int | str = 0, label_column: int | str = 1
) -> dict[str, str]:
    """Read labels from a table: a CSV file in UTF-8 whose first line names the columns.

    Args:
        csv_path: the file; columns are separated by commas.
        file_column: the column of the files' names, by its name or its number from 0.
        label_column: the column of the labels, likewise.

    Returns:
        File name to label, in the table's order. Spaces around labels are removed.

    Raises:
        DataNotFound: there is no such file.
        DataError: a column is missing; or a line, whose number is told, has a wrong number of
            columns or an empty label, or labels a file otherwise than an earlier line does.
    """
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    with open_text(csv_path) as text:
        rows = _rows(csv_path, text)
        _, heads = next(rows, (0, []))
        columns = [_column(csv_path, heads, column) for column in (file_column, label_column)]
        for line, row in rows:
            if not max(columns) < len(row) <= len(heads):
                saw = f"{len(row)}; the first line names {len(heads)}: {row}"
                raise _slip(csv_path, line, "has a wrong number of columns", saw)
            file, label = row[columns[0]], row[columns[1]].strip()
            if not file or not label:
                raise _slip(csv_path, line, f"has an empty {'label' if file else 'file name'}", row)
            if label != printable(label):
                raise _slip(csv_path, line, "is not in UTF-8", label)
            if labels.setdefault(file, label) != label:
                known = f"{labels[file]!r} in line {lines[file]}"
                raise _slip(csv_path, line, f"labels {file!r} anew", f"{label!r}, but {known}")
            lines.setdefault(file, line)
    return labels


def _rows(path: str | os.PathLike[str], text: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Give the rows of a table that are not blank, with the number of their last line."""
    reader = csv.reader(text, strict=True)  # strict: a quote left open is told
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise _slip(path, reader.line_num, "is broken", str(error)) from None


def _column(path: str | os.PathLike[str], heads: list[str], column: int | str) -> int:
    if isinstance(column, str) and column in heads:
        return heads.index(column)
    if isinstance(column, int) and 0 <= column < len(heads):
        return column
    advice = did_you_mean(column, heads) if isinstance(column, str) and heads else ""
    if len(heads) == 1:
        advice = "columns must be separated by commas."
    raise DataError(
        f"The table {os.fspath(path)!r} has no column {column!r}.",
        saw=f"its first line names {few([repr(head) for head in heads]) or 'none: it is empty'}",
        do=advice,
    )


def _slip(path: str | os.PathLike[str], line: int, what: str, saw: object) -> DataError:
    return DataError(f"Line {line} of {os.fspath(path)!r} {what}.", saw=printable(saw))


def label_files(
    names: Sequence[str], how: str | re.Pattern[str] | Callable[[str], str] | Mapping[str, str]
) -> list[str]:
    """Label files.

    Args:
        names: relative names, n of them.
        how: "folder" (see `folder_label`), a compiled pattern (see `pattern_label`), a function
            from name to label, or a table from name to label (see `read_labels`).

    Returns:
        n labels, in the order of the names.

    Raises:
        DataError: there are no files, or one has no label; it is named.
        UnknownName: `how` is another text than "folder".
    """
    if not len(names):
        raise no_files(names)
    if isinstance(how, str) and how != "folder":
        raise UnknownName(
            f"Files cannot be labelled by {how!r}.",
            do="say 'folder'; or give a pattern as re.compile(...), a function, or a table.",
        )
    if isinstance(how, Mapping):
        _check_table(names, how)
        label = how.__getitem__
    elif isinstance(how, re.Pattern):
        label = pattern_label(how)
    else:
        label = folder_label if isinstance(how, str) else how
    same: dict[str, str] = {}  # one object a class, not one a file
    return [same.setdefault(found, found) for found in _labels(names, label)]


def _labels(names: Iterable[str], label: Callable[[str], str]) -> Iterator[str]:
    for name in names:
        try:
            found = label(name)
        except Exception as error:
            if not isinstance(error, DataError):
                error.add_note(f"pellucid: while labelling the file {name!r}")
            raise
        if not isinstance(found, str) or not found:
            raise DataError(
                f"The label of the file {name!r} must be a text that is not empty.",
                saw=repr(found),
                do="let the function return str(label)." if found not in (None, "") else "",
            )
        yield found


def _check_table(names: Sequence[str], table: Mapping[str, str]) -> None:
    lacking = [name for name in names if name not in table]
    if lacking:
        alike = f"; names in the table are like {next(iter(table))!r}" if table else ""
        raise DataError(
            f"The table has no label for the file {lacking[0]!r}.",
            saw=f"{len(lacking):,} of {len(names):,} files without a label, {len(table):,} labels"
            + alike,
            do="names must be relative to the data set's folder, with '/' between their parts.",
        )


# ── classes ─────────────────────────────────────────────────────────────────────────────────────


def vocabulary(labels: Iterable[str]) -> list[str]:
    """Return the classes: each label once, in order.

    Give it the training labels alone: a class that only validation knows cannot be learned, and
    `encode` names it.

    Args:
        labels: texts. If all are whole numbers they are ordered as numbers, "2" before "10".

    Raises:
        DataError: there are no labels.
    """
    classes = sorted(set(labels))
    if not classes:
        raise DataError("There are no labels, so no classes.", do="check that files were found.")
    if all(re.fullmatch("-?[0-9]+", label) for label in classes):
        classes.sort(key=int)
    return classes


def encode(labels: Sequence[str], classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Turn labels into class numbers.

    Args:
        labels: n texts.
        classes: see `vocabulary`; class i is classes[i].
        names: the n files that the labels belong to, for messages.

    Returns:
        Array (n,) of int64.

    Raises:
        DataError: a label is no class; it is named with the first such file.
    """
    if len(labels) != len(names):
        raise DataError(
            "Every file needs one label.", saw=f"{len(names):,} files, {len(labels):,} labels"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    if len(numbers) != len(classes):
        twice = next(label for label, n in Counter(classes).items() if n > 1)
        raise SetupError(f"The class {twice!r} is there twice.", saw=f"{len(classes):,} classes")
    encoded = np.fromiter((numbers.get(label, -1) for label in labels), np.int64, len(labels))
    unknown = np.flatnonzero(encoded < 0)
    if len(unknown):
        first = int(unknown[0])
        others = len({labels[i] for i in unknown}) - 1
        advice = nearest(labels[first], classes)
        raise DataError(
            f"The label {labels[first]!r} of the file {names[first]!r} is no class.",
            saw=f"{len(unknown):,} of {len(labels):,} files with such labels"
            + (f", {others:,} other labels among them" if others else "")
            + f"; {len(classes):,} classes: {few(classes)}",
            do=f"{advice} Classes come from the training files: add some of this one.".strip(),
        )
    return encoded
