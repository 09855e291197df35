"""Do our parts reach what the sources of this library print on MNIST?

The sources are the notebooks 03 to 07a of the course "from the foundations"; "nb05-c7" is code cell
7 of notebook 05. Each result that they print is a row: the same model, data, optimiser, schedule
and epochs, trained by the ordinary `Learner` with three seeds. A row that the median does not reach
is trained again by a loop in plain torch, ten seeds, which shows whether the sources were lucky;
and by a better recipe, for the same model and as many epochs.

    python benchmarks/reproduce.py                       # all; two or three hours on one core
    python benchmarks/reproduce.py --rows nb05 tiny      # rows whose key has one of these words
    python benchmarks/reproduce.py --rows best --seeds 0

Each run is kept in `results/reproduce_<hardware>.json` as soon as it is done and is not made again.
The report and `docs/reproduction.md` show all that is there. Needs the real files: PELLUCID_DATA,
see `pellucid.data.mnist`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, hardware, report, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import SGD, AdamW, Optimizer

from pellucid import Callback, DataLoaders, Learner, Loader, foundations, seed_everything
from pellucid.callbacks import LSUV, OneCycle, Progress, Schedule, Telemetry
from pellucid.data import ArrayDataset, Normalize, mnist
from pellucid.errors import DataError, NonFiniteLoss
from pellucid.init import init_kaiming, lsuv
from pellucid.metrics import accuracy
from pellucid.nn import AdaptivePool, GeneralReLU, RunningBatchNorm, conv_norm_act
from pellucid.schedules import combine, cosine, linear
from pellucid.vision import Augment, mlp, simple_cnn

SEEDS, SEEDS_BY_HAND, SLOW = (0, 1, 2), range(10), 20.0
"""Seeds of the rows, and of the loop in plain torch; where a run takes more CPU seconds, three."""

# ── the models ──────────────────────────────────────────────────────────────────────────────────

NARROW, WIDE = (8, 16, 32, 32), (8, 16, 32, 64, 64)


def cnn(
    widths: Sequence[int],
    norm: Callable[[int], nn.Module] | None = None,
    act: Callable[[], nn.Module] = nn.ReLU,
    slope: float = 0.1,
    uniform: bool = False,
) -> nn.Sequential:
    """Return the notebooks' CNN: stride 2, the first kernel 5×5, the norm after the activation.

    Their initial weights are Kaiming's for a slope of 0.1, with ReLU too; the last layer keeps
    torch's own.
    """
    layers = [
        conv_norm_act(before, after, 3 if number else 5, 2, norm, act, norm_last=True)
        for number, (before, after) in enumerate(zip([1, *widths], widths, strict=False))
    ]
    init_kaiming(nn.Sequential(*layers), slope, uniform)
    return nn.Sequential(*layers, AdaptivePool(), nn.Linear(widths[-1], 10))


def own_cnn(
    widths: Sequence[int], norm: Callable[[int], foundations.Module], norm_last: bool = True
) -> foundations.Module:
    """Return it built from `pellucid.foundations` alone, with the initial weights of these."""
    layers: list[foundations.Module] = []
    for number, (before, after) in enumerate(zip([1, *widths], widths, strict=False)):
        kernel = 3 if number else 5
        layers.append(foundations.Conv2d(before, after, kernel, 2, kernel // 2, bias=False))
        after_it = [foundations.ReLU(), norm(after)]
        layers += after_it if norm_last else reversed(after_it)
    head = [foundations.AdaptiveAvgPool2d(1), foundations.Flatten()]
    return foundations.Sequential(*layers, *head, foundations.Linear(widths[-1], 10))


def best_net() -> nn.Module:
    """Return 56,474 parameters: five convolutions with batch norm, a max-pool after two of them."""
    layers: list[nn.Module] = []
    parts = ((1, 16, True), (16, 32, False), (32, 32, True), (32, 48, False), (48, 64, False))
    for before, after, pool in parts:
        layers += [*conv_norm_act(before, after), *([nn.MaxPool2d(2)] if pool else [])]
    net = nn.Sequential(*layers, AdaptivePool(), nn.Linear(64, 10))
    return convert_conv2d_weight_memory_format(net, torch.channels_last)


INSTANCE = partial(foundations.InstanceNorm, eps=1.0, affine=True)

NETS: dict[str, Callable[[], Any]] = {
    "MLP 784-50-10": partial(mlp, 784, 10),
    "CNN 8-16-32-32": partial(simple_cnn, 1, 10, NARROW, 5),
    "CNN 8-16-32-32, Kaiming": partial(cnn, NARROW, slope=0.0),
    "CNN 8-16-32-32, Kaiming 0.1": partial(cnn, NARROW),
    "CNN 8-16-32-32, Kaiming 0.1 uniform": partial(cnn, NARROW, uniform=True),
    "CNN 8-16-32-32, GeneralReLU": partial(cnn, NARROW, act=partial(GeneralReLU, 0.1, 0.4, 6.0)),
    "CNN 8-16-32-64-64": partial(cnn, WIDE),
    "CNN 8-16-32-64-64, BatchNorm2d": partial(cnn, WIDE, nn.BatchNorm2d),
    "CNN 8-16-32-64-64, RunningBatchNorm": partial(cnn, WIDE, RunningBatchNorm),
    "own CNN 8-16-32-64-64, BatchNorm": partial(own_cnn, WIDE, foundations.BatchNorm),
    "own CNN 8-16-32-64-64, LayerNorm": partial(own_cnn, WIDE, partial(foundations.GroupNorm, 1)),
    "own CNN 8-16-32-64-64, InstanceNorm": partial(own_cnn, WIDE, INSTANCE),
    "own CNN 8-16-32-64, InstanceNorm before ReLU": partial(
        own_cnn, WIDE[:-1], INSTANCE, norm_last=False
    ),
    "best": best_net,
}

BY_HAND = {"own CNN 8-16-32-64-64, BatchNorm": "CNN 8-16-32-64-64, BatchNorm2d"}
"""For the loop in plain torch: the twin of a net that is not made of torch's modules."""

