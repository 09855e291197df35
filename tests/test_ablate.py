"""ablate: every run once, whatever interrupts it, and what follows from the runs."""

import io
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pellucid import DataLoaders, Learner, ablate, seed_everything
from pellucid.ablation.effects import Ablation, Run, Study
from pellucid.ablation.intervals import mean_interval
from pellucid.ablation.spawned import Died
from pellucid.callbacks import Progress
from pellucid.errors import DataError, DataNotFound, PellucidError, SetupError, UnknownName
from pellucid.metrics import accuracy

quietly = partial(ablate, progress="off")


# ── functions to study; worker processes find them here by their names ────────────────────────


def build(seed, a=False, b=False, c=False):
    return 10 * seed + a + 2 * b + 4 * a * b + 0.25 * c * (seed + 1)


def noisy(seed, a, b):
    """Fail, come to nothing, or draw from every generator."""
    if seed == 1 and not a:
        raise ValueError("no a\nin two lines")
    if seed == 2 and not b:
        return {"score": float("nan"), "steps": 3}
    drawn = random.random() + np.random.rand() + torch.rand(5).sum().item()
    product_of_many = (torch.randn(300, 300) @ torch.randn(300, 300)).sum().item()
    return {"score": drawn + product_of_many, "steps": 7 + b}


def trained(seed, wide, fast):
    x = torch.randn(40, 6)
    y = x[:, :3].argmax(1)
    data = DataLoaders.from_arrays((x[:30], y[:30]), (x[30:], y[30:]), batch_size=10, classes=3)
    model = nn.Sequential(nn.Linear(6, 16 if wide else 2), nn.ReLU(), nn.LazyLinear(3))
    learn = Learner(model, data, metrics=[accuracy], lr=0.1 if fast else 0.001)
    learn.fit(2, callbacks=[Progress("off")])
    return learn


# ── the grids, and what follows from them ─────────────────────────────────────────────────────


def configurations(found: Ablation) -> list[str]:
    return ["".join(row.on) for row in found.rows()]


def test_leaving_one_out_compares_with_all_on():
    found = quietly(build, ["a", "b", "c"], seeds=2)
    assert configurations(found) == ["abc", "bc", "ac", "ab"]
    assert [row.name for row in found.rows()] == ["all on", "without a", "without b", "without c"]
    assert [effect.name for effect in found.effects()] == ["without a", "without b", "without c"]
    assert [effect.differences for effect in found.effects()] == [[-5, -5], [-6, -6], [-0.25, -0.5]]
    last = found.effects()[2]
    assert (last.mean, last.n, last.n_higher) == (-0.375, 2, 0)
    assert last.interval == mean_interval([-0.25, -0.5])
    assert not last.clear
    assert last.interval[1] > 0


def test_adding_one_in_compares_with_all_off():
    found = quietly(build, ["a", "b", "c"], seeds=[3, 1], grid="add-one-in")
    assert configurations(found) == ["", "a", "b", "c"]
    assert [row.name for row in found.rows()] == ["all off", "only a", "only b", "only c"]
    assert found.rows()[0].values == [30, 10]
    assert [effect.differences for effect in found.effects()] == [[1, 1], [2, 2], [1, 0.5]]
    assert [effect.n_higher for effect in found.effects()] == [2, 2, 2]


def test_the_full_grid_gives_main_effects_and_how_pairs_work_together():
    found = quietly(build, ["a", "b", "c"], seeds=2, grid="full")
    assert len(found.rows()) == 8
    assert found.rows()[0].name == "all on"
    assert found.rows()[-1].name == "all off"
    effects = {effect.name: effect.differences for effect in found.effects()}
    assert list(effects) == ["a", "b", "c", "a × b", "a × c", "b × c"]
    # a adds 1, and 4 more where b is on, which it is in half of the grid
    assert effects["a"] == [3, 3]
    assert effects["b"] == [4, 4]
    assert effects["c"] == [0.25, 0.5]
    assert effects["a × b"] == [4, 4]
    assert effects["a × c"] == effects["b × c"] == [0, 0]


