"""ReLU: what makes a deep model more than a shallow one.

Two Linear layers in a row are one Linear layer, since a product of matrices is a matrix. With a
bend between them they are not, and enough of them can come near any function.
"""

from torch import Tensor

from .module import Module


class ReLU(Module):
    """Return max(x, 0).

    The slope is 1 above zero and 0 below; at zero, where there is none, torch takes 0, and so do
    we. A NaN stays NaN: it is not ≤ 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x with 0 for everything below it."""
        return x.masked_fill(x <= 0, 0)