# ── the recipes ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recipe:
    """One way to train, complete but for the seed.

    Attributes:
        net: a key of NETS.
        lr: a number, a schedule, or with `one_cycle` its highest value.
        batch: items in a training batch; validation takes twice as many.
        raw: pixels stay 0 to 1 instead of being normalised.
        shuffled: a new order every epoch, else always that of the file.
        items: the first so many of the 50,000 training images.
        watched: with `Telemetry`, as the notebook watches the layers there.
    """

    net: str
    lr: Any
    epochs: int
    batch: int = 512
    raw: bool = False
    shuffled: bool = True
    items: int = 50_000
    opt: str = "SGD"
    one_cycle: bool = False
    smoothing: float = 0.0
    shift: float = 0.0
    lsuv: bool = False
    watched: bool = False

    def __str__(self) -> str:
        lr = str(self.lr) if callable(self.lr) else f"{self.lr:g}"
        said = {
            f"batch {self.batch}": self.batch != 512,
            "pixels 0 to 1": self.raw,
            "in the file's order": not self.shuffled,
            f"the first {self.items:,} images": self.items != 50_000,
            f"label smoothing {self.smoothing:g}": self.smoothing,
            f"shifts of up to {round(28 * self.shift)} pixels": self.shift,
            "LSUV": self.lsuv,
            "Telemetry": self.watched,
        }
        how = f"{self.opt} {'one cycle to ' if self.one_cycle else ''}{lr}"
        return "; ".join([self.net, how, *(text for text, is_so in said.items() if is_so)])


@dataclass(frozen=True)
class Row:
    """One printed result.

    Attributes:
        key: the source, and for `--rows`.
        recipe: theirs.
        valid: the validation accuracy they print.
        train: loss and accuracy on the training data, averaged during that epoch, where printed.
        at: the epoch that is compared, from 1; 0: the last one.
        instead: a recipe that should do better; None takes AdamW and one cycle.
    """

    key: str
    recipe: Recipe
    valid: float
    train: tuple[float, float] | None = None
    at: int = 0
    instead: Recipe | None = None

    @property
    def diverged(self) -> bool:
        """Whether their loss became NaN: then there is nothing to reach."""
        return self.train is not None and math.isnan(self.train[0])

    @property
    def epochs(self) -> int:
        """How many epochs they trained."""
        return self.at or self.recipe.epochs

    @property
    def better(self) -> Recipe:
        """What should do better, for the same model and as many epochs."""
        lr = 0.01 if self.recipe.raw else 0.02
        adam = replace(self.recipe, lr=lr, batch=128, opt="AdamW", one_cycle=True)
        return self.instead or replace(adam, epochs=self.epochs)


# ── what the notebooks print ────────────────────────────────────────────────────────────────────

