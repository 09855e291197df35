"""Test-time augmentation: predicting from several views of an image, those it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import preserved_order
from ..data.sliced import whole
from ..data.transforms import PerSample
from ..errors import SetupError
from ..metrics import MetricObject, accuracy
from ..randomness import uniforms
from ..snapshot import preserved_random_state
from ..tree import join, leaves, map_leaves, split, to_device
from .alternating import AlternatingFlip
from .augment import Augment
from .erasing import RandomErasing

if TYPE_CHECKING:
    from ..learner import Learner

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TTAReport:
    """What test-time augmentation gives, beside what the plain images give; prints as a table.

    Attributes:
        plain: each metric of the plain images, by name.
        tta: likewise, of the mean over all views.
        preds: the mean of the model's outputs over all views, (n, ...), on the CPU.
        n_views: views an image, the plain one among them.
        of: the augmentation that the views are derived from, as text.
    """

    plain: dict[str, float]
    tta: dict[str, float]
    preds: Any
    n_views: int
    of: str

    def __str__(self) -> str:
        width = max(map(len, self.plain), default=0)
        lines = [f"{'':<{width}}    plain      TTA   change  ({self.n_views} views by {self.of})"]
        for name, plain in self.plain.items():
            tta = self.tta[name]
            lines.append(f"{name:<{width}} {plain:8.4f} {tta:8.4f} {tta - plain:+8.4f}")
        return "\n".join(lines)


def tta(learn: Learner, n_views: int = 6, loader: Iterable[Any] | None = None) -> TTAReport:
    """Predict from the mean over several views of each image, and compare with plain predictions.

    The views come from what the data declare as training augmentation, and from nothing else: see
    `views`. The learner is left as it is.

    Args:
        learn: its metrics are reported, and accuracy for data with classes.
        n_views: 2 or more, the plain image among them; each costs a pass over the data.
        loader: by default the validation data. Every pass over it must give the same batches.

    Raises:
        SetupError: the data declare no augmentation that makes views, or have no validation part.
    """
    loader = whole(learn.data.valid if loader is None else loader)
    if loader is None:
        raise SetupError("There are no validation data.", do="tta(learn, loader=loader)")
    kept, found = learn.data, []
    try:
        for view in views(kept.augment, n_views):
            learn.data = copy.copy(kept)
            learn.data.transforms = [view, *kept.transforms]
            found.append(learn.predict(loader))
    finally:
        learn.data = kept
    with preserved_order(loader), preserved_random_state():
        targets = join([split(batch, kept.n_inputs)[1] for batch in loader])
    targets = to_device(targets, torch.device("cpu"))
    mean = _mean(found)
    metrics = dict(learn.metrics)
    if kept.classes is not None:
        metrics.setdefault("accuracy", accuracy)
    plain, of_views = (_measured(metrics, preds, targets) for preds in (found[0], mean))
    return TTAReport(plain, of_views, mean, n_views, ", ".join(map(repr, kept.augment)))


def views(augment: Sequence[Any], n: int) -> list[View]:
    """Derive n views of images from an augmentation; the same for all images, and in every call.

    The first is the plain image. If mirroring is declared, every second view is mirrored, the
    second one only that. The others take numbers drawn once and for all from what the augmentation
    draws from. Erasing (`RandomErasing`, and the cutout of `Augment`) makes no views, it hides.

    Args:
        augment: as `DataLoaders.augment`; a function that draws for itself is called with torch's
            generator seeded by the number of the view, and gives torch its state back.
        n: 2 or more.

    Raises:
        SetupError: there is nothing to derive views from, or n is below 2.
    """
    parts = [part for part in map(_without_erasing, augment) if part is not None]
    if not parts:
        raise SetupError(
            "Test-time augmentation takes its views from the declared training augmentation, and "
            "these data declare none that makes views.",
            saw=f"augment={list(augment)}",
            do="train with data.augment = [Augment(flip=0.5)], say, if a mirrored image still "
            "shows the same; a mirrored digit does not.",
        )
    if n < 2:
        raise SetupError("A plain view is no augmentation: take 2 or more.", saw=f"n_views={n}")
    return [_unchanged, *(partial(_seen, parts, number) for number in range(1, n))]


def _without_erasing(part: Any) -> Any:
    """Return a part of an augmentation as far as it makes views; None if it does not."""
    if isinstance(part, RandomErasing):
        return None
    if isinstance(part, Augment):
        part = copy.copy(part)
        part.cutout = 0.0
        return part if repr(part) != "Augment()" else None
    return part


def _seen(parts: Sequence[Any], number: int, x: Tensor) -> Tensor:
    """Return images as the view of a number, 1 or more, shows them."""
    mirrors = any(isinstance(p, AlternatingFlip) or getattr(p, "flip", 0) for p in parts)
    alone = mirrors and number == 1
    to_mirror = mirrors and number % 2 == 1
    for i, part in enumerate(parts):
        if isinstance(part, AlternatingFlip):
            x, to_mirror = x.flip(3) if to_mirror else x, False  # once is enough
        elif isinstance(part, Augment):
            draws = part.view_draws(_draws(part, i, number, mirrors), to_mirror, alone)
            x = part(x, draws.to(x.device).expand(len(x), -1))
            to_mirror = to_mirror and not part.flip
        elif isinstance(part, PerSample) and not alone:
            draws = _draws(part, i, number, mirrors)
            x = part(x, draws.to(x.device).expand(len(x), -1))
        elif not alone:
            with preserved_random_state():
                torch.manual_seed(number)
                x = part(x)
    return x


def _draws(part: PerSample, place: int, number: int, mirrors: bool) -> Tensor:
    """Return (n_draws,): of two views that are each other's mirror image the same."""
    pair = number // 2 if mirrors else number
    return torch.from_numpy(uniforms(0, place, [pair], part.n_draws)[0])


def _unchanged(x: Tensor) -> Tensor:
    return x


def _mean(found: Sequence[Any]) -> Any:
    """Return the mean of several trees of tensors of one structure."""
    columns = iter(zip(*map(leaves, found), strict=True))
    return map_leaves(lambda leaf: torch.stack(next(columns)).mean(0), found[0])


def _measured(metrics: dict[str, Any], preds: Any, targets: Any) -> dict[str, float]:
    values = {}
    for name, metric in metrics.items():
        if isinstance(metric, MetricObject):
            metric = copy.deepcopy(metric)
            metric.reset()
            metric.update(preds, targets)
            values[name] = float(metric.compute())
        else:
            values[name] = float(metric(preds, targets))
    return values
