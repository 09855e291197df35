"""What the ranks of tests/test_distributed.py do; torchrun starts this file, a process a rank.

    torchrun --standalone --nproc-per-node 2 tests/distributed_ranks.py check FOLDER [NAME ...]
    torchrun --standalone --nproc-per-node 2 tests/distributed_ranks.py kill FOLDER ddp 5

Each rank writes what it found to FOLDER/rank<r>.json; the tests judge it.
"""

import copy
import gc
import json
import os
import signal
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from pellucid import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    DataLoaders,
    Learner,
    Loader,
    engines,
)
from pellucid.callbacks import (
    EMA,
    LSUV,
    SWA,
    Accumulate,
    Best,
    Clip,
    Compile,
    Debug,
    Distributed,
    Lookahead,
    NonFinite,
    Precision,
    Progress,
    TakeTurns,
    Telemetry,
)
from pellucid.callbacks import non_finite as module_of_non_finite
from pellucid.distributed import as_the_first_says, is_first, rank, world_size
from pellucid.errors import DataError, NonFiniteLoss, SetupError
from pellucid.gan import GAN, gan_batch, wasserstein
from pellucid.metrics import MacroF1, accuracy
from pellucid.muon import Muon
from pellucid.roles import ByRole
from pellucid.vision import tta

TIMEOUT = 60.0
"""Seconds; this machine may be busy."""

RANK = rank()
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ── something to train, in many processes and in one ────────────────────────────────────────────


def items(n):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def mlp():
    torch.manual_seed(RANK)  # the weights must become rank 0's
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def twins(mode, data, *callbacks, model=mlp, **settings):
    """Give a learner for all processes, and one for this process alone."""
    ours = learner(data(), model(), Distributed(mode, TIMEOUT), *callbacks, **settings)
    torch.manual_seed(0)
    lone = learner(data(), as_on_rank_0(model), *callbacks, **settings)
    return ours, lone


def as_on_rank_0(model):
    global RANK
    kept, RANK = RANK, 0
    try:
        return model()
    finally:
        RANK = kept


def learner(data, model, *callbacks, lr=0.01, opt_func=AdamW, loss_func=None, metrics=(accuracy,)):
    quiet = Progress("off")
    return Learner(model, data, loss_func, opt_func, lr, metrics, [quiet, *callbacks], device="cpu")


def arrays(n=50, n_valid=9, size=8):
    x, y = items(n + n_valid)

    def make():
        return DataLoaders.from_arrays((x[:n], y[:n]), (x[n:], y[n:]), size, classes=3)

    return make


def flat(model):
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in model.parameters()])


def apart(ours, lone):
    """Return the largest difference of weights, of losses, and of the counts."""
    losses = [torch.tensor(one.record["train/loss"]) for one in (ours, lone)]
    counts = [(one.step, one.n_batches_seen, one.n_items_seen) for one in (ours, lone)]
    return {
        "weights": (flat(ours.model) - flat(lone.model)).abs().max().item(),
        "losses": (losses[0] - losses[1]).abs().max().item(),
        "counts": counts[0] == counts[1],
        "sum": flat(ours.model).sum().item(),
    }


def columns(table):
    return {name: table[name].tolist() for name in table if name != "seconds"}


# ── checks ──────────────────────────────────────────────────────────────────────────────────────


@check
def as_one_process():
    """50 steps and more, batches and items that do not divide, with and without accumulation."""
    found = {}
    for mode in ("ddp", "fsdp"):
        for n in (48, 50):  # the last batch has 6 items, or one: then a rank has none
            for callbacks in ((), (Accumulate(3),), (Clip(norm=0.1),)):
                if n == 48 and (mode == "fsdp" or callbacks):
                    continue
                ours, lone = twins(mode, arrays(n, size=7), *callbacks)
                ours.fit(8)
                lone.fit(8)
                name = f"{mode} {n} {callbacks}"
                found[name] = apart(ours, lone) | {"steps": ours.step}
                found[name]["record"] = columns(ours.record.epochs)
    return found