MLP, NET4, NET5 = "MLP 784-50-10", "CNN 8-16-32-32", "CNN 8-16-32-64-64"
BN, RBN = f"{NET5}, BatchNorm2d", f"{NET5}, RunningBatchNorm"
MLP64, MLP512 = Recipe(MLP, 0.5, 5, 64, raw=True), Recipe(MLP, 0.5, 3, raw=True)
PLAIN, WATCHED = Recipe(NET4, 0.4, 3), Recipe(NET4, 0.5, 1, watched=True)
KAIMING = Recipe(f"{NET4}, Kaiming", 0.9, 2, watched=True)
UP_DOWN = combine([0.5, 0.5], [cosine(0.2, 1.0), cosine(1.0, 0.1)])
STEEP = combine([0.3, 0.7], [linear(0.6, 2.0), linear(2.0, 0.1)])
GENTLE = combine([0.3, 0.7], [cosine(0.3, 0.6), cosine(0.6, 0.2)])
CALM = Recipe(f"own {NET5}, LayerNorm", 0.1, 3)
MENDED = Recipe("own CNN 8-16-32-64, InstanceNorm before ReLU", 0.5, 3)
TWOS = Recipe(RBN, 0.05, 1, 2)

ROWS = [
    Row("nb04-c12", MLP64, 0.9372, at=1),
    Row("nb04-c38", MLP64, 0.9354, (0.1440, 0.9572), 2),
    Row("nb04-c43", MLP64, 0.9649, (0.1099, 0.9663), 3),
    Row("nb03-c155", MLP64, 0.9625),
    Row("plain-loop", MLP64, 0.9550, at=1),
    Row("nb05-c7", MLP512, 0.9397, (0.2342, 0.9323)),
    Row("nb05-c8", replace(MLP512, lr=0.3), 0.9218, (0.3020, 0.9126)),
    Row("nb05-c34", replace(MLP512, lr=GENTLE), 0.9400, (0.2381, 0.9312)),
    Row("nb06-c21", PLAIN, 0.7742, (1.7832, 0.3780), 1),
    Row("nb06-c32", PLAIN, 0.9543, (0.1765, 0.9477)),
    Row("nb06-c48", PLAIN, 0.9606, (0.1977, 0.9397)),
    Row("nb06-c55", replace(PLAIN, lr=0.9, epochs=2, watched=True), 0.9439, (0.6482, 0.7932)),
    Row("nb06-c69", WATCHED, 0.3186, (2.2562, 0.1835)),
    Row("nb06-c78", WATCHED, 0.7350, (1.6239, 0.4400)),
    Row("nb06-c98", KAIMING, 0.9572, (0.1920, 0.9398)),
    Row("nb06-c105", KAIMING, 0.9042, (1.2727, 0.5783), 1),
    Row(
        "nb06-c118", Recipe(f"{NET4}, GeneralReLU", 0.9, 1, watched=True), 0.9572, (0.5465, 0.8278)
    ),
    Row("nb06-c126", Recipe(f"{NET4}, Kaiming 0.1", UP_DOWN, 8), 0.9826, (0.0341, 0.9899)),
    Row("nb06-c129", Recipe(f"{NET4}, Kaiming 0.1 uniform", UP_DOWN, 8), 0.9822, (0.0342, 0.9898)),
    Row("nb07-c9", Recipe(NET5, 0.4, 2), 0.9698, (0.1626, 0.9502)),
    Row("nb07-c19", Recipe(f"own {NET5}, BatchNorm", 0.9, 1), 0.9520, (0.2653, 0.9189)),
    Row("nb07-c21", Recipe(f"own {NET5}, BatchNorm", 1.0, 3), 0.9707, (0.0615, 0.9810)),
    Row("nb07-c26", Recipe(BN, 1.0, 3), 0.9813, (0.0571, 0.9818)),
    Row("nb07-c31", Recipe(BN, STEEP, 8), 0.9877, (0.0185, 0.9951)),
    Row("nb07-c40", replace(CALM, lr=0.8), 0.0991, (math.nan, 0.0986), instead=CALM),
    Row(
        "nb07-c49",
        Recipe(f"own {NET5}, InstanceNorm", 0.1, 3),
        0.0991,
        (math.nan, 0.0986),
        instead=MENDED,
    ),
    Row("nb07-c63", Recipe(BN, 0.4, 1, 2), 0.2604, (2.3562, 0.1649), instead=TWOS),
    Row("nb07-c70", replace(TWOS, lr=0.4), 0.9730, (0.1579, 0.9511), instead=TWOS),
    Row("nb07-c70-at-32", Recipe(RBN, 0.4, 1, 32), 0.9730, (0.1579, 0.9511)),
    Row("nb07-c77", Recipe(RBN, linear(1.0, 0.2), 1, 32), 0.9818, (0.1573, 0.9521)),
    Row("nb07a-c11", Recipe(NET5, 0.6, 2), 0.9588, (0.3568, 0.8880)),
    Row("nb07a-c32", Recipe(NET5, 0.6, 2, lsuv=True), 0.9733, (0.1287, 0.9608)),
    Row("bn-at-32", Recipe(BN, 0.9, 1, 32, items=16_000), 0.9595, (0.307, math.nan)),
    Row("rbn-at-32", Recipe(RBN, 0.9, 1, 32, items=16_000), 0.9490, (0.288, math.nan)),
]

