"""Where the named data sets come from, with the checksums of their files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One file of a data set, as its makers publish it.

    Args:
        url: where it is.
        sha256: the checksum, 64 hexadecimal digits; None if nobody has published one.
        size: bytes; None if unknown.
        licence: of the data.
        origin: who made them.
    """

    url: str
    sha256: str | None
    size: int | None
    licence: str = ""
    origin: str = ""


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")  # fmt: skip
"""The four files of MNIST and of whatever took its form."""

_IMAGENETTE = (
    "Apache-2.0 for the selection; the images are ImageNet's, for non-commercial research and "
    "education (https://image-net.org/download)",
    "J. Howard, fast.ai, 2019 (version 2); Deng et al., ImageNet, 2009",
)
_MNIST = ("CC BY-SA 3.0", "LeCun, Cortes and Burges, 1998")
_FASHION = ("MIT", "Xiao, Rasul and Vollgraf, 2017")
_CIFAR10 = (
    "none stated; cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    "Krizhevsky, Nair and Hinton, 2009",
)

_FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas"
_CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist"
_ZALANDO = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"

SOURCES: dict[str, tuple[Source, ...]] = {
    # imagenette: tensorflow/datasets, tensorflow_datasets/datasets/imagenette/checksums.tsv, and
    # its issues #3057 and #3115: fast.ai replaced the archives in early 2021, so that the sums of
    # 2020 (url_checksums/imagenette.txt there: de32de18…, 88daccb0…, 5020a913…) no longer hold.
    # imagenette2 also: open-edge-platform/anomalib, IMAGENETTE_DOWNLOAD_INFO of EfficientAd.
    "imagenette2": (
        Source(
            f"{_FAST_AI}/imagenette2.tgz",
            "6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd",
            1_557_161_267,
            *_IMAGENETTE,
        ),
    ),
    "imagenette2-320": (
        Source(
            f"{_FAST_AI}/imagenette2-320.tgz",
            "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c",
            341_663_724,
            *_IMAGENETTE,
        ),
    ),
    "imagenette2-160": (
        Source(
            f"{_FAST_AI}/imagenette2-160.tgz",
            "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
            99_003_388,
            *_IMAGENETTE,
        ),
    ),
    # tensorflow/datasets, tensorflow_datasets/url_checksums/mnist.txt
    "mnist": tuple(
        Source(f"{_CVDF}/{file}.gz", sha256, size, *_MNIST)
        for file, sha256, size in zip(
            IDX_FILES,
            (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
            (9_912_422, 28_881, 1_648_877, 4_542),
            strict=True,
        )
    ),
    # tensorflow/datasets, tensorflow_datasets/url_checksums/fashion_mnist.txt (same files, from
    # the makers' other address)
    "fashion-mnist": tuple(
        Source(f"{_ZALANDO}/{file}.gz", sha256, size, *_FASHION)
        for file, sha256, size in zip(
            IDX_FILES,
            (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
            (26_421_880, 29_515, 4_422_102, 5_148),
            strict=True,
        )
    ),
    # the binary version: the other one is pickled. tensorflow/datasets,
    # tensorflow_datasets/url_checksums/cifar10.txt; also red-data-tools/red-datasets, cifar.rb
    "cifar10": (
        Source(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170_052_171,
            *_CIFAR10,
        ),
    ),
}
"""Each named data set: one archive to unpack, or several files to be kept as they are."""
