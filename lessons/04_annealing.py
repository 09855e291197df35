# %% [markdown]
# # 4 · Annealing, and finding the learning rate
#
# Lesson 2 ended with an annoyance: the same recipe, the batches in another order, and the accuracy
# fell anywhere between 0.90 and 0.95. A learning rate that is right for the way down is too large
# for the bottom of the valley. So let it change on the way: that is *annealing*.
#
# First the curves, as plain functions, then what they do to training, then the question that comes
# before all that: which rate is right to begin with?

# %%
# %matplotlib inline
import copy
import inspect
import math
import os
import statistics
from functools import partial, wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pellucid import Callback, DataLoaders, Learner, schedules
from pellucid.callbacks import OneCycle, Progress, Schedule
from pellucid.data import mnist
from pellucid.errors import SetupError
from pellucid.metrics import accuracy
from pellucid.plots import figure

QUICK = os.environ.get("LESSONS") == "quick"
n_train, n_valid = (9_600, 2_000) if QUICK else (50_000, 10_000)
n_seeds, calmer, reachable = (3, 1, 0.85) if QUICK else (5, 5, 0.955)

# %% [markdown]
# ## Functions that make functions
#
# A schedule is a function of one number: how far the run is, from 0 to 1. Where it starts and ends
# should be settled beforehand. `partial` settles arguments:


# %%
def power(base, exponent):
    return base**exponent


squared = partial(power, exponent=2)
print(squared(3))


def sched_lin(start, end):
    def inner(pos):
        return start + pos * (end - start)

    return inner


print(sched_lin(1, 2)(0.3))

# %% [markdown]
# With four shapes we would write that outer function four times. A **decorator** writes it for us:
# a function that takes a function and gives another in its place. `*args, **kwargs` means "whatever
# you were given, pass it on", which is what a wrapper wants.


# %%
def counted(function):
    @wraps(function)  # the wrapper takes over name and docstring
    def wrapper(*args, **kwargs):
        wrapper.n_calls += 1
        return function(*args, **kwargs)

    wrapper.n_calls = 0
    return wrapper


power = counted(power)
power(2, exponent=10), power(2, 3)
print(power.__name__, "was called", power.n_calls, "times")


def annealer(formula):
    """Make of formula(start, end, pos) a factory(start, end), whose product takes pos."""

    @wraps(formula)
    def factory(start, end):
        return partial(formula, start, end)

    factory.__signature__ = inspect.signature(lambda start, end: None)  # what the prompt shows
    return factory


@annealer
def sched_lin(start, end, pos):
    return start + pos * (end - start)


@annealer
def sched_cos(start, end, pos):
    return start + (1 + math.cos(math.pi * (1 - pos))) * (end - start) / 2


@annealer
def sched_no(start, end, pos):
    return start


@annealer
def sched_exp(start, end, pos):
    return start * (end / start) ** pos


annealings = {"linear": sched_lin, "cosine": sched_cos, "none": sched_no, "exponential": sched_exp}
print("sched_lin takes", inspect.signature(sched_lin))

positions = np.linspace(0, 1, 101)
drawing, [axes] = figure()
for name, annealing in annealings.items():
    axes.plot(positions, [annealing(2, 1e-2)(pos) for pos in positions], label=name)
axes.set(xlabel="share of the run", title="from 2 to 0.01")
axes.legend(frameon=False)
drawing

# %% [markdown]
# ## One after the other
#
# Rise, then fall: two schedules, each stretched over its share of the run. `combine` takes any
# number of them. In the last line is the one-cycle policy of fast.ai's lessons.


# %%
def combine(shares, parts):
    assert abs(sum(shares) - 1) < 1e-9 and min(shares) >= 0, "shares must be >= 0 and add up to 1"
    ends = np.cumsum(shares)

    def inner(pos):
        i = min(int(np.searchsorted(ends, pos, side="right")), len(parts) - 1)
        begin = ends[i] - shares[i]
        return parts[i](min((pos - begin) / shares[i], 1.0))

    return inner


def create_phases(*shares):
    return [*shares, 1 - sum(shares)]


def cos_1cycle_anneal(start, high, end):
    return [sched_cos(start, high), sched_cos(high, end)]


up_and_down = combine(create_phases(0.3), cos_1cycle_anneal(0.3, 0.6, 0.2))
print("phases", create_phases(0.3), create_phases(0.3, 0.2))
print("on the way", [round(up_and_down(pos), 4) for pos in (0, 0.15, 0.3, 0.65, 1)])

# %% [markdown]
# The same in pellucid, with the same numbers. There the products are small objects instead of
# closures: they compare, they pickle (a closure does not), and they say what they are.

