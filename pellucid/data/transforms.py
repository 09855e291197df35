"""What a batch of inputs goes through on the device before the model sees it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import SetupError


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
        for part in x.split(4096):
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
