"""Law 1, the loop is the loop: `fit` gives bit for bit the weights that a loop by hand gives."""

import copy
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

import pellucid.callbacks
from pellucid import Callback, DataLoaders, Learner, Loader
from pellucid.callbacks import GradientCheckpointing, OneCycle, Progress, Schedule
from pellucid.data import ArrayDataset
from pellucid.metrics import accuracy
from pellucid.schedules import cosine, linear

EPOCHS = 3


# ── the loop by hand ──────────────────────────────────────────────────────────────────────────


def train_by_hand(
    model: nn.Module,
    opt: Optimizer,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    train: Iterable[Any],
    valid: Iterable[Any],
    set_hypers: Callable[[Optimizer, float], None] = lambda opt, progress: None,
    epochs: int = EPOCHS,
) -> None:
    n_all, n_done = epochs * len(train), 0
    for _ in range(epochs):
        model.train()
        for batch in train:
            set_hypers(opt, n_done / n_all)
            loss = loss_of(model, batch)
            loss.backward()
            if isinstance(opt, LBFGS):
                opt.step(partial(evaluate_again, model, opt, loss_of, batch))
            else:
                opt.step()
            opt.zero_grad()
            n_done += 1
        model.eval()
        with torch.no_grad():
            for batch in valid:
                loss_of(model, batch)


def evaluate_again(model, opt, loss_of, batch):
    opt.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss


def assert_same_bits(ours: nn.Module, theirs: nn.Module) -> None:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    different = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
    assert not different


def assert_moved(model: nn.Module, start: dict[str, torch.Tensor]) -> None:
    # two loops that train nothing are equal too
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


# ── models, data and schedules ────────────────────────────────────────────────────────────────


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.left(left) * self.right(right)


class ReconstructionError(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.stretch = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x):
        return self.stretch(self.squeeze(x)) - x


def cut(*arrays: torch.Tensor, size: int = 8) -> list[Any]:
    return list(zip(*(array.split(size) for array in arrays), strict=True))


def labelled(n: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, *(shape or (6,)))
    return x, x.flatten(1)[:, :3].argmax(1)


def shuffled_by_torch() -> DataLoader:
    torch.manual_seed(2)
    return DataLoader(TensorDataset(*labelled(40)), batch_size=8, shuffle=True)


def shuffled_by_loader() -> Loader:
    torch.manual_seed(2)
    return Loader(ArrayDataset(*labelled(40)), batch_size=8, shuffle=True, seed=3)


def two_inputs() -> list[dict[str, torch.Tensor]]:
    return [
        {"left": left, "right": right, "target": left[:, :3] * right[:, :1]}
        for left, right in cut(torch.randn(40, 4), torch.randn(40, 2))
    ]


def two_targets(preds, labels, weights):
    return (F.cross_entropy(preds, labels, reduction="none") * weights).mean()


def mean_square(preds):
    return preds.square().mean()


def two_groups(params, lr):
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:]}]
    return SGD(groups, lr=lr, momentum=0.9, fused=True)


def half_wave(position, start, end):
    return start + (1 + math.cos(math.pi * (1 - position))) * (end - start) / 2


def bump(progress, start, top, end):
    if progress < 0.25:
        return half_wave(progress / 0.25, start, top)
    return half_wave((progress - 0.25) / 0.75, top, end)


def one_cycle_by_hand(opt: Optimizer, progress: float) -> None:
    for group in opt.param_groups:
        group["lr"] = bump(progress, 0.02 / 25, 0.02, 0.02 / 1e5)
        momentum = bump(progress, 0.95, 0.85, 0.95)
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def two_rates_by_hand(opt: Optimizer, progress: float) -> None:
    opt.param_groups[0]["lr"] = 0.1 + progress * (0.01 - 0.1)
    opt.param_groups[1]["lr"] = half_wave(progress, 0.02, 0.2)


# ── the cases ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Case:
    model: Callable[[], nn.Module]
    ours: Callable[..., Optimizer]
    theirs: Callable[..., Optimizer]
    lr: float = 0.1
    train: Callable[[], Any] = lambda: cut(*labelled(40))
    loss_func: Callable[..., torch.Tensor] = F.cross_entropy
    loss_of: Callable[[nn.Module, Any], torch.Tensor] = lambda model, batch: F.cross_entropy(
        model(batch[0]), batch[1]
    )
    n_inputs: int = 1
    callbacks: list[Callback] = field(default_factory=list)
    set_hypers: Callable[[Optimizer, float], None] = lambda opt, progress: None


