"""What went on inside a model while it trained: per layer and per parameter, over time.

Memory is laid out once: when all rows are taken, neighbours are joined in pairs (sums added,
extremes kept), and from then on each row takes twice as many batches; so a run of any length fits,
all of it at one resolution.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, UnknownName, did_you_mean
from .histograms import ACTIVATIONS, GRADIENTS, Octaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("activations", "gradients")
BINS: dict[str, Octaves] = dict(zip(KINDS, (ACTIVATIONS, GRADIENTS), strict=True))

_N_FIELDS = 8  # those of `meters.FIELDS`
_N_SUMS = 10  # and the sum of the shares of dead units, and how many shares these are
_N, _SUM, _SQUARES, _LOW, _HIGH, _SAMPLED, _SAMPLED_SQUARES, _SATURATED = range(_N_FIELDS)
_DEAD, _N_DEAD = _N_FIELDS, _N_FIELDS + 1
_N_UPDATES = 3  # norm of a parameter, norm of its gradient, norm of its update over its own


class LayerRecord:
    """Statistics of layers and parameters, a row for each recorded batch, or for several.

    `layers["activations/sd"]` is an array (rows, layers), `layers["gradients/..."]` the same of the
    gradients with respect to the layers' outputs, `layers["parameters/..."]` (rows, parameters);
    NaN where nothing was measured. Iterating gives the names:

    - mean, sd (population form), abs_max: over all values;
    - near_zero: share of values under 0.001 (gradients: 4e-9), over a sample, as are the next;
    - saturated: share of values of a bounded activation at a bound, NaN for others;
    - dead: share of units that gave the same value for all inputs of a window of batches;
    - histogram: (rows, layers, bins) shares; `layers["activations/histogram"][-1, 4]` is the fifth
      layer's at the end, over bins with the edges `layers.edges("activations")`;
    - parameters/norm, /gradient (norms) and /update (norm of the update over norm of the weight,
      NaN for a weight of zeros).

    Args:
        names: of the layers, as in `model.named_modules()`.
        types: of the layers, "Conv2d" and the like.
        parameters: names of the parameters.
        capacity: rows, an even number; 192 take 230 KB a layer and 9 KB a parameter.

    Attributes:
        batches: int64 (rows, 2): the first and the last training batch of each row, over all fits.
    """

    def __init__(
        self,
        names: Sequence[str],
        types: Sequence[str],
        parameters: Sequence[str],
        capacity: int = 192,
    ):
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be an even number, 2 or more: {capacity}")
        self.names, self.types, self.parameters = list(names), list(types), list(parameters)
        n, n_bins = len(self.names), ACTIVATIONS.n_bins
        # filled, not empty: memory is taken now and not bit by bit during the run
        self._batches = np.full((capacity, 2), -1, dtype=np.int64)
        self._sums = np.full((capacity, 2, n, _N_SUMS), np.nan, dtype=np.float64)
        self._histograms = np.full((capacity, 2, n, n_bins), np.nan, dtype=np.float32)
        self._updates = np.full((capacity, len(self.parameters), _N_UPDATES), np.nan)
        self._n_updates = np.full_like(self._updates, np.nan)
        self._n_rows = self._n_in_last = 0
        self._n_per_row = 1

    def append(
        self,
        batches: tuple[int, int],
        rows: np.ndarray,
        dead: np.ndarray,
        updates: np.ndarray,
    ) -> None:
        """Add a recording, in a row of its own or to the last.

        Args:
            batches: the first and the last training batch it stands for, over all fits.
            rows: (2, layers, fields + bins), as `meters.Meters` measures them.
            dead: (2, layers), shares; NaN where nothing was measured, as in `updates`.
            updates: (parameters, 3): norm of the parameter, norm of its gradient, norm of the
                update over the parameter's.
        """
        told = ~np.isnan(updates)
        means = (np.where(np.isnan(dead), 0, dead), ~np.isnan(dead))
        new = (
            np.concatenate([rows[..., :_N_FIELDS], np.stack(means, axis=-1)], axis=-1),
            rows[..., _N_FIELDS:],
            np.where(told, updates, 0),
            told,
        )
        if self._n_in_last == self._n_per_row and self._n_rows == len(self._batches):
            self._halve()
        if self._n_in_last == self._n_per_row or not self._n_rows:
            self._write(slice(self._n_rows, self._n_rows + 1), batches, new)
            self._n_rows, self._n_in_last = self._n_rows + 1, 1
        else:
            last = slice(self._n_rows - 1, self._n_rows)
            both = (self._batches[last, 0].item(), batches[1])
            self._write(last, both, _joined(self._measured(last), new))
            self._n_in_last += 1

    def _halve(self) -> None:
        """Join rows 0 and 1, 2 and 3, ...; all of them are full."""
        half = self._n_rows // 2
        for row in range(half):  # one by one: copies of all rows would leave holes in the memory
            pair = [slice(2 * row + i, 2 * row + i + 1) for i in range(2)]
            batches = (self._batches[2 * row, 0].item(), self._batches[2 * row + 1, 1].item())
            self._write(slice(row, row + 1), batches, _joined(*map(self._measured, pair)))
        self._n_rows, self._n_in_last = half, 2 * self._n_per_row
        self._n_per_row *= 2

    def _measured(self, rows: slice) -> _Measured:
        arrays = (self._sums, self._histograms, self._updates, self._n_updates)
        return arrays[0][rows], arrays[1][rows], arrays[2][rows], arrays[3][rows]

    def _write(self, rows: slice, batches: np.ndarray | tuple[int, int], new: _Measured) -> None:
        self._batches[rows] = batches
        for array, values in zip(self._measured(rows), new, strict=True):
            array[...] = values

    @property
    def batches(self) -> np.ndarray:
        """Return the first and the last training batch of each row."""
        return self._batches[: self._n_rows].copy()

    def __getitem__(self, key: str) -> np.ndarray:
        """Return one statistic over time; see the class."""
        if key not in _READERS:
            raise UnknownName(f"There is no statistic {key!r} of layers.", do=self._instead(key))
        with np.errstate(divide="ignore", invalid="ignore"):
            return _READERS[key](self)

    def _instead(self, key: object) -> str:
        """Say what to write for a key that is no statistic."""
        if key in self.names:
            i = self.names.index(str(key))
            return f'a layer is a column of each: layers["activations/sd"][:, {i}].'
        ends = [name for name in _READERS if name.endswith(f"/{key}")]
        return f"did you mean {ends[0]!r}?" if ends else did_you_mean(str(key), _READERS)

    def edges(self, kind: str) -> np.ndarray:
        """Return the edges of the histograms' bins of "activations" or "gradients"."""
        return BINS[checked_kind(kind)].edges()

    def __iter__(self) -> Iterator[str]:
        return iter(_READERS)

    def __contains__(self, key: object) -> bool:
        return key in _READERS

    def __len__(self) -> int:
        return self._n_rows

    def of_kind(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return sums (rows, layers, 10) and histograms (rows, layers, bins), to read."""
        which = KINDS.index(checked_kind(kind))
        return self._sums[: self._n_rows, which], self._histograms[: self._n_rows, which]

    @property
    def updates(self) -> np.ndarray:
        """Return what `append` was given of the parameters, (rows, parameters, 3), as means."""
        with np.errstate(invalid="ignore"):  # NaN where there was nothing
            return self._updates[: self._n_rows] / self._n_updates[: self._n_rows]

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; arrays are compressed."""
        n = self._n_rows
        arrays = {name: getattr(self, f"_{name}")[:n] for name in _ARRAYS}
        return {
            "names": self.names,
            "types": self.types,
            "parameters": self.parameters,
            "capacity": len(self._batches),
            "rows": n,
            "recordings": [self._n_per_row, self._n_in_last],
            "arrays": {name: _packed(array) for name, array in arrays.items()},
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> LayerRecord:
        """Build from what `plain` gave; raises DataError if it is something else."""
        try:
            layers = cls(plain["names"], plain["types"], plain["parameters"], plain["capacity"])
            n = int(plain["rows"])
            layers._n_per_row, layers._n_in_last = map(int, plain["recordings"])
            for name in _ARRAYS:
                array = getattr(layers, f"_{name}")
                array[:n] = _unpacked(plain["arrays"][name], array[:n])
            layers._n_rows = n
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DataError("This is no record of layers.", saw=str(error)) from None
        return layers

    def plot(self) -> Figure:
        """Draw the whole: histograms, means and sds, dead shares, gradients and updates."""
        from .layers_plot import plot_layers

        return plot_layers(self)

    def plot_histograms(self, kind: str = "activations") -> Figure:
        """Draw the histograms of each layer over time, the colour telling how many.

        Rare values beyond the height of the panels are counted in the cells at their ends.
        """
        from .layers_plot import plot_histograms

        return plot_histograms(self, kind)

    def plot_levels(self, kind: str = "activations") -> Figure:
        """Draw mean and standard deviation of each layer over time."""
        from .layers_plot import plot_levels

        return plot_levels(self, kind)

    def plot_shares(self) -> Figure:
        """Draw the shares of dead units, near-zero and saturated values, layers against time."""
        from .layers_plot import plot_shares

        return plot_shares(self)

    def plot_updates(self) -> Figure:
        """Draw the norm of each parameter's update over its own, parameters against time."""
        from .layers_plot import plot_updates

        return plot_updates(self)

    def __repr__(self) -> str:
        counts = f"{len(self)} rows, {len(self.names)} layers, {len(self.parameters)} parameters"
        return f"LayerRecord({counts})"


_ARRAYS = ("batches", "sums", "histograms", "updates", "n_updates")

_Measured = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Sums, histograms, sums of the updates and how many updates these are, of some rows."""


def _joined(one: _Measured, other: _Measured) -> _Measured:
    with np.errstate(invalid="ignore"):  # inf and -inf
        sums, *rest = (a + b for a, b in zip(one, other, strict=True))
    sums[..., _LOW] = np.minimum(one[0][..., _LOW], other[0][..., _LOW])
    sums[..., _HIGH] = np.maximum(one[0][..., _HIGH], other[0][..., _HIGH])
    return sums, rest[0], rest[1], rest[2]


def checked_kind(kind: str) -> str:
    """Return "activations" or "gradients", raise UnknownName for anything else."""
    if kind not in KINDS:
        raise UnknownName(f"There are no {kind!r} of layers.", do=did_you_mean(str(kind), KINDS))
    return kind


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


def _unpacked(text: str, like: np.ndarray) -> np.ndarray:
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=like.dtype)
    return numbers.reshape(like.shape)


def _mean(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    return sums[..., _SUM] / sums[..., _N]


def _sd(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    squared_mean = _mean(sums, histograms) ** 2
    variance = sums[..., _SQUARES] / sums[..., _N] - squared_mean
    of_sample = sums[..., _SAMPLED_SQUARES] / sums[..., _SAMPLED]
    return np.sqrt(np.where(variance < 1e-3 * squared_mean, of_sample, variance))


def _abs_max(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    largest = np.maximum(np.abs(sums[..., _LOW]), np.abs(sums[..., _HIGH]))
    return np.where(sums[..., _N] > 0, largest, np.nan)


def _saturated(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    return sums[..., _SATURATED] / sums[..., _SAMPLED]


def _near_zero(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    return histograms[..., ACTIVATIONS.zero] / sums[..., _SAMPLED]


def _dead(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    return sums[..., _DEAD] / sums[..., _N_DEAD]


def _histogram(sums: np.ndarray, histograms: np.ndarray) -> np.ndarray:
    return histograms / sums[..., _SAMPLED, None]


_STATISTICS = {
    "mean": _mean,
    "sd": _sd,
    "abs_max": _abs_max,
    "near_zero": _near_zero,
    "saturated": _saturated,
    "dead": _dead,
    "histogram": _histogram,
}


def _of_layers(kind: str, name: str) -> Callable[[LayerRecord], np.ndarray]:
    return lambda layers: _STATISTICS[name](*layers.of_kind(kind))


_READERS: dict[str, Callable[[LayerRecord], np.ndarray]] = {
    **{f"{kind}/{name}": _of_layers(kind, name) for kind in KINDS for name in _STATISTICS},
    "parameters/norm": lambda layers: layers.updates[..., 0],
    "parameters/gradient": lambda layers: layers.updates[..., 1],
    "parameters/update": lambda layers: layers.updates[..., 2],
}
