"""Numbers to matplotlib figures. Nothing here needs a display or touches pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .record import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float] | np.ndarray

_BLUE, _ORANGE, _GREEN, _GREY = "#2166ac", "#d6604d", "#1b7837", "#8c8c8c"
_COLOURS = [_BLUE, _ORANGE, _GREEN, "#762a83", "#b8860b", "#5c5c5c"]


def figure(n_panels: int = 1, width: float = 5.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of `n_panels` panels side by side, each `width` by `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * n_panels, height), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = list(drawing.subplots(1, n_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return drawing, panels


def smooth(values: Numbers, beta: float = 0.98) -> np.ndarray:
    """Return the exponential moving average, corrected for its start; NaN values are passed over.

    Args:
        values: n numbers.
        beta: weight of the past, in [0, 1).

    Returns:
        Array (n,) of float64.
    """
    average, weight, smoothed = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, weight = beta * average + (1 - beta) * value, beta * weight + (1 - beta)
        smoothed[i] = average / weight if weight else np.nan
    return smoothed


def plot_loss(batches: Table, epochs: Table) -> Figure:
    """Draw the training loss by batch, raw and smoothed, and the validation loss by epoch."""
    drawing, [axes] = figure()
    _draw_loss(axes, batches, epochs)
    return drawing


def plot_schedule(batches: Table) -> Figure:
    """Draw learning rate and other hyper-parameters by batch."""
    return plot_columns({name: batches[name] for name in _hypers(batches)})


def plot_run(batches: Table, epochs: Table) -> Figure:
    """Draw a run in one row: loss, each metric, learning rate."""
    metrics = sorted({name.split("/")[1] for name in epochs if "/" in name and _is_result(name)})
    metrics = [name for name in metrics if name != "loss"]
    rates = [name for name in _hypers(batches) if name.split("/")[0] == "lr"]
    drawing, panels = figure(2 + len(metrics), width=4.6)
    _draw_loss(panels[0], batches, epochs)
    for axes, metric in zip(panels[1:], metrics, strict=False):
        _draw_metric(axes, metric, epochs)
    _draw_columns(panels[-1], {name: batches[name] for name in rates}, "learning rate")
    return drawing


def plot_columns(columns: Mapping[str, Numbers]) -> Figure:
    """Draw columns of numbers by batch, those of one kind ("lr/0", "lr/1") in one panel."""
    kinds = dict.fromkeys(name.split("/")[0] for name in columns)
    drawing, panels = figure(max(len(kinds), 1), width=4.6)
    for axes, kind in zip(panels, kinds, strict=False):
        _draw_columns(
            axes, {n: values for n, values in columns.items() if n.split("/")[0] == kind}, kind
        )
    return drawing


def plot_lr_search(
    lrs: Numbers,
    losses: Numbers,
    smoothed: Numbers,
    suggestion: float | None,
) -> Figure:
    """Draw loss against learning rate, and the suggested rate."""
    drawing, [axes] = figure()
    axes.plot(lrs, losses, color=_GREY, alpha=0.45, linewidth=1, label="loss")
    axes.plot(lrs, smoothed, color=_BLUE, linewidth=2, label="smoothed")
    if suggestion is not None:
        axes.axvline(
            suggestion, color=_ORANGE, linestyle="--", label=f"suggestion {suggestion:.2g}"
        )
    finite = np.asarray(smoothed)[np.isfinite(smoothed)]
    if len(finite):  # the explosion at the end must not flatten the valley
        low, high = np.nanmin(losses), finite[: max(len(finite) // 2, 1)].max()
        axes.set_ylim(low - 0.1 * (high - low), high + 0.35 * (high - low) + 1e-9)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend(frameon=False)
    return drawing


def plot_images(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Figure:
    """Draw images in a grid, a title over each.

    Args:
        images: (n, c, h, w) with c of 1 or 3, floats from 0 to 1.
        titles: n words.
        columns: images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    drawing = Figure(figsize=(1.15 * columns, 1.35 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    cells = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for cell in cells:
        cell.axis("off")
    for cell, image, title in zip(cells, images, titles, strict=False):
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        cell.imshow(np.clip(pixels, 0, 1), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        cell.set_title(title, fontsize=9)
    return drawing


def plot_init_study(names: Sequence[str], studies: Mapping[str, Mapping[str, Numbers]]) -> Figure:
    """Draw the standard deviations through depth: outputs, gradients and weights, a panel each.

    Args:
        names: of the layers, in order.
        studies: by label, each with the columns "sd", "grad_sd" and "weight_sd", an entry a layer;
            what is zero or not finite is a cross at the lower or the upper edge.
    """
    drawing, panels = figure(3, width=4.4)
    titles = {"sd": "outputs", "grad_sd": "gradients of weights", "weight_sd": "weights"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for colour, (label, study) in zip(_COLOURS * 9, studies.items(), strict=False):
            values, depth = np.asarray(study[column], float), np.arange(1, len(study[column]) + 1)
            good = np.isfinite(values) & (values > 0)
            marker = "o" if len(names) <= 20 else ""
            line = np.where(good, values, np.nan)
            axes.plot(depth, line, color=colour, marker=marker, markersize=4, label=label)
            for edge, off in ((0.02, values == 0), (0.98, ~np.isfinite(values))):
                at_edge = np.full(off.sum(), edge)
                where = axes.get_xaxis_transform()
                axes.plot(depth[off], at_edge, "x", color=colour, transform=where)
        axes.set(title=f"sd of {title}", yscale="log")
        axes.tick_params(which="minor", labelsize=7)
        _name_depths(axes, names)
    panels[0].axhline(1, color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
    if len(studies) > 1:
        panels[0].legend(frameon=False)
    return drawing


def _name_depths(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= 20:
        rotation = 90 if len("".join(names)) > 50 else 0
        axes.set_xticks(range(1, len(names) + 1), names, rotation=rotation, fontsize=8)
    else:
        axes.set_xlabel("layer")


def _draw_loss(axes: Axes, batches: Table, epochs: Table) -> None:
    losses = batches["train/loss"]
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(
        steps,
        smooth(losses, 1 - min(30 / len(losses), 1)),
        color=_BLUE,
        linewidth=1.8,
        label="train, smoothed",
    )
    if "valid/loss" in epochs:
        ends = np.searchsorted(batches["epoch"], np.arange(len(epochs)), side="right")
        axes.plot(ends, epochs["valid/loss"], "o-", color=_ORANGE, label="valid")
    _limit_to_bulk(axes, losses)
    axes.set(title="loss", xlabel="batch")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)


def _draw_metric(axes: Axes, metric: str, epochs: Table) -> None:
    numbers = np.arange(1, len(epochs) + 1)
    for part, colour in (("train", _BLUE), ("valid", _ORANGE)):
        if f"{part}/{metric}" in epochs:
            axes.plot(numbers, epochs[f"{part}/{metric}"], "o-", color=colour, label=part)
    axes.set(title=metric.replace("_", " "), xlabel="epoch")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)


def _draw_columns(axes: Axes, columns: Mapping[str, Numbers], title: str) -> None:
    lines = _alike(columns)
    for colour, (label, values) in zip(_COLOURS * 9, lines.items(), strict=False):
        axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.8, label=label)
    axes.set(title=title.replace("_", " "), xlabel="batch")
    axes.locator_params(axis="x", integer=True)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize="small")


def _alike(columns: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Join columns of the same values, which would be drawn one over the other, under one label."""
    names: dict[bytes, list[str]] = {}
    for name, values in columns.items():
        names.setdefault(np.asarray(values, dtype=np.float64).tobytes(), []).append(name)
    return {", ".join(map(_part, same)): columns[same[0]] for same in names.values()}


def _part(name: str) -> str:
    """Return the name of a parameter group in "lr/conv"."""
    return name.split("/", 1)[-1]


def _limit_to_bulk(axes: Axes, values: np.ndarray) -> None:
    """Let a few high values at the start leave the picture rather than flatten the rest."""
    finite = values[np.isfinite(values)]
    if len(finite) > 50:
        low, high = finite.min(), np.quantile(finite, 0.98)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low) + 1e-9)


def _is_result(name: str) -> bool:
    return name.split("/")[0] in ("train", "valid")


def _hypers(batches: Table) -> list[str]:
    return [name for name in batches if not _is_result(name) and name not in ("epoch", "batch")]
