# %% [markdown]
# # 3 · Callbacks, in every form
#
# A callback is a piece of your code that somebody else's code calls. That is all. A button calls
# one when it is pressed, a sort calls one to compare, and a training loop calls one after every
# batch. What differs is the *form*: what you hand over, what it is told, and what it may change.
#
# We go through the forms with a calculation that takes long and knows nothing, then meet the trap
# that many training libraries have set for themselves, and end with the form that pellucid chose.

# %%
import copy
import os
import traceback
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.optim import SGD

from pellucid import Callback, CancelBatch, CancelEpoch, CancelFit, CancelStep, Learner
from pellucid.callbacks import Debug, OneCycle, Progress
from pellucid.data import digits
from pellucid.metrics import accuracy

QUICK = os.environ.get("LESSONS") == "quick"
n_epochs = 1 if QUICK else 3  # this lesson is short in either form
torch.manual_seed(0)


def calculate(callback=None):
    """Add up squares, slowly, and say so after each."""
    result = 0
    for epoch in range(5):
        result += epoch**2  # imagine that this takes an hour
        if callback is not None:
            callback(epoch)
    return result


said = []


def say(words):
    said.append(words)
    print(words)


print("without a callback:", calculate())

# %% [markdown]
# ## Anything that can be called
#
# A **function** by name; note that there are no parentheses, we hand over the function, not its
# answer. A **lambda**, if it is used only here. A **closure**: a function made by a function, which
# remembers what it was made with. `functools.partial` does the same to any function there is.


# %%
def report(epoch):
    say(f"function: epoch {epoch} is done")


def reporter(praise):
    def report(epoch):
        say(f"{praise}: epoch {epoch} is done")

    return report  # it keeps `praise` as long as it lives


def report_with(praise, epoch):
    say(f"{praise}: epoch {epoch} is done")


results = [
    calculate(report),
    calculate(lambda epoch: say(f"lambda: epoch {epoch} is done")),
    calculate(reporter("closure")),
    calculate(partial(report_with, "partial")),
]
print(results)

# %% [markdown]
# And an **object**, if its class has a method `__call__`. An object can do what a function finds
# hard: keep something between two calls, and be asked about it later.


# %%
class Reporter:
    def __init__(self, praise):
        self.praise, self.n_calls = praise, 0

    def __call__(self, epoch):
        self.n_calls += 1
        say(f"{self.praise}: epoch {epoch} is done")


reporting = Reporter("object")
results.append(calculate(reporting))
print("it was called", reporting.n_calls, "times")

# %% [markdown]
# ## More than one moment
#
# Before *and* after? Then one callable is not enough, but an object may have several methods. Which
# of them a callback has is its own affair: `getattr(callback, name, None)` asks politely.
#
# What is it told? If the calculation later wants to tell more, every old callback breaks, unless it
# says beforehand that it will swallow what it does not know: `**_`. That is right for *keywords*,
# since a name says what is meant. It would be wrong for positions: `*_` lets through a call that is
# simply mistaken.


# %%
def calculate_and_tell(callback=None):
    def tell(moment, **news):
        method = getattr(callback, moment, None)
        if method is not None:
            method(**news)

    result = 0
    for epoch in range(5):
        tell("before_square", epoch=epoch)
        result += epoch**2
        tell("after_square", epoch=epoch, result=result)  # `result` is news since version 2
    return result


class Status:
    def __init__(self):
        self.results = []

    def after_square(self, epoch, result, **_):
        self.results.append(result)


class Old:
    """Written for version 1, without foresight."""

    def after_square(self, epoch):
        pass


class Older:
    """Likewise, but with foresight."""

    def after_square(self, epoch, **_):
        pass


status = Status()
results.append(calculate_and_tell(status))
results.append(calculate_and_tell(Older()))
print("told:", status.results)
try:
    calculate_and_tell(Old())
except TypeError as error:
    refused = str(error)
    print("TypeError:", refused)

# %% [markdown]
# ## Talking back
#
# A callback that sees that all is lost wants to stop the calculation. It can *answer*: true for
# "stop". Simple, and treacherous: a method without `return` answers `None`, which is false. Were it
# the other way round, "true for go on", every forgotten `return True` would stop the run.


