"""Steppers: what makes one optimiser differ from another, one idea each.

The gradient says in which direction the loss grows. Every optimiser goes the other way,
w −= lr · direction, and they differ in what they make of the gradient before. A stepper is one such
change: a function (direction, parameter, state, group) → direction. `state` is a dict that it may
keep what it likes in, one a parameter; `group` holds the hyper-parameters. An optimiser is a list
of them:

| optimiser                | its steppers                          |
|--------------------------|---------------------------------------|
| SGD                      | none                                  |
| SGD with momentum and L2 | add_decay, add_momentum               |
| Adam                     | add_decay, divide_by_spread           |
| AdamW                    | divide_by_spread, add_decay           |
| LAMB                     | divide_by_spread, add_decay, to_scale |

The whole difference between Adam and AdamW is the order: decay before it is *coupled*, a part of
the gradient that gets divided like the rest of it; after it is *decoupled*, w shrinks by lr · decay
however large its gradient is.
"""

from typing import Any

import torch
from torch import Tensor


def add_decay(
    direction: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """Return direction + weight_decay · w: pull every weight towards zero.

    It is the gradient of weight_decay / 2 · Σ w² added to the loss.
    """
    decay = group["weight_decay"]
    return direction.add(param, alpha=decay) if decay else direction


def add_momentum(
    direction: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """Return momentum · (what this returned last time) + direction: go on like a heavy ball.

    Where directions agree, this grows to 1 / (1 − momentum) times as much; where they change to and
    fro, they cancel. It begins with the first direction itself.
    """
    if not group["momentum"]:
        return direction
    if "velocity" not in state:
        state["velocity"] = direction.clone()
    else:
        state["velocity"].mul_(group["momentum"]).add_(direction)
    return state["velocity"]


def moving_average(state: dict[str, Any], name: str, value: Tensor, beta: float, n: int) -> Tensor:
    """Move the average kept as state[name] towards a value, and return it *debiased*.

    The average ← beta · average + (1 − beta) · value begins at 0, and for a while is too near to
    it: after n values their weights sum to 1 − betaⁿ only. Divided by this sum, it is right from
    the first value on, where it is that value.

    Args:
        state: of a parameter.
        name: under which the average is kept there.
        value: the n-th, counted from 1.
        beta: weight of the old average; 1 / (1 − beta) is about how many values count.
        n: see `value`.
    """
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, 1 - beta) / (1 - beta**n)


def divide_by_spread(
    direction: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """Return m / (√v + eps), m and v the averages of direction and direction² (Adam).

    A weight whose gradients agree moves by about lr, however small they are; one whose gradients
    change their sign moves less (Kingma and Ba, 2015, algorithm 1).
    """
    state["step"] = state.get("step", 0) + 1
    m = moving_average(state, "average", direction, group["betas"][0], state["step"])
    v = moving_average(
        state, "average_square", direction.square(), group["betas"][1], state["step"]
    )
    return m / (v.sqrt() + group["eps"])


def to_scale(
    direction: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """Return ‖w‖ · direction / ‖direction‖, both norms over the whole parameter (LAMB).

    So each layer moves by the same share of its own size, lr, which lets batches be very large (You
    et al., 2020, algorithm 2, with φ(z) = z). Where one of the norms is 0 nothing is scaled.
    """
    size, length = param.norm(), direction.norm()
    scale = torch.where((size > 0) & (length > 0), size / length, 1.0)
    return direction * scale
