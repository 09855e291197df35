"""Data: arrays and files as batches, loaders that gather or decode them, and named data sets."""

from .dataloaders import DataLoaders
from .datasets import ArrayDataset
from .decoded import DecodedImages
from .fetch import fetch_dataset, remove_dataset
from .files import FileNames, scan
from .images import ImageFiles, decode_image
from .labels import encode, label_files, read_labels, vocabulary
from .loader import Loader, check_length, first, length, preserved_order
from .named import cifar10, digits, fashion_mnist, imagenette, mnist
from .splits import split_at_random, split_by_folder, split_by_list
from .transforms import Normalize, PerSample, Reshape

__all__ = [
    "ArrayDataset",
    "DataLoaders",
    "DecodedImages",
    "FileNames",
    "ImageFiles",
    "Loader",
    "Normalize",
    "PerSample",
    "Reshape",
    "check_length",
    "cifar10",
    "decode_image",
    "digits",
    "encode",
    "fashion_mnist",
    "fetch_dataset",
    "first",
    "imagenette",
    "label_files",
    "length",
    "mnist",
    "preserved_order",
    "read_labels",
    "remove_dataset",
    "scan",
    "split_at_random",
    "split_by_folder",
    "split_by_list",
    "vocabulary",
]
