"""Schedules at work: hyper-parameters that follow the fraction of the run."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch.optim import Optimizer

from .. import schedules
from ..binding import rivals
from ..data import length
from ..errors import SetupError, are_numbers
from ..events import Callback, in_order
from ..learner import Learner
from ..optim import (
    build_optimizer,
    checked_lr,
    factor,
    has_momentum,
    hyper,
    hyper_names,
    set_hyper,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Schedule(Callback):
    """Set a hyper-parameter of the optimiser before every training batch.

    The schedule sees `learn.progress`, the fraction of the run, so that neither the number of
    batches nor of epochs can bend it. When the fit ends, the value from before comes back.

    Args:
        name: "lr", "momentum" (for Adam the first beta), "weight_decay" or any other. Parameters
            that `roles.ByRole` trains without decay stay without.
        schedule: a function from [0, 1] to a value, or one for each parameter group.
    """

    changes = True

    def __init__(self, name: str, schedule: schedules.Schedule | Sequence[schedules.Schedule]):
        several = isinstance(schedule, Sequence) and all(map(callable, schedule))
        if not callable(schedule) and not several:
            raise SetupError(
                f"The schedule of {name} must be a function of the position, or several.",
                saw=repr(schedule),
                do="schedules.constant(0.1) makes one of a number.",
            )
        self.name, self.schedule = name, schedule
        self.decides = f"the schedule of {name}"

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Check that the schedule can run, and put the hyper-parameter back at the end."""
        groups = learn.opt.param_groups
        self._by_group(len(groups))
        self._spared = self._without_decay(groups)
        before = [hyper(group, self.name) for group in groups]
        learn.recorded = list(dict.fromkeys([*learn.recorded, self.name]))
        try:
            yield
        finally:
            for group, value in zip(groups, before, strict=False):  # a group may have come since
                set_hyper(group, self.name, value)

    def before_batch(self, learn: Learner) -> None:
        """Set the value for this batch."""
        if not learn.training:
            return
        if learn.n_batches is None:
            raise SetupError(
                f"A schedule of {self.name} must know how many batches there are.",
                saw=f"the training loader, {type(learn.data.train).__name__}, has no length",
                do="give it a __len__.",
            )
        groups = learn.opt.param_groups
        for group, schedule in zip(groups, self._by_group(len(groups)), strict=True):
            if id(group) not in self._spared:
                set_hyper(group, self.name, schedule(learn.progress))

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, schedules.Schedule]:
        """Return what will be set, by the name it has on record."""
        groups = opt.param_groups
        spared = self._without_decay(groups)
        own = [
            schedules.constant(0)
            if id(group) in spared
            else partial(_times, factor(group, self.name), schedule)
            for group, schedule in zip(groups, self._by_group(len(groups)), strict=True)
        ]
        return dict(zip(hyper_names(opt, [self.name]), own, strict=True))

    def _without_decay(self, groups: Sequence[dict[str, Any]]) -> set[int]:
        """Return the ids of groups that one schedule of weight decay for all leaves alone."""
        if self.name != "weight_decay" or isinstance(self.schedule, Sequence):
            return set()
        return {id(g) for g in groups if "role" in g and g.get("weight_decay") == 0}

    def _by_group(self, n_groups: int) -> Sequence[schedules.Schedule]:
        if not isinstance(self.schedule, Sequence):
            return [self.schedule] * n_groups
        if len(self.schedule) != n_groups:
            raise SetupError(
                f"The schedules of {self.name} must be one, or one for each parameter group.",
                saw=f"{len(self.schedule)} schedules, {n_groups} groups",
            )
        return list(self.schedule)


def _times(factor: float, schedule: schedules.Schedule, position: float) -> float:
    return factor * schedule(position)


