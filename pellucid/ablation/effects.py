"""What a study of switches found: each run's numbers, what each switch does, a table, a picture.

`ablation.ablate` makes the runs; here they are only read, also long after and elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, DataNotFound, PellucidError, SetupError, UnknownName, did_you_mean
from .intervals import mean_and_sd, mean_interval
from .journal import append_line, read_lines, replace_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRIDS = ("leave-one-out", "add-one-in", "full")

STUDY, RUNS = "study.json", "runs.jsonl"
"""The files of a study's folder: what was asked, and a line for each finished run."""

_FORMAT = "pellucid ablation 1"

_ROUNDING = 1e-12
"""Share of the values' size below which a difference is rounding, and counts as none."""


@dataclass(frozen=True)
class Study:
    """What was asked.

    Attributes:
        build: the name of the function that trains.
        code: a fingerprint of its code.
        switches: what each switch is when off and when on, in words.
        grid: one of `GRIDS`.
        seeds: in the order given.
        metric: the number that counts, or None for the first.
    """

    build: str
    code: str
    switches: dict[str, list[str]]
    grid: str
    seeds: list[int]
    metric: str | None = None

    def configurations(self) -> list[tuple[str, ...]]:
        """Return the switches that are on in each configuration, the reference first."""
        names = tuple(self.switches)
        if self.grid == "leave-one-out":
            return [names, *(tuple(n for n in names if n != left_out) for left_out in names)]
        if self.grid == "add-one-in":
            return [(), *((name,) for name in names)]
        states = product((True, False), repeat=len(names))
        return [tuple(n for n, on in zip(names, state, strict=True) if on) for state in states]

    def name(self, on: Sequence[str]) -> str:
        """Return what a configuration is called."""
        off = [name for name in self.switches if name not in on]
        if not on or not off:
            return "all off" if off else "all on"
        if len(off) == 1 and self.grid != "add-one-in":
            return f"without {off[0]}"
        return f"only {on[0]}" if len(on) == 1 else " + ".join(on)

    def write(self, folder: Path) -> None:
        """Write what was asked into a study's folder."""
        replace_json(folder / STUDY, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Read what `write` wrote."""
        try:
            facts = json.loads((folder / STUDY).read_text("utf-8"))
            if facts.pop("format") != _FORMAT or facts["grid"] not in GRIDS:
                raise ValueError
            return cls(**facts)
        except FileNotFoundError:
            raise DataNotFound(f"There is no ablation study in {folder}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{folder / STUDY} is no study of pellucid's.") from None


@dataclass(frozen=True)
class Run:
    """One configuration, trained with one seed.

    Attributes:
        on: the switches that were on, in the study's order.
        seed: as given to `build`.
        values: what came of it, by name; empty if it failed.
        error: of a run that failed the reason, one line, and the traceback; else empty.
        seconds: how long it took.
    """

    on: tuple[str, ...]
    seed: int
    values: dict[str, float]
    error: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        return self.error.split("\n", 1)[0]

    def write(self, folder: Path, switches: Iterable[str]) -> None:
        """Add the run to a study's folder; it is on the disk when this returns."""
        row = asdict(self) | {"on": {name: name in self.on for name in switches}}
        append_line(folder / RUNS, row)

    @classmethod
    def read_all(cls, folder: Path, switches: Iterable[str]) -> list[Run]:
        """Return the runs of a study's folder in the order they were finished."""
        runs, names = [], set(switches)
        for number, row in enumerate(read_lines(folder / RUNS), 1):
            try:
                on = tuple(name for name in switches if row["on"][name])
                if set(row["on"]) != names or not isinstance(row["seed"], int):
                    raise ValueError
                values = {str(name): float(value) for name, value in row["values"].items()}
                runs.append(cls(on, row["seed"], values, str(row["error"]), float(row["seconds"])))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise DataError(
                    f"Line {number} of {folder / RUNS} is no run of the switches "
                    f"{', '.join(names)}.",
                    do="give the study a folder of its own.",
                ) from None
        return runs


@dataclass(frozen=True)
class Row:
    """One configuration over its seeds.

    Attributes:
        name: "all on", "without mixup" and the like.
        on: the switches that were on.
        values: a number for each seed; NaN as it came, None where there is none (yet).
        mean, sd: over the finite values; the standard deviation with n - 1.
        n: the number of finite values.
        trouble: what became of the others, in words.
    """

    name: str
    on: tuple[str, ...]
    values: list[float | None]
    mean: float
    sd: float
    n: int
    trouble: str


@dataclass(frozen=True)
class Effect:
    """What a switch does: the mean of differences between runs of the same seed.

    Attributes:
        name: the configuration that is compared with the reference; in a full grid the switch, or
            "a × b" for how much more a adds with b on than with b off.
        differences: one for each seed that has all the finite values it takes.
        mean: of the differences; NaN without any.
        interval: the confidence interval of the mean, `intervals.mean_interval`; None for fewer
            than two differences.
        n: the number of differences.
        n_higher: how many of them are above 0.
    """

    name: str
    differences: list[float]
    mean: float
    interval: tuple[float, float] | None
    n: int
    n_higher: int

    @classmethod
    def of(cls, name: str, differences: list[float], confidence: float) -> Effect:
        """Make it from its differences."""
        mean, _ = mean_and_sd(differences)
        higher = sum(difference > 0 for difference in differences)
        interval = mean_interval(differences, confidence)
        return cls(name, differences, mean, interval, len(differences), higher)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


class Ablation:
    """The runs of a study and what follows from them; prints as a table.

    Args:
        study: what was asked.
        runs: in any order; of several of one configuration and seed the last that came to an end
            counts.

    Attributes:
        runs: those that the study asks for, by configuration and seed; what is missing is left out.
    """

    def __init__(self, study: Study, runs: Iterable[Run]):
        self.study = study
        found: dict[tuple[tuple[str, ...], int], Run] = {}
        for run in runs:
            key = (run.on, run.seed)
            if key not in found or not run.error or found[key].error:
                found[key] = run
        asked = product(study.configurations(), study.seeds)
        self.runs = [found[key] for key in asked if key in found]

    @classmethod
    def load(cls, path: str | Path) -> Ablation:
        """Read a study's folder, also while its runs are still being made.

        Raises:
            DataNotFound: there is no study.
            DataError: its files are broken.
        """
        study = Study.read(Path(path))
        return cls(study, Run.read_all(Path(path), study.switches))

    def save(self, path: str | Path) -> Path:
        """Write study and runs into a new folder, as `ablate(..., path=...)` does as it goes."""
        folder = Path(path)
        if (folder / RUNS).exists():
            raise SetupError("There are runs in this folder already.", saw=str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.study.write(folder)
        for run in self.runs:
            run.write(folder, self.study.switches)
        return folder

    @property
    def failures(self) -> list[Run]:
        """The runs that ended in an error; `run.error` is the traceback."""
        return [run for run in self.runs if run.error]

    def raise_failures(self) -> Ablation:
        """Raise if any run failed; otherwise return the result itself.

        Raises:
            PellucidError: with the number of failures and the first one's traceback.
        """
        if failed := self.failures:
            raise PellucidError(
                f"{len(failed)} of {len(self.runs)} runs failed, the first of them "
                f"{self.study.name(failed[0].on)!r} with seed {failed[0].seed}.",
                saw=failed[0].error.strip().replace("\n", "\n       "),
            )
        return self

    @property
    def metrics(self) -> list[str]:
        """The names of what the runs returned, in the order of their coming, and "seconds"."""
        names = dict.fromkeys(name for run in self.runs for name in run.values)
        return [*names, "seconds"] if "seconds" not in names else list(names)

    def metric(self, name: str | None = None) -> str:
        """Return the number that is meant: `name`, the study's, or the first that measures quality.

        That is the first of the validation metrics, then the validation loss, then whatever came
        first.

        Raises:
            UnknownName: no run returned it.
        """
        name, names = name or self.study.metric, self.metrics
        if name is None:
            valid = [each for each in names if each.startswith("valid/")]
            return sorted(valid or names, key="valid/loss".__eq__)[0]
        if name not in names:
            what = f"No run returned {name!r}."
            raise UnknownName(what, saw=f"{', '.join(names)}", do=did_you_mean(name, names))
        return name

    def rows(self, metric: str | None = None) -> list[Row]:
        """Return the configurations, the reference first, each with its values over the seeds."""
        values, rows = self._values(self.metric(metric)), []
        for on in self.study.configurations():
            found = [values.get((on, seed)) for seed in self.study.seeds]
            finite = [value for value in found if value is not None and math.isfinite(value)]
            n_failed = sum(run.on == on for run in self.failures)
            trouble = {
                "failed": n_failed,
                "missing": found.count(None) - n_failed,
                "NaN": sum(value is not None and math.isnan(value) for value in found),
                "infinite": sum(value is not None and math.isinf(value) for value in found),
            }
            words = ", ".join(f"{n} {word}" for word, n in trouble.items() if n)
            rows.append(
                Row(self.study.name(on), on, found, *mean_and_sd(finite), len(finite), words)
            )
        return rows

    def effects(self, metric: str | None = None, confidence: float = 0.95) -> list[Effect]:
        """Return what each switch does, as means of differences between runs of the same seed.

        "leave-one-out" and "add-one-in": each configuration minus the reference. "full": for each
        switch the mean of all configurations with it on minus the mean of those with it off; then
        for each pair how much more the one adds with the other on than with it off.

        A seed counts for an effect if all the values that this takes are there and finite.

        Args:
            metric: which number; see `Ablation.metric`.
            confidence: of each interval by itself.
        """
        values, study = self._values(self.metric(metric)), self.study
        configurations = study.configurations()
        weights: dict[str, dict[tuple[str, ...], float]] = {}
        if study.grid == "full":
            sets = [c for size in (1, 2) for c in combinations(study.switches, size)]
            for chosen in sets:  # each half of the grid, or quarter, by its mean
                unit = 2 ** len(chosen) / len(configurations)
                weights[" × ".join(chosen)] = {
                    on: unit * math.prod(1 if name in on else -1 for name in chosen)
                    for on in configurations
                }
        else:
            reference, *others = configurations
            weights = {study.name(on): {on: 1, reference: -1} for on in others}
        return [
            Effect.of(name, _contrasts(values, by, study.seeds), confidence)
            for name, by in weights.items()
        ]

    def table(self, metric: str | None = None, confidence: float = 0.95) -> str:
        """Return configurations and effects as text; printing the result gives the same."""
        from .view import table

        return table(self, metric, confidence)

    def plot(self, metric: str | None = None, confidence: float = 0.95) -> Figure:
        """Draw every value, and beside them the effects with their intervals."""
        from .view import plot_ablation

        return plot_ablation(self, metric, confidence)

    def __repr__(self) -> str:
        return self.table()

    def _values(self, metric: str) -> dict[tuple[tuple[str, ...], int], float]:
        return {
            (run.on, run.seed): run.values.get(metric, run.seconds)
            for run in self.runs
            if metric in run.values or (metric == "seconds" and not run.error)
        }


def _contrasts(
    values: Mapping[tuple[tuple[str, ...], int], float],
    weights: Mapping[tuple[str, ...], float],
    seeds: Iterable[int],
) -> list[float]:
    """Return for each seed the weighted sum over configurations, if all of it is there."""
    totals = []
    for seed in seeds:
        terms = [weight * values.get((on, seed), math.nan) for on, weight in weights.items()]
        if math.isfinite(sum(terms)):
            total, size = math.fsum(terms), math.fsum(map(abs, terms))
            totals.append(total if abs(total) > _ROUNDING * size else 0.0)
    return totals
