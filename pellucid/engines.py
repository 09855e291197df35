"""How a learner's model trains in many processes: as replicas by DDP, or in shards by FSDP2."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import sharding, weights
from .distributed import is_first, take_from_first
from .errors import SetupError

if TYPE_CHECKING:
    from .learner import Learner


_RENAMED = "forward_sync_buffers"  # in torch 2.13, which warns of the name before
_RENAMED_IS_KNOWN = _RENAMED in inspect.signature(DistributedDataParallel).parameters
# we take care ourselves that all begin alike, since a model may be wrapped anew in mid-fit
_APART: dict[str, Any] = {
    "init_sync": False,
    _RENAMED if _RENAMED_IS_KNOWN else "broadcast_buffers": False,
}


class _Engine(ABC):
    """Serves one fit; a look from within it copies callbacks, but not this."""

    def __init__(self, learn: Learner):
        self.learn, self.model = learn, learn.model

    def __deepcopy__(self, memo: Any) -> _Engine:
        return self

    @abstractmethod
    def at_work(self) -> AbstractContextManager[None]:
        """Train in many processes in a block, from the weights of rank 0."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring the user's model up to date; every process takes part."""

    def _begin_alike(self) -> None:
        take_from_first([*self.model.parameters(), *self.model.buffers()])

    def save(self, path: str | Path) -> Path:
        """Do what `Learner.save` says, once for all processes."""
        self.refresh()
        return weights.save(self.model, path) if is_first() else Path(path)

    @abstractmethod
    def forward(self) -> Any:
        """Do what `Learner.forward` says, in many processes."""

    @contextmanager
    def _acting(self) -> Generator[None]:
        """Stand in for the learner's own methods in a block."""
        own = vars(self.learn)
        own |= {"forward": self.forward, "save": self.save}
        try:
            yield
        finally:
            del own["forward"], own["save"]


class Replicas(_Engine):
    """The model in every process: only the call of a training batch goes through torch's DDP.

    Attributes:
        waiting: this batch's gradients are not averaged, since no step follows.
        apart: the gradients held are not averaged yet.
    """

    def __init__(self, learn: Learner):
        super().__init__(learn)
        self.waiting = self.apart = False
        self._ddp: DistributedDataParallel | None = None
        self._trained: list[bool] = []

    @contextmanager
    def at_work(self) -> Generator[None]:
        """Call the model through DDP in a block."""
        self._begin_alike()
        with self._acting():
            try:
                yield
            finally:
                self._ddp = None  # and its hooks go with it

    def refresh(self) -> None:
        """Do nothing: the user's model is the one that trains."""

    def forward(self) -> Any:
        """Do what `Learner.forward` says; `learn.model` stays the user's, and so do its names."""
        learn, call = self.learn, type(self.learn).forward
        if not (learn.training and torch.is_grad_enabled()):
            return call(learn)
        window, n_done = learn.batches_per_step, learn.batch_index + 1
        last = n_done % window == 0 or learn.n_batches in (None, n_done)
        self.waiting = not last
        model, learn.model = learn.model, self._wrapped(learn.model)
        try:
            with nullcontext() if last else learn.model.no_sync():
                return call(learn)
        finally:
            learn.model = model

    def _wrapped(self, model: nn.Module) -> Any:
        trained = [param.requires_grad for param in model.parameters()]
        if not self._trained:
            self._begin_alike()  # whoever set weights by the first batch has seen a part of it
        if self._ddp is None or self._ddp.module is not model or trained != self._trained:
            self._ddp, self._trained = None, trained  # the old one's hooks go first
            self._ddp = DistributedDataParallel(model, **_APART)
        return self._ddp


class Shards(_Engine):
    """The model in shards: `learn.model` is a sharded copy while the fit runs."""

    def __init__(self, learn: Learner):
        super().__init__(learn)
        self._twin: Any = None

    @contextmanager
    def at_work(self) -> Generator[None]:
        """Train a sharded copy in a block, and take over what it became if the block succeeds."""
        learn, model = self.learn, self.model
        self._begin_alike()
        model.cpu()  # out of the way
        try:
            self._twin = sharding.sharded(model, learn.device)
            with sharding.of_shards(learn.opt, model, self._twin), self._acting():
                learn.model = self._twin
                yield
                self.refresh()
        finally:
            learn.model, self._twin = model.to(learn.device), None

    def forward(self) -> Any:
        """Do what `Learner.forward` says."""
        if self.learn.training and not torch.is_grad_enabled():
            # whoever looks for NaN may do so alone, and would wait for the others' shards
            raise SetupError("One process alone cannot compute with a model in shards.")
        return type(self.learn).forward(self.learn)

    def refresh(self) -> None:
        """Bring the user's model up to date; every process takes part."""
        sharding.gather(self._twin, self.model)
