"""Two networks against each other, as one model for one loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import SetupError


class GAN(nn.Module):
    """A generator and a critic; what goes through depends on whose turn it is.

    In the critic's turn the model is the critic, in the generator's the generator and then the
    critic (Goodfellow et al., 2014). `callbacks.TakeTurns` says whose turn it is.

    Args:
        generator: from noise (n, n_noise) to what the data are like.
        critic: from that to a score an item, (n).
        n_noise: numbers that an item is made of, from N(0, 1).

    Attributes:
        turn: "critic" or "generator".
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, n_noise: int):
        super().__init__()
        if n_noise < 1:
            raise SetupError("An item is made of 1 number or more.", saw=f"n_noise={n_noise}")
        self.generator, self.critic, self.n_noise = generator, critic, n_noise
        self.turn = "critic"

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of items, or of what is made of noise."""
        return self.critic(x if self.turn == "critic" else self.generator(x))

    def noise(self, like: Tensor) -> Tensor:
        """Return noise for as many items as a batch has, (n, n_noise), from torch's generator."""
        return torch.randn(len(like), self.n_noise, device=like.device)


def gan_batch(model: nn.Module, real: Any, turn: str) -> tuple[Tensor, Tensor]:
    """Return what a `GAN` is given in a turn: inputs, and 1 or -1 for what is to score high or low.

    For the critic that is real items and as many made ones; for the generator noise.
    """
    if not isinstance(model, GAN):
        raise SetupError("gan_batch is for a GAN.", saw=type(model).__name__)
    model.turn, noise = turn, model.noise(real)
    ones = noise.new_ones(len(noise))
    if turn == "generator":
        return noise, ones
    with torch.no_grad():
        made = model.generator(noise)
    return torch.cat([real, made]), torch.cat([ones, -ones])


def wasserstein(scores: Tensor, wish: Tensor) -> Tensor:
    """Return the loss of a Wasserstein GAN (Arjovsky et al., 2017): -mean(score · wish).

    Args:
        scores: (n), the critic's.
        wish: (n), 1 where the score should be high, -1 where it should be low.
    """
    return -(scores * wish).mean()