REMARKS = {
    "nb04-c43": "The model of nb04-c38, trained one more epoch.",
    "nb03-c155": "Their five epochs: .9533 .8684 .9609 .9664 .9625.",
    "plain-loop": "No notebook: a loop by hand on a machine like this, run for this project; .951 "
    ".955 .956, of which the median counts.",
    "nb06-c21": "Another stored version of the same cell prints .1064.",
    "nb06-c32": "Another stored version: .9643.",
    "nb06-c48": "The recipe of nb06-c32 again, after a refactoring. Another stored version: .9590.",
    "nb06-c55": "Another stored version: .9039. From here to nb06-c118 the notebook watches means, "
    "standard deviations and histograms of the layers, and so do we.",
    "nb06-c78": "The recipe of nb06-c69 again: .3186 there, .7350 here.",
    "nb06-c105": "The recipe of nb06-c98 again, one epoch, after which that one has .9362.",
    "nb07-c19": "All of the model is from `pellucid.foundations`, here and in the next row.",
    "nb07-c31": "The best MNIST result of the notebooks; .9882 after their epoch 7.",
    "nb07-c40": "Theirs diverged. Ours is `foundations.GroupNorm(1, channels)`: the moments of all "
    "of an item, as theirs, but a weight for each channel. Better: the same at lr 0.1.",
    "nb07-c49": "Theirs became NaN: the last map is 1×1, and the unbiased variance of one value is "
    "0 / 0. Ours refuses such a map by name. The population variance would not save the recipe: "
    "every map leaves this norm with the same mean, and the average over the last map, which comes "
    "next, is then the same for every image. Better: the norm before ReLU, and no fifth layer.",
    "nb07-c63": "Batches of 2. Their validation loss is 2867.7.",
    "nb07-c70": "Suspect: 25,000 steps in 18 s, where batch norm took 93 s; nb07-c77 took as long "
    "with batches of 32. Told as batches of 2; the next row takes 32.",
    "nb07-c77": '"What can we do in a single epoch?"',
    "nb07a-c11": "Another stored version: .9599.",
    "nb07a-c32": "Another stored version: .9737. Theirs sets what comes out of ReLU, ours what "
    "comes out of the convolutions and of the last layer.",
    "bn-at-32": "No notebook: a loop by hand, run for this project; so is the next row.",
}

IN_ORDER = replace(MLP64, epochs=1, shuffled=False)
LAST_BATCHES = {  # recipe, and the losses and accuracies on the last batch that they print
    "nb03-c43": (IN_ORDER, [0.3465], [0.9375]),
    "nb03-c59": (IN_ORDER, [0.1094, 0.2131, 0.2167, 0.0797, 0.0436], [0.9375] * 4 + [1.0]),
    "nb03-c112": (
        replace(MLP64, epochs=1),
        [0.4507, 0.0762, 0.2939, 0.2196, 0.1029],
        [0.875, 0.9844, 0.9375, 0.9375, 0.9688],
    ),
}

TINY = {
    f"tiny-{lr:g}": [Recipe(net, lr, 1, 2, items=4_000) for net in (BN, RBN)] for lr in (0.05, 0.4)
}
BEST = Recipe("best", 0.02, 8, 128, opt="AdamW", one_cycle=True, smoothing=0.05)

# ── the runs ────────────────────────────────────────────────────────────────────────────────────


