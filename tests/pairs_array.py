"""Which techniques are trained together: a covering array of strength 2.

Every level of every factor meets every level of every other in at least one row (Cohen et al.,
1997, "The AETG system: an approach to testing based on combinatorial design", whose greedy choice
this is, without its dice).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

FACTORS: dict[str, tuple[str, ...]] = {
    "accumulate": ("none", "2", "3"),
    "precision": ("none", "bf16", "fp16"),
    "clip": ("none", "norm", "value"),
    "optimizer": ("SGD", "AdamW", "ByRole"),
    "ema": ("none", "EMA"),
    "freeze": ("none", "frozen"),
    "mixup": ("none", "MixUp"),
    "compile": ("none", "compiled"),
    "processes": ("1", "2"),
}

DEAR = ("compile", "processes")

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def all_pairs(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Give every two (factor, level) of different factors."""
    return [
        ((one, a), (other, b))
        for one, other in combinations(factors, 2)
        for a, b in product(factors[one], factors[other])
    ]


def missing(rows: Iterable[Row], factors: Mapping[str, Sequence[str]] = FACTORS) -> list[Pair]:
    """Give the pairs that no row holds."""
    rows = list(rows)
    return [pair for pair in all_pairs(factors) if not any(holds(row, pair) for row in rows)]


def holds(row: Row, pair: Pair) -> bool:
    return all(row.get(factor) == level for factor, level in pair)


def covering_array(factors: Mapping[str, Sequence[str]] = FACTORS) -> list[Row]:
    """Make rows, each begun with a pair that is still missing and filled to hold most others.

    Where levels hold as many, it is the one seldom taken, so that no row is empty; but the first
    of what costs seconds.
    """
    rows: list[Row] = []
    while left := missing(rows, factors):
        row = dict(left[0])
        for factor in sorted(factors, key=lambda name: -len(factors[name])):
            if factor not in row:
                taken = Counter() if factor in DEAR else Counter(r[factor] for r in rows)
                worth = {v: (n_new(row, (factor, v), left), -taken[v]) for v in factors[factor]}
                row[factor] = max(worth, key=worth.__getitem__)
        rows.append({factor: row[factor] for factor in factors})
    return rows


def n_new(row: Row, place: tuple[str, str], left: Sequence[Pair]) -> int:
    """Count the missing pairs that a level makes with what the row has already."""
    return sum(place in pair and all(item in row.items() or item == place for item in pair)
               for pair in left)  # fmt: skip


def name_of(row: Row) -> str:
    """Say a row in words, without what is not there."""
    return ", ".join(f"{k}={v}" for k, v in row.items() if v != "none")
