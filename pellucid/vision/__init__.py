"""Models for images, and their augmentation in whole batches."""

from .alternating import AlternatingFlip, flipped_now
from .augment import Augment, cutout, flip_and_shift, recolour, warp
from .erasing import RandomErasing, erase
from .models import (
    airbench,
    mlp,
    simple_cnn,
    small_resnet,
    xresnet,
    xresnet18,
    xresnet34,
    xresnet50,
)
from .sizes import resize
from .tta import TTAReport, tta, views

__all__ = [
    "AlternatingFlip",
    "Augment",
    "RandomErasing",
    "TTAReport",
    "airbench",
    "cutout",
    "erase",
    "flip_and_shift",
    "flipped_now",
    "mlp",
    "recolour",
    "resize",
    "simple_cnn",
    "small_resnet",
    "tta",
    "views",
    "warp",
    "xresnet",
    "xresnet18",
    "xresnet34",
    "xresnet50",
]
