"""One fit in many processes."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS

from .. import tree
from ..data import Loader
from ..data.sliced import Share, SlicedBatches, SlicedLoader, sliced
from ..distributed import (
    average,
    gathered,
    is_first,
    process_group,
    random_apart,
    rank,
    stop_where_empty,
    take_from_first,
    whole_loss,
    world_size,
)
from ..engines import Replicas, Shards
from ..errors import DataError, SetupError, UnknownName, are_numbers, did_you_mean, three_parts
from ..events import Callback
from ..learner import Learner
from ..losses import ready_loss
from ..optim import gradients
from ..sharding import in_shards

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out", re.IGNORECASE)

_READ_EVERY = 50
"""Batches between two readings of the losses: by a clock, processes would read at different ones
and one alone would find the NaN."""


class Distributed(Callback):
    """Train in all processes that torchrun started, each on its part of every batch.

    The batch is the whole world's: with any number of processes the same items come in the same
    order, the gradient is that of the mean over all of them, and loss and metrics on record are
    those of the whole batch, the same in every process. A last batch need not divide evenly, and
    validation counts no item twice. In one process, nothing changes.

    "ddp" keeps the model in every process and averages the gradients (torch's
    DistributedDataParallel); with `Accumulate` only once a step. "fsdp" cuts parameters, gradients
    and the optimiser's state into shards (torch's FSDP2); while it computes, a part of the model is
    gathered. Before and after the fit the model is whole, and it is the same object. The weights
    are rank 0's at the beginning.

    Only rank 0 shows progress; `learn.save` in a fit must be called by all, and rank 0 writes.
    Callbacks must decide alike everywhere; what they see of losses and metrics is alike. Batch
    norm has the statistics of each process's part (torch's SyncBatchNorm, for GPUs alone, has those
    of the whole); the running ones are averaged after each epoch. From `after_loss` on `learn.x` is
    a tensor without content, of the whole batch's shape; targets are the whole batch's where there
    are metrics or `Accumulate`, predictions where there are metrics. Dropout is drawn apart.

    A process that fails or hangs ends the fit with an error in the others. After an error "fsdp"
    leaves the weights from before the fit, and an optimiser without its state.

    Args:
        mode: "ddp" or "fsdp".
        timeout: seconds that a process waits for the others.
        weigh: what the loss of a part is the mean over, as in `Accumulate`; None for the number of
            items. For a language model that skips padding: `lambda learn: (learn.y != -100).sum()`.
            A part of weight 0 does not count, whatever its loss.

    Raises:
        SetupError: no such mode; in the fit: a model that is not torch's or has lazy layers
            without a shape, an optimiser that evaluates batches itself (LBFGS), or more processes
            than GPUs.
        DataError: the processes are given different batches.
    """

    changes = True
    decides = "how processes train together"
    order = -1000  # around all others, and before them

    def __init__(
        self,
        mode: str = "ddp",
        timeout: float = 600.0,
        weigh: Callable[[Learner], float | Tensor] | None = None,
    ):
        if mode not in ("ddp", "fsdp"):
            raise UnknownName(
                f"Distributed knows no mode {mode!r}.", do=did_you_mean(str(mode), ["ddp", "fsdp"])
            )
        if not are_numbers(timeout) or not timeout > 0:
            raise SetupError("A timeout is a number of seconds above 0.", saw=repr(timeout))
        self.mode, self.timeout, self.weigh = mode, timeout, weigh
        self._engine: Replicas | Shards | None = None
        self._share: Share | None = None
        self._mark = 0.0
        self._apart: Tensor | None = None

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Join the processes, and part them again."""
        n = world_size()
        if n == 1:
            with _told(learn, "one process, so Distributed changes nothing"):
                yield
            return
        _check(learn)
        _move_to_own_gpu(learn)
        self._engine = (Replicas if self.mode == "ddp" else Shards)(learn)
        self._share = self._apart = None
        try:
            with ExitStack() as stack:
                stack.enter_context(_explained(self.timeout))
                stack.enter_context(process_group(learn.device, self.timeout))
                stack.enter_context(_told(learn, f"rank {rank()} of {n}, {self.mode}"))
                if not is_first():
                    _silence(learn)
                # once more, for what an average has put in the model's place
                learn.handlers["after_train"].append((self, _share_statistics))
                stack.enter_context(_sliced(learn))
                stack.enter_context(self._engine.at_work())
                yield
                take_from_first(learn.model.buffers())  # a cancelled pass has not averaged them
        finally:
            self._engine = None

    def before_train(self, learn: Learner) -> None:
        """Read the losses at the same batches as the others."""
        if self._engine:
            learn.tally.every = _READ_EVERY
            self._apart = torch.zeros((), dtype=torch.bool, device=learn.device)

    def before_validate(self, learn: Learner) -> None:
        """Read the losses at the same batches as the others."""
        self.before_train(learn)

    def before_batch(self, learn: Learner) -> None:
        """See which part of the batch this is; None for a look at other data."""
        self._share = None
        for loader in (learn.data.train, learn.data.valid):
            if isinstance(loader, SlicedLoader | SlicedBatches) and loader.share:
                self._share, self._mark, loader.share = loader.share, loader.mark, None

    def after_loss(self, learn: Learner) -> None:
        """Make loss, targets and predictions those of the whole batch."""
        if self._share is None or not isinstance(learn.loss, Tensor) or learn.loss.numel() != 1:
            return
        share, self._share = self._share, None
        weight: float | Tensor = share.n_own
        if self.weigh and share.n_own:
            weight = self.weigh(learn)
            stop_where_empty(learn.preds, weight)
        facts = (learn.training, learn.batch_index, share.n_whole, self._mark)
        learn.loss, apart = whole_loss(learn.loss.reshape(()), weight, facts)
        self._compare(apart)
        if learn.metrics:
            learn.preds = gathered(learn.preds, share)
        if learn.metrics or learn.batches_per_step > 1:
            learn.y = gathered(learn.y, share)
        each = tree.n_items(learn.x) // max(share.n_own, 1)  # a GAN's critic is given two
        learn.x = tree.map_leaves(lambda leaf: _emptied(leaf, share.n_whole * each), learn.x)

    def after_backward(self, learn: Learner) -> None:
        """Note whether these gradients were averaged."""
        if isinstance(self._engine, Replicas):
            self._engine.apart = self._engine.waiting

    def after_train(self, learn: Learner) -> None:
        """Average what `Accumulate` still holds, and the buffers."""
        if self._engine is None:
            return
        self._check_ended(learn)
        if isinstance(self._engine, Replicas) and self._engine.apart:
            average(gradients(learn.opt))
            self._engine.apart = False
        _share_statistics(learn)

    def after_validate(self, learn: Learner) -> None:
        """See that all had the same batches."""
        if self._engine:
            self._check_ended(learn)

    def _check_ended(self, learn: Learner) -> None:
        """Tell that the pass is over, where another may come with one batch more."""
        nothing = torch.zeros((), device=learn.device)
        self._compare(whole_loss(nothing, 0, (learn.training, learn.batch_index, 0, 0))[1])
        self._check_alike()

    def _compare(self, apart: Tensor) -> None:
        self._apart = apart if self._apart is None else self._apart | apart
        if apart.is_cpu:  # elsewhere the host would have to wait
            self._check_alike()

    def _check_alike(self) -> None:
        if self._apart is not None and self._apart:
            raise DataError(
                "The processes were given different batches.",
                saw=f"rank {rank()} has another number of batches or items, another order of them, "
                "or other targets",
                do="let every process make the same loader, with the same seed.",
            )


