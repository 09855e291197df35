"""Many processes as one: who is there, random numbers, and sums that come out alike.

Each process is a rank of a world, as torchrun starts them. The batch is that of the whole world;
every rank takes its part of it, see `data.sliced`. Nothing here knows of a loop;
`callbacks.Distributed` says when.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .data.sliced import Share, is_texts
from .errors import SetupError
from .tree import describe, leaves, map_leaves

_GROUPS = count()
_STORES: list[dist.Store] = []

# ── who is there ────────────────────────────────────────────────────────────────────────────────


def world_size() -> int:
    """Return how many processes there are: 1, unless torchrun or a like launcher started more."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among all, from 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_first() -> bool:
    """Say whether this process is rank 0, the one that prints and writes files.

    >>> if is_first():
    ...     print("written once, whatever the number of processes")
    written once, whatever the number of processes
    """
    return rank() == 0


@contextmanager
def process_group(device: torch.device, timeout: float) -> Generator[None]:
    """Let the processes talk to each other, by NCCL for CUDA and by gloo for the rest.

    A group that exists already is used and left as it is, also its timeout.

    Args:
        device: of this process.
        timeout: seconds that a process waits for the others before it gives up with an error.
    """
    if dist.is_initialized():
        yield
        return
    limit, on_cuda, hook = timedelta(seconds=timeout), device.type == "cuda", sys.excepthook
    # a name of its own for each group: what an earlier one left in the store is not mistaken for it
    store = dist.PrefixStore(f"pellucid/{next(_GROUPS)}", _store(limit))
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=limit,
        device_id=device if on_cuda else None,
    )
    try:
        yield
        dist.barrier()  # nobody hangs up while another still listens
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch puts its own around it each time, and leaves it there


def _store(limit: timedelta) -> dist.Store:
    """Return where the processes of all machines find each other; there is one for good."""
    if not _STORES:
        _STORES.append(next(dist.rendezvous("env://", timeout=limit))[0])
    _STORES[0].set_timeout(limit)
    return _STORES[0]


# ── random numbers ──────────────────────────────────────────────────────────────────────────────


class SameRandom:
    """The state of torch's CPU generator as it would be in one process.

    `same()` is a block in which it is the generator's, and goes on.
    """

    def __init__(self, state: Tensor):
        self.state = state

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Draw alike in all processes in a block."""
        own = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(own)


@contextmanager
def random_apart(device: torch.device, number: int = 0) -> Generator[SameRandom]:
    """Let torch's generators differ between the processes in a block, for dropout.

    Afterwards those of the CPU are alike again, and rank 0's; a GPU's is what it was.

    Args:
        device: of this process; its generator too is set apart.
        number: gives other numbers, for blocks that begin in the same state.
    """
    state = torch.get_rng_state().to(device)
    take_from_first([state])
    same = SameRandom(state.cpu())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_rng_state(same.state)
            base = int(torch.randint(2**62, ()))
            torch.manual_seed(base + number * world_size() + rank())
            yield same
    finally:
        torch.set_rng_state(same.state)


# ── sums that come out alike ────────────────────────────────────────────────────────────────────


class _Whole(torch.autograd.Function):
    """Puts another number in a loss's place, and lets only a share of the gradient through."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, whole: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def whole_loss(
    loss: Tensor, weight: float | Tensor, facts: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Return the mean over the items of all processes, made of their means.

    Its value is the same in each of them. Its gradient is `world * weight / total` times that of
    the own loss, so the average over the processes, which DDP and FSDP take, is the gradient of the
    mean over all items.

    Args:
        loss: the own mean, 0-d.
        weight: over how many items (tokens, ...) it is the mean; with 0 it does not count.
        facts: numbers that must be the same everywhere.

    Returns:
        The loss, and whether the facts differ, a 0-d bool tensor on the device.
    """
    given = torch.tensor(facts, dtype=torch.float64).to(loss.device, non_blocking=True)
    weight = torch.as_tensor(weight, dtype=torch.float64).to(loss.device, non_blocking=True)
    counted = torch.where(weight > 0, loss.detach().double() * weight, 0)
    own = torch.cat([torch.stack([counted, weight]), given])
    all_of_them = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(all_of_them, own)
    table = torch.stack(all_of_them)
    total, n = table[:, :2].sum(0).unbind()
    factor = (world_size() * weight / n).to(loss.dtype)
    whole = _Whole.apply(loss, (total / n).to(loss.dtype), factor)
    return whole, (table[:, 2:] != given).any()


def stop_where_empty(preds: Any, weight: float | Tensor) -> None:
    """Let no gradient go back through predictions whose loss has a weight of 0.

    A loss that divides by its own weight, the number of tokens for instance, has NaN for its
    gradient there, and 0 times NaN is NaN.

    Args:
        preds: what the loss was computed from, nested as they may be.
        weight: as for `whole_loss`.
    """
    for leaf in leaves(preds):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            counts = torch.as_tensor(weight).to(leaf.device, non_blocking=True) > 0
            leaf.register_hook(lambda grad, counts=counts: torch.where(counts, grad, 0))


def gathered(batch: Any, share: Share) -> Any:
    """Join what each process has for its items, in the order of the whole batch, without gradients.

    Args:
        batch: predictions or targets, nested as they may be. Tensors are joined, and arrays and
            lists of strings as long as this part; else what is no tensor stays as it is.
        share: which items these are; as `SlicedLoader` and `SlicedBatches` say it.

    Raises:
        SetupError: a tensor's first dimension does not count items.
    """

    def join(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _joined(leaf, share) if leaf.ndim else leaf
        can_be_cut = is_texts(leaf) or (isinstance(leaf, np.ndarray) and leaf.ndim)
        was_cut = can_be_cut and len(leaf) == max(share.n_own, 1)
        return _joined_objects(leaf, share) if was_cut else leaf

    return map_leaves(join, batch, is_texts)


def _joined(leaf: Tensor, share: Share) -> Tensor:
    each, rest = divmod(len(leaf), max(share.n_own, 1))  # a row an item, or several
    if rest:
        raise SetupError(
            "Metrics in many processes need predictions and targets whose first dimension counts "
            "the items.",
            saw=f"{describe(leaf)} for {share.n_own} items",
            do="return them so, or leave the metrics out.",
        )
    sizes = [size * each for size in share.sizes]
    # as bytes, which every backend carries, whatever the dtype
    own = leaf.detach().reshape(len(leaf), leaf[:1].numel()).contiguous().view(torch.uint8)
    own = own[: share.n_own * each]
    sent = own.new_zeros(max(sizes), own.shape[1])
    sent[: len(own)] = own
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent)
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return whole.view(leaf.dtype).reshape(sum(sizes), *leaf.shape[1:])


def _joined_objects(leaf: Any, share: Share) -> Any:
    parts: list[Any] = [None] * len(share.sizes)
    dist.all_gather_object(parts, leaf[: share.n_own])
    if isinstance(leaf, np.ndarray):
        return np.concatenate(parts)
    return type(leaf)(item for part in parts for item in part)


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their average over all processes; those of one dtype in one go."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of rank 0."""
    for tensor in tensors:
        values = tensor.contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def as_the_first_says(number: float) -> float:
    """Return rank 0's number in every process; what depends on a clock is decided so.

    Outside of a process group it is the own one. The host waits for it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return number
    on_cuda = dist.get_backend() == "nccl"
    told = torch.tensor(number, dtype=torch.float64, device="cuda" if on_cuda else "cpu")
    dist.broadcast(told, 0)
    return told.item()
