"""The run as plain numbers: a column a name, one row a training batch, another table by epoch.

Training writes here, everything else reads: tables, plots, early stopping and checks never touch a
model. A record holds no tensors; it can be sliced, saved, loaded and plotted long after the run.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from .errors import DataError, DataNotFound, UnknownName, did_you_mean
from .layers import LayerRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "pellucid record 1"


class Table:
    """Columns of numbers of one length; where a column has no value, it is NaN.

    `table[name]` is a copy of a column, a float64 array (rows,); `table[-100:]` a table of the last
    hundred rows; `len(table)` the number of rows; iterating gives the names.
    """

    def __init__(self):
        self._columns: dict[str, _Column] = {}
        self._n_rows = 0

    def append(self, row: Mapping[str, float]) -> None:
        """Add one row; a name not seen before becomes a column, NaN in all rows above."""
        self.extend({name: [value] for name, value in row.items()}, 1)

    def extend(self, rows: Mapping[str, Sequence[float]], n: int) -> None:
        """Add `n` rows, given by columns of length `n`."""
        if any(len(column) != n for column in rows.values()):
            raise DataError("The columns of new rows differ in length.", saw=f"{n} rows")
        for name in rows:
            if name not in self._columns:
                self._columns[name] = _Column()
                self._columns[name].extend([math.nan] * self._n_rows)
        for name, column in self._columns.items():
            column.extend(rows[name] if name in rows else [math.nan] * n)
        self._n_rows += n

    def last(self, name: str) -> float:
        """Return the newest value of a column."""
        return self._column(name)[-1]

    def best_row(
        self, name: str, since: int = 0, min_delta: float = 0.0, lower: bool | None = None
    ) -> int | None:
        """Return the row where a column was last improved upon.

        Args:
            name: the column.
            since: the first row that counts.
            min_delta: how much better a value must be to count as better.
            lower: whether lower is better; None takes lower for a name with loss, error, mae, mse
                or perplexity in it, else higher.

        Returns:
            The row, or None if no value since then is a number.
        """
        if lower is None:
            lower = bool(re.search("loss|error|mae|mse|perplexity", name))
        sign = 1 if lower else -1
        best, where = math.inf, None
        for row, value in enumerate(self[name][since:].tolist(), since):
            if sign * value < best - min_delta * (where is not None):
                best, where = sign * value, row
        return where

    def _column(self, name: str) -> _Column:
        if name not in self._columns:
            raise _unknown(name, list(self))
        return self._columns[name]

    @overload
    def __getitem__(self, key: str) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: slice) -> Table: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, float]: ...
    def __getitem__(self, key: str | slice | int) -> np.ndarray | Table | dict[str, float]:
        if isinstance(key, str):
            return self._column(key).values()
        if isinstance(key, int):
            return {name: column[key] for name, column in self._columns.items()}
        part = Table()
        part.extend(
            {name: self[name][key].tolist() for name in self},
            len(range(*key.indices(len(self)))),
        )
        return part

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return self._n_rows

    def __repr__(self) -> str:
        return f"Table({len(self)} rows: {', '.join(self) or 'no columns'})"


class Record:
    """What happened in the fits of one learner, in two tables.

    `record["train/loss"]` is a column of the first table that has it. An epoch that was interrupted
    leaves its batches, and the next one goes by the same number.

    Attributes:
        batches: a row for each training batch: "epoch" (counted over all fits), "batch",
            "train/loss", "train/<metric>", "lr" (of several parameter groups "lr/0" and so on, or
            by their roles "lr/conv"; the rate that a group steps with) and every scheduled
            hyper-parameter.
        epochs: a row for each epoch: "train/...", "valid/...", the hyper-parameters at its end
            and "seconds".
        layers: what `callbacks.Telemetry` saw inside the model, else None.
    """

    def __init__(self):
        self.batches = Table()
        self.epochs = Table()
        self.layers: LayerRecord | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column by batch, or, for what is known by epoch alone, by epoch."""
        if not isinstance(name, str):
            raise UnknownName(
                "A record is asked for a column.",
                saw=repr(name),
                do='record["train/loss"][-100:], or record.epochs[-1] for a row.',
            )
        if name not in self.batches and name not in self.epochs:
            raise _unknown(name, list(dict.fromkeys([*self.batches, *self.epochs])))
        return self.batches[name] if name in self.batches else self.epochs[name]

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON and return the path; NaN and infinities are kept."""
        path = Path(path)
        tables = {"batches": self.batches, "epochs": self.epochs}
        plain = {
            name: {column: table[column].tolist() for column in table}
            for name, table in tables.items()
        }
        inside = {"layers": self.layers.plain()} if self.layers else {}
        path.write_text(json.dumps({"format": _FORMAT, **plain, **inside}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read what `save` wrote.

        Raises:
            DataNotFound: there is no such file.
            DataError: the file is no record.
        """
        path = Path(path)
        if not path.is_file():
            raise DataNotFound("There is no record.", saw=str(path))
        try:
            plain = json.loads(path.read_text())
            if plain["format"] != _FORMAT:
                raise ValueError(plain["format"])
            record = cls()
            for name in ("batches", "epochs"):
                columns = {key: array("d", values) for key, values in plain[name].items()}
                [n] = {len(column) for column in columns.values()} or {0}
                getattr(record, name).extend(columns, n)
            if "layers" in plain:
                record.layers = LayerRecord.from_plain(plain["layers"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError("This file is no record of pellucid's.", saw=str(path)) from None
        return record

    def plot_loss(self) -> Figure:
        """Draw the training loss by batch, smoothed too, and the validation loss by epoch."""
        from .plots import plot_loss

        return plot_loss(self.batches, self.epochs)

    def plot_schedule(self) -> Figure:
        """Draw the learning rate and every other scheduled hyper-parameter by batch."""
        from .plots import plot_schedule

        return plot_schedule(self.batches)

    def plot(self) -> Figure:
        """Draw loss, metrics and learning rate side by side: the picture of a run."""
        from .plots import plot_run

        return plot_run(self.batches, self.epochs)

    def __repr__(self) -> str:
        epochs, batches = len(self.epochs), len(self.batches)
        ends = [f"{name} {self.epochs.last(name):.4g}" for name in self.epochs if name != "seconds"]
        return f"Record({epochs} epochs, {batches} batches{''.join(f', {end}' for end in ends)})"


_BLOCK = 1024
"""Values of a column that are kept together."""


class _Column:
    """Numbers in blocks that never move, each in as little memory as holds its values exactly.

    An array that grew would move again and again, and leave holes in the memory of a long run.
    """

    def __init__(self):
        self._blocks: list[np.ndarray] = []
        self._newest = array("d")

    def extend(self, values: Sequence[float]) -> None:
        self._newest.extend(values)
        while len(self._newest) >= _BLOCK:
            self._blocks.append(_narrowest(np.array(self._newest[:_BLOCK])))
            del self._newest[:_BLOCK]

    def values(self) -> np.ndarray:
        """Return all as one array, float64 (values,)."""
        return np.concatenate([*self._blocks, np.array(self._newest)], dtype=np.float64)

    def __getitem__(self, row: int) -> float:
        row = range(len(self))[row]  # raises IndexError
        block, i = divmod(row, _BLOCK)
        return float(self._blocks[block][i] if block < len(self._blocks) else self._newest[i])

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._newest)


def _narrowest(values: np.ndarray) -> np.ndarray:
    """Return values, float64 (n,), unchanged, in as little memory as holds them exactly."""
    once = np.broadcast_to(values[:1].copy(), values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        narrower = (values.astype(dtype) for dtype in (np.uint8, np.uint16, np.float32))
        for fewer in (once, *narrower):
            if np.array_equal(fewer, values, equal_nan=True):
                return fewer
    return values


def _unknown(name: str, columns: list[str]) -> UnknownName:
    return UnknownName(
        f"The record has no column {name!r}.",
        saw=f"it has {', '.join(columns) or 'none yet'}",
        do=did_you_mean(name, columns) if columns else "train first.",
    )
