"""Pictures of what went on inside a model: layers over time.

Each picture reads for five layers and for fifty: what cannot be told apart as lines is drawn as a
map, a row a layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError
from .histograms import ACTIVATIONS, GRADIENTS
from .layers import BINS, LayerRecord, checked_kind
from .plots import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

_FEW = 10
"""Up to so many layers have a line each in a legend; more are told by a scale of colours."""

_N_CELLS = 48
"""Cells of a histogram of activations, of equal width."""

_RARE = 1e-4
"""The share of values below which a histogram shows nothing."""

_UNKNOWN = "#bbbbbb"
"""The colour of NaN in a map: in none of its scales, where white has a meaning."""

_TALLEST = 12.0
"""Inches of a map, at most."""

_N_LABELS = 80
"""Names beside a map of that height, at most: more would lie one over another."""

_USUAL_UPDATE = 1e-3
"""What an update is of its weight where training goes well, as a rule of thumb."""


def plot_histograms(layers: LayerRecord, kind: str = "activations") -> Figure:
    """Draw the histograms of each layer over time, the colour telling how many (log scale)."""
    shown = _seen(layers, kind)
    columns, rows = _grid(len(shown))
    drawing = _empty(max(1.9 * columns, 5.0), max(1.65 * rows + 0.7, 2.6))
    _draw_histograms(drawing, layers, kind, shown)
    return drawing


def plot_levels(layers: LayerRecord, kind: str = "activations") -> Figure:
    """Draw mean and standard deviation of each layer over time."""
    shown = _seen(layers, kind)
    drawing, panels = figure(2, width=5.6)
    for axes, name in zip(panels, ("mean", "sd"), strict=True):
        _draw_lines(axes, layers, kind, name, shown)
    _tell_layers(drawing, panels, layers, shown)
    return drawing


def plot_shares(layers: LayerRecord) -> Figure:
    """Draw the shares of dead units, near-zero and saturated values as maps, a row a layer."""
    shown = _seen(layers, "activations")
    names = ["dead", "near_zero"]
    if np.isfinite(layers["activations/saturated"]).any():
        names.append("saturated")
    drawing, panels = figure(len(names), width=4.4, height=_map_height(len(shown)))
    for axes, name in zip(panels, names, strict=True):
        _draw_shares(axes, layers, name, shown, labelled=axes is panels[0])
    return drawing


def plot_updates(layers: LayerRecord) -> Figure:
    """Draw the norm of each parameter's update over its own norm as a map, a row a parameter."""
    drawing, [axes] = figure(width=6.4, height=_map_height(len(layers.parameters)))
    _draw_updates(axes, layers)
    return drawing


def plot_layers(layers: LayerRecord) -> Figure:
    """Draw the whole: histograms of activations, levels, shares, gradients and updates."""
    shown = _seen(layers, "activations")
    columns, rows = _grid(len(shown))
    top = 1.5 * rows + 0.6
    middle, bottom = 3.2, max(_map_height(len(shown)), _map_height(len(layers.parameters)))
    drawing = _empty(max(1.6 * columns, 13.0), top + middle + bottom)
    parts: Any = drawing.subfigures(3, 1, height_ratios=[top, middle, bottom])
    _draw_histograms(parts[0], layers, "activations", shown)
    panels = list(parts[1].subplots(1, 3))
    for axes, (kind, name) in zip(
        panels, [("activations", "mean"), ("activations", "sd"), ("gradients", "sd")], strict=True
    ):
        _plain(axes)
        _draw_lines(axes, layers, kind, name, shown)
    _tell_layers(parts[1], panels, layers, shown)
    panels = list(parts[2].subplots(1, 3))
    _draw_shares(panels[0], layers, "dead", shown, labelled=True)
    _draw_shares(panels[1], layers, "near_zero", shown, labelled=False)
    _draw_updates(panels[2], layers)
    return drawing


# ── parts ─────────────────────────────────────────────────────────────────────────────────────


