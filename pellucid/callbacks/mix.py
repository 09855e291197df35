"""Training on mixtures of two items: mixup and cutmix."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import mixing, tree
from ..errors import SetupError, are_numbers
from ..events import Callback
from ..learner import Learner
from ..randomness import checked_seed

Where = tuple[int, int, int]
"""Seed, epoch (of all fits on record) and batch: on these the draws depend, and on nothing else."""


class _Mix(Callback):
    """Mix training batches, and let the loss be that of the mixture until the batch is over."""

    changes = True

    def __init__(self, alpha: float, seed: int):
        if not are_numbers(alpha) or not 0 < alpha < math.inf:
            raise SetupError(f"{type(self).__name__} takes an alpha above 0.", saw=repr(alpha))
        self.alpha, self.seed = alpha, checked_seed(seed)

    @abstractmethod
    def _mixed(self, x: Any, where: Where) -> tuple[Any, float, int]:
        """Return the inputs mixed, each item's own share, and how far its partner is before it."""

    @contextmanager
    def around_batch(self, learn: Learner) -> Generator[None]:
        """Put the loss back at the end of the batch."""
        loss_func = learn.loss_func
        try:
            yield
        finally:
            learn.loss_func = loss_func

    def before_batch(self, learn: Learner) -> None:
        """Mix the batch and its loss."""
        if not learn.training:
            return
        where = self.seed, len(learn.record.epochs), learn.batch_index
        learn.x, share, by = self._mixed(learn.x, where)
        learn.y, share, by = mixing.dominant(learn.y, share, by)
        plain, mixed = learn.loss_func, mixing.mixed_loss(learn.loss_func, share, by)
        # a look from within the batch validates by the plain loss
        learn.loss_func = lambda *given: (mixed if learn.training else plain)(*given)


class MixUp(_Mix):
    """Train on mixtures of two items and of their losses (Zhang et al., 2018, "mixup").

    In every training batch an item becomes share · item + (1 - share) · partner, and the loss is
    mixed alike, whatever it is (a mean over the batch). The share is one number from
    Beta(alpha, alpha) a batch, as in the paper's own code. Share and partners depend on (seed,
    epoch, batch) alone; in many processes each pairs the items of its own part.

    Training losses on record are those of mixtures, and higher. Metrics see the target of the
    greater part; training accuracy says how often that is recognised. Validation is plain.

    Args:
        alpha: above 0; a small one leaves most batches nearly as they are, 1 makes all shares
            equally likely.
        seed: any integer.

    Raises:
        SetupError: alpha is not above 0; or, in the fit, the inputs are no floats.
    """

    def __init__(self, alpha: float = 0.4, seed: int = 0):
        super().__init__(alpha, seed)

    def _mixed(self, x: Any, where: Where) -> tuple[Any, float, int]:
        share, by = mixing.draw_pairing(*where, tree.n_items(x), self.alpha)
        for leaf in tree.leaves(x):
            if not isinstance(leaf, Tensor) or not torch.is_floating_point(leaf):
                raise SetupError(
                    "MixUp adds inputs, so they must be floats.",
                    saw=tree.describe(x),
                    do="make floats of bytes (data.Normalize); words cannot be mixed.",
                )
        return tree.map_leaves(lambda leaf: mixing.mixup(leaf, share, by), x), share, by


class CutMix(_Mix):
    """Train on items with a box of another pasted in, losses mixed by area (Yun et al., 2019).

    The area outside is drawn from Beta(alpha, alpha), the place evenly; what sticks out is cut off,
    and the true share counts. One box a batch, as in the paper's own code. Images (n, c, h, w) are
    cut along h and w, volumes in three dimensions, signals (n, c, length) and rows (n, length)
    along the length. All else is as with `MixUp`; with both, batches are mixed twice.

    Args:
        alpha: above 0; the paper takes 1, all areas equally likely.
        seed: any integer. The draws are not those of `MixUp` with the same seed.

    Raises:
        SetupError: alpha is not above 0; or, in the fit, the input is not one tensor (n, ...).
    """

    def __init__(self, alpha: float = 1.0, seed: int = 0):
        super().__init__(alpha, seed)

    def _mixed(self, x: Any, where: Where) -> tuple[Any, float, int]:
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise SetupError(
                "CutMix cuts one tensor (n, length) or (n, c, ...).", saw=tree.describe(x)
            )
        own = (where[0] ^ 0x9E3779B97F4A7C15, *where[1:])  # another stream than MixUp's
        share, by = mixing.draw_pairing(*own, len(x), self.alpha)
        sizes = x.shape[min(2, x.ndim - 1) :]
        middle = mixing.draws(*own, 2 + len(sizes))[2:]  # the first two were for the pairing
        box, share = mixing.cut_box(sizes, share, middle)
        return mixing.cutmix(x, box, by), share, by
