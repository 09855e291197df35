"""What all benchmarks share: fair turns, honest summaries, and a report that says where it ran."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of one run; on a shared machine it wavers less than the clock's."""
    began = time.process_time()
    run()
    return time.process_time() - began


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, list[float]]:
    """Time every contender once a round, A B C A B C ..., after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 1):
        for name, run in contenders.items():
            took = seconds(run)
            if round_number:
                times[name].append(took)
    return times


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return "median (lower quartile to upper quartile)"."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware() -> str:
    """Return a short name of this machine, for file names."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"{os.cpu_count()}-core-cpu"


def report(what: str, title: str, command: str, *parts: str) -> Path:
    """Write `results/<what>_<hardware>_<date>.md`, print it, and return its path."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    where = (
        f"{date.today()}, {os.cpu_count()} cores ({cpu}), shared with other work: load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} torch thread(s). Command: `{command}`"
    )
    text = "\n\n".join([f"# {title}", where, *parts]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{what}_{hardware()}_{date.today()}.md"
    path.write_text(text)
    print(text)
    return path
