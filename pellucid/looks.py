"""Looks: using a learner and leaving no trace of it."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import tree
from .binding import bind
from .data import ArrayDataset, Loader, preserved_order
from .data.sliced import whole
from .errors import SetupError
from .events import Callback, CancelBatch, in_order
from .record import Record
from .slips import located
from .snapshot import (
    preserved,
    preserved_buffers,
    preserved_modes,
    preserved_random_state,
)
from .stats import HALVES

if TYPE_CHECKING:
    from .learner import Learner


@contextmanager
def untouched(learn: Learner) -> Generator[None]:
    """Let a block do anything with the learner, a fit too, and undo it on every way out.

    Model, optimiser, random state, record, the learner's attributes and the order of its `Loader`s
    are what they were. Costs a copy of the model and of the optimiser's state.
    """
    orders = preserved_order(learn.data.train, learn.data.valid)
    with _attributes_kept(learn), preserved(learn.model, learn.opt), orders, torch.enable_grad():
        learn.callbacks = copies(learn, learn.callbacks)
        learn.data = copy.copy(learn.data)
        learn.data.transforms = list(learn.data.transforms)
        learn.data.augment = list(learn.data.augment)
        learn.handlers, learn.spans = bind(())  # within a fit, another may run
        yield


def validate(learn: Learner, loader: Iterable[Any] | None) -> dict[str, float]:
    """Do what `Learner.validate` says."""
    loader = learn.data.valid if loader is None else loader
    if loader is None:
        raise SetupError("There are no validation data.", do="learn.validate(loader)")
    with _looking(learn, loader), torch.no_grad():
        results = learn.one_pass("validate", loader)
    return {name.removeprefix("valid/"): value for name, value in results.items()}


def predict(learn: Learner, items: Tensor | np.ndarray | Iterable[Any]) -> Any:
    """Do what `Learner.predict` says: a validation pass that goes no further than predictions."""
    if isinstance(items, (Tensor, np.ndarray)):
        items = Loader(ArrayDataset(items), learn.data.batch_size or 64)
    items = whole(items)  # predictions of a part would be taken for those of all
    keep = _KeepPredictions()
    with _looking(learn, items, keep), torch.no_grad():
        learn.one_pass("validate", items)
    return tree.join(keep.found)


def copies(learn: Learner, callbacks: Iterable[Callback]) -> list[Callback]:
    """Copy callbacks for a look that trains; what they hold of the learner stays the learner's."""
    tensors = (*learn.model.parameters(), *learn.model.buffers())
    loaders = (learn.data, learn.data.train, learn.data.valid)
    shared = (learn, *learn.model.modules(), *tensors, *loaders, learn.opt, learn.record)
    return copy.deepcopy(list(callbacks), {id(thing): thing for thing in shared})


class _KeepPredictions(Callback):
    order = 1000  # after everyone who changes them

    def __init__(self):
        self.found: list[Any] = []

    def after_predict(self, learn: Learner) -> None:
        preds = tree.map_leaves(_in_single, learn.preds)
        self.found.append(tree.to_device(preds, torch.device("cpu")))
        raise CancelBatch  # no loss: there may be no targets


def _in_single(leaf: Any) -> Any:
    """Return what autocast has left in half precision, which NumPy may not know, as float32."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALVES else leaf


@contextmanager
def _looking(learn: Learner, loader: Any, *callbacks: Callback) -> Generator[None]:
    """Let a block go through a loader without training, and put back all that it can disturb.

    Copies of those callbacks act that change the course, within a fit of the fit's own too (a
    prediction must go the way that training goes); those that only watch do not.
    """
    hearers = [*learn.handlers.values(), *learn.spans.values()]
    of_fit = {id(callback): callback for pairs in hearers for callback, _ in pairs}
    known = in_order(of_fit.values()) or learn.callbacks
    acting = copies(learn, [callback for callback in known if callback.changes])
    with ExitStack() as stack:
        stack.enter_context(_attributes_kept(learn))
        stack.enter_context(preserved_buffers(learn.model))
        stack.enter_context(preserved_modes(learn.model))
        stack.enter_context(preserved_random_state())
        stack.enter_context(preserved_order(loader))
        stack.enter_context(located(learn))
        learn.handlers, learn.spans = bind([*acting, *callbacks])
        learn.n_epochs, learn.batch_index, learn.n_batches = 0, -1, None
        yield


@contextmanager
def _attributes_kept(learn: Learner) -> Generator[None]:
    kept = dict(vars(learn))
    learn.record, learn.metrics = Record(), copy.deepcopy(learn.metrics)
    try:
        yield
    finally:
        vars(learn).clear()
        vars(learn).update(kept)
