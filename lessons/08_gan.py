# %% [markdown]
# # 8 · A GAN, with callbacks alone
#
# Here is the test of a training loop that claims to be open: train something that it was not
# written for. A generative adversarial network has *two* networks and *two* optimisers, each batch
# belongs to one of them, what the batch is depends on whose turn it is, and there is no target in
# the data at all. (Goodfellow and others, 2014; in the form of Arjovsky and others, "Wasserstein
# GAN", 2017.)
#
# We shall not subclass the Learner, and we shall not replace any of its parts. Four callbacks.

# %%
# %matplotlib inline
import copy
import os
from itertools import cycle, islice

import torch
from torch import nn
from torch.optim import RMSprop

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import OneCycle, Progress
from pellucid.data import digits
from pellucid.metrics import accuracy
from pellucid.plots import figure, plot_images, smooth

QUICK = os.environ.get("LESSONS") == "quick"
n_epochs, look_every = (110, 10) if QUICK else (840, 20)  # of 23 batches
close, narrow = (60, 0.95) if QUICK else (8, 0.4)  # what is to be reached
torch.manual_seed(0)

images = digits().train.dataset.arrays[0] / 8 - 1  # 8×8 pixels from -1 to 1
data = DataLoaders.from_arrays((images,), batch_size=64)  # inputs alone, no targets
print(data)

# %% [markdown]
# ## Two players, one module
#
# The **generator** makes an image of sixteen random numbers. The **critic** gives an image a score.
# The critic wants real images to score high and made ones low; the generator wants the images it
# makes to score high. One learns to find the difference, the other to leave none.
#
# For the Learner both are one model. What goes through it depends on whose turn it is: the critic
# is shown images, the generator is given noise, and its image goes on through the critic.

# %%
n_noise = 16


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(n_noise, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128),
            nn.LeakyReLU(0.2), nn.Linear(128, 1), nn.Flatten(0),
        )  # fmt: skip
        self.turn = "critic"

    def forward(self, x):
        return self.critic(x if self.turn == "critic" else self.generator(x))


def wasserstein(scores, wish):
    """Low if the scores are high where the wish is 1 and low where it is -1."""
    return -(scores * wish).mean()


# %% [markdown]
# ## The callback
#
# Three things are decided before each batch, by assigning them to `learn`; the loop uses what it
# finds.
#
# - **What is the batch?** For the critic, the real images and as many made ones, with the wishes 1
#   and -1. For the generator noise, with the wish 1.
# - **Who is trainable?** One half is frozen. Its gradients are not even computed.
# - **Which optimiser steps?** The one of the half whose turn it is.
#
# A span, `around_fit`, puts everything back afterwards.


# %%
class TakeTurns(Callback):
    order = -20  # before all who look at the batch
    changes = True

    def __init__(self, n_critic=5):
        self.n_critic, self.opts = n_critic, {}

    def around_fit(self, learn):
        gan, own = learn.model, learn.opt
        self.turns = cycle(["critic"] * self.n_critic + ["generator"])
        for turn in ("critic", "generator"):
            if turn not in self.opts:  # optimisers live across fits
                self.opts[turn] = learn.opt_func(getattr(gan, turn).parameters(), lr=learn.lr)
        try:
            yield
        finally:
            gan.requires_grad_(True)
            learn.opt = own

    def before_batch(self, learn):
        gan = learn.model
        gan.turn = next(self.turns)
        gan.requires_grad_(False)
        getattr(gan, gan.turn).requires_grad_(True)
        learn.opt = self.opts[gan.turn]

        noise = torch.randn(len(learn.x), n_noise, device=learn.device)
        if gan.turn == "critic":
            with torch.no_grad():
                made = gan.generator(noise)
            ones = noise.new_ones(len(noise))
            learn.x, learn.y = torch.cat([learn.x, made]), torch.cat([ones, -ones])
        else:
            learn.x, learn.y = noise, noise.new_ones(len(noise))


# %% [markdown]
# If the critic may be as steep as it likes, it can score without end. The paper keeps it flat in
# the bluntest way there is: after its step, cut all its weights off at ±0.01. Another callback.


# %%
class ClipCritic(Callback):
    changes = True

    def __init__(self, limit=0.01):
        self.limit = limit

    @torch.no_grad()
    def after_step(self, learn):
        if learn.model.turn == "critic":
            for p in learn.model.critic.parameters():
                p.clamp_(-self.limit, self.limit)


