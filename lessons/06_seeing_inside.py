# %% [markdown]
# # 6 · Seeing a network go wrong
#
# A network that trains badly gives little away: the loss is high. Why? Lesson 1 looked at the first
# batch only. Now we look inside *while it trains*, layer by layer and batch by batch. First by
# hand, then with hooks, then with the `Telemetry` that has grown out of that.
#
# The patient: four convolutions on MNIST, torch's own initial weights, and a learning rate of 0.9,
# which is too much for it. Not for its architecture, as we shall see.

# %%
# %matplotlib inline
import copy
import gc
import os
import weakref
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pellucid import DataLoaders, Learner
from pellucid.callbacks import Progress, Telemetry
from pellucid.data import mnist
from pellucid.hooks import Hooks, find
from pellucid.init import init_kaiming
from pellucid.metrics import accuracy
from pellucid.nn import GeneralReLU
from pellucid.plots import figure
from pellucid.vision import simple_cnn

QUICK = os.environ.get("LESSONS") == "quick"
n_train, n_valid = (12_800, 500) if QUICK else (49_152, 10_000)
reachable, much, batch_size = (0.7, 0.8, 256) if QUICK else (0.85, 0.9, 256)

original = mnist(split="course")


def made(n=n_train):
    arrays = [
        [part[:count] for part in loader.dataset.arrays]
        for loader, count in ((original.train, n), (original.valid, n_valid))
    ]
    return DataLoaders.from_arrays(*arrays, batch_size=batch_size, classes=10, seed=1)


def network(act=nn.ReLU, slope=None):
    torch.manual_seed(1)
    model = simple_cnn(1, 10, (8, 16, 32, 32), 5, act=act)
    if slope is not None:
        init_kaiming(model[:8], slope)  # the last layer, without an activation, keeps its own
    return model


print(network())

# %% [markdown]
# ## By hand
#
# A Sequential is a list. Calling its layers ourselves, we can write down what we like in between:
# mean and standard deviation of what each layer gives.


