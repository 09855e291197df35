"""Small models for small images. Any input size will do where the last map is averaged."""

from collections.abc import Sequence

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
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (16, 32, 64, 128),
    first_stride: int = 2,
) -> nn.Sequential:
    """Return a residual network for images of 8×8 to 64×64 pixels.

    A convolution, then a residual block a width, each but the first halving the map
    (He et al., 2016; the shortcut averages before it narrows, as in ResNet-D, He et al., 2019).

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        widths: channels of the first convolution and of its block, then of each further block.
        first_stride: of the first convolution; 1 for very small images.
    """
    first = _conv_norm(n_channels, widths[0], stride=first_stride)
    layers: list[nn.Module] = [*first, nn.ReLU()]
    for before, after in zip([widths[0], *widths], widths, strict=False):
        layers.append(_Residual(before, after))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)]
    return nn.Sequential(*layers, *head)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; halves the map where the width changes."""

    def __init__(self, before: int, after: int):
        super().__init__()
        stride = 1 if before == after else 2
        first, second = _conv_norm(before, after, stride=stride), _conv_norm(after, after)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        narrow = [nn.AvgPool2d(2, ceil_mode=True), *_conv_norm(before, after, kernel=1)]
        self.shortcut = nn.Identity() if before == after else nn.Sequential(*narrow)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def _conv_norm(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after)]  # the norm brings the bias