@check
def other_optimizer():
    """SGD's fused form knows no shards; momentum goes on in a second fit."""
    found = {}
    for mode in ("ddp", "fsdp"):
        ours, lone = twins(mode, arrays(), opt_func=lambda p, lr: SGD(p, lr, momentum=0.9))
        forms = [group["fused"] for group in ours.opt.param_groups] if ours.opt else None
        for one in (ours, lone):
            one.fit(2)
            one.fit(2)
        held = [p for group in ours.opt.param_groups for p in group["params"]]
        found[mode] = apart(ours, lone) | {
            "own params": all(a is b for a, b in zip(held, ours.model.parameters(), strict=True)),
            "whole state": all(ours.opt.state[p]["momentum_buffer"].shape == p.shape for p in held),
            "forms": forms,
        }
    return found


@check
def one_loader_for_both():
    """What validates on the training data takes an epoch of the loader each time."""

    def data():
        loader = arrays(50, size=7)().train
        return DataLoaders(loader, loader, classes=3)

    ours, lone = twins("ddp", data)
    for one in (ours, lone):
        one.fit(3)
    return apart(ours, lone) | {"epochs": [one.data.train.epoch for one in (ours, lone)]}


@check
def compiled():
    """The compiled model within DDP, against a plain one alone; shards are not compiled."""
    ours, lone = twins("ddp", arrays(50, size=7), Accumulate(3))
    ours.fit(2, callbacks=[Compile(backend="aot_eager")])
    lone.fit(2)
    sharded, _ = twins("fsdp", arrays())
    try:
        sharded.fit(1, callbacks=[Compile(backend="aot_eager")])
        refused = ""
    except SetupError as error:
        refused = str(error)
    return apart(ours, lone) | {"refused": refused}


class Sharing(Callback):
    """Note after which batches the gradients are not averaged yet."""

    order = -999

    def __init__(self):
        self.apart = []

    def after_backward(self, learn):
        self.apart.append(vars(learn)["forward"].__self__.apart)


@check
def gradients_travel_once_a_step():
    ours, _ = twins("ddp", arrays(60, size=8), Accumulate(3))
    sharing = Sharing()
    ours.fit(1, callbacks=[sharing])
    return {"apart": sharing.apart}


