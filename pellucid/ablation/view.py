"""An ablation study as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from ..plots import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .effects import Ablation, Effect, Row

_BLUE, _ORANGE, _GREY = "#2166ac", "#d6604d", "#8c8c8c"

_MAX_FAILURES = 5
"""Failed runs that a table lists; all are in `Ablation.failures`."""


def table(found: Ablation, metric: str | None = None, confidence: float = 0.95) -> str:
    """Return a study as text: a line a configuration, effects with intervals, what failed."""
    study = found.study
    size = f"{len(study.configurations())} configurations × {_plural(len(study.seeds), 'seed')}"
    if not any(run.values for run in found.runs):
        return "\n".join([f"{size}; no run has come to a result", *_failures(found)])
    metric = found.metric(metric)
    rows, effects = found.rows(metric), found.effects(metric, confidence)
    show = _format_of(rows, effects)
    means = [[row.name, show(row.mean), show(row.sd)] for row in rows]
    tests = [_test(effect, show) for effect in effects]
    troubles = [row.trouble for row in rows]
    if study.grid == "full":
        compared = "effects by seed"
        parts = [
            [["", "effect", "interval", "", "higher"], *tests],
            [["", "mean", "sd", ""], *([*m, t] for m, t in zip(means, troubles, strict=True))],
        ]
    else:
        compared = f'differences to "{rows[0].name}" by seed'
        tests = [[""] * 5, *tests]
        lines = [[*m, *t[1:], w] for m, t, w in zip(means, tests, troubles, strict=True)]
        parts = [[["", "mean", "sd", "difference", "interval", "", "higher", ""], *lines]]
    head = f"{metric}, {size}; {compared}, {100 * confidence:.3g} % intervals"
    body = "\n\n".join(map(_columns, parts))
    return "\n".join([head, body, *_remarks(found, effects, confidence), *_failures(found)])


def plot_ablation(found: Ablation, metric: str | None = None, confidence: float = 0.95) -> Figure:
    """Draw a study: each seed's value by configuration, and the effects with their intervals.

    Blue intervals leave out 0. Values that are not finite are named, not drawn.
    """
    metric = found.metric(metric)
    rows, effects = found.rows(metric), found.effects(metric, confidence)
    drawing, [left, right] = figure(2, 5.2, 1.3 + 0.32 * max(len(rows), len(effects) + 1))
    _draw_values(left, rows)
    seeds = _plural(len(found.study.seeds), "seed")
    left.set(xlabel=metric.replace("_", " "), title=f"values of {seeds}, mean")
    full = found.study.grid == "full"
    what = "on minus off" if full else f'minus "{rows[0].name}"'
    if full:
        _name_lines(right, [effect.name for effect in effects])
    else:
        right.sharey(left)
        right.tick_params(labelleft=False)
    _draw_effects(right, effects, 0 if full else 1)  # the reference is in line 0
    right.set(
        xlabel=f"{what} (blue: the interval leaves out 0)",
        title=f"differences by seed, mean, {100 * confidence:.3g} % interval",
    )
    return drawing


def _draw_values(axes: Axes, rows: Sequence[Row]) -> None:
    _name_lines(axes, [row.name for row in rows])
    axes.margins(x=0.2 if any(row.trouble for row in rows) else 0.05)  # room for words
    for y, row in enumerate(rows):
        finite = [value for value in row.values if value is not None and math.isfinite(value)]
        axes.plot(finite, [y] * len(finite), "o", color=_GREY, alpha=0.6, markersize=4.5, mew=0)
        axes.plot([row.mean], [y], "|", color=_BLUE, markersize=13, mew=2.4)
        if row.trouble:
            axes.annotate(
                row.trouble, (1, y), xycoords=("axes fraction", "data"), color=_ORANGE,
                ha="right", va="center", fontsize=8, xytext=(-2, 0), textcoords="offset points",
            )  # fmt: skip


def _draw_effects(axes: Axes, effects: Sequence[Effect], first: int) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    for y, effect in enumerate(effects, first):
        colour = _BLUE if effect.clear else _GREY
        each = effect.differences
        axes.plot(each, [y - 0.22] * len(each), "o", color=colour, alpha=0.45, markersize=4, mew=0)
        if effect.interval:
            axes.plot(effect.interval, [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([effect.mean], [y], "D", color=colour, markersize=5.5)


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top


def _test(effect: Effect, show: _Format) -> list[str]:
    low, high = effect.interval or (math.nan, math.nan)
    between = f"[{show(low, '+')}, {show(high, '+')}]" if effect.interval else "-"
    star = "*" if effect.clear else ""
    higher = f"{effect.n_higher} of {effect.n}"
    return [effect.name, show(effect.mean, "+"), between, star, higher]


class _Format:
    """Numbers with two digits of their usual spread."""

    def __init__(self, spreads: Sequence[float]):
        real = [spread for spread in spreads if math.isfinite(spread) and spread > 0]
        self._decimals = max(1 - math.floor(math.log10(median(real))), 0) if real else -1

    def __call__(self, number: float, sign: str = "") -> str:
        if math.isnan(number):
            return "-"
        fixed = 0 <= self._decimals <= 8
        return f"{number:{sign}.{self._decimals}f}" if fixed else f"{number:{sign}.4g}"


def _format_of(rows: Sequence[Row], effects: Sequence[Effect]) -> _Format:
    spreads = [row.sd for row in rows]
    return _Format(spreads if any(sd > 0 for sd in spreads) else [abs(e.mean) for e in effects])


def _columns(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text: the first column to the left, the others to the right."""
    names, *columns = zip(*lines, strict=True)
    aligned = [[name.ljust(max(map(len, names))) for name in names]]
    for column in filter(any, columns):  # what is empty throughout is left out
        aligned.append([cell.rjust(max(map(len, column))) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*aligned, strict=True))


def _remarks(found: Ablation, effects: Sequence[Effect], confidence: float) -> list[str]:
    if all(effect.n < 2 for effect in effects):
        few = "one seed tells" if len(found.study.seeds) == 1 else "less than two differences tell"
        return [f"{few} nothing of the spread: no intervals"]
    if not any(effect.clear for effect in effects):
        return []
    return [f"* leaves out 0; by chance alone, 1 interval in {1 / (1 - confidence):.3g} does"]


def _failures(found: Ablation) -> list[str]:
    lines = [
        f"failed: {found.study.name(run.on)}, seed {run.seed}: {run.reason}"
        for run in found.failures
    ]
    more = len(lines) - _MAX_FAILURES
    return lines[:_MAX_FAILURES] + ([f"... and {more} more, see .failures"] if more > 0 else [])


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'s'[: n != 1]}"
