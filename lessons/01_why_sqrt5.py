# %% [markdown]
# # 1 · Why √5?
#
# Somewhere in torch's source, where a convolution gets its first weights, stands
# `init.kaiming_uniform_(self.weight, a=math.sqrt(5))`. In some versions a comment says which
# numbers that gives; none says why these. Are they right?
#
# This lesson finds out, with nothing but random matrices and a calculator. First why initial
# weights matter at all; then how large they should be; then what torch does; and at last a way that
# needs no formula.

# %%
# %matplotlib inline
import math
import os
import statistics
from functools import partial

import torch
from torch import nn

from pellucid.data import mnist
from pellucid.init import fans, init_kaiming, init_orthogonal, init_xavier, lsuv, study_init
from pellucid.nn import GeneralReLU, gain_of
from pellucid.plots import figure

QUICK = os.environ.get("LESSONS") == "quick"
n_seeds, n_products = (3, 30) if QUICK else (20, 100)

# %% [markdown]
# ## A hundred layers
#
# A layer is a product with a matrix. Take the most natural random numbers, those from N(0, 1), and
# let a vector of 512 such numbers through a hundred such layers.


# %%
def how_far(scale):
    """Return how many layers of a hundred can be passed, and the last standard deviation."""
    x, layer = torch.randn(512), 0
    while layer < 100 and 0 < x.std() < math.inf:
        x = scale * torch.randn(512, 512) @ x
        layer += 1
    return layer, x.std().item()


torch.manual_seed(0)
exploded_at, exploded = how_far(1)
vanished_at, vanished = how_far(0.01)
print(f"after {exploded_at} layers the standard deviation is {exploded}")
print(f"with a hundredth of these weights: {vanished} after {vanished_at} layers")

# %% [markdown]
# Large weights explode, small ones vanish, and floats end in both directions. Between them is a
# narrow path. Where?
#
# One output is a sum of 512 products. A product of two numbers from N(0, 1) has mean 0 and mean
# square 1, and for independent numbers of mean 0 the mean squares simply add. So the mean square of
# an output should be 512: too large by a factor of √512 per layer, as a size.

# %%
products = torch.randn(10_000) * torch.randn(10_000)
print(f"one product:  mean {products.mean():6.3f}, mean square {products.square().mean():7.3f}")

weights, x = torch.randn(n_products, 512, 512), torch.randn(n_products, 512, 1)
y = weights @ x
mean_square = y.square().mean().item()
print(f"one output:   mean {y.mean():6.3f}, mean square {mean_square:7.2f}; 512 expected")
print(f"so divide by √512: the weights' standard deviation should be {1 / math.sqrt(512):.5f}")

# %% [markdown]
# That is Glorot's and Bengio's answer of 2010, known as **Xavier**: a standard deviation of 1/√n.
# Now a hundred layers do little. What is left is chance, a hundred times over. Matrices that are
# *orthogonal*, hence keep every length, leave not even that.

# %%
linear = nn.Linear(512, 512, bias=False)


def sd_after(init, seed, activation=lambda x: x):
    torch.manual_seed(seed)
    x, sds = torch.randn(512), []
    with torch.no_grad():
        for _ in range(100):
            init(linear)
            x = activation(linear(x))
            sds.append(x.std().item())
    return sds


xavier = sd_after(init_xavier, 0)
orthogonal = sd_after(init_orthogonal, 0)
print(f"after 100 layers: Xavier {xavier[-1]:.3f}, orthogonal {orthogonal[-1]:.3f}")

# %% [markdown]
# ## ReLU takes half
#
# A network is not made of products alone: each is followed by an activation, and ReLU sets half of
# the values to zero. So half of the mean square goes. (Not half of the *variance*: what remains has
# a positive mean. The mean square is what the next layer's sum is made of.)

# %%
print(f"one product:  mean {products.relu().mean():.3f}, "
      f"mean square {products.relu().square().mean():.3f}")  # fmt: skip
relu_mean, relu_square = y.relu().mean().item(), y.relu().square().mean().item()
print(f"one output:   mean {relu_mean:.2f}, mean square {relu_square:.1f}")