class Plain(nn.Module):
    """Gives each item the same bits in whatever batch it is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, x):
        return x[:, :3] * self.scale


class Median:
    """What is no mean, and depends on all predictions in their order."""

    def __init__(self):
        self.reset()

    def update(self, preds, targets):
        self.seen.append(preds[:, 0] * (targets + 1))

    def compute(self):
        seen = torch.cat(self.seen)
        return seen.median() + (seen * torch.arange(len(seen))).sum()

    def reset(self):
        self.seen = []


def middle(preds, targets):
    """Return what depends on the whole batch at once."""
    return preds.softmax(1).max(1).values.median() * len(targets)


@check
def exact_metrics():
    found = {}
    metrics = [accuracy, middle, MacroF1(3), Median()]
    alike = Debug("before_train", read_alike), Debug("before_validate", read_alike)
    for n in range(1, 14):
        data = arrays(n, n, size=4)
        ours, lone = twins("ddp", data, *alike, model=Plain, metrics=metrics, lr=0.0)
        ours.fit(1)
        lone.fit(1)
        rows = [columns(one.record.epochs) for one in (ours, lone)]
        found[n] = {
            "metrics": {k: v for k, v in rows[0].items() if "loss" not in k},
            "alone": {k: v for k, v in rows[1].items() if "loss" not in k},
            "loss": max(abs(rows[0][k][0] - rows[1][k][0]) for k in rows[0] if "loss" in k),
        }
    return found


def read_alike(learn):
    learn.tally.every = 50  # sums are rounded alike


@check
def undone():
    found = {}
    for mode in ("ddp", "fsdp"):
        for fault in (None, RuntimeError("broken"), KeyboardInterrupt()):
            ours, _ = twins(mode, arrays())
            model, params = ours.model, list(ours.model.parameters())
            data, loaders = ours.data, (ours.data.train, ours.data.valid)
            reason, names = ours.device_reason, set(vars(ours))
            wrappers = []
            late = [Debug("after_batch", lambda learn, w=wrappers: w.extend(ddp_of(learn)))]
            if fault:
                late.append(Debug("after_step", raising(fault, 9)))
            raised = False
            try:
                ours.fit(3, callbacks=late)
            except BaseException as error:
                named = f"on rank {RANK} of {world_size()}" in getattr(error, "__notes__", ())
                raised = error is fault and (named or not isinstance(error, Exception))
            gc.collect()
            found[f"{mode} {fault!r}"] = {
                "raised": raised == bool(fault),
                "model": ours.model is model,
                "params": all(map(lambda a, b: a is b, params, ours.model.parameters())),
                "plain": not any(hasattr(p, "full_tensor") for p in ours.model.parameters()),
                "data": ours.data is data and (data.train, data.valid) == loaders,
                "epoch": data.train.epoch == (2 if fault else 3),
                "reason": ours.device_reason == reason,
                "names": set(vars(ours)) - names <= {"batches_per_step"},
                "group": not dist.is_initialized(),
                "wrapper": mode == "fsdp" or (bool(wrappers) and not any(w() for w in wrappers)),
                "hooks": not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()),
                "keys": list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"],
            }
            ours.fit(1)
            # a new one trains it, once its gradients are averaged by nobody else
            model(torch.ones(2, 6)).sum().backward()
    return found


def ddp_of(learn):
    engine = vars(learn)["forward"].__self__ if "forward" in vars(learn) else None
    return [weakref.ref(engine._ddp)] if isinstance(engine, engines.Replicas) else []


def raising(fault, step):
    def act(learn):
        if learn.step == step:
            raise fault

    return act


@check
def saving(folder):
    found = {}
    for mode in ("ddp", "fsdp"):
        ours, _ = twins(mode, arrays())
        path = Path(folder) / f"{mode}{RANK}.safetensors"
        ours.fit(2, callbacks=[Debug("after_epoch", lambda learn, p=path: learn.save(p))])
        found[mode] = {"here": path.exists()}
        if path.exists():
            fresh = learner(arrays()(), as_on_rank_0(mlp))
            fresh.load(path)
            found[mode]["same"] = torch.equal(flat(fresh.model), flat(ours.model))
    return found


class Looking(Callback):
    """Validate from within the fit, the sliced data and others."""

    def __init__(self):
        self.seen = []

    def after_epoch(self, learn):
        x, y = items(7)
        self.seen.append([learn.validate()["loss"], learn.validate([(x, y)])["loss"]])
        self.seen[-1].append(learn.predict(x).sum().item())


@check
def looks():
    found = {}
    for mode in ("ddp", "fsdp"):
        ours, lone = twins(mode, arrays())
        looking = Looking(), Looking()
        ours.fit(2, callbacks=[looking[0]])
        lone.fit(2, callbacks=[looking[1]])
        found[mode] = apart(ours, lone)
        found[mode]["looks"] = difference(looking[0].seen, looking[1].seen)
        found[mode]["after"] = abs(ours.validate()["loss"] - lone.validate()["loss"])
    ours, lone = twins("ddp", arrays())
    found["search"] = (ours.find_lr(steps=5).suggestion is None) == (
        lone.find_lr(steps=5).suggestion is None
    )
    return found


class Predicting(Callback):
    """Predict the sliced data from within the fit."""

    def __init__(self):
        self.sizes, self.values = [], []

    def after_epoch(self, learn):
        for preds in (learn.predict(learn.data.valid), tta(learn, 2).preds):
            in_order = preds * torch.arange(len(preds))[:, None]
            self.sizes.append(len(preds))
            self.values.append(in_order.sum().item())


@check
def predictions_in_a_fit():
    def lists():
        return DataLoaders(*(list(loader) for loader in (arrays()().train, arrays()().valid)))

    found = {}
    for name, mode, make in (
        ("Loader", "ddp", arrays()), ("list", "ddp", lists), ("Loader, fsdp", "fsdp", arrays()),
    ):  # fmt: skip
        both, predicting = twins(mode, make, metrics=()), (Predicting(), Predicting())
        for one, callback in zip(both, predicting, strict=True):
            one.data.augment = [torch.neg]
            one.loss_func = F.cross_entropy
            one.fit(2, callbacks=[callback])
        values = difference(*(callback.values for callback in predicting))
        found[name] = {"sizes": predicting[0].sizes, "values": values}
    return found


def difference(ours, theirs):
    return (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()


class Steering(Callback):
    """Leave batches and passes, in the same places everywhere."""

    order = 5

    def after_loss(self, learn):
        if learn.training and (learn.epoch, learn.batch_index) in ((0, 2), (1, 6)):
            raise CancelBatch

    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_index) == (2, 3):
            raise CancelEpoch
        if learn.training and (learn.epoch, learn.batch_index) == (4, 4):
            raise CancelFit


class Thawing(Callback):
    """Freeze the first layer for an epoch."""

    changes = True

    def before_epoch(self, learn):
        learn.model[0].requires_grad_(learn.epoch > 0)


@check
def steered():
    found = {}
    for name, callbacks in {
        "cancels": [Steering()],
        "cancels, accumulated": [Steering(), Accumulate(3)],
        "thawed": [Thawing()],
    }.items():
        ours, lone = twins("ddp", arrays(), *callbacks)
        ours.fit(5)
        lone.fit(5)
        found[name] = apart(ours, lone)
    return found


class Unsized:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@check
def other_loaders():
    x, y = items(50)
    batches = list(zip(x.split([8] * 5 + [9, 1]), y.split([8] * 5 + [9, 1]), strict=True))
    found = {}
    for name, make in {
        "list": lambda: DataLoaders(batches, batches[:2], classes=3),
        "unsized": lambda: DataLoaders(Unsized(batches), classes=3),
        "torch": lambda: DataLoaders(
            DataLoader(TensorDataset(x, y), 8, shuffle=True), DataLoader(TensorDataset(x, y), 7),
            classes=3,
        ),
    }.items():  # fmt: skip
        ours, lone = twins("ddp", make, Accumulate(2))
        torch.manual_seed(100 + RANK)  # not alike
        ours.fit(3)
        torch.manual_seed(100)
        lone.fit(3)
        found[name] = apart(ours, lone)
    return found


class Noisy(TensorDataset):
    """Targets that are drawn when they are asked for."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x, y + torch.randn(3)


