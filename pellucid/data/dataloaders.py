"""DataLoaders: what a learner trains and validates on, and how a batch becomes an input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..device import choose_device
from ..errors import DataError, SetupError
from ..losses import mean_squared_error
from ..randomness import uniforms
from ..snapshot import preserved_random_state
from ..tree import describe, sent, split
from .datasets import ArrayDataset
from .decoded import DecodedImages
from .folder import Labels, Splitting, read_folder
from .folder_report import FolderReport
from .functions import Functions, Transform
from .loader import Loader, first, length, preserved_order
from .transforms import Normalize, PerSample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Tensor | np.ndarray


class DataLoaders:
    """A training and a validation loader, and what belongs to both.

    Args:
        train: any iterable of batches: `Loader`, torch DataLoader, list. A batch is a tensor, a
            tuple or list, inputs first, or a dict, whose inputs the model gets by name.
        valid: likewise, or None.
        classes: the names of the classes, or their number, if the targets are classes.
        n_inputs: how many parts of a batch are inputs; the rest are targets.
        transforms: functions or modules, or one, applied one after the other to the inputs of
            every batch, training and validation, once they are on the device.
        augment: likewise, before the transforms and to training batches only. Those that draw for
            each sample (`PerSample`) get their random numbers from the seed of `train`, the epoch
            and the item, others draw as they please.

    Attributes:
        report: what `from_folder` found, for `print`; None for other data.
        transforms, augment: lists, to be changed or replaced; one function alone is made a list.
    """

    transforms = Functions()
    augment = Functions()

    def __init__(
        self,
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        classes: Sequence[str] | int | None = None,
        n_inputs: int = 1,
        transforms: Transform | Iterable[Transform] = (),
        augment: Transform | Iterable[Transform] = (),
    ):
        for part in (train, valid):
            whole = isinstance(part, Dataset) and not isinstance(part, IterableDataset)
            if whole or isinstance(part, (Tensor, np.ndarray)):
                raise SetupError(
                    "DataLoaders takes loaders, which give batches, not arrays or data sets.",
                    saw=describe(part),
                    do="DataLoaders(Loader(dataset, batch_size=64, shuffle=True)), or "
                    "DataLoaders.from_arrays((x, y), (x_valid, y_valid)).",
                )
        if n_inputs < 1:
            raise SetupError("A batch must have an input.", saw=f"n_inputs={n_inputs}")
        self.train: Any = train
        self.valid: Any = valid
        numbers = range(classes) if isinstance(classes, int) else classes
        self.classes = None if numbers is None else [str(name) for name in numbers]
        self.n_inputs = n_inputs
        self.transforms, self.augment = transforms, augment
        self.report: FolderReport | None = None

    @classmethod
    def of_pair(cls, pair: Any) -> DataLoaders:
        """Take a pair (train, valid) of iterables of batches, and refuse what only looks like one.

        Raises:
            SetupError: arrays, a single loader, or anything else that is no pair of loaders.
        """
        two = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not two or any(isinstance(part, (Tensor, np.ndarray)) for part in pair):
            raise SetupError(
                "The data must be DataLoaders or a pair of loaders, (train, valid).",
                saw=_brief(pair),
                do="DataLoaders(loader), DataLoaders(train, valid), or for arrays "
                "DataLoaders.from_arrays((x, y), (x_valid, y_valid)).",
            )
        return cls(*pair)

    @classmethod
    def from_arrays(
        cls,
        train: Sequence[Array],
        valid: Sequence[Array] | None = None,
        batch_size: int = 64,
        classes: Sequence[str] | int | None = None,
        transforms: Transform | Iterable[Transform] | None = None,
        seed: int = 0,
    ) -> DataLoaders:
        """Make loaders over arrays in memory: shuffled training, validation in twice the batch.

        Args:
            train: the inputs and, last, the targets, each (n, ...).
            valid: likewise, or None.
            batch_size: items in a training batch.
            classes: names or number of the classes; None reckons them from integer targets (n),
                and takes targets of another kind for a regression.
            transforms: None normalises a single uint8 input by the training data's mean and
                standard deviation and leaves others as they are; [] leaves all as they are.
            seed: of the training order.

        Raises:
            DataError: lengths differ, or a label is no class.
        """
        if any(isinstance(arrays, (Tensor, np.ndarray)) for arrays in (train, valid)):
            raise SetupError(
                "train and valid are each a pair: inputs, and targets last.",
                saw=f"train {describe(train)}, valid {describe(valid)}",
                do="DataLoaders.from_arrays((x, y), (x_valid, y_valid)).",
            )
        sets = [ArrayDataset(*arrays) for arrays in (train, valid) if arrays is not None]
        inputs, targets = sets[0].arrays[0], [dataset.arrays[-1] for dataset in sets]
        if classes is None and _are_labels(targets[0]) and len(targets[0]):
            classes = int(targets[0].max()) + 1
        if classes is not None:
            n = classes if isinstance(classes, int) else len(classes)
            for name, labels in zip(("training", "validation"), targets, strict=False):
                _check_labels(labels, n, name)
            for dataset in sets:  # torch's losses want int64
                dataset.arrays = (*dataset.arrays[:-1], dataset.arrays[-1].long())
        if transforms is None:
            alone = inputs.dtype == torch.uint8 and len(train) <= 2
            transforms = [Normalize.of(inputs)] if alone else []
        return cls(
            Loader(sets[0], batch_size, shuffle=True, seed=seed),
            Loader(sets[1], batch_size * 2) if valid is not None else None,
            classes,
            max(len(train) - 1, 1),
            transforms,
        )

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        size: int | tuple[int, int] = 64,
        batch_size: int = 64,
        split: Splitting = "auto",
        labels: Labels = "folder",
        cache: str | None = "auto",
        bad: str = "raise",
        seed: int = 0,
    ) -> DataLoaders:
        """Make loaders over a folder of images: shuffled training, validation in twice the batch.

        Inputs are uint8 (n, 3, h, w), normalised on the device by statistics of 512 training
        images. The classes are the labels of the training images, sorted. What was found is in
        `report`. Images that are not kept are decoded in worker processes, one a core, at most 8;
        `data.train.workers = 0` changes that.

        Args:
            path: the folder; files and folders whose name begins with a dot are passed by.
            size: side of the square that every image is scaled and cut to, or (height, width).
            batch_size: images in a training batch.
            split: "folder", by top folders train and valid, val, validation or test; a fraction
                for validation, drawn by seed and file name; names of the validation files, or a
                text file of them; a function from names to two arrays of indices; "auto": by
                folder if there are such, else 0.2.
            labels: "folder", the folder that a file lies in; a compiled pattern whose group is
                the label; a function from name to label; a table {name: label}, or the path of a
                CSV file with names and labels in its first two columns.
            cache: where decoded images are kept: "memory", "disk" (a mapped file in the user's
                cache, found again by the next run), None (decoded every epoch), or "auto": memory
                if an eighth of it is enough, else None.
            bad: what becomes of files that cannot be read: "raise" an error that names them,
                "skip" them, or "set-aside", moved into the hidden folder .set-aside. Without a
                cache, the latter two decode every image once beforehand.
            seed: of the training order and of a random split.

        Raises:
            DataNotFound: there is no such folder.
            DataError: no images, a broken one, no label, an unknown class, an empty part.
        """
        workers = min(_cores(), 8)
        train, valid, report = read_folder(path, size, split, labels, cache, bad, seed, workers)
        some = np.unique(np.linspace(0, len(train) - 1, 512).astype(int)).tolist()
        statistics = Normalize.of(torch.stack([train[item][0] for item in some]))
        beside = [0 if hasattr(part, "batches") else workers for part in (train, valid)]
        data = cls(
            Loader(train, batch_size, shuffle=True, seed=seed, workers=beside[0]),
            Loader(valid, batch_size * 2, workers=beside[1]),
            report.classes,
            transforms=[statistics],
        )
        data.report = report
        return data

    def to(self, device: str | torch.device) -> DataLoaders:
        """Move both data sets, whole, to a device, where batches are then gathered; return `self`.

        For data that fit: then nothing is moved from batch to batch. The batches are the same, bit
        for bit; only the order goes to the device, once an epoch. What `print(data)` shows tells
        how much lies where.

        Args:
            device: "auto", or as torch names it; the learner's.

        Raises:
            SetupError: there is no such device; the data do not fit there; or they are no arrays
                in memory.
        """
        place, _ = choose_device(device)
        loaders = [loader for loader in (self.train, self.valid) if loader is not None]
        for loader in loaders:
            known = isinstance(loader, Loader)
            if not known or not isinstance(loader.dataset, ArrayDataset | DecodedImages):
                raise SetupError(
                    "Only arrays in memory can be moved to a device whole.",
                    saw=_brief(loader),
                    do="load arrays (DataLoaders.from_arrays), a named data set, or a folder with "
                    'cache="memory"; batches of others are moved as they come.',
                )
        for loader, dataset in [(loader, loader.dataset.to(place)) for loader in loaders]:
            loader.dataset = dataset
        return self

    def prepare(self, x: Any, training: bool = False) -> Any:
        """Take inputs, on their device, through the augmentation (in training) and transforms.

        What is random for each sample is taken for those of the batch that `train` gave last.
        """
        if training and self.augment:
            for fn, draws in zip(self.augment, self._draws(x), strict=True):
                x = fn(x) if draws is None else fn(x, draws)
        for transform in self.transforms:
            x = transform(x)
        return x

    def _draws(self, x: Any) -> Sequence[Tensor | None]:
        """Return the random numbers for each part of the augmentation; None: it draws itself."""
        wanted = [fn.n_draws if isinstance(fn, PerSample) else 0 for fn in self.augment]
        drawn = getattr(self.train, "drawn", None)
        if sum(wanted) and not isinstance(x, Tensor):
            raise SetupError(
                "Augmentation that draws for each sample takes one tensor of inputs.",
                saw=describe(x),
                do="write it as a function of all inputs, and let it draw for itself.",
            )
        if drawn is None or not sum(wanted) or len(drawn.items) != len(x):
            return [None] * len(wanted)
        numbers = uniforms(drawn.seed, drawn.epoch, drawn.items.numpy(), sum(wanted))
        draws = sent(torch.from_numpy(numbers), x.device).split(wanted, 1)
        return [part if n else None for n, part in zip(wanted, draws, strict=True)]

    def one_batch(self) -> tuple[Any, Any]:
        """Return the next training batch as the model gets it: inputs, and targets.

        Nothing changes by looking: training will see this very batch.
        """
        with preserved_order(self.train), preserved_random_state():
            x, y = split(next(iter(self.train)), self.n_inputs)
            return self.prepare(x, training=True), y

    def show_batch(self, n: int = 16) -> Figure:
        """Draw the next training images as the model gets them, augmented, with their classes.

        What the transforms did to the values is undone, as far as they know how (`undo`), and the
        values are stretched to the brightest. Nothing changes by looking: training will see this
        very batch.

        Args:
            n: how many, at most.

        Raises:
            SetupError: the inputs are no images (n, 1 or 3, h, w).
        """
        from ..plots import plot_images

        if n < 1:
            raise SetupError("Show one image or more.", saw=f"n={n}")
        x, y = self.one_batch()
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise SetupError("These inputs are no images (n, 1 or 3, h, w).", saw=describe(x))
        for transform in reversed(self.transforms):
            x = getattr(transform, "undo", _unchanged)(x)
        x = x.float() - x.min().clamp(max=0)
        titles = [""] * n if y is None else [self._title(label) for label in y[:n].tolist()]
        return plot_images((x[:n] / x.max().clamp(min=1e-9)).cpu().numpy(), titles)

    def _title(self, label: Any) -> str:
        known = self.classes is not None and isinstance(label, int)
        return self.classes[label] if known else str(label)

    @property
    def n_classes(self) -> int:
        """The number of classes; raises SetupError where the targets are none."""
        if self.classes is None:
            raise SetupError("These data have no classes.", do="DataLoaders(..., classes=10)")
        return len(self.classes)

    @property
    def batch_size(self) -> int | None:
        """Items in a validation batch, else in a training batch; None if no loader says it."""
        sizes = (getattr(loader, "batch_size", None) for loader in (self.valid, self.train))
        return next((size for size in sizes if size), None)

    def default_loss(self) -> Callable[..., Tensor]:
        """Return the loss that fits the targets: cross entropy, or mean squared error for floats.

        Raises:
            SetupError: the targets do not tell.
        """
        if self.classes is not None:
            return F.cross_entropy
        if isinstance(self.train, (Loader, list, tuple)) and len(
            self.train
        ):  # looking costs nothing
            targets = split(first(self.train), self.n_inputs)[1]
            if isinstance(targets, Tensor) and targets.is_floating_point():
                return mean_squared_error
            if isinstance(targets, Tensor) and _are_labels(targets):
                return F.cross_entropy
        raise SetupError(
            "The data do not tell which loss fits their targets.",
            saw=repr(self),
            do="DataLoaders(train, valid, classes=10) for classes, else "
            "Learner(..., loss_func=...).",
        )

    def __repr__(self) -> str:
        loaders = {"train": self.train, "valid": self.valid}
        parts = [f"{name}={_brief(part)}" for name, part in loaders.items() if part is not None]
        if self.augment:
            parts.append(f"augment={self.augment}")
        if self.transforms:
            parts.append(f"transforms={self.transforms}")
        if self.classes is not None:
            parts.append(f"{len(self.classes)} classes")
        return f"DataLoaders({', '.join(parts)})"


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unchanged(x: Tensor) -> Tensor:
    return x


def _brief(loader: Any) -> str:
    """Describe a loader in a few words; a list of batches does not print its tensors."""
    if isinstance(loader, (list, tuple)):
        what = f"{type(loader).__name__} of {len(loader)}"
        return f"{what}, first {describe(loader[0])}" if loader else what
    if isinstance(loader, DataLoader):
        return f"DataLoader({length(loader) or '?'} batches of {loader.batch_size})"
    return repr(loader)


def _are_labels(targets: Tensor) -> bool:
    integer = not targets.is_floating_point() and not targets.is_complex()
    return integer and targets.dtype != torch.bool and targets.ndim == 1


def _check_labels(labels: Tensor, n_classes: int, part: str) -> None:
    if not _are_labels(labels):
        raise DataError(
            f"The {part} targets are no class numbers.",
            saw=describe(labels),
            do="give integers (n).",
        )
    wrong = ((labels < 0) | (labels >= n_classes)).nonzero().flatten()
    if len(wrong):
        raise DataError(
            f"A label of the {part} data is out of range.",
            saw=f"label {int(labels[wrong[0]])} at item {int(wrong[0])}, {len(wrong)} such in all; "
            f"there are {n_classes} classes, 0 to {n_classes - 1}",
            do="mend the labels, or say how many classes there are: classes=...",
        )
