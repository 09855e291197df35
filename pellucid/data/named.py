"""Data sets by name: digits (in the package), and others that are found or downloaded."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFound, UnknownName, did_you_mean
from ..randomness import permutation
from .dataloaders import DataLoaders
from .fetch import cache_folder, fetch_dataset
from .sources import IDX_FILES, SOURCES

_FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat",
                    "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip

_CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_IMAGES = 10_000  # in each file
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
                  "dog", "frog", "horse", "ship", "truck")  # fmt: skip


def digits(batch_size: int = 64, seed: int = 0) -> DataLoaders:
    """Load 1,797 handwritten digits of 8×8 pixels, which ship with the package.

    A fifth, chosen at random but always the same, is for validation: 1,438 and 359 images.
    E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0.

    Args:
        batch_size: items in a training batch.
        seed: of the training order; the split does not depend on it.

    Returns:
        Inputs uint8 (n, 1, 8, 8), 0 to 16, normalised on the device; 10 classes.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    order = permutation(0, 0, len(images))
    valid, train = order[: len(order) // 5], order[len(order) // 5 :]
    sets = [(images[part], labels[part]) for part in (train, valid)]
    return DataLoaders.from_arrays(*sets, batch_size=batch_size, classes=10, seed=seed)


def mnist(
    batch_size: int = 64, split: str = "official", path: str | Path | None = None, seed: int = 0
) -> DataLoaders:
    """Load MNIST, handwritten digits of 28×28 pixels (LeCun, Cortes and Burges; CC BY-SA 3.0).

    Args:
        batch_size: items in a training batch.
        split: "official", 60,000 to train on and 10,000 to validate; or "course", the first 50,000
            and the last 10,000 of the training file, which leaves the test file alone.
        path: the folder with the four IDX files, packed or not. By default they are looked for in
            $PELLUCID_DATA/mnist and the user's cache, and else downloaded (11 MB) to the latter.
        seed: of the training order.

    Returns:
        Inputs uint8 (n, 1, 28, 28), normalised on the device; 10 classes.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        DataError: a file is broken.
    """
    if split not in ("official", "course"):
        raise UnknownName(
            f"MNIST has no split {split!r}.", do=did_you_mean(split, ("official", "course"))
        )
    train, test = _load_idx("mnist", path)
    if split == "course":
        train, test = [a[:50_000] for a in train], [a[50_000:] for a in train]
    return DataLoaders.from_arrays(train, test, batch_size=batch_size, classes=10, seed=seed)


def fashion_mnist(
    batch_size: int = 64, path: str | Path | None = None, seed: int = 0
) -> DataLoaders:
    """Load Fashion-MNIST, 28×28 pixels (Xiao, Rasul and Vollgraf, 2017; MIT licence).

    60,000 images to train on, 10,000 to validate, 10 classes.

    Args:
        batch_size: items in a training batch.
        path: the folder with the four IDX files, packed or not. By default they are looked for in
            $PELLUCID_DATA/fashion-mnist, the user's cache and where Debian's package
            dataset-fashion-mnist puts them, and else downloaded (31 MB) to the cache.
        seed: of the training order.

    Returns:
        Inputs uint8 (n, 1, 28, 28), normalised on the device.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        DataError: a file is broken.
    """
    train, test = _load_idx("fashion-mnist", path, Path("/usr/share/datasets/fashion-mnist"))
    return DataLoaders.from_arrays(
        train, test, batch_size=batch_size, classes=_FASHION_CLASSES, seed=seed
    )


def cifar10(batch_size: int = 64, path: str | Path | None = None, seed: int = 0) -> DataLoaders:
    """Load CIFAR-10, photographs of 32×32 pixels (Krizhevsky, Nair and Hinton, 2009).

    50,000 images to train on, 10,000 to validate, 10 classes.

    Args:
        batch_size: items in a training batch.
        path: the folder with the six files of the binary version, data_batch_1.bin and so on. By
            default they are looked for in $PELLUCID_DATA/cifar10 and the user's cache, and else
            downloaded (170 MB) to the latter.
        seed: of the training order.

    Returns:
        Inputs uint8 (n, 3, 32, 32), red, green, blue, normalised on the device.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        DataError: a file is broken.
    """
    folder = _find("cifar10", path, _CIFAR_FILES)
    parts = [_read_cifar(folder / file) for file in _CIFAR_FILES]
    train = [np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True)]
    return DataLoaders.from_arrays(
        train, parts[5], batch_size=batch_size, classes=_CIFAR_CLASSES, seed=seed
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, packed by gzip or not.

    Returns:
        Array of uint8, of the shape that the file's head tells.

    Raises:
        DataError: the file is broken, or no IDX file of bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return values.reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(
            f"The file {path} is broken.", saw=str(error), do="remove it, and fetch it again."
        ) from None


def _load_idx(
    name: str, path: str | Path | None, system: Path | None = None
) -> list[list[np.ndarray]]:
    """Return [[training images, labels], [test images, labels]], images (n, 1, h, w)."""
    folder = _find(name, path, IDX_FILES, system)
    arrays = [read_idx(_packed_or_not(folder / file) or folder / file) for file in IDX_FILES]
    for part, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels):
            raise DataError(
                f"The {part} files of {name} do not belong together.",
                saw=f"{len(images)} images, {len(labels)} labels",
            )
    return [[arrays[0][:, None], arrays[1]], [arrays[2][:, None], arrays[3]]]


