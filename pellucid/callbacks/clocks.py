"""Where the time of a fit goes: its start, waiting for data, computing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter

from ..distributed import is_first
from ..events import Callback
from ..learner import Learner

_BOUND = 0.2
"""Share of the time from which on waiting for data is worth mending."""


class Clocks(Callback):
    """Measure what a fit spends on its start and on waiting for batches, and say it after an epoch.

    The start ("cold") is all until the first training batch is over: what is compiled, allocated
    or read then does not come again. Of the rest ("warm") the training passes are divided: the time
    in which the loop waits for its loader, and all else. On a GPU that is behind, the loop
    waits for the GPU, and not for data; so this holds there too.

    Args:
        show: print the verdict after the first epoch.

    Attributes:
        cold: seconds of the start; None before.
        warm: seconds of the training passes without it.
        waiting: of these, seconds in which the loop waited for the loader.
    """

    order = -1000  # the batch comes before anything is done with it
    comes_last = ("before_train", "after_batch", "after_cancel_epoch")

    def __init__(self, show: bool = True):
        self.show = show
        self.cold: float | None = None
        self.warm = self.waiting = 0.0
        self._began = self._asked = 0.0
        self._came: float | None = None

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Set the clocks to zero."""
        self.cold, self.warm, self.waiting = None, 0.0, 0.0
        self._began = perf_counter()
        yield

    def before_train(self, learn: Learner) -> None:
        """Ask for the first batch of a pass."""
        self._asked = perf_counter()

    @contextmanager
    def around_batch(self, learn: Learner) -> Generator[None]:
        """Note when a batch is there."""
        self._came = perf_counter()
        yield

    def after_batch(self, learn: Learner) -> None:
        """Take the time of a batch, all that was done with it included; ask for the next."""
        came, self._came, done = self._came, None, perf_counter()
        if came is None or not learn.training:
            return
        if self.cold is None:
            self.cold = done - self._began
        else:
            self.waiting += came - self._asked
            self.warm += done - self._asked
        self._asked = done

    def after_cancel_epoch(self, learn: Learner) -> None:
        """Take the time of the batch in which the pass was left."""
        self.after_batch(learn)

    def after_epoch(self, learn: Learner) -> None:
        """Say what was found in the first epoch."""
        if self.show and learn.epoch == 0 and is_first():
            print(self.verdict, flush=True)

    @property
    def verdict(self) -> str:
        """What decides the pace, in one line."""
        if self.cold is None or not self.warm:
            return "too few batches to tell what decides the pace"
        share = self.waiting / self.warm
        start = f"the first batch took {self.cold:.2f} s"
        if share < _BOUND:
            return f"compute-bound: {share:.0%} of the time is waiting for data; {start}"
        return (
            f"data-bound: {share:.0%} of the time is waiting for data, which more workers, smaller "
            f'images or images kept decoded (cache="memory" or "disk") would shorten; {start}'
        )
