"""The full text of the best messages, each triggered by a real slip; and what works afterwards.

Our own errors are compared whole. An error inside the user's model or loss stays what it is, so
there the note is compared, which says where it happened, what was seen and what to do.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from pellucid import Callback, CancelBatch, CancelStep, DataLoaders, Learner, Loader
from pellucid.callbacks import EarlyStopping, Progress, Schedule
from pellucid.data import ArrayDataset, mnist, named
from pellucid.errors import (
    CallbackError,
    DataError,
    DataNotFound,
    NonFiniteLoss,
    PellucidError,
    SetupError,
    UnknownName,
)
from pellucid.metrics import accuracy
from pellucid.schedules import linear

X, Y = torch.linspace(-1, 1, 48).reshape(8, 6), torch.arange(8) % 3
PIXELS = (torch.arange(128, dtype=torch.uint8) * 2).reshape(8, 1, 4, 4)


def learner(model=None, train=None, valid=None, **settings):
    data = [(X, Y)] * 3 if train is None else train, valid
    settings = {"loss_func": F.cross_entropy, "device": "cpu"} | settings
    return Learner(model or nn.Linear(6, 3), data, callbacks=[Progress("off")], **settings)


def slip(kind, do, *arguments, **settings):
    """Do what goes wrong, and return the error."""
    with pytest.raises(kind) as caught:
        do(*arguments, **settings)
    return caught.value


def note(error):
    """Return what was added to an error that is not ours."""
    assert not isinstance(error, PellucidError)
    return "\n".join(error.__notes__)


def trains_again(learn):
    """The slip is mended: the same learner works as if nothing had been."""
    n = len(learn.record.epochs)
    learn.fit(1)
    assert len(learn.record.epochs) == n + 1
    assert math.isfinite(learn.record["train/loss"][-1])


# ── in the model ────────────────────────────────────────────────────────────────────────────────


def test_a_linear_layer_of_other_inputs():
    learn = learner(nn.Linear(5, 3))
    error = slip(RuntimeError, learn.fit, 1)
    assert str(error) == "mat1 and mat2 shapes cannot be multiplied (8x6 and 5x3)"
    assert note(error) == (
        "in training, epoch 0 of 1, batch 0 of 3 (both counted from 0)\n"
        "  saw: x float32 8×6, y int64 8\n"
        "  do:  a Linear layer expects another number of features; images need an nn.Flatten() "
        "before it."
    )
    learn.data.train = [(X[:, :5], Y)]
    trains_again(learn)


def test_a_convolution_of_other_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    learn = learner(model, [(PIXELS.float(), Y)])
    assert note(slip(RuntimeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x float32 8×1×4×4, y int64 8\n"
        "  do:  the first convolution's in_channels must be the images' second dimension."
    )
    learn.data.train = [(PIXELS.float().expand(-1, 3, -1, -1), Y)]
    trains_again(learn)


@pytest.mark.parametrize(
    "first_layers",
    [[nn.Flatten(), nn.Linear(16, 4)], [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4)]],
    ids=["linear", "convolution"],
)
def test_pixels_that_are_still_bytes(first_layers):
    learn = learner(nn.Sequential(*first_layers), [(PIXELS, Y)])
    assert note(slip(RuntimeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x uint8 8×1×4×4, y int64 8\n"
        "  do:  the inputs are uint8; let the data carry a transform, for instance "
        "transforms=[Normalize.of(train_images)]."
    )
    learn.data.transforms = [lambda x: x.float() / 255]
    trains_again(learn)


def test_inputs_of_another_precision():
    learn = learner(train=[(X.double(), Y)])
    assert note(slip(RuntimeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x float64 8×6, y int64 8\n"
        "  do:  model, inputs and targets differ in dtype; use float32 inputs, float32 targets "
        "for a regression and int64 for classes."
    )
    learn.data.train = [(X, Y)]
    trains_again(learn)


def test_a_dict_whose_names_the_model_does_not_know():
    learn = learner(train=[{"image": X, "label": Y}])
    assert note(slip(TypeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x {image: float32 8×6}, y int64 8\n"
        "  do:  the batch and the model's forward disagree about the inputs; n_inputs of "
        "DataLoaders says how many parts of a batch are inputs, and a dict's are passed by name."
    )
    learn.data.train = [{"input": X, "label": Y}]
    trains_again(learn)


def test_batch_norm_over_a_batch_of_one():
    learn = learner(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), [(X, Y), (X[:1], Y[:1])])
    assert note(slip(ValueError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 1 of 2 (both counted from 0)\n"
        "  saw: x float32 1×6, y int64 1\n"
        "  do:  batch norm cannot train on a batch of one item; use drop_last=True or another "
        "batch size."
    )
    learn.data.train = [(X, Y)]
    trains_again(learn)


# ── in the loss ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", ["training", "validation"])
def test_labels_beyond_the_models_classes(part):
    good, bad = [(X, Y)], [(X, Y + 1)]
    learn = learner(train=bad, valid=good) if part == "training" else learner(train=good, valid=bad)
    error = slip(IndexError, learn.fit, 1)
    assert str(error) == "Target 3 is out of bounds."
    assert note(error) == (
        f"in {part}, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x float32 8×6, y int64 8, preds float32 8×3\n"
        "  do:  the labels of this batch go from 1 to 3, the model gives 3 classes, 0 to 2; mend "
        "the labels or the model's last layer."
    )
    learn.data.train = learn.data.valid = good
    trains_again(learn)


def test_labels_in_a_column():
    learn = learner(train=[(X, Y[:, None])])
    assert note(slip(RuntimeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 1 (both counted from 0)\n"
        "  saw: x float32 8×6, y int64 8×1, preds float32 8×3\n"
        "  do:  cross entropy wants predictions (n, classes) and one integer a target, shape (n)."
    )
    learn.data.train = [(X, Y)]
    trains_again(learn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_labels_of_a_dtype_that_cross_entropy_does_not_take(dtype):
    learn = learner(train=[(X, Y.to(dtype))])
    text = note(slip(RuntimeError, learn.fit, 1))
    assert "uint8" not in text  # nothing here is
    assert "int64 for classes" in text
    learn.data.train = [(X, Y)]
    trains_again(learn)


def test_a_loss_for_every_item():
    learn = learner(loss_func=nn.CrossEntropyLoss(reduction="none"))
    assert note(slip(RuntimeError, learn.fit, 1)) == (
        "in training, epoch 0 of 1, batch 0 of 3 (both counted from 0)\n"
        "  saw: x float32 8×6, y int64 8, preds float32 8×3\n"
        "  do:  the loss must be one number, the mean over the batch; set its reduction to 'mean'."
    )
    learn.loss_func = F.cross_entropy
    trains_again(learn)


def test_predictions_in_a_column_for_a_regression():
    data = DataLoaders.from_arrays((X, X.sum(1)))
    learn = Learner(nn.Linear(6, 1), data, callbacks=[Progress("off")], device="cpu")
    assert str(slip(DataError, learn.fit, 1)) == (
        "Predictions and targets differ in shape.\n"
        "  saw: predictions float32 8×1, targets float32 8\n"
        "  do:  end the model with nn.Flatten(0), or give targets of the predictions' shape."
    )
    data.train = [(X, X.sum(1, keepdim=True))]
    trains_again(learn)


def test_a_loss_that_is_a_class_and_not_an_instance():
    # the message of torch, about the truth of a tensor, leads nowhere
    with pytest.raises((SetupError, RuntimeError)) as caught:
        learner(loss_func=nn.CrossEntropyLoss).fit(1)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "CrossEntropyLoss()" in text


@pytest.mark.parametrize("answer", [3.0, None])
def test_a_loss_that_gives_no_tensor(answer):
    learn = learner(loss_func=lambda preds, targets: answer)
    error = slip(Exception, learn.fit, 1)
    assert "  do:  " in "\n".join([str(error), *error.__notes__])
    learn.loss_func = F.cross_entropy
    trains_again(learn)


def test_a_loss_that_becomes_nan():
    bad = X.clone()
    bad[3, 2] = math.nan
    learn = learner(nn.Linear(6, 3), [(X, Y), (X, Y), (bad, Y), (X, Y)], lr=0.25, opt_func=SGD)
    error = slip(NonFiniteLoss, learn.fit, 2)
    assert re.sub(r"\d\.\d+", "#", str(error)) == (
        "The training loss became nan in epoch 0, batch 2 (both counted from 0).\n"
        "  saw: the losses before it #, #, lr #; the inputs are not finite in item 3 of the batch\n"
        "  do:  mend these items or leave them out. No step was taken since: the weights are those "
        "before that batch."
    )
    assert f"{learn.record['train/loss'][1]:.4g}, lr 0.25" in str(error)
    learn.data.train = [(X, Y)]
    trains_again(learn)


def test_the_place_noted_on_a_nan_is_the_place_of_the_nan():
    # the number is read later than the batch it belongs to
    bad = X * math.nan
    learn = learner(train=[(X, Y), (bad, Y), (X, Y), (X, Y)])
    error = slip(NonFiniteLoss, learn.fit, 1)
    places = re.findall(r"batch (\d+)", "\n".join([str(error), *getattr(error, "__notes__", [])]))
    assert set(places) == {"1"}


# ── in the data ─────────────────────────────────────────────────────────────────────────────────


def test_labels_out_of_range_when_the_data_are_made():
    error = slip(DataError, DataLoaders.from_arrays, (X, Y + 1), classes=3)
    assert str(error) == (
        "A label of the training data is out of range.\n"
        "  saw: label 3 at item 2, 2 such in all; there are 3 classes, 0 to 2\n"
        "  do:  mend the labels, or say how many classes there are: classes=..."
    )


@pytest.mark.parametrize("targets", [Y[:0], X[:0]], ids=["labels", "floats"])
def test_arrays_without_items(targets):
    error = slip(DataError, DataLoaders.from_arrays, (X[:0], targets))
    assert str(error) == (
        "The data set has no batch.\n"
        "  saw: 0 items, batch_size 64, drop_last=False\n"
        "  do:  check where the items should come from."
    )


def test_a_data_set_without_a_full_batch():
    error = slip(DataError, Loader, ArrayDataset(X), 16, drop_last=True)
    assert str(error) == (
        "The data set has no batch.\n"
        "  saw: 8 items, batch_size 16, drop_last=True\n"
        "  do:  check where the items should come from; or set drop_last=False."
    )


def test_a_generator_that_is_used_up():
    learn = learner(train=iter([(X, Y)] * 2))
    error = slip(DataError, learn.fit, 2)
    assert str(error) == (
        "The training data gave no batch.\n"
        "  do:  a generator is used up after one pass: give a list, a Loader or a torch "
        "DataLoader; with drop_last, one batch must be full."
    )
    learn.data.train = [(X, Y)]
    trains_again(learn)


def test_data_without_a_batch_note_no_batch():
    learn = learner(train=[])
    error = slip(DataError, learn.fit, 1)
    assert "batch -1" not in "\n".join(error.__notes__)


class Lying:
    """Batches that are not as many as they say."""

    def __init__(self, n, said):
        self.n, self.said = n, said

    def __len__(self):
        return self.said

    def __iter__(self):
        return iter([(X, Y)] * self.n)


@pytest.mark.parametrize(
    ("n", "came"), [(4, "4 came and more may follow"), (9, "4 came and more may follow"),
                    (2, "2 came")]
)  # fmt: skip
@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_length_that_is_not_true(part, n, came):
    parts = {"train": [(X, Y)], "valid": [(X, Y)]}
    learn = learner(**(parts | {"train" if part == "training" else "valid": Lying(n, 3)}))
    assert str(slip(DataError, learn.fit, 1)) == (
        f"The {part} data gave another number of batches than they said.\n"
        f"  saw: len() says 3, {came}\n"
        "  do:  mend its __len__; schedules and progress are reckoned from it."
    )
    learn.data.train = learn.data.valid = Lying(3, 3)
    trains_again(learn)


def test_targets_that_tell_no_loss():
    data = DataLoaders.from_arrays((X, Y[:, None].expand(8, 2)), batch_size=4)
    error = slip(SetupError, Learner, nn.Linear(6, 3), data)
    assert str(error) == (
        "The data do not tell which loss fits their targets.\n"
        "  saw: DataLoaders(train=Loader(2 batches of 4, shuffled, seed 0, from "
        "ArrayDataset(float32 8×6, int64 8×2)))\n"
        "  do:  DataLoaders(train, valid, classes=10) for classes, else "
        "Learner(..., loss_func=...)."
    )


def test_a_message_about_a_list_of_batches_does_not_print_their_numbers():
    error = slip(SetupError, Learner, nn.Linear(6, 3), ([X] * 5, None))
    assert len(str(error).splitlines()) == 3 and len(str(error)) < 400


def test_a_data_set_that_is_nowhere(tmp_path, monkeypatch):
    def fails(name, force):
        raise DataNotFound("https://… could not be downloaded.", saw="no route to host")

    monkeypatch.delenv("PELLUCID_DATA", raising=False)
    monkeypatch.setenv("PELLUCID_HOME", str(tmp_path))
    monkeypatch.setattr(named, "fetch_dataset", fails)
    assert str(slip(DataNotFound, mnist)) == (
        "mnist is not on this machine.\n"
        f"  saw: looked in {tmp_path}/data/mnist; https://… could not be downloaded. "
        "no route to host\n"
        "  do:  give the folder of its four files: path=...; or put them into a folder mnist and "
        f"set PELLUCID_DATA to the folder above it; or put them into {tmp_path}/data/mnist; or let "
        "this machine reach https://storage.googleapis.com/cvdf-datasets/mnist."
    )


def test_a_split_that_mnist_does_not_have(real_data):
    assert str(slip(UnknownName, mnist, split="offical")) == (
        "MNIST has no split 'offical'.\n  do:  did you mean 'official'?"
    )


@pytest.mark.parametrize("given", ["a loader", "a list", "arrays"])
def test_data_that_are_no_pair_of_loaders(given):
    # a loader would be taken apart into its batches, arrays into their items
    data = {"a loader": Loader(ArrayDataset(X, Y), 4), "a list": [(X, Y)] * 3, "arrays": (X, Y)}
    error = slip(Exception, Learner, nn.Linear(6, 3), data[given], F.cross_entropy)
    assert isinstance(error, SetupError) and "DataLoaders" in str(error)


# ── in the callbacks ────────────────────────────────────────────────────────────────────────────


def test_a_moment_that_is_misspelt():
    def define():
        class Shout(Callback):
            def after_bacth(self, learn):
                pass

    assert str(slip(CallbackError, define)) == (
        "Shout.after_bacth looks like a moment of the timetable, but there is none of that name, "
        "so it would never be called.\n"
        "  do:  did you mean 'after_batch'? A helper's name may begin with an underscore."
    )


@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [
        ("on_batch_end", "after_batch"),
        ("on_train_batch_end", "after_batch"),
        ("on_epoch_end", "after_epoch"),
        ("on_epoch_begin", "before_epoch"),
        ("begin_fit", "before_fit"),
        ("begin_batch", "before_batch"),
        ("after_pred", "after_predict"),
        ("on_train_end", "after_train"),
    ],
)
def test_a_moment_as_other_libraries_call_it_is_translated(elsewhere, here):
    error = slip(CallbackError, type, "Ported", (Callback,), {elsewhere: lambda self, learn: None})
    assert f"did you mean {here!r}?" in str(error)


def test_a_handler_of_more_than_the_learner():
    def define():
        class Shout(Callback):
            def after_batch(self, learn, batch):
                pass

    assert str(slip(CallbackError, define)) == (
        "Shout.after_batch must take the learner and nothing else.\n"
        "  saw: def after_batch(self, learn, batch)\n"
        "  do:  write def after_batch(self, learn)."
    )


def test_a_callback_that_hears_nothing():
    class Deaf(Callback):
        def count(self):
            pass

    learn = learner()
    text = (
        "Deaf hears no moment, so it would never act.\n"
        "  do:  give it methods such as before_fit, before_epoch, before_train, before_batch."
    )
    assert str(slip(CallbackError, learn.fit, 1, callbacks=[Deaf()])) == text
    assert str(slip(CallbackError, Learner, nn.Linear(6, 3), ([(X, Y)], None), F.cross_entropy,
                    callbacks=[Deaf()])) == text  # fmt: skip
    trains_again(learn)


def test_a_callback_class_instead_of_an_instance():
    learn = learner()
    assert str(slip(CallbackError, learn.fit, 1, callbacks=[EarlyStopping])) == (
        "Callbacks must be instances of pellucid.Callback.\n"
        "  saw: <class 'pellucid.callbacks.early_stopping.EarlyStopping'>\n"
        "  do:  EarlyStopping() makes an instance."
    )
    trains_again(learn)


def test_a_function_instead_of_a_callback():
    learn = learner()
    assert str(slip(CallbackError, learn.fit, 1, callbacks=[print])) == (
        "Callbacks must be instances of pellucid.Callback.\n"
        "  saw: <built-in function print>\n"
        "  do:  callbacks.Debug('after_epoch', function) calls a function at a moment."
    )
    trains_again(learn)


def test_one_callback_instead_of_a_list_in_a_fit():
    learn = learner()
    for fit in (learn.fit, learn.fit_one_cycle):
        with pytest.raises(CallbackError, match=r"takes a list.*\n.*saw: Progress"):
            fit(1, 0.1, Progress("off"))  # ty: ignore[invalid-argument-type]
    trains_again(learn)


@pytest.mark.parametrize("name", ["callbacks", "metrics"])
def test_one_thing_instead_of_a_list_of_them(name):
    one = Progress("off") if name == "callbacks" else accuracy
    settings = {"loss_func": F.cross_entropy, name: one}
    error = slip(Exception, Learner, nn.Linear(6, 3), ([(X, Y)], None), **settings)
    assert isinstance(error, SetupError) and f"{name}=[" in str(error)


def test_a_handler_that_returns_something():
    class Stop(Callback):
        def after_loss(self, learn):
            return True

    learn = learner()
    assert str(slip(CallbackError, learn.fit, 1, callbacks=[Stop()])) == (
        "Stop.after_loss returned something, which has no effect.\n"
        "  saw: True\n"
        "  do:  return nothing; assign attributes of `learn`, or raise a Cancel exception."
    )
    trains_again(learn)


@pytest.mark.parametrize(
    ("moment", "raised"),
    [("before_batch", CancelStep), ("after_epoch", CancelStep), ("before_epoch", CancelBatch)],
)
def test_a_cancel_where_it_has_no_meaning(moment, raised):
    def leave(self, learn):
        raise raised

    stray = type("Stray", (Callback,), {moment: leave})()
    learn = learner()
    assert str(slip(CallbackError, learn.fit, 1, callbacks=[stray])) == (
        f"{raised.__name__} was raised where it has no meaning.\n"
        f"  saw: raised in {moment} of Stray()\n"
        "  do:  pellucid/events.py says which Cancel can be raised in which moment."
    )
    trains_again(learn)


def test_an_error_of_a_callback_says_whose_and_when():
    class Fail(Callback):
        def after_step(self, learn):
            raise ValueError("spoilt")

    learn = learner()
    error = slip(ValueError, learn.fit, 1, callbacks=[Fail()])
    assert str(error) == "spoilt"
    assert note(error) == (
        "raised in after_step of Fail()\n"
        "in training, epoch 0 of 1, batch 0 of 3 (both counted from 0)\n"
        "  saw: x float32 8×6, y int64 8, preds float32 8×3"
    )
    trains_again(learn)


def test_a_schedule_of_something_the_optimiser_does_not_have():
    learn = learner(opt_func=SGD)
    error = slip(UnknownName, learn.fit, 1, callbacks=[Schedule("weight_deacy", linear(0, 1))])
    assert str(error) == (
        "The optimiser has no hyper-parameter 'weight_deacy'.\n"
        "  saw: it has lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, "
        "differentiable, fused\n"
        "  do:  did you mean 'weight_decay'?"
    )
    trains_again(learn)


def test_an_error_before_the_first_batch_claims_no_batch():
    class Fail(Callback):
        def before_fit(self, learn):
            raise ValueError("spoilt")

    learn = learner(valid=[(X, Y)])
    learn.fit(1)
    text = note(slip(ValueError, learn.fit, 1, callbacks=[Fail()]))
    assert "raised in before_fit of Fail()" in text
    assert "batch" not in text and "validation" not in text


def test_stopping_on_a_column_that_is_not_there():
    learn = learner(valid=[(X, Y)], metrics=[accuracy])
    error = slip(UnknownName, learn.fit, 1, callbacks=[EarlyStopping("valid/acuracy")])
    assert str(error) == (
        "No epoch of this fit will have 'valid/acuracy'.\n  do:  did you mean 'valid/accuracy'?"
    )
    trains_again(learn)


# ── in the settings ─────────────────────────────────────────────────────────────────────────────


def test_a_metric_given_by_its_name():
    assert str(slip(SetupError, learner, metrics=["accuracy"])) == (
        "A metric is a function, not the name 'accuracy'.\n"
        "  saw: metrics=['accuracy']\n"
        "  do:  from pellucid.metrics import accuracy, and give metrics=[accuracy]."
    )


def test_metrics_given_as_one_name_are_not_taken_letter_by_letter():
    assert "the name 'accuracy'" in str(slip(SetupError, learner, metrics="accuracy"))


@pytest.mark.parametrize(
    "wrong", [lambda preds, y: preds.nonsense, lambda preds, y: preds.mean(1), lambda p, y: None]
)
def test_an_error_of_a_metric_says_which(wrong):
    wrong.__name__ = "top_five"
    learn = learner(metrics=[accuracy, wrong])
    error = slip(Exception, learn.fit, 1)
    assert "top_five" in "\n".join([str(error), *error.__notes__])


@pytest.mark.parametrize(
    ("model", "saw"),
    [
        (nn.ReLU(), "no parameters at all"),
        (nn.Linear(6, 3).requires_grad_(False), "2 parameters, all frozen"),
    ],
)
def test_a_model_with_nothing_to_train(model, saw):
    assert str(slip(SetupError, learner(model).fit, 1)) == (
        "The model has no parameters to train.\n"
        f"  saw: {saw}\n"
        "  do:  give a model with parameters, at least one of them with requires_grad."
    )


def test_a_function_that_makes_no_optimiser():
    learn = learner(opt_func=lambda params, lr: "adam")
    assert str(slip(SetupError, learn.fit, 1)) == (
        "opt_func must return a torch optimiser.\n"
        "  saw: 'adam'\n"
        "  do:  pass a class such as torch.optim.SGD, or a function (params, lr) -> Optimizer."
    )
    learn.opt_func = SGD
    trains_again(learn)


@pytest.mark.parametrize(
    "opt_func",
    ["adam", lambda params: SGD(params), SGD(nn.Linear(2, 2).parameters(), lr=1.0)],
    ids=["a name", "without lr", "an optimiser"],
)
def test_an_opt_func_that_cannot_be_called_with_parameters_and_rate(opt_func):
    learn = learner(opt_func=opt_func)
    error = slip(Exception, learn.fit, 1)
    assert isinstance(error, SetupError) and "opt_func" in str(error)
    learn.opt_func = SGD
    trains_again(learn)


@pytest.mark.parametrize("epochs", [-1, 1.5, "3", None])
def test_epochs_that_are_no_count(epochs):
    learn = learner()
    assert str(slip(SetupError, learn.fit, epochs)) == (
        f"epochs must be a whole number, 0 or more.\n  saw: {epochs!r}"
    )
    trains_again(learn)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "fast"])
def test_a_learning_rate_that_is_none(lr):
    learn = learner()
    error = slip(Exception, learn.fit, 1, lr=lr)
    assert isinstance(error, SetupError) and repr(lr) in str(error)
    assert len(learn.record.batches) == 0
    trains_again(learn)


def test_a_device_that_torch_does_not_know():
    error = slip(SetupError, learner, device="gpu")
    assert re.sub(r"one of .* device type", "one of ... device type", str(error)) == (
        "The device 'gpu' cannot be used.\n"
        "  saw: Expected one of ... device type at start of device string: gpu\n"
        '  do:  choose "auto", "cpu", or a device that torch sees on this machine.'
    )


def test_an_error_of_the_users_keeps_its_class_and_its_traceback():
    class Odd(Exception):
        pass

    class Broken(nn.Linear):
        def forward(self, x):
            raise Odd("where it happened")

    error = slip(Odd, learner(Broken(6, 3)).fit, 1)
    frames, step = [], error.__traceback__
    while step:
        frames.append(step.tb_frame.f_code)
        step = step.tb_next
    assert frames[-1].co_name == "forward" and frames[-1].co_filename == __file__
    ours = [code for code in frames if "/pellucid/" in code.co_filename.replace("\\", "/")]
    assert [code.co_name for code in ours] == ["fit", "one_pass", "forward"]
