"""A trained image classifier in a folder: what it needs to say the class of an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from . import vision, weights
from .data import DataLoaders, FileNames, ImageFiles, Normalize, first
from .errors import DataError, DataNotFound

MODELS = ("mlp", "simple_cnn", "small_resnet")
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, ITU-R BT.601
_WEIGHTS, _FACTS = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Trained:
    """A model, and how its images were made.

    Args:
        model: gives (n, classes) for normalised images (n, channels, height, width).
        name: of the model, one of `MODELS`.
        shape: (channels, height, width) of an image.
        classes: their names.
        mean: of the pixels, as in `Normalize`.
        std: likewise.
        brightest: the pixel value that stands for white.
    """

    model: nn.Module
    name: str
    shape: tuple[int, int, int]
    classes: list[str]
    mean: list[float]
    std: list[float]
    brightest: int

    @classmethod
    def on(cls, data: DataLoaders, name: str, brightest: int = 255) -> Trained:
        """Make a model for image data that are normalised."""
        x = first(data.train)[0]
        normalize = next(fn for fn in data.transforms if isinstance(fn, Normalize))
        shape, classes = (x.shape[1], x.shape[2], x.shape[3]), data.classes or []
        mean, std = normalize.mean.flatten().tolist(), normalize.std.flatten().tolist()
        return cls(_build(name, shape, len(classes)), name, shape, classes, mean, std, brightest)

    @classmethod
    def load(cls, folder: str | Path) -> Trained:
        """Read what `save` wrote.

        Raises:
            DataNotFound: the folder holds no trained model.
            DataError: its files are broken, or do not belong together.
        """
        folder = Path(folder)
        if not (folder / _FACTS).is_file() or not (folder / _WEIGHTS).is_file():
            raise DataNotFound(
                f"There is no trained model in {folder}.",
                do="give the folder that `pellucid train` named at its end.",
            )
        try:
            facts: dict[str, Any] = json.loads((folder / _FACTS).read_text("utf-8"))
            _check(facts)
            facts["shape"] = tuple(facts["shape"])
            model = _build(facts["name"], facts["shape"], len(facts["classes"]))
            weights.load(model, folder / _WEIGHTS, torch.device("cpu"))
            return cls(model, **facts)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise DataError(
                f"The trained model in {folder} cannot be read.",
                saw=str(error).splitlines()[0],
                do="train it again.",
            ) from None

    def save(self, folder: Path) -> None:
        """Write weights and facts into a folder."""
        facts = {key: value for key, value in vars(self).items() if key != "model"}
        (folder / _FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
        weights.save(self.model, folder / _WEIGHTS)

    def predict(
        self, images: Sequence[Path]
    ) -> Iterator[tuple[Path, tuple[str, float] | DataError]]:
        """Give for each image file its class and the class's probability, or what is wrong.

        A coloured image for a model of grey ones is turned grey.
        """
        images = [Path(image) for image in images]
        names = FileNames("/", [str(path.absolute())[1:] for path in images])
        files = ImageFiles(names, size=self.shape[1:])
        self.model.eval()
        for item, path in enumerate(images):
            pixels = np.empty(files.shape, np.uint8)
            if reason := files.read(item, pixels):
                yield path, DataError(f"The file {path} cannot be read as an image.", saw=reason)
                continue
            with torch.inference_mode():
                chances = self.model(self._input(pixels)).softmax(1)[0]
            best = int(chances.argmax())
            yield path, (self.classes[best], float(chances[best]))

    def _input(self, pixels: np.ndarray) -> Tensor:
        """Return (h, w, 3) bytes as the batch of one that the model was trained on."""
        x = torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255
        if self.shape[0] == 1:
            x = (x * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return Normalize(self.mean, self.std)(x * (self.brightest / 255))


def _check(facts: dict[str, Any]) -> None:
    """Raise a ValueError unless these are facts that `save` could have written."""
    numbers = [*facts["shape"], facts["brightest"], *facts["mean"], *facts["std"]]
    if facts["name"] not in MODELS or len(facts["shape"]) != 3 or min(facts["shape"]) < 1:
        raise ValueError(f"a model {facts['name']!r} for {facts['shape']}")
    if not all(isinstance(number, (int, float)) for number in numbers) or min(facts["std"]) <= 0:
        raise ValueError(f"numbers {numbers}")
    words = isinstance(facts["classes"], list) and facts["classes"]
    if not words or not all(isinstance(word, str) for word in facts["classes"]):
        raise ValueError(f"classes {facts['classes']}")
    if len(facts["mean"]) not in (1, facts["shape"][0]) or max(facts["shape"]) > 4096:
        raise ValueError(f"images {facts['shape']}")


def _build(name: str, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    n_channels, height, width = shape
    if name == "mlp":
        model = vision.mlp(n_channels * height * width, n_classes)
    elif name == "small_resnet" and width < 16:  # nothing is left of it after four halvings
        model = vision.small_resnet(n_channels, n_classes, (16, 32), first_stride=1)
    else:
        model = getattr(vision, name)(n_channels, n_classes)
    # on a CPU convolutions of a small net are a third faster so; others do not mind
    return convert_conv2d_weight_memory_format(model, torch.channels_last)