scaled = (y * math.sqrt(2 / 512)).relu()
scaled_mean, scaled_square = scaled.mean().item(), scaled.square().mean().item()
print(f"with √(2/512): mean {scaled_mean:.3f}, mean square {scaled_square:.4f}")

# %% [markdown]
# Hence **Kaiming** (He et al., 2015): √2 / √n. That small √2, in every layer, decides between life
# and death.

# %%
curves = {
    "Xavier, no activation": xavier,
    "Xavier, ReLU": sd_after(init_xavier, 0, torch.relu),
    "Kaiming, ReLU": sd_after(init_kaiming, 0, torch.relu),
}
drawing, [axes] = figure()
for name, sds in curves.items():
    axes.plot(range(1, 101), sds, label=name)
axes.set(yscale="log", xlabel="layer", title="standard deviation after each layer")
axes.legend(frameon=False)
drawing

# %% [markdown]
# ## Gains and fans
#
# The √2 is the *gain*: what must be made up for what the activation takes. A leaky ReLU, of slope
# a below zero, takes less: its gain is √(2 / (1 + a²)). In pellucid, `gain_of` finds the gain of
# any function, by integrating its square over the normal distribution.

# %%
print(f"{'slope':<10}{'√(2/(1+a²))':>12}{'gain_of':>10}")
gains = {}
for name, a in {"1": 1, "0": 0, "0.01": 0.01, "0.1": 0.1, "√5": math.sqrt(5)}.items():
    gains[name] = math.sqrt(2 / (1 + a**2)), gain_of(nn.LeakyReLU(a))
    print(f"{name:<10}{gains[name][0]:12.6f}{gains[name][1]:10.6f}")
gain_of_tanh = gain_of(torch.tanh)
print(f"and tanh {gain_of_tanh:.3f}, GELU {gain_of(nn.GELU()):.3f}")

# %% [markdown]
# The n under the root is the *fan in*, how many values meet in one output. In a convolution these
# are the values under the kernel, in all channels. The *fan out* is the same for the way back:
# there gradients are what is summed up, and one may rather keep their size.

# %%
conv = nn.Conv2d(1, 32, 5)
receptive_field = conv.weight[0, 0].numel()
by_hand = conv.in_channels * receptive_field, conv.out_channels * receptive_field
print(f"weights {tuple(conv.weight.shape)}; by hand {by_hand}, pellucid {fans(conv)}")

# %% [markdown]
# And a *uniform* distribution from -b to b has the standard deviation b/√3, so that b = √3 · gain /
# √(fan in). All of Kaiming's initialisation fits into four lines:


# %%
def kaiming(weight, a, uniform=True):
    sd = math.sqrt(2 / (1 + a**2)) / math.sqrt(weight[0].numel())
    with torch.no_grad():
        return weight.uniform_(-math.sqrt(3) * sd, math.sqrt(3) * sd) if uniform else (
            weight.normal_(0, sd))  # fmt: skip


# %% [markdown]
# ## What torch does
#
# Now the question. A convolution on a hundred real images, normalised; a ReLU after it. How large
# is what comes out, with the weights that torch gives, and with Kaiming's?

# %%
data = mnist(split="course")
images, labels = (part[:100] for part in next(iter(data.valid)))
x = data.prepare(images)
print(f"images {tuple(x.shape)}: mean {x.mean():.3f}, standard deviation {x.std():.3f}")


def after_relu(layer):
    with torch.no_grad():
        return layer(x).relu().std().item()


def with_weights(init):
    layer = nn.Conv2d(1, 32, 5)
    init(layer)
    return after_relu(layer)


ways = {
    "torch's default": lambda layer: None,
    "our kaiming, a = √5": lambda layer: kaiming(layer.weight, math.sqrt(5)),
    "our kaiming, a = 0": lambda layer: kaiming(layer.weight, 0),
    "init_kaiming, a = 0": init_kaiming,
}
one_layer = {}
print(f"{'':<24}{'median':>8}{'lowest':>8}{'highest':>8}")
for name, init in ways.items():
    torch.manual_seed(0)
    values = one_layer[name] = [with_weights(init) for _ in range(n_seeds)]
    print(f"{name:<24}{statistics.median(values):8.3f}{min(values):8.3f}{max(values):8.3f}")

