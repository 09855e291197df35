"""Schedules: pure functions from the position in a run, 0 to 1, to a value.

    >>> linear(1, 2)(0.3)
    1.3
    >>> round(combine([0.3, 0.7], [cosine(0.3, 0.6), cosine(0.6, 0.2)])(0.15), 6)
    0.45

Anything that maps a float to a float may stand where a schedule is asked for; what is defined here
also pickles, compares and shows its arguments.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch.optim import Optimizer

from .errors import SetupError

Schedule = Callable[[float], float]


@runtime_checkable
class Scheduled(Protocol):
    """A callback that follows schedules; `learn.plan()` draws them."""

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, Schedule]:
        """Return by name what will be set for a batch, as a function of the position in the run.

        Args:
            opt: the optimiser of the fit.
            epochs: how long it shall be.
        """
        ...


@dataclass(frozen=True)
class Curve:
    """A formula (position, start, end) -> value with its start and end filled in."""

    formula: Callable[[float, float, float], float]
    start: float
    end: float

    def __call__(self, position: float) -> float:
        """Return the value at a position from 0 to 1."""
        return self.formula(position, self.start, self.end)

    def __repr__(self) -> str:
        name = getattr(self.formula, "__name__", "curve").strip("_")
        if self.formula is _constant:
            return f"{name}({self.start:g})"
        return f"{name}({self.start:g}, {self.end:g})"


@dataclass(frozen=True)
class Sequel:
    """Schedules one after the other, each stretched over its share of the run."""

    fractions: tuple[float, ...]
    schedules: tuple[Schedule, ...]

    def __call__(self, position: float) -> float:
        """Return the value at a position from 0 to 1."""
        begin = 0.0
        for fraction, schedule in zip(self.fractions, self.schedules, strict=True):
            if position < begin + fraction:
                return schedule((position - begin) / fraction)
            begin += fraction
        return self.schedules[-1](1.0)

    def __repr__(self) -> str:
        shares = ", ".join(f"{fraction:g}" for fraction in self.fractions)
        return f"combine([{shares}], {list(self.schedules)})"


def constant(value: float) -> Curve:
    """Stay at `value`."""
    return Curve(_constant, value, value)


def linear(start: float, end: float) -> Curve:
    """Go in a straight line."""
    return Curve(_linear, start, end)


def cosine(start: float, end: float) -> Curve:
    """Follow half a wave of the cosine: flat, steep, flat (Loshchilov and Hutter, SGDR, 2017)."""
    return Curve(_cosine, start, end)


def exponential(start: float, end: float) -> Curve:
    """Multiply by the same factor in every equal stretch.

    Raises:
        SetupError: start and end are not both above or both below 0.
    """
    if start * end <= 0:
        raise SetupError(
            "An exponential schedule cannot reach or cross 0.",
            saw=f"start {start:g}, end {end:g}",
            do="take a small end such as 1e-6, or linear(start, end).",
        )
    return Curve(_exponential, start, end)


def combine(fractions: Sequence[float], schedules: Sequence[Schedule]) -> Sequel:
    """Run `schedules` one after the other, the i-th for `fractions[i]` of the run.

    Args:
        fractions: shares of the run, each >= 0, together 1.
        schedules: as many schedules; each sees its own stretch as 0 to 1.

    Raises:
        SetupError: the shares do not add up to 1, the numbers of both differ, or a schedule is no
            function.
    """
    fractions, schedules = tuple(fractions), tuple(schedules)
    if not all(map(callable, schedules)):
        raise SetupError(
            "A schedule is a function of the position, 0 to 1.",
            saw=f"{list(schedules)}",
            do="schedules.constant(0.1) makes one of a number.",
        )
    if not math.isclose(sum(fractions), 1, abs_tol=1e-6) or min(fractions, default=0) < 0:
        raise SetupError(
            "The fractions of a combined schedule must be >= 0 and add up to 1.",
            saw=f"{list(fractions)}, sum {sum(fractions):g}",
            do="phases(0.3, 0.2) completes them to (0.3, 0.2, 0.5).",
        )
    if len(fractions) != len(schedules):
        raise SetupError(
            "A combined schedule needs one fraction for each schedule.",
            saw=f"{len(fractions)} fractions, {len(schedules)} schedules",
        )
    return Sequel(fractions, schedules)


def phases(*fractions: float) -> tuple[float, ...]:
    """Complete shares of a run with the rest: `phases(0.3)` is (0.3, 0.7)."""
    return (*fractions, 1 - sum(fractions))


def one_cycle(high: float, start: float = 25, end: float = 1e5, warmup: float = 0.25) -> Sequel:
    """Rise from high / start to `high`, then fall to high / end, both by cosine.

    Smith and Topin, "Super-convergence", 2018, in the cosine form.

    Args:
        high: the highest value.
        start: divides `high` for the first value.
        end: divides `high` for the last value.
        warmup: share of the run that rises, in (0, 1).
    """
    return combine(phases(warmup), [cosine(high / start, high), cosine(high, high / end)])


def _constant(position: float, start: float, end: float) -> float:
    return start


def _linear(position: float, start: float, end: float) -> float:
    return start + position * (end - start)


def _cosine(position: float, start: float, end: float) -> float:
    return start + (1 + math.cos(math.pi * (1 - position))) * (end - start) / 2


def _exponential(position: float, start: float, end: float) -> float:
    return start * (end / start) ** position