@check
def noise_in_items():
    x, _ = items(50)

    def make():
        return DataLoaders(DataLoader(Noisy(x, x[:, :3]), 8, shuffle=True))

    ours, lone = twins("ddp", make, loss_func=F.mse_loss, metrics=())
    for one, seed in ((ours, 100 + RANK), (lone, 100)):
        torch.manual_seed(seed)
        one.fit(3)
    return apart(ours, lone)


def loss_of_one_element(preds, targets):
    return F.cross_entropy(preds, targets).reshape(1)


@check
def losses_of_one_element():
    ours, lone = twins("ddp", arrays(), loss_func=loss_of_one_element)
    for one in (ours, lone):
        one.fit(2)
    return apart(ours, lone)


def named_loss(preds, targets, names):
    assert len(preds) == len(targets) == len(names), f"{len(preds)} {len(targets)} {names}"
    return F.cross_entropy(preds, torch.from_numpy(targets)) + 0 * sum(map(int, names))


def as_named(preds, targets):
    labels, names = targets
    assert len(preds) == len(labels) == len(names)
    return float((labels * np.array(list(map(int, names)))).mean())


@check
def arrays_and_names():
    x, y = items(47)
    names = list(map(str, range(47)))
    batches = [(x[i : i + 8], y[i : i + 8].numpy(), names[i : i + 8]) for i in range(0, 47, 8)]
    ours, lone = twins(
        "ddp", lambda: DataLoaders(batches), loss_func=named_loss, metrics=[as_named]
    )
    for one in (ours, lone):
        one.fit(2)
    seen = [columns(one.record.epochs)["train/as_named"] for one in (ours, lone)]
    return apart(ours, lone) | {"seen": seen[0] == seen[1]}


class Asked:
    """Items by number, with a note of who was asked for."""

    def __init__(self):
        self.x, self.y = items(22)
        self.asked = []

    def __getitem__(self, i):
        self.asked.append(i)
        return self.x[i], self.y[i]

    def __len__(self):
        return len(self.x)


@check
def own_items():
    data = Asked()

    def make():
        return DataLoaders(Loader(data, 5, shuffle=True), classes=3)

    ours, lone = twins("ddp", make)
    ours.fit(1)
    asked = list(data.asked)
    lone.fit(1)
    return apart(ours, lone) | {"asked": asked}


