"""Looking changes nothing: take everything a look could disturb, and put it back."""

import copy
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Generator[None]:
    """Restore model, optimiser and random state on the way out, however the block ends.

    Restored: every parameter, buffer and gradient, the train/eval mode of each module,
    `requires_grad`, the optimiser's state and hyper-parameters, and the random state of Python,
    numpy, torch and its GPUs. Parameters and buffers keep their identity (they are copied back
    in place), so whatever holds them stays valid. Costs one copy of each.
    """
    with preserved_modes(model), preserved_random_state():
        tensors = [*model.parameters(), *model.buffers()]
        copies = [tensor.detach().clone() for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors]
        gradient_copies = [None if grad is None else grad.clone() for grad in gradients]
        trainable = [tensor.requires_grad for tensor in tensors]
        restore_optimizer = _optimizer_copy(optimizer) if optimizer else None
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, saved in zip(tensors, copies, strict=True):
                    tensor.copy_(saved)
                for tensor, grad, saved in zip(tensors, gradients, gradient_copies, strict=True):
                    tensor.grad = grad if saved is None or grad is None else grad.copy_(saved)
            for tensor, flag in zip(tensors, trainable, strict=True):
                if tensor.is_leaf:
                    tensor.requires_grad_(flag)
            if restore_optimizer:
                restore_optimizer()


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
    """Restore the generators of Python, numpy, torch and its GPUs on the way out."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
