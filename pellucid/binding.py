"""Who hears what: the callbacks of a fit, looked up once before it begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import CallbackError
from .events import MOMENTS, SPANS, Callback, in_order

if TYPE_CHECKING:
    from .learner import Learner

Handlers = dict[str, list[tuple[Callback, Callable[["Learner"], None]]]]
Spans = dict[str, list[tuple[Callback, Callable[["Learner"], AbstractContextManager[Any]]]]]


def bind(callbacks: Iterable[Callback]) -> tuple[Handlers, Spans]:
    """Look up who hears what: for each moment and each span, the methods in the order of acting."""
    callbacks = in_order(callbacks)
    _check_names(callbacks)
    handlers: Handlers = {moment: _bound(callbacks, moment) for moment in MOMENTS}
    spans: Spans = {span: _bound(callbacks, span) for span in SPANS}
    for hearers in spans.values():
        hearers[:] = [(callback, _as_span(method)) for callback, method in hearers]
    return handlers, spans


def _check_names(callbacks: Iterable[Callback]) -> None:
    """Refuse a `comes_last` that would have no effect."""
    for callback in callbacks:
        given = callback.comes_last
        if not isinstance(given, tuple) or not set(given) <= {*MOMENTS, *SPANS}:
            raise CallbackError(
                f"{type(callback).__name__}.comes_last must be a tuple of moments and spans.",
                saw=repr(given),
                do='comes_last = ("after_loss",)',
            )


def _bound(callbacks: Iterable[Callback], name: str) -> list[tuple[Callback, Callable[..., Any]]]:
    hearers = [callback for callback in callbacks if getattr(callback, name, None) is not None]
    hearers.sort(key=lambda callback: name in callback.comes_last)
    return [(callback, getattr(callback, name)) for callback in hearers]


def _as_span(method: Callable[..., Any]) -> Callable[..., Any]:
    return contextmanager(method) if inspect.isgeneratorfunction(method) else method


def with_defaults(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks of a fit, with the table and the guard if none of them is one."""
    from .callbacks.non_finite import NonFinite
    from .callbacks.progress import Progress

    callbacks = in_order(callbacks)
    if not any(callback.shows_progress for callback in callbacks):
        callbacks.append(Progress())
    if not any(isinstance(callback, NonFinite) for callback in callbacks):
        callbacks.append(NonFinite())
    _check_no_rivals(callbacks)
    return in_order(callbacks)


def _check_no_rivals(callbacks: Iterable[Callback]) -> None:
    """Refuse two of which one would have no effect."""
    deciding: dict[str, Callback] = {}
    for callback in callbacks:
        if callback.decides is not None:
            other = deciding.setdefault(callback.decides, callback)
            if other is not callback:
                raise rivals(callback.decides, other, callback)


def rivals(what: str, one: Callback, other: Callback) -> CallbackError:
    """Return the error for two callbacks that decide the same."""
    return CallbackError(
        f"Two callbacks decide {what}, and one would have no effect.",
        saw=f"{one!r} and {other!r}",
        do="leave one out; those of the learner serve every fit.",
    )


class Around:
    """One stretch of a fit, wrapped by everyone's part of a span.

    Parts are entered in order and left in reverse; an error in entering or leaving one is noted
    as its owner's, an error of the stretch passes through them all.
    """

    def __init__(self, span: str, learn: Learner):
        self._span, self._learn = span, learn
        self._error: BaseException | None = None
        self._leaving: Callback | None = None

    def __enter__(self) -> None:
        with ExitStack() as stack:  # if one cannot be entered, those before it are left
            for callback, method in self._learn.spans[self._span]:
                try:
                    manager = method(self._learn)
                    if not hasattr(manager, "__exit__"):
                        raise _no_span(f"{type(callback).__name__}.{self._span} has no yield")
                    stack.enter_context(manager)
                except Exception as error:
                    if str(error) == "generator didn't yield":  # as contextlib puts it
                        raise _no_span(
                            f"{type(callback).__name__}.{self._span} yielded nothing"
                        ) from None
                    error.add_note(f"raised on entering {self._span} of {callback!r}")
                    raise
                stack.push(partial(self._mark, callback))  # acts just before its part is left
            self._entered = stack.pop_all()

    def __exit__(self, *raised: Any) -> bool | None:
        self._error = raised[1]
        try:
            return self._entered.__exit__(*raised)
        except Exception as error:
            error.add_note(f"raised on leaving {self._span} of {self._leaving!r}")
            raise

    def _mark(
        self, callback: Callback, kind: object, error: BaseException | None, _: object
    ) -> None:
        if error is self._error:  # no part that was left before has failed
            self._leaving = callback


def _no_span(saw: str) -> CallbackError:
    what = "A callback's around_... method is no span."
    return CallbackError(what, saw=saw, do="a span holds one yield, usually inside a with.")


def answered(callback: Callback, moment: str, answer: object) -> CallbackError:
    """Return the error for a handler that returned something."""
    return CallbackError(
        f"{type(callback).__name__}.{moment} returned something, which has no effect.",
        saw=repr(answer),
        do="return nothing; assign attributes of `learn`, or raise a Cancel exception.",
    )