fused_sgd = partial(SGD, fused=True)
momentum = partial(SGD, momentum=0.9)

CASES = {
    "MLP, SGD": Case(mlp, SGD, fused_sgd),
    "momentum": Case(
        mlp, partial(momentum, nesterov=True), partial(momentum, nesterov=True, fused=True)
    ),
    "AdamW": Case(mlp, AdamW, partial(AdamW, fused=True), lr=0.01),
    "CNN with batch norm": Case(
        cnn, Adam, partial(Adam, fused=True), lr=0.01, train=lambda: cut(*labelled(40, 1, 6, 6))
    ),
    "dropout": Case(with_dropout, SGD, fused_sgd),
    "RMSprop": Case(mlp, RMSprop, partial(RMSprop, foreach=True), lr=0.01),
    "LBFGS": Case(mlp, partial(LBFGS, max_iter=3), partial(LBFGS, max_iter=3)),
    "two groups, each with its schedule": Case(
        mlp,
        two_groups,
        lambda params, lr: two_groups(list(params), lr),
        callbacks=[Schedule("lr", [linear(0.1, 0.01), cosine(0.02, 0.2)])],
        set_hypers=two_rates_by_hand,
    ),
    "one cycle, Adam's beta": Case(
        with_dropout,
        AdamW,
        partial(AdamW, fused=True),
        callbacks=[OneCycle(0.02)],
        set_hypers=one_cycle_by_hand,
    ),
    "one cycle, momentum": Case(
        mlp,
        momentum,
        partial(momentum, fused=True),
        callbacks=[OneCycle(0.02)],
        set_hypers=one_cycle_by_hand,
    ),
    "ragged last batch": Case(cnn, SGD, fused_sgd, train=lambda: cut(*labelled(29, 1, 6, 6))),
    "dict batches with two inputs": Case(
        TwoInputs,
        SGD,
        fused_sgd,
        train=two_inputs,
        loss_func=F.mse_loss,
        loss_of=lambda model, b: F.mse_loss(model(left=b["left"], right=b["right"]), b["target"]),
        n_inputs=2,
    ),
    "tuple batches with two inputs": Case(
        TwoInputs,
        SGD,
        fused_sgd,
        train=lambda: cut(torch.randn(40, 4), torch.randn(40, 2), torch.randn(40, 3)),
        loss_func=F.mse_loss,
        loss_of=lambda model, batch: F.mse_loss(model(batch[0], batch[1]), batch[2]),
        n_inputs=2,
    ),
    "two targets": Case(
        mlp,
        SGD,
        fused_sgd,
        train=lambda: cut(*labelled(40), torch.rand(40)),
        loss_func=two_targets,
        loss_of=lambda model, batch: two_targets(model(batch[0]), batch[1], batch[2]),
    ),
    "no target": Case(
        ReconstructionError,
        SGD,
        fused_sgd,
        train=lambda: list(torch.randn(40, 6).split(8)),
        loss_func=mean_square,
        loss_of=lambda model, batch: mean_square(model(batch)),
    ),
    "torch DataLoader, shuffled": Case(with_dropout, SGD, fused_sgd, train=shuffled_by_torch),
    "Loader, shuffled": Case(with_dropout, SGD, fused_sgd, train=shuffled_by_loader),
}


def train_both(case: Case, callbacks: Iterable[Callback], metrics: Iterable[Any] = ()) -> Learner:
    """Train the same start in both ways, compare, and return the learner."""
    torch.manual_seed(1)
    plain = case.model()
    start = copy.deepcopy(plain.state_dict())
    learn = Learner(
        copy.deepcopy(plain),
        DataLoaders(fresh(case), fresh(case), n_inputs=case.n_inputs),
        case.loss_func,
        case.ours,
        case.lr,
        metrics=metrics,
        device="cpu",
    )
    torch.manual_seed(4)
    learn.fit(EPOCHS, callbacks=[*copy.deepcopy(case.callbacks), *callbacks])
    opt, train, valid = theirs(case, plain), fresh(case), fresh(case)
    torch.manual_seed(4)
    train_by_hand(plain, opt, case.loss_of, train, valid, case.set_hypers)
    assert_same_bits(learn.model, plain)
    assert_moved(learn.model, start)
    return learn