class OneCycle(Callback):
    """Raise the learning rate and let it fall again, momentum the other way round.

    Smith and Topin, "Super-convergence", 2018, in the cosine form: lr / 25 to lr to lr / 1e5; and
    momentum (for Adam the first beta), if the optimiser has one, from high to low to high.

    Args:
        lr: the highest learning rate, or one for each parameter group.
        warmup: share of the run that rises, in (0, 1).
        momentum: its highest and its lowest value.
    """

    changes = True
    decides = "the schedule of lr"

    def __init__(
        self,
        lr: float | list[float] | tuple[float, ...],
        warmup: float = 0.25,
        momentum: tuple[float, float] = (0.95, 0.85),
    ):
        several = isinstance(lr, list | tuple)
        self.lr = [checked_lr(rate) for rate in lr] if several else checked_lr(lr)
        pair = tuple(momentum) if isinstance(momentum, Iterable) else ()
        if len(pair) != 2 or not are_numbers(*pair):
            raise SetupError(
                "OneCycle takes momentum's highest and lowest value.",
                saw=f"momentum={momentum!r}",
                do="momentum=(0.95, 0.85)",
            )
        self.warmup, self.momentum = warmup, momentum

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Choose what the optimiser has, and put it back at the end."""
        self._parts = self._choose(learn.opt)
        names = [part.name for part in self._parts]  # momentum too, if the optimiser has one
        for other, _ in learn.spans["around_fit"]:
            if isinstance(other, Schedule) and other.name in names:
                raise rivals(f"the schedule of {other.name}", self, other)
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.around_fit(learn))
            yield

    def before_batch(self, learn: Learner) -> None:
        """Set learning rate and momentum for this batch."""
        if learn.training:
            for part in self._parts:
                part.before_batch(learn)

    def curves(self, opt: Optimizer, epochs: int) -> dict[str, schedules.Schedule]:
        """Return what will be set, by the name it has on record."""
        parts = self._choose(opt)
        return {name: c for part in parts for name, c in part.curves(opt, epochs).items()}

    def _choose(self, opt: Optimizer) -> list[Schedule]:
        rates = self.lr if isinstance(self.lr, list) else [self.lr] * len(opt.param_groups)
        lr = Schedule("lr", [schedules.one_cycle(rate, warmup=self.warmup) for rate in rates])
        if not all(map(has_momentum, opt.param_groups)):
            return [lr]
        high, low = self.momentum
        down_and_up = [schedules.cosine(high, low), schedules.cosine(low, high)]
        momentum = schedules.combine(schedules.phases(self.warmup), down_and_up)
        return [lr, Schedule("momentum", momentum)]


@runtime_checkable
class _Sizes(Protocol):
    """`BatchSize`: epochs have different numbers of batches."""

    def sized(self, loader: Any, position: float) -> Any:
        """Return a loader as it will be in the epoch that begins at a position in the run."""
        ...


def plan(learn: Learner, epochs: int, callbacks: Iterable[Callback] = ()) -> Figure:
    """Draw every schedule of a fit before it runs, value against batch.

    For the learner's own optimiser: those of `Schedule`, `OneCycle`, `BatchSize` and `ImageSize`,
    where they are functions those of `EMA` and `Lookahead`, and of any callback that is
    `schedules.Scheduled`.

    Args:
        learn: it and its optimiser are left as they are.
        epochs: how long the fit shall be.
        callbacks: those of the fit, beside the learner's own.

    Raises:
        CallbackError: `callbacks` is no list of callbacks.
        SetupError: nothing is scheduled, or the training loader has no length.
    """
    from ..plots import plot_columns

    opt = learn.opt or build_optimizer(learn.opt_func, learn.model, learn.lr)
    callbacks = [*learn.callbacks, *in_order(callbacks)]
    scheduled = [callback for callback in callbacks if isinstance(callback, schedules.Scheduled)]
    curves = {name: c for callback in scheduled for name, c in callback.curves(opt, epochs).items()}
    n_batches = length(learn.data.train)
    if not curves or n_batches is None:
        raise SetupError(
            "There is no schedule to draw." if n_batches else "The training loader has no length.",
            do="learn.plan(5, callbacks=[callbacks.OneCycle(0.01)])",
        )
    positions = []
    for epoch in range(epochs):
        loader = learn.data.train
        for callback in callbacks:
            if isinstance(callback, _Sizes):
                loader = callback.sized(loader, epoch / epochs)
        n = length(loader) or 1
        positions += [(epoch * n + i) / (epochs * n) for i in range(n)]
    return plot_columns({name: [c(p) for p in positions] for name, c in curves.items()})
