"""What accuracy do the parts reach on MNIST and Fashion-MNIST, in how much time?

Needs the real files: PELLUCID_DATA, see `pellucid.data.mnist`. Seeds are 0, 1, 2, ... and none is
left out; a seed fixes the weights at the start and the order of the data.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory

import torch
from measure import report, table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import SGD, AdamW

from pellucid import Learner, Record, seed_everything
from pellucid.callbacks import Progress
from pellucid.data import Normalize, mnist
from pellucid.metrics import accuracy
from pellucid.vision import mlp, simple_cnn


def mlp_one_epoch(seed: int) -> float:
    """Train 784-50-10 with SGD 0.5, batches of 64, pixels from 0 to 1, course split."""
    data = mnist(64, split="course", seed=seed)
    data.transforms = [Normalize(0.0, 1.0)]
    seed_everything(seed)
    return _fit(Learner(mlp(784, 10), data, opt_func=SGD, lr=0.5, metrics=[accuracy]), 1)


def lesson_cnn() -> nn.Module:
    """Return the lessons' CNN, 15,594 parameters."""
    return simple_cnn(1, 10, widths=(8, 16, 32, 32), first_kernel=5)


def plain_cnn(lr: float, seed: int) -> float:
    """Train the lessons' CNN with plain SGD, batches of 512, three epochs."""
    data = mnist(512, split="course", seed=seed)
    seed_everything(seed)
    return _fit(Learner(lesson_cnn(), data, opt_func=SGD, lr=lr, metrics=[accuracy]), 3)


def best_cnn(seed: int) -> float:
    """Train the best we know with 15,594 parameters, three epochs.

    Convolutions 16, 20, 28, 28, each with batch norm and ReLU, a max-pool after the first two;
    AdamW (weight decay 0.1, second beta 0.99), one cycle up to 0.02, batches of 128, label
    smoothing 0.05. Chosen on the same split, on other runs with seed 0.
    """
    layers: list[nn.Module] = []
    for before, after, pool in ((1, 16, True), (16, 20, True), (20, 28, False), (28, 28, False)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    data = mnist(128, split="course", seed=seed)
    seed_everything(seed)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(28, 10))
    learn = Learner(
        convert_conv2d_weight_memory_format(model, torch.channels_last),
        data,
        partial(F.cross_entropy, label_smoothing=0.05),
        partial(AdamW, weight_decay=0.1, betas=(0.95, 0.99)),
        metrics=[accuracy],
    )
    record = learn.fit_one_cycle(3, 0.02, callbacks=[Progress("off")])
    return record.epochs.last("valid/accuracy")


def _fit(learn: Learner, epochs: int) -> float:
    return learn.fit(epochs, callbacks=[Progress("off")]).epochs.last("valid/accuracy")


def fashion_from_the_command_line(seed: int) -> float:
    """Run the command that a user types, with torch's own number of threads."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pellucid", "train", "fashion-mnist", "--epochs", "5"]
        command += ["--seed", str(seed), "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Record.load(f"{folder}/record.json").epochs.last("valid/accuracy")


ROWS: dict[str, tuple[Callable[[int], float], int]] = {
    "MNIST MLP 784-50-10, SGD 0.5, batch 64, 1 epoch": (mlp_one_epoch, 3),
    "MNIST CNN, plain, SGD 0.4, batch 512, 3 epochs": (partial(plain_cnn, 0.4), 5),
    "MNIST CNN, plain, SGD 0.6, batch 512, 3 epochs": (partial(plain_cnn, 0.6), 5),
    "MNIST CNN, the best with 15,594 parameters, 3 epochs": (best_cnn, 5),
    "pellucid train fashion-mnist --epochs 5": (fashion_from_the_command_line, 2),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (run, n_seeds) in ROWS.items():
        began = time.perf_counter()
        accuracies = [run(seed) for seed in range(n_seeds)]
        seconds = (time.perf_counter() - began) / n_seeds
        each = " ".join(f"{value:.4f}" for value in accuracies)
        rows.append([name, f"{statistics.median(accuracies):.4f}", each, f"{seconds:.0f}"])
        print(rows[-1], file=sys.stderr)
    heads = ["run", "valid accuracy, median", "seeds 0, 1, ...", "seconds a run"]
    report("accuracy", "Accuracy", "python benchmarks/accuracy.py", table(heads, rows))


if __name__ == "__main__":
    main()