def test_the_full_grid_by_brute_force():
    values = {}

    def drawn(seed, **on):
        values[seed, tuple(on.items())] = value = random.random()
        return value

    found = quietly(drawn, list("wxyz"), seeds=3, grid="full")
    by_hand = []
    for seed in range(3):
        mean = {
            (x, z): statistics.fmean(
                v for (s, on), v in values.items() if s == seed and (on[1][1], on[3][1]) == (x, z)
            )
            for x, z in product([False, True], repeat=2)
        }
        by_hand.append((mean[1, 1] - mean[0, 1]) - (mean[1, 0] - mean[0, 0]))
    [effect] = [effect for effect in found.effects() if effect.name == "x × z"]
    assert effect.differences == pytest.approx(by_hand)


def test_rounding_is_no_difference():
    def same(seed, a, b, c):
        return random.random() + 0.1 * a + 0.2 * b  # what is drawn depends on the seed alone

    effects = {e.name: e for e in quietly(same, list("abc"), 5, grid="full").effects()}
    assert effects["c"].differences == effects["a × b"].differences == [0.0] * 5
    assert not effects["c"].clear
    assert effects["a"].clear


@pytest.mark.parametrize("grid, n", [("leave-one-out", 2), ("add-one-in", 2), ("full", 2)])
def test_one_switch_is_on_or_off(grid, n):
    found = quietly(build, ["a"], 1, grid=grid)
    assert {row.name for row in found.rows()} == {"all on", "all off"}
    assert len(found.rows()) == n
    assert len(found.effects()) == 1
    assert found.effects()[0].interval is None


def test_switches_take_any_pair_of_values():
    def act(seed, act, width=10, rate=1):
        return act(-1.0) * width * rate

    pairs = {"act": (abs, float), "rate": (1, 3)}
    found = quietly(partial(act, width=5), pairs, 1)
    assert [row.values for row in found.rows()] == [[-15], [15], [-5]]


# ── what build may return ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "result, values",
    [
        (2, {"value": 2.0}),
        (True, {"value": 1.0}),
        (np.float32(0.5), {"value": 0.5}),
        (torch.tensor(0.25), {"value": 0.25}),
        (torch.tensor([[0.25]], requires_grad=True), {"value": 0.25}),
        ({"loss": 1, "f1": torch.tensor(0.5)}, {"loss": 1.0, "f1": 0.5}),
    ],
)
def test_numbers_and_dicts_of_numbers_are_taken(result, values):
    [run, _] = quietly(lambda seed, a: result, ["a"], 1).runs
    assert run.values == values
    assert all(type(value) is float for value in run.values.values())


def test_a_learner_and_a_record_give_their_last_epoch():
    found = quietly(trained, ["wide", "fast"], 2)
    learn = trained_alone(1, wide=True, fast=False)
    [run] = [run for run in found.runs if run.on == ("wide",) and run.seed == 1]
    last = {name: value for name, value in learn.record.epochs[-1].items() if name != "seconds"}
    assert run.values == last
    assert found.metric() == "valid/accuracy"
    assert found.metric("valid/loss") == "valid/loss"
    assert found.metrics == [*last, "seconds"]
    assert found.effects("seconds")[0].n == 2
    record = quietly(lambda seed, a: learn.record, ["a"], 1)
    assert record.runs[0].values == last


def trained_alone(seed, **on):
    torch.manual_seed(seed)
    return trained(seed, **on)


@pytest.mark.parametrize("result", [None, "0.9", {}, {"a": None}, [1, 2], torch.ones(3), 1j, print])
def test_of_what_is_no_number_the_first_run_says_so(result):
    calls = []

    def broken(seed, a):
        calls.append(seed)
        return result

    with pytest.raises(SetupError, match=r"is of no use(.|\n)*return a number"):
        quietly(broken, ["a"], 4)
    assert calls == [0]


