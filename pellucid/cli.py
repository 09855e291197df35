"""The command line: train on a data set, look for a learning rate, look at the data.

torch is imported inside the commands, so that `--help` and a slip of the pen answer at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from . import __version__
from .errors import PellucidError, SetupError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .data import DataLoaders
    from .learner import Learner

app = App(
    name="pellucid",
    version=__version__,
    help="Train PyTorch models and see through them.\n\nBegin with: pellucid train digits",
    help_format="plaintext",
)


@dataclass(frozen=True)
class Recipe:
    """What works well for a data set, where the user does not say otherwise."""

    loader: str
    model: str
    epochs: int
    lr: float
    batch_size: int


RECIPES = {
    "digits": Recipe("digits", "small_resnet", epochs=10, lr=0.01, batch_size=64),
    "mnist": Recipe("mnist", "small_resnet", epochs=3, lr=0.01, batch_size=128),
    "fashion-mnist": Recipe("fashion_mnist", "small_resnet", epochs=5, lr=0.01, batch_size=128),
}
MODELS = ("mlp", "simple_cnn", "small_resnet")

Source = Annotated[str, Parameter(help=f"The data set: {', '.join(RECIPES)}.")]
Epochs = Annotated[int | None, Parameter(help="Passes over the training data.")]
Rate = Annotated[float | None, Parameter(help="Highest learning rate of the one-cycle schedule.")]
BatchSize = Annotated[int | None, Parameter(help="Images in a training batch.")]
Model = Annotated[str | None, Parameter(help=f"The model: {', '.join(MODELS)}.")]
Seed = Annotated[int, Parameter(help="Fixes the weights at the start and the order of the data.")]
Device = Annotated[str, Parameter(help='"auto", "cpu", "cuda" or "cuda:1".')]
Out = Annotated[Path | None, Parameter(help="Folder for what is saved; runs/SOURCE if not given.")]


@app.command
def train(
    source: Source,
    /,
    *,
    epochs: Epochs = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    model: Model = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train a model, and save its weights, the record and a picture of the run.

    What is not given is chosen to suit the data set.
    """
    recipe = _recipe(source)
    learn = _learner(source, batch_size, model, seed, device)
    folder = _folder(out, source)
    try:
        learn.fit_one_cycle(
            recipe.epochs if epochs is None else epochs, recipe.lr if lr is None else lr
        )
    except KeyboardInterrupt:
        print(f"interrupted in epoch {learn.epoch + 1} of {learn.n_epochs}; saving what there is")
        _save_run(learn, folder)
        raise
    _save_run(learn, folder)


@app.command
def find_lr(
    source: Source,
    /,
    *,
    batch_size: BatchSize = None,
    model: Model = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Try learning rates from tiny to huge, suggest one, and save the curve as a picture."""
    search = _learner(source, batch_size, model, seed, device).find_lr()
    if search.suggestion is None:
        print("the loss never falls: no learning rate to suggest")
    else:
        print(f"suggested: --lr {search.suggestion:.2g}")
    _save(search.plot(), _folder(out, source) / "lr.png", "loss against learning rate")


@app.command
def show(source: Source, /, *, seed: Seed = 0, out: Out = None) -> None:
    """Say what a data set holds, and save a picture of its first training batch."""
    from .data import first
    from .plots import plot_images

    data = _load(source, 32, seed)
    n_train, n_valid = len(data.train.dataset), len(data.valid.dataset)
    print(f"{source}: {n_train:,} images to train on, {n_valid:,} to validate")
    names = data.classes or []
    print(f"{len(names)} classes: {', '.join(names)}")
    x, y = first(data.train)
    print(f"an image: {'×'.join(map(str, x.shape[1:]))} (channels, height, width), {x.dtype}")
    images = x.float() / float(x.max())
    titles = [names[int(label)] for label in y]
    _save(plot_images(images.numpy(), titles), _folder(out, source) / "batch.png", "a batch")


def main() -> None:
    """Run the command line; exit with 0, 1 (the run failed), 2 (a slip) or 130 (Ctrl-C).

    Of Ctrl-C cyclopts takes care.
    """
    try:
        app(sys.argv[1:], exit_on_error=False)
    except CycloptsError:
        sys.exit(2)  # its message is on the screen already
    except PellucidError as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, SetupError) else 1)


def _recipe(source: str) -> Recipe:
    if source not in RECIPES:
        raise UnknownName(f"There is no data set {source!r}.", do=did_you_mean(source, RECIPES))
    return RECIPES[source]


def _load(source: str, batch_size: int | None, seed: int) -> DataLoaders:
    recipe = _recipe(source)
    from . import data

    size = recipe.batch_size if batch_size is None else batch_size
    return getattr(data, recipe.loader)(batch_size=size, seed=seed)


def _learner(
    source: str, batch_size: int | None, model: str | None, seed: int, device: str
) -> Learner:
    name = model or _recipe(source).model
    if name not in MODELS:
        raise UnknownName(f"There is no model {name!r}.", do=did_you_mean(name, MODELS))
    import torch
    from torch.nn.utils import convert_conv2d_weight_memory_format

    from . import vision
    from .data import first
    from .device import seed_everything
    from .learner import Learner
    from .metrics import accuracy

    data = _load(source, batch_size, seed)
    seed_everything(seed)
    shape = first(data.train)[0].shape[1:]
    if name == "mlp":
        module = vision.mlp(shape.numel(), data.n_classes)
    elif name == "small_resnet" and shape[-1] < 16:  # nothing is left of it after four halvings
        module = vision.small_resnet(shape[0], data.n_classes, (16, 32), first_stride=1)
    else:
        module = getattr(vision, name)(shape[0], data.n_classes)
    # on a CPU convolutions of a small net are a third faster so; others do not mind
    module = convert_conv2d_weight_memory_format(module, torch.channels_last)
    return Learner(module, data, metrics=[accuracy], device=device)


def _save_run(learn: Learner, folder: Path) -> None:
    learn.save(folder / "model.safetensors")
    learn.record.save(folder / "record.json")
    print(f"weights and record: {folder / 'model.safetensors'}, {folder / 'record.json'}")
    if len(learn.record.batches):
        _save(learn.record.plot(), folder / "training.png", "picture of the run")


def _folder(out: Path | None, source: str) -> Path:
    folder = out or Path("runs") / source
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(picture: Figure, path: Path, what: str) -> None:
    picture.savefig(path)
    print(f"{what}: {path}")
