"""Gradient checkpointing: computing activations again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .snapshot import preserved_buffers


@contextmanager
def gradient_checkpointing(modules: Iterable[nn.Module]) -> Generator[None]:
    """Keep only the inputs of some modules until the backward pass, and go through them again then.

    Memory for time: one more forward pass of these modules, and none of what lies within them is
    kept (Chen et al., 2016, "Training deep nets with sublinear memory cost"; the work is torch's
    `torch.utils.checkpoint`). The gradients are the same numbers: the second pass has the random
    state, the autocast and the buffers of the first, and leaves batch norm's statistics as the
    first left them. Hooks on modules *within* them hear both passes.

    Args:
        modules: blocks with much in them, each once and none within another. When the context
            ends they are as they were.
    """
    changed = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in changed:
            module.forward = partial(_twice, module, module.forward)
        yield
    finally:
        for module, forward in changed:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _twice(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    again = partial(_both_passes, module)
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=again, **kwargs)


def _both_passes(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return what torch enters for the first pass and, during the backward pass, the second."""
    before = [buffer.clone() for buffer in module.buffers()]
    return nullcontext(), _as_before(module, before)


@contextmanager
def _as_before(module: nn.Module, before: list[Tensor]) -> Generator[None]:
    with preserved_buffers(module):
        for buffer, values in zip(module.buffers(), before, strict=True):
            buffer.data.copy_(values)  # by .data: the graph that waits for this stays valid
        yield
