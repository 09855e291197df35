"""Image files decoded to uint8 of one size, whatever they are, or a word on why they cannot be."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, SetupError, UnknownName, did_you_mean
from .files import FileNames, printable

FITS = ("crop", "pad", "stretch")
"""How an image comes to another shape: its middle; all of it, on black; all of it, distorted."""

_ORIENTATION = 0x0112
_MAX_SIDE = 8192
_MAX_PIXELS = 178_956_970  # Pillow's own bound against bombs: 0.5 GiB of RGB
_MOST = 131_072  # bytes read at once: most images, and a larger allocation costs more
_OUR_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # the machine's, not the file's
_OPENING = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_ONE_AT_A_TIME = Lock()
_PLACES: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    # EXIF's orientations: how to look at a place so that what is written as it lies comes upright
    2: lambda place: place[:, ::-1],
    3: lambda place: place[::-1, ::-1],
    4: lambda place: place[::-1],
    5: lambda place: place.swapaxes(0, 1),
    6: lambda place: place.swapaxes(0, 1)[::-1],
    7: lambda place: place.swapaxes(0, 1)[::-1, ::-1],
    8: lambda place: place.swapaxes(0, 1)[:, ::-1],
}


class _Unfit(ValueError):
    """An image that is whole, but not one that we decode; says why."""


class ImageFiles:
    """Images in files, and their labels: item i is (uint8 (3, h, w), label).

    Nothing is read before it is asked for. Grey, palette, CMYK and 16-bit images become RGB, what
    is transparent becomes white, and an image lies as its EXIF orientation says. Of an animation
    the first picture counts.

    Args:
        names: the files, as `scan` finds them.
        labels: class numbers (n,), as `encode(label_files(names, "folder"), classes, names)` gives
            them; or None: all 0.
        size: side of the square, or (height, width), in pixels.
        fit: "crop" scales the shorter side and cuts out the middle, "pad" scales the longer side
            and fills up with black, "stretch" scales both and distorts.
    """

    def __init__(
        self,
        names: FileNames,
        labels: Sequence[int] | np.ndarray | Tensor | None = None,
        size: int | tuple[int, int] = 64,
        fit: str = "crop",
    ):
        if fit not in FITS:
            raise UnknownName(
                f"There is no way {fit!r} to fit an image.", do=did_you_mean(fit, FITS)
            )
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if len(sides) != 2 or not all(
            type(side) is int and 1 <= side <= _MAX_SIDE for side in sides
        ):
            raise SetupError(
                f"The size of an image is a number of pixels, 1 to {_MAX_SIDE}, or two such.",
                saw=f"size={size!r}",
            )
        height, width = sides
        self.names, self.shape, self.fit = names, (height, width, 3), fit
        self.labels = torch.as_tensor(np.zeros(len(names)) if labels is None else labels).long()
        if len(self.labels) != len(names):
            raise DataError(
                "There must be a label for every file.",
                saw=f"{len(names)} files, {len(self.labels)} labels",
            )

    def read(self, item: int, out: np.ndarray) -> str | None:
        """Decode one image into `out`, uint8 of `shape`; return None, or why it cannot be read."""
        try:
            decode_image(_content(self.names.path(item)), out, self.fit)
        except Exception as error:  # a decoder may raise anything over a broken file
            if isinstance(error, (MemoryError, ImportError)):
                raise
            if isinstance(error, OSError) and error.errno in _OUR_TROUBLE:
                raise
            out[:] = 0
            return _reason(error)
        return None

    def refusal(self, item: int, reason: str) -> DataError:
        """Return the error that says which file cannot be read, and why."""
        return DataError(
            f"The file {printable(self.names.path(item))} cannot be read as an image.",
            saw=reason,
            do="mend or remove it, or leave such files out: "
            'DataLoaders.from_folder(..., bad="skip").',
        )

    def subset(self, items: np.ndarray) -> ImageFiles:
        """Return the data set of some of the items, by number."""
        return ImageFiles(self.names[items], self.labels[items], self.shape[:2], self.fit)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        image = np.empty(self.shape, np.uint8)
        if reason := self.read(item, image):
            raise self.refusal(item, reason)
        return channels_first(torch.from_numpy(image)), self.labels[item]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ImageFiles({len(self):,} of {self.shape[0]}×{self.shape[1]}, {self.names.root})"


def channels_first(images: Tensor) -> Tensor:
    """Return (..., h, w, c) as (..., c, h, w) without a copy; torch calls it channels last."""
    return images.movedim(-1, -3)


def decode_image(content: bytes, out: np.ndarray, fit: str = "crop") -> None:
    """Decode the bytes of an image file into `out`, contiguous uint8 (height, width, 3).

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size by libjpeg where that still leaves every
    side as long as it must be, and the rest is done by antialiased bilinear scaling. simplejpeg
    serves where it is installed and the file is a common JPEG, Pillow everywhere else.

    Raises:
        ValueError, OSError: no image, a broken one, or one of more than 179 million pixels.
    """
    if not content.startswith(b"\xff\xd8\xff"):
        _decode_with_pillow(content, out, fit)
        return
    turn, fast = _turn_of(content), _simplejpeg()
    try:
        if fast is not None and _decode_common(fast, content, out, fit, turn):
            return
    except ValueError as error:
        if str(error).startswith(("Corrupt", "Premature")):  # other warnings spoil no pixels
            raise
    _decode_with_pillow(content, out, fit, turn)


def image_size(path: str) -> tuple[int, int] | None:
    """Return (height, width) of an image as it lies in its file; None if it does not tell."""
    from PIL import Image

    try:
        with _quietly(), Image.open(path) as image:
            return image.height, image.width
    except Exception:  # decoders may raise anything over a broken file
        return None


def engine() -> str:
    """Name what decodes and scales here: other engines give slightly other pixels."""
    import PIL

    fast = _simplejpeg()
    jpeg = f"simplejpeg {fast.__version__}, " if fast else ""
    return f"{jpeg}Pillow {PIL.__version__}, torch {torch.__version__}"


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _content(path: str) -> bytes:
    """Read a file; a third of the time of `open(path, "rb").read()`, much for a small image."""
    file = os.open(path, _OPENING)
    try:
        content = os.read(file, _MOST)  # less than that is all: no `fstat` for small files
        if len(content) == _MOST:
            parts = [content]
            while part := os.read(file, max(os.fstat(file).st_size - _MOST, _MOST)):
                parts.append(part)
            content = b"".join(parts)
    finally:
        os.close(file)
    if not content:
        raise _Unfit("the file is empty")
    return content


def _turn_of(content: bytes) -> int:
    """Return EXIF's orientation of a JPEG, which may be any number; 1 if it has none."""
    # it must be the first segment and is among the first few: to search all took 50 µs of 1000
    if content.find(b"Exif\0\0", 0, 4096) < 0:
        return 1
    at = 2
    try:
        while content[at] == 0xFF and content[at + 1] != 0xDA:  # segments before the pixels
            kind, length = struct.unpack_from(">HH", content, at)
            if kind == 0xFFE1 and content.startswith(b"Exif\0\0", at + 4):
                return _orientation(content[at + 10 : at + 2 + length])
            at += 2 + length
    except (struct.error, IndexError):
        pass
    return 1