# %% [markdown]
# ## Six batches, watched
#
# Does a critic's step leave the generator alone, bit for bit? A third callback compares.


# %%
class Watch(Callback):
    def __init__(self):
        self.rows = []

    def before_batch(self, learn):
        self.before = copy.deepcopy(learn.model)

    def after_step(self, learn):
        moved = {}
        for part in ("generator", "critic"):
            old, new = getattr(self.before, part), getattr(learn.model, part)
            pairs = zip(old.parameters(), new.parameters(), strict=True)
            moved[part] = not all(torch.equal(a, b) for a, b in pairs)
        self.rows.append((learn.model.turn, moved["generator"], moved["critic"]))


def learner(batches, *callbacks):
    torch.manual_seed(1)
    callbacks = [TakeTurns(), ClipCritic(), Progress("off"), *callbacks]
    return Learner(Gan(), batches, wasserstein, RMSprop, lr=5e-4, callbacks=callbacks)


six = [(batch,) for (batch,) in islice(data.train, 6)]
watch = Watch()
learn = learner((six, None), watch)
learn.fit(1)
print(f"{'turn':<12}{'generator moved':<18}critic moved")
for turn, generator, critic in watch.rows:
    print(f"{turn:<12}{generator!s:<18}{critic}")

# %% [markdown]
# Five to one, and the half that waits does not move. The loop is the one that classifies digits:

# %%
learn.show_loop()

# %% [markdown]
# Is it also the *right* GAN? Here is the loop that one would write by hand. Its weights are those
# of `fit`, bit for bit.

# %%
torch.manual_seed(1)
gan = Gan()
opts = {turn: RMSprop(getattr(gan, turn).parameters(), lr=5e-4) for turn in ("critic", "generator")}
for i, (real,) in enumerate(six):
    noise, ones = torch.randn(len(real), n_noise), torch.ones(len(real))
    if i < 5:
        made = gan.generator(noise).detach()
        scores = gan.critic(torch.cat([real, made]))
        wasserstein(scores, torch.cat([ones, -ones])).backward()
        opts["critic"].step()
        with torch.no_grad():
            for p in gan.critic.parameters():
                p.clamp_(-0.01, 0.01)
    else:
        wasserstein(gan.critic(gan.generator(noise)), ones).backward()
        opts["generator"].step()
    gan.zero_grad()

pairs = zip(gan.parameters(), learn.model.parameters(), strict=True)
same_as_by_hand = all(torch.equal(a, b) for a, b in pairs)
print("the same weights as by hand:", same_as_by_hand)

# %% [markdown]
# ## How good is a sample?
#
# The critic's loss says how well *this* critic can tell them apart, and the critic changes as it
# goes. So let an outsider judge. We train a small network to read digits, and look at what it sees
# (its last layer but one) in real images and in made ones. If both clouds of points have the same
# mean and the same covariance, they are hard to tell apart. The **Fréchet distance** measures that:
# $|\mu_1-\mu_2|^2 + \mathrm{tr}(C_1 + C_2 - 2\sqrt{C_1 C_2})$. It is 0 for equal clouds.

# %%
torch.manual_seed(0)
expert = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
)
labelled = digits()
labelled.transforms = [lambda x: x / 8 - 1]  # as the GAN has them
record = Learner(expert, labelled, metrics=[accuracy]).fit(
    15, callbacks=[OneCycle(0.01), Progress("off")]
)
print(f"the expert reads {record.epochs.last('valid/accuracy'):.1%} of digits it has never seen")


