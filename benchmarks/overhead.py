r"""What does a training loop cost beyond the loop that one writes by hand?

Every contender runs in a process of its own, in turns with its reference loop, one torch thread.
A batch's cost is the CPU time of three epochs less that of one, over the batches between; the rest
is fixed cost. Peers are optional; to have them, make them an environment of their own:

    python -m venv peers && peers/bin/pip install -c constraints.txt -e . \
        -r benchmarks/requirements-peers.txt
    peers/bin/pip install --no-deps fastai==2.8.12
    peers/bin/python benchmarks/overhead.py

`python benchmarks/overhead.py ours` measures pellucid and the bare loops alone, in a few minutes.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import cpu_seconds, report, spread, table
from peers import CONTENDERS, Run, Task, available
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from pellucid import DataLoaders, Learner
from pellucid.callbacks import NonFinite, Progress
from pellucid.metrics import accuracy
from pellucid.vision import simple_cnn

REPEATS = {"tiny MLP": 11, "MNIST CNN": 5}
BATCHES = {"tiny MLP": 500, "MNIST CNN": 20}


def tiny_mlp(**form: bool) -> Task:
    """Return a model so small that the loop is most of the work."""
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16), torch.randint(10, (64,))) for _ in range(BATCHES["tiny MLP"])]

    def keras_model() -> object:
        import keras

        layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
        return keras.Sequential([keras.Input((16,)), *layers])

    return Task(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)),
        partial(SGD, lr=0.1, **form),
        batches,
        keras_model,
        _keras_sgd,
    )


def mnist_cnn(**form: bool) -> Task:
    """Return the lessons' CNN at batch 512, where the loop is next to nothing."""
    torch.manual_seed(0)
    n = BATCHES["MNIST CNN"]
    batches = [(torch.randn(512, 1, 28, 28), torch.randint(10, (512,))) for _ in range(n)]

    def keras_model() -> object:
        import keras

        keras.config.set_image_data_format("channels_first")
        layers: list[object] = [keras.Input((1, 28, 28))]
        for width, kernel in ((8, 5), (16, 3), (32, 3), (32, 3)):
            layers.append(keras.layers.Conv2D(width, kernel, 2, "same", activation="relu"))
        head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
        return keras.Sequential([*layers, *head])

    return Task(
        lambda: simple_cnn(1, 10, widths=(8, 16, 32, 32), first_kernel=5),
        partial(SGD, lr=0.1, **form),
        batches,
        keras_model,
        _keras_sgd,
    )


def _keras_sgd() -> object:
    import keras

    return keras.optimizers.SGD(0.1)


def pellucid_on(task: Task) -> Run:
    """Train as a user does: loss, accuracy, record and table."""

    def run(epochs: int) -> None:
        learn = _learner(task)
        learn.fit(epochs)

    return run


def pellucid_off(task: Task) -> Run:
    """Train without metrics and table."""

    def run(epochs: int) -> None:
        learn = _learner(task)
        learn.metrics = {}
        learn.fit(epochs, callbacks=[Progress("off")])

    return run


def pellucid_unguarded(task: Task) -> Run:
    """Train so, and without the guard against NaN that is in every fit."""

    def run(epochs: int) -> None:
        learn = _learner(task)
        learn.metrics = {}
        learn.fit(epochs, callbacks=[Progress("off"), NonFinite("log")])

    return run


def _learner(task: Task) -> Learner:
    return Learner(
        task.make_model(),
        DataLoaders(task.batches),
        F.cross_entropy,
        opt_func=SGD,
        lr=0.1,
        metrics=[accuracy],
        device="cpu",
    )


TASKS: dict[str, Callable[..., Task]] = {"tiny MLP": tiny_mlp, "MNIST CNN": mnist_cnn}
OURS = {
    "pellucid, everything on": pellucid_on,
    "pellucid, everything off": pellucid_off,
}
UNGUARDED = "pellucid, everything off, no NaN guard"
EVERYONE = CONTENDERS | OURS | {UNGUARDED: pellucid_unguarded}
FUSED = "Bare loop, SGD(fused=True)"
# (contender, reference): ours against the same optimiser form, and against what people write
PAIRS = [
    *((name, FUSED) for name in OURS),
    ("pellucid, everything off", UNGUARDED),
    ("pellucid, everything on", "Bare loop, .item() every batch"),
    *((name, "Bare loop") for name in CONTENDERS if name != "Bare loop"),
    (FUSED, "Bare loop"),
]


def measure_pair(task_name: str, name: str, reference: str, result: Path) -> None:
    """Time a contender and its reference in turns; write the seconds of one and three epochs."""
    torch.set_num_threads(1)
    runs = {"reference": _build(task_name, reference), "contender": _build(task_name, name)}
    seconds: dict[str, list[tuple[float, float]]] = {who: [] for who in runs}
    for _ in range(REPEATS[task_name] + 1):
        for who, run in runs.items():
            seconds[who].append((cpu_seconds(partial(run, 1)), cpu_seconds(partial(run, 3))))
    result.write_text(json.dumps({who: times[1:] for who, times in seconds.items()}))


def _build(task_name: str, name: str) -> Run:
    if name == FUSED:
        return EVERYONE["Bare loop"](TASKS[task_name](fused=True))
    return EVERYONE[name](TASKS[task_name]())


def measured(task_name: str, name: str, reference: str) -> list[str]:
    """Run a pair in a process of its own, its output thrown away, and return a row."""
    with TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [sys.executable, __file__, task_name, name, reference, str(result)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = json.loads(result.read_text())
    n = 2 * BATCHES[task_name]
    cost = {who: [(t3 - t1) / n * 1e6 for t1, t3 in times] for who, times in seconds.items()}
    pairs = list(zip(cost["contender"], cost["reference"], strict=True))
    fixed = [(t1 - (t3 - t1) / 2) * 1e3 for t1, t3 in seconds["contender"]]
    return [
        name,
        reference,
        f"{statistics.median(cost['contender']):.0f}",
        spread([ours - bare for ours, bare in pairs]),
        spread([ours / bare for ours, bare in pairs], 3),
        f"{statistics.median(fixed):.0f}",
    ]


def main(only_ours: bool) -> None:
    """Measure every pair that can run here, and write the report."""
    heads = ["loop", "against", "µs a batch", "over, µs", "ratio", "fixed, ms"]
    parts = ["Median and quartiles; `over` and `ratio` are of paired runs, CPU time."]
    for task_name, make_task in TASKS.items():
        rows, missing = [], []
        for name, reference in PAIRS:
            if only_ours and not name.startswith(("pellucid", "Bare")):
                continue
            reason = available(name, make_task()) if name in CONTENDERS else None
            if reason:
                missing.append(f"{name} left out: {reason}.")
                continue
            rows.append(measured(task_name, name, reference))
            print(" | ".join(rows[-1]), file=sys.stderr)
        parts += [f"## {task_name}", table(heads, rows), *missing]
    what = "overhead-ours" if only_ours else "overhead"
    command = f"python benchmarks/overhead.py{' ours' * only_ours}"
    report(what, "Overhead of the training loop", command, *parts)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure_pair(*sys.argv[1:4], Path(sys.argv[4]))
    else:
        main(only_ours=sys.argv[1:] == ["ours"])