def _orientation(tiff: bytes) -> int:
    """Return the orientation that EXIF data hold, 1 without one; struct.error if they are cut."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == _ORIENTATION:
            return value if kind == 3 else 1
    return 1


def _place(out: np.ndarray, turn: int) -> np.ndarray:
    return _PLACES[turn](out) if turn in _PLACES else out


def _shrunk(height: int, width: int, shape: Sequence[int], fit: str) -> int:
    """Return 8, 4, 2 or 1: libjpeg may decode a JPEG so many times smaller for this shape.

    Not 3/8, 5/8, 6/8 or 7/8, which take longer than 4/8 or 8/8: 0.77, 1.06, 1.24, 1.53 ms against
    0.71 and 0.85 (500×375 at quality 90). And as far as it goes: to leave at least 1.5 or 2 times
    the sides costs the gain: 160 of 375 then take 8/8, from which 4/8 differs by 41 dB, 1.5 levels
    of 255 on average, in 20 % less time.
    """
    factors = shape[0] / height, shape[1] / width
    factor = min(factors) if fit == "pad" else max(factors)
    if min(height, width) < 8:  # too few pixels to ask by their number for one scale
        return 1
    return next((k for k in (8, 4, 2) if k * factor <= 1), 1)


@contextmanager
def _quietly() -> Generator[None]:
    """Drop Pillow's warnings, of odd metadata and large images (bombs are errors)."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():  # two at a time would leave the filters wrong
        warnings.simplefilter("ignore")
        yield


