"""Initial weights by formula: Kaiming, Xavier, orthogonal; biases begin at zero."""

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import SetupError, UnknownName, did_you_mean
from ..hooks import find

WeightLayer = nn.Linear | nn.modules.conv._ConvNd
"""The layers meant in this package; the second is what all convolutions of torch's are."""

_OF_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear
"""What holds the last weights of torch's attention, which never calls it."""


def init_kaiming(model: nn.Module, a: float = 0.0, uniform: bool = False, fan: str = "in") -> None:
    """Draw weights so that (leaky) ReLU layers keep the signal's size (He et al., 2015).

    Their standard deviation is √(2 / (1 + a²)) / √fan.

    Args:
        model: all its layers are set, in place.
        a: slope of the activation below zero: 0 for ReLU, 0.1 for `GeneralReLU(leak=0.1)`, 1 for
            none and for SELU (the gain is then 1, LeCun's). torch's own layers begin with √5.
        uniform: draw from a uniform distribution instead of a normal one.
        fan: "in" keeps the size of activations on the way forward, "out" that of gradients on the
            way back.

    Raises:
        SetupError: the model has no such layers, or the weight of one is computed by a hook.
        UnknownName: `fan` is neither "in" nor "out".
    """
    if fan not in ("in", "out"):
        raise UnknownName(f"There is no fan {fan!r}.", do=did_you_mean(fan, ["in", "out"]))
    for layer in weight_layers(model).values():
        size = fans(layer)[fan == "out"]
        _draw(layer, math.sqrt(2 / (1 + a**2) / max(size, 1)), uniform)


def init_xavier(model: nn.Module, gain: float = 1.0, uniform: bool = False) -> None:
    """Draw weights midway between the wishes of forward and backward (Glorot & Bengio, 2010).

    Their standard deviation is gain √(2 / (fan in + fan out)).

    Args:
        model: all its layers are set, in place.
        gain: what the activation takes from the signal; see `nn.gain_of`.
        uniform: draw from a uniform distribution instead of a normal one.

    Raises:
        SetupError: the model has no such layers, or the weight of one is computed by a hook.
    """
    for layer in weight_layers(model).values():
        _draw(layer, gain * math.sqrt(2 / max(sum(fans(layer)), 1)), uniform)


def init_orthogonal(model: nn.Module, gain: float = 1.0) -> None:
    """Draw weights as random orthogonal matrices, which keep every length (Saxe et al., 2014).

    The weights of a convolution are taken as a matrix (first dimension, all others); where it is
    not square, its rows or its columns, the fewer, are orthogonal.

    Args:
        model: all its layers are set, in place.
        gain: multiplies the weights; √2 for ReLU, see `nn.gain_of`.

    Raises:
        SetupError: the model has no such layers, or the weight of one is computed by a hook.
    """
    for layer in weight_layers(model).values():
        wide = torch.promote_types(layer.weight.dtype, torch.float32)  # QR knows no half precision
        _set(layer, nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=wide), gain))


def fans(layer: WeightLayer) -> tuple[int, int]:
    """Return how many values of the input meet in one of the output, and the other way round.

    Channels of one group times the kernel's size; strides and borders are not considered.

    >>> fans(nn.Conv2d(1, 32, 5))
    (25, 800)
    """
    first, second, *kernel_sizes = layer.weight.shape
    kernel = math.prod(kernel_sizes)
    if isinstance(layer, nn.Linear):
        return second, first
    if layer.transposed:  # weight (in, out / groups, ...)
        return first // layer.groups * kernel, second * kernel
    return second * kernel, first // layer.groups * kernel


def weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    """Return the layers meant in this package by name, each once, in the order of definition.

    Raises:
        SetupError: there are none, or the weight of one cannot be set.
    """
    found = find(model, lambda module: not isinstance(module, _OF_ATTENTION))
    layers = {name: layer for name, layer in found.items() if isinstance(layer, WeightLayer)}
    if not layers:
        raise SetupError(
            "There is no Linear and no convolution to initialise.",
            saw=f"{type(model).__module__}.{type(model).__name__}",
            do="give a model with layers of torch.nn; all others set their weights themselves.",
        )
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None and is_lazy(weight):
            raise SetupError(
                f"The size of {shown(name)} is not known yet.",
                saw=repr(layer),
                do="call the model with a batch first.",
            )
        if weight is None and not is_parametrized(layer, "weight"):
            raise SetupError(
                f"The weight of {shown(name)} cannot be set: a hook computes it.",
                saw=repr(layer),
                do="use torch.nn.utils.parametrizations, or initialise before that.",
            )
    return layers


def shown(name: str) -> str:
    """Return a module's name, for people: the model itself has an empty one."""
    return name or "the model"


def set_values(layer: WeightLayer, name: str, values: Tensor) -> None:
    """Put values into a layer's weight or bias, in place; through a parametrization if need be."""
    with torch.no_grad():
        if is_parametrized(layer, name):
            setattr(layer, name, values)
        else:
            getattr(layer, name).copy_(values)


def _draw(layer: WeightLayer, sd: float, uniform: bool) -> None:
    values = torch.empty_like(layer.weight)
    half_width = math.sqrt(3) * sd
    _set(layer, values.uniform_(-half_width, half_width) if uniform else values.normal_(0, sd))


def _set(layer: WeightLayer, weight: Tensor) -> None:
    set_values(layer, "weight", weight)
    if layer.bias is not None:
        set_values(layer, "bias", torch.zeros_like(layer.bias))