def test_a_record_without_an_epoch_is_of_no_use(data, model):
    with pytest.raises(SetupError, match=r"of no use\.\n  saw: nothing in it"):
        quietly(lambda seed, a: Learner(model, data), ["a"])


def test_no_number_after_some_numbers_is_a_failed_run():
    found = quietly(lambda seed, a: None if seed and a else 1.0, ["a"], 2)
    [run] = found.failures
    assert run.reason == "What build returned is of no use."


def test_the_number_that_counts_can_be_named():
    def both(seed, a):
        return {"loss": 2 - a, "accuracy": a}

    assert quietly(both, ["a"]).metric() == "loss"  # the first
    found = quietly(both, ["a"], metric="accuracy")
    assert found.effects()[0].mean == -1
    assert found.effects("loss")[0].mean == 1
    with pytest.raises(UnknownName, match="did you mean 'accuracy'"):
        found.effects("acuracy")
    calls = []
    with pytest.raises(UnknownName, match="did you mean 'accuracy'"):
        quietly(lambda seed, a: calls.append(0) or both(seed, a), ["a"], 9, metric="acuracy")
    assert len(calls) == 1  # told after the first run


# ── what is wrong is said before anything runs ────────────────────────────────────────────────


def never(seed, mixup=False, label_smoothing=0.0, *, ema=False):
    raise AssertionError("must not run")


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"switches": ["mixpu"]}, UnknownName, "no argument 'mixpu'(.|\n)*did you mean 'mixup'"),
        ({"switches": ["seed"]}, UnknownName, "no argument 'seed'"),
        ({"switches": "mixup"}, SetupError, r"switches=\['mixup'\]"),
        ({"switches": []}, SetupError, "no switch"),
        ({"switches": ["ema", "ema"]}, SetupError, "named twice"),
        ({"switches": {"label_smoothing": 0.1}}, SetupError, r"no two values(.|\n)*\(off, on\)"),
        ({"switches": {"label_smoothing": (0.1, 0.1)}}, SetupError, "the same off and on"),
        ({"switches": {"ema": (torch.zeros(2000), torch.eye(2000)[9])}}, SetupError, "print diff"),
        ({"switches": [3]}, SetupError, r"build's argument is\.\n  saw: 3"),
        ({"grid": "leave_one_out"}, UnknownName, "did you mean 'leave-one-out'"),
        ({"progress": True}, UnknownName, "no progress True"),
        ({"workers": -1}, SetupError, "workers=-1"),
        ({"workers": 1.0}, SetupError, "workers=1.0"),
        ({"seeds": 0}, SetupError, "at least one"),
        ({"seeds": [1, 1]}, SetupError, "different"),
        ({"seeds": [-1]}, SetupError, "from 0"),
        ({"seeds": [0.5]}, SetupError, "whole"),
        ({"seeds": True}, SetupError, "whole"),
        ({"build": 3}, SetupError, "nothing that can be called"),
        ({"build": lambda seed, mixup, depth: 0}, SetupError, "depth(.|\n)*partial"),
        ({"build": lambda *, mixup: 0}, SetupError, "cannot be called"),
        ({"build": lambda seed: 0}, UnknownName, r"def build\(seed, mixup\)"),
        ({"build": lambda seed, mixup: 0, "workers": 1}, SetupError, "cannot be given build"),
        ({"switches": {"ema": (0, lambda: 1)}, "workers": 1}, SetupError, "values of the switches"),
    ],
)
def test_a_slip_is_told_at_once(arguments, kind, text):
    with pytest.raises(kind, match=text):
        quietly(**{"build": never, "switches": ["mixup"], **arguments})


def test_any_keyword_will_do_for_a_function_that_takes_all():
    assert quietly(lambda seed, **on: on["anything"], ["anything"], 1).rows()[0].values == [1]


# ── runs that fail or come to nothing ─────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def troubled() -> Ablation:
    return quietly(noisy, ["a", "b"], 3)


