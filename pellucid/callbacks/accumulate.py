"""Gradient accumulation: large batches in small pieces."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from .. import tree
from ..errors import SetupError, are_whole
from ..events import Callback, CancelStep
from ..learner import Learner
from ..optim import gradients, takes_one_gradient


class Accumulate(Callback):
    """Step once for every `n` batches, with the gradient of the mean over all of their items.

    It is the gradient of one batch of all these items, whatever the sizes of the pieces. The last
    window of an epoch is shorter where `n` does not divide the number of batches. Schedules see
    where in the run a window begins, so batches of 32 with `Accumulate(4)` train as batches of 128
    do, to rounding; but batch norm has the statistics of the pieces. The losses on record are those
    of the pieces too.

    Args:
        n: batches in a window.
        weigh: what the loss of a batch is the mean over: a function of the learner, called after
            the loss, that returns a number or a 0-d tensor; None for the number of items. For a
            language model that skips padding: `lambda learn: (learn.y != -100).sum()`.

    Raises:
        SetupError: n is not 1 or more; or the optimiser evaluates batches itself (LBFGS).
    """

    changes = True
    decides = "how many batches a step takes"
    order = 10  # before whoever looks at the gradient of a step
    comes_last = ("after_loss",)  # it is the loss as all have left it that backward starts from

    def __init__(self, n: int, weigh: Callable[[Learner], float | Tensor] | None = None):
        if not are_whole(n) or n < 1:
            raise SetupError("Accumulate takes a number of batches, 1 or more.", saw=repr(n))
        self.n, self.weigh = n, weigh
        self._unit: float | Tensor | None = None
        self._held: float | Tensor = 0  # the weight of all batches whose gradients are kept
        self._added: float | Tensor = 0

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Tell the loop how many batches a step takes in this fit."""
        takes_one_gradient(learn.opt, "Accumulate")
        self._unit, self._held, self._added, learn.batches_per_step = None, 0, 0, self.n
        yield

    def after_loss(self, learn: Learner) -> None:
        """Let the gradient have the batch's weight; the loss stays the mean."""
        if learn.training and learn.loss.requires_grad:
            self._held = self._held + self._added  # if another kept the gradients before
            weight = self.weigh(learn) if self.weigh else tree.n_items(learn.x)
            if self._unit is None:  # those of a sum over items would overflow in half precision
                self._unit = weight + (weight == 0)
            self._added = share = weight / self._unit
            learn.loss.register_hook(lambda gradient: (gradient * share).to(gradient.dtype))

    def after_backward(self, learn: Learner) -> None:
        """Keep the gradients, or make them those of the mean over the window."""
        self._held, self._added = self._held + self._added, 0
        in_the_midst = learn.loss is not None and (learn.batch_index + 1) % self.n
        if in_the_midst and learn.batch_index + 1 != learn.n_batches:
            raise CancelStep
        weight = self._held + (self._held == 0)  # a window without weight has no gradient either
        torch._foreach_div_(gradients(learn.opt), weight)
        self._held = 0

    def after_cancel_batch(self, learn: Learner) -> None:
        """Begin anew if the gradients were dropped with the batch."""
        self._added = 0
        if learn.training and not gradients(learn.opt):
            self._held = 0

    def after_train(self, learn: Learner) -> None:
        """Step with what an unfinished window holds, as the loop does."""
        if not gradients(learn.opt):
            return
        with suppress(CancelStep):
            learn.fire("after_backward")
            learn.take_step()
            learn.step += 1
            learn.fire("after_step")
        learn.zero_grad()

    def after_cancel_epoch(self, learn: Learner) -> None:
        """Forget the batch that was left, and with it the window if its gradients are gone."""
        self.after_cancel_batch(learn)
