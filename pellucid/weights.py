"""A model's weights in a file, as safetensors: no pickle, and what is shared is written once."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import DataError, DataNotFound


def save(model: nn.Module, path: str | Path) -> Path:
    """Write parameters and buffers, making the folder if there is none, and return the path."""
    from safetensors.torch import save_model

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return path


def load(model: nn.Module, path: str | Path, device: torch.device) -> None:
    """Read what `save` wrote, into a model of the same shape: all of it or, on an error, nothing.

    Raises:
        DataNotFound: there is no such file.
        DataError: it is no safetensors file, or a broken one; or the model has other parameters or
            buffers, or of other shapes.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    if not Path(path).is_file():
        raise DataNotFound("There are no saved weights.", saw=str(path))
    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        _check_fits(model, shapes)
        load_model(model, str(path), device=str(device))
    except SafetensorError as error:
        what = "The saved weights cannot be read."
        do = "Learner.save writes such files; one of torch.save is read by torch.load."
        raise DataError(what, saw=f"{path}: {error}", do=do) from None


def _check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file with other names or shapes, before anything is written."""
    held = model.state_dict()
    written = {_place(held[name]) for name in shapes if name in held}
    wrong = [
        f"{name} {tuple(held[name].shape)} here, {shape} in the file"
        if name in held
        else f"{name} in the file alone"
        for name, shape in shapes.items()
        if name not in held or tuple(held[name].shape) != shape
    ]
    wrong += [
        f"{name} in the model alone"
        for name, tensor in held.items()
        if name not in shapes and _place(tensor) not in written  # what is shared is written once
    ]
    if wrong:
        raise DataError(
            "The saved weights are those of another model; nothing was loaded.",
            saw="; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            do="load them into a model as it was, then exchange its head for a new one.",
        )


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype
