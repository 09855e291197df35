r"""What does seeing inside the model cost?

Every contender is a thread of one process and trains in an ordinary fit, but its data come from
`Turns`: it gets a batch only when its turn has come, so that all go through the same batch one
after the other, and what else the machine does falls on all of them. (As processes of their own
they were up to 8 % apart for nothing but where their memory lay.) Costs are CPU time of single
batches, one torch thread; a ratio is of two batches of the same round: with against without.

fastai is optional, see `overhead.py` for an environment that has it. miniai, the library of the
fast.ai course, is not on PyPI (a package of that name is something else): a contender does what
its statistics do, in a bare loop.

    python benchmarks/telemetry.py

`python benchmarks/telemetry.py quick` takes few batches, to see whether it runs.
"""

import hashlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread
from time import thread_time
from typing import Any

import torch
from measure import report, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from pellucid import DataLoaders, Learner
from pellucid.callbacks import Progress, Telemetry
from pellucid.hooks import leaves
from pellucid.vision import simple_cnn, small_resnet, xresnet18

Batch = tuple[Tensor, Tensor]
LR = 0.05
EPOCH = 98  # 50,000 images in batches of 512
START = 25  # batches of which the default records most, before it chooses by cost
WARM = 3  # batches left out, in which torch chooses its kernels


@dataclass(frozen=True)
class Task:
    """A model, the shape of its batches, and for how many of them each contender runs."""

    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_ours: int
    n_peers: int


TASKS = {
    "MNIST CNN, batch 512": Task(
        partial(simple_cnn, 1, 10, (8, 16, 32, 32), 5), (512, 1, 28, 28), 2 * EPOCH, 30
    ),
    "xresnet18 at 32 px, batch 64": Task(partial(xresnet18, 3, 10), (64, 3, 32, 32), EPOCH, 12),
    "small_resnet at 32 px, batch 64": Task(
        partial(small_resnet, 3, 10), (64, 3, 32, 32), EPOCH, 20
    ),
}


class Turns:
    """Batches that are given when a message says so; answers with the seconds each took."""

    def __init__(self, shape: tuple[int, ...], n: int, pipe: Connection):
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(shape, generator=generator) for _ in range(8)]
        labels = [torch.randint(10, shape[:1], generator=generator) for _ in images]
        self._batches, self._n, self._pipe = list(zip(images, labels, strict=True)), n, pipe

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self._n):
            self._pipe.recv()
            start = thread_time()
            yield self._batches[i % len(self._batches)]
            self._pipe.send(thread_time() - start)


Run = Callable[[nn.Module, Turns], Any]