# %%
ours = schedules.combine(
    schedules.phases(0.3), [schedules.cosine(0.3, 0.6), schedules.cosine(0.6, 0.2)]
)
print(ours)
apart = max(abs(ours(pos) - up_and_down(pos)) for pos in positions)
print(f"furthest apart: {apart:.0e}")

# %% [markdown]
# ## A schedule at work
#
# Before every training batch, ask the schedule and set the rate. The position is the number of
# batches *finished* over all batches, so the first batch sees 0 and no batch ever sees 1: with four
# batches, `linear(1, 0.2)` gives 1, 0.8, 0.6 and 0.4.
#
# Any number that the optimiser knows can be scheduled so, not only the rate: they all live in
# `opt.param_groups`. And whoever sets numbers should also write them down.


# %%
class ParamScheduler:
    def __init__(self, name, schedule):
        self.name, self.schedule, self.values = name, schedule, []

    def before_batch(self, opt, pos):
        self.values.append(self.schedule(pos))
        for group in opt.param_groups:
            group[self.name] = self.values[-1]


def train(model, batches, opt, *schedulers):
    losses = []
    for i, (x, y) in enumerate(batches):
        for scheduler in schedulers:
            scheduler.before_batch(opt, i / len(batches))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def floats(loader, n):
    images, labels = loader.dataset.arrays
    return images[:n].flatten(1) / 255.0, labels[:n]


original = mnist(split="course")
arrays = floats(original.train, n_train), floats(original.valid, n_valid)


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


lr = ParamScheduler("lr", sched_lin(1, 0.2))
momentum = ParamScheduler("momentum", sched_cos(0.95, 0.85))
model = make(0)
train(model, [arrays[0]] * 4, SGD(model.parameters(), lr=1, momentum=0.9), lr, momentum)
print("lr      ", [round(value, 4) for value in lr.values])
print("momentum", [round(value, 4) for value in momentum.values])

# %% [markdown]
# ## What it does
#
# Now the question of lesson 2 again: one epoch of MNIST, batches of 64, five seeds. In pellucid a
# schedule is the callback `Schedule`, and what it sets goes on record by itself.


# %%
def reached_with(schedule, seed=0, *others):
    data = DataLoaders.from_arrays(*arrays, batch_size=64, seed=seed)
    learn = Learner(make(seed), data, opt_func=SGD, metrics=[accuracy])
    return learn.fit(1, callbacks=[Schedule("lr", schedule), Progress("off"), *others])


plans = {
    "constant 0.5": schedules.constant(0.5),
    "constant 1.0": schedules.constant(1.0),
    "linear 0.5 to 0": schedules.linear(0.5, 0),
    "cosine 0.5 to 0": schedules.cosine(0.5, 0),
    "exponential 0.5 to 0.005": schedules.exponential(0.5, 0.005),
    "cosine 0.3, 0.6, 0.2": ours,
    "one cycle, 0.5": schedules.one_cycle(0.5),
    "one cycle, 1.0": schedules.one_cycle(1.0),
}
accuracies = {}
print(f"{'':<26}{'median':>8}{'lowest':>8}{'highest':>8}")
for name, schedule in plans.items():
    runs = [reached_with(schedule, seed) for seed in range(n_seeds)]
    values = accuracies[name] = [run.epochs.last("valid/accuracy") for run in runs]
    print(f"{name:<26}{statistics.median(values):8.4f}{min(values):8.4f}{max(values):8.4f}")

# %% [markdown]
# With a constant rate, only luck separates a good run from a bad one. Every schedule that ends low
# lands in nearly the same place whatever the seed. (Not too low too soon: the exponential one has
# hardly moved in its second half.) And what ends low may be high in between: one cycle up to 1.0 is
# the best of all, a constant 1.0 among the worst.
#
# Where the difference comes from is seen if one validates after *every batch* of the last quarter.
# `learn.validate()` may be called in the middle of a fit, from a callback: it is a look, and a look
# changes nothing.


# %%
class LookLate(Callback):
    def before_fit(self, learn):
        self.batches, self.seen = [], []

    def after_step(self, learn):
        if learn.progress >= 0.75:
            self.batches.append(learn.batch_index + 1)
            self.seen.append(learn.validate()["accuracy"])


drawing, [left, right] = figure(2, width=4.6)
colours, late = ("#8c8c8c", "#2166ac", "#d6604d"), {}
for name, colour in zip(
    ("constant 0.5", "linear 0.5 to 0", "one cycle, 1.0"), colours, strict=True
):
    look = late[name] = LookLate()
    record = reached_with(plans[name], 0, look)
    left.plot(record["lr"], color=colour, label=name)
    right.plot(look.batches, look.seen, color=colour, linewidth=1.2)
