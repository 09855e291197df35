# %% [markdown]
# # 2 · The training loop, from raw tensors to `Learner`
#
# Training a network is a loop of five acts: predict, compare, find the gradients, step, forget the
# gradients. Everything that training libraries add is a name for something in that loop that grew
# tiresome to write out.
#
# So we write it out, in thirteen stages. Each time one thing annoys us, gets a name, and moves out
# of the way. Nothing else may change: every stage begins with the same weights, sees the same
# batches in the same order, and has to report **the same loss for every batch**. At the end stands
# `pellucid.Learner`, and it has to report them too.
#
# We compute in float64. Not for the network's sake: so that "the same" can mean a difference below
# 10⁻¹⁰. (The picture at the end of stage 2 shows what is gained by that.)

# %%
# %matplotlib inline
import os
from contextlib import suppress
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn, optim, tensor

from pellucid.data import mnist
from pellucid.plots import figure

QUICK = os.environ.get("LESSONS") == "quick"
n_train, n_valid = (9_600, 2_000) if QUICK else (50_000, 10_000)
n_seeds, middling, best = (3, 0.83, 0.86) if QUICK else (5, 0.93, 0.945)

torch.set_default_dtype(torch.float64)
data = mnist(split="course")


def floats(loader, n):
    images, labels = loader.dataset.arrays
    return images[:n].flatten(1) / 255.0, labels[:n]


(x_train, y_train), (x_valid, y_valid) = floats(data.train, n_train), floats(data.valid, n_valid)
print(x_train.shape, x_train.dtype, "first labels", y_train[:5].tolist())

# %% [markdown]
# The network: 784 pixels, 50 hidden units, 10 classes. These four tensors are where every stage
# begins, drawn as `nn.Linear` draws them, evenly from ±1/√inputs (lesson 1 asks whether that is
# wise). A weight is stored as (outputs, inputs): a habit from the days when that was faster.

# %%
lr, batch_size = 0.5, 64
torch.manual_seed(0)
start = []
for n_in, n_out in ((784, 50), (50, 10)):
    start += [(torch.rand(shape) * 2 - 1) / n_in**0.5 for shape in ((n_out, n_in), (n_out,))]

stages = {}


def same(name, losses):
    """Note a stage's losses, and how far they ever are from those of the first stage."""
    losses = tensor(losses)
    first = stages["1 by hand"][0] if stages else losses
    stages[name] = losses, (losses - first).abs().max().item()
    print(f"{name}: first loss {losses[0]:.6f}, last {losses[-1]:.6f}, apart {stages[name][1]:.0e}")


# %% [markdown]
# ## Stage 1: by hand
#
# The loss is the negative log-likelihood of the right class. Softmax turns ten numbers into
# probabilities, and we need their logarithm. Written as it is defined it breaks, because `exp`
# overflows; the way out is log Σ eˣ = m + log Σ eˣ⁻ᵐ for any m, so let m be the largest x.


# %%
def log_softmax(x):
    m = x.amax(-1, keepdim=True)
    return x - (m + (x - m).exp().sum(-1, keepdim=True).log())


big = tensor([1000.0, 1001.0, 1002.0])
print("as defined:", (big.exp() / big.exp().sum()).log().tolist())
print("shifted:   ", [round(value, 4) for value in log_softmax(big).tolist()])

# %% [markdown]
# Cross entropy multiplies the log-probabilities with one-hot targets and adds up. Nine of ten
# products are zero, so we do not multiply, we index.
#
# The gradients need the chain rule from the last line to the first. The one pretty thing in it: for
# softmax with cross entropy, the gradient of the logits is the predicted probabilities minus the
# one-hot targets.


# %%
def nll(log_probabilities, y):
    return -log_probabilities[range(len(y)), y].mean()


def gradients(x, y, w1, b1, w2, b2):
    """Return the loss of a batch and its gradient for each of the four parameters."""
    hidden = x @ w1.t() + b1
    active = hidden.clamp(min=0)
    logs = log_softmax(active @ w2.t() + b2)

    g = logs.exp()
    g[range(len(y)), y] -= 1
    g /= len(y)  # the loss is a mean
    g_hidden = (g @ w2) * (hidden > 0)
    return nll(logs, y), [g_hidden.t() @ x, g_hidden.sum(0), g.t() @ active, g.sum(0)]


