"""The command line: train on a data set or a folder of images, look at it, use what was trained.

torch is imported inside the commands, so that `--help` and a slip of the pen answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, validators

from . import __version__
from .errors import DataError, DataNotFound, PellucidError, SetupError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .data import DataLoaders
    from .learner import Learner
    from .trained import Trained

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
    epochs: int
    batch_size: int
    lr: float = 0.01
    model: str = "small_resnet"
    brightest: int = 255  # the value of a white pixel


RECIPES = {
    "digits": Recipe("digits", epochs=10, batch_size=64, brightest=16),
    "mnist": Recipe("mnist", epochs=3, batch_size=128),
    "fashion-mnist": Recipe("fashion_mnist", epochs=5, batch_size=128),
    "cifar10": Recipe("cifar10", epochs=5, batch_size=128),
    "imagenette": Recipe("imagenette", epochs=5, batch_size=64),
}
FOLDER = Recipe("DataLoaders.from_folder", epochs=5, batch_size=128)
_SHOWN, _SIDE = 32, 64

Source = Annotated[str, Parameter(help=f"A folder of images, or one of {', '.join(RECIPES)}.")]
Epochs = Annotated[
    int | None,
    Parameter(help="Passes over the training data.", validator=validators.Number(gte=1)),
]
Rate = Annotated[float | None, Parameter(help="Highest learning rate of the one-cycle schedule.")]
Out = Annotated[Path | None, Parameter(help="Folder for what is saved; runs/SOURCE if not given.")]
Run = Annotated[Path, Parameter(help="Folder that `pellucid train` saved, such as runs/digits.")]


@Parameter(name="*")  # the fields are options of the command, without a prefix
@dataclass(frozen=True)
class Reading:
    """How the data are read.

    Args:
        batch_size: Images in a training batch.
        seed: Fixes the weights at the start, the order of the data, and a split at random.
        size: Side in pixels to which the images of a folder are brought; 64 if not given, or
            their own if that is less.
        flip: Mirror training images left to right at random: for photographs, not for letters.
        shift: Move training images at random by up to this share of their side.
        cache: Where decoded images of a folder are kept.
        bad: What becomes of files of a folder that cannot be read.
    """

    batch_size: int | None = None
    seed: int = 0
    size: int | None = None
    flip: bool = False
    shift: float = 0.0
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    bad: Literal["raise", "skip", "set-aside"] = "raise"


@Parameter(name="*")
@dataclass(frozen=True)
class Training:
    """What is trained, and where.

    Args:
        model: The model: mlp, simple_cnn or small_resnet.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """

    model: str | None = None
    device: str = "auto"


_READING, _TRAINING = Reading(), Training()


@app.command
def train(
    source: Source,
    /,
    *,
    epochs: Epochs = None,
    lr: Rate = None,
    training: Training = _TRAINING,
    reading: Reading = _READING,
    out: Out = None,
) -> None:
    """Train a model, and save its weights, the record and a picture of the run.

    What is not given is chosen to suit the data set. A folder of images holds a
    folder for each class, or train and valid (val, validation, test) with such.
    """
    recipe = _recipe(source)
    learn, trained = _learner(source, training, reading)
    folder = _folder(out, source)
    try:
        learn.fit_one_cycle(
            recipe.epochs if epochs is None else epochs, recipe.lr if lr is None else lr
        )
    except KeyboardInterrupt:
        print(f"interrupted in epoch {learn.epoch + 1} of {learn.n_epochs}; saving what there is")
        _save_run(learn, trained, folder)
        raise
    _save_run(learn, trained, folder)


@app.command
def find_lr(
    source: Source,
    /,
    *,
    training: Training = _TRAINING,
    reading: Reading = _READING,
    out: Out = None,
) -> None:
    """Try learning rates from tiny to huge, suggest one, and save the curve as a picture."""
    search = _learner(source, training, reading)[0].find_lr()
    if search.suggestion is None:
        print("the loss never falls: no learning rate to suggest")
    else:
        print(f"suggested: --lr {search.suggestion:.2g}")
    _save(search.plot(), _folder(out, source) / "lr.png", "loss against learning rate")


@app.command
def show(source: Source, /, *, reading: Reading = _READING, out: Out = None) -> None:
    """Say what a data set holds, and save a picture of a training batch as the model gets it.

    Of a folder every image is read: broken ones are named, and those that are both
    in training and in validation.
    """
    data = _load(source, reading, looking=True)
    if data.report is None:
        n_train, n_valid = len(data.train.dataset), len(data.valid.dataset)
        print(f"{source}: {n_train:,} images to train on, {n_valid:,} to validate")
        print(f"{data.n_classes} classes: {', '.join(data.classes or [])}")
    else:
        from .data.folder_report import shared_files

        print(data.report)
        if data.report.bad:
            print("  note     `train` refuses them unless it is told --bad skip or set-aside")
        shared = shared_files(data.train.dataset.names, data.valid.dataset.names)
        for valid, train in list(shared.items())[:1]:
            print(f"  note     {len(shared):,} validation images are training images too: {valid}, "
                  f"for one, is {train}")  # fmt: skip
    from .data import first

    x = first(data.train)[0]
    print(f"an image: {'×'.join(map(str, x.shape[1:]))} (channels, height, width), {x.dtype}")
    _save(data.show_batch(_SHOWN), _folder(out, source) / "batch.png", "a batch")


@app.command
def predict(
    run: Run, /, *images: Annotated[Path, Parameter(help="Image files, or folders of them.")]
) -> None:
    """Say which class each image is of, by a trained model, and how sure the model is."""
    from .trained import Trained

    if not images:
        raise SetupError("There is no image to look at.", do=f"pellucid predict {run} IMAGE...")
    n_broken = 0
    for image, answer in Trained.load(run).predict(_files(images)):
        n_broken += isinstance(answer, PellucidError)
        if isinstance(answer, PellucidError):
            print(answer, file=sys.stderr)
        else:
            print(f"{answer[0]}  {answer[1]:.1%}  {image}")
    if n_broken:
        sys.exit(1)


def main() -> None:
    """Run the command line; exit with 0, 1 (the run failed), 2 (a slip) or 130 (Ctrl-C).

    Of Ctrl-C cyclopts takes care.
    """
    try:
        app(sys.argv[1:], exit_on_error=False)
    except CycloptsError:
        sys.exit(2)  # its message is on the screen already
    except BrokenPipeError:  # whoever was reading has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PellucidError as error:
        print(re.sub(r'bad="([\w-]+)"', r"--bad \1", str(error)), file=sys.stderr)
        sys.exit(2 if isinstance(error, SetupError) else 1)


def _recipe(source: str) -> Recipe:
    if source in RECIPES:
        if Path(source).is_dir():
            print(f"the data set {source}; the folder of that name is ./{source}", file=sys.stderr)
        return RECIPES[source]
    if Path(source).is_dir():
        return FOLDER
    if Path(source).exists():
        raise DataError(f"{source} is a file.", do="give the folder of the images.")
    what = f"There is no data set {source!r}, and no folder of that name."
    if "/" in source or "\\" in source:
        raise DataNotFound(what, do="check the path.")
    raise UnknownName(what, do=did_you_mean(source, RECIPES))


def _load(source: str, reading: Reading, looking: bool = False) -> DataLoaders:
    """Load a data set; to look at a folder, read every image and keep none."""
    recipe = _recipe(source)
    from . import data
    from .data.folder_report import usual_side
    from .vision import Augment

    usual = _SHOWN if looking else recipe.batch_size
    batch_size = usual if reading.batch_size is None else reading.batch_size
    if looking and (reading.cache, reading.bad) != ("auto", "raise"):
        raise SetupError("To show a folder is to read every image, keep none and move none.",
                         do="leave out --cache and --bad.")  # fmt: skip
    if recipe is FOLDER:
        cache = None if looking or reading.cache == "none" else reading.cache
        size = min(usual_side(source), _SIDE) if reading.size is None else reading.size
        bad = "skip" if looking else reading.bad
        loaders = data.DataLoaders.from_folder(
            source, size, batch_size, cache=cache, bad=bad, seed=reading.seed
        )
        if not looking:
            print(loaders.report)
    else:
        if (reading.size, reading.cache, reading.bad) != (None, "auto", "raise"):
            raise SetupError(
                f"--size, --cache and --bad are for folders of images; {source} is a data set.",
                do=f"leave them out; a folder of that name is ./{source}",
            )
        loaders = getattr(data, recipe.loader)(batch_size=batch_size, seed=reading.seed)
    if reading.flip or reading.shift:
        loaders.augment.append(Augment(flip=0.5 * reading.flip, shift=reading.shift))
    return loaders


def _learner(source: str, training: Training, reading: Reading) -> tuple[Learner, Trained]:
    name = training.model or _recipe(source).model
    from .trained import MODELS, Trained

    if name not in MODELS:
        raise UnknownName(f"There is no model {name!r}.", do=did_you_mean(name, MODELS))
    from .device import seed_everything
    from .learner import Learner
    from .metrics import accuracy

    data = _load(source, reading)
    seed_everything(reading.seed)
    trained = Trained.on(data, name, _recipe(source).brightest)
    return Learner(trained.model, data, metrics=[accuracy], device=training.device), trained


def _save_run(learn: Learner, trained: Trained, folder: Path) -> None:
    learn.record.save(folder / "record.json")
    trained.save(folder)
    print(f"weights and record: {folder / 'model.safetensors'}, {folder / 'record.json'}")
    if len(learn.record.batches):
        _save(learn.record.plot(), folder / "training.png", "picture of the run")


def _files(images: Sequence[Path]) -> list[Path]:
    """Return the files given, and those in the folders given; a folder without any is an error."""
    from .data import scan

    found: list[Path] = []
    for image in images:
        own = [image / name for name in scan(image)] if image.is_dir() else [image]
        if not own:
            raise DataError(
                f"There are no images in {image}.",
                do="give image files, or a folder of files that end in .jpg, .png and the like.",
            )
        found += own
    return found


def _folder(out: Path | None, source: str) -> Path:
    folder = out or Path("runs") / Path(source).resolve().name
    if source not in RECIPES and folder.resolve().is_relative_to(Path(source).resolve()):
        what = f"What is saved, in {folder}, would lie among the images."
        raise SetupError(what, do="go elsewhere, or --out FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"The folder {folder} for what is saved cannot be made."
        raise SetupError(what, saw=error.strerror or "", do="--out FOLDER") from None
    return folder


def _save(picture: Figure, path: Path, what: str) -> None:
    picture.savefig(path)
    print(f"{what}: {path}")
