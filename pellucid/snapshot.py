"""Looking changes nothing: take everything a look could disturb, and put it back."""

import copy
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Generator[None]:
    """Restore model, optimiser and random state on the way out, however the block ends.

    Restored: every parameter, buffer and gradient, the train/eval mode of each module,
    `requires_grad`, the optimiser's state and hyper-parameters, and the random state of Python,
    numpy, torch and CUDA. Parameters and buffers keep their identity (they are copied back
    in place), so whatever holds them stays valid. Costs one copy of each.
    """
    with preserved_modes(model), preserved_random_state(), preserved_buffers(model):
        params = list(model.parameters())
        copies = [param.detach().clone() for param in params]
        gradients = [(param.grad, _clone(param.grad)) for param in params]
        trainable = [param.requires_grad for param in params]
        restore_optimizer = _optimizer_copy(optimizer) if optimizer else None
        try:
            yield
        finally:
            with torch.no_grad():
                for param, saved in zip(params, copies, strict=True):
                    _refilled(param, saved)
                for param, (grad, saved) in zip(params, gradients, strict=True):
                    param.grad = _refilled(grad, saved)
            for param, flag in zip(params, trainable, strict=True):
                param.requires_grad_(flag)
            if restore_optimizer:
                restore_optimizer()


@contextmanager
def preserved_buffers(model: nn.Module) -> Generator[None]:
    """Restore each buffer on the way out: the same tensor under the same name, the same values."""
    saved = [
        (module, name, buffer, _clone(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                setattr(module, name, _refilled(buffer, values))


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _refilled(tensor: Tensor | None, values: Tensor | None) -> Tensor | None:
    if tensor is not None and values is not None:
        tensor.data.copy_(values)  # by .data: a graph that waits for its backward stays valid
    return tensor


def _optimizer_copy(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Copy state and hyper-parameters; return what puts them back.

    Not by state_dict: loading one casts the state to the parameters' dtype.
    """
    state = {param: copy.deepcopy(values) for param, values in optimizer.state.items()}
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            for name in set(group) - set(saved) - {"params"}:
                del group[name]
            group.update(saved)

    return restore


@contextmanager
def preserved_modes(model: nn.Module) -> Generator[None]:
    """Restore the train/eval mode of each module on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserved_random_state() -> Generator[None]:
    """Restore the generators of Python, numpy, torch and CUDA on the way out."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
