"""Roles of a model's parameters, its stages of depth, and optimisers that treat them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .errors import SetupError, UnknownName, are_numbers, did_you_mean
from .joint import Joint
from .optim import arguments, fastest

ROLES = ("matrix", "conv", "norm", "bias", "embedding", "head")
"""All roles, in the order of the parameter groups."""

Named = list[tuple[str, nn.Parameter]]


def roles(model: nn.Module, head: str | None = None) -> dict[str, Named]:
    """Sort a model's parameters by what they do; each is in one role, shared ones once.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> {role: [name for name, _ in named] for role, named in roles(model).items() if named}
    {'matrix': ['0.weight'], 'norm': ['1.weight'], 'bias': ['0.bias', '1.bias', '2.bias'], \
'head': ['2.weight']}

    matrix: two dimensions: hidden Linear layers, projections of attention, recurrent weights.
    conv: three dimensions or more.
    norm: weights of norms, of any shape, and all other scales: one value, or a vector.
    bias: what is called a bias, of norms too; also tables such as a relative position bias.
    embedding: of nn.Embedding; and learnt tokens and positions, which are called so ("emb",
        "token", "pos") or have a first dimension of 1.
    head: the weight of the last layer that has one, as registered in the model; none if a norm
        comes after it. A head that shares its weight with an embedding is an embedding.

    Args:
        model: any module.
        head: name of the module that is the head; None finds it as said.

    Returns:
        For every role its (name, parameter) pairs, in the model's order; frozen ones too.

    Raises:
        UnknownName: the model has no module of the name `head`, or it has no weight.
    """
    weighted = {name: module for name, module in model.named_modules() if _has_weight(module)}
    if head is not None and head not in weighted:
        raise UnknownName(
            f"The model has no layer {head!r} with a weight.", do=did_you_mean(head, weighted)
        )
    if head is None and weighted:
        last = list(weighted)[-1]
        head = None if is_norm(weighted[last]) else last
    found: dict[str, Named] = {role: [] for role in ROLES}
    seen: set[int] = set()
    for place, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) not in seen:
                seen.add(id(param))
                role = _role(module, name, param, is_head=place == head)
                found[role].append((f"{place}.{name}" if place else name, param))
    return found


def _role(module: nn.Module, name: str, param: nn.Parameter, is_head: bool) -> str:
    is_weight = name == "weight" and param.ndim > 1
    if "bias" in name:
        return "bias"
    if is_norm(module) or (not is_weight and sum(size > 1 for size in param.shape) < 2):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if is_weight and is_head:
        return "head"
    if not is_weight and (param.shape[0] == 1 or any(w in name for w in ("emb", "token", "pos"))):
        return "embedding"
    return "matrix" if param.ndim == 2 else "conv"


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a norm, by its class's name: torch's, ours and most people's own."""
    return "norm" in type(module).__name__.lower()