def test_a_run_that_raises_is_kept_and_the_others_go_on(troubled):
    assert len(troubled.runs) == 9
    [run] = troubled.failures
    assert (run.on, run.seed, run.values) == (("b",), 1, {})
    assert run.reason == "ValueError: no a"
    assert "in noisy\n    raise ValueError" in run.error
    assert run.error.rstrip().endswith("in two lines")
    with pytest.raises(PellucidError, match=r"1 of 9 runs failed(.|\n)*seed 1(.|\n)*in noisy"):
        troubled.raise_failures()
    fine = quietly(build, ["a"], 1)
    assert fine.raise_failures() is fine


def test_nan_is_shown_and_not_averaged(troubled):
    rows = {row.name: row for row in troubled.rows("score")}
    assert rows["without a"].trouble == "1 failed"
    assert rows["without a"].values[1] is None
    assert rows["without b"].trouble == "1 NaN"
    assert math.isnan(rows["without b"].values[2])
    assert rows["without b"].n == 2
    assert rows["without b"].mean == statistics.fmean(rows["without b"].values[:2])
    effects = {effect.name: effect for effect in troubled.effects("score")}
    assert (effects["without a"].n, effects["without b"].n) == (2, 2)
    # the pairs are those of one seed
    reference = rows["all on"].values
    expected = [rows["without a"].values[seed] - reference[seed] for seed in (0, 2)]
    assert effects["without a"].differences == expected


def test_a_grid_without_any_result_says_so():
    found = quietly(lambda seed, a: 1 / 0, ["a"], 4)
    assert str(found).startswith("2 configurations × 4 seeds; no run has come to a result\nfailed:")
    assert str(found).count("ZeroDivisionError: division by zero") == 5
    assert str(found).endswith("... and 3 more, see .failures")
    found.plot()


# ── the table and the picture ─────────────────────────────────────────────────────────────────

TABLE = """\
value, 3 configurations × 6 seeds; differences to "all on" by seed, 95 % intervals
            mean     sd  difference          interval     higher
all on     0.930  0.037
without a  0.888  0.036      -0.036  [-0.043, -0.029]  *  0 of 5  1 failed
without b  0.912  0.016      -0.007  [-0.027, +0.012]     2 of 5     1 NaN
* leaves out 0; by chance alone, 1 interval in 20 does
failed: without a, seed 4: ValueError: broken"""

FULL_TABLE = """\
value, 4 configurations × 4 seeds; effects by seed, 90 % intervals
       effect          interval     higher
a      +0.035  [+0.028, +0.042]  *  4 of 4
b      +0.003  [-0.013, +0.018]     2 of 4
a × b  +0.000  [+0.000, +0.000]     0 of 4

            mean     sd
all on     0.910  0.026
without b  0.907  0.013
without a  0.875  0.024
all off    0.872  0.012
* leaves out 0; by chance alone, 1 interval in 10 does"""


def of_a_table(seed, a, b):
    if seed == 4 and not a:
        raise ValueError("broken")
    if seed == 5 and not b:
        return math.nan
    without_a, without_b = 0.03 + 0.01 * (seed % 2), 0.01 * seed - 0.0125
    return 0.88 + 0.02 * seed - (not a) * without_a - (not b) * without_b


def test_the_table_in_full():
    found = quietly(of_a_table, ["a", "b"], 6)
    assert str(found) == repr(found) == found.table() == TABLE
    full = quietly(of_a_table, ["a", "b"], 4, grid="full")
    assert full.table(confidence=0.9) == FULL_TABLE


def test_one_seed_has_a_table_without_intervals():
    text = str(quietly(build, ["a", "b"], 1))
    assert text.splitlines()[-1] == "one seed tells nothing of the spread: no intervals"
    assert text.splitlines()[3].split() == ["without", "a", "2.0", "-", "-5.0", "-", "0", "of", "1"]


