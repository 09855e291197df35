"""Image files decoded to uint8 of one size, whatever they are, or a word on why they cannot be."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, SetupError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from .files import FileNames

FITS = ("crop", "pad", "stretch")
"""How an image comes to another shape: its middle; all of it, on black; all of it, distorted."""

_ORIENTATION = 0x0112
_MAX_PIXELS = 178_956_970  # Pillow's own bound against bombs: 0.5 GiB of RGB
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what EXIF's orientations 2 to 8 undo
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


class ImageFiles:
    """Images in files, and their labels: item i is (uint8 (3, h, w), label).

    Nothing is read before it is asked for. Grey, palette, CMYK and 16-bit images become RGB, what
    is transparent becomes white, and an image lies as its EXIF orientation says. Of an animation
    the first picture counts.

    Args:
        names: the files, as `scan` finds them.
        labels: class numbers (n,), or None: all 0.
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
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise SetupError("An image must have a pixel or more.", saw=f"size={size}")
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
            out[:] = 0
            return _reason(error)
        return None

    def refusal(self, item: int, reason: str) -> DataError:
        """Return the error that says which file cannot be read, and why."""
        return DataError(
            f"The file {self.names.path(item)} cannot be read as an image.",
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
    fast = _simplejpeg()
    if fast is not None and content[:3] == b"\xff\xd8\xff":
        height, width, colours, _ = fast.decode_jpeg_header(content)
        if colours in ("YCbCr", "Gray"):
            turn = _turn_of(content)
            if (height, width, turn) == (*out.shape[:2], 1):
                fast.decode_jpeg(content, "RGB", buffer=out)
                return
            _refuse_bomb(height, width)
            least = _least(height, width, out.shape, fit, turned=turn > 4)
            _fit(_turned(fast.decode_jpeg(content, "RGB", False, False, *least), turn), out, fit)
            return
    _fit(_decode_with_pillow(content, out.shape, fit), out, fit)


def image_size(path: str) -> tuple[int, int] | None:
    """Return (height, width) of an image as it lies in its file; None if it does not tell."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
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
    """Read a file; half the time of `open(path, "rb").read()`, which counts for small images."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(file).st_size
        content = os.read(file, size)
        while len(content) < size and (more := os.read(file, size - len(content))):
            content += more
    finally:
        os.close(file)
    if not content:
        raise OSError("the file is empty")
    return content


def _turn_of(content: bytes) -> int:
    """Return EXIF's orientation of a JPEG, 1 to 8; only files that have EXIF data pay for it."""
    if content.find(b"Exif\0\0", 0, 65536) < 0:
        return 1
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        turn = image.getexif().get(_ORIENTATION, 1)
    return turn if turn in _TURNS else 1


def _turned(image: np.ndarray, turn: int) -> np.ndarray:
    return _TURNS[turn](image) if turn in _TURNS else image


def _least(
    height: int, width: int, shape: Sequence[int], fit: str, turned: bool = False
) -> tuple[int, int]:
    """Return height and width, as they lie in the file, below which scaling would enlarge."""
    if turned:
        least_width, least_height = _least(width, height, shape, fit)
        return least_height, least_width
    factors = shape[0] / height, shape[1] / width
    if fit == "stretch":
        return min(shape[0], height), min(shape[1], width)
    factor = min(max(factors) if fit == "crop" else min(factors), 1)
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _decode_with_pillow(content: bytes, shape: Sequence[int], fit: str) -> np.ndarray:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images (bombs are errors) and odd metadata
        with Image.open(io.BytesIO(content)) as image:
            _refuse_bomb(image.height, image.width)
            if image.format == "JPEG":
                turned = image.getexif().get(_ORIENTATION, 1) > 4
                least = _least(image.height, image.width, shape, fit, turned)
                image.draft("RGB", (least[1], least[0]))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_as_rgb(image))


def _as_rgb(image: Any) -> Any:
    """Return a Pillow image as RGB: 16 bits cut to 8, transparent parts white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats, which have no fixed range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(
                "its pixels have 32 bits, which have no fixed range; save it as 16 bit"
            )
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{height} × {width} pixels are more than {_MAX_PIXELS:,}")


def _fit(image: np.ndarray, out: np.ndarray, fit: str) -> None:
    """Scale an image (h, w, 3) into `out`, after cutting it or within a black frame."""
    (height, width), (out_height, out_width) = image.shape[:2], out.shape[:2]
    if fit == "crop":
        factor = min(height / out_height, width / out_width)
        image = _middle(image, round(out_height * factor), round(out_width * factor))
    elif fit == "pad":
        factor = min(out_height / height, out_width / width)
        out[:] = 0
        out = _middle(out, round(height * factor), round(width * factor))
    if image.shape == out.shape:
        out[:] = image
    else:
        _scale(image, out)


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    height, width = max(height, 1), max(width, 1)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _scale(image: np.ndarray, out: np.ndarray) -> None:
    # torch's scaling of bytes takes a quarter of the time of Pillow's
    if any(stride < 0 for stride in image.strides) or not image.flags.writeable:
        image = image.copy()  # torch knows no negative strides
    channels = channels_first(torch.from_numpy(image))[None]
    scaled = F.interpolate(channels, out.shape[:2], mode="bilinear", antialias=True)
    out[:] = scaled[0].permute(1, 2, 0).numpy()


def _reason(error: Exception) -> str:
    """Say in a line why a file cannot be read, without its path, which stands beside it."""
    if isinstance(error, FileNotFoundError):
        return "it is gone, or a link that leads nowhere"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image, or of a kind that Pillow does not know"
    return str(error) or type(error).__name__
