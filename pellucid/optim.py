"""Building optimisers, and reading and setting their hyper-parameters by name."""

import inspect
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from . import foundations
from .errors import SetupError, UnknownName, did_you_mean


def build_optimizer(opt_func: Callable[..., Optimizer], model: nn.Module, lr: float) -> Optimizer:
    """Call `opt_func(params, lr=lr)` with what the model trains, in torch's fastest form of it.

    Most of torch's optimisers exist as a loop over parameters, in a form that handles all of them
    in one call per operation (`foreach`) and as one kernel (`fused`): for a small model a step
    costs a third. Unless `opt_func` itself decides (`partial(SGD, fused=False)`), the first of
    fused, foreach and loop is taken that the class, the dtypes and the device allow. The forms
    agree to rounding, not to the bit.

    An `opt_func` that has an argument `model` gets the model too, and chooses the form itself, see
    `fastest`; `roles.ByRole` is one.

    Raises:
        SetupError: `opt_func` cannot be called so, or gives no torch optimiser.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        frozen = sum(1 for _ in model.parameters())
        raise SetupError(
            "The model has no parameters to train.",
            saw=f"{frozen} parameters, all frozen" if frozen else "no parameters at all",
            do="give a model with parameters, at least one of them with requires_grad.",
        )
    try:
        if "model" in arguments(opt_func):
            optimizer = opt_func(params, lr=lr, model=model)
        else:
            optimizer = fastest(opt_func, params, lr, model)
    except TypeError as error:
        raise SetupError(
            "opt_func cannot be called as opt_func(params, lr=lr).",
            saw=str(error),
            do="pass a class such as torch.optim.SGD, or a function (params, lr) -> Optimizer.",
        ) from error
    if not isinstance(optimizer, Optimizer | foundations.Optimizer):
        raise SetupError(
            "opt_func must return a torch optimiser.",
            saw=repr(optimizer),
            do="pass a class such as torch.optim.SGD, or a function (params, lr) -> Optimizer.",
        )
    return optimizer


def fastest(
    opt_func: Callable[..., Optimizer],
    params: Sequence[Any],
    lr: float,
    model: nn.Module,
) -> Optimizer:
    """Call `opt_func(params, lr=lr)` in torch's fastest form; see `build_optimizer`.

    Args:
        opt_func: a class of torch's, a partial of one, or any function.
        params: parameters of the model, or groups of them.
        lr: learning rate.
        model: tells whether its gradients may be sparse, which suits only the plain form.
    """
    chosen = opt_func.keywords if isinstance(opt_func, partial) else {}
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    fixed = sparse or {"fused", "foreach", "differentiable"} & set(chosen)
    # for complex numbers torch 2.13 refuses its fused form in the first step only
    forms = ["foreach"] if any(p.is_complex() for p in model.parameters()) else ["fused", "foreach"]
    for form in [] if fixed else forms:
        if form in arguments(opt_func):
            try:
                optimizer = opt_func(_copied(params), lr=lr, **{form: True})
            except (RuntimeError, TypeError, ValueError):
                continue  # not for these parameters; if more is wrong, the plain form says it
            if form == "fused":
                begin_momentum(optimizer)
            return optimizer
    return opt_func(params, lr=lr)


def _copied(params: Sequence[Any]) -> list[Any]:
    """Copy groups: an optimiser fills in what they lack, also one that then refuses them."""
    return [dict(group) if isinstance(group, dict) else group for group in params]


def arguments(opt_func: Callable[..., Optimizer]) -> Iterable[str]:
    """Return the names of what a class or function takes; none where nobody can tell."""
    try:
        return inspect.signature(opt_func).parameters
    except ValueError:  # of something built in
        return ()


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return all parameters of an optimiser."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that an optimiser's parameters have."""
    return [param.grad for param in params_of(optimizer) if param.grad is not None]


_GUARD = "found_inf"
"""Where torch's GradScaler puts the number that its optimisers ask before they step."""


