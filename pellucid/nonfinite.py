"""Where NaN or infinity comes from: a parameter, the inputs, a module, or the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import tree
from .sharding import own_part

_MANY = 8
"""Items that are listed by number; of more the first."""


_LARGE = 50.0
"""From here on numbers may well have grown: exp(89) is infinite in single precision."""


LOOK = (
    "a lower lr or callbacks.Clip is the usual cure for gradients that overflow; look for a square "
    "root, a logarithm or a division at zero after that layer."
)
"""What to do about gradients that are not finite."""


class Culprit(NamedTuple):
    """What was the first that was not finite, and what to do about it."""

    what: str
    do: str


def culprit(
    model: nn.Module | None,
    x: Any,
    y: Any,
    forward: Callable[[], Any],
    loss: Callable[[Any], Tensor],
    items: Sequence[int] | None = None,
) -> Culprit | None:
    """Find the first that is not finite, on the way from a batch to its loss.

    The model is called once, without gradients, as it stands; its buffers may change.

    Args:
        model: any module; None to look at the data alone.
        x: inputs of the batch.
        y: its targets.
        forward: calls the model with x.
        loss: of what `forward` returns.
        items: their numbers in the data set, if known.

    Returns:
        None if all was finite this time.
    """
    if model is None:
        return _in_tensors(x, y, items)
    found = in_parameters(model) or _in_tensors(x, y, items)
    return found or _on_the_way(model, forward, loss)


def in_parameters(model: nn.Module) -> Culprit | None:
    """Find the first parameter that is not finite; of a model in shards among the own ones."""
    for name, param in model.named_parameters():
        n_bad = _n_bad(own_part(param.detach()))
        if n_bad:
            what = f"in the parameter {name!r} {n_bad} of {param.numel()} values are not finite"
            return Culprit(
                f"{what}, by themselves or by their gradient in the step before",
                LOOK,
            )
    return None


def reset_spoilt_statistics(model: nn.Module) -> list[str]:
    """Give norms whose running statistics are not finite new ones; return the norms' names."""
    spoilt = []
    for name, module in model.named_modules():
        own = module.buffers(recurse=False)
        reset = getattr(module, "reset_running_stats", None)
        if reset and any(_n_bad(buffer) for buffer in own):
            reset()
            spoilt.append(name)
    return spoilt


def _in_tensors(x: Any, y: Any, numbers: Sequence[int] | None) -> Culprit | None:
    for what, part in (("inputs", x), ("targets", y)):
        for leaf in _floats(part):
            if _n_bad(leaf):
                bad = (~leaf.detach().isfinite()).reshape(len(leaf), -1).any(1)
                items = bad.nonzero().flatten().tolist()
                where = "of the batch" if numbers is None else "of the data set"
                named = [i if numbers is None else numbers[i] for i in items[:_MANY]]
                shown = ", ".join(map(str, named)) + ", ..." * (len(items) > _MANY)
                return Culprit(
                    f"the {what} are not finite in item {shown} {where}",
                    "mend these items or leave them out.",
                )
    return None


def _on_the_way(
    model: nn.Module, forward: Callable[[], Any], loss: Callable[[Any], Tensor]
) -> Culprit | None:
    found: list[Culprit] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found and _bad(output) and not _bad(inputs):
            name = f"{names[module]!r} ({type(module).__name__})" if names[module] else "the model"
            found.append(Culprit(f"{name} gives what is not finite, for inputs {_range(inputs)}",
                                 _cure(inputs)))  # fmt: skip

    with ExitStack() as stack, torch.no_grad():
        for module in names:
            stack.callback(module.register_forward_hook(look).remove)
        preds = forward()
        value = loss(preds)
    if found:
        return found[0]
    if not _bad(value):
        return None
    return Culprit(f"the loss is not finite, for predictions {_range(preds)}", _cure(preds))


def _floats(part: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree.leaves(part) if isinstance(leaf, Tensor) and leaf.ndim)
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]


def _bad(part: Any) -> bool:
    return any(_n_bad(leaf) for leaf in tree.leaves(part) if isinstance(leaf, Tensor))


def _n_bad(tensor: Tensor) -> int:
    return int((~tensor.detach().isfinite()).sum())


def _range(part: Any) -> str:
    leaves = [leaf.detach() for leaf in _floats(part)]
    if not leaves:
        return "that are no floats"
    low, high = min(x.min().item() for x in leaves), max(x.max().item() for x in leaves)
    return f"from {low:.3g} to {high:.3g}"


def _cure(part: Any) -> str:
    if max((leaf.detach().abs().max().item() for leaf in _floats(part)), default=0.0) > _LARGE:
        return "a lower lr is the usual cure, learn.find_lr().plot() shows which."
    return (
        "these are not large: look for an exponential, a division by zero, or a logarithm or root "
        "of what is not positive."
    )