# %% [markdown]
# torch's own weights let two fifths through. A "slope" of √5 means a gain of √(2/6) = 1/√3, where
# ReLU would need √2. That is too small by a factor of √6, about 2.4, **in every layer**.
#
# (There is a story behind it: √5 reproduces a formula that Lua Torch used long before Kaiming's
# paper, uniform from -1/√n to 1/√n. When that code moved to `kaiming_uniform_`, the slope was
# chosen so that nothing changed. It never was a slope.)
#
# ## It adds up
#
# Or rather, it multiplies. Four convolutions are hardly a deep network.


# %%
def four_convolutions(act=nn.ReLU):
    widths, layers = (1, 8, 16, 32, 1), []
    for i in range(4):
        kernel = 3 if i else 5
        layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, 2, kernel // 2), act()]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def squared_error(preds, labels):
    return (preds.flatten() - labels).square().mean()


shrunk, kept = [], []
for seed in range(n_seeds):
    torch.manual_seed(seed)
    model = four_convolutions()
    with torch.no_grad():
        shrunk.append(model(x).std().item())
        init_kaiming(model, uniform=True)
        kept.append(model(x).std().item())
print(f"standard deviation of the predictions, {n_seeds} seeds")
for name, values in {"torch's default": shrunk, "Kaiming": kept}.items():
    print(f"{name:<24}{statistics.median(values):8.4f}{min(values):8.4f}{max(values):8.4f}")

# %% [markdown]
# The predictions for a hundred different digits differ by a hundredth. And the gradients are
# smaller too, in every layer. `study_init` sends one batch both ways and says how large everything
# is; as it only looks, it leaves the model as it was.

# %%
torch.manual_seed(0)
model = four_convolutions()
batch = (x, labels.float())
default_study = study_init(model, batch, squared_error)
init_kaiming(model, uniform=True)
kaiming_study = study_init(model, batch, squared_error)
print(f"torch's default\n{default_study}\n\nKaiming\n{kaiming_study}")

# %%
drawing = default_study.plot("torch's default", {"Kaiming": kaiming_study})
drawing

# %% [markdown]
# ## Without formulas
#
# The √2 holds for ReLU. Put something else in its place, add dropout, a residual branch, and the
# sum has to be done again. The authors of SELU needed an appendix of more than ninety
# pages for one function.
#
# Mishkin and Matas (2015) simply *measure*: send a batch through, look at the first layer's output,
# divide its weights by the standard deviation, take the mean off its bias; then the next layer.
# They call it **LSUV**, layer-sequential unit variance. It does not matter what is in between.


# %%
def own_lsuv(model, x):
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                seen = layer(x)
                layer.weight /= seen.std(correction=0)
                layer.bias.sub_(seen.mean()).div_(seen.std(correction=0))
            x = layer(x)


torch.manual_seed(0)
unusual = four_convolutions(partial(GeneralReLU, leak=0.1, sub=0.4, cap=6.0))
kaiming_unusual = study_init(unusual, batch, squared_error)
own_lsuv(unusual, x)
by_ours = study_init(unusual, batch, squared_error)

torch.manual_seed(0)
unusual = four_convolutions(partial(GeneralReLU, leak=0.1, sub=0.4, cap=6.0))
report = lsuv(unusual, x)
by_pellucid = study_init(unusual, batch, squared_error)
print(report)
print("ours     ", [round(layer.sd, 3) for layer in by_ours.layers])
print("pellucid ", [round(layer.sd, 3) for layer in by_pellucid.layers])

# %% [markdown]
# `pellucid.init.lsuv` does it in one pass too, sets layers in the order in which they are *called*,
# whatever the model looks like, and says what it could not set. In training it is the callback
# `LSUV()`.
#
# In depth the difference is plain. Thirty layers and an activation for which nobody knows a gain by
# heart, with dropout on top:


# %%
def deep():
    torch.manual_seed(0)
    layers = []
    for _ in range(30):
        layers += [nn.Linear(256, 256), nn.SiLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(256, 10))