@check
def non_finite():
    x, y = items(40)
    x[29] = torch.nan  # in one rank's part of the fourth batch

    def make():
        return DataLoaders(Loader(TensorDataset(x, y), 8), classes=3)

    ours, lone = twins("ddp", make, NonFinite("skip"))
    ours.fit(2)
    lone.fit(2)
    found = {"skip": apart(ours, lone)}
    found["skip"]["skipped"] = ours.record.epochs["train/skipped"].tolist()
    found["skip"]["losses"] = 0.0  # one is NaN
    for mode in ("ddp", "fsdp"):
        ours, _ = twins(mode, make)
        try:
            ours.fit(2)
        except NonFiniteLoss as error:
            found[mode] = {"batch": error.batch, "text": str(error)}
    return found


def padded(learn):
    return (learn.y != -100).sum()


@check
def weighed():
    x, y = items(50)
    y = torch.where(torch.arange(50) % 3 > 0, -100, y)
    found = {}
    for callbacks in ((), (Accumulate(2, padded),)):
        ours = learner(
            DataLoaders(Loader(TensorDataset(x, y), 9)), as_on_rank_0(mlp),
            Distributed("ddp", TIMEOUT, padded), *callbacks, loss_func=F.cross_entropy, metrics=(),
        )  # fmt: skip
        lone = learner(
            DataLoaders(Loader(TensorDataset(x, y), 9)), as_on_rank_0(mlp),
            *callbacks, loss_func=F.cross_entropy, metrics=(),
        )  # fmt: skip
        ours.fit(3)
        lone.fit(3)
        found[str(callbacks)] = apart(ours, lone)
    return found


def weighted_loss(preds, targets, weights):
    return (F.cross_entropy(preds, targets, reduction="none") * weights).sum() / weights.sum()


@check
def nothing_counts_in_a_part():
    """One rank's part of two batches has a loss of 0/0."""
    x, y = items(40)
    weights = torch.ones(40)
    weights[4:8] = weights[16:20] = 0
    many = Distributed("ddp", TIMEOUT, lambda learn: learn.y[1].sum())
    ours, lone = (
        learner(
            DataLoaders(batches_of(x, y, weights)), as_on_rank_0(mlp), *callbacks,
            loss_func=weighted_loss, metrics=(),
        )
        for callbacks in ([many], [])
    )  # fmt: skip
    for one in (ours, lone):
        one.fit(2)
    return apart(ours, lone)


def batches_of(*columns):
    return list(zip(*(column.split(8) for column in columns), strict=True))


@check
def different_batches():
    x, y = items(50)
    n = 40 if RANK else 50
    floats = x + RANK
    found = {}
    for name, batches, loss_func in (
        ("number", Unsized(batches_of(x[:n], y[:n])), F.cross_entropy),
        ("order", Loader(TensorDataset(x, y), 8, shuffle=True, seed=RANK), F.cross_entropy),
        ("floats", batches_of(x, floats[:, :3]), F.mse_loss),
        ("bytes", batches_of(x, (y + RANK).byte()), lambda preds, y: preds.mean() + y.sum()),
    ):
        many = Distributed("ddp", 10.0)
        ours = learner(DataLoaders(batches), mlp(), many, loss_func=loss_func, metrics=())
        try:
            ours.fit(1)
            found[name] = ""
        except DataError as error:
            found[name] = str(error)
    return found


@check
def lazy_layers():
    model = nn.Sequential(nn.ReLU(), nn.LazyLinear(3))
    ours = learner(arrays()(), model, Distributed("ddp", TIMEOUT))
    try:
        ours.fit(1)
    except SetupError as error:
        return {"text": str(error)}
    return {"text": ""}


def with_norm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def buffers_of(learn):
    return torch.cat([b.double().reshape(-1) for b in learn.model.buffers()]).tolist()


@check
def statistics_of_averages():
    """An average of the weights has batch norm's statistics of all parts, in every process."""
    found = {}
    for average in (EMA(0.5), SWA(0.0), Lookahead(3)):
        ours, _ = twins("ddp", arrays(48), model=with_norm)
        validated, plain = [], []
        watch = [
            Debug("before_validate", lambda learn, to=validated: to.append(buffers_of(learn))),
            Debug("before_train", lambda learn, to=plain: to.append(buffers_of(learn))),
        ]
        ours.fit(3, callbacks=[average, *watch])
        found[type(average).__name__] = {"validated": validated, "plain": plain}
        found[type(average).__name__]["final"] = buffers_of(ours)
    return found


