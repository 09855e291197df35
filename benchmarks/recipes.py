"""Recipes for small images: how accurate, in how many epochs, in how much time?

Each recipe is a function of the ordinary `Learner`, to read and to copy. Seeds are 0, 1, 2, ... in
turn, and the report shows all that were run; a seed fixes the weights at the start, the order of
the data and the augmentation.

    python benchmarks/recipes.py                     # all, on the device there is
    python benchmarks/recipes.py mnist fashion       # those whose name begins so
    python benchmarks/recipes.py cifar10 --seeds 1 --threads 2

Each run is kept in `results/recipes_<hardware>.json` as soon as it is done, and a run that is there
is not made again. Needs the real files in PELLUCID_DATA, see `pellucid.data.mnist`; of CIFAR-10 the
binary files (`pellucid.data.cifar10`), or cifar10-jpeg.tar.xz, which is unpacked into
a temporary folder. FLOPs are torch's count for one image, forward and backward, times images.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import RESULTS, hardware, report, table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from pellucid import DataLoaders, Learner, seed_everything
from pellucid.callbacks import LabelSmoothing, Precision, Progress, Schedule
from pellucid.data import cifar10, fashion_mnist, mnist
from pellucid.data.archives import unpack
from pellucid.errors import DataNotFound
from pellucid.init import whiten
from pellucid.metrics import accuracy
from pellucid.muon import Muon
from pellucid.roles import ByRole
from pellucid.schedules import linear
from pellucid.vision import AlternatingFlip, Augment, airbench, tta


def mnist_recipe(epochs: int, seed: int) -> Learner:
    """Train 75,284 parameters on digits shifted by up to 2 pixels."""
    seed_everything(seed)
    data = mnist(256, seed=seed)
    data.augment = [Augment(shift=2 / 28)]
    model = airbench(1, 10, widths=(16, 32, 64), first_kernel=3)
    whiten(model[0], data.one_batch()[0])
    muon = partial(Muon, weight_decay=0.05, momentum=0.6, ns_steps=3)
    opt_func = ByRole(partial(AdamW, weight_decay=0.05, betas=(0.9, 0.99)), {"conv": muon})
    techniques = [LabelSmoothing(0.1), Precision("auto"), Progress("lines")]
    learn = Learner(channels_last(model), data, None, opt_func, 0.02, [accuracy], techniques)
    learn.fit_one_cycle(epochs, lr=0.02)
    return learn


AIRBENCH = ByRole(
    partial(AdamW, weight_decay=0, betas=(0.9, 0.99)),
    {
        "conv": partial(
            Muon, weight_decay=0, momentum=0.6, ns_steps=3, adjust_lr_fn="none", reset_norm=True
        )
    },
    lr_factors={"bias": 0.06, "head": 0.015},
)
"""airbench94_muon's step for convolutions (Jordan, 2024); AdamW's, by smaller rates, for biases and
the head."""


def fashion_recipe(epochs: int, seed: int) -> Learner:
    """Train 1.16 M parameters on images shifted by a pixel and mirrored every second epoch."""
    seed_everything(seed)
    data = fashion_mnist(512, seed=seed)
    data.augment = [AlternatingFlip(data.train), Augment(shift=1 / 28)]
    return as_airbench(data, airbench(1, 10, (64, 128, 256), first_kernel=3), epochs, lr=0.12)


def cifar10_recipe(epochs: int, seed: int) -> Learner:
    """Train airbench94's network for longer, on images shifted by 4 pixels and cut out by 8."""
    seed_everything(seed)
    data = cifar10_data(1000, seed)
    data.augment = [AlternatingFlip(data.train), Augment(shift=4 / 32, cutout=8 / 32)]
    return as_airbench(data, airbench(3, 10, (64, 256, 256)), epochs, lr=0.16)


def as_airbench(data: DataLoaders, model: nn.Sequential, epochs: int, lr: float) -> Learner:
    """Whiten the first layer, smooth the labels, and let the rate fall from the first step on."""
    whiten(model[0], data.one_batch()[0])
    techniques = [LabelSmoothing(0.2), Precision("auto"), Progress("lines")]
    learn = Learner(channels_last(model), data, None, AIRBENCH, lr, [accuracy], techniques)
    learn.fit(epochs, callbacks=[Schedule("lr", linear(lr, 0))])
    return learn


