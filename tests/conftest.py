"""What all tests share: one thread, one seed, and something tiny to train."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from pellucid import DataLoaders, seed_everything
from pellucid.callbacks import Progress


@pytest.fixture(autouse=True)
def same_every_time():
    # with several threads, sums are split differently from run to run and bits differ
    torch.set_num_threads(1)
    seed_everything(0)


@pytest.fixture
def data() -> DataLoaders:
    """Three classes of 6 numbers: 5 batches of 8 to train on (the last has 6), 2 to validate."""
    x = torch.randn(58, 6)
    y = x[:, :3].argmax(1)
    return DataLoaders.from_arrays((x[:38], y[:38]), (x[38:], y[38:]), batch_size=8, classes=3)


@pytest.fixture
def model() -> nn.Module:
    """6 numbers in, 3 classes out, with what makes a model hard to leave alone."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


@pytest.fixture
def quiet() -> Progress:
    return Progress("off")


@pytest.fixture
def real_data() -> Path:
    """The folder of the real data sets."""
    folder = Path(os.environ.get("PELLUCID_DATA") or "/nowhere")
    if not (folder / "mnist").is_dir():
        pytest.skip("PELLUCID_DATA is not set: no MNIST files")
    return folder


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Hear SIGINT as a shell in the foreground does; one in the background passes on deafness."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
