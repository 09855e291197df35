"""Freezing parts of a model: no gradient, no step, no statistics, until they are let go."""

from __future__ import annotations

from functools import partial

from torch import nn

from .errors import SetupError
from .roles import is_norm, stages


def freeze(*modules: nn.Module, norms: bool = True) -> None:
    """Keep modules as they are, to the bit, whatever trains the model around them.

    Their parameters get no gradient. What among them keeps buffers, as batch norm does its running
    statistics, goes to evaluation mode and stays in it, also when `model.train()` is called, until
    `unfreeze`. The rest, dropout for instance, still follows `train()`. An optimiser may hold
    frozen parameters: without a gradient it leaves them alone, weight decay included.

    Args:
        modules: a whole model, or parts of it.
        norms: False leaves norms out: they go on training, as is usual for a body that meets new
            data.

    Raises:
        SetupError: something is no torch module.
    """
    for module in _all(modules):
        if norms or not is_norm(module):
            for param in module.parameters(recurse=False):
                param.requires_grad_(False)
            if module._buffers:
                module.training = False
                vars(module)["train"] = partial(_stay, module)


def unfreeze(*modules: nn.Module) -> None:
    """Undo `freeze`: parameters train, and batch norm follows the next `model.train()`.

    An optimiser that was made in between does not hold the parameters; a learner's is made anew
    by `learn.reset_optimizer()`.
    """
    for module in _all(modules):
        for param in module.parameters(recurse=False):
            param.requires_grad_(True)
        vars(module).pop("train", None)


def freeze_to(model: nn.Module, n: int) -> None:
    """Freeze the first `n` stages of a model (see `roles.stages`), and let the others train.

    Parameters of the model itself are frozen with the first stage.
    """
    unfreeze(model)
    if n > 0:
        freeze(model)
        unfreeze(*[module for stage in stages(model)[n:] for module in stage])


def frozen(model: nn.Module) -> list[str]:
    """Return the names of the parameters that do not train, and of modules kept as they are."""
    params = [name for name, param in model.named_parameters() if not param.requires_grad]
    return params + [name for name, module in model.named_modules() if "train" in vars(module)]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for a frozen module's `train`: its parts follow, it does not."""
    for child in module.children():
        child.train(mode)
    return module


def _all(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    for module in modules:
        if not isinstance(module, nn.Module):
            raise SetupError("Only torch modules can be frozen.", saw=type(module).__name__)
    return [inner for module in modules for inner in module.modules()]
