# %% [markdown]
# # 7 · Normalisation
#
# Lesson 1 put the sizes right before the first batch, lesson 6 watched them go wrong afterwards. So
# why not put them right in *every* batch, inside the network? That is batch normalisation (Ioffe
# and Szegedy, 2015). First by hand; then what it does to the statistics; then its relatives, which
# differ only in *what they average over*; and then the case where it fails, and what helps there.

# %%
# %matplotlib inline
import math
import os
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

import pellucid.nn
from pellucid import DataLoaders, Learner, foundations
from pellucid.callbacks import Progress, Telemetry
from pellucid.data import mnist
from pellucid.errors import DataError, NonFiniteLoss
from pellucid.metrics import accuracy
from pellucid.nn import AdaptivePool, conv_norm_act
from pellucid.plots import figure

QUICK = os.environ.get("LESSONS") == "quick"
n_train, n_valid, batch_size = (5_120, 500, 128) if QUICK else (25_600, 10_000, 256)
n_at_two, good_at_two = (1_500, 0.75) if QUICK else (4_000, 0.85)
compared_at_two = ["batch", "running batch"] if QUICK else ["batch", "running batch", "layer"]
reachable = 0.84 if QUICK else 0.94

original = mnist(split="course")

# %% [markdown]
# ## By hand
#
# Of each channel, over the batch and all places: take away the mean, divide by the standard
# deviation. Then let the network multiply and add what it likes: `mults` and `adds` are learnt, and
# begin as 1 and 0.
#
# When the network is *used*, there may be no batch, only one image, and the answer for it must not
# depend on its neighbours. So in training we remember averages, and use those later. They are no
# parameters, since no gradient moves them; but they must be saved with the model and move with it
# to the GPU. That is what `register_buffer` says.


