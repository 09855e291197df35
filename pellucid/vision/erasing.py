"""Random erasing: a rectangle of each image painted over."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.transforms import PerSample
from ..errors import SetupError, are_numbers


def erase(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Paint over a rectangle of each image, with the mean of each of its channels.

    Args:
        x: images (n, c, h, w), floats.
        top: (n,) int64, the first row of the rectangle.
        left: likewise, its first column.
        height: likewise, its rows; 0 erases nothing.
        width: likewise, its columns.

    Returns:
        Images like `x`.
    """
    rows = torch.arange(x.shape[2], device=x.device) - top[:, None]
    columns = torch.arange(x.shape[3], device=x.device) - left[:, None]
    down = (rows >= 0) & (rows < height[:, None])
    across = (columns >= 0) & (columns < width[:, None])
    inside = (down[:, :, None] & across[:, None, :])[:, None]
    return torch.where(inside, x.mean((2, 3), keepdim=True), x)


def _are_settings(p: Any, area: Any, ratio: Any) -> bool:
    if not isinstance(area, Sequence) or len(area) != 2:
        return False
    in_order = are_numbers(p, *area, ratio) and 0 < area[0] <= area[1] <= 1
    return in_order and 0 <= p <= 1 <= ratio


class RandomErasing(PerSample):
    """Erase a rectangle of some images, as if something stood before them (Zhong et al., 2017).

    Area and ratio are drawn for each image (the ratio's logarithm evenly), then a place where the
    rectangle fits; one that is too long is cut to the image's side. It gets the mean of each
    channel: one of the paper's fillings, and no pixel needs a number of its own.

    Args:
        p: the share of images that lose a rectangle, 0 to 1.
        area: its smallest and largest share of the image, above 0 to 1.
        ratio: the largest of height to width, 1 or more; the smallest is 1 / ratio.
    """

    n_draws = 5

    def __init__(self, p: float = 0.5, area: tuple[float, float] = (0.02, 0.4), ratio: float = 3.3):
        if not _are_settings(p, area, ratio):
            raise SetupError(
                "RandomErasing takes a probability, two shares of the area in order, and a "
                "ratio of 1 or more.",
                saw=f"p={p}, area={area}, ratio={ratio}",
                do="RandomErasing(p=0.5, area=(0.02, 0.4), ratio=3.3)",
            )
        self.p, self.area, self.ratio = p, area, ratio

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Return images, some with a rectangle erased.

        Args:
            x: images (n, c, h, w), floats.
            draws: (n, 5) float32 in [0, 1).

        Raises:
            SetupError: these are no images.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise SetupError(
                "RandomErasing takes images (n, c, h, w).",
                saw=f"a batch {tuple(x.shape)} of {x.dtype}",
                do="give rows of pixels their shape first: Reshape(1, 28, 28).",
            )
        h, w = x.shape[2:]
        chosen, size, shape, place_y, place_x = draws.unbind(1)
        smallest, largest = self.area
        area = (smallest + (largest - smallest) * size) * (h * w)
        stretch = ((2 * shape - 1) * (math.log(self.ratio) / 2)).exp()  # the ratio's square root
        height = (area.sqrt() * stretch).round().clamp(1, h)
        width = (area.sqrt() / stretch).round().clamp(1, w)
        top, left = (place_y * (h + 1 - height)).long(), (place_x * (w + 1 - width)).long()
        return erase(x, top, left, (height * (chosen < self.p)).long(), width.long())

    def __repr__(self) -> str:
        return f"RandomErasing(p={self.p}, area={self.area}, ratio={self.ratio})"
