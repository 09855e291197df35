"""The learning-rate finder: train with ever larger rates, see where it goes well, undo it all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..data import length
from ..errors import SetupError
from ..events import Callback, CancelFit, heard
from ..learner import Learner
from ..schedules import exponential

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.9
"""Weight of the past in the smoothed loss: a rate is judged by about ten batches."""

_CLEAR_FALL = 0.05
"""Share by which the smoothed loss must fall for a rate to be suggested."""


@dataclass(frozen=True)
class LRSearch:
    """What a search saw.

    Attributes:
        lrs: array (n,), the rates tried.
        losses: array (n,), the training loss at each, before the step with it.
        smoothed: array (n,), the same, smoothed.
        suggestion: a rate for `fit_one_cycle`: where the smoothed loss falls steepest against the
            logarithm of the rate; None where it does not fall by a twentieth.
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None

    def plot(self) -> Figure:
        """Draw the curve and the suggestion."""
        from ..plots import plot_lr_search

        return plot_lr_search(self.lrs, self.losses, self.smoothed, self.suggestion)

    def __repr__(self) -> str:
        if self.suggestion is None:
            return f"LRSearch({len(self.lrs)} rates; the loss never falls: no suggestion)"
        return f"LRSearch({len(self.lrs)} rates; suggestion {self.suggestion:.2g})"


def find_lr(learn: Learner, start: float = 1e-6, end: float = 10, steps: int = 100) -> LRSearch:
    """Train up to `steps` batches with rates from `start` to `end`, and undo it.

    The rates grow by the same factor from batch to batch, in all parameter groups, through as many
    epochs as it takes (Smith, "Cyclical learning rates", 2017). The search ends at the last rate,
    or when the smoothed loss is four times the best or no number. Callbacks that act inside a
    batch and change it, mixup for one, act on copies of themselves; others keep still.

    Args:
        learn: model, optimiser, record, random state and loaders are afterwards as before.
        start: first rate, above 0.
        end: last rate, above `start`.
        steps: number of rates, 2 or more.
    """
    if not 0 < start < end or steps < 2:
        raise SetupError(
            "A search needs 0 < start < end and two steps or more.",
            saw=f"start {start:g}, end {end:g}, steps {steps}",
        )
    sweep = _Sweep(start, end, steps)
    with learn.untouched():
        learn.callbacks = [cb for cb in learn.callbacks if cb.changes and _acts_inside(cb)]
        learn.data.valid = None
        learn.fit(math.ceil(steps / (length(learn.data.train) or 1)), callbacks=[sweep])
    lrs, losses, smoothed = map(np.array, (sweep.lrs, sweep.losses, sweep.smoothed))
    return LRSearch(lrs, losses, smoothed, _suggest(lrs, smoothed))


class _Sweep(Callback):
    order = 998  # the last word about the rate
    changes = True
    shows_progress = True  # a search is short

    def __init__(self, start: float, end: float, steps: int):
        self.schedule, self.steps = exponential(start, end), steps
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._average = 0.0

    def before_batch(self, learn: Learner) -> None:
        self._lr = self.schedule(len(self.lrs) / (self.steps - 1))
        for group in learn.opt.param_groups:
            group["lr"] = self._lr

    def after_loss(self, learn: Learner) -> None:
        loss = learn.loss.item()
        if not math.isfinite(loss):
            raise CancelFit
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        self.lrs.append(self._lr)
        self.losses.append(loss)
        self.smoothed.append(self._average / (1 - _SMOOTHING ** len(self.lrs)))
        low = min(self.smoothed)  # "four times the best", for losses below 0 as well
        blown_up = self.smoothed[-1] - low > 3 * max(abs(low), abs(self.smoothed[0] - low))
        if len(self.lrs) == self.steps or blown_up:
            raise CancelFit


def _acts_inside(callback: Callback) -> bool:
    inside = ("batch", "forward", "predict", "loss", "backward", "step")
    return any(name.endswith(inside) for name in heard(callback))


def _suggest(lrs: np.ndarray, smoothed: np.ndarray) -> float | None:
    begin = len(smoothed) // 10  # until then the average has too little to average
    lrs, smoothed = lrs[begin:], smoothed[begin:]
    lowest = int(smoothed.argmin()) if len(smoothed) else 0
    if lowest < 2 or smoothed[:lowest].max() - smoothed[lowest] < _CLEAR_FALL * abs(smoothed[0]):
        return None
    slopes = np.gradient(smoothed[: lowest + 1], np.log(lrs[: lowest + 1]))
    return float(lrs[slopes.argmin()]) if slopes.min() < 0 else None
