"""Calls in fresh processes: every result arrives, and no process is left on any way out."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pellucid.ablation.spawned import Died, calls, check_travels
from pellucid.errors import SetupError

PACKAGE = Path(__file__).parents[1]


# ── what the processes call; they find it here by its name ────────────────────────────────────


def double(n: int) -> tuple[int, int]:
    return 2 * n, os.getpid()


def double_in_company(folder: Path, n: int) -> tuple[int, int]:
    (folder / str(os.getpid())).touch()
    until(lambda: len(list(folder.iterdir())) >= 2)
    return double(n)


def die_at_2(n: int) -> int:
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 3:
        os._exit(7)
    return n


def refuse(n: int) -> int:
    raise LookupError(f"no {n}")


class TwoPart(Exception):
    """An error that pickles and cannot be rebuilt."""

    def __init__(self, one: str, other: str):
        super().__init__(one + other)


def refuse_badly(n: int) -> int:
    raise TwoPart("no ", str(n))


def give_a_function(n: int) -> Callable[[], int]:
    return lambda: n


def note_and_wait(folder: Path, n: int) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(600)
    return n


class Unbuildable:
    def __call__(self, n: int) -> int:
        return n

    def __setstate__(self, state: Any) -> None:
        raise ImportError("nothing of this name here")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """Make a pellucid that imports nothing by itself: processes that need no torch soon begin."""
    folder = tmp_path_factory.mktemp("light")
    for package in ("pellucid", "pellucid/ablation"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(
            f"__path__.append({str(PACKAGE / package)!r})"
        )
    return folder


@pytest.fixture(autouse=True)
def processes_are_light(light, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(light), *sys.path])  # which they take over


# ── in the ordinary way ───────────────────────────────────────────────────────────────────────


def children() -> list[Any]:
    """Return the processes that this one has started and that still run."""
    return multiprocessing.active_children()


def test_every_job_is_done_once_by_as_many_processes_as_asked(tmp_path):
    found = dict(calls(partial(double_in_company, tmp_path), [(n,) for n in range(7)], 2))
    assert {n: value for n, (value, _) in found.items()} == {n: 2 * n for n in range(7)}
    assert {pid for _, pid in found.values()} == {int(path.name) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / str(os.getpid())).exists()
    assert not children()


def test_there_are_no_more_processes_than_jobs(monkeypatch):
    started = []
    monkeypatch.setattr("pellucid.ablation.spawned._Worker", partial(_noted, started))
    assert [value for _, (value, _) in calls(double, [(5,)], 4)] == [10]
    assert list(calls(double, [], 4)) == []
    assert len(started) == 1


_Worker = calls.__globals__["_Worker"]


def _noted(started: list[Any], what: bytes) -> Any:
    started.append(_Worker(what))
    return started[-1]


def test_a_process_that_dies_is_told_and_replaced():
    found = dict(calls(die_at_2, [(n,) for n in range(6)], 2))
    assert found == {0: 0, 1: 1, 2: Died(-9), 3: Died(7), 4: 4, 5: 5}
    assert str(found[2]) == "the process was ended by signal 9 (Killed; out of memory?)"
    assert str(found[3]) == "the process ended with exit code 7"
    assert str(Died(-11)) == "the process was ended by signal 11 (Segmentation fault)"
    assert not children()


@pytest.mark.parametrize(
    "fn, kind, text",
    [
        (refuse, LookupError, "no 3"),
        (refuse_badly, Exception, "TwoPart in a worker process"),
        (give_a_function, Exception, "pickle|local object"),
        (Unbuildable(), SetupError, "cannot import(.|\n)*nothing of this name"),
    ],
)
def test_an_error_ends_all_processes(fn, kind, text):
    with pytest.raises(kind, match=text):
        list(calls(fn, [(3,), (3,)], 1))
    assert not children()


def test_closing_ends_all_processes(tmp_path):
    with closing(calls(partial(one_then_wait, tmp_path), [(n,) for n in range(3)], 2)) as answers:
        assert next(answers) == (0, 0)
        assert len(children()) == 2
    assert not children()


def one_then_wait(folder: Path, n: int) -> int:
    return note_and_wait(folder, n) if n else n


# ── what cannot travel ────────────────────────────────────────────────────────────────────────


def test_what_has_no_name_is_refused():
    def inner(n: int) -> int:
        return n

    for fn in (lambda n: n, inner, partial(inner, 1)):
        with pytest.raises(SetupError, match=r"cannot be given build(.|\n)*workers=0"):
            check_travels(fn, "build")
    for fn in (double, partial(double, 3), Unbuildable(), {"a": (False, True)}):
        check_travels(fn, "build")


def test_what_is_defined_in_a_notebook_is_refused(monkeypatch):
    notebook = ModuleType("__main__")
    exec("def build(seed):\n    return seed", vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(SetupError, match=r"in a notebook(.|\n)*move it to a \.py file"):
        check_travels(notebook.build, "build")
    notebook.__file__ = __file__  # a script
    check_travels(notebook.build, "build")


SCRIPT = """
from pellucid.ablation.spawned import calls, check_travels

def build(n):
    return n + 1

{guard}
    check_travels(build, "build")
    print(list(calls(build, [(4,)], 1)))
"""


def run_script(folder: Path, guard: str, package: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "study.py"
    script.write_text(SCRIPT.format(guard=guard))
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_a_function_of_a_script_travels(light, tmp_path):
    assert run_script(tmp_path, 'if __name__ == "__main__":', light).stdout == "[(0, 5)]\n"


def test_a_script_without_its_guard_is_told_of_it(light, tmp_path):
    said = run_script(tmp_path, "if True:", light).stderr
    assert "A worker process read the main script and came to the call that started it." in said
    assert said.rstrip().splitlines()[-3:] == [
        "pellucid.errors.SetupError: A worker process ended before it began.",
        "  saw: the process ended with exit code 1; what it said itself is above, on stderr",
        '  do:  in a script, call under `if __name__ == "__main__":`; or use workers=0.',
    ]


# ── ended from outside ────────────────────────────────────────────────────────────────────────

WAITING = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_spawned import note_and_wait
from pellucid.ablation.spawned import calls

if __name__ == "__main__":
    list(calls(partial(note_and_wait, Path(sys.argv[1])), [(n,) for n in range(4)], 2))
"""


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["Ctrl-C", "SIGKILL", "SIGTERM"])
def test_no_process_outlives_its_parent(way, light, tmp_path):
    script, folder = tmp_path / "waiting.py", tmp_path / "pids"
    script.write_text(WAITING.format(tests=str(Path(__file__).parent)))
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(light)},
        start_new_session=True,
    )
    until(lambda: len(list(folder.iterdir())) == 2)
    pids = [int(path.name) for path in folder.iterdir()]
    assert all(map(is_running, pids))
    if way == "Ctrl-C":  # a terminal sends it to all of them
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGKILL if way == "SIGKILL" else signal.SIGTERM)
    _, said = process.communicate()
    until(lambda: not any(map(is_running, pids)))
    assert len(list(folder.iterdir())) == 2
    assert said.count("Traceback") == (1 if way == "Ctrl-C" else 0)
    assert (said.rstrip().endswith("KeyboardInterrupt")) == (way == "Ctrl-C")