# %%
class BatchNorm(nn.Module):
    def __init__(self, nf, mom=0.1, eps=1e-5):
        super().__init__()
        self.mom, self.eps = mom, eps
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))
        self.register_buffer("means", torch.zeros(1, nf, 1, 1))
        self.register_buffer("vars", torch.ones(1, nf, 1, 1))

    def update_stats(self, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.var((0, 2, 3), keepdim=True, correction=0)
        n = x.numel() / x.shape[1]
        with torch.no_grad():
            self.means.lerp_(mean, self.mom)
            self.vars.lerp_(var * n / (n - 1), self.mom)
        return mean, var

    def forward(self, x):
        mean, var = self.update_stats(x) if self.training else (self.means, self.vars)
        return (x - mean) / (var + self.eps).sqrt() * self.mults + self.adds


torch.manual_seed(0)
batch = 3 + 2 * torch.randn(64, 8, 14, 14)
norm = BatchNorm(8)
first_out = norm(batch)
print(f"before: mean {batch.mean():.3f}, sd {batch.std():.3f}; "
      f"after: mean {first_out.mean().abs():.3f}, sd {first_out.std():.3f}")  # fmt: skip
print("saved with the model:", list(norm.state_dict()))

# %% [markdown]
# (For the running average the variance is multiplied by n/(n-1): the batch is a sample of all
# images, and this is the better guess about all. torch does so too.)
#
# `lerp`, linear interpolation, moves a tenth of the way to the new value. Here the word *momentum*
# is a trap: in an optimiser a momentum of 0.9 means "keep nine tenths", in a batch norm the same is
# called 0.1. Averaging 3, 5, 4:

# %%
average, averages = torch.tensor(3.0), [3.0]
for new in (5.0, 4.0):
    average = average.lerp(torch.tensor(new), 0.1)
    averages.append(round(average.item(), 4))
by_formula = [3.0, 0.9 * 3 + 0.1 * 5, 0.9 * (0.9 * 3 + 0.1 * 5) + 0.1 * 4]
print(averages, by_formula)

# %% [markdown]
# Ours, torch's, and the one in `pellucid.foundations` (which uses no `torch.nn`) give the same, in
# training and afterwards.

# %%
three = BatchNorm(8), nn.BatchNorm2d(8), foundations.BatchNorm(8)
for _ in range(5):
    in_training = [norm(batch) for norm in three]
    batch = batch * 0.9 + 0.3 * torch.randn_like(batch)
afterwards = [norm.eval()(batch) for norm in three]
apart = max((outs[0] - outs[i]).abs().max().item() for outs in (in_training, afterwards)
            for i in (1, 2))  # fmt: skip
print(f"furthest apart: {apart:.0e}")

# %% [markdown]
# ## What it does
#
# Five convolutions, Kaiming's weights, and the bold rate of lesson 6, 0.9: without a norm, and with
# ours after each ReLU. `Telemetry` looks at what each block passes on.


# %%
def made(n, batch_size):
    arrays = [
        [part[:count] for part in loader.dataset.arrays]
        for loader, count in ((original.train, n), (original.valid, n_valid))
    ]
    return DataLoaders.from_arrays(*arrays, batch_size=batch_size, classes=10, seed=0)


def network(norm):
    torch.manual_seed(0)
    widths = 1, 8, 16, 32, 64, 64
    blocks = [
        conv_norm_act(widths[i], widths[i + 1], 3 if i else 5, 2, norm, norm_last=True)
        for i in range(5)
    ]
    return nn.Sequential(*blocks, AdaptivePool(), nn.Linear(64, 10))


def fitted(norm, lr, n, batch_size, *callbacks):
    learn = Learner(network(norm), made(n, batch_size), opt_func=SGD, lr=lr, metrics=[accuracy])
    with suppress(NonFiniteLoss):  # a run that bursts is an answer, too
        learn.fit(1, callbacks=[Progress("off"), *callbacks])
    return learn.record


def accuracy_of(record):
    epochs = record.epochs
    return epochs.last("valid/accuracy") if "valid/accuracy" in epochs else math.nan


records, reached = {}, {}
for name, norm in {"no norm": None, "batch norm": BatchNorm}.items():
    ends = Telemetry([f"{i}.{1 if norm is None else 2}" for i in range(5)], every=1)
    records[name] = fitted(norm, 0.9, n_train, batch_size, ends)
    reached[name] = accuracy_of(records[name])
    print(f"{name:<12}valid accuracy {reached[name]:.4f}")

# %%
drawing, panels = figure(4, width=3.4, height=3)
for (name, record), (left, right) in zip(records.items(), (panels[:2], panels[2:]), strict=True):
    left.plot(record.layers["activations/mean"], linewidth=1)
    right.plot(record.layers["activations/sd"], linewidth=1)
    left.set(title=f"{name}: means", xlabel="batch", ylim=(-0.5, 1.5))
    right.set(title=f"{name}: standard deviations", xlabel="batch", ylim=(0, 2))
drawing

# %% [markdown]
# No rise, no crash. The means stay near 0 and the standard deviations near 1 in all five layers,
# from the first batch to the last; what they drift is what `mults` and `adds` have learnt. That is
# why a network with batch norm forgives bad initial weights and takes a large learning rate.
#
# ## The relatives
#
# | norm     | averages over                           | so of a batch (n, c, h, w) it has |
# |----------|-----------------------------------------|-----------------------------------|
# | batch    | the batch and all places                | c means                           |
# | layer    | channels and places, per image          | n means                           |
# | instance | places, per image and channel           | n·c means                         |
# | group    | places and a group of channels, per image | n·groups means                  |
#
# Four times the same function, with other dimensions:


# %%
def normalised(x, dims, eps=1e-5):
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / (x.var(dims, keepdim=True, correction=0) + eps).sqrt(), mean.numel()


torch.manual_seed(1)
x = torch.randn(20, 6, 10, 10) * torch.rand(20, 6, 1, 1) + torch.randn(6, 1, 1)
groups = x.view(20, 3, 2, 10, 10)
families = {
    "batch": (x, (0, 2, 3), nn.BatchNorm2d(6), foundations.BatchNorm(6)),
    "layer": (x, (1, 2, 3), nn.LayerNorm((6, 10, 10)), foundations.LayerNorm((6, 10, 10))),
    "instance": (x, (2, 3), nn.InstanceNorm2d(6), foundations.InstanceNorm(6)),
    "group": (groups, (2, 3, 4), nn.GroupNorm(3, 6), foundations.GroupNorm(3, 6)),
}
n_means, furthest, neighbours = {}, {}, {}
print(f"{'':<10}{'over dims':>12}{'means':>7}{'from torch':>12}{'alone or among others':>23}")
for name, (shaped, dims, torchs, ours) in families.items():
    by_hand, n_means[name] = normalised(shaped, dims)
    by_hand = by_hand.view(x.shape)
    furthest[name] = max((by_hand - norm(x)).abs().max().item() for norm in (torchs, ours))
    neighbours[name] = (ours(x[:2])[0] - ours(x)[0]).abs().max().item()
    print(f"{name:<10}{dims!s:>12}{n_means[name]:7}{furthest[name]:12.0e}{neighbours[name]:23.4f}")

one_group = (nn.GroupNorm(1, 6)(x) - nn.LayerNorm((6, 10, 10))(x)).abs().max().item()
six_groups = (nn.GroupNorm(6, 6)(x) - nn.InstanceNorm2d(6)(x)).abs().max().item()
print(f"one group is a layer norm: {one_group:.0e}; six are an instance norm: {six_groups:.0e}")

# %% [markdown]
# The last column is the one that matters. How an image comes out of a *batch* norm depends on which
# others are with it; the other three look at that image alone, so they need no memory and do the
# same in training and in use. They pay for that: what they take away is lost. Put a layer norm
# before the first layer, and it cannot tell fog from sunshine, for fog only changes contrast and
# brightness:

# %%
sunny = torch.rand(1, 3, 32, 32)
foggy = 0.3 * sunny + 0.6
no_eps = foundations.LayerNorm((3, 32, 32), eps=0.0)
fog = (no_eps(sunny) - no_eps(foggy)).abs().max().item()
print(f"sunny and foggy differ by {(sunny - foggy).abs().max():.2f}, after the norm by {fog:.0e}")

# %% [markdown]
# An instance norm goes further and takes each *channel's* strength away: good for copying a style,
# bad for telling things apart. And our last map has a single place. Of one value nothing is left
# but zero; or NaN, if the variance divides by n-1.

# %%
last_map = torch.randn(4, 64, 1, 1)
try:
    foundations.InstanceNorm(64)(last_map)
except DataError as error:
    refused = str(error)
    print(refused)

# %% [markdown]
# Does a layer norm do as well as a batch norm? At the same rate, and at a lower one:

# %%
for lr in (0.9, 0.1):
    name = f"layer norm, {lr}"
    reached[name] = accuracy_of(fitted(partial(nn.GroupNorm, 1), lr, n_train, batch_size))
    print(f"{name:<16}valid accuracy {reached[name]:.4f}")

# %% [markdown]
# (nan: the loss burst.) It does train, but not at any rate. Do not copy the learning rate from one
# norm to another.

# %% [markdown]
# ## Small batches
#
# Large images, segmentation, video: often no more than two fit into memory. What is the mean of
# two? In our last layer, where the map is 1×1, batch norm has *two values* per channel. Take any
# two, subtract the mean, divide by the standard deviation:

# %%
pair = torch.tensor([[0.1, 5.0, -3.0, 100.0], [0.3, 4.0, -2.0, -7.0]]).view(2, 4, 1, 1)
signs = BatchNorm(4)(pair).flatten(1)
larger_eps = BatchNorm(4, eps=1.0)(pair).flatten(1)
print("two images, four channels\n", signs.detach())
print("with eps = 1\n", larger_eps.detach())

# %% [markdown]
# Whatever went in, +1 and -1 come out: one bit, which of the two was larger. (A larger eps tames
# the guess where the two are close. It is a knob to know of, not a cure.) Also the running averages
# of such guesses fit the training badly, and the loss in use may be a hundred times that in
# training.
#
# **Running batch norm** uses running averages in training as well: of the sums, the sums of
# squares, and the counts of all batches so far, *this one included*. Gradients flow through this
# batch's part; the past is cut off with `detach`.


# %%
class RunningBatchNorm(nn.Module):
    def __init__(self, nf, mom=0.1, eps=1e-5):
        super().__init__()
        self.mom, self.eps, self.n_seen = mom, eps, 0
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))
        self.register_buffer("sums", torch.zeros(1, nf, 1, 1))
        self.register_buffer("squares", torch.zeros(1, nf, 1, 1))
        self.register_buffer("count", torch.zeros(()))

    def update_stats(self, x):
        weight = 1 - (1 - self.mom) / math.sqrt(max(len(x) - 1, 1))  # a large batch weighs more
        n = torch.tensor(x.numel() / x.shape[1])
        self.sums = self.sums.detach().lerp(x.sum((0, 2, 3), keepdim=True), weight)
        self.squares = self.squares.detach().lerp((x * x).sum((0, 2, 3), keepdim=True), weight)
        self.count = self.count.lerp(n, weight)
        self.n_seen += len(x)

    def forward(self, x):
        if self.training:
            self.update_stats(x)
        mean = self.sums / self.count
        var = self.squares / self.count - mean**2
        if self.n_seen < 20:
            var = var.clamp(min=0.01)  # the first few may be nearly equal by chance
        return (x - mean) / (var + self.eps).sqrt() * self.mults + self.adds