# %%
def calculate_until_told(callback):
    result = 0
    for epoch in range(5):
        result += epoch**2
        print(f"after {epoch}: {result}")
        if callback(epoch, result):
            print("stopping early")
            break
    return result


stopped_by_answer = calculate_until_told(lambda epoch, result: result > 10)

# %% [markdown]
# Or it can *raise*. An answer reaches only the caller, who must pass it on, who must pass it on. An
# exception leaves as many functions as it likes, and each can tidy up in a `finally`.


# %%
class Enough(Exception): ...


def calculate_deeply(callback):
    result = 0

    def square(epoch):  # in a real loop: fit, epoch, batch
        nonlocal result
        result += epoch**2
        callback(epoch, result)

    try:
        for epoch in range(5):
            square(epoch)
    except Enough:
        print("stopping early")
    finally:
        print("tidied up")
    return result


def stop_above_ten(epoch, result):
    if result > 10:
        raise Enough


stopped_by_exception = calculate_deeply(stop_above_ten)

# %% [markdown]
# ## Changing things
#
# Numbers are copied when they are handed over; a callback that gets `result` cannot change the
# result. So hand over the one who *owns* it. Then a callback may read all and change all, and it is
# no longer the loop that decides what a callback can do.


# %%
class Calculator:
    def __init__(self, callback):
        self.callback, self.result, self.stop = callback, 0, False

    def run(self):
        self.seen = []
        for self.epoch in range(5):
            self.result += self.epoch**2
            self.callback.after_square(self)
            self.seen.append(self.result)
            if self.stop:
                break
        return self.result


class AddOneThenStop:
    def after_square(self, calculator):
        if calculator.epoch == 2:
            calculator.result += 1
        calculator.stop = calculator.result > 10


calculator = Calculator(AddOneThenStop())
calculator.run()
print("results on the way:", calculator.seen)

# %% [markdown]
# ## Methods with two underscores
#
# Python has moments of its own and calls *your* methods at them. `__call__` was one. A container of
# callbacks shows a few more, each a callback in disguise: `len(x)` calls `__len__`, `x[0]` calls
# `__getitem__` (and so does a loop, if there is no `__iter__`), `x + y` calls `__add__`, the prompt
# calls `__repr__`, `print` calls `__str__`, and `with` calls `__enter__` and, however the block is
# left, `__exit__`.


# %%
class Shelf:
    """Callbacks in a row."""

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks)

    def __len__(self):
        return len(self.callbacks)

    def __getitem__(self, i):
        return self.callbacks[i]

    def __add__(self, other):
        return Shelf(*self, *other)

    def __call__(self, *args):
        for callback in self:
            callback(*args)

    def __repr__(self):
        return f"Shelf({', '.join(type(callback).__name__ for callback in self)})"

    def __str__(self):
        return f"a shelf of {len(self)}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.callbacks.clear()


with Shelf(Reporter("first")) + Shelf(Reporter("second")) as shelf:
    print(shelf, repr(shelf))
    shelf(0)
print("after the block:", shelf)

# %% [markdown]
# There is also `__del__`, called when an object dies. Do not tidy up there: an object dies when the
# last name for it is gone, which in a notebook may be never. `with` says when.
#
# ## The trap: attributes that are found elsewhere
#
# `__getattr__` is called for a name that is *not* found. The runner of lesson 2 used it so that
# callbacks could write `self.model` for `self.run.model`. It reads well. Now watch what happens
# when a callback *writes*.


# %%
class Runner:
    def __init__(self, lr):
        self.lr = lr


class Delegating:
    def __init__(self, run):
        self.run = run

    def __getattr__(self, name):
        return getattr(self.run, name)

    def __dir__(self):
        return [*super().__dir__(), *vars(self.run)]  # so that the Tab key shows them


class Halve(Delegating):
    def after_batch(self):
        self.lr = self.lr / 2


runner = Runner(lr=1.0)
halve = Halve(runner)
for _ in range(3):
    halve.after_batch()
