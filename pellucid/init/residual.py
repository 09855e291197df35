"""Initial weights for residual networks without normalisation."""

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import SetupError
from ..hooks import find
from ..nn import Residual, RunningBatchNorm
from .by_formula import WeightLayer, init_kaiming, set_values, weight_layers

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of all ranks
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    RunningBatchNorm,
)


def fixup(model: nn.Module, branches: Iterable[nn.Module] | None = None) -> None:
    """Let a residual network without normalisation train at any depth (Zhang et al., 2019).

    Of L residual branches, the last layer of each begins at zero and the m - 1 before it at
    Kaiming's times L^(-1 / (2m - 2)), so that one step changes the output as much as in a shallow
    network; the model's last layer begins at zero if it is in no branch; all others are Kaiming's.
    The scalar biases and multipliers which the paper adds are parts of an architecture and are not
    added; ordinary biases serve for the first.

    Args:
        model: all its Linear and convolution layers are set, in place.
        branches: what is added to the shortcuts, one module a branch; None takes the bodies of all
            `nn.Residual` in the model.

    Raises:
        SetupError: the model normalises (there a zero weight of each branch's last norm does this,
            see `conv_norm_act`), or has no residual branches.
    """
    norms = find(model, lambda module: isinstance(module, _NORMS))
    if norms:
        name, norm = next(iter(norms.items()))
        raise SetupError(
            "Fixup is for networks without normalisation, which undoes its scales.",
            saw=f"{name}: {norm!r}" + (f" and {len(norms) - 1} more" if len(norms) > 1 else ""),
            do="build the model with norm=None, or keep the norms and let the last one of each "
            "branch begin at zero (zero_norm=True).",
        )
    if branches is None:
        branches = [block.body for block in model.modules() if isinstance(block, Residual)]
    in_branches = [list(weight_layers(branch).values()) for branch in branches]
    if not in_branches:
        raise SetupError(
            "Fixup found no residual branches.",
            saw=f"no pellucid.nn.Residual in {type(model).__name__}",
            do="name them: fixup(model, branches=[block.body for block in model.blocks]).",
        )
    inner = [layer for layers in in_branches for layer in layers]
    if len(set(inner)) < len(inner):
        raise SetupError("Fixup needs branches that share no layers, nor lie in each other.")
    init_kaiming(model)
    for layers in in_branches:
        for layer in layers[:-1]:
            scale = len(in_branches) ** (-1 / (2 * len(layers) - 2))
            set_values(layer, "weight", layer.weight * scale)
        _silence(layers[-1])
    last = list(weight_layers(model).values())[-1]
    if last not in inner:
        _silence(last)


def _silence(layer: WeightLayer) -> None:
    set_values(layer, "weight", torch.zeros_like(layer.weight))
