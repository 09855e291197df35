"""Parts of a model trained in turn: a GAN's two halves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import SetupError, UnknownName, are_whole, did_you_mean
from ..events import Callback
from ..joint import Joint
from ..learner import Learner
from ..optim import build_optimizer, params_of
from ..sharding import in_shards


class TakeTurns(Callback):
    """Train parts of the model in turn: so many steps one, so many the next. A GAN is such a case.

        TakeTurns({"critic": 5, "generator": 1}, batch=gan_batch)

    Who waits is frozen: no gradient is computed for it, no step and no weight decay touch it, not a
    bit of its parameters changes. (Batch norm's statistics follow every forward pass, also of who
    waits.) What is in no part is trained always; a part that is frozen anyway has no turn. The turn
    follows from the number of steps taken, so accumulated batches belong to one turn; validation is
    in the first part's.

    Args:
        turns: steps in a row, by the part's name in the model.
        batch: `(model, x, turn) -> (x, y)`, what the model is given instead; see `gan.gan_batch`.
        opt_funcs: by part, as `Learner` takes them: each part then has an optimiser of its own. In
            the fit they are the learner's, as one (`joint.Joint`); they live as long as the one it
            had before. None trains all by the learner's: it keeps state for each parameter, which
            is the same as several alike.

    Attributes:
        turn: whose turn it is; None outside a fit.

    Raises:
        SetupError: fewer than two parts, a turn of no steps, or other parts in opt_funcs; in the
            fit: a model in shards, parts that share parameters, or parameters in no part where
            parts have optimisers of their own.
        UnknownName: in the fit: the model has no such part.
    """

    changes = True
    decides = "whose turn it is"
    order = -20  # before all who look at the batch

    def __init__(
        self,
        turns: Mapping[str, int],
        batch: Callable[[nn.Module, Any, str], tuple[Any, Any]] | None = None,
        opt_funcs: Mapping[str, Callable[..., Optimizer]] | None = None,
    ):
        given = isinstance(turns, Mapping) and len(turns) > 1
        if not given or any(not are_whole(n) or n < 1 for n in turns.values()):
            raise SetupError(
                "Two parts or more take turns, each of 1 step or more.",
                saw=f"{turns}",
                do='TakeTurns({"critic": 5, "generator": 1})',
            )
        if opt_funcs is not None and set(opt_funcs) != set(turns):
            saw = f"turns of {list(turns)}, optimisers for {list(opt_funcs)}"
            raise SetupError("Each part needs an optimiser.", saw=saw)
        self.turns, self.batch, self.opt_funcs = dict(turns), batch, opt_funcs
        self.turn: str | None = None
        self._opt: Joint | None = None
        self._in_place_of: Optimizer | None = None
        self._lr = 0.0
        self._trained: list[nn.Parameter] = []  # in this fit, by whoever's turn it is
        self._free: set[int] = set()  # of these what nobody else keeps frozen in this epoch

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Make the optimisers, and put back who is trainable at the end."""
        own = learn.opt
        self.before_epoch(learn)  # in a fit within a fit a part waits already
        self._trained = self._checked(learn)
        self._free = set(map(id, self._trained))
        try:
            if self.opt_funcs:
                learn.opt = self._joint(learn, self.opt_funcs)
            with _turn_kept(learn.model):
                yield
        finally:
            self.before_epoch(learn)
            learn.opt, self._trained = own, []

    def _checked(self, learn: Learner) -> list[nn.Parameter]:
        """Return what may be trained in the parts."""
        if in_shards(learn.model):
            raise SetupError(
                "Parts of a model in shards cannot take turns.",
                do='Distributed("ddp") trains them.',
            )
        parts = [list(_part(learn.model, part).parameters()) for part in self.turns]
        held = {id(param) for params in parts for param in params}
        if len(held) < sum(map(len, parts)):
            raise SetupError("Parts that share parameters cannot take turns.", saw=f"{self.turns}")
        rest = [name for name, p in learn.model.named_parameters() if id(p) not in held]
        if rest and self.opt_funcs:
            raise SetupError(
                "Where parts have optimisers of their own, what is in no part has none.",
                saw=", ".join(rest[:4]),
                do="leave opt_funcs out, or let the parts be the whole model.",
            )
        return [param for params in parts for param in params if param.requires_grad]

    def _joint(self, learn: Learner, opt_funcs: Mapping[str, Callable[..., Optimizer]]) -> Joint:
        """Return the parts' optimisers: those of the last fit, if they are for this learner."""
        opt, model = self._opt, learn.model
        held = set(map(id, params_of(opt))) if opt else set()
        if opt is None or learn.opt is not self._in_place_of or held.isdisjoint(self._free):
            made = [
                build_optimizer(f, _part(model, part), learn.lr) for part, f in opt_funcs.items()
            ]
            self._opt = opt = Joint(made)
            self._in_place_of = learn.opt
        elif learn.lr != self._lr:
            for group in opt.param_groups:
                group["lr"] = learn.lr
        self._lr = learn.lr
        return opt

    def before_epoch(self, learn: Learner) -> None:
        """Let go who waits, so that others may freeze and unfreeze now."""
        self.turn = None
        for param in self._trained:
            param.requires_grad_(True)

    def before_batch(self, learn: Learner) -> None:
        """Let the part whose turn it is train, and give it its batch."""
        if learn.training and self.turn is None:
            self._free = {id(param) for param in self._trained if param.requires_grad}
        sequence = [
            part for part, n in self.turns.items() if self._can_move(learn.model, part)
            for _ in range(n)
        ] or list(self.turns)  # fmt: skip
        turn = sequence[learn.step % len(sequence)] if learn.training else next(iter(self.turns))
        if learn.training and turn != self.turn:
            self.turn = turn
            for part in self.turns:
                for param in _part(learn.model, part).parameters():
                    param.requires_grad_(part == turn and id(param) in self._free)
        if self.batch is not None:
            learn.x, learn.y = self.batch(learn.model, learn.x, turn)

    def around_batch(self, learn: Learner) -> AbstractContextManager[None]:
        """Let a look in the midst of a turn, `learn.validate()`, leave the model in that turn."""
        return nullcontext() if learn.training else _turn_kept(learn.model)

    def _can_move(self, model: nn.Module, part: str) -> bool:
        """Say no where somebody else keeps all of a part frozen: then it gets no turn."""
        return any(id(param) in self._free for param in _part(model, part).parameters())


@contextmanager
def _turn_kept(model: nn.Module) -> Generator[None]:
    """Put back whose turn it is in a `GAN`, or in any model that has such an attribute."""
    turn = vars(model).get("turn")
    try:
        yield
    finally:
        if turn is not None:
            vars(model)["turn"] = turn


def _part(model: nn.Module, name: str) -> nn.Module:
    parts = dict(model.named_modules())
    if name not in parts:
        known = [other for other, _ in model.named_children()]
        raise UnknownName(f"The model has no part {name!r}.", do=did_you_mean(name, known))
    return parts[name]