params, losses = [p.clone() for p in start], []
for i in range(0, n_train, batch_size):
    loss, grads = gradients(x_train[i : i + batch_size], y_train[i : i + batch_size], *params)
    for p, g in zip(params, grads, strict=True):
        p -= lr * g
    losses.append(loss.item())
same("1 by hand", losses)
after_one_epoch = params

# %% [markdown]
# Is it right? `log_softmax` by three routes, the product with the one-hot targets, torch's own
# loss, and torch's own gradients, on one batch.


# %%
def predict(x, w1, b1, w2, b2):
    return F.linear(F.linear(x, w1, b1).relu(), w2, b2)


x, y = x_train[:64], y_train[:64]
tracked = [p.clone().requires_grad_() for p in start]
logits = predict(x, *tracked)
by_definition = (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()
by_quotient_rule = logits - logits.exp().sum(-1, keepdim=True).log()
torch.testing.assert_close(log_softmax(logits), by_definition)
torch.testing.assert_close(log_softmax(logits), by_quotient_rule)

loss, ours = gradients(x, y, *start)
torch.testing.assert_close(loss, -(F.one_hot(y) * by_definition).sum(-1).mean().detach())
torch.testing.assert_close(loss, F.cross_entropy(logits, y).detach())
theirs = torch.autograd.grad(F.cross_entropy(logits, y), tracked)
for mine, torchs in zip(ours, theirs, strict=True):
    torch.testing.assert_close(mine, torchs)
print(f"loss of an untrained network {loss:.4f}; a uniform guess would cost ln 10 = 2.3026")

# %% [markdown]
# ## Stage 2: let torch find the gradients
#
# What annoys us most is the backward pass. `requires_grad_()` makes torch take notes of what is
# done with a tensor, `backward()` goes through the notes in reverse. The step itself must not be
# noted, hence `no_grad`.


# %%
def train_with_autograd(x_train, y_train, start):
    params, losses = [p.clone().requires_grad_() for p in start], []
    for i in range(0, n_train, batch_size):
        x, y = x_train[i : i + batch_size], y_train[i : i + batch_size]
        loss = F.cross_entropy(predict(x, *params), y)
        loss.backward()
        with torch.no_grad():
            for p in params:
                p -= lr * p.grad
                p.grad.zero_()
        losses.append(loss.item())
    return losses


same("2 autograd", train_with_autograd(x_train, y_train, start))

# %% [markdown]
# Why is `zero_()` a line of its own? Because `backward` *adds* to what is there. That is a feature:
# two losses can be combined, and a batch that does not fit into memory can be taken in parts. For
# the latter each part's mean must be divided by the number of parts, or the step is too long.

# %%
whole = torch.autograd.grad(F.cross_entropy(predict(x, *tracked), y), tracked)
for part in range(4):
    rows = slice(part * 16, part * 16 + 16)
    (F.cross_entropy(predict(x[rows], *tracked), y[rows]) / 4).backward()
for p, g in zip(tracked, whole, strict=True):
    torch.testing.assert_close(p.grad, g)
print("four quarters add up to the whole batch")

# %% [markdown]
# And float32? Here are both stages once more, in either precision. They agree to seven digits in
# the one and to sixteen in the other (dots on the floor: to the last bit). A mistake of one part in
# a million would pass for rounding in float32; in float64 it stands out by nine powers of ten.


# %%
def gap_in(dtype):
    x, params = x_train.to(dtype), [p.to(dtype) for p in start]
    other, losses = tensor(train_with_autograd(x, y_train, params)), []
    for i in range(0, n_train, batch_size):
        loss, grads = gradients(x[i : i + batch_size], y_train[i : i + batch_size], *params)
        params = [p - lr * g for p, g in zip(params, grads, strict=True)]
        losses.append(loss.item())
    return (tensor(losses) - other).abs()


gaps = {"float32": gap_in(torch.float32), "float64": gap_in(torch.float64)}
drawing, [axes] = figure()
for (name, gap), colour in zip(gaps.items(), ("#d6604d", "#2166ac"), strict=True):
    axes.plot(gap.clamp(min=1e-17), ".", markersize=3, color=colour, label=name)
axes.set(yscale="log", xlabel="batch", title="by hand and autograd: how far apart the losses are")
axes.legend(frameon=False, markerscale=4)
drawing

# %% [markdown]
# ## Stage 3: somebody who knows all parameters
#
# Four loose tensors are still bearable, forty are not. A class can notice what is assigned to it:
# Python calls `__setattr__` for every `self.name = value`. That is the whole secret of `nn.Module`.


# %%
class Noticing:
    def __init__(self):
        super().__setattr__("parts", {})

    def __setattr__(self, name, value):
        if isinstance(value, nn.Linear):
            self.parts[name] = value  # by name: assigning again replaces
        super().__setattr__(name, value)

    def parameters(self):
        for part in self.parts.values():
            yield from part.parameters()

    def __repr__(self):
        return f"{type(self).__name__} with {', '.join(self.parts)}"


class Homemade(Noticing):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(784, 50), nn.Linear(50, 10)

    def __call__(self, x):
        return self.second(self.first(x).relu())


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()  # without this line, nn.Module has no place to register anything
        self.first, self.second = nn.Linear(784, 50), nn.Linear(50, 10)

    def forward(self, x):
        return self.second(self.first(x).relu())


def begin(model):
    """Give a model the weights that all stages begin with."""
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
    return model


def train_module(model):
    losses = []
    for i in range(0, n_train, batch_size):
        x, y = x_train[i : i + batch_size], y_train[i : i + batch_size]
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
                p.grad.zero_()
        losses.append(loss.item())
    return losses


print(Homemade())
print([list(p.shape) for p in Homemade().parameters()])
same("3 a class that notices", train_module(begin(Homemade())))
same("3 nn.Module", train_module(begin(Mlp())))

# %% [markdown]
# A plain list of layers goes unnoticed, `nn.ModuleList` is noticed but cannot be called, and
# `nn.Sequential` can do both.


# %%
class InAList(nn.Module):
    def __init__(self, container):
        super().__init__()
        self.layers = container([nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10)])


