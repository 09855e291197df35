# %% [markdown]
# # 5 · A Learner from scratch, on images
#
# Between a folder of pictures and a trained network lie seven things: a data set, a loader, layers,
# a model, a loss, an optimiser, and the loop. Each is short. We write all seven, with nothing of
# torch but tensors, their gradients and the convolution, and then see what a library adds.
#
# The pictures are CIFAR-10 as JPEG files, if `$PELLUCID_DATA` has them, else the small digits that
# come with pellucid, written to files first.

# %%
# %matplotlib inline
import math
import os
import tarfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import pellucid
from pellucid.callbacks import Progress
from pellucid.data import digits
from pellucid.metrics import accuracy
from pellucid.plots import figure, plot_images, smooth
from pellucid.vision import simple_cnn

QUICK = os.environ.get("LESSONS") == "quick"
n_train, n_valid = (200, 50) if QUICK else (2_000, 500)  # of each class
n_epochs, reachable = (3, 0.2) if QUICK else (8, 0.45)
batch_size = 64 if QUICK else 128
torch.manual_seed(0)

folder = Path("images")
archive = Path(os.environ.get("PELLUCID_DATA", "")) / "cifar10-jpeg.tar.xz"
if archive.is_file():
    wanted = {"train": n_train, "test": n_valid}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:  # cifar10/train/airplane/0000.jpg
            part, _, name = member.name.split("/")[-3:] if member.isfile() else ("", "", "")
            if part in wanted and int(Path(name).stem) < wanted[part]:
                tar.extract(member, folder, filter="data")
    folder /= "cifar10"
else:
    for part, loader in (("train", digits().train), ("test", digits().valid)):
        for i, (image, label) in enumerate(loader.dataset):
            path = folder / part / str(int(label)) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image[0] * 15).numpy()).resize((32, 32)).save(path)

# %% [markdown]
# ## Files to tensors
#
# Where a file lies says what it shows. The names of the classes are *sorted*: in the order in which
# a file system lists them, class 3 would be another animal on another machine.
#
# The data set opens a file when it is asked for it, not before. Not every picture is in colour, so
# `convert("RGB")`.

# %%
files = {part: sorted(folder.glob(f"{part}/*/*.*")) for part in ("train", "test")}
classes = sorted({file.parent.name for file in files["train"]})
number = {name: i for i, name in enumerate(classes)}


class Dataset:
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i]).convert("RGB")
        pixels = torch.from_numpy(np.array(image)) / 255  # height, width, channel
        return pixels, torch.tensor(number[self.files[i].parent.name])


train_set, valid_set = Dataset(files["train"]), Dataset(files["test"])
x, y = train_set[0]
print(len(train_set), "and", len(valid_set), "images; the first", list(x.shape), classes[y])