def test_what_is_not_there_is_a_dash_in_the_table():
    text = str(quietly(lambda seed, a: math.nan if a else 1.0, ["a"], 3)).splitlines()
    assert text[2].split() == ["all", "on", "-", "-", "3", "NaN"]
    assert text[3].split() == ["all", "off", "1", "0", "-", "-", "0", "of", "0"]
    assert text[4] == "less than two differences tell nothing of the spread: no intervals"


@pytest.mark.parametrize("grid", ["leave-one-out", "add-one-in", "full"])
def test_the_picture_holds_every_number(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it would want a display
    found = quietly(of_a_table, ["a", "b"], 6, grid=grid)
    drawing = found.plot()
    left, right = drawing.axes
    names = [row.name for row in found.rows()]
    assert [label.get_text() for label in left.get_yticklabels()] == names
    dots = [line.get_xdata() for line in left.lines if line.get_marker() == "o"]
    finite = [[v for v in row.values if v is not None and v == v] for row in found.rows()]
    assert [list(xs) for xs in dots] == finite
    assert {text.get_text() for text in left.texts} == {r.trouble for r in found.rows()} - {""}
    effects = found.effects()
    means = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "D"]
    assert means == [effect.mean for effect in effects]
    intervals = [tuple(line.get_xdata()) for line in right.lines if line.get_linewidth() == 2.2]
    assert intervals == [effect.interval for effect in effects]
    picture = io.BytesIO()
    drawing.savefig(picture, format="png")
    assert picture.getvalue()[:4] == b"\x89PNG"


