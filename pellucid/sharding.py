"""A model in shards, one a process: torch's FSDP2, taken up and put down again.

Zhao et al., 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from .distributed import world_size
from .joint import Joint
from .stats import norms


def sharded(model: nn.Module, device: torch.device) -> Any:
    """Return a copy of a model whose parameters are in shards, one in each process.

    The members of the outermost `nn.Sequential` and `nn.ModuleList` are gathered one after the
    other when they compute, the rest together.

    Args:
        model: the same in every process, its weights too; stays as it is.
        device: where the copy computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    twin = copy.deepcopy(model)
    for block in blocks(twin):
        fully_shard(block, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    return twin


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost containers that share no parameter with the rest."""
    n_uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            n_uses[param] = n_uses.get(param, 0) + 1
    return [
        block
        for block in dict.fromkeys(_members(model))
        if any(True for _ in block.parameters())
        and not isinstance(block, nn.ModuleList)  # has no forward of its own
        and all(n_uses[param] == 1 for param in block.parameters())
    ]


def _members(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return list(model)
    return [member for part in model.children() for member in _members(part)]


@torch.no_grad()
def gather(twin: nn.Module, model: nn.Module) -> None:
    """Copy what `sharded` made back into the model, whole, in every process."""
    for param, shard in zip(model.parameters(), twin.parameters(), strict=True):
        param.copy_(_whole(shard))
        param.requires_grad_(shard.requires_grad)
    for buffer, held in zip(model.buffers(), twin.buffers(), strict=True):
        buffer.copy_(held)


@contextmanager
def of_shards(opt: Optimizer, model: nn.Module, twin: nn.Module) -> Generator[None]:
    """Let an optimiser move the shards in a block, its state in shards too, and undo it.

    If the block ends with an error the state is lost: other processes may not answer any more.
    """
    shard_of = dict(zip(model.parameters(), twin.parameters(), strict=True))
    param_of = {shard: param for param, shard in shard_of.items()}
    parts = opt.parts if isinstance(opt, Joint) else [opt]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_in_a_form_for_shards(part))
        try:
            _exchange(opt, shard_of, _scattered)
            yield
            _exchange(opt, param_of, lambda value, like: _whole(value))
        except BaseException:
            opt.state.clear()
            _exchange(opt, param_of, lambda value, like: value)
            raise


@contextmanager
def _in_a_form_for_shards(opt: Optimizer) -> Generator[None]:
    """Let an optimiser take its foreach form in a block, where torch 2.13 has no fused kernel."""
    groups = opt.param_groups
    forms = [
        {name: group[name] for name in ("fused", "foreach") if name in group} for group in groups
    ]
    if isinstance(opt, Adam | AdamW) or not any(form.get("fused") for form in forms):
        yield
        return
    guards = vars(opt).get("_step_supports_amp_scaling")
    vars(opt)["_step_supports_amp_scaling"] = False
    for group in groups:
        group |= {"fused": False, "foreach": True}
    try:
        yield
    finally:
        vars(opt)["_step_supports_amp_scaling"] = guards
        for group, form in zip(groups, forms, strict=True):
            group |= form


def _exchange(opt: Optimizer, other: dict[Any, Any], turned: Callable[[Any, Any], Any]) -> None:
    for group in opt.param_groups:
        group["params"] = [other.get(param, param) for param in group["params"]]
    for param in [param for param in opt.state if param in other]:
        state, new = opt.state.pop(param), other[param]
        opt.state[new] = {name: turned(value, new) for name, value in state.items()}


def _scattered(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def in_shards(model: nn.Module) -> bool:
    """Say whether a model's parameters are shards."""
    return any(hasattr(param, "full_tensor") for param in model.parameters())


def own_part(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor: its shard, which shares memory, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_parts(model: nn.Module) -> list[Tensor]:
    """Return what this process holds of a model's parameters and buffers, without gradients.

    What is gathered for a forward pass without a backward is given up first.
    """
    if hasattr(model, "reshard"):
        for module in model.modules():
            getattr(module, "reshard", lambda: None)()
    return [own_part(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]


def zero_if_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return 0 if all numbers are finite, else NaN: 0-d float32, of shards the same everywhere.

    Args:
        tensors: all on the device; none give 0.
        device: of this process.
    """
    found, own = torch.zeros((), device=device), [own_part(tensor) for tensor in tensors]
    if own:
        found = norms(t.coalesce().values() if t.is_sparse else t for t in own).sum() * 0
    if any(part is not tensor for part, tensor in zip(own, tensors, strict=True)):
        dist.all_reduce(found)
    return found


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
