"""Does a long run grow? The memory of a process that trains for 20,000 batches.

Each contender is a process of its own; what counts is its resident memory, by /proc, when the
2,000th batch is over, and how much more it is later. The model is small so that nothing large that
comes and goes hides what stays. malloc is told to give back at once what is freed
(MALLOC_TRIM_THRESHOLD_), else a page more or less is its own doing.

    python benchmarks/memory.py
"""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import report, table
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import Progress, Telemetry
from pellucid.vision import simple_cnn

N, EPOCH = 20_000, 1_000
AT = (2_000, 5_000, 10_000, 15_000, 20_000)

CONTENDERS: dict[str, list[Callback]] = {
    "without Telemetry": [],
    "Telemetry(), the default": [Telemetry()],
    "Telemetry(every=1)": [Telemetry(every=1)],
}


class Batches:
    """An epoch of small images, all made beforehand."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._batches = [
            (torch.randn(8, 1, 12, 12, generator=generator), torch.randint(10, (8,)))
            for _ in range(16)
        ]

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._batches[i % len(self._batches)] for i in range(EPOCH))


class Weighs(Callback):
    """Ask how much memory is resident, in KiB."""

    def __init__(self):
        self.kib: list[float] = []

    def after_batch(self, learn: Learner) -> None:
        """Take note after the batches of AT."""
        if learn.step in AT:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.kib.append(pages * resource.getpagesize() / 1024)


def train(name: str) -> list[float]:
    """Train as one contender and return what was resident at the batches of AT."""
    torch.set_num_threads(1)
    weighs = Weighs()
    model, data = simple_cnn(1, 10, (4, 8, 8)), DataLoaders(Batches())
    callbacks = [Progress("off"), *CONTENDERS[name], weighs]
    Learner(model, data, F.cross_entropy, SGD, 0.01, callbacks=callbacks, device="cpu").fit(
        N // EPOCH
    )
    return weighs.kib


def main() -> None:
    rows = []
    for name in CONTENDERS:
        ran = subprocess.run(
            [sys.executable, __file__, name],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
        )
        first, *later = map(float, ran.stdout.split())
        rows.append([name, f"{first / 1024:.0f}", *(f"{kib - first:+.0f}" for kib in later)])
    heads = ["contender", f"MiB at {AT[0]:,}", *(f"KiB more at {at:,}" for at in AT[1:])]
    said = "What the table counts includes the record itself: four numbers of every batch."
    report(
        "memory", "Memory of a long run", "python benchmarks/memory.py", table(heads, rows), said
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*train(sys.argv[1]))
    else:
        main()
