"""How sure a mean of few numbers is: Student's t and the interval made with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import SetupError


def t_probability(t: float, df: int) -> float:
    """Return P(|T| <= t) for T of Student's distribution with `df` degrees of freedom.

    For whole degrees of freedom this is a finite sum (Abramowitz and Stegun, "Handbook of
    Mathematical Functions", 1964, 26.7.3 and 26.7.4): with θ = atan(t / √df),
    2θ/π + (2/π) sin θ (cos θ + 2/3 cos³θ + 2·4/(3·5) cos⁵θ + ...) for an odd df,
    sin θ (1 + 1/2 cos²θ + 1·3/(2·4) cos⁴θ + ...) for an even one, up to cos θ to the df - 2.

    Args:
        t: 0 or more.
        df: 1 or more.
    """
    _check_df(df)
    return _within(math.atan(t / math.sqrt(df)), df)


def t_quantile(p: float, df: int) -> float:
    """Return the t with P(T <= t) = p for Student's distribution with `df` degrees of freedom.

    Found by halving the angle atan(t / √df), in which `t_probability` is a finite sum: right to
    about twelve digits.

    >>> round(t_quantile(0.975, 4), 3)
    2.776

    Args:
        p: between 0 and 1.
        df: 1 or more.

    Raises:
        SetupError: p or df is outside its range.
    """
    _check_df(df)
    if not 0 < p < 1:
        raise SetupError("A probability must lie between 0 and 1.", saw=f"p={p}")
    wanted, low, high = abs(2 * p - 1), 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:  # until no float is left in between
        low, high = (middle, high) if _within(middle, df) < wanted else (low, middle)
    return math.copysign(math.sqrt(df) * math.tan(high), p - 0.5) if wanted else 0.0


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation with n - 1; NaN where there are too few values.

    >>> mean_and_sd([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (n - 1)) if n > 1 else math.nan


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the confidence interval of the mean of independent values.

    mean ± t · sd / √n, with t the (1 + confidence) / 2 quantile of Student's distribution with
    n - 1 degrees of freedom (Student, "The probable error of a mean", Biometrika 6, 1908). Exact
    for normal values. Of values that are differences of pairs it is the paired interval.

    Args:
        values: n finite numbers.
        confidence: between 0 and 1.

    Returns:
        (low, high), or None for less than two values, which tell nothing of their spread.
    """
    if not 0 < confidence < 1:
        raise SetupError("A confidence must lie between 0 and 1.", saw=f"{confidence}")
    if len(values) < 2:
        return None
    mean, sd = mean_and_sd(values)
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def _within(angle: float, df: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, df, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _check_df(df: int) -> None:
    if df < 1:
        raise SetupError("Degrees of freedom are 1 or more.", saw=f"df={df}")