def _empty(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _seen(layers: LayerRecord, kind: str) -> list[int]:
    """Return the layers of which there is anything to draw, if only NaN."""
    seen = np.isfinite(layers[f"{checked_kind(kind)}/near_zero"]).any(axis=0)
    if not seen.any():
        raise DataError(
            f"No {kind} were recorded of the layers.", do="train with callbacks.Telemetry."
        )
    return [int(i) for i in np.flatnonzero(seen)]


def _grid(n: int) -> tuple[int, int]:
    """Return columns and rows for n panels, wider than high."""
    columns = min(n, max(5, math.ceil(math.sqrt(2 * n))))
    rows = math.ceil(n / columns)
    return math.ceil(n / rows), rows


def _map_height(n_rows: int) -> float:
    return min(max(0.16 * n_rows + 1.2, 2.6), _TALLEST)


def _label(layers: LayerRecord, i: int) -> str:
    name = layers.names[i]
    return name if name == layers.types[i] else f"{name} {layers.types[i]}"


def _shortened(name: str, length: int) -> str:
    """Return a name with as many of its first parts as initials as it takes; numbers stay."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > length and not part.isdigit():
            parts[i] = part[:1]
    short = ".".join(parts)
    return short if len(short) <= length else f"…{short[1 - length :]}"


def _times(layers: LayerRecord) -> np.ndarray:
    """Return the edges of the rows in batches, (rows + 1,): a row reaches up to the next."""
    batches = layers.batches
    return np.append(batches[:, 0], batches[-1, 1] + 1).astype(float)


def _draw_histograms(drawing: FigureBase, layers: LayerRecord, kind: str, shown: list[int]) -> None:
    from matplotlib.colors import LogNorm

    shares = layers[f"{kind}/histogram"][:, shown]
    heights, edges = _by_size(shares) if kind == "gradients" else _by_value(shares)
    columns, rows = _grid(len(shown))
    panels = drawing.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image: Any = None
    for place, axes in enumerate(panels.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        values = np.ma.masked_less(heights[:, place].T, _RARE)
        image = axes.pcolormesh(
            _times(layers), edges, values, norm=LogNorm(_RARE, 1), cmap="magma_r", rasterized=True
        )
        axes.set_title(_shortened(_label(layers, shown[place]), 24), fontsize=7.5, pad=3)
        axes.tick_params(labelsize=6.5, length=2)
        _tell_share_near_zero(axes, shares[-1, place, BINS[kind].zero])
    if kind == "gradients":
        _label_sizes(panels[0, 0], edges)
    drawing.supxlabel("training batch", fontsize=8)
    drawing.suptitle(f"{kind}: how many values of each size, over time", fontsize=10)
    bar = drawing.colorbar(image, ax=panels, pad=0.01, aspect=30 * min(rows, 2), extend="min")
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label("share of values", fontsize=7.5)


def _by_value(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread shares over cells of equal width, from where values begin to where they end.

    Returns:
        Shares (rows, layers, cells), and the edges of the cells. What is outside, less than 1 % of
        all, is counted in the cells at the ends.
    """
    bins = ACTIVATIONS.edges()
    bins[0], bins[-1] = 2 * bins[1], 2 * bins[-2]  # as if the open bins ended an octave on
    below = np.cumsum(np.nanmean(shares, axis=(0, 1)))
    low = bins[np.searchsorted(below, 0.005)]
    high = bins[np.searchsorted(below, 0.995) + 1]
    margin = (max(high, 0) - min(low, 0)) / _N_CELLS  # a cell beyond zero, so that zero is seen
    edges = np.linspace(min(low, -margin), max(high, margin), _N_CELLS + 1)
    reach = edges.copy()
    reach[0], reach[-1] = min(bins[0], edges[0]), max(bins[-1], edges[-1])
    overlap = np.minimum(bins[1:, None], reach[1:]) - np.maximum(bins[:-1, None], reach[:-1])
    return shares @ (overlap.clip(0) / np.diff(bins)[:, None]), edges


def _by_size(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shares by magnitude (rows, layers, octaves), and the octaves' edges as exponents of 2.

    The lowest is what is near zero; octaves in which there is nothing are left out at the ends.
    """
    zero = GRADIENTS.zero
    sizes = shares[..., zero:].copy()
    sizes[..., 1:] += shares[..., zero - 1 :: -1]
    used = np.flatnonzero(np.nanmax(sizes[..., 1:], axis=(0, 1)) >= _RARE) + 1
    first, last = (used[0], used[-1]) if len(used) else (1, 2)
    shown = np.concatenate(
        [sizes[..., :first].sum(-1, keepdims=True), sizes[..., first : last + 1]], -1
    )
    return shown, GRADIENTS.lowest + np.arange(first - 2, last + 1) / GRADIENTS.parts


def _label_sizes(axes: Axes, edges: np.ndarray) -> None:
    """Put powers of ten, and zero for the lowest cell, where `edges` are exponents of 2."""
    powers = range(math.ceil(edges[1] * math.log10(2)), math.floor(edges[-1] * math.log10(2)) + 1)
    powers = powers[:: max(1, math.ceil(len(powers) / 4))]
    places = [(edges[0] + edges[1]) / 2, *(power / math.log10(2) for power in powers)]
    axes.set_yticks(places, ["≈0", *(f"1e{power}" if power else "1" for power in powers)])


def _tell_share_near_zero(axes: Axes, share: float) -> None:
    """Write it in the corner, if most values are."""
    if share > 0.5:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
        axes.text(
            0.97,
            0.94,
            f"{share:.0%} ≈ 0",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=6.5,
            color="#b2182b",
            bbox=box,
        )


def _colours(n: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.92, max(n, 2)))


def _draw_lines(axes: Axes, layers: LayerRecord, kind: str, name: str, shown: list[int]) -> None:
    values, times = layers[f"{kind}/{name}"], layers.batches.mean(axis=1)
    marker = "o" if len(times) == 1 else ""
    for colour, i in zip(_colours(len(shown)), shown, strict=False):
        label = _shortened(_label(layers, i), 26)
        axes.plot(times, values[:, i], marker=marker, lw=1.1, color=colour, label=label)
    if name == "sd" and kind == "gradients" and (values > 0).any():
        axes.set_yscale("log")
    words = {"mean": "mean", "sd": "standard deviation"}
    axes.set(xlabel="training batch", title=f"{kind}: {words[name]}")
    axes.title.set_fontsize(9.5)


def _tell_layers(
    drawing: FigureBase, panels: list[Axes], layers: LayerRecord, shown: list[int]
) -> None:
    """Say which colour is which layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    if len(shown) <= _FEW:
        panels[-1].legend(
            *panels[0].get_legend_handles_labels(),
            frameon=False,
            fontsize=6.5,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.02),
        )
        return
    scale = ScalarMappable(cmap=ListedColormap(_colours(256)))
    bar = drawing.colorbar(scale, ax=panels, pad=0.01, aspect=30)
    places = np.linspace(0, len(shown) - 1, 5).round().astype(int)
    bar.set_ticks(
        list(places / (len(shown) - 1)),
        labels=[_shortened(_label(layers, shown[i]), 22) for i in places],
    )
    bar.ax.invert_yaxis()
    bar.ax.tick_params(labelsize=6.5)


def _draw_map(
    axes: Axes, layers: LayerRecord, values: np.ndarray, labels: list[str], cmap: str, norm: Any
) -> Any:
    rows = np.arange(len(labels) + 1) - 0.5
    image = axes.pcolormesh(_times(layers), rows, values.T, cmap=cmap, norm=norm, rasterized=True)
    axes.grid(visible=False)
    axes.set_facecolor(_UNKNOWN)
    axes.invert_yaxis()
    told = range(0, len(labels), math.ceil(len(labels) / _N_LABELS))
    axes.set_yticks(told, [_shortened(labels[i], 26) for i in told], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("training batch")
    return image


def _draw_shares(
    axes: Axes, layers: LayerRecord, name: str, shown: list[int], labelled: bool
) -> None:
    from matplotlib.colors import Normalize

    titles = {
        "dead": "share of dead units",
        "near_zero": "share of values near zero",
        "saturated": "share of saturated values",
    }
    values = layers[f"activations/{name}"][:, shown]
    labels = [_label(layers, i) for i in shown]
    image = _draw_map(axes, layers, values, labels, "Reds", Normalize(0, 1))
    if not labelled:
        axes.set_yticks([])
    axes.set_title(titles[name], fontsize=9.5)
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=35).ax.tick_params(labelsize=7)


def _draw_updates(axes: Axes, layers: LayerRecord) -> None:
    from matplotlib.colors import LogNorm

    norm = LogNorm(_USUAL_UPDATE / 100, _USUAL_UPDATE * 100, clip=False)
    # what does not move has no logarithm, and is below the scale all the same
    values = np.maximum(layers["parameters/update"], _USUAL_UPDATE / 1e3)
    image = _draw_map(axes, layers, values, layers.parameters, "RdBu_r", norm)
    axes.set_title("update over weight (white: 1e-3, the usual)", fontsize=9.5)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=35, extend="both", extendfrac=0.02)
    bar.ax.tick_params(labelsize=7)
