"""The outline of a model: its parts with their numbers, to read and to print. Made by `summary`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UnknownName, did_you_mean


@dataclass(frozen=True)
class Part:
    """A module of a model at one place, a parameter of its own, or what its forward does itself.

    The numbers of a module hold those of its parts.

    Attributes:
        name: from the top, "layer1.0.conv1"; "" is the whole.
        label: the last piece of the name.
        kind: the class, "Parameter", or "" for what a forward does itself.
        output: the shapes of what came out, "64×10"; of several calls that differ the first and
            the last. Empty if it was not called.
        n_calls: how often it was called here.
        n_params: values of parameters that appear here first.
        n_trainable: of these, those that require gradients.
        multiply_adds: in all calls, for the whole batch.
        kept: bytes kept for backward.
        note: what is remarkable: how often called, not used, shared with whom, frozen.
        parts: what it is made of.
    """

    name: str
    label: str
    kind: str
    output: str = ""
    n_calls: int = 0
    n_params: int = 0
    n_trainable: int = 0
    multiply_adds: int = 0
    kept: int = 0
    note: str = ""
    parts: tuple[Part, ...] = ()

    def __iter__(self) -> Iterator[Part]:
        """Give the part itself and all within it, from the top."""
        yield self
        for part in self.parts:
            yield from part


@dataclass(frozen=True, repr=False)
class Summary:
    """A model's outline; prints as a table.

    `summary["layer1.0"]` is a part, `list(summary)` are all of them.

    Attributes:
        whole: the outermost part.
        inputs: what the model was called with, in words.
        param_bytes: memory of all parameters.
        buffer_bytes: memory of all buffers.
        depth: how deep to print.
    """

    whole: Part
    inputs: str
    param_bytes: int
    buffer_bytes: int
    depth: int | None = None

    @property
    def n_params(self) -> int:
        """Values of all parameters, what is shared counted once."""
        return self.whole.n_params

    @property
    def n_trainable(self) -> int:
        """Values of the parameters that require gradients."""
        return self.whole.n_trainable

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one forward pass, for the whole batch."""
        return self.whole.multiply_adds

    @property
    def kept(self) -> int:
        """Bytes kept for backward."""
        return self.whole.kept

    def __iter__(self) -> Iterator[Part]:
        return iter(self.whole)

    def __getitem__(self, name: str) -> Part:
        parts = {part.name: part for part in self}
        if name not in parts:
            raise UnknownName(f"The model has no part {name!r}.", do=did_you_mean(name, parts))
        return parts[name]

    def __repr__(self) -> str:
        frozen = self.n_params - self.n_trainable
        some_frozen = f", {frozen:,} of them frozen" if frozen else ""
        buffers = f", buffers {size(self.buffer_bytes)}" if self.buffer_bytes else ""
        return f"""\
called with {self.inputs}
{outline(self.whole, self.depth)}

parameters     {self.n_params:,}{some_frozen}
multiply-adds  {amount(self.multiply_adds)} in one pass forward
memory         parameters {size(self.param_bytes)}{buffers}; kept for backward {size(self.kept)}"""


def outline(whole: Part, depth: int | None = None) -> str:
    """Return a part and those within it as a table, down to a depth: 0 is the part alone."""
    heads = ["", "", "output", "parameters", "multiply-adds", "kept", ""]
    lines = [heads, *(_cells(part, place) for place, part in _branches(whole, depth))]
    columns = []
    for head, column in zip(heads, zip(*lines, strict=True), strict=True):
        width = max(map(len, column))
        number = head in ("parameters", "multiply-adds", "kept")
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def amount(n: int) -> str:
    """Return a number with three digits and k, M, G or T; 999 and less as it is.

    >>> amount(1814073344)
    '1.81 G'
    """
    return _in_units(n, 1000, ["", "k", "M", "G", "T", "P"])


def size(n_bytes: int) -> str:
    """Return a number of bytes with three digits and its unit, by powers of 1024.

    >>> size(46827520)
    '44.7 MiB'
    """
    return _in_units(n_bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _in_units(n: float, base: int, units: list[str]) -> str:
    level = 0
    while n >= base * 0.9995 and level < len(units) - 1:
        n, level = n / base, level + 1
    digits = 2 if n < 9.995 else 1 if n < 99.95 else 0
    return f"{n:.{digits if level else 0}f} {units[level]}".rstrip()


def _branches(
    part: Part, depth: int | None, before: str = "", below: str = ""
) -> Iterator[tuple[str, Part]]:
    """Give parts with the lines that join them."""
    yield before + (part.label if part.name else part.kind), part
    if depth != 0:
        for i, inner in enumerate(part.parts):
            last = i == len(part.parts) - 1
            joint, gap = ("└─ ", "   ") if last else ("├─ ", "│  ")
            deeper = None if depth is None else depth - 1
            yield from _branches(inner, deeper, below + joint, below + gap)


def _cells(part: Part, place: str) -> list[str]:
    return [
        place,
        part.kind if part.name else "",
        part.output or "-",
        f"{part.n_params:,}" if part.n_params else "-",
        amount(part.multiply_adds) if part.multiply_adds else "-",
        size(part.kept) if part.kept else "-",
        part.note,
    ]
