"""Which switches matter: runs with each on and off, over the same seeds.

`ablate` makes the runs and keeps each as soon as it is finished; what follows from them is read
from the result, `effects.Ablation`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import seed_everything
from ..errors import SetupError, UnknownName, did_you_mean
from ..learner import Learner
from ..record import Record
from ..snapshot import preserved_random_state
from .effects import GRIDS, RUNS, STUDY, Ablation, Run, Study
from .fingerprint import fingerprint, in_words
from .journal import cut_torn_line
from .spawned import Died, calls, check_travels

Switches = dict[str, tuple[Any, Any]]

_UNUSABLE = "What build returned is of no use."


def ablate(
    build: Callable[..., Any],
    switches: Iterable[str] | Mapping[str, tuple[Any, Any]],
    seeds: int | Iterable[int] = 3,
    grid: str = "leave-one-out",
    metric: str | None = None,
    path: str | Path | None = None,
    workers: int = 0,
    progress: str = "runs",
) -> Ablation:
    """Train with each switch on and off over the same seeds, and say what each does.

    Every run begins with all generators seeded by its seed and uses one torch thread: any number
    of workers gives the same bits. A run that raises is kept as failed, with its traceback, and
    the others go on; see `Ablation.failures`. NaN is a result, and is shown as one.

    With a `path` each run is on the disk as soon as it is finished, and the same call goes on from
    there: it makes what is missing, also for more seeds or another grid, and tries again what
    failed. A folder that holds results of another function, of another version of its code, or of
    other switches is refused; what `build` calls and the globals it reads are not compared.
    `Ablation.load(path)` reads the folder, also meanwhile.

    Args:
        build: `build(seed, **switches)` trains once and returns a number, a dict of numbers, a
            `Learner` or a `Record` (of which the last epoch counts).
        switches: names of arguments of `build` that are False when off and True when on, or a dict
            of names to pairs (off, on).
        seeds: how many, from 0, or which.
        grid: "leave-one-out" (all on, and all but each), "add-one-in" (all off, and each alone) or
            "full" (every combination).
        metric: the number that counts, such as "valid/accuracy"; None leaves it to
            `Ablation.metric`. All numbers are kept.
        path: a folder for the study.
        workers: processes that train beside each other, 0: none. They are spawned: `build` must be
            defined in a file, and a script must call under `if __name__ == "__main__":`.
        progress: "runs" prints a line for each finished run, "all" also what `build` prints, "off"
            nothing.

    Raises:
        UnknownName: `build` takes no argument of a switch's name; or nothing returned is called
            `metric`.
        SetupError: the folder, the switches or `build` cannot be used.
        KeyboardInterrupt: on Ctrl-C; all workers are ended, and what is finished is kept in `path`.
    """
    pairs = _pairs(switches)
    _check_build(build, pairs)
    _check_choices(grid, progress, workers)
    named = {name: [in_words(value) for value in pair] for name, pair in pairs.items()}
    name, code = in_words(build, code=False), fingerprint(build)
    study = Study(name, code, named, grid, _seeds(seeds), metric)
    if workers:
        check_travels(build, "build")
        check_travels(pairs, "the values of the switches")
    one = partial(_run, build, pairs, progress == "all")
    with _opened(path, study) as found:
        kept = [run for run in Ablation(study, found).runs if not run.error]
        _check_metric(study, kept)
        told = _Told(study, kept, path, workers, progress != "off")
        _finish(one, study, kept, workers, told)
    return Ablation(study, [*found, *kept])


def _finish(
    one: Callable[..., Run], study: Study, kept: list[Run], workers: int, told: _Told
) -> None:
    """Make the runs that are not kept yet, and keep each as soon as it is finished."""
    done = {(run.on, run.seed) for run in kept}
    # seed by seed, so that what is there at any time can be compared
    asked = [(on, seed) for seed, on in product(study.seeds, study.configurations())]
    try:
        for run in _made(one, [job for job in asked if job not in done], workers):
            if told.path is not None:
                run.write(Path(told.path), study.switches)
            _check_first(run, kept, study)
            kept.append(run)
            told.finished(run)
    except KeyboardInterrupt as stop:
        stop.add_note(told.what_is_kept())
        raise


# ── what was given ────────────────────────────────────────────────────────────────────────────


def _pairs(switches: Iterable[str] | Mapping[str, tuple[Any, Any]]) -> Switches:
    """Return the switches as names to (off, on)."""
    if isinstance(switches, str):
        what = "Switches are several names."
        raise SetupError(what, saw=repr(switches), do=f"switches=[{switches!r}]")
    if not isinstance(switches, Mapping):
        names = list(switches)
        if len(set(names)) < len(names):
            raise SetupError("A switch is named twice.", saw=", ".join(map(str, names)))
        switches = dict.fromkeys(names, (False, True))
    if not switches:
        raise SetupError("There is no switch to study.")
    for name, pair in switches.items():
        if not isinstance(name, str):
            raise SetupError("A switch is named as build's argument is.", saw=repr(name))
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            what = f"The switch {name!r} has no two values."
            raise SetupError(what, saw=repr(pair), do="give (off, on).")
        if in_words(pair[0]) == in_words(pair[1]):
            raise SetupError(
                f"The switch {name!r} is the same off and on.",
                saw=repr(pair),
                do="give values that print differently: names, for one, that build looks up.",
            )
    return {name: (pair[0], pair[1]) for name, pair in switches.items()}


def _check_build(build: Callable[..., Any], switches: Switches) -> None:
    """Raise unless `build(seed, **switches)` is a call that its signature allows."""
    try:
        signature = inspect.signature(build)
    except TypeError:
        raise SetupError("build is nothing that can be called.", saw=repr(build)) from None
    except ValueError:  # built in, without a signature
        return
    parameters = list(signature.parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY:
        named = [name for name in named if name != parameters[0].name]  # the seed
    for name in switches:
        if name not in named and not open_ended:
            raise UnknownName(
                f"build has no argument {name!r} to switch.",
                saw=f"build{signature}",
                do=did_you_mean(name, named) if named else f"seed first: def build(seed, {name})",
            )
    try:
        signature.bind(0, **switches)
    except TypeError as error:
        raise SetupError(
            "build cannot be called as build(seed, **switches).",
            saw=f"build{signature}: {error}",
            do="give its other arguments a default, or functools.partial(build, ...).",
        ) from None


def _check_choices(grid: str, progress: str, workers: int) -> None:
    for what, choice, choices in [
        ("grid", grid, GRIDS),
        ("progress", progress, ("runs", "all", "off")),
    ]:
        if choice not in choices:
            what = f"There is no {what} {choice!r}."
            raise UnknownName(what, do=did_you_mean(str(choice), choices))
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise SetupError("Workers are counted: 0, 1, 2, ...", saw=f"workers={workers!r}")


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    if isinstance(seeds, (int, np.integer)):
        chosen = [] if isinstance(seeds, bool) else list(range(seeds))
    else:
        chosen = list(seeds) if isinstance(seeds, Iterable) else []
    whole = all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in chosen)
    if not whole or not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise SetupError(
            "Seeds are different whole numbers from 0, at least one.",
            saw=f"seeds={seeds!r}",
            do="give their number, or a list of them.",
        )
    return [int(seed) for seed in chosen]


# ── the study's folder ────────────────────────────────────────────────────────────────────────


@contextmanager
def _opened(path: str | Path | None, study: Study) -> Generator[list[Run]]:
    """Give the runs that a folder holds, and keep others from writing to it meanwhile."""
    if path is None:
        yield []
        return
    from filelock import FileLock, Timeout

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SetupError("The study's path is a file.", saw=str(folder), do="a folder") from None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SetupError(f"Another process is making runs in {folder}.") from None
    try:
        cut_torn_line(folder / RUNS)
        found = _runs_of(folder, study)
        study.write(folder)
        yield found
    finally:
        lock.release()


def _runs_of(folder: Path, study: Study) -> list[Run]:
    """Return a folder's runs, or raise if its results are another study's."""
    if not (folder / STUDY).exists():  # new, or its user says that the runs hold
        return Run.read_all(folder, study.switches)
    old = Study.read(folder)
    differences = [
        f"{what} was {ours or 'unknown'}, is {now or 'unknown'}"
        for what, ours, now in [
            ("build", old.build, study.build),
            ("its code", old.code, study.code),
            ("the switches", _listed(old.switches), _listed(study.switches)),
        ]
        if ours != now
    ]
    if not differences:
        return Run.read_all(folder, study.switches)
    if any(run.values for run in Run.read_all(folder, old.switches)):
        raise SetupError(
            f"The runs in {folder} are of another study.",
            saw="; ".join(differences),
            do=f"choose another path; or, if the change has no bearing on them, delete "
            f"{folder / STUDY} and call again.",
        )
    (folder / RUNS).unlink(missing_ok=True)  # they all failed
    return []


def _listed(switches: dict[str, list[str]]) -> str:
    return ", ".join(f"{name}: {off} or {on}" for name, (off, on) in switches.items())


# ── the runs ──────────────────────────────────────────────────────────────────────────────────


def _made(
    one: Callable[..., Run], jobs: list[tuple[tuple[str, ...], int]], workers: int
) -> Iterator[Run]:
    """Give the runs as they are finished."""
    if not workers:
        yield from (one(*job) for job in jobs)
        return
    with contextlib.closing(calls(one, jobs, workers)) as answers:
        for number, answer in answers:
            yield Run(*jobs[number], {}, str(answer)) if isinstance(answer, Died) else answer


def _run(
    build: Callable[..., Any], switches: Switches, loud: bool, on: tuple[str, ...], seed: int
) -> Run:
    """Train once; what `build` raises becomes part of the run."""
    chosen = {name: pair[name in on] for name, pair in switches.items()}
    began, values, error = perf_counter(), {}, ""
    held_back = nullcontext() if loud else contextlib.redirect_stdout(io.StringIO())
    try:
        with _by_itself(seed), held_back:
            result = build(seed, **chosen)
    except Exception as fault:
        reason = traceback.format_exception_only(fault)[0].splitlines()[0]
        error = f"{reason}\n\n{traceback.format_exc()}"
    else:
        try:
            values = _numbers(result)
        except SetupError as useless:
            error = str(useless)
    return Run(on, seed, values, error, perf_counter() - began)


@contextmanager
def _by_itself(seed: int) -> Generator[None]:
    """Seed everything and use one thread, as in a process of its own; put back what was."""
    n_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with preserved_random_state(), torch.enable_grad():
        try:
            torch.set_num_threads(1)
            seed_everything(seed)
            yield
        finally:
            torch.set_num_threads(n_threads)
            torch.set_default_dtype(dtype)


def _numbers(result: Any) -> dict[str, float]:
    """Return what `build` returned as numbers by name."""
    if isinstance(result, Learner):
        result = result.record
    if isinstance(result, Record):
        last = result.epochs[-1] if len(result.epochs) else {}
        result = {name: value for name, value in last.items() if name != "seconds"}
    named = result if isinstance(result, Mapping) else {"value": result}
    try:
        if not named or any(value is None or isinstance(value, str) for value in named.values()):
            raise TypeError
        return {
            str(name): float(value.detach() if isinstance(value, Tensor) else value)
            for name, value in named.items()
        }
    except (TypeError, ValueError, RuntimeError):
        seen = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise SetupError(
            _UNUSABLE,
            saw=f"{seen[:200]}" if named else f"nothing in it: {seen}",
            do="return a number, a dict of numbers, or a Learner or Record that has trained; "
            "float('nan') for a run that came to nothing.",
        ) from None


def _check_first(run: Run, kept: list[Run], study: Study) -> None:
    """Raise at the first result if it shows that all others would be in vain."""
    if not any(other.values for other in kept):
        if run.error.startswith(_UNUSABLE):
            raise SetupError(run.error)
        _check_metric(study, [run])


def _check_metric(study: Study, runs: list[Run]) -> None:
    if any(run.values for run in runs):
        Ablation(study, runs).metric()


class _Told:
    """What is printed meanwhile: plain lines, one for each finished run."""

    def __init__(
        self,
        study: Study,
        kept: list[Run],
        path: str | Path | None,
        workers: int,
        shown: bool,
    ):
        n, m = len(study.configurations()), len(study.seeds)
        self.study, self.kept, self.path, self.shown = study, kept, path, shown
        self.at_once, self.n_before, self.n_asked = max(workers, 1), len(kept), n * m
        on_file = f", {len(kept)} of them in {path}" if kept else ""
        self.tell(f"{n} configurations × {m} seed{'s'[: m > 1]}: {n * m} runs{on_file}")

    def tell(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)

    def finished(self, run: Run) -> None:
        """Tell what came of a run, the last one kept."""
        if run.values:
            metric = self.study.metric or Ablation(self.study, [run]).metric()
            came = f"{metric} {run.values.get(metric, math.nan):.4g}"
        else:
            came = f"failed: {run.reason}"
        seconds = [each.seconds for each in self.kept[self.n_before :]]
        left = median(seconds) * (self.n_asked - len(self.kept)) / self.at_once
        soon = f", about {left / 60:.0f} min left" if left >= 60 else ""
        place = f"{len(self.kept):>{len(str(self.n_asked))}}/{self.n_asked}"
        name = self.study.name(run.on)
        self.tell(f"{place}  {name}, seed {run.seed}: {came} ({run.seconds:.1f} s{soon})")

    def what_is_kept(self) -> str:
        """Say what an interrupted study leaves."""
        done = f"{len(self.kept)} of {self.n_asked} runs are"
        if self.path is None:
            return f"{done} finished and lost; ablate(..., path=...) would have kept them"
        return f"{done} kept in {self.path}; the same call goes on from there"
