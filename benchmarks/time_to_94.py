"""How long does CIFAR-10 take to 94 %, and what does the library cost over a bare loop?

The recipe is that of airbench94_muon (Jordan, 2024: 2.6 s on an A100), in our parts: alternating
flips and shifts, a whitened first layer, Muon, 8 epochs of 25 steps, the rate falling to zero, the
mean of six views. Contenders train by turns from the same seeds: the Learner, and a loop by hand
with the same model, data, augmentation and optimiser. Their weights must agree in the end.

    python benchmarks/time_to_94.py           # for a GPU: data on the device, bf16
    python benchmarks/time_to_94.py compile   # compiled: the first run of each is the cold one
    python benchmarks/time_to_94.py small     # few images, a narrow network: does it run?

A clock goes from the data on the device to the accuracy: whitening, training, six views. Before
the first run CUDA, and what is compiled, are cold; the others are warm. Needs CIFAR-10, see
`recipes.py`.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from measure import report, spread, table
from recipes import AIRBENCH, channels_last, cifar10_data
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid import DataLoaders, Learner, seed_everything
from pellucid.callbacks import Compile, Precision, Progress, Schedule
from pellucid.device import choose_device, choose_precision
from pellucid.init import whiten
from pellucid.schedules import linear
from pellucid.vision import AlternatingFlip, Augment, airbench, tta, views

LR, DTYPES = 0.24, {"bf16": torch.bfloat16, "fp32": torch.float32}
LOSS = partial(F.cross_entropy, label_smoothing=0.2)
RATE = linear(LR, 0)
REPEATS = 10


class Race:
    """The recipe's parts, for as many runs as one likes.

    Args:
        small: few images in a narrow network.
        compiled: whether both contenders compile the model.
    """

    def __init__(self, small: bool, compiled: bool):
        self.device, _ = choose_device()
        self.precision, _ = choose_precision(self.device)
        self.widths, self.epochs = ((8, 16, 16), 2) if small else ((64, 256, 256), 8)
        self.compiled = compiled
        data = cifar10_data(2000, 0)
        if small:
            parts = [next(iter(loader)) for loader in (data.train, data.valid)]
            data = DataLoaders.from_arrays(*parts, batch_size=200, classes=10)
        data.augment = [AlternatingFlip(data.train), Augment(shift=2 / 32)]
        self.data = data.to(self.device)

    def begin(self, seed: int) -> nn.Module:
        """Return the network, with its first layer whitened, and set the data to their start."""
        seed_everything(seed)
        self.data.train.seed, self.data.train.epoch = seed, 0
        model = airbench(3, 10, self.widths)
        whiten(model[0], self.data.one_batch()[0].float().cpu())
        return channels_last(model).to(self.device)

    def library(self, seed: int) -> tuple[float, nn.Module]:
        """Train by the Learner."""
        techniques = [Precision(self.precision), Schedule("lr", RATE), Progress("off")]
        techniques += [Compile("model")] if self.compiled else []
        model = self.begin(seed)
        learn = Learner(model, self.data, LOSS, AIRBENCH, LR, callbacks=techniques)
        learn.fit(self.epochs)
        return tta(learn).tta["accuracy"], model

    def by_hand(self, seed: int) -> tuple[float, nn.Module]:
        """Train by a loop that does the same and nothing else."""
        model = self.begin(seed)
        half = torch.autocast(self.device.type, DTYPES[self.precision], self.precision != "fp32")
        opt = AIRBENCH(list(model.parameters()), lr=LR, model=model)
        forward = torch.compile(model) if self.compiled else model
        n, done = self.epochs * len(self.data.train), 0
        for _ in range(self.epochs):
            model.train()
            for x, y in self.data.train:
                for group in opt.param_groups:
                    group["lr"] = RATE(done / n)
                x = self.data.prepare(x.to(self.device), training=True)
                with half:
                    loss = LOSS(forward(x), y.to(self.device))
                loss.backward()
                opt.step()
                opt.zero_grad()
                done += 1
            model.eval()
            with torch.no_grad(), half:
                losses = [
                    LOSS(forward(self.data.prepare(x.to(self.device))), y.to(self.device))
                    for x, y in self.data.valid
                ]
            torch.stack(losses).mean().item()
        return self._mean_of_views(model, half), model

    @torch.no_grad()
    def _mean_of_views(self, model: nn.Module, half: torch.autocast) -> float:
        right: list[Tensor] = []
        for x, y in self.data.valid:
            with half:
                seen = [model(self.data.prepare(v(x))) for v in views(self.data.augment, 6)]
            right.append(torch.stack(seen).float().mean(0).argmax(1) == y)
        return torch.cat(right).float().mean().item()


def timed(
    run: Callable[[int], tuple[float, nn.Module]], seed: int
) -> tuple[float, float, nn.Module]:
    """Return seconds, accuracy and the trained model of one run."""
    began = time.perf_counter()
    accuracy, model = run(seed)  # the accuracy is read back, so the device has finished
    return time.perf_counter() - began, accuracy, model


def main(small: bool, compiled: bool) -> None:
    """Let both train by turns, and report."""
    torch.set_num_threads(1)
    race = Race(small, compiled)
    contenders = {"Learner": race.library, "by hand": race.by_hand}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    accuracies: dict[str, list[float]] = {name: [] for name in contenders}
    apart = 0.0
    for seed in range(3 if small else REPEATS + 1):
        weights = []
        for name, run in contenders.items():
            took, accuracy, model = timed(run, seed)
            seconds[name].append(took)
            accuracies[name].append(accuracy)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        apart = max(apart, (weights[0] - weights[1]).abs().max().item())
    rows = [
        [
            name,
            f"{seconds[name][0]:.2f}",
            spread(seconds[name][1:], 2),
            f"{statistics.mean(accuracies[name]):.4f}",
        ]
        for name in contenders
    ]
    ratios = [a / b for a, b in zip(*(seconds[name][1:] for name in contenders), strict=True)]
    report(
        f"time-to-94{'-compiled' * compiled}{'-small' * small}",
        "CIFAR-10: time to 94 %",
        f"python benchmarks/time_to_94.py{' compile' * compiled}{' small' * small}",
        f"{race.precision} on {race.device}; seconds of the first run (cold) and of the others "
        "(median and quartiles); mean test accuracy of six views.",
        table(["loop", "cold, s", "warm, s", "accuracy"], rows),
        f"Learner over by hand: {spread(ratios, 3)}. Weights of one seed differ by {apart:.1e}.",
    )


if __name__ == "__main__":
    main(small="small" in sys.argv, compiled="compile" in sys.argv)