def loaders(recipe: Recipe, seed: int) -> DataLoaders:
    """Return the course's split: the first 50,000 training images, and the last 10,000."""
    data = mnist(recipe.batch, split="course", seed=seed)
    if recipe.raw:
        data.transforms = [Normalize(0.0, 1.0)]
    if recipe.shift:
        data.augment = [Augment(shift=recipe.shift)]
    if recipe.items != 50_000 or not recipe.shuffled:
        some = ArrayDataset(*data.train.dataset[: recipe.items])
        data.train = Loader(some, recipe.batch, shuffle=recipe.shuffled, seed=seed)
    return data


def learner(recipe: Recipe, data: DataLoaders) -> Learner:
    """Return the ordinary learner for a recipe."""
    opts: dict[str, Callable[..., Optimizer]] = {
        "SGD": SGD,
        "AdamW": partial(AdamW, weight_decay=0.1, betas=(0.95, 0.99)),
    }
    loss = partial(F.cross_entropy, label_smoothing=recipe.smoothing)
    return Learner(NETS[recipe.net](), data, loss, opts[recipe.opt], metrics=[accuracy])


def train(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train by the Learner.

    Returns:
        epochs: for each, validation accuracy and loss, training accuracy and loss; last: loss and
        accuracy on the last 16 training images of the last epoch, after it; stopped: the error.
    """
    data = loaders(recipe, seed)
    seed_everything(seed)
    learn = learner(recipe, data)
    stopped = ""
    try:
        scheduled = recipe.one_cycle or callable(recipe.lr)
        learn.fit(recipe.epochs, None if scheduled else recipe.lr, callbacks(recipe))
    except (NonFiniteLoss, DataError) as error:
        stopped = f"{error.args[0]} ({error.args[1]})"
    done = learn.record.epochs
    names = ("valid/accuracy", "valid/loss", "train/accuracy", "train/loss")
    epochs = [[float(done[name][i]) for name in names] for i in range(len(done))]
    last = [math.nan, math.nan]
    try:
        after = [learn.validate()["accuracy"], math.nan, math.nan, math.nan]
        epochs += [after] * (recipe.epochs - len(epochs))
        x, y = data.train.dataset[data.train.order(recipe.epochs - 1)[-16:]]
        preds = learn.predict(x)
        last = [float(F.cross_entropy(preds, y)), float(accuracy(preds, y))]
    except DataError:  # the model refuses any images
        epochs += [[math.nan] * 4] * (recipe.epochs - len(epochs))
    return {"epochs": epochs, "last": last, "stopped": stopped}


def callbacks(recipe: Recipe) -> list[Callback]:
    """Return what a recipe needs beside the learner."""
    chosen: list[Callback] = [Progress("off")]
    if recipe.one_cycle:
        chosen.append(OneCycle(recipe.lr))
    elif callable(recipe.lr):
        chosen.append(Schedule("lr", recipe.lr))
    if recipe.lsuv:
        chosen.append(LSUV())
    if recipe.watched:
        chosen.append(Telemetry())
    return chosen


def train_by_hand(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train the same by a plain loop, with torch's own shuffling; SGD only."""
    data = mnist(split="course")
    parts = [data.train.dataset[: recipe.items], data.valid.dataset[:]]
    mean, std = (0.0, 1.0) if recipe.raw else _statistics(data.train.dataset[:][0])
    (x, y), (x_valid, y_valid) = [((part[0].float() / 255 - mean) / std, part[1]) for part in parts]
    torch.manual_seed(seed)
    model = NETS[BY_HAND.get(recipe.net, recipe.net)]()
    if recipe.lsuv:
        lsuv(model, x[: recipe.batch])
    opt = SGD(model.parameters(), lr=0.1)
    n_batches, epochs = math.ceil(len(x) / recipe.batch), []
    for epoch in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(x)) if recipe.shuffled else torch.arange(len(x))
        for number, items in enumerate(order.split(recipe.batch)):
            position = (epoch * n_batches + number) / (recipe.epochs * n_batches)
            opt.param_groups[0]["lr"] = recipe.lr(position) if callable(recipe.lr) else recipe.lr
            F.cross_entropy(model(x[items]), y[items]).backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            guesses = torch.cat([model(some).argmax(1) for some in x_valid.split(1024)])
        epochs.append([float((guesses == y_valid).float().mean()), *[math.nan] * 3])
    return {"epochs": epochs, "last": [math.nan] * 2, "stopped": ""}


def _statistics(images: Tensor) -> tuple[float, float]:
    pixels = images.float() / 255
    return float(pixels.mean()), float(pixels.std())


