"""Data: sets of arrays, loaders that gather whole batches, and named data sets."""

from .dataloaders import DataLoaders
from .datasets import ArrayDataset
from .loader import Loader, check_length, first, length, preserved_order
from .named import digits, fashion_mnist, mnist
from .transforms import Normalize, Reshape

__all__ = [
    "ArrayDataset",
    "DataLoaders",
    "Loader",
    "Normalize",
    "Reshape",
    "check_length",
    "digits",
    "fashion_mnist",
    "first",
    "length",
    "mnist",
    "preserved_order",
]