# %%
class SequentialModel(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.means = [[] for _ in layers]
        self.sds = [[] for _ in layers]

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.means[i].append(x.detach().mean().item())
            self.sds[i].append(x.detach().std().item())
        return x

    def __iter__(self):
        return iter(self.layers)


def train(model, data, n_batches=None, lr=0.9):
    opt, losses = SGD(model.parameters(), lr=lr), []
    for x, y in data.train:
        loss = F.cross_entropy(model(data.prepare(x, True)), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        if len(losses) == n_batches:
            break
    return losses


by_hand = SequentialModel(*network())
losses_by_hand = train(by_hand, made())

relus = [1, 3, 5, 7]


def levels(means, sds):
    drawing, panels = figure(2, width=3.4, height=2.5)
    drawing.set_dpi(90)
    for axes, title, values in zip(panels, ("mean", "sd"), (means, sds), strict=True):
        lines = axes.plot(values, linewidth=1)
        axes.set(title=title, xlabel="batch")
    names = [f"activation {i}" for i in relus]
    drawing.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return drawing


means_by_hand, sds_by_hand = (
    np.array([values[i] for i in relus]).T for values in (by_hand.means, by_hand.sds)
)
drawing = levels(means_by_hand, sds_by_hand)
drawing

# %% [markdown]
# At first the last layers give next to nothing, lesson 1 told us why. For a while nothing happens.
# Then everything rises at once, and falls off a cliff; sometimes several times over. Each fall
# takes what was learnt with it.

# %% [markdown]
# ## With hooks
#
# We had to rewrite the model to see that. torch can call us instead: a **forward hook** is a
# function of module, input and output, called after each forward pass. With `partial` it learns
# where it sits.


# %%
def append_stats(i, module, inputs, output):
    if module.training:
        means[i].append(output.detach().mean().item())
        sds[i].append(output.detach().std().item())


model = network()
means, sds = [[] for _ in model], [[] for _ in model]
for i, layer in enumerate(model):
    layer.register_forward_hook(partial(append_stats, i))

losses_with_hooks = train(model, made(), 5)
print("the same losses  ", losses_with_hooks == losses_by_hand[:5])
print("the same means   ", means == [values[:5] for values in by_hand.means])
print("hooks on ReLU 1  ", len(model[1]._forward_hooks))

# %% [markdown]
# Two things to dislike. The lists are global, and the hooks are *still there*: whoever trains that
# model from now on fills our lists, and all that a hook holds stays in memory as long as the model
# does. So a hook should carry its own state, and should know how to leave.


# %%
class Hook:
    def __init__(self, module, function):
        self.handle = module.register_forward_hook(partial(function, self))

    def remove(self):
        self.handle.remove()

    def __del__(self):
        self.remove()


def append_mean(hook, module, inputs, output):
    hook.means = [*getattr(hook, "means", []), output.detach().mean().item()]


model = network()
hooks = [Hook(layer, append_mean) for layer in model]
train(model, made(), 5)
for hook in hooks:
    hook.remove()
print("the same means", [hook.means for hook in hooks] == [v[:5] for v in by_hand.means])
print("hooks on ReLU 1", len(model[1]._forward_hooks))

# %% [markdown]
# Removing by hand is what one forgets, or what an error skips. `pellucid.hooks.Hooks` is a list of
# such hooks that are removed at the end of a `with`, on every way out, or when nobody holds them
# any more. And `backward=True` watches the gradients that come back to a module's output.


# %%
def keep_sd(hook, module, grad):
    hook.sd = grad.std().item()


activations = find(model, lambda module: isinstance(module, nn.ReLU))
with Hooks(activations.values(), keep_sd, backward=True) as hooks:
    train(model, made(), 1)
    print(hooks)
    grad_sds = [hook.sd for hook in hooks]
print("sd of the gradients", " ".join(f"{sd:.1e}" for sd in grad_sds))
hooks_left = sum(len(module._forward_hooks) for module in model.modules())
print("hooks left", hooks_left)

forgotten = Hooks(model, append_mean)
train(model, made(), 1)
watched = weakref.ref(model)
del model, forgotten, hooks, hook, layer, activations
gc.collect()
print("the model is freed:", watched() is None)

# %% [markdown]
# ## Histograms: the colourful dimension
#
# A mean hides a lot. Count instead how many values there are of each size, batch after batch, and
# draw the counts as colours: one column a batch. That is the picture to look at first.
#
# `Telemetry` is a callback. It hooks every layer (here only the activations), adds up sums and
# histograms, of gradients and updates too, and puts them into `learn.record.layers`.


# %%
def watched_run(model):
    telemetry = Telemetry(["1", "3", "5", "7"], every=1)
    learn = Learner(model, made(), opt_func=SGD, lr=0.9, metrics=[accuracy])
    return learn.fit(1, callbacks=[telemetry, Progress("off")])


bad = watched_run(network())
print(bad)
layers = bad.layers
drawing = layers.plot_histograms()
drawing.set_dpi(100)
drawing

# %% [markdown]
# What should be seen is a broad band that stays where it is. What is seen: at first all is near
# zero, in the last layers a single line. Then the range explodes, and collapses again, with nearly
# all values in the lowest cells. The share that is zero at the end stands in the corners.
#
# The means and standard deviations are those that we took by hand:

# %%
off = np.abs(layers["activations/mean"] - means_by_hand).max()
print(f"means at most {off:.0e} off")

# %% [markdown]
# How much is wasted? Count values below 0.5 as doing little, a twentieth of the range from 0 to 10.
# The histograms know, their edges are quarters of octaves, and 0.5 is one of them.


# %%
def share(layers, low, high):
    """Return the share of values between two edges, (rows, layers)."""
    edges = layers.edges("activations")
    inside = (edges[:-1] >= low - 0.01) & (edges[1:] <= high + 0.01)
    return layers["activations/histogram"][..., inside].sum(-1)


wasted = share(layers, 0, 0.5)
print("wasted        ", "".join(f"{name:>8}" for name in layers.names))
print("first batch   ", "".join(f"{value:8.3f}" for value in wasted[0]))
print("mean of all   ", "".join(f"{value:8.3f}" for value in wasted.mean(0)))
print("at most       ", "".join(f"{value:8.3f}" for value in wasted.max(0)))

# %% [markdown]
# In the last three layers, the mean over the whole training is more than nine of ten wasted. And
# some units give the same for *every* image of sixteen batches; these are dead. On the left, the
# share of those; on the right, that of values near zero.

# %%
drawing = layers.plot_shares()
drawing

# %% [markdown]
# ## First cure: Kaiming
#
# Same network, same rate, same batches; only the initial weights are of the right size.

# %%
kaiming = watched_run(network(slope=0.0))
print(kaiming)
drawing = kaiming.layers.plot_histograms()
drawing.set_dpi(100)
drawing

# %% [markdown]
# It starts broad, in all layers. Then it falls off the cliff all the same: the rate *is* large, and
# ReLU makes it easy. Its outputs have a positive mean, all of them push the next layer the same
# way, and once a unit is below zero for every image, no gradient brings it back.
#
# ## Second cure: a better ReLU
#
# Let a little through below zero (a slope of 0.1), so that nothing dies; take 0.4 away, so that the
# mean is near zero; cap at 6, so that one value cannot run away. And initialise for that slope.

# %%
healthy = watched_run(network(partial(GeneralReLU, leak=0.1, sub=0.4, cap=6.0), slope=0.1))
print(healthy)
drawing = healthy.layers.plot_histograms()
drawing.set_dpi(100)
drawing

# %%
drawing = levels(healthy.layers["activations/mean"], healthy.layers["activations/sd"])
drawing

# %% [markdown]
# That is what health looks like: a broad band that hardly changes, means of a few tenths, standard
# deviations that go from one to two at most, no cliff. With the *same* learning rate, from the
# first batch on.
#
# The rest of the doctor's questions can be asked of the same record. How large is a step, compared
# with the weights that it changes? A thousandth is usual; here it is a few hundredths: a rate of
# 0.9 is bold. (`layers.plot_updates()` draws it, parameter by parameter.)

# %%
update_ratios = {}
for name, record in {"default": bad, "GeneralReLU": healthy}.items():
    updates = np.nanmedian(record.layers["parameters/update"], axis=0)[:-1:2]  # the weights
    update_ratios[name] = updates
    print(f"update over weight, median: {name:<13}", "  ".join(f"{value:.3f}" for value in updates))

# %%
names = {"default": bad, "Kaiming": kaiming, "Kaiming, GeneralReLU": healthy}
falls, reached, learnt, wastes = {}, {}, {}, {}
print(f"{'':<22}{'train':>8}{'valid':>8}{'deepest fall':>14}{'wasted':>9}{'dead':>7}")
for name, record in names.items():
    low, high = (-0.36, 0.7) if record is healthy else (0, 0.5)
    sds = record.layers["activations/sd"]
    falls[name] = (np.maximum.accumulate(sds) / sds.clip(1e-9)).max()
    reached[name] = record.epochs.last("valid/accuracy")
    wastes[name] = share(record.layers, low, high)[:, -1].mean()
    dead = record.layers["activations/dead"][-1].max()
    learnt[name] = record.epochs.last("train/accuracy")
    print(
        f"{name:<22}{learnt[name]:8.4f}{reached[name]:8.4f}{falls[name]:14.1f}{wastes[name]:9.2f}{dead:7.2f}"
    )

# %% [markdown]
# The accuracy on the training data is the mean over the epoch: it tells how soon something was
# learnt. The deepest fall: by what factor a layer's standard deviation went down from its highest
# so far. Wasted: the last activation's share of small values, the mean over all batches; for
# GeneralReLU, which has values on both sides, those from -0.35 to 0.7.
#
# ## Looking changes nothing
#
# An instrument that disturbs what it measures is worth little. With telemetry on, the weights are
# the same **bit for bit**, and the losses are those of our own loop at the beginning.


# %%
def weights_after(*callbacks):
    learn = Learner(network(), made(5 * batch_size), opt_func=SGD, lr=0.9)
    learn.fit(1, callbacks=[Progress("off"), *callbacks])
    return copy.deepcopy(learn.model.state_dict())


seen, unseen = weights_after(Telemetry(every=1)), weights_after()
same_weights = all(torch.equal(seen[name], unseen[name]) for name in unseen)
print("the same weights:", same_weights)

# %% [markdown]
# It is cheap, too. By itself, `Telemetry()` records as many batches as five percent of the time
# allow. Whoever trains with it always has the pictures when something goes wrong, and not a day
# later. `learn.record.layers.plot()` draws them all in one.
#
# ## What this lesson claims

# %%
assert means == [values[:5] for values in by_hand.means] and losses_with_hooks == losses_by_hand[:5]
assert hooks_left == 0 and watched() is None and all(sd > 0 for sd in grad_sds)

n = len(losses_by_hand)
assert np.allclose(bad["train/loss"][:n], losses_by_hand, rtol=1e-5), "other losses than ours"
assert len(layers) == n and off < 1e-3, off
assert layers["activations/sd"][0, -1] < 0.1 < 0.4 < kaiming.layers["activations/sd"][0, -1]
assert wasted[0].min() > 0.8 and wasted[:, 1:].mean(0).min() > much, wasted.mean(0)
assert falls["default"] > 20 and falls["Kaiming, GeneralReLU"] < 8, falls
assert falls["Kaiming"] > 2 * falls["Kaiming, GeneralReLU"], falls
assert wastes["Kaiming, GeneralReLU"] < 0.5 < 0.8 < wastes["default"], wastes
assert np.abs(healthy.layers["activations/mean"]).max() < 1, "the means wander"
assert (np.nan_to_num(healthy.layers["activations/dead"]) == 0).all(), "GeneralReLU has died"
assert learnt["Kaiming, GeneralReLU"] > 0.1 + max(learnt["default"], learnt["Kaiming"]), learnt
assert reached["Kaiming, GeneralReLU"] > max(reachable, reached["default"]), reached
assert all(0.01 < ratio < 0.1 for ratio in update_ratios["GeneralReLU"]), update_ratios
assert same_weights, "Telemetry changed the weights"
print("All claims hold.")
