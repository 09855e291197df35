"""Who acts when, and what it changes: the timetable with names in it, and a recorded stretch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from ..binding import bind
from ..data import length
from ..events import TIMETABLE, Callback, CancelFit
from ..learner import Learner
from ..tree import leaves

_PARTS = {"forward": ("preds",), "compute_loss": ("loss",), "backward": (), "take_step": (),
          "zero_grad": ()}  # fmt: skip
"""The loop's own acts, and what it assigns from each; the rest of what they change is seen."""


def annotated_timetable(callbacks: Iterable[Callback]) -> str:
    """Return the timetable as text, each callback beside the moments and spans it hears."""
    handlers, spans = bind(callbacks)
    acting = {
        name: [type(callback).__name__ for callback, _ in hearers]
        for name, hearers in (handlers | spans).items()
        if hearers
    }
    lines = TIMETABLE.strip("\n").splitlines()
    width = max(map(len, lines)) + 2
    return "\n".join(
        f"{line:<{width}}← {', '.join(acting[line.strip()])}" if line.strip() in acting else line
        for line in lines
    )


@dataclass(frozen=True)
class Act:
    """One thing that happened: when or what, who acted, what it changed, how long it took."""

    event: str
    by: str
    changed: tuple[str, ...]
    microseconds: float


class Trace(list[Act]):
    """What happened in some batches, in order; prints as a table."""

    def __repr__(self) -> str:
        rows = [("event", "by", "changed", "µs")]
        rows += [
            (a.event, a.by, ", ".join(a.changed) or "-", f"{a.microseconds:.0f}") for a in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def trace(learn: Learner, n: int) -> Trace:
    """Train `n` batches, note every act, and undo it all.

    The learner's callbacks act on copies of themselves. Looking for what changed takes time
    between the acts, not in the microseconds shown.

    Args:
        learn: left as it is.
        n: number of training batches.
    """
    acts = Trace()
    with learn.untouched():
        learn.fit(math.ceil(n / (length(learn.data.train) or 1)), callbacks=[_Tracer(acts, n)])
    return acts


class _Tracer(Callback):
    order = -1000
    shows_progress = True

    def __init__(self, acts: Trace, n: int):
        self._acts, self._left = acts, n

    def before_fit(self, learn: Learner) -> None:
        for part, assigned in _PARTS.items():  # now, when those are in place that replace a part
            act = getattr(learn, part)
            setattr(learn, part, _noted(self._acts, learn, part, "loop", act, assigned))
        for moment, handlers in learn.handlers.items():
            learn.handlers[moment] = [
                (callback, self._watched(learn, moment, callback, handler))
                for callback, handler in handlers
            ]

    def after_batch(self, learn: Learner) -> None:
        self._left -= learn.training
        if not self._left:
            raise CancelFit

    def _watched(
        self, learn: Learner, moment: str, callback: Callback, handler: Callable[..., Any]
    ) -> Callable[..., Any]:
        if callback is self:
            return handler
        return _noted(self._acts, learn, moment, type(callback).__name__, handler)


def _noted(
    acts: Trace,
    learn: Learner,
    event: str,
    by: str,
    act: Callable[..., Any],
    assigned: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Wrap an act so that it is timed, and the state before and after it compared."""

    def noted(*args: Any) -> Any:
        before = _state(learn)
        began = perf_counter()
        try:
            return act(*args)
        finally:
            took = (perf_counter() - began) * 1e6
            after = _state(learn)
            changed = assigned + tuple(n for n in after if after[n] != before.get(n))
            acts.append(Act(event, by, changed, took))

    return noted


def _state(learn: Learner) -> dict[str, Any]:
    """Return what tells that something changed: identities, versions and plain values."""
    state: dict[str, Any] = {}
    for name in ("x", "y", "preds", "loss"):
        tensors = [leaf for leaf in leaves(getattr(learn, name)) if isinstance(leaf, Tensor)]
        state[name] = [(id(tensor), tensor._version) for tensor in tensors]
    params = list(learn.model.parameters())
    # by value: a fused optimiser's step does not count as a new version
    state["weights"] = [param.detach().double().norm().item() for param in params]
    state["buffers"] = [buffer.double().norm().item() for buffer in learn.model.buffers()]
    grads = [param.grad for param in params]
    state["gradients"] = [None if grad is None else (id(grad), grad._version) for grad in grads]
    for i, group in enumerate(learn.opt.param_groups):
        for name, value in group.items():
            if name != "params":
                state[name if len(learn.opt.param_groups) == 1 else f"{name}/{i}"] = value
    return state
