"""A model on paper: its module tree with output shapes, parameters, multiply-adds and memory.

Everything is seen in one forward pass, nothing is guessed by the kind of a module: multiply-adds
are counted where torch carries them out, memory where autograd keeps it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from . import foundations, tree
from .errors import SetupError
from .flops import UNCOUNTED
from .outline import Part, Summary, outline
from .places import Place, parameters_of
from .snapshot import preserved, preserved_random_state

Model = nn.Module | foundations.Module


def summary(model: Model, *inputs: Any, depth: int | None = None) -> Summary:
    """Run a model once and list its modules with shapes, parameters, multiply-adds and memory.

    The pass is made in evaluation mode, with gradients, and leaves no trace: weights, buffers,
    modes, hooks and random state are as before. A model with lazy modules that have no shape yet
    is copied first.

    - Parameters count where they first appear, once. A module's numbers hold those of its parts;
      its own parameters, and what its forward does besides calling parts, have lines of their own.
    - Multiply-adds are half of what torch's `FlopCounterMode` counts (matrix products,
      convolutions, attention), with what it leaves out: recurrent layers, attention on the CPU,
      Bilinear, products with a vector. They are those of the whole batch; norms, activations and
      pooling have none.
    - Kept for backward are the bytes that autograd holds on to when the output is there, counted
      where they are first saved; without parameters, buffers and inputs. In training mode dropout
      keeps its masks besides.

    Args:
        model: torch's or one of `foundations`; of a compiled one, what was compiled.
        inputs: what to call it with, moved to the model's device: a tensor, or several. A tuple
            alone is taken apart and a dict alone given by name, as `Learner.forward` does.
        depth: how deep to print; None prints all. The result holds all parts in any case.

    Raises:
        SetupError: `inputs` are sizes where tensors are wanted, or `depth` is no depth.
        Exception: what the model raises, with a note: the tree up to where it failed.
    """
    if not isinstance(model, Model):
        raise SetupError("A summary needs a model.", saw=repr(model), do="give an instance of it.")
    if depth is not None and (not isinstance(depth, int) or depth < 0):
        raise SetupError("depth must be 0 or more, or None for all.", saw=repr(depth))
    whole: Any = getattr(model, "_orig_mod", model)
    _check_inputs(inputs)
    if any(is_lazy(tensor) for tensor in chain(whole.parameters(), whole.buffers())):
        with preserved_random_state():  # a shape, once there, could not be taken back
            return _looked_at(_lazy_copy(whole), inputs, depth)
    with preserved(whole):
        return _looked_at(whole, inputs, depth)


def _check_inputs(inputs: tuple[Any, ...]) -> None:
    values = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) else inputs
    if values and all(type(value) is int for value in values):
        sizes = ", ".join(map(str, values))
        raise SetupError(
            "A summary needs tensors to call the model with.",
            saw=f"the sizes {sizes}",
            do=f"give torch.zeros({sizes}), or a batch of the data.",
        )


def _lazy_copy(model: Any) -> Any:
    """Copy a model with lazy modules; torch itself copies their parameters, not their buffers."""
    lazy = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    memo = {id(b): type(b)(device=b.data.device, dtype=b.data.dtype) for b in lazy}
    return copy.deepcopy(model, memo)


def _looked_at(model: Any, inputs: tuple[Any, ...], depth: int | None) -> Summary:
    devices = {param.device for param in model.parameters()}
    if len(devices) == 1:
        inputs = tree.to_device(inputs, *devices)
    look = _Look(model)
    look.run(inputs)
    shown = inputs[0] if len(inputs) == 1 else inputs
    sizes = [sum(map(_bytes, tensors)) for tensors in (model.parameters(), model.buffers())]
    return Summary(look.outlined(), tree.describe(shown), *sizes, depth)


# ── the pass ──────────────────────────────────────────────────────────────────────────────────


class _Look:
    """One pass through a model, and what was seen in it."""

    def __init__(self, model: Any):
        self.model, self.whole = model, Place(model)
        self.places: dict[int, list[Place]] = {}
        self.owners: dict[int, tuple[Place, str]] = {}  # of parameters, where they come first
        for place in self.whole:
            self.places.setdefault(id(place.module), []).append(place)
            for name, param in parameters_of(place.module):
                self.owners.setdefault(id(param), (place, name))
        self.inside: list[_Call] = []
        self.failed: tuple[Place, str, Exception] | None = None
        self.counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        self.used = _Used(set(self.owners))
        self.saved: list[tuple[weakref.ref[_Saved], Place]] = []

    def run(self, inputs: tuple[Any, ...]) -> None:
        """Call the model, and note what happens where."""
        self.model.eval()
        try:
            with ExitStack() as stack:
                for places in self.places.values():
                    stack.enter_context(self._watched(places[0].module))
                stack.enter_context(_as_written())
                stack.enter_context(torch.inference_mode(False))  # gradients on, that is
                stack.enter_context(saved_tensors_hooks(self._save, _Saved.taken))
                stack.enter_context(self.counter)
                stack.enter_context(self.used)
                inputs = tree.map_leaves(_ordinary, inputs)
                output = _called(self.model, inputs)
        except Exception as error:
            if self.failed is not None and self.failed[2] is error:
                error.add_note(f"how far the model came:\n{outline(self.outlined())}")
            raise
        self._count_kept(inputs)
        del output  # until here it kept alive what was counted

    @contextmanager
    def _watched(self, module: Any) -> Generator[None]:
        """Note every call of a module's forward, also one that passes over its hooks."""
        own, forward = vars(module).get("forward"), module.forward
        vars(module)["forward"] = lambda *given, **named: self._seen(module, forward, given, named)
        try:
            yield
        finally:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own

    def _seen(
        self,
        module: Any,
        forward: Callable[..., Any],
        given: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        with self._call(module, (*given, *named.values())) as place:
            output = forward(*given, **named)
        place.outputs[1:] = [_shapes(output)]
        return output

    @contextmanager
    def _call(self, module: Any, given: tuple[Any, ...]) -> Generator[Place]:
        places = self.places[id(module)]
        if self.inside:  # of several places those nearest below the caller, in turn
            places = [p for p in places if self.inside[-1].place in p.above] or places
        place = min(places, key=lambda place: (len(place.above), place.n_calls))
        call = _Call(place, self.counter.get_total_flops())
        self.inside.append(call)
        try:
            yield place
            self.failed = None  # what failed within was caught within
        except Exception as error:
            if self.failed is None or self.failed[2] is not error:  # the innermost knows best
                self.failed = place, _shapes(given[0] if len(given) == 1 else given), error
            raise
        finally:
            self.inside.pop()
            flops = self.counter.get_total_flops() - call.before
            place.flops += flops - call.by_parts
            place.n_calls += 1
            if self.inside:
                self.inside[-1].by_parts += flops

    def _save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        place = self.inside[-1].place if self.inside else self.whole  # in a hook of the whole
        self.saved.append((weakref.ref(saved), place))
        return saved

    def _count_kept(self, inputs: tuple[Any, ...]) -> None:
        """Count the memory of what is still saved, each piece once, where it was saved first."""
        held_anyway = [*self.model.parameters(), *self.model.buffers(), *_tensors(inputs)]
        seen = {_memory(tensor) for tensor in held_anyway}
        for reference, place in self.saved:
            saved = reference()
            if saved is not None and _memory(saved.tensor) not in seen:
                seen.add(_memory(saved.tensor))
                place.kept += _bytes(saved.tensor, whole=True)
        self.saved.clear()

    # ── what came of it ───────────────────────────────────────────────────────────────────────

    def outlined(self) -> Part:
        """Return all that was seen; of a pass that failed, the way to where it did."""
        return self._outlined(self.whole, idle=False, frozen=False)

    def _outlined(self, place: Place, idle: bool, frozen: bool) -> Part:
        """Outline a place; `idle` and `frozen` are known of the whole that it is in."""
        here = list(place)
        within = {id(param): param for p in here for _, param in parameters_of(p.module)}
        idle_here = not any(twin.n_calls for p in here for twin in self.places[id(p.module)])
        frozen_here = bool(within) and not any(p.requires_grad for p in within.values())
        notes = self._notes(place)
        if frozen_here and not frozen:
            notes.append("frozen")
        if idle_here and not idle:
            used = not self.used.seen.isdisjoint(within)
            notes.append("not called, but its parameters are used" if used else "not used")
        new = [param for i, param in within.items() if self.owners[i][0].is_in(place)]
        return Part(
            name=place.name,
            label=place.name.rpartition(".")[2],
            kind=type(place.module).__name__,
            output=" … ".join(dict.fromkeys(place.outputs)),
            n_calls=place.n_calls,
            n_params=sum(param.numel() for param in new),
            n_trainable=sum(param.numel() for param in new if param.requires_grad),
            multiply_adds=sum(p.flops for p in here) // 2,
            kept=sum(p.kept for p in here),
            note=", ".join(notes),
            parts=tuple(self._parts(place, idle or idle_here, frozen or frozen_here)),
        )

    def _parts(self, place: Place, idle: bool, frozen: bool) -> Iterator[Part]:
        """Outline what a place is made of, unless that was shown before or did not come to act."""
        to_failure = (*self.failed[0].above, self.failed[0]) if self.failed else None
        shown_before = self.places[id(place.module)][0] is not place
        if not place.parts or shown_before or (to_failure and place not in to_failure):
            return
        for name, param in parameters_of(place.module):
            owner, _ = self.owners[id(param)]
            n = param.numel() if owner is place else 0
            full = f"{place.name}.{name}".lstrip(".")
            shape = tree.describe(param).replace("float32 ", "")
            yield Part(full, name, "Parameter", shape, 0, n, n * param.requires_grad)
        for part in place.parts:
            if not to_failure or any(p.n_calls for p in part):
                yield self._outlined(part, idle, frozen)
        if place.flops or place.kept:
            name, adds = f"{place.name}.(itself)".lstrip("."), place.flops // 2
            yield Part(name, "(itself)", "", multiply_adds=adds, kept=place.kept)

    def _notes(self, place: Place) -> list[str]:
        notes = [f"×{place.n_calls}"] if place.n_calls > 1 else []
        first = self.places[id(place.module)][0]
        if first is not place:
            return [*notes, f"shared with {first.name}"]
        for name, param in parameters_of(place.module):
            owner, label = self.owners[id(param)]
            if owner is not place:
                notes.append(f"{name} shared with {owner.name}.{label}".replace(" .", " "))
        if self.failed is not None and self.failed[0] is place:
            notes.append(f"failed here, given {self.failed[1]}")
        return notes


@dataclass
class _Call:
    """A call of a module that is not finished: what was counted before it, and by its parts."""

    place: Place
    before: int
    by_parts: int = 0


class _Saved:
    """A tensor that autograd keeps for backward."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # with its history it would keep itself alive

    def taken(self) -> Tensor:
        return self.tensor


class _Used(TorchDispatchMode):
    """Note which of some tensors take part in any operation."""

    def __init__(self, wanted: set[int]):
        super().__init__()
        self.wanted, self.seen = wanted, set[int]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for arg in (*args, *(kwargs or {}).values()):
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if id(one) in self.wanted:
                    self.seen.add(id(one))
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_written() -> Generator[None]:
    """Let modules do what their code says: no fused encoder, nothing compiled."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _ordinary(leaf: Any) -> Any:
    """Return a tensor that autograd may keep; one made in inference mode is copied."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _called(model: Any, inputs: tuple[Any, ...]) -> Any:
    if len(inputs) == 1 and isinstance(inputs[0], dict):
        return model(**inputs[0])
    if len(inputs) == 1 and isinstance(inputs[0], tuple):
        return model(*inputs[0])
    return model(*inputs)


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list, dict)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


def _shapes(thing: Any) -> str:
    """Return the shapes of what went in or came out; the dtype too where it is not float32."""
    words = tree.describe(thing).replace("float32 ", "")
    return words if len(words) <= _MAX_WIDTH else f"{words[: _MAX_WIDTH - 1]}…"


_MAX_WIDTH = 60


def _memory(tensor: Tensor) -> int:
    """Return what is the same for all views of one piece of memory."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a sparse tensor has several pieces
        return id(tensor)


def _bytes(tensor: Tensor, whole: bool = False) -> int:
    """Return the memory of a tensor, or of the whole piece that it is a view of."""
    try:
        return tensor.untyped_storage().nbytes() if whole else tensor.nbytes
    except NotImplementedError:
        return tensor.numel() * tensor.element_size()
