"""Data sets by name: digits (in the package), MNIST and Fashion-MNIST (found or downloaded)."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFound, UnknownName, did_you_mean
from ..randomness import permutation
from .dataloaders import DataLoaders
from .fetch import fetch_file

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
          "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")  # fmt: skip

_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_FASHION_SHA256 = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
_FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat",
                    "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip


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
    train, test = _load("mnist", path, (), _MNIST_URL, _MNIST_SHA256)
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
    debian = (Path("/usr/share/datasets/fashion-mnist"),)
    train, test = _load("fashion-mnist", path, debian, _FASHION_URL, _FASHION_SHA256)
    return DataLoaders.from_arrays(
        train, test, batch_size=batch_size, classes=_FASHION_CLASSES, seed=seed
    )


def cache_folder() -> Path:
    """Return where downloads are kept: $PELLUCID_HOME, else pellucid in the user's cache folder."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"


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


def _load(
    name: str, path: str | Path | None, system: tuple[Path, ...], url: str, sums: tuple[str, ...]
) -> list[list[np.ndarray]]:
    """Return [[training images, labels], [test images, labels]], images (n, 1, h, w)."""
    arrays = [read_idx(file) for file in _find(name, path, system, url, sums)]
    for part, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        if len(images) != len(labels):
            raise DataError(
                f"The {part} files of {name} do not belong together.",
                saw=f"{len(images)} images, {len(labels)} labels",
            )
    return [[arrays[0][:, None], arrays[1]], [arrays[2][:, None], arrays[3]]]


def _find(
    name: str, path: str | Path | None, system: tuple[Path, ...], url: str, sums: tuple[str, ...]
) -> list[Path]:
    data, cache = os.environ.get("PELLUCID_DATA"), cache_folder() / name
    folders = [Path(path)] if path else [*([Path(data) / name] if data else []), cache, *system]
    for folder in folders:
        pairs = [(folder / file, folder / f"{file}.gz") for file in _FILES]
        found = [next((file for file in pair if file.is_file()), None) for pair in pairs]
        if None not in found:
            return [file for file in found if file is not None]
    failure = "the folder given has not all four files"
    if path is None:
        try:
            return [
                fetch_file(f"{url}{file}.gz", sha256, cache)
                for file, sha256 in zip(_FILES, sums, strict=True)
            ]
        except (OSError, ValueError) as error:
            failure = (
                f"the download failed: {(str(error) or type(error).__name__).splitlines()[0][:120]}"
            )
    ways = [
        "give the folder of its four files: path=...",
        f"put them into a folder {name} and set PELLUCID_DATA to the folder above it",
        "install Debian's package dataset-fashion-mnist" if system else f"put them into {cache}",
        f"let this machine reach {url}",
    ]
    raise DataNotFound(
        f"{name} is not on this machine.",
        saw=f"looked in {', '.join(map(str, folders))}; {failure}",
        do="; or ".join(ways) + ".",
    )
