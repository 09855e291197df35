"""The timetable of a fit, the callbacks that act in it, and the exceptions that steer it.

`TIMETABLE`, below, is the source of truth: the names of all moments and spans are read from it, a
test compares a recorded fit with it line by line, and `learn.show_loop()` prints it with the
callbacks in place.

A moment (`before_...`, `after_...`) is a point in time: a callback's method of that name is called
with the learner and returns nothing. A span (`around_...`) is the stretch indented below it: a
method of that name holds one `yield`, usually inside a `with`, and is unwound in reverse order when
the stretch ends, in whatever way. What can be raised in a moment:

CancelStep   (in after_backward or after_step) keeps the gradients and skips what is left of
             take_step and zero_grad;
CancelBatch  leaves the batch, of which nothing remains, neither gradient nor record;
             after_cancel_batch, then after_batch;
CancelEpoch  leaves the pass, training or validation; after_cancel_epoch, then after_train or
             after_validate; a cancelled training pass is still validated;
CancelFit    leaves the fit; after_cancel_fit, then after_fit.

after_fit comes always and once, also after an error, which goes on to the caller.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from .errors import CallbackError

TIMETABLE = """
around_fit
  before_fit
  for each epoch:
    around_epoch
      before_epoch
      before_train
      for each training batch:
        around_batch
          before_batch
          around_forward
            preds = forward(x)
            after_predict
            loss = compute_loss(preds, y)
            after_loss
          backward(loss)
          after_backward
          take_step()
          after_step
          zero_grad()
        after_batch
      after_train
      before_validate
      for each validation batch, without gradients:
        around_batch
          before_batch
          around_forward
            preds = forward(x)
            after_predict
            loss = compute_loss(preds, y)
            after_loss
        after_batch
      after_validate
      after_epoch
  after_fit
"""

CANCEL_MOMENTS = ("after_cancel_batch", "after_cancel_epoch", "after_cancel_fit")
MOMENTS = (*dict.fromkeys(re.findall(r"(?:before|after)_\w+", TIMETABLE)), *CANCEL_MOMENTS)
SPANS = tuple(dict.fromkeys(re.findall(r"around_\w+", TIMETABLE)))

_LOOKS_LIKE_A_MOMENT = re.compile(r"(before|after|around|on|begin|end)_|\w+_(start|end|begin)s?$")


class Cancel(Exception):
    """What steers a fit from within a moment; see the timetable."""


class CancelStep(Cancel):
    """Keep the gradients, skip what is left of step and zero_grad."""


class CancelBatch(Cancel):
    """Leave this batch; nothing of it remains."""


class CancelEpoch(Cancel):
    """Leave this training or validation pass."""


class CancelFit(Cancel):
    """Leave the fit."""


class Callback:
    """A class with methods named after moments and spans, each taking the learner.

    A misspelt moment is refused when the class is made, a callback that hears no moment when it is
    given to a learner.

    Attributes:
        order: callbacks act in ascending order, those of one order as they were given.
        changes: False for a callback that only watches (a fit with it gives the same weights as
            without, bit for bit); True for one that may change the course. Looks such as
            `learn.validate()` keep those that change and leave out those that watch; in a look
            nothing outside its pass is heard, neither before_fit nor around_fit.
        shows_progress: True for one that shows the run itself; the default table is then left out.
        decides: what only one callback of a fit can decide, in words; None: nothing of the kind.
        comes_last: moments, or spans to enter, in which it follows all others, whatever its order.
    """

    order: int = 0
    changes: bool = False
    shows_progress: bool = False
    decides: str | None = None
    comes_last: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if callable(value) and not name.startswith("_"):
                _check_handler(cls.__name__, name, value)

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in inspect.signature(type(self).__init__).parameters
            if name in vars(self)
        )
        return f"{type(self).__name__}({settings})"


def heard(callback: Callback) -> list[str]:
    """Return the moments and spans that a callback has a method for, in the timetable's order."""
    return [name for name in (*MOMENTS, *SPANS) if getattr(callback, name, None) is not None]


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Check callbacks and sort them by `order`; what was given first stays first among equals.

    Raises:
        CallbackError: something is no callback, or hears nothing.
    """
    if not isinstance(callbacks, Iterable):
        raise CallbackError(
            "callbacks takes a list.", saw=repr(callbacks), do="callbacks=[Progress()]"
        )
    callbacks = list(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise CallbackError(
                "Callbacks must be instances of pellucid.Callback.",
                saw=repr(callback),
                do=f"{callback.__name__}() makes an instance."
                if inspect.isclass(callback)
                else "callbacks.Debug('after_epoch', function) calls a function at a moment.",
            )
        if not heard(callback):
            raise CallbackError(
                f"{type(callback).__name__} hears no moment, so it would never act.",
                do=f"give it methods such as {', '.join(MOMENTS[:4])}.",
            )
        if sum(other is callback for other in callbacks) > 1:
            raise CallbackError(
                "A callback is given twice and would act twice.", saw=repr(callback)
            )
    return sorted(callbacks, key=lambda callback: callback.order)


def _check_handler(owner: str, name: str, method: Any) -> None:
    known = (*MOMENTS, *SPANS)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near or _LOOKS_LIKE_A_MOMENT.match(name):
            nearest = near or difflib.get_close_matches(_translated(name), known, n=1, cutoff=0)
            raise CallbackError(
                f"{owner}.{name} looks like a moment of the timetable, but there is none of that "
                "name, so it would never be called.",
                do=f"did you mean {nearest[0]!r}? A helper's name may begin with an underscore.",
            )
        return
    try:
        inspect.signature(method).bind(None, None)
    except TypeError:
        raise CallbackError(
            f"{owner}.{name} must take the learner and nothing else.",
            saw=f"def {name}{inspect.signature(method)}",
            do=f"write def {name}(self, learn).",
        ) from None


def _translated(name: str) -> str:
    """Say a moment of other libraries, `on_epoch_end` or `begin_fit`, as ours would be said."""
    when = "after" if re.search("end|after", name) else "before"
    stretch = [word for word in ("batch", "epoch", "fit", "validate", "train") if word in name]
    return f"{when}_{stretch[0] if stretch else name}"
