"""The Learner: a model, data, a loss and an optimiser, and the loop that trains them.

The loop is `fit` and `one_pass`, after the timetable in `events.py`. Everything else about how a
run is done is a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer

from . import foundations, tree, weights
from .binding import Around, answered, bind, with_defaults
from .data import DataLoaders, check_length, length
from .device import choose_device
from .errors import SetupError
from .events import Callback, CancelBatch, CancelEpoch, CancelFit, CancelStep, in_order
from .looks import predict, untouched, validate
from .losses import ready_loss
from .metrics import named
from .optim import build_optimizer, check_trains, checked_lr, hyper_names, hyper_values
from .record import Record
from .slips import located
from .tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .callbacks.find_lr import LRSearch
    from .callbacks.trace import Trace
    from .outline import Summary

_NOTHING = nullcontext()


class Learner:
    """Train a model.

    Args:
        model: any module; moved to the device.
        data: `DataLoaders`, or a pair (train, valid) of any iterables of batches.
        loss_func: `(preds, *targets) -> 0-d tensor`, a mean over the batch; by default the data's.
        opt_func: `(params, lr=...) -> Optimizer`: a class of torch's, a partial of one, or a
            function that makes parameter groups. See `optim.build_optimizer`.
        lr: learning rate, where a fit does not say otherwise.
        metrics: functions `(preds, targets) -> mean`, or objects; see `metrics`.
        callbacks: serve every fit of this learner.
        device: "auto", or as torch names it.

    Attributes:
        opt: the optimiser; made at the first fit, lives across fits.
        record: what happened in all fits so far.
        epoch, n_epochs, batch_index, n_batches: where in this fit, counted from 0; n_batches is
            None if the loader does not say.
        step, n_batches_seen, n_items_seen: optimiser steps taken, and training batches and items
            that went into the record, over all fits.
        batches_per_step: 1, unless `callbacks.Accumulate` is at work.
        progress: training batches finished over all of this fit's, 0 in the first batch; in steps
            of `batches_per_step`.
        training: whether this is a training pass.
        x, y, preds, loss: the batch, the model's output and the loss, on the device; None between
            batches. A callback may assign them, the loop uses what it finds.
        tally: the numbers of this pass.
        recorded: names of the hyper-parameters that go on record.
        handlers, spans: who hears what, while a fit runs.
    """

    x: Any
    y: Any
    preds: Any
    loss: Any
    batches_per_step: int

    def __init__(
        self,
        model: nn.Module,
        data: DataLoaders | tuple[Iterable[Any], Iterable[Any] | None],
        loss_func: Callable[..., Tensor] | None = None,
        opt_func: Callable[..., Optimizer] = AdamW,
        lr: float = 1e-3,
        metrics: Iterable[Any] = (),
        callbacks: Iterable[Callback] = (),
        device: str | torch.device = "auto",
    ):
        if not isinstance(model, nn.Module | foundations.Module):
            raise SetupError("The model must be a torch module.", saw=repr(model))
        self.device, self.device_reason = choose_device(device)
        self.model = model.to(self.device)
        self.data = data if isinstance(data, DataLoaders) else DataLoaders.of_pair(data)
        own = self.data.default_loss() if loss_func is None else loss_func
        self.loss_func = ready_loss(own, self.device)
        self.opt_func, self.lr = opt_func, checked_lr(lr)
        self.opt: Any = None
        self._offered: list[nn.Parameter] = []
        self.metrics, self.callbacks = named(metrics), in_order(callbacks)
        self.record, self.recorded = Record(), ["lr"]
        self.tally = Tally({})
        self.epoch = self.n_epochs = self.batch_index = 0
        self.step = self.n_batches_seen = self.n_items_seen = 0
        self.n_batches: int | None = None
        self.progress, self.training = 0.0, False
        self.handlers, self.spans = bind(())
        self.loss = self.preds = self.x = self.y = None

    # ── the loop ──────────────────────────────────────────────────────────────────────────────

    def fit(
        self, epochs: int, lr: float | None = None, callbacks: Iterable[Callback] = ()
    ) -> Record:
        """Train for a number of epochs, validate after each, and return the record.

        A table of losses and metrics is shown unless a `callbacks.Progress` says otherwise. The
        model is left in evaluation mode, however the fit ends.

        Args:
            epochs: passes over the training data.
            lr: learning rate for all parameter groups, kept for later fits; None leaves it.
            callbacks: serve this fit alone.

        Raises:
            NonFiniteLoss: the training loss became NaN or infinite.
            DataError: a loader gives no batches, or not as many as it says.
        """
        with self._fitting(epochs, lr, callbacks):
            self.fire("before_fit")
            for self.epoch in range(epochs):
                with self.around("around_epoch"):
                    self.fire("before_epoch")
                    began = perf_counter()
                    row = self.one_pass("train", self.data.train)
                    if self.data.valid is not None:
                        with torch.no_grad():
                            row |= self.one_pass("validate", self.data.valid)
                    self.record.epochs.append(row | {"seconds": perf_counter() - began})
                    self.fire("after_epoch")
        return self.record

    def one_pass(self, kind: str, loader: Iterable[Any]) -> dict[str, float]:
        """Go once through a loader, to "train" or to "validate", and return what came of it."""
        self._begin_pass(kind, loader)
        try:
            self.fire(f"before_{kind}")
            for self.batch_index, batch in enumerate(loader):
                try:
                    with self.around("around_batch"):
                        self._take(batch)
                        self.x = self.data.prepare(self.x, self.training)
                        self.fire("before_batch")
                        with self.around("around_forward"):
                            self.preds = self.forward()
                            self.fire("after_predict")
                            self.loss = self.compute_loss()
                            self.fire("after_loss")
                        if self.training:
                            try:
                                self.backward()
                                self.fire("after_backward")
                                self.take_step()
                                self.step += 1
                                self.fire("after_step")
                                self.zero_grad()
                            except CancelStep:
                                pass
                            except BaseException:
                                self.zero_grad()  # no gradient of a batch that is left goes on
                                raise
                except CancelBatch:
                    self.fire("after_cancel_batch")
                else:
                    n_items = tree.n_items(self.x)
                    self.tally.add(self.loss, self.preds, self.y, n_items, self._row())
                    if self.training:
                        self.n_batches_seen += 1
                        self.n_items_seen += n_items
                self.fire("after_batch")
                self.loss = self.preds = self.x = self.y = None
            check_length(self.batch_index + 1, self.n_batches, kind)
        except CancelEpoch:
            self.loss = self.preds = self.x = self.y = None
            self.fire("after_cancel_epoch")
        if self.training:
            self.progress = self._progress(self.n_batches or 1)
        results = self.tally.results()
        self.fire(f"after_{kind}")
        return results

    # ── the parts of a batch, for a subclass to replace ───────────────────────────────────────

    def forward(self) -> Any:
        """Call the model: a tuple of inputs as arguments, a dict as keywords."""
        if isinstance(self.x, tuple):
            return self.model(*self.x)
        if isinstance(self.x, dict):
            return self.model(**self.x)
        return self.model(self.x)

    def compute_loss(self) -> Tensor:
        """Call the loss: predictions first, then the target or targets, if there are any."""
        if isinstance(self.y, tuple):
            return self.loss_func(self.preds, *self.y)
        return self.loss_func(self.preds) if self.y is None else self.loss_func(self.preds, self.y)

    def backward(self) -> None:
        """Add the loss's gradients to the parameters'."""
        self.loss.backward()

    def take_step(self) -> None:
        """Let the optimiser move the parameters; LBFGS evaluates the batch again, as it needs."""
        self.opt.step(self._evaluate_again) if isinstance(self.opt, LBFGS) else self.opt.step()

    def zero_grad(self) -> None:
        """Drop the gradients of the optimiser's parameters, and of no others."""
        for group in self.opt.param_groups:  # opt.zero_grad() does the same in 12 µs instead of 1
            for param in group["params"]:
                param.grad = None

    def _evaluate_again(self) -> Tensor:
        self.zero_grad()
        self.preds = self.forward()
        self.loss = self.compute_loss()
        self.backward()
        return self.loss

    # ── moments and spans ─────────────────────────────────────────────────────────────────────

    def fire(self, moment: str) -> None:
        """Call everyone who hears a moment."""
        for callback, handler in self.handlers[moment]:
            try:
                answer = handler(self)
            except Exception as error:
                error.add_note(f"raised in {moment} of {callback!r}")
                raise
            if answer is not None:
                raise answered(callback, moment, answer)

    def around(self, span: str) -> AbstractContextManager[None]:
        """Return everyone's part of a span as one context manager."""
        return Around(span, self) if self.spans[span] else _NOTHING

    @contextmanager
    def _fitting(
        self, epochs: int, lr: float | None, callbacks: Iterable[Callback]
    ) -> Generator[None]:
        """Prepare a fit, and undo on every way out what only the fit needs."""
        if any(self.handlers.values()):
            raise SetupError("A fit of this learner is running already.")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
            raise SetupError("epochs must be a whole number, 0 or more.", saw=repr(epochs))
        handlers, spans = bind(
            with_defaults([*self.callbacks, *in_order(callbacks)])
        )  # first: may refuse
        self._prepare_optimizer(lr)
        self.epoch, self.n_epochs, self.batch_index, self.n_batches = 0, epochs, 0, None
        self.progress, self.tally, self.recorded = 0.0, Tally({}), ["lr"]
        self.batches_per_step = 1
        self.handlers, self.spans = handlers, spans
        try:
            with located(self), self.around("around_fit"):
                try:
                    yield
                except CancelFit:
                    self.tally.read()
                    self.fire("after_cancel_fit")
                finally:
                    self.fire("after_fit")
        finally:
            with suppress(Exception):  # after an error, what was not read yet still goes on record
                self.tally.read()
            Learner.zero_grad(self)  # what was gathered for a step that did not come
            self.model.eval()
            self.handlers, self.spans, self.training = *bind(()), False
            self.loss = self.preds = self.x = self.y = None

    def _prepare_optimizer(self, lr: float | None) -> None:
        self.model.to(self.device)
        if self.opt is None:
            self.reset_optimizer()
        check_trains(self.opt, self.model, self._offered)
        if lr is not None:
            self.lr = checked_lr(lr)
            for group in self.opt.param_groups:
                group["lr"] = lr

    def reset_optimizer(self) -> None:
        """Make a new optimiser for what is trainable now, without the old one's momentum."""
        self._offered = [param for param in self.model.parameters() if param.requires_grad]
        self.opt = build_optimizer(self.opt_func, self.model, self.lr)

    def _begin_pass(self, kind: str, loader: Iterable[Any]) -> None:
        self.training = kind == "train"
        self.model.train(self.training)
        self.batch_index, self.n_batches = -1, length(loader)
        names = hyper_names(self.opt, self.recorded) if self.training else ()
        self.tally = Tally(self.metrics, self.record if self.training else None, names)

    def _take(self, batch: Any) -> None:
        """Bring a batch to the device."""
        if self.batch_index == self.n_batches:
            kind = "train" if self.training else "validate"
            check_length(self.batch_index + 1, self.n_batches, kind)
        if self.training and self.n_batches:
            self.progress = self._progress(
                self.batch_index - self.batch_index % self.batches_per_step
            )
        x, y = tree.split(batch, self.data.n_inputs)
        self.x, self.y = tree.to_device(x, self.device), tree.to_device(y, self.device)

    def _progress(self, n_done: int) -> float:
        n = self.n_batches or 1  # where the number is unknown, whole epochs count
        return (self.epoch * n + min(n_done, n)) / (self.n_epochs * n)

    def _row(self) -> tuple[float, ...]:
        return (self.batch_index, *hyper_values(self.opt, self.recorded)) if self.training else ()

    # ── looks: what they do is undone ─────────────────────────────────────────────────────────

    def validate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Return loss and metrics over a loader, by default the validation data.

        Each item weighs the same. Callbacks that change the course act, those that watch do not.
        """
        return validate(self, loader)

    def predict(self, items: Tensor | np.ndarray | Iterable[Any]) -> Any:
        """Return what the model gives for `items`, on the CPU, in evaluation mode.

        Args:
            items: inputs (n, ...), taken in batches and through the data's transforms as in
                training; or a loader, whose targets are ignored.

        Returns:
            The model's outputs for all n items, joined along the first dimension; half precision
            as float32.
        """
        return predict(self, items)

    def untouched(self) -> AbstractContextManager[None]:
        """Let a block do anything with the learner, a fit too, and undo it; see `looks`."""
        return untouched(self)

    # ── conveniences: each fetches its plug-in when called ────────────────────────────────────

    def fit_one_cycle(self, epochs: int, lr: float, callbacks: Iterable[Callback] = ()) -> Record:
        """Fit with the learning rate rising to `lr` and falling again; see `callbacks.OneCycle`."""
        from .callbacks.schedule import OneCycle

        return self.fit(epochs, callbacks=[OneCycle(lr), *in_order(callbacks)])

    def find_lr(self, start: float = 1e-6, end: float = 10, steps: int = 100) -> LRSearch:
        """Try learning rates on the way from `start` to `end`; see `callbacks.find_lr`."""
        from .callbacks.find_lr import find_lr

        return find_lr(self, start, end, steps)

    def summary(self, depth: int | None = None) -> Summary:
        """List the model's modules as a batch goes through; see `summary`."""
        from .summary import summary

        return summary(self.model, self.data.one_batch()[0], depth=depth)

    def trace(self, n: int) -> Trace:
        """Train `n` batches and note who changed what in which moment; see `callbacks.trace`."""
        from .callbacks.trace import trace

        return trace(self, n)

    def plan(self, epochs: int, callbacks: Iterable[Callback] = ()) -> Figure:
        """Draw every schedule as it will run over `epochs`."""
        from .callbacks.schedule import plan

        return plan(self, epochs, callbacks)

    def show_loop(self, callbacks: Iterable[Callback] = ()) -> None:
        """Print the timetable with each callback beside the moments and spans it acts in."""
        from .callbacks.trace import annotated_timetable

        print(annotated_timetable(with_defaults([*self.callbacks, *in_order(callbacks)])))

    def save(self, path: str | Path) -> Path:
        """Write the model's weights, not the optimiser, as safetensors and return the path."""
        return weights.save(self.model, path)

    def load(self, path: str | Path) -> None:
        """Read weights that `save` wrote into a model of the same shape; see `weights.load`."""
        weights.load(self.model, path, self.device)

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Learner({name}, {self.data!r}, lr={self.lr:g}, on {self.device})"