def guards(optimizer: Optimizer) -> bool:
    """Say whether an optimiser's step can be switched off by a number on the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        return True
    return all(group.get("fused") for group in optimizer.param_groups)  # a copy forgets the mark


def begin_momentum(optimizer: Optimizer) -> None:
    """Give SGD the momentum of zero that its first step begins with.

    Fused, in torch 2.13, a first step that is not taken else leaves memory as it was found for the
    second to use; and a parameter whose first gradient comes later than others' is an error.
    With dampening torch's first step differs from the others; it stays as it is.
    """
    for group in optimizer.param_groups:
        if group.get("momentum") and group.get("dampening") == 0:
            for param in group["params"]:
                state = optimizer.state[param]
                if param.requires_grad and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param)


@contextmanager
def guard(optimizer: Optimizer, bad: Tensor | None) -> Generator[None]:
    """Let an optimiser take no step while a 0-d float32 tensor is 1, if it `guards` at all.

    In the block that number alone counts, after it the one before: fits may lie within fits.
    """
    state = vars(optimizer)
    before = state.pop(_GUARD, None)
    if bad is not None and guards(optimizer):
        begin_momentum(optimizer)
        state[_GUARD] = bad
    try:
        yield
    finally:
        state.pop(_GUARD, None)
        if before is not None:
            state[_GUARD] = before


def guard_also(optimizer: Optimizer, bad: Tensor, first: Tensor | None) -> Tensor:
    """Within `guard`, let a second number count too; return the first, to be given in next time."""
    first = vars(optimizer).get(_GUARD, torch.zeros_like(bad)) if first is None else first
    vars(optimizer)[_GUARD] = torch.maximum(first, bad)
    return first


def takes_one_gradient(optimizer: Optimizer, what: str) -> None:
    """Refuse LBFGS, which evaluates a batch several times itself, where `what` would be lost.

    Raises:
        SetupError: it is LBFGS.
    """
    if isinstance(optimizer, LBFGS):
        raise SetupError(
            "LBFGS evaluates a batch several times, past what was set for its gradient.",
            saw=f"LBFGS with {what}",
            do="leave one of them out.",
        )


def checked_lr(lr: float) -> float:
    """Return a learning rate that is one: a finite number, 0 or more; else raise SetupError."""
    if not isinstance(lr, (int, float, Tensor)) or not 0 <= lr < math.inf:
        raise SetupError("A learning rate must be a finite number, 0 or more.", saw=repr(lr))
    return lr


def hyper(group: dict[str, Any], name: str) -> float:
    """Return a hyper-parameter of one parameter group.

    "momentum" is also the first of Adam's `betas`.

    Raises:
        UnknownName: the optimiser has no such hyper-parameter.
    """
    if name == "momentum" and "betas" in group:
        return group["betas"][0]
    if name not in group or name == "params":
        known = [key for key in group if key != "params"]
        raise UnknownName(
            f"The optimiser has no hyper-parameter {name!r}.",
            saw=f"it has {', '.join(known)}",
            do=did_you_mean(name, known),
        )
    return group[name]


def set_hyper(group: dict[str, Any], name: str, value: float) -> None:
    """Set a hyper-parameter that `hyper` can read."""
    if name == "momentum" and "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group[name] = value


def has_momentum(group: dict[str, Any]) -> bool:
    """Say whether the optimiser carries a momentum that a schedule may move."""
    return "betas" in group or bool(group.get("momentum"))


def hyper_names(optimizer: Optimizer, names: Iterable[str]) -> list[str]:
    """Return what hyper-parameters are called on record: of several groups "lr/0", "lr/1".

    Groups that have a "role", and a "stage", see `roles.ByRole`, go by these: "lr/conv",
    "lr/conv 2".
    """
    groups = optimizer.param_groups
    labels = [f"{g['role']} {g['stage']}" if "stage" in g else g.get("role") for g in groups]
    if len(set(labels)) < len(groups) or None in labels:
        labels = [str(i) for i in range(len(groups))]
    return [name if len(groups) == 1 else f"{name}/{label}" for name in names for label in labels]


def hyper_values(optimizer: Optimizer, names: Iterable[str]) -> list[float]:
    """Return their values, in the order of `hyper_names`; of "lr" each group's own rate."""
    groups = optimizer.param_groups
    return [
        g[name] * factor(g, name) if name in g else hyper(g, name) for name in names for g in groups
    ]


def factor(group: dict[str, Any], name: str) -> float:
    """Return by what a group multiplies a hyper-parameter in a step; 1, but for "lr" in `Joint`."""
    return group.get("lr_factor", 1.0) if name == "lr" else 1.0


def check_trains(optimizer: Optimizer, model: nn.Module, offered: Iterable[nn.Parameter]) -> None:
    """Refuse an optimiser that would silently leave out what the model trains.

    Args:
        optimizer: may hold fewer parameters than it was offered; that was `opt_func`'s choice.
        model: what is to be trained.
        offered: the model's trainable parameters when the optimiser was made.

    Raises:
        SetupError: the optimiser holds none of the model's parameters, or a parameter became
            trainable since, by unfreezing or exchanging a layer.
    """
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise SetupError(
            "The optimiser holds none of the model's parameters, so nothing would be trained.",
            do="call learn.reset_optimizer() after exchanging the model.",
        )
    known = held | set(map(id, offered))
    trainable = [pair for pair in model.named_parameters() if pair[1].requires_grad]
    new = [name for name, param in trainable if id(param) not in known]
    if new:
        raise SetupError(
            "Parameters were unfrozen or exchanged since the optimiser was made, so it would not "
            "train them.",
            saw=", ".join(new[:4]) + (f" and {len(new) - 4} more" if len(new) > 4 else ""),
            do="call learn.reset_optimizer() first.",
        )