HOW: dict[str, Callable[[Recipe, int], dict[str, Any]]] = {
    "Learner": train,
    "by hand": train_by_hand,
}


class Runs:
    """All runs made so far, kept in a file; several processes may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.kept: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def make(self, recipe: Recipe, seeds: Iterable[int], how: str = "Learner") -> None:
        """Make the runs that are not kept yet."""
        for seed in seeds:
            self.kept = self._read()
            if str(seed) in self.kept.get(f"{how}: {recipe!r}", {}):
                continue
            began = time.process_time()
            run = HOW[how](recipe, seed)
            run |= {"seconds": time.process_time() - began, "date": str(date.today())}
            print(how, seed, recipe, [row[0] for row in run["epochs"]], file=sys.stderr, flush=True)
            self.kept = self._read()
            self.kept.setdefault(f"{how}: {recipe!r}", {})[str(seed)] = run
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(self.kept, indent=0))
            beside.replace(self.path)

    def of(self, recipe: Recipe, seeds: Iterable[int], how: str = "Learner") -> list[dict]:
        """Return the runs of these seeds, as far as they are made."""
        runs = self.kept.get(f"{how}: {recipe!r}", {})
        return [runs[str(seed)] for seed in seeds if str(seed) in runs]

    def values(
        self,
        recipe: Recipe,
        seeds: Iterable[int],
        at: int = 0,
        how: str = "Learner",
        which: int = 0,
    ) -> list[float]:
        """Return one number of each run: see `train` for which; epochs from 1, 0 is the last."""
        return [run["epochs"][at - 1][which] for run in self.of(recipe, seeds, how)]

    def median(self, row: Row, how: str = "Learner") -> float:
        """Return the median validation accuracy at the row's epoch; NaN if no run is made."""
        values = self.values(row.recipe, SEEDS, row.at, how)
        return statistics.median(values) if values else math.nan

    def is_short(self, row: Row) -> bool:
        """Say whether all seeds are run and their median does not reach the row's accuracy."""
        done = len(self.of(row.recipe, SEEDS)) == len(SEEDS)
        return done and not row.diverged and not self.median(row) >= row.valid

    def by_hand(self, recipe: Recipe) -> Sequence[int]:
        """Return the seeds for the loop in plain torch."""
        slow = any(run["seconds"] > SLOW for run in self.of(recipe, SEEDS))
        return SEEDS if slow else SEEDS_BY_HAND


# ── the report ──────────────────────────────────────────────────────────────────────────────────


def middle(values: Sequence[float]) -> str:
    """Return "median (least to most)", four digits."""
    if not values:
        return "not run"
    if any(map(math.isnan, values)):
        return "refused"
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def pair(loss: float, correct: float) -> str:
    """Return "loss / accuracy"; what is not there is a dash."""
    return " / ".join("–" if math.isnan(v) else f"{v:.4f}" for v in (loss, correct))


def main_table(runs: Runs) -> str:
    """Set theirs and ours side by side."""
    lines = []
    for row in ROWS:
        made = runs.of(row.recipe, SEEDS)
        valid = runs.values(row.recipe, SEEDS, row.at)
        train_loss = runs.values(row.recipe, SEEDS, row.at, which=3)
        train_accuracy = runs.values(row.recipe, SEEDS, row.at, which=2)
        stopped = sum(bool(run["stopped"]) for run in made)
        done = "–" if row.diverged else "yes"
        reached = "no" if runs.is_short(row) else done if len(made) == len(SEEDS) else ""
        ours = middle(valid) + (f"; {stopped} of {len(made)} stopped" if stopped else "")
        lines.append(
            [
                row.key,
                str(row.recipe),
                str(row.epochs),
                f"{row.valid:.4f}",
                pair(*row.train) if row.train else "–",
                ours,
                pair(statistics.median(train_loss), statistics.median(train_accuracy))
                if made
                else "–",
                reached,
                f"{statistics.mean(run['seconds'] for run in made):.0f}" if made else "",
            ]
        )
    heads = ["row", "recipe", "epochs", "theirs, valid", "theirs, train loss / acc"]
    heads += [
        "ours, valid: median (least to most)",
        "ours, train loss / acc",
        "reached",
        "CPU s a run",
    ]
    return table(heads, lines)