with_looks = record.epochs.last("valid/accuracy")
left.set(title="learning rate", xlabel="batch")
right.set(title="valid accuracy, last quarter of the epoch", xlabel="batch")
left.legend(frameon=False)
drawing

# %% [markdown]
# At a constant 0.5 a single batch moves the accuracy by a percent, now and then by several. Where
# the run happens to end is where you are. Worst is the very last batch: 50,000 images are 781
# batches of 64 and one of 16, and the mean over 16 images is twice as noisy.

# %% [markdown]
# ## A plan, before the run
#
# `plan` draws what *will* be set. A rate may differ by parameter group, the first layers slower
# than the last, and momentum goes down when the rate goes up: `OneCycle` does both. What cannot
# work is refused.


# %%
def two_groups(params, lr):
    params = list(params)
    return SGD([{"params": params[:2]}, {"params": params[2:]}], lr=lr, momentum=0.9)


data = DataLoaders.from_arrays(*arrays, batch_size=64)
learn = Learner(make(0), data, opt_func=two_groups, metrics=[accuracy])
drawing = learn.plan(2, [OneCycle(lr=[0.02, 0.1])])
drawing

# %%
discriminative = learn.fit(1, callbacks=[OneCycle(lr=[0.02, 0.1])])
print(discriminative)
try:
    learn.fit(1, callbacks=[OneCycle(lr=[0.02, 0.1, 0.3])])
except SetupError as error:
    refused = str(error)
    print(refused)

# %% [markdown]
# The one-cycle of the book's chapter 19 is another one: straight lines, a tenth of the rate at the
# beginning and nothing at the end. It is made of the same parts in one line, as is any other.

# %%
chapter_19 = schedules.combine(
    [0.25, 0.75], [schedules.linear(0.01, 0.1), schedules.linear(0.1, 0)]
)
rates = [chapter_19(i / 592) for i in range(592)]  # 8 epochs of 74 batches
highest = max(range(592), key=lambda i: rates[i])
print(f"first {rates[0]:.3f}, batch 74 {rates[74]:.3f}, highest {rates[highest]:.3f} at {highest}, "
      f"last {rates[-1]:.4e}")  # fmt: skip

# %% [markdown]
# ## Which rate?
#
# Leslie Smith's answer: try them all. Train with a rate that grows from batch to batch, from far
# too small to far too large, and look where the loss falls. The first version of that, from
# scratch:


# %%
def lr_find(model, data, low=1e-6, high=10.0, steps=100):
    opt, rates, losses, best = SGD(model.parameters(), lr=low), [], [], math.inf
    while True:
        for x, y in data.train:  # again from the start if one epoch is too short
            rates.append(low * (high / low) ** (len(rates) / steps))
            opt.param_groups[0]["lr"] = rates[-1]
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            if len(rates) > steps or losses[-1] > 10 * best or math.isnan(losses[-1]):
                return rates, losses
            best = min(best, losses[-1])
            loss.backward()
            opt.step()
            opt.zero_grad()


model = make(0)
before = copy.deepcopy(model.state_dict())
rates_tried, losses_seen = lr_find(model, data)
lost = max((model.state_dict()[name] - value).abs().max().item() for name, value in before.items())
print(f"{len(rates_tried)} rates, {rates_tried[0]:.1e} to {rates_tried[-1]:.1f}; loss at the end "
      f"{losses_seen[-1]:.1f}; weights moved by up to {lost:.1f}")  # fmt: skip

# %% [markdown]
# It works, and it has three faults. **It costs you the weights**: they have just been trained with
# a rate of 10. (Save them before and load them after; then don't forget the optimiser, the random
# numbers, the order of the data …) **It stops at one bad batch**, since a single loss is noisy;
# better to smooth. And **it leaves the reading to you.**
#
# `learn.find_lr()` is a callback of thirty lines in a block that puts everything back. Here it
# looks at a learner in the middle of training, with dropout and momentum: much could be disturbed.


# %%
def halfway():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Dropout(0.2), nn.Linear(50, 10))
    data = DataLoaders.from_arrays(*arrays, batch_size=64, seed=1)
    learn = Learner(model, data, opt_func=partial(SGD, momentum=0.9), lr=0.02, metrics=[accuracy])
    learn.fit(1, callbacks=[Progress("off")])
    return learn


looked_at, left_alone = halfway(), halfway()
torch.manual_seed(2)
n_tried = len(looked_at.find_lr().lrs)
after_the_look = torch.get_rng_state()