@torch.no_grad()
def frechet(one, other):
    first, second = (expert[:-1](x).double() for x in (one, other))
    c1, c2 = first.T.cov(), second.T.cov()
    root = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    return (
        (first.mean(0) - second.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    ).item()


unseen = labelled.valid.dataset.arrays[0] / 8 - 1
between_real = frechet(images, unseen)
print(f"between real digits and other real digits: {between_real:.1f}")

# %% [markdown]
# ## Training
#
# The fourth callback only watches: now and then it measures samples made of always the same noise.
# An epoch is 23 batches here, so there are many of them.


# %%
class Measure(Callback):
    def __init__(self, every):
        self.every = every
        self.noise = torch.randn(1000, n_noise, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def samples(self, learn):
        return learn.model.generator(self.noise.to(learn.device)).cpu()

    def before_fit(self, learn):
        self.first = self.samples(learn)
        self.steps, self.distances = [0], [frechet(images, self.first)]

    def after_epoch(self, learn):
        if (learn.epoch + 1) % self.every == 0:
            self.steps.append(learn.step)
            self.distances.append(frechet(images, self.samples(learn)))


measure = Measure(look_every)
learn = learner(data, measure)
record = learn.fit(n_epochs)
last = measure.samples(learn)
print(f"Fréchet distance: {measure.distances[0]:.0f} before, {measure.distances[-1]:.1f} after "
      f"{learn.step:,} batches; real digits among themselves {between_real:.1f}")  # fmt: skip

# %%
rows = [measure.first[:12], last[:36], images[torch.randperm(len(images))[:12]]]
titles = ["before"] + [""] * 11 + ["after"] + [""] * 35 + ["real"] + [""] * 11
drawing = plot_images((torch.cat(rows).numpy() + 1) / 2, titles, columns=12)
drawing

# %% [markdown]
# And the critic's view. Half the gap between the scores of real and made images is what its loss
# reports: an estimate of how far apart they are. It rises while the critic learns to see, and falls
# when the generator catches up. (The first hundred steps are left out: a critic whose weights have
# just been cut off for the first time has nothing to say.)

# %%
turns = ["critic"] * 5 + ["generator"]
is_critic = torch.tensor([turns[i % 6] == "critic" for i in range(len(record.batches))]).numpy()
gap = smooth(-2 * record["train/loss"][is_critic][100:], 0.99)
drawing, [left, right] = figure(2, width=4.6)
left.plot(range(100, 100 + len(gap)), gap, color="#2166ac", linewidth=1.2)
left.set(title="gap between real and made, smoothed", xlabel="step of the critic", ylim=(0, None))
right.plot(measure.steps, measure.distances, "o-", markersize=3, color="#d6604d", label="made")
right.axhline(between_real, color="#8c8c8c", linestyle="--", label="other real digits")
right.set(title="Fréchet distance to real digits", xlabel="batch", yscale="log")
right.legend(frameon=False)
for axes in (left, right):
    axes.locator_params(axis="x", nbins=5)
drawing

# %% [markdown]
# Does it make all ten digits? A generator that has found one image which fools the critic may make
# no other. The expert sorts a thousand samples.

# %%
with torch.no_grad():
    kinds = expert(last).argmax(1).bincount(minlength=10)
print("digit    ", *(f"{digit:>4}" for digit in range(10)))
print("samples  ", *(f"{count:>4}" for count in kinds.tolist()))

# %% [markdown]
# To go on: let the switch depend on the losses instead of counting to five. Put a penalty on the
# critic's gradient in the place of the clipping (`after_loss` may assign `learn.loss`). Exchange
# the two halves for convolutions and the digits for MNIST. Nothing of that needs another loop.
#
# ## What this lesson claims

# %%
assert type(learn) is Learner, "this should be the ordinary Learner"
parts = ("fit", "one_pass", "forward", "compute_loss", "backward", "take_step", "zero_grad")
assert not set(parts) & set(vars(learn)), "a part of the loop was replaced"
assert watch.rows == [("critic", False, True)] * 5 + [("generator", True, False)], watch.rows
assert same_as_by_hand, "fit and the loop by hand differ"
assert all(p.requires_grad for p in learn.model.parameters()), "a half was left frozen"
assert max(p.abs().max().item() for p in learn.model.critic.parameters()) <= 0.01 + 1e-7
assert learn.step == len(record.batches) == 23 * n_epochs
assert is_critic.sum() == learn.step - learn.step // 6, (
    "not five critic steps for one of the generator"
)
before, after = measure.distances[0], measure.distances[-1]
assert before > 200 > close > after, f"Fréchet distance {before:.0f} before, {after:.0f} after"
peak, end = gap.max(), gap[-1]
assert end < narrow * peak, f"the generator does not catch up: gap {peak:.4f}, at the end {end:.4f}"
assert (kinds > 0).all(), f"some digits are never made: {kinds.tolist()}"
print("All claims hold.")
