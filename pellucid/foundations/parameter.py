"""Parameter: a tensor that is to be trained.

A model holds many tensors: weights, running averages, constants. Training moves only some of them,
so these need a mark. The mark is their type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Parameter(Tensor):
    """A tensor with nothing added but its type, and gradients wanted from the start.

    It is a leaf of the graph: `loss.backward()` adds to its `.grad`. What is computed from it is an
    ordinary tensor, so that `w * 2` is no parameter of anything.

    >>> Parameter(torch.tensor(3.0))
    tensor(3., requires_grad=True)
    >>> type(Parameter(torch.ones(2)) * 2).__name__
    'Tensor'

    Args:
        data: floating-point values; shared, not copied.
        requires_grad: False for a parameter that stays as it is ("frozen").
    """

    # without this, torch gives the results of all operations the type of their operands
    __torch_function__ = torch._C._disabled_torch_function_impl  # ty: ignore[incompatible-method-override]

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Parameter:
        """Mark the values of a tensor."""
        return Tensor._make_subclass(cls, data, requires_grad)

    def __repr__(self) -> str:  # ty: ignore[incompatible-method-override]
        return repr(self.detach().requires_grad_(self.requires_grad))

    # copies and pickles stay parameters; their gradient stays behind, as with torch's own

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        if id(self) not in memo:
            memo[id(self)] = Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return Parameter, (self.detach(), self.requires_grad)
