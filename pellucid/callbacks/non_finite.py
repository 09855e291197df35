"""What to do when the training loss becomes NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import tree
from ..data import Loader
from ..errors import NonFiniteLoss, SetupError
from ..events import Callback, CancelStep
from ..learner import Learner
from ..looks import copies
from ..nonfinite import LOOK, Culprit, culprit, in_parameters, reset_spoilt_statistics
from ..optim import gradients, guard, guards, params_of
from ..sharding import own_part, zero_if_finite
from ..snapshot import preserved_buffers, preserved_random_state

_UNHEARD = {
    "stop": ("before_batch", "after_batch"),
    "skip": ("after_train",),
    "log": (
        *("before_batch", "after_loss", "after_backward", "after_batch", "after_train"),
        *("after_cancel_batch", "after_cancel_epoch"),
    ),
}


class NonFinite(Callback):
    """Stop, skip or go on when a training loss is NaN or infinite. In every fit, "stop" by default.

    "stop" raises `NonFiniteLoss`, which names the batch and what in it was the first that was not
    finite: an item, a parameter, a module or the loss. The loss is read a tenth of a second later
    at most; in the meantime no step is taken: the weights stay those of the step before, and batch
    norm's statistics begin anew where they have become NaN. (On a GPU the device itself decides
    that, nothing is read back. There it needs torch's fused optimisers: SGD, Adam, AdamW, Adagrad,
    which a `Learner` takes where it can. Others step with NaN.) A gradient that is not finite while
    the loss is shows in the next loss; after the last step of an epoch the weights are looked at.

    "skip" takes no step if the loss or a gradient is not finite, and keeps batch norm's statistics
    as they were if it is the loss. "train/skipped" is the number of steps left out. The loss goes
    on record as it was; the epoch's averages leave out the batches whose loss is not finite, while
    metric objects see all. On a GPU, with an optimiser that is not fused, one number is read back
    in every step; with a fused one the device decides alone, and `learn.step` counts skipped steps
    too.

    "log" does nothing: the loss goes on record as it is.

    A batch that a callback cancels does not count, whatever its loss.

    Args:
        action: as said.

    Raises:
        SetupError: there is no such action.
    """

    changes = True
    decides = "what becomes of NaN"
    order = 20  # when the gradient is whole, see Accumulate
    comes_last = ("after_loss", "around_epoch")  # the loss that backward starts from

    def __init__(self, action: str = "stop"):
        if action not in ("stop", "skip", "log"):
            raise SetupError('NonFinite takes "stop", "skip" or "log".', saw=repr(action))
        self.action = action
        for moment in _UNHEARD[action]:
            setattr(self, moment, None)
        self._look = self._look_on_device
        self._spoilt = self._was_spoilt = False
        self._sum = self._sum_before = self._bad = self._n_skipped = torch.zeros(())
        self._looked_at = -1  # the batch that may still be cancelled
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._loss: Tensor | None = None
        self._loader_epoch = 0
        self._weights: list[float] | None = None  # as they were when the epoch was left by an error

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Let the optimiser ask before it steps, for the time of the fit."""
        numbers = torch.zeros(3, dtype=torch.float32, device=learn.device)  # as the optimisers ask
        self._sum, self._sum_before, self._bad = numbers.unbind()
        on_host = _is_host(learn.device)
        self._look = self._look_on_device
        if on_host and self.action == "stop":
            self._look = self._look_on_host
        self._stops, self._reads = on_host or guards(learn.opt), on_host or not guards(learn.opt)
        self._spoilt = False
        self._weights = None
        try:
            with guard(learn.opt, None if self._reads or self.action == "log" else self._bad):
                yield
        except NonFiniteLoss as error:
            if error.batch is not None:
                if self._weights is None:  # the loss was read when the epoch had been left
                    self._explain(learn, error)
                self._say_what_is_left(learn, error)
            raise

    @contextmanager
    def around_epoch(self, learn: Learner) -> Generator[None]:
        """Look for the culprit while the weights are those it met; averages come later."""
        try:
            yield
        except NonFiniteLoss as error:
            if error.batch is not None:
                self._explain(learn, error)
                self._weights = _sums(learn.opt)
            raise

    def before_train(self, learn: Learner) -> None:
        """Tell the tally, and note which pass of the loader this is."""
        learn.tally.non_finite, self._looked_at = self.action, -1
        if self.action == "skip":
            learn.tally.skipped = self._n_skipped = torch.zeros((), device=learn.device)
        self._loader_epoch = getattr(learn.data.train, "epoch", 0)

    def before_batch(self, learn: Learner) -> None:
        """Keep what the forward pass changes by itself."""
        if learn.training:
            buffers = [b for b in learn.model.buffers() if b is not None]
            self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
            self._loss = None

    def after_loss(self, learn: Learner) -> None:
        """Look at the loss, where it is."""
        if learn.training and isinstance(learn.loss, Tensor) and learn.loss.numel() == 1:
            self._looked_at = learn.batch_index
            loss = learn.loss.detach()
            self._loss = loss.reshape(()) if loss.ndim else loss
            self._look(self._loss)  # backward refuses another

    def after_backward(self, learn: Learner) -> None:
        """Take no step; look at the gradients too, if the fit is to go on."""
        if self.action == "stop":
            if self._spoilt:
                raise CancelStep
            return
        self._sum.add_(zero_if_finite(gradients(learn.opt), learn.device))
        torch.ne(self._sum, 0, out=self._bad)
        self._sum.zero_()
        self._looked_at = -1
        self._n_skipped.add_(self._bad)
        if self._reads and _read(self._bad):
            learn.zero_grad()
            raise CancelStep

    def after_cancel_batch(self, learn: Learner) -> None:
        """Forget the batch: it is not on record, so nobody would learn why no step is taken."""
        if learn.training and self._looked_at == learn.batch_index:
            self._spoilt, self._looked_at = self._was_spoilt, -1
            self._sum, self._sum_before = self._sum_before, self._sum
            torch.ne(self._sum, 0, out=self._bad)

    def after_cancel_epoch(self, learn: Learner) -> None:
        """Forget the batch in which the pass was left; if it was over, it is on record."""
        self.after_cancel_batch(learn)
        self._put_back()

    def after_batch(self, learn: Learner) -> None:
        """Put back what the forward pass changed, if its loss was not finite."""
        if learn.training:  # a look from within the batch is not its end
            self._put_back()

    def _put_back(self) -> None:
        finite = None if self._loss is None else self._loss.isfinite()
        for buffer, before in self._buffers:
            # of a batch that was cancelled before its loss was looked at, each buffer tells
            good = buffer.isfinite().all() if finite is None else finite
            buffer.copy_(torch.where(good, buffer, before))
        self._buffers, self._loss = [], None

    def after_train(self, learn: Learner) -> None:
        """Look at the weights: what the last step has spoilt shows in no loss of this pass."""
        weights = [param.detach() for param in params_of(learn.opt)]
        if math.isnan(_read(zero_if_finite(weights, learn.device))):
            found = in_parameters(learn.model)
            error = NonFiniteLoss(
                f"The weights became NaN or infinite in the last step of epoch {learn.epoch} "
                "(counted from 0), by a gradient that was not finite.",
                saw=found.what if found else "in another process",
                do=f"{found.do if found else LOOK} The weights are spoilt: begin again with a new "
                "model or saved weights.",
            )
            error.batch = None
            raise error

    def _look_on_host(self, loss: Tensor) -> None:
        loss = loss.float() if loss.dtype == torch.bfloat16 else loss  # numpy has no such numbers
        self._was_spoilt = self._spoilt
        self._spoilt = self._spoilt or not math.isfinite(loss.numpy())  # nothing is copied

    def _look_on_device(self, loss: Tensor) -> None:
        # from one that is not finite on it is NaN
        torch.add(self._sum, loss, alpha=0, out=self._sum_before)
        self._sum, self._sum_before = self._sum_before, self._sum
        torch.ne(self._sum, 0, out=self._bad)

    def _explain(self, learn: Learner, error: NonFiniteLoss) -> None:
        """Go through the batch again and add to the error what was bad first."""
        what, saw, _ = error.args
        try:
            found = self._culprit(learn, int(error.batch or 0))
            if found:
                error.args = (what, f"{saw}; {found.what}", found.do)
        except Exception as failure:  # this is help, and must not hide the error
            error.add_note(f"Looking for the culprit failed: {type(failure).__name__}: {failure}")

    def _say_what_is_left(self, learn: Learner, error: NonFiniteLoss) -> None:
        """Mend batch norm's statistics, and add to the error what the model holds now."""
        what, saw, do = error.args
        if not self._stops:
            do += " The weights may be spoilt: begin again with a new model or saved weights."
        elif self._weights is None:
            do += " No step was taken since."
        elif np.array_equal(self._weights, _sums(learn.opt), equal_nan=True):
            do += " No step was taken since: the weights are those before that batch."
        else:
            do += " No step was taken since; a callback has put the weights in that it ends with."
        norms = reset_spoilt_statistics(learn.model) if isinstance(learn.model, nn.Module) else []
        if norms:
            do += f" Statistics that were not finite begin anew, in {', '.join(map(repr, norms))}."
        error.args = (what, saw, do)

    def _culprit(self, learn: Learner, number: int) -> Culprit | None:
        batch, items = self._batch(learn, number)
        if batch is None:
            return None
        x, y = tree.split(batch, learn.data.n_inputs)
        x, y = tree.to_device(x, learn.device), tree.to_device(y, learn.device)
        learn.model.train()
        with ExitStack() as stack:
            stack.enter_context(preserved_buffers(learn.model))
            stack.enter_context(preserved_random_state())
            stack.enter_context(learn.around("around_forward"))
            stack.callback(setattr, learn, "loss_func", learn.loss_func)
            learn.x, learn.y = learn.data.prepare(x, True), y
            model = learn.model if self._stops else None  # else long since spoilt itself
            return culprit(model, learn.x, y, self._forward_of(learn), _loss_of(learn), items)

    def _forward_of(self, learn: Learner) -> Callable[[], Any]:
        """Return a forward pass of the batch as those make it who act before, a GAN's turn too."""
        hearers = [callback for callback, _ in learn.handlers["before_batch"]]
        makers = [c for c in hearers if c.changes and c.order < self.order]

        def forward() -> Any:
            for maker in copies(learn, makers):
                maker.before_batch(learn)  # ty: ignore[missing-attribute]
            return learn.forward()

        return forward

    def _batch(self, learn: Learner, number: int) -> tuple[Any, list[int] | None]:
        """Return a batch of the pass again and its items' numbers; None if nobody can tell."""
        loader = learn.data.train
        if isinstance(loader, Loader):
            batch = next(loader.batches(self._loader_epoch, number))
            return batch, loader.drawn.items.tolist() if loader.drawn else None
        return (loader[number], None) if isinstance(loader, Sequence) else (None, None)


def _sums(opt: Optimizer) -> list[float]:
    """Return what tells whether weights are the same still."""
    return [float(own_part(param.detach()).double().sum()) for param in params_of(opt)]


def _read(number: Tensor) -> float:
    """Return a 0-d number; of the host it is there."""
    return float(number.numpy()) if number.device.type == "cpu" else number.item()


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"  # looking there waits for nothing


def _loss_of(learn: Learner) -> Any:
    def loss(preds: Any) -> Tensor:
        learn.preds = preds
        return learn.compute_loss()

    return loss