def channels_last(model: nn.Module) -> nn.Module:
    """Lay convolutions out channels-last, which CPUs and GPUs compute faster."""
    return convert_conv2d_weight_memory_format(model, torch.channels_last)


def cifar10_data(batch_size: int, seed: int) -> DataLoaders:
    """Load CIFAR-10 from its binary files; else from JPEG files, which are slightly lossy."""
    try:
        return cifar10(batch_size, seed=seed)
    except DataNotFound:
        archive = Path(os.environ["PELLUCID_DATA"], "cifar10-jpeg.tar.xz")
        with tempfile.TemporaryDirectory() as folder:
            images = unpack(archive, Path(folder, "cifar10"))
            return DataLoaders.from_folder(
                images, 32, batch_size, "folder", cache="memory", seed=seed
            )


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how many epochs and seeds, and whether mirrored views are right."""

    train: Callable[[int, int], Learner]
    epochs: int
    n_seeds: int = 3
    views: bool = False


RECIPES = {
    "mnist-1": Recipe(mnist_recipe, 1),
    "mnist-4": Recipe(mnist_recipe, 4),
    "fashion-5": Recipe(fashion_recipe, 5, views=True),
    "cifar10-14": Recipe(cifar10_recipe, 14, n_seeds=1, views=True),
}


def measured(recipe: Recipe, seed: int) -> dict[str, float]:
    """Train once; return accuracy without and with views, CPU and wall seconds, and FLOPs."""
    began, cpu = time.perf_counter(), time.process_time()
    learn = recipe.train(recipe.epochs, seed)
    found = {
        "accuracy": learn.record.epochs.last("valid/accuracy"),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "parameters": sum(param.numel() for param in learn.model.parameters()),
        "teraflops": flops_of_an_image(learn) * learn.n_items_seen / 1e12,
        "threads": torch.get_num_threads(),
    }
    return found | ({"views": tta(learn).tta["accuracy"]} if recipe.views else {})


def flops_of_an_image(learn: Learner) -> float:
    """Count forward and backward of one training batch, by image."""
    x, y = learn.data.one_batch()
    x, y = x.to(learn.device), y.to(learn.device)
    with learn.untouched(), FlopCounterMode(display=False) as counter:
        F.cross_entropy(learn.model(x), y).backward()
    return counter.get_total_flops() / len(x)


def row(name: str, runs: list[dict[str, float]]) -> list[str]:
    """Return a line of the table: what all seeds of a recipe came to."""
    accuracies = [run["accuracy"] for run in runs]
    views = [run["views"] for run in runs if "views" in run]
    return [
        name,
        f"{runs[0]['parameters']:,.0f}",
        f"{runs[0]['teraflops']:.1f}",
        f"{statistics.mean(accuracies):.4f}",
        " ".join(f"{value:.4f}" for value in accuracies),
        f"{statistics.mean(views):.4f}" if views else "",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
        f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}",
        f"{runs[0]['threads']:.0f}",
    ]


def main() -> None:
    """Make the runs that are asked for and not there yet; write the report of all that are."""
    parser = argparse.ArgumentParser(description="Train the recipes and report what they reach.")
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--seeds", type=int, help="how many; by default as many as each needs")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    kept = RESULTS / f"recipes_{hardware()}.json"
    runs = json.loads(kept.read_text()) if kept.exists() else {}
    for name, recipe in RECIPES.items():
        if asked.names and not name.startswith(tuple(asked.names)):
            continue
        for seed in map(str, range(asked.seeds or recipe.n_seeds)):
            if seed not in runs.setdefault(name, {}):
                print(f"{name}, seed {seed}", file=sys.stderr)
                runs[name][seed] = measured(recipe, int(seed))
                kept.write_text(json.dumps(runs, indent=1))
    heads = ["recipe, epochs", "parameters", "TFLOP", "accuracy, mean", "seeds 0, 1, ..."]
    heads += ["mean of 6 views", "seconds", "CPU seconds", "threads"]
    rows = [row(name, list(runs[name].values())) for name in RECIPES if runs.get(name)]
    text = "Test accuracy after the last epoch, with plain images and with those views that the "
    text += "training declared (flips and shifts; digits have no mirror image, so none there)."
    report("recipes", "Recipes", "python benchmarks/recipes.py", text, table(heads, rows))


if __name__ == "__main__":
    main()
