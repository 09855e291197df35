"""Parts of a model trained in turn: a GAN's two halves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import SetupError, UnknownName, did_you_mean
from ..events import Callback
from ..learner import Learner
from ..optim import build_optimizer, params_of
from ..sharding import in_shards


class TakeTurns(Callback):
    """Train parts of the model in turn: so many steps one, so many the next. A GAN is such a case.

        TakeTurns({"critic": 5, "generator": 1}, batch=gan_batch)

    Who waits is frozen: no gradient is computed for it, no step and no weight decay touch it, not a
    bit changes. What is in no part is trained always. The turn follows from the number of steps
    taken, so accumulated batches belong to one turn; validation is in the first part's.

    Args:
        turns: steps in a row, by the part's name in the model.
        batch: `(model, x, turn) -> (x, y)`, what the model is given instead; see `gan.gan_batch`.
        opt_funcs: by part, as `Learner` takes them: each part then has an optimiser of its own,
            which lives across fits. None trains all by the learner's: it keeps state for each
            parameter, which is the same as several alike.

    Attributes:
        turn: whose turn it is; None outside a fit.

    Raises:
        SetupError: fewer than two parts, a turn of no steps, or other parts in opt_funcs; in the
            fit: a model in shards.
        UnknownName: in the fit: the model has no such part.
    """

    changes = True
    order = -20  # before all who look at the batch

    def __init__(
        self,
        turns: Mapping[str, int],
        batch: Callable[[nn.Module, Any, str], tuple[Any, Any]] | None = None,
        opt_funcs: Mapping[str, Callable[..., Optimizer]] | None = None,
    ):
        if len(turns) < 2 or min(turns.values()) < 1:
            raise SetupError(
                "Two parts or more take turns, each of 1 step or more.", saw=f"{turns}"
            )
        if opt_funcs is not None and set(opt_funcs) != set(turns):
            saw = f"turns of {list(turns)}, optimisers for {list(opt_funcs)}"
            raise SetupError("Each part needs an optimiser.", saw=saw)
        self.turns, self.batch, self.opt_funcs = dict(turns), batch, opt_funcs
        self.turn: str | None = None
        self._opts: dict[str, Optimizer] = {}
        self._free: set[int] = set()

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Make the optimisers, and put back who is trainable at the end."""
        own, self.turn = learn.opt, None
        if in_shards(learn.model):
            raise SetupError(
                "Parts of a model in shards cannot take turns.",
                do='Distributed("ddp") trains them.',
            )
        params = {part: list(_part(learn.model, part).parameters()) for part in self.turns}
        free = [param for part in params.values() for param in part if param.requires_grad]
        self._free = set(map(id, free))
        for part, opt_func in (self.opt_funcs or {}).items():
            held = set(map(id, params_of(self._opts[part]))) if part in self._opts else set()
            if held.isdisjoint(map(id, params[part])):  # made for no model yet, or for another
                self._opts[part] = build_optimizer(opt_func, _part(learn.model, part), learn.lr)
        try:
            yield
        finally:
            for param in free:
                param.requires_grad_(True)
            for opt in self._opts.values():
                vars(opt).pop("found_inf", None)
            learn.opt, self.turn = own, None

    def before_batch(self, learn: Learner) -> None:
        """Let the part whose turn it is train, and give it its batch."""
        sequence = [part for part, n in self.turns.items() for _ in range(n)]
        turn = sequence[learn.step % len(sequence) if learn.training else 0]
        if learn.training and turn != self.turn:
            self.turn = turn
            for part in self.turns:
                for param in _part(learn.model, part).parameters():
                    param.requires_grad_(part == turn and id(param) in self._free)
            if self._opts:
                guarded = vars(learn.opt).get("found_inf")  # NonFinite's, see optim.guard
                learn.opt = self._opts[turn]
                vars(learn.opt)["found_inf"] = guarded
        if self.batch is not None:
            learn.x, learn.y = self.batch(learn.model, learn.x, turn)


def _part(model: nn.Module, name: str) -> nn.Module:
    parts = dict(model.named_modules())
    if name not in parts:
        known = [other for other, _ in model.named_children()]
        raise UnknownName(f"The model has no part {name!r}.", do=did_you_mean(name, known))
    return parts[name]
