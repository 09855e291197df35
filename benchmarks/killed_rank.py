"""How soon does a fit end in all processes when one is killed, or hangs?

Two processes train by gloo on this machine; one is lost at a random moment. The bar: all have ended
within the timeout and 2 s. By torchrun, which ends the others of a process that died; and by hand,
where nobody does, so that the other process must find out for itself. All times are of the clock
`time.monotonic`, which the processes of a machine share, from the signal on.

    python benchmarks/killed_rank.py [REPEATS]
"""

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import report, table

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import Distributed, Progress
from pellucid.distributed import rank
from pellucid.vision import mlp

REPEATS = 5
TIMEOUT, SLACK = 10.0, 2.0
LOST = 1  # which rank
SIGNALS = {"killed": signal.SIGKILL, "hangs": signal.SIGUSR1}
COLUMNS = ("error, by hand", "ended, by hand", "all ended, torchrun")


class Training(Callback):
    """Say to whoever waits for it that the rank to be lost is in the midst of training."""

    def __init__(self, folder: Path):
        self.folder = folder

    def after_step(self, learn: Learner) -> None:
        """Write the number of this process."""
        if rank() == LOST and learn.step == 20:
            (self.folder / "trains").write_text(f"{os.getpid()}\n")


def train(mode: str, folder: Path) -> None:
    """Train for longer than anyone waits, and note when an error ends it."""
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1000))
    x, y = torch.randn(1024, 64), torch.randint(10, (1024,))
    callbacks = [Progress("off"), Distributed(mode, TIMEOUT), Training(folder)]
    data = DataLoaders.from_arrays((x, y), None, 32, classes=10)
    try:
        Learner(mlp(64, 10), data, callbacks=callbacks, device="cpu").fit(1_000_000)
    except Exception:
        (folder / f"error{rank()}").write_text(str(time.monotonic()))
        raise


def started(by_torchrun: bool, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Start two ranks; the process that is waited for comes first: torchrun, or rank 0."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [__file__, "rank", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if by_torchrun:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [subprocess.Popen([*torchrun, "--nproc-per-node=2", *command], env=env, **quiet)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [env | {"RANK": number, "LOCAL_RANK": number} for number in "01"]
    return [subprocess.Popen([sys.executable, *command], env=own, **quiet) for own in ranks]


def lose(how: str, mode: str, by_torchrun: bool) -> tuple[float | None, float]:
    """Return the seconds until rank 0 has its error, None if it was ended first, and the end."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        processes = started(by_torchrun, [mode, name])
        try:
            while not (folder / "trains").exists() or not (folder / "trains").read_text():
                if processes[0].poll() is not None:
                    raise RuntimeError("The processes did not get as far as training.")
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.2))
            began = time.monotonic()
            os.kill(int((folder / "trains").read_text()), SIGNALS[how])
            code = processes[0].wait(TIMEOUT + 120)
            ended = time.monotonic() - began
        finally:
            for process in processes:
                process.terminate()  # torchrun takes its processes with it
                process.wait()
        if code == 0:
            raise RuntimeError("The fit ended as if nothing had been.")
        error = folder / "error0"
        return float(error.read_text()) - began if error.exists() else None, ended


def shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} (at most {max(seconds):.2f})"


def main(repeats: int) -> None:
    cases = [(how, mode) for how in SIGNALS for mode in ("ddp", "fsdp")]
    times: dict[tuple[str, str], dict[str, list[float]]] = {
        case: defaultdict(list) for case in cases
    }
    for _ in range(repeats):
        for case in cases:
            error, ended = lose(*case, by_torchrun=False)
            if error is None:
                raise RuntimeError(f"Rank 0 ended without an error of its own: {case}.")
            all_ended = lose(*case, by_torchrun=True)[1]
            for column, seconds in zip(COLUMNS, (error, ended, all_ended), strict=True):
                times[case][column].append(seconds)
    rows = []
    for (how, mode), columns in times.items():
        longest = [max(columns[name][i] for name in COLUMNS[1:]) for i in range(repeats)]
        kept = sum(seconds <= TIMEOUT + SLACK for seconds in longest)
        row = [f"{how}, {mode}", *(shown(columns[name]) for name in COLUMNS)]
        rows.append([*row, f"{kept} of {repeats}"])
    heads = ["rank 1", *COLUMNS, f"within {TIMEOUT + SLACK:g} s"]
    what = (
        f"Seconds from the loss of one of two processes, timeout {TIMEOUT:g} s; medians of "
        f"{repeats}. By hand: of the other process, which nobody ends; torchrun: of torchrun "
        "itself, and with it of all."
    )
    command = "python benchmarks/killed_rank.py"
    report("killed-rank", "A rank that is lost", command, what, table(heads, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        train(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
