"""Models for images. Any input size will do where the last map is averaged."""

from collections.abc import Callable, Sequence

from torch import nn

from ..errors import SetupError
from ..init import init_identity
from ..nn import AdaptivePool, Residual, conv_norm_act

Norm = Callable[[int], nn.Module]
Act = Callable[[], nn.Module]
"""What makes a norm of a number of channels, and what makes an activation."""


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
    norm: Norm | None = None,
    act: Act = nn.ReLU,
) -> nn.Sequential:
    """Return convolutions of stride 2 with ReLU, the mean over the last map, and a Linear.

    Weights begin as torch's layers do.

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        widths: channels of each convolution.
        first_kernel: size of the first kernel, odd; the others are 3×3.
        norm: makes the norm between convolution and activation, as for `conv_norm_act`; the
            convolutions then have no bias.
        act: makes the activation.
    """
    layers: list[nn.Module] = []
    kernel = first_kernel
    for before, after in zip([n_channels, *widths], widths, strict=False):
        layers.append(nn.Conv2d(before, after, kernel, 2, kernel // 2, bias=norm is None))
        layers += [act()] if norm is None else [norm(after), act()]
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

    A convolution, then a residual block a width, which halves the map where the width is another
    than the one before (He et al., 2016; the shortcut averages before it narrows, as in ResNet-D,
    He et al., 2019).

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        widths: channels of the first convolution and of its block, then of each further block.
        first_stride: of the first convolution; 1 for very small images.
    """
    first = _conv_norm(n_channels, widths[0], stride=first_stride)
    layers: list[nn.Module] = [*first, nn.ReLU()]
    for before, after in zip([widths[0], *widths], widths, strict=False):
        layers.append(_small_block(before, after))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)]
    return nn.Sequential(*layers, *head)


def _small_block(before: int, after: int) -> Residual:
    """Return two convolutions beside a shortcut; they halve the map where the width changes."""
    stride = 1 if before == after else 2
    first, second = _conv_norm(before, after, stride=stride), _conv_norm(after, after)
    body = nn.Sequential(*first, nn.ReLU(), *second)
    narrow = [nn.AvgPool2d(2, ceil_mode=True), *_conv_norm(before, after, kernel=1)]
    return Residual(body, None if before == after else nn.Sequential(*narrow), nn.ReLU())


def _conv_norm(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after)]  # the norm brings the bias


def airbench(
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (64, 256, 256),
    first_kernel: int = 2,
    act: Act = nn.GELU,
) -> nn.Sequential:
    """Return a network that learns small images in few epochs: Jordan's airbench94, 2024.

    A convolution without padding for `init.whiten`, then for each width convolution, max-pool,
    norm, activation, convolution, norm, activation; the largest value of each channel, a Linear.
    Norms have biases and no weights, and their statistics follow quickly (momentum 0.4).
    Convolutions begin as `init.init_identity` makes them. 1.97 M parameters for CIFAR-10.

    Args:
        n_channels: of the images, (n, channels, h, w), of 16×16 or more with three widths.
        n_classes: outputs.
        widths: channels of each pair of convolutions; each halves the map.
        first_kernel: size of the first kernel, k×k; it has 2 · channels · k² filters, all that
            whitening can fill.
        act: makes the activations.
    """
    n_first = 2 * n_channels * first_kernel**2
    layers: list[nn.Module] = [nn.Conv2d(n_channels, n_first, first_kernel), act()]
    for before, after in zip([n_first, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [_quick_norm(after), act()]
        layers += [nn.Conv2d(after, after, 3, padding=1, bias=False), _quick_norm(after), act()]
    init_identity(nn.Sequential(*layers[2:]))
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes, bias=False)]
    return nn.Sequential(*layers, *head)


def _quick_norm(n_channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(n_channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def xresnet18(
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (64, 128, 256, 512),
    norm: Norm | None = nn.BatchNorm2d,
    act: Act = nn.ReLU,
) -> nn.Sequential:
    """Return `xresnet` with 2, 2, 2, 2 blocks of two 3×3: 11.7 M parameters for ImageNet."""
    return xresnet(n_channels, n_classes, (2, 2, 2, 2), 1, widths, norm, act)


def xresnet34(
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (64, 128, 256, 512),
    norm: Norm | None = nn.BatchNorm2d,
    act: Act = nn.ReLU,
) -> nn.Sequential:
    """Return `xresnet` with 3, 4, 6, 3 blocks of two 3×3: 21.8 M parameters for ImageNet."""
    return xresnet(n_channels, n_classes, (3, 4, 6, 3), 1, widths, norm, act)


def xresnet50(
    n_channels: int,
    n_classes: int,
    widths: Sequence[int] = (64, 128, 256, 512),
    norm: Norm | None = nn.BatchNorm2d,
    act: Act = nn.ReLU,
) -> nn.Sequential:
    """Return `xresnet` with 3, 4, 6, 3 blocks of 1×1, 3×3, 1×1: 25.6 M parameters for ImageNet."""
    return xresnet(n_channels, n_classes, (3, 4, 6, 3), 4, widths, norm, act)


def xresnet(
    n_channels: int,
    n_classes: int,
    depths: Sequence[int],
    expansion: int = 1,
    widths: Sequence[int] = (64, 128, 256, 512),
    norm: Norm | None = nn.BatchNorm2d,
    act: Act = nn.ReLU,
) -> nn.Sequential:
    """Return a residual network with the tricks of He et al., 2019 ("Bag of Tricks").

    That is ResNet (He et al., 2016) with three 3×3 convolutions for the first 7×7, strides in the
    3×3 convolutions, shortcuts that average before a 1×1 convolution (ResNet-D), and residual
    branches whose last norm begins at zero. Maps are halved five times in all, as far as they go:
    images of 28×28 end as 1×1, those of 224×224 as 7×7.

    Args:
        n_channels: of the images, (n, channels, h, w).
        n_classes: outputs.
        depths: blocks of each stage; the counts in the names (18, 34, 50) are those of layers.
        expansion: 1 makes blocks of two 3×3 convolutions; more, bottlenecks of 1×1, 3×3, 1×1 that
            give so many times the width.
        widths: of the stages, as many as depths; the first is also the stem's, an even number.
        norm: makes the norms, as for `conv_norm_act`; with a `weight`. None leaves them out: see
            `init.fixup`.
        act: makes the activations.

    Raises:
        SetupError: there are not as many widths as depths.
    """
    if len(depths) != len(widths):
        raise SetupError(
            "xresnet needs a width for each stage.", saw=f"depths {depths}, widths {widths}"
        )
    half, width = widths[0] // 2, widths[0]
    stem: list[nn.Module] = [
        conv_norm_act(n_channels, half, 3, 2, norm, act),
        conv_norm_act(half, half, 3, 1, norm, act),
        conv_norm_act(half, width, 3, 1, norm, act),
        nn.MaxPool2d(3, 2, 1),
    ]
    stages: list[nn.Module] = []
    for stage, (depth, hidden) in enumerate(zip(depths, widths, strict=True)):
        blocks = []
        for i in range(depth):
            stride = 2 if stage and not i else 1
            blocks.append(_block(width, hidden, expansion, stride, norm, act))
            width = hidden * expansion
        stages.append(nn.Sequential(*blocks))
    return nn.Sequential(*stem, *stages, AdaptivePool(), nn.Linear(width, n_classes))


def _block(
    before: int, hidden: int, expansion: int, stride: int, norm: Norm | None, act: Act
) -> Residual:
    after, zero = hidden * expansion, norm is not None
    if expansion == 1:
        body = [
            conv_norm_act(before, hidden, 3, stride, norm, act),
            conv_norm_act(hidden, after, 3, 1, norm, None, zero_norm=zero),
        ]
    else:
        body = [
            conv_norm_act(before, hidden, 1, 1, norm, act),
            conv_norm_act(hidden, hidden, 3, stride, norm, act),
            conv_norm_act(hidden, after, 1, 1, norm, None, zero_norm=zero),
        ]
    shortcut: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
    if before != after:
        shortcut.append(conv_norm_act(before, after, 1, 1, norm, None))
    return Residual(nn.Sequential(*body), nn.Sequential(*shortcut) if shortcut else None, act())
