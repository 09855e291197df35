"""The errors of pellucid, one family.

PellucidError                everything below, to catch it in one go
├── SetupError               something given to pellucid cannot work (a `ValueError`)
│   ├── UnknownName          a name that nobody knows; the nearest one is told (a `LookupError`)
│   └── CallbackError        a callback that breaks the rules of the timetable (a `TypeError`)
├── DataError                the data are empty, broken, or not what they said (a `ValueError`)
│   └── DataNotFound         a data set is nowhere on this machine (a `FileNotFoundError`)
└── NonFiniteLoss            the training loss became NaN or infinite (an `ArithmeticError`)

Every message has up to three parts: what is wrong and where, what was seen, what to do.
An error inside the user's own model, loss or callback stays what it is: the same object, the same
traceback, with a note added that says where in the fit it happened.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real


class PellucidError(Exception):
    """The root of the family.

    Args:
        what: what is wrong and where, one sentence.
        saw: the shapes, names or values that were seen.
        do: what to do about it, if possible a line to paste.
    """

    def __init__(self, what: str, saw: str = "", do: str = ""):
        super().__init__(what, saw, do)  # all three, so that the error pickles

    def __str__(self) -> str:
        return three_parts(*self.args)


class SetupError(PellucidError, ValueError):
    """Something given to pellucid cannot work."""


class UnknownName(SetupError, LookupError):
    """A name that nobody knows."""


class CallbackError(SetupError, TypeError):
    """A callback that breaks the rules of the timetable."""


class DataError(PellucidError, ValueError):
    """The data are empty, broken, or not what they said."""


class DataNotFound(DataError, FileNotFoundError):
    """A data set is nowhere on this machine."""

    __str__ = PellucidError.__str__  # OSError brings its own


class NonFiniteLoss(PellucidError, ArithmeticError):
    """The training loss, or what a step made of the weights, became NaN or infinite.

    Attributes:
        batch: in which batch of the pass, counted from 0; None: not by its loss, in the last step.
    """

    batch: float | None = 0


def three_parts(what: str, saw: str = "", do: str = "") -> str:
    """Format a message: what is wrong, what was seen, what to do; empty parts are left out."""
    parts = [what, saw and f"  saw: {saw}", do and f"  do:  {do}"]
    return "\n".join(part for part in parts if part)


def are_numbers(*values: object) -> bool:
    """Tell whether all are real numbers, NumPy's among them; a truth value is none."""
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def are_whole(*values: object) -> bool:
    """Tell whether all are whole numbers, NumPy's among them; a truth value is none."""
    return are_numbers(*values) and all(isinstance(value, Integral) for value in values)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Say which of `names` comes nearest to `name`, or list them all."""
    names = sorted(names)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}."
