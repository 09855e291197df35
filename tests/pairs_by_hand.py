"""One training loop in plain torch that does by hand what a row of tests/pairs_array.py names.

Nothing of the library is used here. Each technique is written as its paper or torch's own
documentation has it, one after the other, in the order in which they must be done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

EPOCHS = 2
LRS = {"SGD": 0.02, "AdamW": 0.01, "ByRole": 0.01}
MAX_NORM, MAX_VALUE, DECAY = 0.2, 0.02, 0.9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Batches = list[tuple[Tensor, Tensor]]
State = dict[str, Tensor]
Draw = Callable[[int, int, int], tuple[float, int]]


# ── something to train ──────────────────────────────────────────────────────────────────────────


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


N_FROZEN = 2
"""Modules of the model, from the first: a convolution and its batch norm."""

HIDDEN = ("0.weight", "3.weight", "7.weight")
"""Weights of hidden layers, which are Muon's; the rest is AdamW's, the head its only matrix."""


def batches(*sizes: int) -> Batches:
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), 1, 6, 6, generator=generator)
    y = x[:, 0, :3].sum(2).argmax(1)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def training() -> Batches:
    """Seven, so that windows of 2 and of 3 leave one over, the smallest."""
    return batches(8, 6, 8, 5, 8, 7, 4)


def validation() -> Batches:
    return batches(8, 8, 5)


def cost(preds: Tensor, y: Tensor) -> Tensor:
    """Give a loss so large that the first gradients overflow in fp16."""
    return 4 * F.cross_entropy(preds, y)


# ── the loop ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Trained:
    """What came of a run.

    Attributes:
        plain: the model's state after the last step, in each process.
        final: the state that the run ends with: the average, where there is one.
        train_losses: of every batch.
        valid_losses: of every epoch, the mean over all items.
    """

    plain: list[State] = field(default_factory=list)
    final: State = field(default_factory=dict)
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)


def train(row: dict[str, str], draw: Draw) -> Trained:
    """Train as a row says.

    Args:
        row: levels by factor; "compile" makes no difference here.
        draw: gives share and roll of mixup for (epoch, batch, number of items).
    """
    model, found, data = cnn(), Trained(), training()
    n_frozen = N_FROZEN if row["freeze"] == "frozen" else 0
    model[:n_frozen].requires_grad_(False)
    if row["precision"] in DTYPES:
        model.to(memory_format=torch.channels_last)
    params = [param for param in model.parameters() if param.requires_grad]
    step = stepper(row["optimizer"], model)
    n_processes, window = int(row["processes"]), int(row["accumulate"].replace("none", "1"))
    # the same parameters in each process, but batch norm's statistics are of its own part
    replicas = [sharing_parameters(model) for _ in range(n_processes)]
    average = copy.deepcopy(model) if row["ema"] == "EMA" else None
    scale, n_held, n_updates = 65536.0 if row["precision"] == "fp16" else 1.0, 0.0, 0
    for epoch in range(EPOCHS):
        for replica in replicas:
            replica.train()
            replica[:n_frozen].eval()
        for i, (x, y) in enumerate(data):
            # in units of the first batch: the gradient of a sum over items would overflow in fp16
            size = len(x) / len(data[0][0]) if window > 1 else 1.0
            whole = 0.0
            for replica, (own_x, own_y) in zip(replicas, parts(x, y, n_processes), strict=True):
                mix = draw(epoch, i, len(own_x)) if row["mixup"] == "MixUp" else (1.0, 0)
                with torch.autocast(
                    "cpu", DTYPES.get(row["precision"]), row["precision"] != "none"
                ):
                    loss = mixed_loss(replica, own_x, own_y, *mix)
                share = len(own_x) / len(x)
                whole += loss.item() * share
                # processes take the mean of their gradients, so each has its share times as many
                (loss * (share * n_processes) * size * scale).backward()
            found.train_losses.append(whole)
            n_held += size
            if (i + 1) % window and i + 1 < len(data):
                continue
            for param in params:
                param.grad /= n_processes
                param.grad /= n_held
                param.grad /= scale
            n_held = 0.0
            if all(param.grad.isfinite().all() for param in params):
                clip(params, row["clip"])
                step()
            else:
                scale /= 2
            for param in params:
                param.grad = None
            if average is not None:
                draw_towards(average, replicas, 1 - min(DECAY, (1 + n_updates) / (10 + n_updates)))
                n_updates += 1
        found.plain = [state_of(replica) for replica in replicas]
        share_statistics(replicas)
        judged = replicas[0] if average is None else average
        found.valid_losses.append(validate(judged, row["precision"]))
        found.final = state_of(judged)
    return found


def validate(model: nn.Module, precision: str) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", DTYPES.get(precision), precision != "none"):
        for x, y in validation():
            total += cost(model(x), y).item() * len(x)
    return total / sum(len(x) for x, _ in validation())


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ── the techniques ──────────────────────────────────────────────────────────────────────────────


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, share: float, by: int) -> Tensor:
    """Mixup (Zhang et al., 2018): the input, and the losses by both targets, in one proportion."""
    if share == 1:
        return cost(model(x), y)
    preds = model(torch.lerp(x.roll(by, 0), x, share))
    return share * cost(preds, y) + (1 - share) * cost(preds, y.roll(by, 0))


def clip(params: list[nn.Parameter], how: str) -> None:
    if how == "norm":
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        for param in params:
            param.grad *= (MAX_NORM / (norm + 1e-6)).clamp(max=1)
    elif how == "value":
        for param in params:
            param.grad.clamp_(-MAX_VALUE, MAX_VALUE)


@torch.no_grad()
def draw_towards(average: nn.Module, replicas: list[nn.Sequential], share: float) -> None:
    """Move an average towards the model: its parameters, and statistics as all processes know."""
    states = [replica.state_dict() for replica in replicas]
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():
            now = torch.stack([state[name] for state in states]).mean(0)
            mean.lerp_(now, share)
        else:
            mean.copy_(states[0][name])


def stepper(kind: str, model: nn.Module) -> Callable[[], object]:
    """Return what moves the parameters by their gradients."""
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if kind == "SGD":
        return SGD(named.values(), lr=LRS[kind], momentum=0.9, fused=True).step
    if kind == "AdamW":
        return AdamW(named.values(), lr=LRS[kind], fused=True).step
    own = [param for name, param in named.items() if name not in HIDDEN]
    groups = [
        {"params": [param for param in own if param.ndim > 1]},
        {"params": [param for param in own if param.ndim == 1], "weight_decay": 0.0},
    ]
    adam = AdamW(groups, lr=LRS[kind], fused=True)
    momenta = {name: torch.zeros_like(named[name]) for name in HIDDEN if name in named}

    def step() -> None:
        for name, momentum in momenta.items():
            muon(named[name], momentum, LRS[kind])
        adam.step()

    return step


@torch.no_grad()
def muon(param: Tensor, momentum: Tensor, lr: float) -> None:
    """Muon (Jordan et al., 2024), with the step's size of Liu et al. (2025) and decay 0.1."""
    momentum *= 0.95
    momentum += 0.05 * param.grad
    x = (0.05 * param.grad + 0.95 * momentum).flatten(1)
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if rows > columns else x
    param *= 1 - lr * 0.1
    param -= lr * 0.2 * max(rows, columns) ** 0.5 * x.view(param.shape)


# ── many processes in one ───────────────────────────────────────────────────────────────────────


def parts(x: Tensor, y: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.tensor_split(n), y.tensor_split(n), strict=True))


def sharing_parameters(model: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(model, {id(param): param for param in model.parameters()})


@torch.no_grad()
def share_statistics(replicas: list[nn.Sequential]) -> None:
    """Give all processes the mean of their statistics."""
    for same in zip(*(replica.buffers() for replica in replicas), strict=True):
        if same[0].is_floating_point():
            mean = torch.stack(same).mean(0)
            for buffer in same:
                buffer.copy_(mean)
