"""How fast do 60,000 rows of 784 bytes in memory become batches?

One epoch of shuffled batches, inputs and labels, one torch thread, in turns.
"""

import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch
from measure import in_turns, report, spread, table
from torch.utils.data import DataLoader, TensorDataset

from pellucid.data import ArrayDataset, Loader

REPEATS = 9


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def drain_as_floats(loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, _ in loader:
        x.float()


def index_select_alone(arrays: tuple[torch.Tensor, ...], order: torch.Tensor, size: int) -> None:
    """The limit: the order is known, and nobody asks for the batches one by one."""
    for indices in order.split(size):
        for array in arrays:
            array.index_select(0, indices)


def contenders(size: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (60_000, 784), dtype=torch.uint8, generator=generator)
    y = torch.randint(10, (60_000,), generator=generator)
    order = torch.randperm(60_000, generator=generator)
    ours = Loader(ArrayDataset(x, y), size, shuffle=True)
    theirs = DataLoader(TensorDataset(x, y), size, shuffle=True)
    return {
        "torch DataLoader over TensorDataset": partial(drain, theirs),
        "pellucid Loader": partial(drain, ours),
        "pellucid Loader, floats on the device": partial(drain_as_floats, ours),
        "index_select alone": partial(index_select_alone, (x, y), order, size),
    }


def main() -> None:
    torch.set_num_threads(1)
    parts = []
    for size in (64, 512):
        times = in_turns(contenders(size), REPEATS)
        torch_times, limit = (
            times["torch DataLoader over TensorDataset"],
            times["index_select alone"],
        )
        n_batches = -(-60_000 // size)
        rows = [
            [
                name,
                f"{statistics.median(seconds) / n_batches * 1e6:.1f}",
                spread([a / b for a, b in zip(torch_times, seconds, strict=True)]),
                spread([a / b for a, b in zip(limit, seconds, strict=True)], 2),
            ]
            for name, seconds in times.items()
        ]
        heads = ["loader", "µs a batch", "times torch's speed", "of the limit's speed"]
        parts += [f"## Batches of {size}", table(heads, rows)]
    report("feeding", "Feeding data in memory", "python benchmarks/feeding.py", *parts)


if __name__ == "__main__":
    main()