some = [train_set[i] for i in range(0, len(train_set), len(train_set) // 16)][:16]
drawing = plot_images(
    torch.stack([x for x, _ in some]).permute(0, 3, 1, 2).numpy(), [classes[y] for _, y in some]
)
drawing

# %% [markdown]
# ## Tensors to batches
#
# An order, cut into chunks; each chunk gathered into one tensor. Opening files takes time, and the
# model waits. So a few helpers work ahead, and we take their batches *in the order asked for*,
# whoever is done first. Threads will do, because Pillow decodes without holding Python's lock; if
# there were more Python to run for each image, one would need processes (`pellucid.Loader` has
# them).


# %%
class DataLoader:
    def __init__(self, dataset, batch_size, shuffle=False, n_workers=2):
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.n_workers = shuffle, n_workers

    def __len__(self):
        return math.ceil(len(self.dataset) / self.batch_size)

    def collate(self, chunk):
        xs, ys = zip(*(self.dataset[i] for i in chunk), strict=True)
        return torch.stack(xs), torch.stack(ys)

    def __iter__(self):
        n = len(self.dataset)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        chunks = order.split(self.batch_size)
        if not self.n_workers:
            yield from map(self.collate, chunks)
            return
        with ThreadPoolExecutor(self.n_workers) as pool:
            ahead = deque()
            for chunk in chunks:
                ahead.append(pool.submit(self.collate, chunk))
                if len(ahead) > 2 * self.n_workers:  # not too far ahead: memory
                    yield ahead.popleft().result()  # an error in a thread is raised here
            for batch in ahead:
                yield batch.result()


class DataLoaders:
    def __init__(self, train, valid):
        self.train, self.valid = train, valid


dls = DataLoaders(
    DataLoader(train_set, batch_size, shuffle=True), DataLoader(valid_set, 2 * batch_size)
)
alone, helped = (DataLoader(valid_set, batch_size, n_workers=n) for n in (0, 2))
same_batches = all(
    torch.equal(x, x2) and torch.equal(y, y2)
    for (x, y), (x2, y2) in zip(alone, helped, strict=True)
)
x, y = next(iter(dls.train))
print(list(x.shape), list(y.shape), " with and without helpers the same:", same_batches)

# %% [markdown]
# Networks want inputs around 0 with a spread around 1, and channels before rows and columns. The
# statistics of one batch are good enough.

# %%
mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
print("mean", [round(v, 3) for v in mean.tolist()], "std", [round(v, 3) for v in std.tolist()])


def prepare(x):
    return ((x - mean) / std).permute(0, 3, 1, 2)


# %% [markdown]
# ## Modules
#
# A module has parameters and parts, and it finds both by noticing what is assigned to it (lesson
# 2). A parameter is a tensor that wants gradients and is nobody's result, in torch's word a leaf.
# Two things more: one word, `training`, said to a module reaches all its parts, and a *hook* may
# look at what comes out.


# %%
def parameter(x):
    return x.requires_grad_()


class Module:
    hook = None

    def __init__(self):
        self.own, self.parts, self._training = {}, {}, True

    def __setattr__(self, name, value):
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
            self.own[name] = value  # by name: assigning again replaces
        elif isinstance(value, Module):
            self.parts[name] = value
        super().__setattr__(name, value)

    def parameters(self):
        yield from self.own.values()
        for part in self.parts.values():
            yield from part.parameters()

    def __call__(self, *args):
        output = self.forward(*args)
        if self.hook is not None:
            self.hook(output, args)
        return output

    @property
    def training(self):
        return self._training

    @training.setter
    def training(self, value):
        self._training = value
        for part in self.parts.values():
            part.training = value


# %% [markdown]
# ## A convolution is a matrix product
#
# Take every 3×3 patch of the image, lay its numbers out in a column (`unfold`), and multiply with
# the kernels laid out in rows. That is all a convolution does; torch's own merely does it faster.


# %%
def conv_by_unfold(x, weight, stride=1, padding=0):
    kernel = weight.shape[2:]
    columns = F.unfold(x, kernel, stride=stride, padding=padding)  # n, channels·9, places
    side = (x.shape[2] + 2 * padding - kernel[0]) // stride + 1
    return (weight.flatten(1) @ columns).view(len(x), len(weight), side, -1)


image, kernels = torch.randn(4, 3, 28, 28), torch.randn(5, 3, 3, 3)
conv_apart = max(
    (conv_by_unfold(image, kernels, s, p) - F.conv2d(image, kernels, stride=s, padding=p))
    .abs()
    .max()
    for s, p in ((1, 0), (1, 1), (2, 1))
).item()
print(f"furthest from torch's convolution: {conv_apart:.0e}")

# %% [markdown]
# ## The layers and the model
#
# Four convolutions, each halving the picture, a mean over what is left of it, and a linear layer.
# The mean makes it indifferent to the size of the picture. How large the random weights should be
# is the subject of lesson 1: variance 2/inputs before a ReLU (Kaiming He), and 1 over the mean of
# inputs and outputs without one (Xavier Glorot).


# %%
class ConvLayer(Module):
    def __init__(self, n_in, n_out, stride=2):
        super().__init__()
        self.weight = parameter(torch.randn(n_out, n_in, 3, 3) * (2 / (n_in * 9)) ** 0.5)
        self.bias = parameter(torch.zeros(n_out))
        self.stride = stride

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=1).clamp(min=0)


class Linear(Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = parameter(torch.randn(n_out, n_in) * (2 / (n_in + n_out)) ** 0.5)
        self.bias = parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class MeanOfMap(Module):
    def forward(self, x):
        return x.mean((2, 3))


class Sequential(Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = layers
        for i, layer in enumerate(layers):
            setattr(self, f"layer{i}", layer)  # in a list they would go unnoticed

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def cnn():
    widths = [3, 16, 32, 64, 128]
    convolutions = [ConvLayer(a, b) for a, b in pairwise(widths)]
    return Sequential(*convolutions, MeanOfMap(), Linear(128, len(classes)))


model = cnn()
n_parameters = sum(p.numel() for p in model.parameters())
print(len(list(model.parameters())), "tensors with", n_parameters, "parameters")

seen = []
for layer in model.layers[:4]:
    layer.hook = lambda output, inputs: seen.append((output.mean().item(), output.std().item()))
with torch.no_grad():
    model(prepare(x))
for layer in model.layers[:4]:
    layer.hook = None  # or it would go on collecting
for i, (m, s) in enumerate(seen):
    print(f"after convolution {i}: mean {m:.2f}, std {s:.2f}")

# %% [markdown]
# Nothing explodes and little fades on the way through: the outputs keep their size.
#
# ## Loss and optimiser


# %%
def log_softmax(x):
    highest = x.amax(1, keepdim=True)
    return x - (highest + (x - highest).exp().sum(1, keepdim=True).log())


def cross_entropy(preds, y):
    return -log_softmax(preds)[range(len(y)), y].mean()


class SGD:
    def __init__(self, params, lr, wd=0.0):
        self.params, self.lr, self.wd = list(params), lr, wd

    @torch.no_grad()
    def step(self):
        for p in self.params:
            p -= self.lr * (p.grad + self.wd * p)
            p.grad = None


# %% [markdown]
# ## The Learner
#
# It holds everything, runs the loop, and says where it is; what it says is heard by callbacks,
# which are handed the learner (lesson 3 explains why). The optimiser is made after `before_fit`, so
# that a callback may still choose the rate.


# %%
class CancelFit(Exception): ...


class Learner:
    def __init__(self, model, dls, loss_func, lr, callbacks=(), opt_func=SGD):
        self.model, self.dls, self.loss_func, self.lr = model, dls, loss_func, lr
        self.opt_func, self.callbacks = opt_func, callbacks

    def one_batch(self):
        self("before_batch")
        self.preds = self.model(self.x)
        self.loss = self.loss_func(self.preds, self.y)
        if self.model.training:
            self.loss.backward()
            self.opt.step()
        self("after_batch")

    def one_epoch(self, train):
        self.model.training = train
        dl = self.dls.train if train else self.dls.valid
        self.n_batches = len(dl)
        self("before_epoch")
        with torch.set_grad_enabled(train):
            for self.batch_index, batch in enumerate(dl):
                self.x, self.y = batch
                self.one_batch()
        self("after_epoch")

    def fit(self, n_epochs):
        self.n_epochs = n_epochs
        self("before_fit")
        self.opt = self.opt_func(self.model.parameters(), self.lr)
        try:
            with suppress(CancelFit):
                for self.epoch in range(n_epochs):
                    self.one_epoch(True)
                    self.one_epoch(False)
        finally:
            self("after_fit")

    def __call__(self, moment):
        for callback in self.callbacks:
            if method := getattr(callback, moment, None):
                method(self)


# %% [markdown]
# Two callbacks: one makes inputs of images, the other adds up what came of it, each image weighing
# the same.


# %%
class Prepare:
    def before_batch(self, learn):
        learn.x = prepare(learn.x)


class Track:
    def __init__(self):
        self.rows = []

    def before_epoch(self, learn):
        self.loss = self.right = self.n = 0

    def after_batch(self, learn):
        self.right += (learn.preds.argmax(1) == learn.y).sum().item()
        self.loss += learn.loss.item() * len(learn.y)
        self.n += len(learn.y)

    def after_epoch(self, learn):
        part, loss, share = learn.model.training, self.loss / self.n, self.right / self.n
        self.rows.append((part, loss, share, self.n))
        if part:
            print(f"epoch {learn.epoch}: train {loss:.4f}, {share:.4f}", end="   ")
        else:
            print(f"valid {loss:.4f}, {share:.4f}")


track = Track()
learn = Learner(model, dls, cross_entropy, lr=0.1, callbacks=[Prepare(), track])
learn.fit(1)

# %% [markdown]
# It learns. Now two callbacks that steer: a search for the learning rate, which multiplies it by
# 1.2 before every batch until it is over 10 (or the loss is no number), and the one-cycle policy of
# chapter 19.


# %%
class LRFinder:
    def before_fit(self, learn):
        self.rates, self.losses, learn.lr = [], [], 1e-6

    def before_batch(self, learn):
        if learn.model.training:
            learn.opt.lr *= 1.2

    def after_batch(self, learn):
        if learn.model.training:
            if learn.opt.lr > 10 or torch.isnan(learn.loss):
                raise CancelFit
            self.rates.append(learn.opt.lr)
            self.losses.append(learn.loss.item())


class OneCycle:
    def __init__(self, lr):
        self.lr, self.rates = lr, []

    def before_batch(self, learn):
        if learn.model.training:
            n = learn.n_batches
            pos = (learn.epoch * n + learn.batch_index) / (learn.n_epochs * n)
            up = pos < 0.25
            learn.opt.lr = self.lr * (0.1 + 0.9 * pos / 0.25 if up else (1 - pos) / 0.75)
            self.rates.append(learn.opt.lr)


finder = LRFinder()
Learner(cnn(), dls, cross_entropy, lr=0.1, callbacks=[Prepare(), finder]).fit(10)
drawing, [axes] = figure()
axes.plot(finder.rates[:-2], finder.losses[:-2], color="#8c8c8c", alpha=0.5, label="as it is")
axes.plot(finder.rates[:-2], smooth(finder.losses[:-2], 0.8), color="#2166ac", label="smoothed")
limits = 0.85 * min(finder.losses), 1.1 * max(finder.losses[:20])
axes.set(xscale="log", xlabel="learning rate", title="training loss", ylim=limits)
axes.legend(frameon=False)
drawing

# %% [markdown]
# The loss begins to fall at a rate of some thousandths, has stopped falling at some tenths, and
# explodes above 3. Take 0.2, the highest rate of which one can say that it still helps.

# %%
one_cycle = OneCycle(0.2)
own = Learner(cnn(), dls, cross_entropy, lr=0.2, callbacks=[Prepare(), track, one_cycle])
own.fit(n_epochs)

# %% [markdown]
# ## What a library adds
#
# First: is it *right*? We give pellucid's Learner torch's modules with the very weights of ours and
# the very batches, in a list, and compare the losses (in float64, for the reason given in lesson
# 2).

# %%
torch.set_default_dtype(torch.float64)
batches = [(prepare(x).double(), y) for (x, y), _ in zip(dls.train, range(20), strict=False)]
ours, theirs = cnn(), simple_cnn(3, len(classes))
with torch.no_grad():
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torchs.copy_(mine)


class Losses:
    def before_fit(self, learn):
        self.seen = []

    def after_batch(self, learn):
        self.seen.append(learn.loss.item())


losses = Losses()
Learner(ours, DataLoaders(batches, []), cross_entropy, lr=0.1, callbacks=[losses]).fit(1)
their_learner = pellucid.Learner(
    theirs, (batches, None), F.cross_entropy, torch.optim.SGD, 0.1, callbacks=[Progress("off")]
)
apart = np.abs(np.array(losses.seen) - their_learner.fit(1)["train/loss"]).max()
torch.set_default_dtype(torch.float32)
print(f"20 batches, losses apart by at most {apart:.0e}")

# %% [markdown]
# And now all of it in four lines. What they have beyond ours: every file is decoded once, with the
# broken ones named beforehand; the order depends on a seed alone; the optimiser is AdamW in its
# fused form; a look such as `find_lr` puts everything back; what happened is on record. And what
# they share with ours is the loop. Read `pellucid/learner.py` now: there should be no surprise left
# in it.

# %%
torch.manual_seed(0)
data = pellucid.DataLoaders.from_folder(folder, size=32, batch_size=batch_size)
learn = pellucid.Learner(simple_cnn(3, data.n_classes), data, metrics=[accuracy])
record = learn.fit_one_cycle(n_epochs, lr=0.005)

# %%
drawing = record.plot()
drawing

# %% [markdown]
# ## What this lesson claims

# %%
assert classes == sorted(classes) and len(classes) == 10
assert same_batches, "helpers changed the batches"
assert conv_apart < 1e-4, f"our convolution is {conv_apart} away from torch's"
assert (len(list(model.parameters())), n_parameters) == (10, 98_730)
assert len(seen) == 4 and all(0.2 < m < 1.5 and 0.3 < s < 2 for m, s in seen), (
    f"the signal fades or explodes: {seen}"
)
(_, first, _, n), (_, first_valid, share, n_seen) = track.rows[:2]
assert n == len(train_set) and n_seen == len(valid_set), "some images were not counted"
assert abs(share * n_seen - round(share * n_seen)) < 1e-6, "no whole number of images is right"
assert track.rows[-2][1] < first, "training did not lower the loss"
assert np.allclose(finder.rates, 1e-6 * 1.2 ** np.arange(1, len(finder.rates) + 1))
assert 70 < len(finder.rates) <= 88 and finder.rates[-1] <= 9.2887, finder.rates[-1]
highest = int(np.argmax(one_cycle.rates))
assert len(one_cycle.rates) == n_epochs * len(dls.train)
assert math.isclose(one_cycle.rates[0], 0.02) and abs(highest / len(one_cycle.rates) - 0.25) < 0.02
assert apart < 1e-10, f"our Learner and pellucid's are {apart} apart"
own_share, their_share = track.rows[-1][2], record.epochs.last("valid/accuracy")
print(f"valid accuracy: from scratch {own_share:.4f}, pellucid {their_share:.4f}")
assert min(own_share, their_share) > reachable, f"not over {reachable}"
print("All claims hold.")
