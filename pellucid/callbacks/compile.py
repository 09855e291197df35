"""Compiling what a fit computes, by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import SetupError, UnknownName, did_you_mean
from ..events import Callback
from ..learner import Learner
from ..optim import params_of

_NUMBERS = count()


class Compile(Callback):
    """Compile the forward pass for the time of a fit, and with it the backward pass.

    The model stays the object it is, with the names it has; hooks, averages, precision and frozen
    parts work as without. Inductor's code differs from torch's own by rounding, and draws dropout
    by numbers of its own. The first training batch and the first of validation take from seconds to
    minutes; `Clocks` tells the start apart. torch keeps what it made on disk, a later fit finds it.

    Training and validation are compiled for the size of their first batch. A last batch that is
    smaller is computed without, and so is `learn.validate()` after the fit. Sizes that change
    otherwise cost one more compilation, that of code for any size; after eight variants torch says
    that it goes on uncompiled.

    Args:
        what: "model"; or "step": forward pass and loss as one. A loss that another callback sets
            for a batch (`MixUp`, `LabelSmoothing`) is then computed on its own. The optimiser's
            step is left to torch's fused forms.
        graphs: record the kernels as CUDA graphs (torch's "reduce-overhead"), which spares a small
            model most of the time between them, and takes memory of its own.
        backend: "inductor"; "aot_eager" follows the same ways and computes bit for bit as without
            compiling; or another that torch has, or a function as torch.compile takes it.

    Raises:
        SetupError: no such choice; in the fit: graphs without a CUDA device, a model that is not
            torch's or is compiled already, "step" with a forward pass or loss of another's, a
            compiler that is missing or fails.
    """

    changes = True
    decides = "what is compiled"
    order = 90  # after those who call the model on their own before a batch, or after an error

    def __init__(
        self, what: str = "model", graphs: bool = False, backend: str | Callable = "inductor"
    ):
        if what not in ("model", "step"):
            raise UnknownName(
                f"Compile knows no {what!r}.", do=did_you_mean(str(what), ["model", "step"])
            )
        if graphs and backend != "inductor":
            raise SetupError("Only inductor records CUDA graphs.", saw=f"backend={backend!r}")
        self.what, self.graphs, self.backend = what, graphs, backend
        self._run: _Run | None = None

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Let compiled code stand in, and take it away at the end."""
        _check(learn, self.what, self.graphs, self.backend)
        self._run = _Run(learn, self.graphs, self.backend)
        stands_in = self._run.for_model if self.what == "model" else self._run.for_step
        try:
            with stands_in():
                yield
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise _explained(learn, error) from None  # from None: it is hundreds of lines long
        finally:
            self._run = None

    @contextmanager
    def around_batch(self, learn: Learner) -> Generator[None]:
        """Compute plainly again when the batch is over."""
        try:
            yield
        finally:
            if self._run:
                self._run.end()

    def before_batch(self, learn: Learner) -> None:
        """Compute this batch by compiled code, unless it is one that was left over."""
        if self._run:  # a look has none
            self._run.begin()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_run": None}  # compiled code is not copied


class _Run:
    """Compiled code for one fit; it acts between `begin` and `end`, that is in a batch."""

    def __init__(self, learn: Learner, graphs: bool, backend: str | Callable):
        self._learn, self._graphs = learn, graphs
        self._loss_func, self._model = learn.loss_func, learn.model
        mode = "reduce-overhead" if graphs else None
        # one for each, as each has a size of its own: code for any size is slower
        self._code = [
            torch.compile(_of_its_own(_forward_and_loss), backend=backend, mode=mode)
            for _ in ("validation", "training")
        ]
        self._acts, self._proven, self._n_items = False, False, 0
        self._fused: tuple[Any, ...] | None = None

    def begin(self) -> None:
        """Decide on a batch."""
        learn, n_items = self._learn, tree.n_items(self._learn.x)
        if learn.batch_index <= 0:
            self._n_items = n_items
        self._acts = learn.batch_index + 1 != learn.n_batches or n_items >= self._n_items
        if self._graphs:  # what was kept for a later step lies in memory that is written again
            for param in params_of(learn.opt):
                param.grad = None if param.grad is None else param.grad.clone()

    def end(self) -> None:
        """Compute plainly until the next batch begins."""
        self._acts, self._fused = False, None

    @contextmanager
    def for_model(self) -> Generator[None]:
        """Compile each call of the model."""
        # torch's own place for it; model.compile() passes over a Sequential in silence
        own = vars(self._model)
        before, own["_compiled_call_impl"] = own.get("_compiled_call_impl"), self._call
        try:
            yield
        finally:
            own["_compiled_call_impl"] = before

    @contextmanager
    def for_step(self) -> Generator[None]:
        """Compile the learner's forward pass and its loss."""
        own = vars(self._learn)
        own |= {"forward": self._forward, "compute_loss": self._compute_loss}
        try:
            yield
        finally:
            del own["forward"], own["compute_loss"]

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._acts:
            return self._model._call_impl(*args, **kwargs)
        return self._compiled(args, kwargs)[0]

    def _forward(self) -> Any:
        learn = self._learn
        if not self._acts:
            return Learner.forward(learn)
        args = learn.x if isinstance(learn.x, tuple) else (learn.x,)
        args, kwargs = ((), learn.x) if isinstance(learn.x, dict) else (args, {})
        if learn.loss_func is not self._loss_func:  # each batch another would be compiled anew
            return self._compiled(args, kwargs)[0]
        targets = learn.y if isinstance(learn.y, tuple) else (learn.y,)
        targets = () if learn.y is None else targets
        preds, loss = self._compiled(args, kwargs, learn.loss_func, targets)
        self._fused = preds, _versions(preds), learn.y, loss
        return preds

    def _compute_loss(self) -> Tensor:
        learn, fused, self._fused = self._learn, self._fused, None
        if fused and learn.loss_func is self._loss_func:
            preds, versions, targets, loss = fused
            untouched = learn.preds is preds and learn.y is targets
            if untouched and _versions(preds) == versions:
                return loss
        return Learner.compute_loss(learn)

    def _compiled(self, *given: Any) -> tuple[Any, Any]:
        code = self._code[self._learn.training]
        if self._graphs:
            self._acts = False  # a second call in this batch would write over what backward needs
            torch.compiler.cudagraph_mark_step_begin()
        n_graphs, found = _n_graphs(), code(self._model, *given)
        if not self._proven and _n_graphs() == n_graphs:
            raise SetupError(
                "torch.compile found nothing in the model that it can compile.",
                saw=type(self._model).__name__,
                do='leave Compile out; with TORCH_LOGS="graph_breaks" in the environment torch '
                'tells why. Of parallel forms it goes with Distributed("ddp").',
            )
        self._proven = True
        # the next batch writes over a graph's memory, long before the tally reads
        return tree.map_leaves(_cloned, found) if self._graphs else found


def _forward_and_loss(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_func: Callable[..., Tensor] | None = None,
    targets: tuple[Any, ...] = (),
) -> tuple[Any, Any]:
    preds = model._call_impl(*args, **kwargs)
    return preds, None if loss_func is None else loss_func(preds, *targets)


def _of_its_own(fn: FunctionType) -> FunctionType:
    """Return a twin of a function under a name of its own.

    torch keeps compiled code by function, and what sizes it met by name. So no model meets the code
    of another, no fit that of one before, when hooks were others, and validation no sizes of
    training's.
    """
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, fn.__globals__, code.co_name, fn.__defaults__)