ours, pellucids = RunningBatchNorm(8), pellucid.nn.RunningBatchNorm(8)
torch.manual_seed(2)
differences, gradients_apart = [], []
for n in (2, 4, 2, 1, 32, 2):
    few = [(3 + 2 * torch.randn(n, 8, 7, 7)).requires_grad_()]
    few.append(few[0].detach().clone().requires_grad_())
    outs = ours(few[0]), pellucids(few[1])
    for out in outs:
        (out**3).sum().backward()
    differences.append((outs[0] - outs[1]).abs().max().item())
    gradients_apart.append(((few[0].grad - few[1].grad).norm() / few[0].grad.norm()).item())
print(f"from pellucid's: outputs {max(differences):.0e}, gradients {max(gradients_apart):.0e}")

# %% [markdown]
# One thing is worth a second look: these averages begin at zero, and still nobody corrects them. An
# average that begins at zero is too small for a while, by a known factor: after i + 1 values with
# weight 1 - β it has taken up the share 1 - βⁱ⁺¹. Dividing by that is *debiasing* (Adam does it).
# But a sum that is too small, divided by a count that is too small **by the same factor**, is
# right.

# %%
beta, average, count = 0.9, 0.0, 0.0
print(f"{'':<4}{'average':>9}{'debiased':>10}{'sum/count':>11}")
debiased, by_count = [], []
for i in range(5):  # five batches, each of 8 values with mean 3
    average = beta * average + (1 - beta) * 8 * 3.0
    count = beta * count + (1 - beta) * 8
    debiased.append(average / 8 / (1 - beta ** (i + 1)))
    by_count.append(average / count)
    print(f"{i:<4}{average / 8:9.3f}{debiased[-1]:10.3f}{by_count[-1]:11.3f}")