def bare(model: nn.Module, batches: Turns) -> None:
    optimizer = SGD(model.parameters(), lr=LR)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def as_miniai(model: nn.Module, batches: Turns) -> None:
    """Keep of every layer's output, copied to the host, mean, sd and 40 bins from 0 to 10."""
    kept: list[tuple[Tensor, ...]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = output.detach().cpu()
        kept.append((values.mean(), values.std(), torch.histc(values.abs(), 40, 0, 10)))

    handles = [module.register_forward_hook(look) for module in leaves(model).values()]
    bare(model, batches)
    for handle in handles:
        handle.remove()


def pellucid(model: nn.Module, batches: Turns, every: int | str | None = None) -> list[int]:
    """Return the first batch of each row on record; None is to train without Telemetry."""
    learn = Learner(model, DataLoaders(batches), F.cross_entropy, SGD, LR, device="cpu")
    looking = [] if every is None else [Telemetry(every=every)]
    layers = learn.fit(1, callbacks=[Progress("off"), *looking]).layers
    return [] if layers is None else layers.batches[:, 0].tolist()


def fastai(model: nn.Module, batches: Turns, every_leaf: bool = False, **settings: Any) -> None:
    """With settings, train with ActivationStats; its own choice are modules with parameters."""
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.hook import ActivationStats

    looking = []
    if settings:
        modules = list(leaves(model).values()) if every_leaf else None
        looking = [ActivationStats(modules=modules, **settings)]
    learn = Learner(
        DataLoaders(batches, []),
        model,
        loss_func=F.cross_entropy,
        opt_func=OptimWrapper(opt=SGD(model.parameters(), lr=LR)),
        lr=LR,
        cbs=looking,
    )
    learn.fit(1)


WITHOUT, DEFAULT, DENSELY = (
    "pellucid without",
    "pellucid Telemetry(), the default",
    "pellucid Telemetry(every=1)",
)
OURS: dict[str, Run] = {
    WITHOUT: pellucid,
    DEFAULT: partial(pellucid, every="auto"),
    DENSELY: partial(pellucid, every=1),
}
PEERS: dict[str, Run] = {
    "bare loop": bare,
    "as miniai does it: every leaf, every batch": as_miniai,
    "fastai without": fastai,
    "fastai ActivationStats(with_hist=True), every leaf": partial(
        fastai, every_leaf=True, with_hist=True
    ),
    "fastai ActivationStats(with_hist=True)": partial(fastai, with_hist=True),
    "fastai ActivationStats(), no histogram": partial(fastai, with_hist=False),
}
EVERYONE = OURS | PEERS


def reference(name: str) -> str:
    """Return what a contender is compared with."""
    if name in OURS:
        return WITHOUT
    return "fastai without" if name.startswith("fastai") else "bare loop"


def contend(task_name: str, name: str, n: int, pipe: Connection) -> None:
    """Train as one contender, in a thread of its own."""
    torch.set_num_threads(1)  # this thread's too
    task = TASKS[task_name]
    torch.manual_seed(0)
    model = task.make_model()
    batches = Turns(task.shape, n, pipe)
    pipe.send("ready")  # before the next one draws its weights
    recorded = EVERYONE[name](model, batches)
    digest = hashlib.sha256()
    for values in model.state_dict().values():
        digest.update(values.numpy().tobytes())
    pipe.send((recorded, digest.hexdigest()))


@dataclass
class Outcome:
    """What is known of a contender: seconds of each batch, and what it sent in the end."""

    seconds: list[float]
    recorded: Sequence[int] = ()
    digest: str = ""


def in_rounds(task_name: str, n_batches: Mapping[str, int]) -> dict[str, Outcome]:
    """Let all contenders train one batch after the other, forwards and backwards in turns."""
    pipes: dict[str, Connection] = {}
    for name, n in n_batches.items():
        pipes[name], theirs = Pipe()
        Thread(target=contend, args=(task_name, name, n, theirs), daemon=True).start()
        pipes[name].recv()
    outcomes = {name: Outcome([]) for name in n_batches}
    for round_number in range(max(n_batches.values())):
        running = [name for name, n in n_batches.items() if round_number < n]
        for name in running if round_number % 2 else reversed(running):
            pipes[name].send("your turn")
            outcomes[name].seconds.append(pipes[name].recv())
    for name, outcome in outcomes.items():
        outcome.recorded, outcome.digest = pipes[name].recv()
    return outcomes


def ratios(outcome: Outcome, base: Outcome, rounds: Sequence[int]) -> list[float]:
    return [outcome.seconds[i] / base.seconds[i] for i in rounds]


def rows_of_all(outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """Return a row for each contender that does the same in every batch."""
    rows = []
    for name, outcome in outcomes.items():
        if name == DEFAULT:
            continue
        base = outcomes[reference(name)]
        rounds = range(WARM, len(outcome.seconds))
        ms = spread([outcome.seconds[i] * 1e3 for i in rounds])
        extra = [(outcome.seconds[i] - base.seconds[i]) * 1e3 for i in rounds]
        more = [spread(extra), spread(ratios(outcome, base, rounds), 3)]
        rows.append([name, str(len(rounds)), ms, *(["", "1"] if outcome is base else more)])
    return rows


def default_setting(outcomes: Mapping[str, Outcome]) -> str:
    """Return what the default chose and what that costs, by Telemetry over without.

    It records a batch in many, so that no row of its record was joined with another.
    """
    ours, base = outcomes[DEFAULT], outcomes[WITHOUT]
    n = len(ours.seconds)
    recorded = set(ours.recorded)
    looks = ratios(ours, base, [i for i in range(WARM, n) if i in recorded])
    others = ratios(ours, base, [i for i in range(WARM, n) if i not in recorded])
    look, other = statistics.median(looks), statistics.median(others)
    gaps = [b - a for a, b in pairwise(sorted(i for i in recorded if i >= START))]

    def row(first: int, last: int) -> list[str]:
        share = len(recorded & {*range(first, last)}) / (last - first)
        sums = sum(ours.seconds[first:last]) / sum(base.seconds[first:last])
        by_medians = other + (look - other) * share
        return [f"{first + 1} to {last}", f"{share:.1%}", f"{by_medians:.3f}", f"{sums:.3f}"]

    heads = ["batches", "recorded", "ratio, from the medians", "ratio of sums"]
    stretches = {(0, EPOCH), (START, n), (0, n)}
    rows = [row(first, last) for first, last in sorted(stretches) if last <= n]
    return (
        f"The default, over the Learner without: a recorded batch {spread(looks, 3)}, another "
        f"{spread(others, 3)}; after batch {START} it recorded every {spread(gaps, 0)}."
        f"\n\n{table(heads, rows)}"
    )


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    parts = [
        "Ratios are of batches of the same round: ours over the Learner without Telemetry, "
        "fastai's over its Learner without ActivationStats, the course's over a bare loop. Median "
        "and quartiles, CPU time. Ours records activations, gradients and updates, the others "
        "activations alone."
    ]
    peers = [name for name in PEERS if not name.startswith("fastai") or find_spec("fastai")]
    for task_name, task in TASKS.items():
        n_batches = dict.fromkeys(OURS, 80 if quick else task.n_ours)
        n_batches |= dict.fromkeys(peers, 10 if quick else task.n_peers)
        with redirect_stdout(StringIO()):  # fastai has no other way to be silent
            outcomes = in_rounds(task_name, n_batches)
        n_leaves = len(leaves(task.make_model()))
        heads = ["contender", "batches", "ms a batch", "more, ms", "ratio"]
        same = len({outcomes[name].digest for name in OURS}) == 1
        parts += [
            f"## {task_name}: {n_leaves} leaves",
            table(heads, rows_of_all(outcomes)),
            default_setting(outcomes),
            f"Weights and buffers of ours after {n_batches[WITHOUT]} batches, without, by default "
            f"and every=1: {'bit for bit the same' if same else 'DIFFERENT'}.",
        ]
        print("\n\n".join(parts[-4:]), file=sys.stderr)
    if not quick:
        report("telemetry", "Cost of telemetry", "python benchmarks/telemetry.py", *parts)


if __name__ == "__main__":
    main(quick=sys.argv[1:] == ["quick"])