noticed = {}
for container in (list, nn.ModuleList, lambda layers: nn.Sequential(*layers)):
    model = InAList(container)
    name = type(model.layers).__name__
    noticed[name] = len(list(model.parameters()))
    print(f"{name:<12}{noticed[name]} parameters")


def make():
    return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


same("3 nn.Sequential", train_module(begin(make())))

# %% [markdown]
# ## Stage 4: somebody who takes the step
#
# The optimiser knows *its* parameters, not the model: what is not given to it keeps its gradient
# and is not moved. That makes freezing a part of a model possible.


# %%
class Optimizer:
    def __init__(self, params, lr=0.5):
        self.params, self.lr = list(params), lr  # a list: a generator would be empty next time

    @torch.no_grad()
    def step(self):
        for p in self.params:
            p -= self.lr * p.grad

    def zero_grad(self):
        for p in self.params:
            p.grad = None


def train_with(model, opt):
    losses = []
    for i in range(0, n_train, batch_size):
        x, y = x_train[i : i + batch_size], y_train[i : i + batch_size]
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


model = begin(make())
same("4 own Optimizer", train_with(model, Optimizer(model.parameters(), lr)))
model = begin(make())
same("4 optim.SGD", train_with(model, optim.SGD(model.parameters(), lr)))

# %% [markdown]
# ## Stage 5: somebody who cuts the batches
#
# The slices repeat themselves. First inputs and targets become one thing, a data set; then the loop
# over its slices becomes a generator. (The class is called `Slices`, because stage 6 is going to
# replace it by a real loader.)


# %%
class Dataset:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Slices:
    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self):
        for i in range(0, len(self.dataset), self.batch_size):
            yield self.dataset[i : i + self.batch_size]


def train_on(batches, model, opt):
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def fresh():
    model = begin(make())
    return model, optim.SGD(model.parameters(), lr)


