"""BatchNorm: the norm that looks at the other items of the batch, and remembers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from ..tree import describe
from .module import Module
from .norms import check_channels, moments, per_channel, standardised
from .parameter import Parameter


class BatchNorm(Module):
    """Normalise every channel over the batch and all places (Ioffe and Szegedy, 2015).

    In training, mean and variance are those of the batch, and the gradient flows through them too:
    to move one value is to move the mean of all. In evaluation an answer must not depend on what
    else is in the batch, so there they are running averages from the training. These are buffers:
    they are no parameters, since no gradient moves them, but without them the model is worth
    nothing, so they must be saved with it and move with it.

    After each batch an average goes a step towards the new value, average += momentum · (new −
    average), which is `lerp`. What is called momentum here is the weight of the new value; the
    momentum of an optimiser is the weight of the old. So 0.1 is what is 0.9 there:

    >>> average = torch.tensor(3.0)
    >>> [round(average.lerp_(torch.tensor(new), 0.1).item(), 2) for new in (5.0, 4.0)]
    [3.2, 3.28]

    With few values a batch (2 images, a map of 1×1) its mean and variance are poor guesses, and
    training and evaluation differ widely.

    Args:
        n_channels: the second dimension of (n, c, ...): rows, sequences, images or volumes.
        eps: see `standardised`.
        momentum: weight of the new batch in the running averages.

    Attributes:
        running_mean, running_var: shape (c); the variance is the unbiased one, which divides by
            n − 1: this is a guess about all images from a sample of them.
        num_batches_tracked: how many there were; kept as torch keeps it, so that saved weights of
            one fit the other.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, n_channels: int, eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        self.weight = Parameter(torch.ones(n_channels))
        self.bias = Parameter(torch.zeros(n_channels))
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised, scaled and shifted; in training, note the batch's moments."""
        check_channels(x, len(self.weight))
        if self.training:
            mean, variance = moments(x, (0, *range(2, x.ndim)))
            self._remember(mean, variance, x)
        else:
            mean, variance = per_channel(self.running_mean, x), per_channel(self.running_var, x)
        y = standardised(x, mean, variance, self.eps)
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, x: Tensor) -> None:
        n = x.numel() // x.shape[1]
        if n < 2:
            raise DataError(
                "BatchNorm cannot train on a single value a channel.",
                saw=describe(x),
                do="use drop_last=True or another batch size.",
            )
        unbiased = variance * (n / (n - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running.to(new.dtype).lerp(new.flatten(), self.momentum))
        self.num_batches_tracked += 1

    def settings(self) -> str:
        """Return the momentum."""
        return f"momentum {self.momentum}"