# ── meanwhile ─────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_printed_for_each_finished_run(capsys, tmp_path):
    ablate(noisy, ["a", "b"], 2, path=tmp_path, metric="steps")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 configurations × 2 seeds: 6 runs"
    assert [line.split(" (")[0] for line in lines[1:]] == [
        "1/6  all on, seed 0: steps 8",
        "2/6  without a, seed 0: steps 8",
        "3/6  without b, seed 0: steps 7",
        "4/6  all on, seed 1: steps 8",
        "5/6  without a, seed 1: failed: ValueError: no a",
        "6/6  without b, seed 1: steps 7",
    ]
    ablate(noisy, ["a", "b"], 2, path=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 configurations × 2 seeds: 6 runs, 5 of them in {tmp_path}"
    assert len(lines) == 2


def talkative(seed, a):
    print(f"epoch {seed}")
    return a


@pytest.mark.parametrize(
    "progress, n_ours, n_theirs", [("runs", 3, 0), ("all", 3, 2), ("off", 0, 0)]
)
def test_what_build_prints_is_held_back_unless_asked_for(progress, n_ours, n_theirs, capsys):
    ablate(talkative, ["a"], 1, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("epoch 0") == n_theirs
    assert len(lines) == n_ours + n_theirs


def test_the_time_left_is_told_once_it_is_a_minute(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr("pellucid.ablation.running.perf_counter", lambda: next(clock))
    ablate(build, ["a"], 2)
    ends = [line.split("(")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert ends == ["100.0 s, about 5 min left)", "100.0 s, about 3 min left)",
                    "100.0 s, about 2 min left)", "100.0 s)"]  # fmt: skip


def test_every_run_begins_with_its_seed():
    def drawn(seed, a):
        return {"torch": torch.rand(()), "numpy": np.random.rand(), "python": random.random()}

    for run in quietly(drawn, ["a"], [3, 5]).runs:
        seed_everything(run.seed)
        assert run.values == {name: float(value) for name, value in drawn(0, 0).items()}


def test_runs_leave_the_process_as_it_was():
    def meddle(seed, a):
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.rand(3), random.random(), np.random.rand()
        if a:
            raise ValueError
        return 1.0

    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad():
        quietly(meddle, ["a"], 2)
        assert not torch.is_grad_enabled()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (1, torch.float32)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


# ── in processes ──────────────────────────────────────────────────────────────────────────────


def bits(found: Ablation) -> list[str]:
    # by repr: NaN is not equal to itself
    return [repr((run.on, run.seed, run.values, run.reason)) for run in found.runs]


def test_the_results_are_the_same_bits_with_any_number_of_workers(troubled, tmp_path):
    torch.set_num_threads(2)
    for workers in (0, 2):
        found = quietly(noisy, ["a", "b"], 3, workers=workers, path=tmp_path / str(workers))
        assert bits(found) == bits(troubled)
        assert str(found) == str(troubled)
        assert bits(Ablation.load(tmp_path / str(workers))) == bits(troubled)
    assert torch.get_num_threads() == 2
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_costs_its_run_alone(monkeypatch, tmp_path):
    def calls(one, jobs, n_workers):  # tests/test_spawned.py has real deaths
        yield from ((n, Died(-9) if n == 2 else one(*job)) for n, job in enumerate(jobs))

    monkeypatch.setattr("pellucid.ablation.running.calls", calls)
    found = quietly(build, ["a"], 3, workers=1, path=tmp_path)
    assert [run.reason for run in found.failures] == [
        "the process was ended by signal 9 (Killed; out of memory?)"
    ]
    assert [row.n for row in found.rows()] == [2, 3]


WAITING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pellucid import ablate
from test_ablate import waits_at_2

if __name__ == "__main__":
    ablate(waits_at_2, ["a"], 3, path=sys.argv[1], workers=1)
"""


def waits_at_2(seed, a):
    if seed == 2:
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    return seed + a


def test_ctrl_c_ends_the_workers_and_keeps_what_is_finished(tmp_path):
    script, folder = tmp_path / "waits.py", tmp_path / "study"
    script.write_text(WAITING.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.stderr.rstrip().splitlines()[-2:] == [
        "KeyboardInterrupt",
        f"4 of 6 runs are kept in {folder}; the same call goes on from there",
    ]
    assert [run.values["value"] for run in Ablation.load(folder).runs] == [1, 2, 0, 1]


def test_ctrl_c_without_a_path_says_what_a_path_would_have_done():
    def stop(seed, a):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quietly(stop, ["a"], 1)
    [note] = caught.value.__notes__
    assert note == "0 of 2 runs are finished and lost; ablate(..., path=...) would have kept them"


# ── on file ───────────────────────────────────────────────────────────────────────────────────


class Counted:
    """`build`, which keeps count; may fail or stop the process at a run."""

    def __init__(self, stop_at=None, how=KeyboardInterrupt):
        self.calls, self.stop_at, self.how = [], stop_at, how

    def __call__(self, seed, a=False, b=False, c=False):
        if len(self.calls) == self.stop_at:
            raise self.how("stopped")
        self.calls.append((seed, a, b, c))
        return build(seed, a, b, c)


ALL = bits(quietly(build, ["a", "b"], 3))


@pytest.mark.parametrize("stop_at", range(10))
def test_the_same_call_goes_on_from_where_it_was_stopped(stop_at, tmp_path):
    first, then = Counted(stop_at), Counted()
    if stop_at < 9:
        with pytest.raises(KeyboardInterrupt) as caught:
            quietly(first, ["a", "b"], 3, path=tmp_path)
        assert caught.value.__notes__[0].startswith(f"{stop_at} of 9 runs are kept in {tmp_path};")
    else:
        quietly(first, ["a", "b"], 3, path=tmp_path)
    found = quietly(then, ["a", "b"], 3, path=tmp_path)
    assert bits(found) == ALL
    assert len(first.calls) == stop_at
    assert len(then.calls) == 9 - stop_at
    assert len(set(first.calls + then.calls)) == 9


def test_more_seeds_and_other_grids_use_what_is_there(tmp_path):
    counted = Counted()
    call = partial(quietly, counted, ["a", "b"], path=tmp_path)
    for n, seeds, grid, more in [
        (1, [5], "leave-one-out", 3),
        (2, [5, 1], "leave-one-out", 3),
        (3, [1, 5], "full", 2),
        (4, [5, 1], "add-one-in", 0),
        (5, [1], "leave-one-out", 0),
    ]:
        before = len(counted.calls)
        found = call(seeds=seeds, grid=grid)
        assert len(counted.calls) - before == more, n
        assert bits(found) == bits(quietly(build, ["a", "b"], seeds, grid=grid))
        assert bits(Ablation.load(tmp_path)) == bits(found)


def test_what_failed_is_tried_again(tmp_path):
    first = Counted(4, ValueError)
    found = quietly(first, ["a", "b"], 3, path=tmp_path)
    assert len(found.failures) == 5  # the fifth and all after it
    then = Counted()
    assert bits(quietly(then, ["a", "b"], 3, path=tmp_path)) == ALL
    assert len(then.calls) == 5
    assert not Ablation.load(tmp_path).failures


def test_a_torn_last_line_costs_one_run(tmp_path):
    quietly(Counted(), ["a", "b"], 3, path=tmp_path)
    runs = tmp_path / "runs.jsonl"
    whole = runs.read_bytes()
    for n_bytes in range(0, len(whole), 97):
        runs.write_bytes(whole[:n_bytes])
        Ablation.load(tmp_path)
        counted = Counted()
        assert bits(quietly(counted, ["a", "b"], 3, path=tmp_path)) == ALL
        assert len(counted.calls) == 9 - whole[:n_bytes].count(b"\n")
        assert bits(Ablation.load(tmp_path)) == ALL


def killed_at(instant: int, folder: Path) -> None:
    """Make a study, and be killed right before the n-th time that anything reaches the disk."""
    left = iter(range(instant))

    def dying(act):
        def acts(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)

        return acts

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    quietly(Counted(), ["a", "b"], 3, path=folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("instant", range(13))
def test_killed_at_any_instant_it_goes_on(instant, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=killed_at, args=(instant, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if instant < 12 else 0)
    counted = Counted()
    assert bits(quietly(counted, ["a", "b"], 3, path=tmp_path)) == ALL
    # content, name and folder of study.json, then a line a run, which is written before it is safe
    assert len(counted.calls) == 9 - max(min(instant - 2, 9), 0)


def test_a_result_is_saved_and_loaded(troubled, tmp_path):
    folder = troubled.save(tmp_path / "deep" / "er")
    loaded = Ablation.load(str(folder))
    assert bits(loaded) == bits(troubled)
    assert [run.error for run in loaded.runs] == [run.error for run in troubled.runs]
    assert [run.seconds for run in loaded.runs] == [run.seconds for run in troubled.runs]
    assert str(loaded) == str(troubled)
    with pytest.raises(SetupError, match="There are runs in this folder already"):
        troubled.save(folder)
    with pytest.raises(DataNotFound, match="no ablation study"):
        Ablation.load(tmp_path)


def test_a_study_can_be_read_while_its_runs_are_made(tmp_path):
    seen = []

    def looking(seed, a, b):
        seen.append(Ablation.load(tmp_path))
        return build(seed, a, b)

    quietly(looking, ["a", "b"], 3, path=tmp_path)
    assert [len(found.runs) for found in seen] == list(range(9))
    assert "no run has come to a result" in str(seen[0])
    assert [row.trouble for row in seen[4].rows()] == ["1 missing", "2 missing", "2 missing"]
    assert [effect.n for effect in seen[5].effects()] == [2, 1]


# ── a folder of another study ─────────────────────────────────────────────────────────────────


def other(seed, a, b):
    return seed


def variant(lr):
    space: dict[str, object] = {}
    exec(f"def train(seed, a=0, b=0):\n    return {lr} * (seed + a)", space)
    return space["train"]


@pytest.mark.parametrize(
    "function, switches, text",
    [
        (other, ["a", "b"], "build was build, is other"),
        (build, ["a", "c"], "the switches was a: False or True, b: False or True, is a: False"),
        (build, {"a": (False, True), "b": (False, 2)}, "b: False or 2"),
        (partial(build, c=True), ["a", "b"], r"build was build, is partial\(build, c=True\)"),
    ],
)
def test_a_folder_of_another_study_is_refused(function, switches, text, tmp_path):
    quietly(build, ["a", "b"], 1, path=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SetupError, match=f"are of another study(.|\n)*{text}(.|\n)*another path"):
        quietly(function, switches, 1, path=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_changed_function_is_refused_until_its_user_says_otherwise(tmp_path):
    old = quietly(variant(1), ["a", "b"], 1, path=tmp_path)
    quietly(variant(1), ["a", "b"], 2, path=tmp_path)
    with pytest.raises(
        SetupError, match=r"its code was \w{12}, is \w{12}(.|\n)*delete .*study.json"
    ):
        quietly(variant(2), ["a", "b"], 1, path=tmp_path)
    (tmp_path / "study.json").unlink()
    assert bits(quietly(variant(2), ["a", "b"], 1, path=tmp_path)) == bits(old)
    (tmp_path / "study.json").unlink()
    with pytest.raises(DataError, match=r"Line 1 of .* is no run of the switches"):
        quietly(variant(2), ["a"], 1, path=tmp_path)


def test_a_setting_of_a_function_around_is_part_of_the_study(tmp_path):
    def study(width):
        return lambda seed, a: width * seed + a

    quietly(study(1), ["a"], 2, path=tmp_path)
    quietly(study(1), ["a"], 3, path=tmp_path)
    with pytest.raises(SetupError, match=r"its code was \w{12}, is \w{12}"):
        quietly(study(2), ["a"], 3, path=tmp_path)


def test_of_runs_that_all_failed_a_mended_function_begins_anew(tmp_path):
    def train(seed, a):
        return 1 / 0

    quietly(train, ["a"], 1, path=tmp_path)

    def train(seed, a):
        return 1

    assert not quietly(train, ["a"], 1, path=tmp_path).failures
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    def twice(seed, a):
        return len(quietly(other, ["a", "b"], 1, path=tmp_path).runs)

    found = quietly(twice, ["a"], 1, path=tmp_path)
    assert f"Another process is making runs in {tmp_path}" in found.failures[0].reason
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="is a file"):
        quietly(build, ["a"], 1, path=tmp_path / "file")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "pellucid record 1"}'])
def test_a_broken_study_is_named(content, tmp_path):
    quietly(build, ["a"], 1, path=tmp_path)
    (tmp_path / "study.json").write_text(content)
    for call in (lambda: Ablation.load(tmp_path), lambda: quietly(build, ["a"], 1, path=tmp_path)):
        with pytest.raises(DataError, match=r"study\.json is no study"):
            call()


@pytest.mark.parametrize("part", ["on", "seed", "values", "error", "seconds"])
def test_a_broken_run_is_named(part, tmp_path):
    quietly(build, ["a"], 1, path=tmp_path)
    runs = tmp_path / "runs.jsonl"
    first, second = map(json.loads, runs.read_text().splitlines())
    for broken in ({**second, part: None}, {k: v for k, v in second.items() if k != part}):
        if part == "error" and part in broken:
            continue
        runs.write_text(f"{json.dumps(first)}\n{json.dumps(broken)}\n")
        with pytest.raises(DataError, match="Line 2 of"):
            Ablation.load(tmp_path)


def test_the_last_result_of_a_run_counts():
    study = Study("build", "", {"a": ["False", "True"]}, "leave-one-out", [0])
    runs = [
        Run((), 0, {"x": 1.0}),
        Run(("a",), 0, {}, "E"),
        Run((), 0, {}, "E"),
        Run(("a",), 0, {"x": 2.0}),
        Run(("a",), 9, {"x": 7.0}),
    ]
    assert [run.values for run in Ablation(study, runs).runs] == [{"x": 2.0}, {"x": 1.0}]
