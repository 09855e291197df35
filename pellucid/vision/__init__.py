"""Models for images, and their augmentation in whole batches."""

from .augment import Augment, cutout, flip_and_shift, recolour, warp
from .models import mlp, simple_cnn, small_resnet, xresnet, xresnet18, xresnet34, xresnet50

__all__ = [
    "Augment",
    "cutout",
    "flip_and_shift",
    "mlp",
    "recolour",
    "simple_cnn",
    "small_resnet",
    "warp",
    "xresnet",
    "xresnet18",
    "xresnet34",
    "xresnet50",
]
