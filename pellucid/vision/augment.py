"""Augmentation of whole batches of images on the device, with a draw for each image.

The techniques are plain functions: `flip_and_shift`, `warp`, `recolour`, `cutout`. `Augment` draws
for them and puts them together. Nothing is read back from the device.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.transforms import PerSample
from ..errors import SetupError
from .erasing import erase

_STRETCH = 4 / 3
"""The most that a crop changes the ratio of width to height, as in torchvision."""


def flip_and_shift(x: Tensor, flipped: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Mirror images left-right, then move them by whole pixels.

    What comes in from outside is the mirror image at the edge, the edge pixel repeated. Pixels are
    moved, never mixed. (One gather by index: a quarter of the time of `grid_sample`.)

    Args:
        x: images (n, c, h, w), any dtype.
        flipped: (n,) bool.
        right: (n,) int64, pixels; negative is left.
        down: (n,) int64, likewise.

    Returns:
        Images like `x`, contiguous.
    """
    n, c, h, w = x.shape
    columns = torch.arange(w, device=x.device) - right[:, None]
    columns = torch.where(flipped[:, None], w - 1 - columns, columns)
    rows = torch.arange(h, device=x.device) - down[:, None]
    pixels = _mirrored(rows, h)[:, :, None] * w + _mirrored(columns, w)[:, None, :]
    moved = x.flatten(2).gather(2, pixels.view(n, 1, h * w).expand(n, c, h * w))
    return moved.view(n, c, h, w)


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Return where in 0 .. size-1 a place lies that is tiled by an image and its mirror image."""
    places = places % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)


def warp(x: Tensor, matrices: Tensor) -> Tensor:
    """Sample each image anew under an affine map of its own, bilinearly, once.

    What lies outside an image is its mirror image at the edge. Coordinates are those of torch's
    `affine_grid`: from -1 to 1, edge to edge, x to the right and y down (`align_corners=False`).

    Args:
        x: images (n, c, h, w), float32.
        matrices: (n, 2, 3) float32, from a place in the result to the place in `x` it shows.

    Returns:
        Images like `x`.
    """
    h, w = x.shape[2:]
    ys, xs = _centres(h, matrices), _centres(w, matrices)
    across = matrices[:, None, None, :, 0] * xs[:, None]  # (n, 1, w, 2)
    down = matrices[:, None, None, :, 1] * ys[:, None, None] + matrices[:, None, None, :, 2]
    # as complex numbers both coordinates are written by one addition: 0.6 ms for 64 images of
    # 128×128, as pairs 3.2, by torch's affine_grid 13.6
    grid = torch.view_as_complex(across.contiguous()) + torch.view_as_complex(down.contiguous())
    places = torch.view_as_real(grid)
    return F.grid_sample(x, places, padding_mode="reflection", align_corners=False)


def _centres(size: int, like: Tensor) -> Tensor:
    """Return the middles of `size` pixels that lie from -1 to 1."""
    return torch.arange(1 - size, size, 2, dtype=like.dtype, device=like.device) / size


def recolour(
    x: Tensor,
    brightness: Tensor | None = None,
    contrast: Tensor | None = None,
    saturation: Tensor | None = None,
) -> Tensor:
    """Change brightness, then contrast, then saturation, as torchvision's ColorJitter defines them.

    Brightness multiplies; contrast blends with the mean of the grey image; saturation blends with
    the grey image (0.299 red + 0.587 green + 0.114 blue). All three together are one affine map
    of the colours, clamped to [0, 1] once, at the end.

    Args:
        x: images (n, c, h, w) with c of 1 or 3, floats from 0 to 1.
        brightness: (n,) factors of at least 0; 1 changes nothing, and so does None.
        contrast: likewise.
        saturation: likewise; it does nothing to one channel.

    Returns:
        Images like `x`.
    """
    scale: Tensor | float = 1.0
    offset: Tensor | float = 0.0
    if brightness is not None:
        scale = brightness.view(-1, 1, 1, 1)
    if contrast is not None:
        contrast = contrast.view(-1, 1, 1, 1)
        mean = _grey(x.mean((2, 3), keepdim=True))
        scale, offset = scale * contrast, (1 - contrast) * scale * mean
    if saturation is not None:
        saturation = saturation.view(-1, 1, 1, 1)
        scale, offset = scale * saturation, _grey(x).mul(scale * (1 - saturation)).add_(offset)
    y = x * scale
    return (y.add_(offset) if isinstance(offset, Tensor) else y).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Return (n, 1, h, w) of (n, c, h, w) with c of 1 or 3: the luma of ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def cutout(x: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Erase a square of each image (DeVries & Taylor, 2017), filled with the image's own mean.

    Args:
        x: images (n, c, h, w), float.
        rows: (n,) int64, the row of the square's middle, 0 to h-1; what sticks out is cut off.
        columns: (n,) likewise, 0 to w-1.
        side: of the square, in pixels.

    Returns:
        Images like `x`; the colour of the square is the mean of each channel.
    """
    sides = torch.full_like(rows, side)
    return erase(x, rows - side // 2, columns - side // 2, sides, sides)


class _Draws(NamedTuple):
    """The numbers of each image by name, (n,) each.

    All are drawn whatever is asked for, so that one setting does not change the draws of another.
    """

    flip: Tensor
    shift_x: Tensor
    shift_y: Tensor
    area: Tensor
    stretch: Tensor
    crop_x: Tensor
    crop_y: Tensor
    rotate: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    cutout_x: Tensor
    cutout_y: Tensor


class Augment(PerSample):
    """Change each image of a batch a little, on its device: geometry, then colour, then cutout.

    Flips and shifts alone move whole pixels and keep images sharp. With a crop or a rotation all
    geometry is one bilinear sampling. What comes in from outside is the mirror image at the edge.
    What is not asked for costs nothing.

    Args:
        flip: probability of mirroring left-right, 0 to 1.
        shift: the largest shift as a share of the side, 0 to 1, in whole pixels and at least one;
            all shifts are equally likely.
        crop: the smallest share of the area that a crop keeps, above 0 to 1. The crop's size,
            place and ratio (the image's own, times 3/4 to 4/3) are drawn; it is enlarged to the
            full size.
        rotate: the largest angle in degrees, 0 to 180, either way.
        brightness: factors from 1 - brightness to 1 + brightness, 0 to 1; see `recolour`.
        contrast: likewise.
        saturation: likewise; for images of 3 channels.
        cutout: side of the erased square as a share of the shorter side, 0 to 1; see `cutout`.
    """

    n_draws = len(_Draws._fields)
    takes_bytes = True  # to flip and shift them costs a quarter of what floats do

    def __init__(
        self,
        flip: float = 0.0,
        shift: float = 0.0,
        crop: float = 1.0,
        rotate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        cutout: float = 0.0,
    ):
        self.flip, self.shift, self.crop, self.rotate = flip, shift, crop, rotate
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.cutout = cutout
        for name, value in vars(self).items():
            _check(name, value)

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Return images changed by their draws.

        Args:
            x: images (n, c, h, w), uint8 or floats from 0 to 1, in any memory format.
            draws: (n, 13) float32 in [0, 1).

        Returns:
            Images of the same size and memory format, float32 from 0 to 1.
        """
        self._check_images(x)
        drawn = _Draws(*draws.unbind(1))
        y = _pixels(self._place(x, drawn))
        if self._colours:
            y = recolour(
                y,
                _factors(self.brightness, drawn.brightness),
                _factors(self.contrast, drawn.contrast),
                _factors(self.saturation, drawn.saturation),
            )
        if self.cutout:
            h, w = x.shape[2:]
            side = max(round(self.cutout * min(h, w)), 1)
            y = cutout(y, _one_of(h, drawn.cutout_y), _one_of(w, drawn.cutout_x), side)
        return y.contiguous(memory_format=_memory_format(x))

    def view_draws(self, draws: Tensor, mirrored: bool, alone: bool) -> Tensor:
        """Return draws that mirror, or do not; alone: and do nothing else.

        Args:
            draws: (13,) float32 in [0, 1), of one image; they stay as they are.
            mirrored: whether to mirror, if `flip` is not 0.
            alone: whether all else shall be as it was, cutout excepted.
        """
        nearly_1 = 1 - 2**-24
        if alone:
            draws = torch.full_like(draws, 0.5)  # neither left nor right, neither more nor less
            draws[_Draws._fields.index("area")] = nearly_1
        draws = draws.clone()
        draws[_Draws._fields.index("flip")] = 0 if mirrored else nearly_1
        return draws

    def _place(self, x: Tensor, drawn: _Draws) -> Tensor:
        """Return images as they are, with their pixels moved, or sampled anew."""
        if not (self.flip or self.shift or self._samples):
            return x
        flipped = drawn.flip < self.flip
        right = self._shift(x.shape[3], drawn.shift_x)
        down = self._shift(x.shape[2], drawn.shift_y)
        if self._samples:
            return warp(_pixels(x).contiguous(), self._matrices(x, drawn, flipped, right, down))
        return flip_and_shift(x, flipped, right, down)

    @property
    def _samples(self) -> bool:
        return self.crop < 1 or self.rotate > 0

    @property
    def _colours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation))

    def _shift(self, size: int, draw: Tensor) -> Tensor:
        """Return whole pixels, (n,)."""
        most = max(round(self.shift * size), 1) if self.shift else 0
        return _one_of(2 * most + 1, draw) - most

    def _matrices(
        self, x: Tensor, drawn: _Draws, flipped: Tensor, right: Tensor, down: Tensor
    ) -> Tensor:
        """Return (n, 2, 3): the place of an output pixel, turned, cropped, moved back, mirrored.

        Only operations that round alike in every place of a batch: an image's matrix must not
        depend on its neighbours, as sums of a matrix product may.
        """
        h, w = x.shape[2:]
        angle = (2 * drawn.rotate - 1) * math.radians(self.rotate)
        cos, sin = angle.cos(), angle.sin()
        wide, high = self._crop(drawn)
        centre_x, centre_y = (
            (1 - wide) * (2 * drawn.crop_x - 1),
            (1 - high) * (2 * drawn.crop_y - 1),
        )
        mirror = 1 - 2 * flipped.float()
        columns = [
            mirror * wide * cos,
            -mirror * wide * sin * (h / w),  # turned in pixels, not in shares of the sides
            mirror * (centre_x - right.float() * (2 / w)),
            high * sin * (w / h),
            high * cos,
            centre_y - down.float() * (2 / h),
        ]
        return torch.stack(columns, dim=1).view(-1, 2, 3)

    def _crop(self, drawn: _Draws) -> tuple[Tensor, Tensor]:
        """Return width and height of the crops as shares of the sides, (n,) each."""
        area = self.crop + (1 - self.crop) * drawn.area
        longest = area.sqrt()
        # no longer than the image: a crop that keeps nearly all must keep the ratio as well
        most = (1 / longest).clamp(max=math.sqrt(_STRETCH))
        # (1 + z) / (1 - z) with even z: 3/4 is as likely as 4/3, as for an even logarithm
        z = (2 * drawn.stretch - 1) * ((most - 1) / (most + 1))
        stretch = (1 + z) / (1 - z)
        return longest * stretch, longest / stretch

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise SetupError(
                "Augment takes images (n, c, h, w), uint8 or floats from 0 to 1.",
                saw=f"a batch {tuple(x.shape)} of {x.dtype}",
                do="give rows of pixels their shape first: Reshape(1, 28, 28).",
            )
        channels = x.shape[1]
        if self._colours and channels not in (1, 3):
            raise SetupError(
                "Colours are changed in images of 1 or 3 channels only.",
                saw=f"{channels} channels, and {self}",
                do="leave out brightness, contrast and saturation.",
            )
        if self.saturation and channels == 1:
            raise SetupError(
                "Saturation does nothing to images of one channel.",
                saw=f"1 channel, and {self}",
                do="leave out saturation.",
            )

    def __repr__(self) -> str:
        neutral = {"crop": 1}
        asked = [f"{k}={v!r}" for k, v in vars(self).items() if v != neutral.get(k, 0)]
        return f"Augment({', '.join(asked)})"


def _check(name: str, value: float) -> None:
    """Refuse a setting that is not a number in its range."""
    kinds = {
        "flip": "a probability from 0 to 1",
        "crop": "a share above 0 and up to 1",
        "rotate": "an angle from 0 to 180 degrees",
    }
    most = 180 if name == "rotate" else 1
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0 <= value <= most) or (name == "crop" and value == 0):
        raise SetupError(
            f"Augment's {name} is {kinds.get(name, 'a share from 0 to 1')}.",
            saw=f"{name}={value!r}",
            do=f"{name}={int(name == 'crop')} leaves images as they are.",
        )


def _factors(strength: float, draws: Tensor) -> Tensor | None:
    """Return factors from 1 - strength to 1 + strength, (n,)."""
    return 1 + strength * (2 * draws - 1) if strength else None


def _pixels(x: Tensor) -> Tensor:
    """Return floats from 0 to 1 of uint8 or of floats."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def _one_of(size: int, draws: Tensor) -> Tensor:
    """Return one of 0 .. size-1 for each draw, (n,) int64.

    A draw is a multiple of 2**-24 below 1, so that its product with a size never rounds up to it.
    """
    return (draws * size).long()


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
