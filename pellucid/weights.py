"""A model's weights in a file, as safetensors: no pickle, and what is shared is written once."""

from pathlib import Path

import torch
from torch import nn

from .errors import DataError, DataNotFound


def save(model: nn.Module, path: str | Path) -> Path:
    """Write parameters and buffers, making the folder if there is none, and return the path."""
    from safetensors.torch import save_model

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return path


def load(model: nn.Module, path: str | Path, device: torch.device) -> None:
    """Read what `save` wrote, into a model of the same shape.

    Raises:
        DataNotFound: there is no such file.
        DataError: it is no safetensors file, or a broken one.
        RuntimeError: the model has other parameters, or of other shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not Path(path).is_file():
        raise DataNotFound("There are no saved weights.", saw=str(path))
    try:
        load_model(model, str(path), device=str(device))
    except SafetensorError as error:
        what = "The saved weights cannot be read."
        raise DataError(what, saw=f"{path}: {error}", do="save them again.") from None
