"""Training items mixed in pairs: mixup and cutmix, and the loss of what has two targets.

The partner of an item is the one `by` places before it in the batch, around its end: the order of
a batch is random already, so a roll pairs at random, and no item with itself. Two rolls may be done
in either order, so mixing twice has right targets too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from .tree import map_leaves

_MASK = 2**64 - 1


def mixup(x: Tensor, share: float, by: int) -> Tensor:
    """Return share · x + (1 - share) · partner, item by item (Zhang et al., 2018).

    Args:
        x: items (n, ...), floats.
        share: of each item itself, 0 to 1.
        by: the partner of item i is item i - by, around the end.
    """
    return x.roll(by, 0).lerp_(x, share)


def cutmix(x: Tensor, box: tuple[slice, ...], by: int) -> Tensor:
    """Return items with a box of their partner's pasted in (Yun et al., 2019).

    Args:
        x: items (n, ..., *sizes), any dtype.
        box: where, a slice for each of the last dimensions; see `cut_box`.
        by: the partner of item i is item i - by, around the end.
    """
    mixed, place = x.clone(), (..., *box)
    mixed[place] = x[place].roll(by, 0)
    return mixed


def cut_box(
    sizes: Sequence[int], share: float, middle: Sequence[float]
) -> tuple[tuple[slice, ...], float]:
    """Return a box of the sizes' own proportions, and the share of all places left outside it.

    Args:
        sizes: of the dimensions that are cut, (h, w) for images.
        share: of the places that shall stay outside, 0 to 1.
        middle: of the box, one number in [0, 1) for each size; what sticks out is cut off, so
            that a larger share may stay.

    Returns:
        A slice for each size, and the true share.
    """
    side = (1 - share) ** (1 / len(sizes))
    box = []
    for size, place in zip(sizes, middle, strict=True):
        first = int(place * size) - int(side * size) // 2
        box.append(slice(max(first, 0), min(first + int(side * size), size)))
    inside = math.prod(part.stop - part.start for part in box) / math.prod(sizes)
    return tuple(box), 1 - inside


def mixed_loss(loss_func: Callable[..., Tensor], share: float, by: int) -> Callable[..., Tensor]:
    """Return the loss of mixed items: share · their own + (1 - share) · that by their partners.

    This is right for any loss that is a mean over the batch. For cross entropy it is the loss of
    the mixed one-hot targets, for squared errors that of the mixed numbers and a constant.

    Args:
        loss_func: `(preds, *targets) -> 0-d tensor`.
        share: the weight of an item's own targets.
        by: as for `mixup`.
    """

    def loss(preds: Any, *targets: Any) -> Tensor:
        partners = map_leaves(lambda leaf: _rolled(leaf, by), targets)
        return share * loss_func(preds, *targets) + (1 - share) * loss_func(preds, *partners)

    return loss


def dominant(y: Any, share: float, by: int) -> tuple[Any, float, int]:
    """Return targets, share and roll so that an item's own target is the one with more weight.

    The mixture is the same: who has less than half changes places with the partner. So metrics
    that know one target an item, accuracy for one, see that of the greater part.
    """
    if share >= 0.5:
        return y, share, by
    return map_leaves(lambda leaf: _rolled(leaf, by), y), 1 - share, -by


def _rolled(leaf: Any, by: int) -> Any:
    return leaf.roll(by, 0) if isinstance(leaf, Tensor) and leaf.ndim else leaf


def draw_pairing(seed: int, epoch: int, batch: int, n: int, alpha: float) -> tuple[float, int]:
    """Draw how a batch of n items is mixed: the share, from Beta(alpha, alpha), and the roll.

    Both are a pure function of the arguments.

    Returns:
        The share of the item itself, 0 to 1, and a roll from 1 to n - 1 (0 if n is 1).
    """
    first, second = draws(seed, epoch, batch, 2)
    return beta_quantile(alpha, first), min(n - 1, 1 + int(second * (n - 1)))


def draws(seed: int, epoch: int, batch: int, n: int) -> list[float]:
    """Return n numbers in [0, 1) for a batch, a pure function of (seed, epoch, batch).

    Raw words of numpy's Philox, as the order of a data set is (`randomness.words`), but of counters
    that no order reaches: for one batch an eighth of the time of `randomness.uniforms`.
    """
    key = np.array([seed & _MASK, epoch & _MASK], dtype=np.uint64)
    counter = np.array([0, batch, 0, 1], dtype=np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw(n)
    return ((words >> np.uint64(40)) * 2.0**-24).tolist()


def beta_quantile(alpha: float, probability: float) -> float:
    """Return below what a number from Beta(alpha, alpha) lies with a probability, to about 1e-6.

    >>> [round(beta_quantile(1.0, p), 6) for p in (0.0, 0.25, 0.9)]
    [0.0, 0.25, 0.9]
    """
    lower = min(probability, 1 - probability)
    masses, places = _lower_half(alpha)
    # between two places the mass is nearly a straight line in (2 x) ** alpha
    x = float(np.interp(2 * lower, masses, places)) ** (1 / alpha) / 2
    return x if probability <= 0.5 else 1 - x


@cache
def _lower_half(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mass of the lower half of the distribution up to places of (2 x) ** alpha.

    In v = (2 x) ** alpha the density is (1 - x) ** (alpha - 1), finite for every alpha; in x it is
    infinite at 0 for alpha below 1. For alpha above 1 nearly all places of even v lie where there
    is no mass, so there they are even in x.
    """
    even = np.linspace(0, 1, 4097)
    if alpha <= 1:
        density = (1 - even ** (1 / alpha) / 2) ** (alpha - 1)
        places, masses = even, (density[1:] + density[:-1]) / 2
    else:
        nodes, weights = np.polynomial.legendre.leggauss(4)
        within = even[:-1, None] + (nodes + 1) / 2 * even[1]  # of 2 x
        places, masses = even**alpha, (within * (2 - within)) ** (alpha - 1) @ weights
    mass = np.concatenate([[0.0], np.cumsum(masses)])
    return mass / mass[-1], places