@check
def random_numbers():
    drawn, said, sums = [], [], []
    look = [
        Debug("before_fit", lambda learn: sums.append(flat(learn.model).sum().item())),
        Debug("before_batch", lambda learn: drawn.append(torch.rand(()).item())),
        Debug("after_epoch", lambda learn: said.append(as_the_first_says(RANK + 7.0))),
    ]
    ours, _ = twins("ddp", arrays(48), model=with_norm)
    ours.fit(2, callbacks=look)
    return {
        "in the fit": drawn[0],
        "after it": torch.rand(()).item(),
        "buffers": buffers_of(ours),
        "first says": said,
        "weights at first": sums,
    }


# ── techniques in shards, and halves in turn ────────────────────────────────────────────────────


class Rooted(nn.Module):
    """Has parameters of its own, which stay gathered after a look, and others in a container."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(RANK)
        self.first = nn.Linear(6, 15, bias=False)
        self.body = nn.Sequential(nn.BatchNorm1d(15), nn.Linear(15, 15), nn.ReLU())
        self.head = nn.Linear(15, 3)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


class RootedWithoutNorm(Rooted):
    def __init__(self):
        super().__init__()
        self.body[0] = nn.Identity()


momentum = partial(SGD, momentum=0.9)
by_role = ByRole(AdamW, {"matrix": Muon})
by_role_sgd = ByRole(momentum, {"matrix": Muon})

IN_SHARDS = {
    "EMA": ([EMA(0.5), Looking()], AdamW),
    "SWA": ([SWA(0.0)], momentum),
    "Lookahead": ([Lookahead(3), Best()], AdamW),
    "ByRole": ([], by_role),
    "ByRole, SGD": ([EMA(0.5)], by_role_sgd),
    "skip": ([NonFinite("skip")], AdamW),
    "skip, unfused": ([NonFinite("skip")], momentum),
    "skip, ByRole": ([NonFinite("skip")], by_role),
    "stop on the device": ([NonFinite("stop")], by_role),
    "fp16": ([Precision("fp16")], AdamW),
    "fp16, unfused": ([Precision("fp16")], momentum),
    "fp16, ByRole": ([Precision("fp16"), Accumulate(2)], by_role_sgd),
}


def with_a_bad_item():
    x, y = items(48)
    x[29] = torch.nan
    return DataLoaders(Loader(TensorDataset(x, y), 7), [(x[:9], y[:9])], classes=3)


def trained(mode, model, data, callbacks, opt_func):
    many = [] if mode == "alone" else [Distributed(mode, TIMEOUT)]
    first = as_on_rank_0(model) if mode == "alone" else model()
    one = learner(data(), first, *many, *copy.deepcopy(callbacks), opt_func=opt_func)
    one.fit(2)
    return one


@check
def in_shards():
    """Against one process, without batch norm; or against replicas, with it or in fp16."""
    found = {}
    on_host = module_of_non_finite._is_host
    for name, (callbacks, opt_func) in IN_SHARDS.items():
        data = with_a_bad_item if "skip" in name else arrays(48, size=7)
        if "device" in name:
            module_of_non_finite._is_host = lambda device: False
        found[name] = {}
        for other, model in (("alone", RootedWithoutNorm), ("ddp", Rooted)):
            if (other == "alone" and "fp16" in name) or (other == "ddp" and opt_func is by_role):
                continue
            one, two = (trained(mode, model, data, callbacks, opt_func) for mode in ("fsdp", other))
            pairs = zip(one.model.buffers(), two.model.buffers(), strict=True)
            validated = [run.record.epochs["valid/loss"].tolist() for run in (one, two)]
            found[name][other] = apart(one, two) | {
                "buffers": [(a.double() - b.double()).abs().max().item() for a, b in pairs],
                "validated": difference(*validated),
                "skipped": "skip" in name and one.record.epochs["train/skipped"].tolist(),
            }
        module_of_non_finite._is_host = on_host
    return found


def cnn():
    torch.manual_seed(RANK)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 5, 2, padding=1, bias=False), nn.BatchNorm2d(5),
        nn.ReLU(), nn.Conv2d(5, 7, 2), nn.Flatten(), nn.Linear(42, 3),
    )  # fmt: skip


@check
def convolutions_in_shards():
    """Channels-last is for whole models; Muon takes filters that are cut unevenly."""
    muon, callbacks = ByRole(AdamW, {"conv": Muon}), [Precision("bf16"), EMA(0.5)]
    return apart(*(trained(mode, cnn, arrays(48), callbacks, muon) for mode in ("fsdp", "ddp")))


@check
def layers_set_by_a_batch():
    """LSUV has another part of it in each process, and the weights become rank 0's."""
    ours = trained("ddp", mlp, arrays(48), [LSUV(tol=0.5)], AdamW)
    try:
        trained("fsdp", mlp, arrays(48), [LSUV()], AdamW)
    except SetupError as error:
        return {"sum": flat(ours.model).sum().item(), "refused": str(error)}
    return {}


