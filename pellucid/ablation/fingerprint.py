"""Telling functions and values from one another across processes: by name, code and content."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dis import get_instructions
from functools import partial
from hashlib import sha256
from types import CellType, CodeType
from typing import Any


def in_words(value: Any, code: bool = True) -> str:
    """Return what tells a value from others, the same in every process.

    A function goes by its name and, unless `code` is False, its fingerprint; a partial by its
    parts; a set by its values in order; anything else by its repr without addresses.
    """
    if isinstance(value, partial):
        given = [in_words(arg) for arg in value.args]
        given += [f"{name}={in_words(arg)}" for name, arg in value.keywords.items()]
        return f"partial({', '.join([in_words(value.func, code), *given])})"
    if isinstance(value, (set, frozenset)):  # their order differs from process to process
        return f"{type(value).__name__}({', '.join(sorted(map(in_words, value)))})"
    words = re.sub(r" at 0x[0-9a-fA-F]+", "", getattr(value, "__qualname__", repr(value)))
    return f"{words} #{fingerprint(value)}" if code and inspect.isfunction(value) else words


def fingerprint(function: Callable[..., Any]) -> str:
    """Return 12 letters that change when the code of a function, or a value it brings along, does.

    They are made of the compiled code, the defaults, and the numbers and words that it has from
    functions around it. Comments and the docstring do not count, Python's minor version does, and
    what the function calls is not looked at. What is built in has none: "".

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
    brought = in_words(inner.__defaults__), in_words(inner.__kwdefaults__), _enclosed(inner)
    told = repr((_instructions(code, inner.__doc__), brought))
    return sha256(told.encode()).hexdigest()[:12]


def _enclosed(function: Any) -> list[str]:
    """Return the settings in a function's closure; what it changes when called is none."""
    code = function.__code__
    changed = {one.argval for one in get_instructions(code) if one.opname == "STORE_DEREF"}
    named = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return [f"{name}={_setting(cell)}" for name, cell in named if name not in changed]


def _setting(cell: CellType) -> str:
    try:
        value = cell.cell_contents
    except ValueError:  # not assigned yet
        return ""
    return repr(value) if isinstance(value, (int, float, complex, str, bytes)) else ""


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