def _read_cifar(path: Path) -> list[np.ndarray]:
    """Return images (n, 3, 32, 32) and labels (n), uint8, of one file of the binary version."""
    content = np.fromfile(path, np.uint8)
    broken = f"The file {path} is broken."
    wanted = _CIFAR_IMAGES * (1 + 3 * 32 * 32)  # a label, then the red, green and blue pixels
    if len(content) != wanted:
        saw = f"{len(content):,} bytes, not {wanted:,}"
        raise DataError(broken, saw=saw, do="remove it, and fetch it again.")
    records = content.reshape(_CIFAR_IMAGES, -1)
    if (highest := int(records[:, 0].max())) >= len(_CIFAR_CLASSES):
        raise DataError(broken, saw=f"a label {highest}", do="remove it, and fetch it again.")
    return [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]]


def _find(
    name: str, path: str | Path | None, files: tuple[str, ...], system: Path | None = None
) -> Path:
    """Return the folder of a data set's files: given, found or downloaded.

    Args:
        name: in the registry, and of the folder.
        path: as the user gave it.
        files: that must be there, each packed by gzip or not.
        system: a folder where a package of the system puts them.
    """
    data, cache = os.environ.get("PELLUCID_DATA"), cache_folder() / "data" / name
    places = [Path(data) / name if data else None, cache, system]
    folders = [Path(path)] if path else [place for place in places if place]
    for folder in folders:
        if all(_packed_or_not(folder / file) for file in files):
            return folder
    failure = f"the folder given has not all {len(files)} files"
    if path is None:
        try:
            # forced if it is there, since then some of its files are not
            return fetch_dataset(name, force=cache.exists())
        except DataNotFound as error:
            failure = f"{error.args[0]} {error.args[1]}"
    ways = [
        f"give the folder of its {len(files)} files: path=...",
        f"put them into a folder {name} and set PELLUCID_DATA to the folder above it",
        f"install Debian's package dataset-{name}" if system else f"put them into {cache}",
        f"let this machine reach {SOURCES[name][0].url.rsplit('/', 1)[0]}",
    ]
    raise DataNotFound(
        f"{name} is not on this machine.",
        saw=f"looked in {', '.join(map(str, folders))}; {failure}",
        do="; or ".join(ways) + ".",
    )


def _packed_or_not(path: Path) -> Path | None:
    pair = (path, path.with_name(f"{path.name}.gz"))
    return next((file for file in pair if file.is_file()), None)