print("the callback believes", halve.lr, "and the runner has", runner.lr)
print("the Tab key shows lr:", "lr" in dir(halve))

# %% [markdown]
# Reading goes to the runner, writing stays on the callback, and from then on reading finds the
# callback's own. No error, no warning, and a learning rate that never falls. One can remember to
# write `self.run.lr`; one cannot remember it for ever.
#
# It has a second tooth. A copy (or a pickle) is made without `__init__`, so it has no `run` yet;
# looking for `run` calls `__getattr__`, which looks for `run` …

# %%
try:
    copy.copy(halve)
    recursion = None
except RecursionError as error:
    recursion = error
    print("RecursionError:", error)

# %% [markdown]
# ## pellucid's form
#
# So here is what we chose, and why.
#
# | question | answer | reason |
# |---|---|---|
# | which form? | a class with methods named after moments | it keeps state, hears several moments |
# | what is it told? | always `learn`, who owns it all | nothing new breaks an old callback |
# | how does it read and write? | `learn.x`, in full | the trap above |
# | how does it talk back? | it assigns, or raises a `Cancel…` | an answer is forgotten too easily |
# | what if a name is misspelt? | the class is refused | never to be called is worse than an error |
#
# A first one, which only counts:


# %%
class CountBatches(Callback):
    def before_fit(self, learn):
        self.train = self.valid = 0

    def after_batch(self, learn):
        if learn.training:
            self.train += 1
        else:
            self.valid += 1