def _n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _versions(part: Any) -> list[int]:
    return [leaf._version for leaf in tree.leaves(part) if isinstance(leaf, Tensor)]


def _check(learn: Learner, what: str, graphs: bool, backend: str | Callable) -> None:
    model, known = learn.model, torch.compiler.list_backends(())
    if isinstance(backend, str) and backend not in known:
        raise UnknownName(f"torch has no backend {backend!r}.", do=did_you_mean(backend, known))
    if not isinstance(model, nn.Module):
        raise SetupError("Compile needs a torch module.", saw=type(model).__name__)
    call = model._compiled_call_impl
    if hasattr(model, "_orig_mod") or (call is not None and not _is_ours(call)):
        raise SetupError(
            "The model is compiled already.", do="leave Compile out, or give the plain model."
        )
    if graphs and learn.device.type != "cuda":
        raise SetupError(
            "CUDA graphs need an NVIDIA GPU.",
            saw=f"the device {learn.device}",
            do='leave graphs out: Compile("model") compiles for this device too.',
        )
    own = vars(learn)
    others = [n for n in ("forward", "compute_loss") if n in own and not _is_ours(own[n])]
    others += [
        n for n in ("forward", "compute_loss") if vars(Learner)[n] != getattr(type(learn), n)
    ]
    if what == "step" and others:
        raise SetupError(
            'Compile("step") compiles the learner\'s own forward pass and loss.',
            saw=f"another {others[0]}, of {type(learn).__name__} or a callback such as Distributed",
            do='Compile("model") works with any.',
        )


def _is_ours(method: Any) -> bool:
    """Tell whether a method stands in for the fit that this one runs in, as `find_lr` may."""
    return isinstance(getattr(method, "__self__", None), _Run)


def _explained(learn: Learner, error: Exception) -> Exception:
    """Return the model's own error, if it fails without compiling too, or what to do."""
    try:
        with learn.around("around_forward"):
            learn.preds = learn.forward()
            learn.compute_loss()
    except Exception as own:
        return own
    cause = getattr(error, "inner_exception", None) or error
    saw = f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
    if "ompiler" in saw:
        do = "install a C++ compiler (g++ or clang++), which torch.compile calls; or leave it out."
    else:
        do = 'leave Compile out; Compile(backend="aot_eager") tells if it is inductor that fails.'
    return SetupError("torch.compile failed; without it the same batch can be computed.", saw, do)
