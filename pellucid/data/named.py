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

_BROKEN = (OSError, EOFError, ValueError, IndexError, zlib.error)

_IMAGENETTE_CLASSES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
}  # fmt: skip


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
    files = [_packed_or_not(folder / file) or folder / file for file in _CIFAR_FILES]
    parts = [_read_cifar(file) for file in files]
    train = [np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True)]
    return DataLoaders.from_arrays(
        train, parts[5], batch_size=batch_size, classes=_CIFAR_CLASSES, seed=seed
    )


def imagenette(
    size: int = 160,
    batch_size: int = 64,
    path: str | Path | None = None,
    cache: str | None = "auto",
    seed: int = 0,
) -> DataLoaders:
    """Load Imagenette, version 2, photographs of ten easy classes of ImageNet (J. Howard, 2019).

    9,469 images to train on, 3,925 to validate.

    Args:
        size: side of the squares they are scaled and cut to. The archive is chosen by it: the
            one of 160 pixels (99 MB), of 320 (342 MB), or the whole one (1.6 GB).
        batch_size: items in a training batch.
        path: the unpacked folder, with train and val. By default it is looked for as
            imagenette2-160 (-320, or imagenette2) in $PELLUCID_DATA and the user's cache, and
            else downloaded to the latter.
        cache: where decoded images are kept, as in `DataLoaders.from_folder`.
        seed: of the training order.

    Returns:
        Inputs uint8 (n, 3, size, size), normalised on the device; 10 classes.

    Raises:
        DataNotFound: it is nowhere and cannot be downloaded.
        DataError: a file is broken.
    """
    name = "imagenette2" + next((f"-{side}" for side in (160, 320) if size <= side), "")
    near = Path(os.environ.get("PELLUCID_DATA") or cache_folder() / "data", name)
    folder = Path(path) if path else near if near.is_dir() else fetch_dataset(name)
    if not (folder / "train").is_dir():
        raise DataNotFound(
            f"{name} is not on this machine.",
            saw=f"no folder train in {folder}",
            do="give the unpacked folder, with train and val: path=...",
        )
    data = DataLoaders.from_folder(folder, size, batch_size, "folder", cache=cache, seed=seed)
    data.classes = [_IMAGENETTE_CLASSES.get(label, label) for label in data.classes or []]
    return data


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, packed by gzip or not.

    Returns:
        Array of uint8, of the shape that the file's head tells.

    Raises:
        DataError: the file is broken, or no IDX file of bytes.
    """
    try:
        content = _content(path)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return values.reshape(shape).copy()
    except _BROKEN as error:
        raise _broken(path, error) from None


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
    wanted = _CIFAR_IMAGES * (1 + 3 * 32 * 32)  # a label, then the red, green and blue pixels
    try:
        content = _content(path)
        if len(content) != wanted:
            raise ValueError(f"{len(content):,} bytes, not {wanted:,}")
        records = np.frombuffer(content, np.uint8).reshape(_CIFAR_IMAGES, -1)
        images, labels = records[:, 1:].copy().reshape(-1, 3, 32, 32), records[:, 0].copy()
        if (highest := int(labels.max())) >= len(_CIFAR_CLASSES):
            raise ValueError(f"a label {highest}")
        return [images, labels]
    except _BROKEN as error:
        raise _broken(path, error) from None


def _content(path: Path) -> bytes:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read()


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"The file {path} is broken.", saw=str(error), do="remove it, and fetch it again."
    )


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
    n_files = {4: "four", 6: "six"}[len(files)]
    failure = f"the folder given has not all {n_files} files"
    if path is None:
        try:
            # forced if it is there, since then some of its files are not
            return fetch_dataset(name, force=cache.exists())
        except DataNotFound as error:
            failure = f"{error.args[0]} {error.args[1]}"
    ways = [
        f"give the folder of its {n_files} files: path=...",
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