def _decode_common(fast: ModuleType, content: bytes, out: np.ndarray, fit: str, turn: int) -> bool:
    """Decode a JPEG with simplejpeg; False if it is of a rare kind, or its header is broken."""
    try:
        height, width, colours, _ = fast.decode_jpeg_header(content)
    except ValueError:
        return False
    if colours not in ("YCbCr", "Gray"):
        return False
    if turn == 1 and out.shape == (height, width, 3):
        fast.decode_jpeg(content, "RGB", buffer=out)
        return True
    _refuse_bomb(height, width)
    place = _place(out, turn)
    k = _shrunk(height, width, place.shape, fit)
    least = (math.ceil(height / k), math.ceil(width / k)) if k > 1 else (0, 0)
    image = fast.decode_jpeg(content, "RGB", False, False, *least)
    _fit(image, (height / k, width / k), place, fit)
    return True


def _decode_with_pillow(content: bytes, out: np.ndarray, fit: str, turn: int | None = None) -> None:
    """Decode into `out`; `turn` is a JPEG's orientation, None for other formats."""
    from PIL import Image

    with _quietly():
        image = Image.open(io.BytesIO(content))
    with image:
        if image.format == "EPS":
            raise _Unfit("it is PostScript, a program that would have to be run")
        height, width, k = image.height, image.width, 1
        _refuse_bomb(height, width)
        if turn is not None:
            k = _shrunk(height, width, _place(out, turn).shape, fit)
            image.draft("RGB", (width // k, height // k))
        image.load()
        drafted = image.size != (width, height) and turn is not None
        place = _place(out, _turn_in(image) if turn is None else turn)
        pixels = np.asarray(_as_rgb(image))
        _fit(pixels, (height / k, width / k) if drafted else pixels.shape[:2], place, fit)


def _turn_in(image: Any) -> int:
    try:
        with _quietly():
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # what comes of broken EXIF data is never the same
        return 1


def _as_rgb(image: Any) -> Any:
    """Return a Pillow image as RGB: 16 bits cut to 8, transparent parts white."""
    from PIL import Image

    if image.mode == "F":
        raise _Unfit("its pixels are floats, which have no fixed range; save it as 8 or 16 bit")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of them it means 16 bits
        raise _Unfit("its pixels have 32 bits, which have no fixed range; save it as 16 bit")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise _Unfit(f"it has more than {_MAX_PIXELS:,} pixels: {height} × {width}")


def _fit(image: np.ndarray, size: tuple[float, float], place: np.ndarray, fit: str) -> None:
    """Scale an image (h, w, 3) into `place`, after cutting it or within a black frame.

    Args:
        image: of it counts the middle, or all.
        size: its height and width; with a fraction if a JPEG's last row and column are so much
            of a pixel. Without it a large image shifts by up to a pixel: 32 dB become 41.
        place: uint8 (height, width, 3).
        fit: one of FITS.
    """
    (height, width), (rows, columns) = size, place.shape[:2]
    if fit == "crop":
        factor = min(height / rows, width / columns)
        size = max(rows * factor, 1), max(columns * factor, 1)
        image = _middle(image, height, width, *size)
    elif fit == "pad":
        factor = min(rows / height, columns / width)
        place[:] = 0
        inner = max(round(height * factor), 1), max(round(width * factor), 1)
        place = _middle(place, rows, columns, *inner)
    if place.shape[:2] == size:
        place[:] = image
    else:
        _scale(image, size, place)


def _middle(
    array: np.ndarray, height: float, width: float, rows: float, columns: float
) -> np.ndarray:
    """Return the middle `rows` and `columns` of an array of `height` and `width`."""
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return array[top : top + math.ceil(rows), left : left + math.ceil(columns)]


def _scale(image: np.ndarray, size: tuple[float, float], place: np.ndarray) -> None:
    # torch's scaling of bytes takes a quarter of the time of Pillow's; of memory that is not
    # strictly channels last it makes planes, which doubles the time
    if not image.flags.writeable:
        image = image.copy()
    channels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    channels = channels.contiguous(memory_format=torch.channels_last)
    rows, columns = place.shape[:2]
    # a hair more than is needed: sizes are rounded down
    factors = rows / size[0] * (1 + 1e-9), columns / size[1] * (1 + 1e-9)
    scaled = F.interpolate(channels, scale_factor=factors, mode="bilinear", antialias=True)
    place[:] = scaled[0, :, :rows, :columns].permute(1, 2, 0).numpy()


def _reason(error: Exception) -> str:
    """Say in a line why a file cannot be read, without its path, which stands beside it."""
    if isinstance(error, FileNotFoundError):
        return "it is gone, or a link that leads nowhere"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, _Unfit):
        return str(error)
    if type(error).__name__ == "DecompressionBombError":
        return f"it has more than {_MAX_PIXELS:,} pixels"
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image, of a kind that Pillow does not know, or cut short"
    return f"it is broken or cut short ({str(error) or type(error).__name__})"
