"""Telling functions and values from one another across processes: by name, code and content."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from types import CodeType
from typing import Any


def in_words(value: Any, code: bool = True) -> str:
    """Return what tells a value from others, the same in every process.

    A function goes by its name and, unless `code` is False, its fingerprint; a partial by its
    parts; anything else by its repr without addresses.
    """
    if isinstance(value, partial):
        given = [in_words(arg) for arg in value.args]
        given += [f"{name}={in_words(arg)}" for name, arg in value.keywords.items()]
        return f"partial({', '.join([in_words(value.func, code), *given])})"
    words = re.sub(r" at 0x[0-9a-fA-F]+", "", getattr(value, "__qualname__", repr(value)))
    return f"{words} #{fingerprint(value)}" if code and inspect.isfunction(value) else words


def fingerprint(function: Callable[..., Any]) -> str:
    """Return 12 letters that change when the code of a function or its defaults do.

    They are made of the compiled code: comments and the docstring do not count, Python's minor
    version does, and what the function calls is not looked at. What is built in has none: "".

    Args:
        function: a function, a partial of one, or an object with a `__call__`.
    """
    while isinstance(function, partial):
        function = function.func
    inner: Any = function if inspect.isroutine(function) else type(function).__call__
    inner = inspect.unwrap(inner)
    code: CodeType | None = getattr(inner, "__code__", None)
    if code is None:
        return ""
    defaults = in_words(inner.__defaults__), in_words(inner.__kwdefaults__)
    told = repr((_instructions(code, inner.__doc__), defaults))
    return sha256(told.encode()).hexdigest()[:12]


def _instructions(code: CodeType, doc: str | None = None) -> tuple[Any, ...]:
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constants.append(_instructions(constant))
        elif isinstance(constant, frozenset):  # its order differs from process to process
            constants.append(sorted(map(repr, constant)))
        else:  # a docstring stands where None stands without one
            constants.append(repr(None if constant == doc else constant))
    return code.co_code, constants, code.co_names, code.co_varnames
