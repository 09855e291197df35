"""What a batch of inputs goes through on the device before the model sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import SetupError

_SLICE = 2**22  # values that are float64 at a time


class Normalize:
    """Make floats of pixels, with mean 0 and standard deviation 1 over the data: (x - mean) / std.

    uint8 counts as 0 to 1 (divided by 255), and so do `mean` and `std` for it. Images (n, c, h, w)
    are normalised by channel, anything else by one number. The statistics follow the batch to
    its device.

    Args:
        mean: one number, or one a channel.
        std: likewise, above 0.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]):
        self.mean, self.std = torch.as_tensor(mean).float(), torch.as_tensor(std).float()
        if not bool((self.std > 0).all()):
            raise SetupError(
                "Normalising divides by the standard deviation, which must be above 0.",
                saw=f"std {self.std.tolist()}",
                do="a constant channel carries nothing: leave it out.",
            )

    @classmethod
    def of(cls, x: Tensor | np.ndarray) -> Normalize:
        """Take the statistics of inputs (n, ...): one batch, which is usually enough, or all data.

        Sums run in float64, a slice of the data at a time.
        """
        x = torch.as_tensor(x)
        dims = (0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim))
        total = squares = torch.zeros((), dtype=torch.float64)
        scale = 255 if x.dtype == torch.uint8 else 1
        for part in x.split(max(_SLICE // max(x[:1].numel(), 1), 1)):
            values = part.double() / scale
            total, squares = total + values.sum(dims), squares + values.square().sum(dims)
        n = x.numel() / total.numel()
        mean = total / n
        variance = squares / n - mean.square()
        variance[variance < 1e-12 * mean.square()] = 0  # a constant channel, but for rounding
        return cls(mean.tolist(), variance.sqrt().tolist())

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` normalised, as floats."""
        mean, std = self._on(x)
        if x.dtype == torch.uint8:  # x / 255 folded into the factor, then in place: two passes
            return x.float().mul_(1 / (255 * std)).sub_(mean / std)
        return (x - mean) / std

    def undo(self, x: Tensor) -> Tensor:
        """Return what was normalised, as floats: 0 to 1 for pixels."""
        mean, std = self._on(x)
        return x * std + mean

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std on the device of `x`, shaped to stretch along it."""
        if self.mean.device != x.device:
            self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)
        shape = (-1, 1, 1) if self.mean.ndim else ()
        return self.mean.view(shape), self.std.view(shape)

    def __repr__(self) -> str:
        numbers = [np.round(t.tolist(), 4).tolist() for t in (self.mean, self.std)]
        return f"Normalize({numbers[0]}, {numbers[1]})"


class Reshape:
    """Give each item another shape: `Reshape(1, 28, 28)` makes (n, 1, 28, 28) of (n, 784)."""

    def __init__(self, *shape: int):
        self.shape = shape

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, ...) as (n, *shape)."""
        return x.view(x.shape[0], *self.shape)

    def __repr__(self) -> str:
        return f"Reshape{self.shape}"


class PerSample(ABC):
    """What changes each sample of a batch by random numbers of its own, on the batch's device.

    A subclass says how many numbers it wants for each sample and what it does with them:

        class Dim(PerSample):
            n_draws = 1

            def apply(self, x, draws):
                return x * (0.5 + 0.5 * draws.view(-1, 1, 1, 1))

    Whoever calls may hand in the numbers, as `pellucid.randomness.uniforms(seed, epoch, items,
    n_draws)` makes them: then a sample changes alike in whatever batch it comes.

    Attributes:
        takes_bytes: False gives `apply` uint8 batches as floats from 0 to 1, as `Normalize` counts
            them; True as they are.
    """

    takes_bytes = False

    @property
    @abstractmethod
    def n_draws(self) -> int:
        """How many numbers each sample needs: `n_draws = 3` in the class will do."""

    @abstractmethod
    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Return the batch `x` (n, ...) changed by `draws` (n, n_draws), float32 in [0, 1)."""

    def __call__(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the batch `x` (n, ...) changed.

        Args:
            x: the batch.
            draws: (n, n_draws) float32 in [0, 1), where `x` is; None draws them from torch's
                global generator.
        """
        shape = (len(x), self.n_draws)
        if draws is None:
            draws = torch.rand(shape, dtype=torch.float32, device=x.device)
        elif (draws.shape, draws.dtype, draws.device) != (shape, torch.float32, x.device):
            raise SetupError(
                f"{type(self).__name__} needs {self.n_draws} float32 numbers for each sample, on "
                "the batch's device.",
                saw=f"draws {tuple(draws.shape)} of {draws.dtype} on {draws.device}, a batch of "
                f"{len(x)} on {x.device}",
                do=f"give draws of shape {shape}, or none to have them drawn.",
            )
        if x.dtype == torch.uint8 and not self.takes_bytes:
            x = x.float().mul_(1 / 255)
        return self.apply(x, draws)
