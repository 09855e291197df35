"""Stochastic depth: in training, items go without a branch at random (Huang et al., 2016)."""

import torch
from torch import Tensor, nn

from .errors import SetupError


def drop_items(x: Tensor, rate: float) -> Tensor:
    """Return a batch with whole items set to 0, each with a probability, the others made larger.

    By 1 / (1 - rate), so that the mean stays: nothing is to be corrected in evaluation.

    Args:
        x: (n, ...), floats.
        rate: 0 to below 1. The draws come from torch's generator, as those of dropout.
    """
    kept = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


class StochasticDepth(nn.Module):
    """Leave out a branch for some items in training (Huang et al., 2016); at the branch's end.

    As `drop_items` does. In evaluation nothing is left out. For blocks of one's own; those of
    `Residual` have it built in, see `nn.set_stochastic_depth`.

    Args:
        rate: probability that an item goes without the branch, 0 to below 1.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = checked_rate(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, in training without some of its items."""
        return drop_items(x, self.rate) if self.training and self.rate else x

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"{self.rate:g}"


def checked_rate(rate: float) -> float:
    """Return a rate that is one, 0 to below 1; else raise SetupError."""
    if not 0 <= rate < 1:
        raise SetupError("A branch is left out with a probability of 0 to below 1.", saw=f"{rate}")
    return rate