def learner(*callbacks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    metrics = [accuracy]
    return Learner(model, digits(), opt_func=SGD, lr=0.1, metrics=metrics, callbacks=callbacks)


count = CountBatches()
learn = learner(count)
learn.fit(n_epochs)
print(f"{count.train} training batches, {count.valid} validation batches")

# %% [markdown]
# The timetable says which moments there are. `show_loop` prints it with everybody in place.

# %%
learn.show_loop([OneCycle(0.1)])

# %% [markdown]
# What is refused, and what it says:


# %%
def refusal(what):
    """Return how an attempt fails."""
    try:
        what()
    except Exception as error:
        print("".join(traceback.format_exception_only(error)))
        return str(error)
    return ""


def misspelt():
    class Clip(Callback):
        def after_backwards(self, learn): ...


def from_elsewhere():
    class Log(Callback):
        def on_epoch_end(self, learn): ...


def hears_nothing():
    class Idle(Callback):
        def act(self, learn): ...

    learner(Idle()).fit(1)


def answers():
    class Stop(Callback):
        def after_batch(self, learn):
            return True

    learner(Stop(), Progress("off")).fit(1)


refusals = [refusal(what) for what in (misspelt, from_elsewhere, hears_nothing, answers)]

# %% [markdown]
# ### To change is to assign
#
# `changes = True` says that a callback means to bend the course; one that does not say so is a
# watcher, and a look such as `learn.validate()` leaves it out. Here is a regulariser in three
# lines: noise on the inputs. `trace` shows that it did what it says, and who else did what.


# %%
class Noise(Callback):
    changes = True

    def before_batch(self, learn):
        if learn.training:
            learn.x = learn.x + 0.1 * torch.randn_like(learn.x)


learn = learner(Noise())
print(learn.trace(1))

# %% [markdown]
# ### Order
#
# Callbacks act in ascending `order`, and in the order given among equals.


# %%
class Note(Callback):
    def __init__(self, name, order):
        self.name, self.order = name, order

    def before_fit(self, learn):
        noted.append(self.name)


noted = []
learner(Note("late", 5), Note("early", -5), Note("first", 0), Note("second", 0)).fit(
    0, callbacks=[Progress("off")]
)
print(noted)

# %% [markdown]
# ### Spans
#
# What is opened must be closed. Two moments, one to open and one to close, are a bad pair: if
# something is raised between, the second never comes. A **span** is one method around a stretch of
# the loop. It holds a `yield`, usually inside a `with`, and is left in whatever way the stretch is.
# Here a forward hook (lesson 6 is about those) is put on for the time of the fit, which ends badly.


# %%
@contextmanager
def shapes_noted(module, shapes):
    handle = module.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    try:
        yield
    finally:
        handle.remove()


class Shapes(Callback):
    def around_fit(self, learn):
        self.shapes = []
        with shapes_noted(learn.model[1], self.shapes):
            yield


class Accident(Callback):
    def after_step(self, learn):
        raise KeyError("somebody's bug")


shapes = Shapes()
learn = learner(shapes, Accident(), Progress("off"))
accident = refusal(lambda: learn.fit(1))
print("seen:", shapes.shapes, " hooks left on the model:", len(learn.model[1]._forward_hooks))

# %% [markdown]
# ### Ways out
#
# Four exceptions, from the smallest stretch to the largest: `CancelStep` keeps the gradients and
# skips the step (so that several batches add up), `CancelBatch` leaves a batch, of which nothing
# remains, `CancelEpoch` leaves the pass, and `CancelFit` the fit. Each in batch 3 of two epochs:


# %%
class At3(Callback):
    changes = True

    def __init__(self, cancel):
        self.cancel = cancel

    def after_backward(self, learn):
        if learn.batch_index == 3:
            raise self.cancel


class Hears(Callback):
    def __init__(self):
        self.heard = dict.fromkeys(["after_step", "after_batch", "after_validate", "after_fit"], 0)

    def after_step(self, learn):
        self.heard["after_step"] += 1

    def after_batch(self, learn):
        self.heard["after_batch"] += learn.training

    def after_validate(self, learn):
        self.heard["after_validate"] += 1

    def after_fit(self, learn):
        self.heard["after_fit"] += 1


heard = {}
for cancel in (None, CancelStep, CancelBatch, CancelEpoch, CancelFit):
    hears = Hears()
    learn = learner(hears, Progress("off"), *([At3(cancel)] if cancel else []))
    learn.fit(2)
    name = cancel.__name__ if cancel else "nothing"
    heard[name] = (*hears.heard.values(), len(learn.record.batches))

print(f"{'raised':<12}", *(f"{name:>14}" for name in hears.heard), f"{'on record':>14}")
for name, counts in heard.items():
    print(f"{name:<12}", *(f"{count:>14}" for count in counts))

# %% [markdown]
# ### And a plain function?
#
# It still has its place, for a look at one moment: `Debug` calls it (or, without one, the
# debugger).

# %%
seen = []
learn = learner(Debug("after_epoch", lambda learn: seen.append(learn.epoch)), Progress("off"))
learn.fit(3)
print("epochs seen by a lambda:", seen)

# %% [markdown]
# ## What this lesson claims

# %%
assert set(results) == {30}, f"no callback may change the sum: {results}"
assert len(said) == 5 * 5 + 2 and said[5 * 3] == "partial: epoch 0 is done", said
assert status.results == [0, 1, 5, 14, 30] and "unexpected keyword" in refused
assert stopped_by_answer == stopped_by_exception == 14, "both should stop at 14"
assert calculator.seen == [0, 1, 6, 15] and calculator.result == 15, calculator.seen
assert len(shelf) == 0, "the shelf was not tidied up"
assert halve.lr == 0.125 and runner.lr == 1.0, "the trap did not snap"
assert recursion is not None, "copying a delegating callback went well"
assert count.train == n_epochs * 23 and count.valid == n_epochs * 3, vars(count)
assert "'after_backward'" in refusals[0] and "'after_epoch'" in refusals[1], refusals
assert "hears no moment" in refusals[2] and "no effect" in refusals[3], refusals
assert noted == ["early", "first", "second", "late"], noted
assert "somebody's bug" in accident and shapes.shapes == [(64, 30)], shapes.shapes
assert not learn.model[1]._forward_hooks, "a hook was left"
assert heard == {
    "nothing": (46, 46, 2, 1, 46),
    "CancelStep": (44, 46, 2, 1, 46),
    "CancelBatch": (44, 46, 2, 1, 44),
    "CancelEpoch": (6, 6, 2, 1, 6),
    "CancelFit": (3, 3, 0, 1, 3),
}, heard
assert seen == [0, 1, 2], seen
print("All claims hold.")