torch.manual_seed(2)
untouched_random_state = torch.equal(after_the_look, torch.get_rng_state())
for learn in (looked_at, left_alone):
    torch.manual_seed(3)
    learn.fit(1, callbacks=[Progress("off")])
same_losses = (looked_at.record["train/loss"] == left_alone.record["train/loss"]).all()
print(f"{n_tried} rates tried; the same random state: {untouched_random_state}; "
      f"the same losses afterwards: {same_losses}")  # fmt: skip

# %% [markdown]
# The learner that was looked at went on exactly as the one that was not, bit for bit. Now a fresh
# network (one that is trained already falls at no rate, so a search tells little), and the picture.
# The suggestion is where the smoothed loss falls steepest. Not where it is lowest! There it has
# stopped falling, and the next rate already hurts.

# %%
learn = Learner(make(0), data, opt_func=SGD, metrics=[accuracy])
search = learn.find_lr()
drawing = search.plot()
drawing

# %% [markdown]
# Is it any good? One cycle with the suggestion, with a thirtieth of it, and with thirty times it.

# %%
by_rate = {}
for factor in (1 / 30, 1, 30):
    rate = search.suggestion * factor
    record = reached_with(schedules.one_cycle(rate))
    by_rate[factor] = record.epochs.last("valid/accuracy")
    print(f"highest rate {rate:8.3f}: valid accuracy {by_rate[factor]:.4f}")

# %% [markdown]
# ## What this lesson claims

# %%
assert squared(3) == 9 and power.n_calls == 2 and power.__name__ == "power"
assert sched_lin(1, 2)(0.3) == schedules.linear(1, 2)(0.3) == 1.3
assert list(inspect.signature(sched_lin).parameters) == ["start", "end"]
expected = {0: 1, 0.25: 1.146447, 0.3: 1.206107, 0.5: 1.5, 1: 2}
assert all(abs(sched_cos(1, 2)(pos) - value) < 1e-6 for pos, value in expected.items())
assert abs(sched_exp(1, 2)(0.3) - 1.231144) < 1e-6 and abs(sched_exp(1, 2)(0.5) - 2**0.5) < 1e-12
assert abs(sched_exp(1e-6, 10)(0.5) - 0.00316228) < 1e-8 and sched_no(1, 2)(0.7) == 1
assert create_phases(0.3, 0.2) == [0.3, 0.2, 0.5] == list(schedules.phases(0.3, 0.2))
on_the_way = [up_and_down(pos) for pos in (0, 0.15, 0.3, 0.65, 1)]
assert np.allclose(on_the_way, [0.3, 0.45, 0.6, 0.4, 0.2]), on_the_way
assert apart < 1e-12, f"pellucid's schedule is {apart} away from ours"
assert np.allclose(lr.values, [1.0, 0.8, 0.6, 0.4]) and momentum.values[0] == 0.95

worst, best = (min(accuracies[name]) for name in ("constant 0.5", "linear 0.5 to 0"))
assert worst < best, f"the worst constant run, {worst}, is no worse than the worst annealed, {best}"
spread = {name: max(values) - min(values) for name, values in accuracies.items()}
assert spread["linear 0.5 to 0"] < spread["constant 0.5"] / calmer, spread
assert with_looks == accuracies["one cycle, 1.0"][0], "the looks changed the result"
jumps = {name: np.abs(np.diff(look.seen)).mean() for name, look in late.items()}
assert jumps["constant 0.5"] > 3 * max(jumps["linear 0.5 to 0"], jumps["one cycle, 1.0"]), jumps
middle = {name: statistics.median(values) for name, values in accuracies.items()}
assert middle["cosine 0.3, 0.6, 0.2"] > middle["constant 0.5"], middle
assert middle["one cycle, 1.0"] > reachable, middle

assert "lr/0" in discriminative.batches and "momentum/1" in discriminative.batches
assert abs(discriminative["lr/1"].max() - 0.1) < 1e-4 and "3 schedules, 2 groups" in refused
assert rates[0] == 0.01 and abs(rates[74] - 0.055) < 1e-9 and highest == 148
assert abs(rates[-1] - 2.2523e-4) < 1e-8, rates[-1]

assert lost > 0.5, "our own search should have ruined the weights"
assert untouched_random_state and same_losses, "find_lr left a trace"
assert 0.1 < search.suggestion < 2, f"an odd suggestion: {search.suggestion}"
assert by_rate[1] > max(by_rate[1 / 30], by_rate[30]) + 0.02, by_rate
print("All claims hold.")