# %% [markdown]
# Now train with batches of two.

# %%
norms = {
    "batch": BatchNorm,
    "running batch": pellucid.nn.RunningBatchNorm,
    "layer": partial(nn.GroupNorm, 1),
}
at_two = {name: fitted(norms[name], 0.05, n_at_two, 2).epochs[-1] for name in compared_at_two}
print(f"{'':<16}{'train loss':>11}{'accuracy':>10}{'valid loss':>12}{'accuracy':>10}")
for name, row in at_two.items():
    print(f"{name:<16}{row['train/loss']:11.3f}{row['train/accuracy']:10.3f}"
          f"{row['valid/loss']:12.3f}{row['valid/accuracy']:10.3f}")  # fmt: skip

# %% [markdown]
# Batch norm has learnt next to nothing, and what it knows it cannot use. Running batch norm learns
# as if nothing was the matter. (A norm that does not look at the batch, such as a layer norm, is
# the other way out; for images in batches of usual size, batch norm is hard to beat.)
#
# ## What this lesson claims

# %%
assert first_out.mean().abs() < 1e-4 and abs(first_out.std() - 1) < 1e-3
assert list(three[0].state_dict()) == ["mults", "adds", "means", "vars"]
assert averages == [3.0, 3.2, 3.28] and np.allclose(by_formula, averages)
assert apart < 1e-4, f"our batch norm is {apart} off"

spread = {name: record.layers["activations/sd"] for name, record in records.items()}
levels = {name: record.layers["activations/mean"] for name, record in records.items()}
assert np.abs(spread["batch norm"][0] - 1).max() < 0.05 and np.abs(levels["batch norm"]).max() < 0.6
assert spread["batch norm"].min() > 0.5 and spread["batch norm"].max() < 2
falls = {name: (np.maximum.accumulate(sds) / sds.clip(1e-9)).max() for name, sds in spread.items()}
assert falls["batch norm"] < 2 and not falls["no norm"] < 10, falls  # NaN: it burst
others = [reached["no norm"], reached["layer norm, 0.9"]]
assert reached["batch norm"] > max(reachable, *np.nan_to_num(others)), reached
assert reached["layer norm, 0.1"] > np.nan_to_num(reached["layer norm, 0.9"]), reached

assert n_means == {"batch": 6, "layer": 20, "instance": 120, "group": 60}
assert max(furthest.values()) < 1e-4 and one_group < 1e-4 and six_groups < 1e-4, furthest
assert neighbours["batch"] > 0.01 > 1e-4 > max(neighbours[name] for name in list(neighbours)[1:])
assert fog < 1e-4 and "1" in refused

assert torch.allclose(signs[:, 1:].abs(), torch.ones(2, 3), atol=1e-3)
assert larger_eps[:, 0].abs().max() < 0.2
assert max(differences) < 1e-3 and max(gradients_apart) < 1e-3, (differences, gradients_apart)
assert np.allclose(debiased, 3) and np.allclose(by_count, 3)
batch_at_two, running_at_two = at_two["batch"], at_two["running batch"]
assert batch_at_two["valid/accuracy"] < 0.6 and running_at_two["valid/accuracy"] > good_at_two
assert batch_at_two["valid/loss"] > 2 * running_at_two["valid/loss"]
print("All claims hold.")