def by_hand_table(runs: Runs) -> str:
    """For the rows not reached: were the sources lucky, or are we wrong?"""
    lines = []
    for row in filter(runs.is_short, ROWS):
        seeds = runs.by_hand(row.recipe)
        line = [row.key, f"{row.valid:.4f}", middle(runs.values(row.recipe, SEEDS, row.at))]
        for how in HOW:
            values = runs.values(row.recipe, seeds, row.at, how)
            reach = sum(value >= row.valid for value in values)
            line += [middle(values), f"{reach} of {len(values)}"]
        lines.append(line)
    heads = ["row", "theirs", "Learner, three seeds", "Learner, all seeds", "reach theirs"]
    return table([*heads, "plain loop, all seeds", "reach theirs"], lines)


def better_table(runs: Runs) -> str:
    """Show what the same model can do in as many epochs."""
    lines = []
    for row in ROWS:
        values = runs.values(row.better, SEEDS)
        if values and (runs.is_short(row) or row.instead):
            beaten = "yes" if statistics.median(values) >= row.valid else "no"
            text = str(row.better).removeprefix(f"{row.recipe.net}; ")
            lines.append([row.key, text, f"{row.valid:.4f}", middle(values), beaten])
    return table(["row", "recipe", "theirs", "ours: median (least to most)", "beaten"], lines)


def last_batch_table(runs: Runs) -> str:
    """Compare what notebook 03 prints before it has validation data: the last batch."""
    lines = []
    for key, (recipe, losses, accuracies) in LAST_BATCHES.items():
        last = [run["last"] for run in runs.of(recipe, SEEDS)]
        line = [key, str(recipe), middle(losses), f"{statistics.median(accuracies):.4f}"]
        line += [middle([loss for loss, _ in last]), middle([correct for _, correct in last])]
        lines.append([*line, middle(runs.values(recipe, SEEDS))])
    heads = ["rows", "recipe", "theirs, loss", "accuracy", "ours, loss", "accuracy", "ours, valid"]
    return table(heads, lines)


def tiny_table(runs: Runs) -> str:
    """Batches of 2: batch norm and running batch norm, seed by seed."""
    lines = []
    for plain, running in TINY.values():
        pairs = zip(runs.values(plain, SEEDS), runs.values(running, SEEDS), strict=False)
        for seed, (without, with_it) in enumerate(pairs):
            gain = with_it - without
            met = "yes" if with_it >= 0.8 and gain >= 0.3 else "no"
            line = [f"{plain.lr:g}", str(seed), f"{without:.4f}", f"{with_it:.4f}"]
            lines.append([*line, f"{gain:+.4f}", met])
    heads = [
        "lr",
        "seed",
        "BatchNorm2d",
        "RunningBatchNorm",
        "difference",
        "≥ 0.80 and ≥ 0.3 above",
    ]
    return table(heads, lines)


def best_text(runs: Runs) -> str:
    """Show the best we know with at most 62,090 parameters in eight epochs, seed by seed."""
    values = runs.values(BEST, SEEDS)
    made = runs.of(BEST, SEEDS)
    lines = [
        [str(seed), f"{value:.4f}", f"{run['seconds']:.0f}"]
        for seed, value, run in zip(SEEDS, values, made, strict=False)
    ]
    heads = ["seed", "valid accuracy after epoch 8", "CPU s"]
    return f"{BEST_INTRODUCTION}\n\n{table(heads, lines)}\n\nMedian: {middle(values)}."


INTRODUCTION = """\
Written by `benchmarks/reproduce.py`; the recipes are its `ROWS`. The course's split: the first
50,000 of MNIST's training images to train on, the last 10,000 of them to validate. Sources: the
notebooks 03 to 07a of "from the foundations", whose numbers are single runs without a seed. Ours:
the ordinary `Learner`, seeds 0, 1 and 2, none left out; a seed fixes the first weights and the
order of the data. Batches of 512 and pixels normalised, unless said; cross-entropy, plain SGD
without weight decay; training figures are averages during the epoch, the notebooks' way. "Reached":
our median is at least their number. A model called "own" is made of `pellucid.foundations` alone.
"Stopped": the loss became NaN or infinite, where the `Learner` stops; what counts then is the
accuracy of the weights it stopped with. The remarks say why and where."""

BY_HAND_INTRODUCTION = """\
A faithful repetition of a lucky run falls short of it. So each row above that is not reached was
trained by a second loop, written by hand in plain torch (`train_by_hand`: no Learner, no Loader,
torch's own shuffling), and by the Learner again, both with seeds 0 to 9, or 0 to 2 where a run
takes more than 20 seconds of CPU time. With the same seed both begin with the same weights but see
the data in different orders. If a share of the runs reaches the source's number, it was lucky; if
the two loops differ, one of them is wrong."""