# ── around a fit ────────────────────────────────────────────────────────────────────────────────


def _check(learn: Learner) -> None:
    if not isinstance(learn.model, nn.Module):
        raise SetupError(
            "Only torch modules train in many processes.", saw=type(learn.model).__name__
        )
    named = chain(learn.model.named_parameters(), learn.model.named_buffers())
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        raise SetupError(
            "Lazy layers have no weights that processes could begin with alike.",
            saw=", ".join(lazy),
            do="call the model with a batch before the fit: model(data.one_batch()[0]).",
        )
    if isinstance(learn.opt, LBFGS):
        raise SetupError("LBFGS evaluates a batch several times, which processes cannot share.")
    if in_shards(learn.model):
        raise SetupError("A fit in shards cannot hold another.", do="look before the fit, or after")


def _move_to_own_gpu(learn: Learner) -> None:
    """Take the GPU of this process's number on the machine; who made a group has seen to it."""
    if learn.device.type != "cuda" or dist.is_initialized():
        return
    number, n = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= n:
        raise SetupError(
            "There are more processes on this machine than GPUs.",
            saw=f"process {number} (from 0), {n} GPUs",
            do=f"torchrun --nproc-per-node {n}",
        )
    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    if learn.device != device:
        learn.device = device
        learn.model.to(device)
        learn.loss_func = ready_loss(learn.loss_func, device)
        learn.opt.load_state_dict(learn.opt.state_dict())  # goes where the parameters are


