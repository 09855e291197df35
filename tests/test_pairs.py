"""Techniques in pairs: every two of them together, against one loop in plain torch.

tests/pairs_array.py says which are trained together, tests/pairs_by_hand.py is the loop,
tests/pairs_by_callbacks.py is the library's side. Rows of two processes go through one torchrun.
"""

import os
import subprocess
import sys
from functools import cache
from itertools import permutations
from pathlib import Path

import pairs_by_callbacks
import pairs_by_hand
import pytest
import torch
from pairs_array import FACTORS, Row, all_pairs, covering_array, missing, name_of
from pairs_by_hand import Trained

import pellucid

ROWS = {name_of(row): row for row in covering_array()}
ALONE = [name for name, row in ROWS.items() if row["processes"] == "1"]
IN_TWO = [name for name in ROWS if name not in ALONE]

TOLERANCE_IN_HALF = 2e-5


# ── the array ───────────────────────────────────────────────────────────────────────────────────


def test_every_level_meets_every_other():
    assert len(all_pairs(FACTORS)) == 214
    assert missing(ROWS.values()) == []
    assert len(ROWS) <= 20


def test_a_pair_that_is_missing_is_seen():
    rows = list(ROWS.values())
    assert missing(rows[:-1])
    assert missing([row | {"ema": "none"} for row in rows])
    assert len(missing([])) == len(missing([{}])) == 214
    lone = {"a": ("0", "1"), "b": ("0", "1")}
    assert len(covering_array(lone)) == 4
    assert missing(covering_array(lone)[:3], lone) == [(("a", "1"), ("b", "1"))]


# ── the rows ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch):
    monkeypatch.setattr(pellucid.muon, "choose_precision", pairs_by_callbacks.float32)


@cache
def by_callbacks(name: str) -> Trained:
    return pairs_by_callbacks.train(ROWS[name])


def by_hand(row: Row) -> Trained:
    return pairs_by_hand.train(row, pairs_by_callbacks.draw)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Trained]]:
    folder = tmp_path_factory.mktemp("pairs")
    root = str(Path(pellucid.__file__).parents[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", pairs_by_callbacks.__file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(2)]


def apart(ours: Trained, theirs: Trained, rank: int = 0) -> float:
    """Return the largest difference of all numbers of all states, and of losses relative to 1."""
    states = [(ours.plain[0], theirs.plain[rank]), (ours.final, theirs.final)]
    differences = [0.0]
    for one, other in states:
        assert list(one) == list(other)
        differences += [(one[k].double() - other[k].double()).abs().max().item() for k in one]
    for one, other in (
        (ours.train_losses, theirs.train_losses), (ours.valid_losses, theirs.valid_losses)
    ):  # fmt: skip
        differences += [abs(a - b) / 10 for a, b in zip(one, other, strict=True)]
    return max(differences)


def allowed(row: Row) -> float:
    """Say how far apart two runs may be that differ in the order of their sums alone."""
    if row["optimizer"] != "ByRole":
        return 1e-6 if row["processes"] == "2" else 0.0
    # Muon by hand goes matrix by matrix, and half precision makes more of a last bit
    return 1e-6 if row["precision"] == "none" else TOLERANCE_IN_HALF


@pytest.mark.parametrize("name", ALONE)
def test_a_row_is_trained_as_by_hand(name):
    row = ROWS[name]
    assert apart(by_callbacks(name), by_hand(row)) <= allowed(row)


@pytest.mark.parametrize("name", IN_TWO)
def test_a_row_in_two_processes_is_trained_as_by_hand(name, ranks):
    row = ROWS[name]
    theirs = by_hand(row)
    for rank in range(2):
        assert apart(ranks[rank][name], theirs, rank) <= allowed(row)
    ours = [of_rank[name].final for of_rank in ranks]
    assert all(torch.equal(ours[0][key], ours[1][key]) for key in ours[0])


# ── that it could be wrong ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("factor", [name for name in FACTORS if name != "compile"])
def test_a_technique_that_was_left_out_would_be_seen(factor, ranks):
    """Or taken for another: every level of a row for every other."""
    for level, other in permutations(FACTORS[factor], 2):
        name = next(name for name, row in ROWS.items() if row[factor] == level)
        ours = by_callbacks(name) if name in ALONE else ranks[0][name]
        assert apart(ours, by_hand(ROWS[name] | {factor: other})) > 100 * TOLERANCE_IN_HALF


def test_fp16_overflows_in_these_runs(monkeypatch):
    """Skipped steps are among what the rows compare."""
    steps = []
    monkeypatch.setattr(pairs_by_hand, "clip", lambda params, how: steps.append(how))
    [row, *_] = [ROWS[name] for name in ALONE if "fp16" in name]
    by_hand(row)
    assert 0 < len(steps) < len(pairs_by_hand.training()) * pairs_by_hand.EPOCHS
