"""Initialisation: random weights of the size that keeps a signal alive.

A weight that is too small makes the signal smaller in every layer, one too large lets it explode:
after a hundred layers nothing is left, or infinity. Each output of a layer is a sum of `fan_in`
products, and the variance of a sum of independent terms is the sum of their variances. So for
outputs as large as the inputs the weights must have variance 1 / fan_in.
"""

import math

import torch
from torch import Tensor


def fans(*shape: int) -> tuple[int, int]:
    """Return how many inputs an output is made of, and how many outputs an input goes to.

    Args:
        shape: of a weight: (outputs, inputs), for a convolution (outputs, inputs, height, width),
            where each input is met once for every place of the kernel.
    """
    places = math.prod(shape[2:])
    return shape[1] * places, shape[0] * places


def kaiming_normal(*shape: int) -> Tensor:
    """Return random weights for a layer that a ReLU follows: normal, variance 2 / fan_in.

    The ReLU loses half of the signal's power, hence the 2 (He et al., 2015, equation 10).
    """
    fan_in, _ = fans(*shape)
    return torch.randn(shape) * math.sqrt(2 / fan_in)


def xavier_normal(*shape: int) -> Tensor:
    """Return random weights for a layer without ReLU: normal, variance 2 / (fan_in + fan_out).

    What goes back is a sum too, of `fan_out` terms: a compromise between 1 / fan_in, which keeps
    the signal, and 1 / fan_out, which keeps the gradient (Glorot and Bengio, 2010, equation 12).
    """
    return torch.randn(shape) * math.sqrt(2 / sum(fans(*shape)))