BETTER_INTRODUCTION = """\
For the same model, the same data and the same number of epochs: AdamW (weight decay 0.1, second
beta 0.99) with one cycle and batches of 128, unless said otherwise. Run for every row that is not
reached, and for those whose recipe cannot work."""

LAST_BATCH_INTRODUCTION = """\
Before it has validation data, notebook 03 prints loss and accuracy of its last batch, 16 images
(once of 64): too few to compare by, given for completeness. Theirs: the median over the refactored
versions of the same loop. The first loops do not shuffle."""

TINY_INTRODUCTION = """\
Batches of 2, the first 4,000 images, one epoch, the CNN 8-16-32-64-64 with the norm after each
activation; validated on all 10,000."""

BEST_INTRODUCTION = """\
At most 62,090 parameters and 8 epochs; the notebooks' best is 0.9882 (nb07-c31, 62,090 parameters
with its batch norms' biases left out). Ours has 56,474 parameters: convolutions 3×3 of 16, 32, 32,
48 and 64 channels, each with batch norm and ReLU, a max-pool after the first and the third, the
mean over the last map, a Linear. AdamW (weight decay 0.1, second beta 0.99), one cycle to 0.02,
batches of 128, label smoothing 0.05, shifts of up to two pixels. The recipe was chosen on the same
10,000 validation images, by runs with other seeds (10 and up): the figures are slightly
optimistic. Seeds 0, 1, 2 were run once, with what was chosen."""

LEFT_OUT = """\
The results on Imagenette (2c to 2e of the ledger): the data are not at hand here. Timings: theirs
are of a GPU."""


def remarks(runs: Runs) -> str:
    """List what there is to say about single rows."""
    lines = [f"- **{key}**: {remark}" for key, remark in REMARKS.items()]
    for row in ROWS:
        reasons: dict[str, list[str]] = {}
        for seed, run in zip(SEEDS, runs.of(row.recipe, SEEDS), strict=False):
            reasons.setdefault(run["stopped"], []).append(str(seed))
        for reason, seeds in reasons.items():
            if reason:
                lines.append(f"- **{row.key}**, seed {', '.join(seeds)}: {reason}")
    return "\n".join(lines)


def write_report(runs: Runs) -> None:
    """Write the report and the page of the documentation."""
    parts = [
        INTRODUCTION,
        f"## What the notebooks print\n\n{main_table(runs)}",
        f"## Rows that are not reached\n\n{BY_HAND_INTRODUCTION}\n\n{by_hand_table(runs)}",
        f"## Better recipes\n\n{BETTER_INTRODUCTION}\n\n{better_table(runs)}",
        f"## The last batch\n\n{LAST_BATCH_INTRODUCTION}\n\n{last_batch_table(runs)}",
        f"## Tiny batches\n\n{TINY_INTRODUCTION}\n\n{tiny_table(runs)}",
        f"## The best on MNIST\n\n{best_text(runs)}",
        f"## Remarks\n\n{remarks(runs)}",
        f"## Left out\n\n{LEFT_OUT}",
    ]
    path = report("reproduce", "Reproduction", "python benchmarks/reproduce.py", *parts)
    page = Path(__file__).parents[1] / "docs" / "reproduction.md"
    page.write_text(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train what the sources print, and compare.")
    parser.add_argument("--rows", nargs="*", help="words; all rows whose key has one of them")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    asked = parser.parse_args()

    def wanted(key: str) -> bool:
        return asked.rows is None or any(word in key for word in asked.rows)

    torch.set_num_threads(1)
    runs = Runs(RESULTS / f"reproduce_{hardware()}.json")
    singles = {"best": [BEST], **TINY, **{key: [part[0]] for key, part in LAST_BATCHES.items()}}
    for row in ROWS:
        if wanted(row.key):
            runs.make(row.recipe, asked.seeds)
            if runs.is_short(row) or row.instead:
                runs.make(row.better, asked.seeds)
            if runs.is_short(row):
                for how in HOW:
                    runs.make(row.recipe, runs.by_hand(row.recipe), how)
    for key, recipes in singles.items():
        for recipe in recipes if wanted(key) else ():
            runs.make(recipe, asked.seeds)
    write_report(runs)


if __name__ == "__main__":
    main()
