"""HookHandle: what takes a hook off a module again.

A hook is a function that a module calls with what it computed. One that is forgotten goes on being
called, and keeps in memory whatever it refers to. So whoever puts one on is given the means to take
it off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class HookHandle:
    """Take a hook off with `remove()`, or at the end of a `with`.

    Args:
        hooks: of a module; the hook is added under a key that only this handle has.
        hook: the function.
    """

    def __init__(self, hooks: dict[object, Callable[..., Any]], hook: Callable[..., Any]):
        self._hooks, self._key = hooks, object()
        hooks[self._key] = hook

    def remove(self) -> None:
        """Take the hook off; a second time does nothing."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> HookHandle:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()
