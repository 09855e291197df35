"""Hooks: functions called when a module has computed its output, or when its gradient arrives.

torch's hooks with what one forgets: they are removed at the end of a `with`, on every way out, or
when nobody holds them any more, so that no forgotten hook keeps a model in memory; and gradients
are caught by hooks on the output tensors, so that in-place activations and `torch.compile` go on
working (a full backward hook on a module breaks both).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from torch import Tensor, nn

from . import tree
from .errors import SetupError


class Hook:
    """One function on one module.

    Whatever the function wants to keep it may put on the hook, which it gets first: any attribute
    may be set.

    Args:
        module: what to watch.
        fn: `fn(hook, module, inputs, output)`, called after each forward; `inputs` is the tuple of
            the module's positional arguments. With `backward`, `fn(hook, module, grad)`, called
            with the gradient of the loss with respect to the module's output, of its shape; where
            the output is a tuple, list or dict, once for each tensor in it that needs a gradient.
            An output that nothing was computed for, a parameter given back as it is, has no
            gradient apart from the parameter's. What `fn` returns is ignored: a hook watches.
        backward: whether to watch gradients.

    Raises:
        SetupError: `module` takes no hooks, or `fn` cannot be called.
    """

    def __init__(self, module: nn.Module, fn: Callable[..., Any], backward: bool = False):
        if not callable(getattr(module, "register_forward_hook", None)):
            raise SetupError("A hook needs a module.", saw=repr(module))
        if not callable(fn):
            raise SetupError("A hook needs a function to call.", saw=repr(fn))
        self.module, self.fn, self.backward = module, fn, backward
        self.removed = False
        self._handle = module.register_forward_hook(_Watch(self))

    if TYPE_CHECKING:  # any attribute may be set

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def remove(self) -> None:
        """Take the hook off the module; a second time does nothing."""
        self._handle.remove()
        self.removed = True

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # it was made
            self._handle.remove()

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", repr(self.fn))
        kind = ", backward" if self.backward else ""
        return f"Hook({type(self.module).__name__}, {name}{kind}{', removed' * self.removed})"


class _Watch:
    """What a module calls; leads to the hook weakly, so that the module does not keep its state.

    In a module that was copied or pickled it watches nothing.
    """

    def __init__(self, hook: Hook | None = None):
        self._hook = weakref.ref(hook) if hook else lambda: None

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        hook = self._hook()
        if hook is None or hook.removed:  # compiled code goes on calling what was there
            return
        if not hook.backward:
            hook.fn(hook, module, inputs, output)
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._arrived)

    def _arrived(self, grad: Tensor) -> None:
        hook = self._hook()
        if hook is not None and not hook.removed:  # the graph may outlive the hook
            hook.fn(hook, hook.module, grad)


class Hooks(Sequence[Hook]):
    """One function on many modules: a list of hooks that are removed together.

    `hooks[2]` is a hook; `hooks[1:3]`, `hooks[[0, 4]]` and a mask such as
    `hooks[[True, False, ...]]` are lists of them (arrays and tensors will do); `del hooks[2]`
    removes one.

    Args:
        modules: what to watch, for example `leaves(model).values()`, or a Sequential, whose parts
            are then watched.
        fn: as for `Hook`.
        backward: whether to watch gradients.

    Raises:
        SetupError: something to watch takes no hooks; those set before it are removed.
    """

    def __init__(
        self, modules: Iterable[nn.Module], fn: Callable[..., Any], backward: bool = False
    ):
        if not isinstance(modules, Iterable) or isinstance(modules, (str, Mapping)):
            raise SetupError(
                "Hooks takes several modules.",
                saw=type(modules).__name__,
                do="give leaves(model).values(), or find(model, condition).values().",
            )
        self._hooks = [Hook(module, fn, backward) for module in modules]

    def remove(self) -> None:
        """Take all hooks off their modules."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    @overload
    def __getitem__(self, key: int) -> Hook: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | np.ndarray | Tensor) -> list[Hook]: ...
    def __getitem__(
        self, key: int | slice | Sequence[int] | np.ndarray | Tensor
    ) -> Hook | list[Hook]:
        key = key.tolist() if isinstance(key, (np.ndarray, np.generic, Tensor)) else key
        if isinstance(key, (int, slice)):
            return self._hooks[key]
        if key and all(isinstance(wanted, bool) for wanted in key):
            return [hook for hook, wanted in zip(self._hooks, key, strict=True) if wanted]
        return [self._hooks[i] for i in key]

    def __delitem__(self, key: int | slice) -> None:
        for hook in self._hooks[key] if isinstance(key, slice) else [self._hooks[key]]:
            hook.remove()
        del self._hooks[key]

    def __iter__(self) -> Iterator[Hook]:
        return iter(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def __repr__(self) -> str:
        shown = "".join(f"\n  {hook!r}" for hook in self._hooks[:10])
        rest = "\n  ..." * (len(self) > 10)
        return f"Hooks ({len(self)} items){shown}{rest}"


def tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors of what a module gave: itself, or those in tuples, lists and dicts."""
    return [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]


def find(model: nn.Module, condition: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Return the modules within a model for which a condition holds, each once, by their names.

    >>> list(find(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), lambda m: isinstance(m, nn.Linear)))
    ['0']

    Raises:
        SetupError: the condition is a class of modules.
    """
    if isinstance(condition, type) and issubclass(condition, nn.Module):
        name = condition.__name__
        raise SetupError(
            "A condition is a function of a module.",
            saw=f"the class {name}",
            do=f"find(model, lambda module: isinstance(module, {name})).",
        )
    inner = getattr(model, "_orig_mod", model)  # torch.compile wraps the model, and adds to names
    return {name: module for name, module in inner.named_modules() if condition(module)}


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that do the computing, those without modules in them, by their names.

    An attention counts as one (torch's calls none of its parts as a module), and so does a module
    with parametrizations, such as a spectral norm.
    """
    found = find(model, _is_leaf)
    parts = tuple(f"{name}." if name else "" for name in found if any(found[name].children()))
    return {
        name: module
        for name, module in found.items()
        if any(module.children()) or not name.startswith(parts)
    }


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    return all(name == "parametrizations" for name, _ in module.named_children())