def fresh(case: Case) -> Any:
    torch.manual_seed(3)
    return case.train()


def theirs(case: Case, model: nn.Module) -> Optimizer:
    return case.theirs(model.parameters(), lr=case.lr)


@pytest.mark.parametrize("name", CASES)
def test_fit_gives_the_weights_of_a_loop_by_hand(name, quiet):
    train_both(CASES[name], [quiet])


@pytest.mark.parametrize("name", CASES)
def test_watching_does_not_change_a_bit(name):
    learn = train_both(CASES[name], [make() for make in observers()], [mean_prediction])
    assert len(learn.record["train/mean_prediction"]) == EPOCHS * len(learn.data.train)


@pytest.mark.parametrize("show", ["lines", "live", "auto", "off"])
def test_showing_does_not_change_a_bit(show):
    train_both(CASES["dropout"], [Progress(show)], [accuracy])


def test_the_unfused_form_equals_torchs_default_loop(quiet):
    unfused = Case(mlp, partial(SGD, momentum=0.9, fused=False), partial(SGD, momentum=0.9))
    train_both(unfused, [quiet])


def test_the_default_form_is_the_fused_one(model, data, quiet):
    learn = Learner(model, data, callbacks=[quiet], device="cpu")
    learn.fit(1)
    assert learn.opt.defaults["fused"] is True


def test_several_fits_are_one_loop_with_one_optimiser(quiet):
    case = CASES["AdamW"]
    torch.manual_seed(1)
    plain = mlp()
    learn = Learner(
        copy.deepcopy(plain), (fresh(case), fresh(case)), F.cross_entropy, lr=0.01, device="cpu"
    )
    for epochs in (1, 2):
        learn.fit(epochs, callbacks=[quiet])
    train_by_hand(plain, theirs(case, plain), case.loss_of, fresh(case), fresh(case))
    assert_same_bits(learn.model, plain)


def test_the_losses_on_record_are_those_of_the_loop_by_hand(quiet):
    case, seen = CASES["dropout"], []

    def loss_of(model, batch):
        loss = case.loss_of(model, batch)
        if model.training:
            seen.append(loss.item())
        return loss

    learn = train_both(case, [quiet])
    torch.manual_seed(1)
    plain = case.model()
    opt, train, valid = theirs(case, plain), fresh(case), fresh(case)
    torch.manual_seed(4)
    train_by_hand(plain, opt, loss_of, train, valid)
    assert learn.record["train/loss"].tolist() == seen


# ── every optimiser of torch ──────────────────────────────────────────────────────────────────

OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
}


def sparse_model() -> nn.Module:
    return nn.EmbeddingBag(10, 3, mode="sum", sparse=True)


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


def words() -> list[Any]:
    return cut(torch.randint(10, (40, 4)), torch.randint(3, (40,)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_of_torch_trains_as_by_hand(name, quiet):
    kind = OPTIMIZERS[name]
    known = inspect.signature(kind).parameters
    form = next(({form: True} for form in ("fused", "foreach") if form in known), {})
    case = Case(mlp, kind, partial(kind, **form), lr=0.01)
    if name == "SparseAdam":  # takes sparse gradients alone
        case.model, case.train = sparse_model, words
    if name == "Muon":  # takes matrices alone
        case.model = without_bias
    train_both(case, [quiet])


def test_the_walk_finds_torchs_optimisers():
    assert {"SGD", "AdamW", "LBFGS", "SparseAdam"} <= set(OPTIMIZERS)


# ── who watches ───────────────────────────────────────────────────────────────────────────────

EXAMPLES: dict[str, Callable[[], Callback]] = {
    "GradientCheckpointing": lambda: GradientCheckpointing([""]),  # the whole model
}
"""Watchers whose constructor needs arguments, by name."""


def observers() -> list[Callable[[], Callback]]:
    found = []
    for module in pkgutil.iter_modules(pellucid.callbacks.__path__, "pellucid.callbacks."):
        for name, value in vars(importlib.import_module(module.name)).items():
            own = inspect.isclass(value) and value.__module__ == module.name
            if own and issubclass(value, Callback) and name[0] != "_" and not value.changes:
                found.append(EXAMPLES.get(name, value))
    return found


def mean_prediction(preds, targets):
    return preds.mean()


def test_the_walk_finds_those_that_watch():
    assert Progress in observers()
