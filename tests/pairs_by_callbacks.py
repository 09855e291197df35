"""The rows of tests/pairs_array.py trained by the library, in one process or in two.

    torchrun --standalone --nproc-per-node 2 tests/pairs_by_callbacks.py FOLDER

goes through all rows with two processes, and each rank writes what it found to FOLDER/rank<r>.pt.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from pairs_array import Row, covering_array, name_of
from pairs_by_hand import (
    DECAY,
    EPOCHS,
    LRS,
    MAX_NORM,
    MAX_VALUE,
    N_FROZEN,
    Trained,
    cnn,
    cost,
    state_of,
    training,
    validation,
)
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW

from pellucid import Callback, Learner, muon
from pellucid.callbacks import (
    EMA,
    Accumulate,
    Clip,
    Compile,
    Distributed,
    MixUp,
    Precision,
    Progress,
)
from pellucid.distributed import rank
from pellucid.freezing import freeze
from pellucid.mixing import draw_pairing
from pellucid.muon import Muon
from pellucid.roles import ByRole

ALPHA, SEED = 0.4, 3

OPTIMIZERS = {
    "SGD": partial(SGD, momentum=0.9),
    "AdamW": AdamW,
    "ByRole": ByRole(AdamW, {"matrix": Muon, "conv": Muon}),
}

CLIPS = {"norm": Clip(norm=MAX_NORM), "value": Clip(value=MAX_VALUE)}


def draw(epoch: int, batch: int, n: int) -> tuple[float, int]:
    """Draw as MixUp does."""
    return draw_pairing(SEED, epoch, batch, n, ALPHA)


class Watch(Callback):
    """Keep the state after the last batch, before anyone puts an average in its place."""

    order = 1000

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self.state = state_of(learn.model)


def techniques(row: Row) -> list[Callback]:
    """Give a row's callbacks, in no order that helps."""
    return [
        *([EMA(DECAY)] if row["ema"] == "EMA" else []),
        *([CLIPS[row["clip"]]] if row["clip"] in CLIPS else []),
        *([Precision(row["precision"])] if row["precision"] != "none" else []),
        *([MixUp(ALPHA, SEED)] if row["mixup"] == "MixUp" else []),
        *([Accumulate(int(row["accumulate"]))] if row["accumulate"] != "none" else []),
        *([Compile(backend="aot_eager")] if row["compile"] == "compiled" else []),
        *([Distributed("ddp", 60.0)] if row["processes"] == "2" else []),
    ]


def train(row: Row) -> Trained:
    """Train a row; in every process, if it has two."""
    model, watch = cnn(), Watch()
    if row["freeze"] == "frozen":
        freeze(*model[:N_FROZEN])
    counters.clear()
    learn = Learner(
        model, (training(), validation()), cost, OPTIMIZERS[row["optimizer"]],
        LRS[row["optimizer"]], callbacks=[Progress("off"), watch, *techniques(row)], device="cpu",
    )  # fmt: skip
    record = learn.fit(EPOCHS)
    if row["compile"] == "compiled" and not counters["frames"]["ok"]:
        raise RuntimeError("nothing was compiled")
    return Trained(
        [watch.state], state_of(learn.model),
        record["train/loss"].tolist(), record.epochs["valid/loss"].tolist(),
    )  # fmt: skip


def float32(device: torch.device) -> tuple[str, str]:
    """Let Muon's iterations be in float32 on any machine, as the reference's are."""
    return "fp32", "as by hand"


if __name__ == "__main__":
    torch.set_num_threads(1)
    muon.choose_precision = float32
    found = {name_of(row): train(row) for row in covering_array() if row["processes"] == "2"}
    torch.save(found, Path(sys.argv[1]) / f"rank{rank()}.pt")
