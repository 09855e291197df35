"""Images made smaller or larger, in whole batches on their device."""

import torch.nn.functional as F
from torch import Tensor

from ..errors import SetupError


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images of another size, each pixel the mean of what it covers, by a linear filter.

    Args:
        x: images (n, c, h, w), floats.
        size: height and width of the result; of `x` itself, `x` is returned.

    Raises:
        SetupError: these are no images of floats.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise SetupError(
            "Only images (n, c, h, w) of floats can be resized.",
            saw=f"a batch {tuple(x.shape)} of {x.dtype}",
            do="make floats of bytes (data.Normalize), and give rows of pixels their shape.",
        )
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)