torch.manual_seed(1)
inputs = torch.randn(256, 256)
studies = {}
for name, init in {
    "torch's default": lambda model: None,
    "Kaiming, as for ReLU": init_kaiming,
    "LSUV": lambda model: lsuv(model, inputs),
}.items():
    model = deep()
    init(model)
    torch.manual_seed(2)
    studies[name] = study_init(model, inputs)
    print(f"{name:<22}{studies[name]!r}")

# %%
drawing, [left, right] = figure(2, width=4.6)
for name, study in studies.items():
    left.plot([layer.sd for layer in study.layers], label=name)
    right.plot([layer.grad_sd for layer in study.layers], label=name)
left.set(yscale="log", title="sd of the outputs", xlabel="layer")
right.set(yscale="log", title="sd of the weights' gradients", xlabel="layer")
left.legend(frameon=False)
drawing

# %% [markdown]
# Look at the default on the left: it seems to settle at 0.04. That is not signal. These are the
# biases, the same for every input; the signal is gone after three layers, as the gradients on the
# right tell.
#
# ## The moral
#
# The √5 sat in the most used library of its kind for years, and everybody assumed that somebody had
# thought about it. Do not assume that the library is right: **look at the numbers that come out of
# every layer.** If they are not what you expect, ask; and if it is a mistake, report it, with the
# study that shows it.
#
# (Why do networks train at all with such weights? Because normalisation, which is lesson 7, puts
# the sizes right in every layer, whatever the weights are. Mostly.)
#
# ## What this lesson claims

# %%
assert 25 <= exploded_at <= 30, f"it exploded after {exploded_at} layers"
assert not math.isfinite(exploded) and vanished == 0 and vanished_at < 100
assert abs(mean_square - 512) < 25 and abs(relu_square - 256) < 15 and abs(relu_mean - 9.03) < 0.5
assert abs(products.square().mean() - 1) < 0.1 and abs(products.relu().mean() - 0.318) < 0.03
assert abs(scaled_mean - 0.564) < 0.02 and abs(scaled_square - 1) < 0.05
assert 0.2 < xavier[-1] < 10 and abs(orthogonal[-1] - 1) < 0.2
assert curves["Xavier, ReLU"][-1] < 1e-10 and 0.01 < curves["Kaiming, ReLU"][-1] < 100

known = {"1": 1, "0": 1.414214, "0.01": 1.414143, "0.1": 1.407195, "√5": 0.577350}
for name, (formula, integral) in gains.items():
    assert abs(formula - known[name]) < 1e-6 and abs(integral - formula) < 1e-5, name
assert by_hand == fans(conv) == (25, 800) and abs(gain_of_tanh - 1.593) < 1e-3

middle = {name: statistics.median(values) for name, values in one_layer.items()}
assert abs(middle["torch's default"] - middle["our kaiming, a = √5"]) < 0.08, middle
assert 0.3 < middle["torch's default"] < 0.5 and 0.75 < middle["init_kaiming, a = 0"] < 1.25, middle
assert max(one_layer["torch's default"]) < min(one_layer["our kaiming, a = 0"]), one_layer

assert max(shrunk) < 0.02 and min(kept) > 0.1, (shrunk, kept)
assert all(large > 10 * small for small, large in zip(shrunk, kept, strict=True))
assert kaiming_study.layers[0].grad_sd > 5 * default_study.layers[0].grad_sd
for study in (by_ours, by_pellucid):
    assert all(abs(layer.sd - 1) < 2e-3 and abs(layer.mean) < 2e-3 for layer in study.layers)
assert not any(report.left.values()) and kaiming_unusual.layers[-1].sd < 0.2

last = {name: study.layers[-1].sd for name, study in studies.items()}
assert last["torch's default"] < 0.1 < 0.7 < last["LSUV"] < 1.4, last
assert abs(math.log(last["Kaiming, as for ReLU"])) > 5 * abs(math.log(last["LSUV"])), last
grad_sds = {name: [layer.grad_sd for layer in study.layers] for name, study in studies.items()}
assert grad_sds["torch's default"][0] < 1e-8 * grad_sds["torch's default"][-1]
assert max(grad_sds["LSUV"]) < 100 * min(grad_sds["LSUV"])
print("All claims hold.")