def _has_weight(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and (own["weight"].ndim > 1 or is_norm(module))


def stages(model: nn.Module) -> list[list[nn.Module]]:
    """Cut a model into stages of depth, from the input on: lists of its modules.

    A stage is a child of the model that has weights, with the children after it that have none of
    two dimensions or more (a convolution and its norm). A model that only wraps one child is cut
    as that child is; of an nn.ModuleList each member is a child.

    >>> layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)]
    >>> [len(stage) for stage in stages(nn.Sequential(*layers))]
    [2, 1]
    """
    found: list[list[nn.Module]] = []
    children = [child for child in _children(model) if any(True for _ in child.parameters())]
    own = any(True for _ in model.named_parameters(recurse=False))
    if len(children) == 1 and not own:
        return stages(children[0])
    for child in children or [model]:
        if found and all(param.ndim < 2 for param in child.parameters()):
            found[-1].append(child)
        else:
            found.append([child])
    return found


def _children(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child)
        else:
            yield child


@dataclass(frozen=True)
class ByRole:
    """Makes an optimiser that treats parameters by their role; for `Learner(opt_func=...)`.

        ByRole(partial(AdamW, weight_decay=0.05))  # no decay on norms and biases
        ByRole(AdamW, {"matrix": Muon, "conv": Muon})  # Muon for those, AdamW for the rest
        ByRole(AdamW, depth_decay=0.7)  # each stage at 0.7 of the rate of the one after it
        ByRole(partial(SGD, momentum=0.9), lr_factors={"bias": 64})

    Parameter groups have a "role", and with depth_decay a "stage", counted from the input. Every
    optimiser is made in torch's fastest form, as `optim.build_optimizer` does. With several
    optimisers or rates it is a `Joint`: whatever sets "lr" sets the common rate, which each group
    multiplies by its "lr_factor".

    Args:
        opt_func: makes the optimiser, `(groups, lr=...) -> Optimizer`: a class of torch's or a
            partial of one.
        others: what makes another optimiser, by role.
        no_decay: roles without weight decay.
        lr_factors: multiples of the learning rate, by role; 1 where there is none.
        depth_decay: multiple of the rate from each stage to the one before it, in (0, 1], see
            `stages`; parameters of the model itself go with the first stage.
        head: name of the module that is the head, see `roles`.

    Raises:
        UnknownName: there is no such role.
        SetupError: a factor is negative, depth_decay is not in (0, 1], or something is no dict by
            role.
    """

    opt_func: Callable[..., Optimizer] = AdamW
    others: Mapping[str, Callable[..., Optimizer]] | None = None
    no_decay: Sequence[str] = ("norm", "bias")
    lr_factors: Mapping[str, float] | None = None
    depth_decay: float = 1.0
    head: str | None = None

    def __post_init__(self) -> None:
        by_role = (self.others, self.lr_factors)
        if not all(given is None or isinstance(given, Mapping) for given in by_role):
            raise SetupError(
                "ByRole takes other optimisers, and factors, as a dict by role.",
                saw=f"others {self.others!r}, lr_factors {self.lr_factors!r}",
                do='ByRole(AdamW, {"matrix": Muon, "conv": Muon}, lr_factors={"head": 0.1})',
            )
        for role in [*(self.others or {}), *self.no_decay, *(self.lr_factors or {})]:
            if role not in ROLES:
                raise UnknownName(f"There is no role {role!r}.", do=did_you_mean(role, ROLES))
        factors = [self.depth_decay, *(self.lr_factors or {}).values()]
        if not are_numbers(*factors) or not 0 < self.depth_decay <= 1 or min(factors) < 0:
            raise SetupError(
                "ByRole needs lr_factors of 0 or more and a depth_decay in (0, 1].",
                saw=f"lr_factors {self.lr_factors}, depth_decay {self.depth_decay}",
            )

    def __call__(self, params: Sequence[nn.Parameter], lr: float, model: nn.Module) -> Optimizer:
        """Make the optimiser for those parameters of a model that are in `params`."""
        groups = self._groups({id(param) for param in params}, model)
        by_maker: dict[Callable[..., Optimizer], list[dict[str, Any]]] = {}
        for group in groups:
            maker = (self.others or {}).get(group["role"], self.opt_func)
            if group["role"] in self.no_decay and _decays(maker):
                group["weight_decay"] = 0.0
            by_maker.setdefault(maker, []).append(group)
        if self.opt_func in by_maker:  # last: it takes what is added later
            by_maker[self.opt_func] = by_maker.pop(self.opt_func)
        parts = [fastest(maker, own, lr, model) for maker, own in by_maker.items()]
        several = len(parts) > 1 or any("lr_factor" in group for group in groups)
        return Joint(parts) if several else parts[0]

    def _groups(self, wanted: set[int], model: nn.Module) -> list[dict[str, Any]]:
        groups: dict[tuple[int, str], dict[str, Any]] = {}
        depths, n_stages = _depths(model) if self.depth_decay < 1 else ({}, 1)
        for role, named in roles(model, self.head).items():
            for _, param in named:
                if id(param) not in wanted:
                    continue
                stage = depths.get(id(param), 0)
                group = groups.setdefault((stage, role), {"params": [], "role": role})
                group["params"].append(param)
                factor = (self.lr_factors or {}).get(role, 1.0)
                if self.depth_decay < 1:
                    group["stage"] = stage
                    factor *= self.depth_decay ** (n_stages - 1 - stage)
                if factor != 1:
                    group["lr_factor"] = factor
        return [
            groups[key] for key in sorted(groups, key=lambda key: (key[0], ROLES.index(key[1])))
        ]


def _depths(model: nn.Module) -> tuple[dict[int, int], int]:
    found: dict[int, int] = {}
    parts = stages(model)
    for depth, modules in enumerate(parts):
        for module in modules:
            for param in module.parameters():
                found.setdefault(id(param), depth)
    return found, len(parts)


def _decays(opt_func: Callable[..., Optimizer]) -> bool:
    maker = opt_func.func if isinstance(opt_func, partial) else opt_func
    return not isinstance(maker, type) or "weight_decay" in arguments(maker)
