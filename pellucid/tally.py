"""The numbers of one pass: they wait on the device, are read seldom, and go on record."""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteLoss, UnknownName, did_you_mean
from .metrics import MetricObject
from .record import Record
from .tree import map_leaves

READ_INTERVAL = 0.1
"""Seconds between two readings, the only moments in a pass when the host waits for the device."""

_CHUNK = 128
"""Numbers that wait one by one; then they are joined, still on the device, so that a fast loop
does not run through fresh memory (a 0-d tensor takes half a kilobyte)."""


class Tally:
    """The losses and metrics of one pass.

    Args:
        metrics: functions and objects by name; the objects are reset.
        record: where each training batch's numbers go once they are read; None keeps only the
            averages.
        hypers: names of the hyper-parameters that come with each batch.

    Attributes:
        n_readings: how often numbers were read; who shows them looks when it grows.
        non_finite: what to do with a training loss that is NaN or infinite: "stop" raises, "skip"
            leaves the batch out of the averages, "log" takes it as it is.
        skipped: on the device, how many steps were skipped; None if none can be.
        every: batches between two readings, for processes that must read at the same one; 0 goes
            by the clock.
    """

    def __init__(
        self, metrics: dict[str, Any], record: Record | None = None, hypers: Sequence[str] = ()
    ):
        self._functions = {n: m for n, m in metrics.items() if not isinstance(m, MetricObject)}
        self._objects = {n: m for n, m in metrics.items() if n not in self._functions}
        for metric in self._objects.values():
            metric.reset()
        self._part = "valid" if record is None else "train"
        self._record, self._epoch = record, len(record.epochs) if record is not None else 0
        self._names = ["batch", *hypers]
        self._last_row: tuple[float, ...] = ()
        self._waiting: list[Tensor] = []  # loss, metric, ..., loss, metric, ...
        self._chunks: list[Tensor] = []  # what waited before, joined
        self._weights: list[int] = []
        self._rows: list[tuple[float, ...]] = []
        self._sums = {f"{self._part}/{name}": 0.0 for name in ["loss", *self._functions]}
        self._n_items = 0
        self.n_readings = 0
        self.non_finite, self.skipped, self.every = "stop", None, 0
        self._next_reading = perf_counter() + READ_INTERVAL

    def add(
        self, loss: Tensor, preds: Any, targets: Any, n_items: int, row: tuple[float, ...]
    ) -> None:
        """Take in a batch, and read when it is time to.

        Args:
            loss: mean over the batch, 0-d.
            preds: the model's output, for the metrics.
            targets: likewise.
            n_items: the weight of the batch.
            row: its number in the pass, and the hyper-parameters.
        """
        numbers = [loss.detach() if loss.ndim == 0 else loss.detach().reshape(())]
        if self._functions or self._objects:
            preds = preds.detach() if isinstance(preds, Tensor) else map_leaves(_detached, preds)
            measuring = ""
            try:
                for name, metric in self._functions.items():
                    measuring = name
                    value = metric(preds, targets)
                    value = value if isinstance(value, Tensor) else loss.new_tensor(value)
                    numbers.append(value if value.ndim == 0 else value.reshape(()))
                for name, metric in self._objects.items():
                    measuring = name
                    metric.update(preds, targets)
            except Exception as error:
                note = f"raised in the metric {measuring!r}, which gives one number a batch"
                error.add_note(note)
                raise
        self._waiting += numbers  # all or nothing: no column may be shorter than another
        self._weights.append(n_items)
        self._rows.append(row)
        if len(self._waiting) >= _CHUNK:
            self._chunks.append(torch.stack(self._waiting))
            self._waiting = []
        due = len(self._rows) >= self.every if self.every else perf_counter() >= self._next_reading
        if due:
            self.read()

    def read(self) -> None:
        """Read all that waits in one transfer, and put it on record.

        Raises:
            NonFiniteLoss: a loss that goes on record is NaN or infinite.
        """
        if self._waiting:
            self._chunks.append(torch.stack(self._waiting))
        values = torch.cat(self._chunks).tolist() if self._chunks else []
        columns = {name: values[i :: len(self._sums)] for i, name in enumerate(self._sums)}
        weights = self._weights
        if self.non_finite == "skip":
            finite = map(math.isfinite, columns["train/loss"])
            weights = list(map(operator.mul, weights, finite))
        for name, column in columns.items():
            self._sums[name] += sum(
                x * weight for x, weight in zip(column, weights, strict=True) if weight
            )
        self._n_items += sum(weights)
        rows, self._rows, self._weights = self._rows, [], []
        self._last_row = rows[-1] if rows else self._last_row
        self._waiting, self._chunks = [], []
        self.n_readings += 1
        self._next_reading = perf_counter() + READ_INTERVAL
        if self._record is not None and rows:
            shared = dict(zip(self._names, zip(*rows, strict=True), strict=True))
            epoch = {"epoch": [self._epoch] * len(rows)}
            self._record.batches.extend(epoch | shared | columns, len(rows))
            if self.non_finite == "stop" and not all(map(math.isfinite, columns["train/loss"])):
                self._refuse_non_finite(self._record, columns["train/loss"], shared)

    def averages(self) -> dict[str, float]:
        """Return the means over all items read so far; NaN where there are none."""
        n = self._n_items or math.nan
        return {name: total / n for name, total in self._sums.items()}

    def results(self) -> dict[str, float]:
        """Read what waits; return averages, what metric objects compute, and the last hypers."""
        self.read()
        computed = {
            f"{self._part}/{name}": float(metric.compute())
            for name, metric in self._objects.items()
        }
        hypers = dict(zip(self._names[1:], self._last_row[1:], strict=False))
        skipped = {} if self.skipped is None else {"train/skipped": float(self.skipped)}
        return self.averages() | computed | hypers | skipped

    def _refuse_non_finite(
        self, record: Record, losses: list[float], row: dict[str, tuple[float, ...]]
    ) -> None:
        first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        column = record.batches["train/loss"]
        end = len(column) - len(losses) + first
        before = [f"{loss:.4g}" for loss in column[max(end - 3, 0) : end]]
        hypers = "".join(f", {name} {row[name][first]:.3g}" for name in self._names[1:])
        error = NonFiniteLoss(
            f"The training loss became {losses[first]} in epoch {self._epoch}, batch "
            f"{row['batch'][first]} (both counted from 0).",
            saw=f"the losses before it {', '.join(before) or '(none)'}{hypers}",
            do="a lower lr is the usual cure, learn.find_lr().plot() shows which.",
        )
        error.batch = row["batch"][first]
        raise error


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def check_monitored(name: str, metrics: Iterable[str], validates: bool) -> None:
    """Refuse a loss or metric that the epochs of a fit will not have; after the first is late.

    Args:
        name: of a column of `record.epochs`.
        metrics: by name.
        validates: whether there are validation data.

    Raises:
        UnknownName: it is no loss, no metric, and not of what both are measured on.
    """
    numbers = ["loss", *metrics]
    parts = ["train", "valid"] if validates else ["train"]
    known = [f"{part}/{number}" for part in parts for number in numbers]
    if name in [*known, "train/skipped"]:
        return
    # other columns, a schedule's for instance, are not known before
    elsewhere = re.sub("^(train|training|val|valid|validation|test)[/_]", "", str(name))
    measured = elsewhere in numbers or str(name).startswith(("train/", "valid/"))
    if measured or not isinstance(name, str):
        raise UnknownName(
            f"No epoch of this fit will have {name!r}.", do=did_you_mean(str(name), known)
        )