train_set, valid_set = Dataset(x_train, y_train), Dataset(x_valid, y_valid)
same("5 Dataset and slices", train_on(Slices(train_set, batch_size), *fresh()))

# %% [markdown]
# ## Stage 6: order and collation
#
# Data that are all alike make bad batches, so training data come in a new order every epoch;
# validation data need none. The **sampler** decides which items make a batch, **collate** makes one
# tensor of them. The loader only calls the two, and either can be exchanged.


# %%
class Sampler:
    def __init__(self, dataset, batch_size, shuffle=False):
        self.n, self.batch_size, self.shuffle = len(dataset), batch_size, shuffle

    def __iter__(self):
        order = torch.randperm(self.n) if self.shuffle else torch.arange(self.n)
        yield from order.split(self.batch_size)  # the last batch may be smaller


def collate(items):
    xs, ys = zip(*items, strict=True)
    return torch.stack(xs), torch.stack(ys)


class DataLoader:
    def __init__(self, dataset, sampler, collate_fn=collate):
        self.dataset, self.sampler, self.collate_fn = dataset, sampler, collate_fn

    def __len__(self):
        return -(-self.sampler.n // self.sampler.batch_size)

    def __iter__(self):
        for indices in self.sampler:
            yield self.collate_fn([self.dataset[i] for i in indices])


ten = range(10)
print("in order", [part.tolist() for part in Sampler(ten, 3)])
print("shuffled", [part.tolist() for part in Sampler(ten, 3, shuffle=True)])
print("again   ", [part.tolist() for part in Sampler(ten, 3, shuffle=True)])

train_dl = DataLoader(train_set, Sampler(train_set, batch_size))
valid_dl = DataLoader(valid_set, Sampler(valid_set, batch_size * 2))
same("6 own DataLoader", train_on(train_dl, *fresh()))
torchs = torch.utils.data.DataLoader(train_set, batch_size)
same("6 torch's DataLoader", train_on(torchs, *fresh()))

# %% [markdown]
# Below we stay with the unshuffled loader, for the sake of the comparison.
#
# ## Stage 7: validation, and a function called `fit`
#
# Three things are easily forgotten. The model has two modes, `train()` and `eval()`: dropout and
# batch norm act differently in each. Validation needs no gradients, so nothing need be noted for
# them. And the last batch is smaller, so the mean of the batch means is *not* the mean.


# %%
def accuracy(preds, y):
    return (preds.argmax(1) == y).double().mean()


def validate(model, loss_func, valid_dl):
    """Return loss and accuracy over all items, each item weighing the same."""
    model.eval()
    total = n = 0
    with torch.no_grad():
        for x, y in valid_dl:
            preds = model(x)
            total += tensor([loss_func(preds, y), accuracy(preds, y)]) * len(x)
            n += len(x)
    return (total / n).tolist()


def fit(epochs, model, loss_func, opt, train_dl, valid_dl):
    losses = []
    for epoch in range(epochs):
        model.train()
        for x, y in train_dl:
            loss = loss_func(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        loss, right = validate(model, loss_func, valid_dl)
        print(f"epoch {epoch}: valid loss {loss:.4f}, accuracy {right:.4f}")
    return losses


model, opt = fresh()
same("7 fit", fit(1, model, F.cross_entropy, opt, train_dl, valid_dl))

with torch.no_grad():
    means = tensor([F.cross_entropy(model(x), y) for x, y in valid_dl]).mean().item()
    whole = F.cross_entropy(model(x_valid), y_valid).item()
weighted = validate(model, F.cross_entropy, valid_dl)[0]
print(f"valid loss: all at once {whole:.8f}, weighted {weighted:.8f}, mean of means {means:.8f}")

# %% [markdown]
# ## Stage 8: one thing to carry them all
#
# Six arguments are too many, and four of them always travel together. A container without any logic
# of its own will do. It can be changed: whoever holds it may exchange the loss between two batches,
# and the loop will use the new one.


# %%
class Bundle:
    """Everything a fit needs, and no logic at all."""

    def __init__(self, model, opt, loss_func, data):
        self.model, self.opt, self.loss_func, self.data = model, opt, loss_func, data


loaders = SimpleNamespace(train=train_dl, valid=valid_dl)


def bundle():
    return Bundle(*fresh(), F.cross_entropy, loaders)


def fit(epochs, learn):
    losses = []
    for _ in range(epochs):
        learn.model.train()
        for x, y in learn.data.train:
            loss = learn.loss_func(learn.model(x), y)
            loss.backward()
            learn.opt.step()
            learn.opt.zero_grad()
            losses.append(loss.item())
        validate(learn.model, learn.loss_func, learn.data.valid)
    return losses


same("8 fit(epochs, learn)", fit(1, bundle()))

# %% [markdown]
# ## Stage 9: callbacks and their handler
#
# Now people want things: a schedule, a progress bar, mixed precision, early stopping. Each would be
# a flag in `fit`, and each flag an `if`. Instead, the loop says what it is about to do, and whoever
# is interested acts: a **callback**. A **handler** passes the word on to all of them.
#
# In this first form a callback answers `True` for "go on" and `False` for "no". What "no" means
# depends on where it was said: after the backward pass it skips the step, after the step the
# zeroing, at the beginning of an epoch the epoch. And `stop` ends the fit.


# %%
class YesCallback:
    def begin_fit(self, learn):
        self.learn = learn
        return True

    def after_fit(self):
        return True

    def begin_epoch(self, epoch):
        return True

    def begin_validate(self):
        return True

    def after_epoch(self):
        return True

    def begin_batch(self, x, y):
        return True

    def after_loss(self, loss):
        return True

    def after_backward(self):
        return True

    def after_step(self):
        return True


class Handler:
    """Asks all callbacks; the answer is yes if all say yes."""

    def __init__(self, callbacks=()):
        self.callbacks, self.stop = list(callbacks), False

    def ask(self, moment, *args):
        answers = [getattr(cb, moment)(*args) for cb in self.callbacks]
        return all(answers)  # of a list: everybody is asked, whatever the first one says

    def begin_fit(self, learn):
        self.learn, self.in_train = learn, True
        learn.handler = self
        return self.ask("begin_fit", learn)

    def begin_epoch(self, epoch):
        self.in_train = True
        self.learn.model.train()
        return self.ask("begin_epoch", epoch)

    def begin_validate(self):
        self.in_train = False
        self.learn.model.eval()
        return self.ask("begin_validate")

    def after_loss(self, loss):
        return self.ask("after_loss", loss) and self.in_train  # no backward in validation

    def do_stop(self):
        """Read the wish to stop, and forget it: the next fit shall not be stopped by it."""
        try:
            return self.stop
        finally:
            self.stop = False


def one_batch(x, y, handler):
    learn = handler.learn
    if not handler.ask("begin_batch", x, y):
        return
    loss = learn.loss_func(learn.model(x), y)
    if not handler.after_loss(loss):
        return
    loss.backward()
    if handler.ask("after_backward"):
        learn.opt.step()
    if handler.ask("after_step"):
        learn.opt.zero_grad()


def all_batches(loader, handler):
    for x, y in loader:
        if handler.stop:
            return
        one_batch(x, y, handler)


def fit(epochs, learn, handler):
    if not handler.begin_fit(learn):
        return
    for epoch in range(epochs):
        if not handler.begin_epoch(epoch):
            continue
        all_batches(learn.data.train, handler)
        if handler.begin_validate():
            with torch.no_grad():
                all_batches(learn.data.valid, handler)
        if handler.do_stop() or not handler.ask("after_epoch"):
            break
    handler.ask("after_fit")


class Losses(YesCallback):
    def begin_fit(self, learn):
        self.losses = []
        return super().begin_fit(learn)

    def after_loss(self, loss):
        if self.learn.handler.in_train:
            self.losses.append(loss.item())
        return True


class TenBatches(YesCallback):
    def begin_fit(self, learn):
        self.n = 0
        return super().begin_fit(learn)

    def after_step(self):
        self.n += 1
        print(self.n, end=" " if self.n < 10 else " and stops\n")
        self.learn.handler.stop = self.n >= 10
        return True


track = Losses()
fit(1, bundle(), Handler([track]))
same("9 handler", track.losses)

handler = Handler([TenBatches()])
fit(1, bundle(), handler)
stopped_after = handler.callbacks[0].n
handler.callbacks = [track]
fit(1, bundle(), handler)
again = len(track.losses)
print(f"the same handler again, without that callback: {again} batches")

# %% [markdown]
# ## Stage 10: the runner
#
# The handler repeats the loop's structure, the loop is full of the handler, and state is split
# between both. Put them together: the **runner** owns the state *and* runs the loop. It calls
# itself with the name of a moment, `self("begin_batch")`, and looks that name up on every callback;
# who has no such method is not interested. So a callback defines what it needs and nothing else,
# and even train and eval mode become a callback.


# %%
class Part:
    """A callback. What it does not have itself it looks up on the runner: more in lesson 3."""

    order = 0

    def __getattr__(self, name):
        return getattr(self.run, name)


class TrainEval(Part):
    order = -10  # before all others

    def begin_fit(self):
        self.run.n_batches = 0

    def after_step(self):
        self.run.n_batches += 1

    def begin_epoch(self):
        self.model.train()
        self.run.in_train = True

    def begin_validate(self):
        self.model.eval()
        self.run.in_train = False


class Averages(Part):
    """Weighted means of the loss and of metrics, for training and validation."""

    def __init__(self, *metrics):
        self.metrics, self.rows = metrics, []

    def begin_epoch(self):
        self.total = {True: 0.0, False: 0.0}
        self.n = {True: 0, False: 0}

    def after_loss(self):
        with torch.no_grad():
            row = [self.loss.detach(), *(metric(self.preds, self.y) for metric in self.metrics)]
        self.total[self.in_train] += tensor(row) * len(self.x)
        self.n[self.in_train] += len(self.x)

    def after_epoch(self):
        means = {part: (self.total[part] / self.n[part]).tolist() for part in (True, False)}
        self.rows.append(means)
        rounded = {part: [round(value, 4) for value in means[part]] for part in means}
        print(f"epoch {self.epoch}: train {rounded[True]}, valid {rounded[False]}")


class Runner:
    def __init__(self, parts):
        self.parts = sorted([TrainEval(), *parts], key=lambda part: part.order)
        self.stop = False

    def __call__(self, moment):
        for part in self.parts:
            method = getattr(type(part), moment, None)  # asked of the class, not of the runner
            if method is not None and method(part):
                return True  # in this form: skip
        return False

    def one_batch(self, x, y):
        self.x, self.y = x, y
        if self("begin_batch"):
            return
        self.preds = self.model(self.x)
        if self("after_pred"):
            return
        self.loss = self.loss_func(self.preds, self.y)
        if self("after_loss") or not self.in_train:
            return
        self.loss.backward()
        if self("after_backward"):
            return
        self.opt.step()
        if self("after_step"):
            return
        self.opt.zero_grad()

    def all_batches(self, loader):
        for x, y in loader:
            if self.stop:
                break
            self.one_batch(x, y)
            self("after_batch")
        self.stop = False

    def fit(self, epochs, learn):
        self.model, self.opt, self.loss_func = learn.model, learn.opt, learn.loss_func
        self.data, self.epochs = learn.data, epochs
        try:
            for part in self.parts:
                part.run = self
            if self("begin_fit"):
                return
            for self.epoch in range(epochs):
                if not self("begin_epoch"):
                    self.all_batches(self.data.train)
                with torch.no_grad():
                    if not self("begin_validate"):
                        self.all_batches(self.data.valid)
                if self("after_epoch"):
                    break
        finally:
            self("after_fit")


class Recorder(Part):
    def begin_fit(self):
        self.losses = []

    def after_loss(self):
        if self.in_train:
            self.losses.append(self.loss.item())


recorder = Recorder()
Runner([recorder, Averages(accuracy)]).fit(1, bundle())
same("10 runner", recorder.losses)

# %% [markdown]
# ## Stage 11: exceptions instead of answers
#
# One thing in the runner is ugly: every line asks whether somebody said no, and the answer has to
# be carried out through three functions. Python has a way to leave several functions at once and
# still tidy up on the way: raise. Three empty classes replace all the ifs.
#
# The fit sits in a `try` with a `finally`, so that `after_fit` is heard however the fit ends, and
# exactly once.


# %%
class CancelBatch(Exception): ...


class CancelEpoch(Exception): ...


class CancelFit(Exception): ...


class CancellableRunner(Runner):
    def __call__(self, moment):
        for part in self.parts:
            method = getattr(type(part), moment, None)
            if method is not None:
                method(part)

    def one_batch(self, x, y):
        try:
            self.x, self.y = x, y
            self("begin_batch")
            self.preds = self.model(self.x)
            self("after_pred")
            self.loss = self.loss_func(self.preds, self.y)
            self("after_loss")
            if self.in_train:
                self.loss.backward()
                self("after_backward")
                self.opt.step()
                self("after_step")
                self.opt.zero_grad()
        except CancelBatch:
            self("after_cancel_batch")
        finally:
            self("after_batch")

    def all_batches(self, loader):
        try:
            for x, y in loader:
                self.one_batch(x, y)
        except CancelEpoch:
            self("after_cancel_epoch")

    def fit(self, epochs, learn):
        self.model, self.opt, self.loss_func = learn.model, learn.opt, learn.loss_func
        self.data, self.epochs = learn.data, epochs
        for part in self.parts:
            part.run = self
        try:
            self("begin_fit")
            for self.epoch in range(epochs):
                self("begin_epoch")
                self.all_batches(self.data.train)
                self("begin_validate")
                with torch.no_grad():
                    self.all_batches(self.data.valid)
                self("after_epoch")
        except CancelFit:
            self("after_cancel_fit")
        finally:
            self("after_fit")


class Heard(Part):
    """Counts what it hears."""

    def begin_fit(self):
        self.counts = dict.fromkeys(["begin_validate", "after_cancel_fit", "after_fit"], 0)

    def begin_validate(self):
        self.counts["begin_validate"] += 1

    def after_cancel_fit(self):
        self.counts["after_cancel_fit"] += 1

    def after_fit(self):
        self.counts["after_fit"] += 1


class Stop(Part):
    order = 1

    def after_step(self):
        print(self.n_batches, end=" ")
        if self.n_batches >= 10:
            print("and stops")
            raise CancelFit


recorder = Recorder()
CancellableRunner([recorder, Averages(accuracy)]).fit(1, bundle())
same("11 exceptions", recorder.losses)
heard, stopped = Heard(), bundle()
CancellableRunner([Stop(), heard]).fit(3, stopped)
left_by_runner = any(p.grad is not None for p in stopped.model.parameters())
print(heard.counts, " gradients left on the model:", left_by_runner)

# %% [markdown]
# ## Stage 12: the Learner owns the loop
#
# Why two objects, the bundle and the runner? The bundle had no logic, and the runner copied its
# contents. Make them one. The optimiser is made when the fit begins, so that whoever acts before
# can still choose the learning rate.


# %%
class Learner:
    def __init__(self, model, data, loss_func, lr, parts=(), opt_func=optim.SGD):
        self.model, self.data, self.loss_func, self.lr = model, data, loss_func, lr
        self.opt_func, self.parts = opt_func, sorted(parts, key=lambda part: part.order)

    def __call__(self, moment):
        for part in self.parts:
            if method := getattr(type(part), moment, None):
                method(part)

    def one_batch(self):
        self("before_batch")
        self.preds = self.model(self.x)
        self.loss = self.loss_func(self.preds, self.y)
        if self.in_train:
            self.loss.backward()
            self.opt.step()
            self.opt.zero_grad()
        self("after_batch")

    def one_pass(self, in_train):
        self.in_train = in_train
        self.model.train(in_train)
        with torch.set_grad_enabled(in_train):
            self("before_pass")
            for batch in self.data.train if in_train else self.data.valid:
                self.x, self.y = batch
                with suppress(CancelBatch):
                    self.one_batch()
            self("after_pass")

    def fit(self, epochs):
        for part in self.parts:
            part.run = self
        self("before_fit")
        self.opt = self.opt_func(self.model.parameters(), self.lr)
        try:
            for self.epoch in range(epochs):
                self.one_pass(True)
                self.one_pass(False)
        except CancelFit:
            pass
        finally:
            self("after_fit")


class Track(Part):
    def before_fit(self):
        self.losses = []

    def after_batch(self):
        if self.in_train:
            self.losses.append(self.loss.item())


track = Track()
Learner(begin(make()), loaders, F.cross_entropy, lr, [track]).fit(1)
same("12 own Learner", track.losses)

# %% [markdown]
# ## Stage 13: pellucid
#
# `pellucid.Learner` is that class, finished: spans beside moments, hyper-parameters and losses on
# record, errors that say where they happened, and nothing left behind on any way out. (The runner
# of stage 11 did leave something: cancelled after a step, the gradients stay on the model and are
# added to those of the next fit.) Its loop still fits on a screen, `fit` and `one_pass` in
# `pellucid/learner.py`, and it takes any iterable of batches, our home-made loaders too.

# %%
import pellucid
from pellucid.callbacks import Progress

learn = pellucid.Learner(
    begin(make()), (train_dl, valid_dl), F.cross_entropy, optim.SGD, lr, metrics=[accuracy]
)
learn.fit(1, callbacks=[Progress("off")])
same("13 pellucid", learn.record["train/loss"].tolist())


class StopAfterStep(pellucid.Callback):
    changes = True

    def after_step(self, learn):
        raise pellucid.CancelFit


learn.fit(1, callbacks=[StopAfterStep(), Progress("off")])
left_by_pellucid = any(p.grad is not None for p in learn.model.parameters())
print("cancelled after a step; gradients left on the model:", left_by_pellucid)

# %% [markdown]
# The comparison is over, so now the data may be shuffled, in the library's own loaders, and the
# whole matter is three lines.
#
# How good is the network after one epoch? Ask more than once. With a constant rate of 0.5 the last
# few batches push the weights about, and only the order of the batches decides between 0.90 and
# 0.95. One run tells little. Lesson 4 looks closer, and mends the cause.

# %%
arrays, reached = ((x_train, y_train), (x_valid, y_valid)), []
for seed in range(n_seeds):
    shuffled = pellucid.DataLoaders.from_arrays(*arrays, batch_size, seed=seed)
    learn = pellucid.Learner(begin(make()), shuffled, opt_func=optim.SGD, lr=lr, metrics=[accuracy])
    learn.fit(1, callbacks=[Progress("off")] if seed else [])
    reached.append(learn.record.epochs.last("valid/accuracy"))
print("valid accuracy by seed", [round(value, 4) for value in reached])

# %% [markdown]
# ## What this lesson claims

# %%
for name, (losses, apart) in stages.items():
    print(f"{name:<24}{losses[0]:.10f}  {losses[-1]:.10f}  {apart:.0e}")

n = -(-n_train // batch_size)
assert len(stages) == 17, "a stage is missing"
for name, (losses, apart) in stages.items():
    assert len(losses) == n, f"stage {name} took {len(losses)} batches, not {n}"
    assert apart < 1e-10, f"stage {name} is {apart} away from the first"
same_arithmetic = list(stages)[list(stages).index("4 optim.SGD") : -1]
for name in same_arithmetic:  # then not only the digits are the same, but every bit
    assert torch.equal(stages[name][0], stages["4 optim.SGD"][0]), f"stage {name} differs in bits"
assert gaps["float32"].max() > 1e4 * gaps["float64"].max(), "float32 would have done"
assert abs(weighted - whole) < 1e-12 < abs(means - whole), "weights do not matter here"
assert noticed == {"list": 0, "ModuleList": 4, "Sequential": 4}, noticed
assert left_by_runner and not left_by_pellucid, "who leaves gradients behind?"
assert stopped_after == 10 and again == n, "the handler did not stop once"
assert heard.counts == {"begin_validate": 0, "after_cancel_fit": 1, "after_fit": 1}
middle = tensor(reached).median().item()
assert middle > middling and max(reached) > best, f"one epoch reached only {reached}"
print("All claims hold.")