@check
def telemetry():
    """Each process sees its own part of the batch; steps are common."""
    ours = trained("ddp", mlp, arrays(50), [Telemetry(every=1)], AdamW)
    layers = ours.record.layers
    try:
        trained("fsdp", mlp, arrays(48), [Telemetry()], AdamW)
        refused = ""
    except SetupError as error:
        refused = str(error)
    return {
        "n": (layers.of_kind("activations")[0][:7, 0, 0] / 16).tolist(),
        "means": layers["activations/mean"].tolist(),
        "updates": layers["parameters/update"].tolist(),
        "refused": refused,
    }


class Gan(GAN):
    """Takes what the data are for noise, so that it is alike everywhere."""

    def __init__(self):
        torch.manual_seed(RANK)
        critic = [nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1, bias=False), nn.Flatten(0)]
        generator = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)]
        super().__init__(nn.Sequential(*generator), nn.Sequential(*critic), 3)

    def noise(self, like):
        return like[:, :3].flip(1)


def normed():
    torch.manual_seed(RANK)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


@check
def turns():
    found = {}
    batches = [(part,) for part in items(50)[0].split(7)]

    def data():
        return DataLoaders(batches, batches[:2])

    for name, opt_funcs, more in (
        ("one optimiser", None, ()),
        ("two", {"critic": AdamW, "generator": momentum}, (Accumulate(2),)),
    ):
        turns = TakeTurns({"critic": 3, "generator": 1}, gan_batch, opt_funcs)
        both = twins("ddp", data, copy.deepcopy(turns), *more, model=Gan,
                     loss_func=wasserstein, metrics=())  # fmt: skip
        for one in both:
            one.fit(3)
        found[name] = apart(*both)
    ours, lone = twins("ddp", arrays(48), TakeTurns({"1": 1, "3": 1}), model=normed)
    for one in (ours, lone):
        one.fit(1)
    means = [one.model[0].running_mean for one in (ours, lone)]  # of halves of even batches
    found["statistics"] = (means[0] - means[1]).abs().max().item()
    ours, _ = twins("fsdp", data, turns, model=Gan, loss_func=wasserstein, metrics=())
    try:
        ours.fit(1)
    except SetupError as error:
        found["refused"] = str(error)
    return found


# ── what ends badly ─────────────────────────────────────────────────────────────────────────────


class Failing(Callback):
    """Let one rank be killed or hang in the midst of the second epoch."""

    def __init__(self, how, folder):
        self.how, self.folder = how, Path(folder)

    def after_backward(self, learn):
        if world_size() > 1 and RANK == 1 and learn.step == 9:
            (self.folder / "failed").write_text(str(time.time()))
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)


def fail(how, folder, mode, timeout):
    ours = learner(arrays()(), mlp(), Distributed(mode, float(timeout)), Failing(how, folder))
    ours.fit(1000)


def several(names, folder):
    found = {}
    for name in names or CHECKS:
        began = time.perf_counter()
        found[name] = CHECKS[name](folder) if name == "saving" else CHECKS[name]()
        if is_first():
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    shown = Learner(mlp(), arrays()(), callbacks=[Distributed("ddp", TIMEOUT)], device="cpu")
    shown.fit(2)
    (Path(folder) / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "check":
        several(sys.argv[3:], sys.argv[2])
    else:
        fail(*sys.argv[1:])