@contextmanager
def _explained(timeout: float) -> Generator[None]:
    """Say of an error in which process it was, and what the loss of another looks like."""
    where = f"on rank {rank()} of {world_size()}"
    try:
        yield
    except Exception as error:
        error.add_note(where)
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            error.add_note(
                three_parts(
                    "Another process ended, or did nothing for longer than the timeout of "
                    f"{timeout:g} s.",
                    do="its own error, on another rank, says why; for a process that is slow and "
                    "not lost: Distributed(timeout=...).",
                )
            )
        if "find_unused_parameters" in str(error):
            error.add_note(
                three_parts(
                    "A parameter that is trained had no part in the loss of a batch.",
                    do="freeze it before the fit, param.requires_grad_(False), or let it take part "
                    "in every batch, with a weight of 0 if need be.",
                )
            )
        raise


@contextmanager
def _told(learn: Learner, what: str) -> Generator[None]:
    """Say beside the device how the fit is run."""
    known = learn.device_reason
    learn.device_reason = f"{known}; {what}"
    try:
        yield
    finally:
        learn.device_reason = known


def _silence(learn: Learner) -> None:
    """Leave out who only shows progress, for the rest of this fit."""
    hearers: list[list[Any]] = [*learn.handlers.values(), *learn.spans.values()]
    for pairs in hearers:
        pairs[:] = [pair for pair in pairs if pair[0].changes or not pair[0].shows_progress]


@contextmanager
def _sliced(learn: Learner) -> Generator[None]:
    """Let the loaders give this rank's part, and torch's generators differ between the ranks."""
    data, learn.data = learn.data, copy.copy(learn.data)
    try:
        with random_apart(learn.device, learn.step) as same:
            for name in ("train", "valid"):
                if vars(data)[name] is not None:
                    setattr(learn.data, name, sliced(vars(data)[name], rank(), world_size(), same))
            if data.valid is data.train:  # one loader, whose passes are counted together
                learn.data.valid = learn.data.train
            yield
    finally:
        for name, loader in vars(data).items():
            if isinstance(loader, Loader):
                loader.epoch = vars(learn.data)[name].epoch
        learn.data = data


def _share_statistics(learn: Learner) -> None:
    """Give every process the average of the buffers: batch norm's statistics of all parts."""
    average(buffer for buffer in learn.model.buffers() if buffer.is_floating_point())


def _emptied(leaf: Any, n: int) -> Any:
    """Return a tensor of `n` items without content: who counts them counts the whole batch."""
    if not isinstance(leaf, Tensor) or not leaf.ndim:
        return leaf
    return leaf.new_empty((n, *leaf.shape[1:]), device="meta")
