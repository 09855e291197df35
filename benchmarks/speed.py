"""What makes a training step faster: compiling, half precision, the data on the device.

Every contender is a learner of its own and fits in turns with the others, on the device that is
found. A fit's first batch (cold: compiling, from scratch or from torch's cache) is told apart from
the rest (warm). The cache of compiled code is a new one, in a temporary folder.

`python benchmarks/speed.py 2` measures with two rounds instead of three.
"""

import os
import statistics
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from measure import report, spread, table
from torch import nn

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import Compile, Precision, Progress
from pellucid.vision import simple_cnn, small_resnet

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH_SIZE, N_BATCHES, N_COLD = (512, 100, 10) if ON_GPU else (64, 12, 2)
ROUNDS = 3

MODELS: dict[str, Callable[[], nn.Module]] = {
    "simple_cnn": lambda: simple_cnn(3, 10),
    "small_resnet": lambda: small_resnet(3, 10),
}

CONTENDERS: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    'Compile("model")': lambda: [Compile("model")],
    'Compile("step")': lambda: [Compile("step")],
    'Precision("bf16")': lambda: [Precision("bf16")],
    'Precision("bf16"), Compile("model")': lambda: [Precision("bf16"), Compile("model")],
    "data on the device": list,
}
if ON_GPU:
    CONTENDERS |= {
        'Compile("model", graphs=True)': lambda: [Compile("model", graphs=True)],
        "all of it": lambda: [Precision("bf16"), Compile("step", graphs=True)],
    }
ON_DEVICE = ("data on the device", "all of it")


class Watch(Callback):
    """Take the time of the first batch, and of those from the `N_COLD`-th on."""

    def __init__(self):
        self.cold: list[float] = []
        self.warm: list[float] = []

    def before_fit(self, learn: Learner) -> None:
        """Begin with the start."""
        self._began = _now()

    def after_batch(self, learn: Learner) -> None:
        """Stop after the first batch, and begin with the warm ones."""
        if learn.batch_index == 0:
            self.cold.append(_now() - self._began)
        elif learn.batch_index == N_COLD - 1:
            self._began = _now()

    def after_train(self, learn: Learner) -> None:
        """Stop after the last."""
        self.warm.append((_now() - self._began) / (N_BATCHES - N_COLD))


def _now() -> float:
    """Return seconds: of the clock on a GPU, else of the CPU, the C++ compiler's included."""
    if not ON_GPU:
        return sum(os.times()[:4])
    torch.cuda.synchronize()
    return perf_counter()


def learner(model: str, contender: str) -> tuple[Learner, Watch]:
    """Return a learner of whole batches of random 32×32 images, and its clock."""
    torch.manual_seed(0)
    n, watch = BATCH_SIZE * N_BATCHES, Watch()
    x, y = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,))
    data = DataLoaders.from_arrays((x, y), batch_size=BATCH_SIZE, classes=10)
    if contender in ON_DEVICE:
        data.to(DEVICE)
    callbacks = [Progress("off"), watch, *CONTENDERS[contender]()]
    return Learner(MODELS[model](), data, device=DEVICE, callbacks=callbacks), watch


def measured(model: str, rounds: int) -> str:
    """Fit every contender once a round, and return the table."""
    runs = {name: learner(model, name) for name in CONTENDERS}
    for _ in range(rounds):
        for name, (learn, _) in runs.items():
            learn.fit(1)
            print(model, name, f"{runs[name][1].warm[-1] * 1e3:.1f} ms", file=sys.stderr)
    plain = runs["plain"][1].warm
    rows = []
    for name, (_, watch) in runs.items():
        ratios = [a / b for a, b in zip(plain, watch.warm, strict=True)]
        again = statistics.median(watch.cold[1:])
        saved = statistics.median(plain) - statistics.median(watch.warm)
        pays = f"{watch.cold[0] / saved:,.0f}" if name != "plain" and saved > 0 else "never"
        rows.append(
            [
                name,
                spread([1e3 * seconds for seconds in watch.warm]),
                spread(ratios, 2),
                f"{watch.cold[0]:.2f}",
                f"{again:.2f}",
                "" if name == "plain" else pays,
            ]
        )
    heads = ["", "warm, ms a batch", "times as fast", "first batch, s", "in later fits, s"]
    return table([*heads, "pays from batch"], rows)


def main(rounds: int) -> None:
    """Measure both models and write the report."""
    torch.set_num_threads(1)
    time = "wall" if ON_GPU else "CPU"
    parts = [
        f"Batches of {BATCH_SIZE} images of 32×32, AdamW, {time} time; median and quartiles over "
        f"{rounds} fits of {N_BATCHES} batches in turns, ratios within each turn. The first batch "
        "of the first fit compiles from scratch, as far as those above it share nothing; that of "
        "later ones finds torch's cache. On a CPU all data are on the device: that row is noise."
    ]
    with TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for model in MODELS:
            parts += [f"## {model}", measured(model, rounds)]
    report("speed", "What makes a step faster", f"python benchmarks/speed.py {rounds}", *parts)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
