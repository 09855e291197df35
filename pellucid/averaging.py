"""A second set of a model's weights, averaged over the course of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .sharding import own_parts
from .snapshot import preserved_modes


def warm_decay(decay: float, t: int) -> float:
    """Return min(decay, (1 + t) / (10 + t)): an average that soon forgets how it began.

    Args:
        decay: weight of the past after the first steps.
        t: updates made before.
    """
    return min(decay, (1 + t) / (10 + t))


class Averages:
    """Copies of a model's parameters and buffers, to be drawn towards the model's own.

        averages = Averages(model)
        for x, y in batches:
            ...
            opt.step()
            averages.draw(model, 0.001)  # an exponential average: 0.999 old, 0.001 new

    What is no floating-point number, batch norm's counter for instance, is copied instead. Of a
    model in shards each process averages its own.

    Args:
        model: any module; its structure must not change.
    """

    def __init__(self, model: nn.Module):
        self._floats, self._others = ([t.clone() for t in kind] for kind in _tensors(model))

    def draw(self, model: nn.Module, share: float) -> None:
        """Go the share, in [0, 1], of the way to the model's values."""
        floats, others = _tensors(model)
        if floats:
            torch._foreach_lerp_(self._floats, floats, share)
        _fill(self._others, others)

    def put_into(self, model: nn.Module) -> None:
        """Copy the averages into the model."""
        floats, others = _tensors(model)
        _fill(floats, self._floats)
        _fill(others, self._others)

    def exchange(self, model: nn.Module) -> None:
        """Exchange values with the model, to the bit; twice, and all is as before."""
        own = [tensor for kind in _tensors(model) for tensor in kind]
        kept = [tensor.clone() for tensor in own]
        self.put_into(model)
        _fill([*self._floats, *self._others], kept)


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    every = own_parts(model)
    floats = [tensor for tensor in every if tensor.is_floating_point()]
    return floats, [tensor for tensor in every if not tensor.is_floating_point()]


def _fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        # into .data: a graph that waits for its backward, around a look, stays valid
        torch._foreach_copy_([tensor.data for tensor in tensors], values)


@torch.no_grad()
def renew_batch_norm(
    model: nn.Module, inputs: Iterable[Any], forward: Callable[[Any], Any]
) -> None:
    """Give batch norm the mean statistics over batches, instead of those gathered in training.

    As torch.optim.swa_utils.update_bn does, but for inputs of any kind; and frozen layers, or those
    that no input goes through, stay.

    Args:
        model: its batch norms are set; the modes of all modules are put back.
        inputs: one after the other for `forward`, batches of one size; not asked for where there
            is no batch norm.
        forward: calls the model.
    """
    with preserved_modes(model):
        model.train()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        momenta = [norm.momentum for norm in norms]
        before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the plain mean
            for x in inputs if norms else ():
                forward(x)
        finally:
            for norm, momentum, values in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if norm.num_batches_tracked == 0:
                    _fill(list(norm.buffers()), values)
