"""What does it cost to augment a batch on its device, with a draw for each image?

One torch thread, CPU time, in turns. Every contender takes uint8 and gives floats from 0 to 1, and
draws for each image. kornia is asked where it is installed (`pip install kornia`).
"""

import importlib.util
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from measure import in_turns, report, spread, table
from torch import Tensor

from pellucid.randomness import uniforms
from pellucid.vision.augment import Augment, flip_and_shift

REPEATS = 21
KORNIA = importlib.util.find_spec("kornia") is not None
OURS = "pellucid Augment"


def images(n: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def with_given_draws(augment: Augment, x: Tensor) -> Tensor:
    """Draw as the loaders do: numbers that belong to (seed, epoch, item)."""
    return augment(x, torch.from_numpy(uniforms(0, 1, np.arange(len(x)), augment.n_draws)))


def one_by_one(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """Do one technique after the other, each its own pass over the batch."""
    x = x.float() / 255
    for step in steps:
        x = step(x)
    return x


# ── each technique in plain torch, as one finds it written ────────────────────────────────────


def column(x: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(len(x), 1, 1, 1).uniform_(low, high)


def torch_flip(x: Tensor) -> Tensor:
    return torch.where(column(x, 0, 1) < 0.5, x.flip(3), x)


def torch_shift(x: Tensor, most: int) -> Tensor:
    """Pad by reflection and cut out a window for each image, chosen by advanced indexing."""
    n, _, h, w = x.shape
    padded = F.pad(x, (most,) * 4, mode="reflect")
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)
    down, right = torch.randint(2 * most + 1, (2, n))
    return windows[torch.arange(n), :, down, right]


def torch_sample(x: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def torch_rotate(x: Tensor) -> Tensor:
    angle = torch.empty(len(x)).uniform_(-15, 15) * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(x))
    return torch_sample(x, torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3))


def torch_crop(x: Tensor) -> Tensor:
    n = len(x)
    area, ratio = torch.empty(n).uniform_(0.5, 1), torch.empty(n).uniform_(-0.2877, 0.2877).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    right, down = (1 - wide) * (2 * torch.rand(n) - 1), (1 - high) * (2 * torch.rand(n) - 1)
    zero = torch.zeros(n)
    matrices = torch.stack([wide, zero, right, zero, high, down], 1).view(-1, 2, 3)
    return torch_sample(x, matrices)


def grey(x: Tensor) -> Tensor:
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def torch_brightness(x: Tensor) -> Tensor:
    return (x * column(x, 0.7, 1.3)).clamp(0, 1)


def torch_contrast(x: Tensor) -> Tensor:
    factor, mean = column(x, 0.7, 1.3), grey(x).mean((2, 3), keepdim=True)
    return (factor * x + (1 - factor) * mean).clamp(0, 1)


def torch_saturation(x: Tensor) -> Tensor:
    factor = column(x, 0.7, 1.3)
    return (factor * x + (1 - factor) * grey(x)).clamp(0, 1)


# ── contenders ────────────────────────────────────────────────────────────────────────────────


def kornia_steps(*names: str) -> Callable[[Tensor], Tensor]:
    """Return kornia's own sequence of these techniques, each with certainty but the flip."""
    import kornia.augmentation as K

    known = {
        "flip": lambda: K.RandomHorizontalFlip(p=0.5),
        "shift": lambda: K.RandomCrop((32, 32), padding=4, padding_mode="reflect", p=1.0),
        "rotate": lambda: K.RandomRotation(15.0, p=1.0),
        "crop": lambda: K.RandomResizedCrop((128, 128), scale=(0.5, 1.0), p=1.0),
        "colour": lambda: K.ColorJiggle(0.3, 0.3, 0.3, 0.0, p=1.0),
    }
    return K.AugmentationSequential(*[known[name]() for name in names], data_keys=["input"])


def everything() -> dict[str, Callable[[], object]]:
    x = images(64, 128)
    augment = Augment(
        flip=0.5, crop=0.5, rotate=15, brightness=0.3, contrast=0.3, saturation=0.3
    )  # fmt: skip
    colours = [torch_brightness, torch_contrast, torch_saturation]
    steps = [torch_flip, torch_rotate, torch_crop, *colours]
    found = {
        OURS: partial(with_given_draws, augment, x),
        "plain torch, one after the other": partial(one_by_one, steps, x),
        "uint8 to float alone": lambda: x.float() / 255,
    }
    if KORNIA:
        steps = [kornia_steps("flip", "rotate", "crop", "colour")]
        found["kornia AugmentationSequential"] = partial(one_by_one, steps, x)
    return found


def flips_and_shifts() -> dict[str, Callable[[], object]]:
    x = images(128, 32)
    steps = [torch_flip, partial(torch_shift, most=4)]
    matrices = torch.eye(2, 3).expand(128, 2, 3).contiguous()
    found = {
        OURS: partial(with_given_draws, Augment(flip=0.5, shift=0.125), x),
        "plain torch, flip, pad and windows": partial(one_by_one, steps, x),
        "affine_grid and grid_sample": lambda: torch_sample(x.float() / 255, matrices),
        "uint8 to float alone": lambda: x.float() / 255,
        "the draws alone": partial(uniforms, 0, 1, np.arange(128), Augment.n_draws),
        "flip_and_shift alone": partial(
            flip_and_shift,
            x,
            torch.rand(128) < 0.5,
            torch.randint(-4, 5, (128,)),
            torch.randint(-4, 5, (128,)),
        ),
    }
    if KORNIA:
        found["kornia AugmentationSequential"] = partial(
            one_by_one, [kornia_steps("flip", "shift")], x
        )
    return found


def lines(times: dict[str, list[float]]) -> list[list[str]]:
    return [
        [
            name,
            f"{statistics.median(seconds) * 1e3:.2f}",
            spread([a / b for a, b in zip(seconds, times[OURS], strict=True)], 2),
        ]
        for name, seconds in times.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    heads = ["contender", "ms a batch", "times ours"]
    parts = []
    for title, contenders in [
        ("64 × 3×128×128: flip, rotation, resized crop, three colours", everything()),
        ("128 × 3×32×32: flip and shift by up to 4 pixels", flips_and_shifts()),
    ]:
        parts += [f"## {title}", table(heads, lines(in_turns(contenders, REPEATS)))]
    if KORNIA:
        import kornia

        parts.append(f"kornia {kornia.__version__}.")
    else:
        parts.append("kornia is not installed here and was left out.")
    report("augment", "Augmenting batches", "python benchmarks/augment.py", *parts)


if __name__ == "__main__":
    main()
