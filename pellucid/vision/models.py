"""Small models for small images. Any input size will do where the last map is averaged."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def mlp(n_inputs: int, n_classes: int, n_hidden: int = 50) -> nn.Sequential:
    """Return Flatten-Linear-ReLU-Linear, from (n, ...) with `n_inputs` values an item."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(n_inputs, n_hidden),
        nn.ReLU(),
        nn.Linear(n_hidden, n_classes),
    )


def simple_cnn(
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (16, 32, 64, 128),
    first_kernel: int = 3,
) -> nn.Sequential:
    """Return convolutions of stride 2 with ReLU, the mean over the last map, and a Linear.

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        widths: channels of each convolution.
        first_kernel: size of the first kernel, odd; the others are 3×3.
    """
    layers: list[nn.Module] = []
    kernel = first_kernel
    for before, after in zip([n_channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        kernel = 3
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)]
    return nn.Sequential(*layers, *head)


def small_resnet(
    n_channels: int, n_classes: int, widths: Sequence[int] = (16, 32, 64, 128)
) -> nn.Sequential:
    """Return a residual network for images of 8×8 to 64×64 pixels.

    A convolution, then for each further width: halve the map, widen, and add what one more
    convolution makes of it. Every convolution is followed by batch norm and ReLU.

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        widths: channels of the first convolution and of each stage.
    """
    layers: list[nn.Module] = [_conv_norm_relu(n_channels, widths[0])]
    for before, after in pairwise(widths):
        layers += [nn.MaxPool2d(2), _conv_norm_relu(before, after), _Residual(after)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)]
    return nn.Sequential(*layers, *head)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = _conv_norm_relu(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv_norm_relu(before: int, after: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)  # the norm brings a bias
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))
