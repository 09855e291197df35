"""The training loops of the overhead benchmark: bare PyTorch and the peers, on equal terms.

Each contender is a function that takes a `Task` and returns `run(epochs)`, which trains a fresh
model for that many epochs on the task's batches. The peers are imported when their function is
called and their objects are made inside `run`, so the fixed costs of a run (model, trainer,
temporary folder) are the same in `run(1)` and `run(3)` and cancel out in the difference.

A peer keeps its defaults unless the line says otherwise, and whatever it prints is left on: the
caller redirects stdout and stderr. Some peers change global settings when they are imported, so
time each contender in a process of its own.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]
Run = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """What every contender trains: a classifier, its optimiser and the batches, ready in memory."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[Iterable[Parameter]], Optimizer]
    batches: list[Batch]
    # Keras takes neither a plain nn.Module nor a torch optimiser, so it needs its own pair.
    keras_model: Callable[[], Any] | None = None
    keras_optimizer: Callable[[], Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the batches are; the peers are told, as most would pick a GPU by themselves."""
        return self.batches[0][0].device

    def new(self) -> tuple[nn.Module, Optimizer]:
        """A fresh model in training mode, on the batches' device, and its optimiser."""
        model = self.make_model().to(self.device).train()
        return model, self.make_optimizer(model.parameters())


class Batches(Dataset[Batch]):
    """The batches as a data set whose items are whole batches, for peers that refuse a list."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def bare(task: Task) -> Run:
    """The plain loop, which tracks nothing."""

    def run(epochs: int) -> None:
        model, optimizer = task.new()
        for _ in range(epochs):
            for inputs, targets in task.batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()

    return run


def bare_tensors(task: Task) -> Run:
    """The plain loop with mean loss and accuracy, summed on tensors and read once an epoch."""

    def run(epochs: int) -> None:
        model, optimizer = task.new()
        for epoch in range(epochs):
            loss_sum = torch.zeros((), device=task.device)
            correct = torch.zeros((), dtype=torch.long, device=task.device)
            samples = 0
            for inputs, targets in task.batches:
                optimizer.zero_grad()
                logits = model(inputs)
                loss = F.cross_entropy(logits, targets)
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach() * len(targets)
                correct += (logits.argmax(dim=1) == targets).sum()
                samples += len(targets)
            print(f"epoch {epoch}: loss {loss_sum / samples:.4f} accuracy {correct / samples:.4f}")

    return run


def bare_items(task: Task) -> Run:
    """The plain loop with mean loss and accuracy, read with `.item()` after every batch."""

    def run(epochs: int) -> None:
        model, optimizer = task.new()
        for epoch in range(epochs):
            loss_sum, correct, samples = 0.0, 0, 0
            for inputs, targets in task.batches:
                optimizer.zero_grad()
                logits = model(inputs)
                loss = F.cross_entropy(logits, targets)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item() * len(targets)
                correct += int((logits.argmax(dim=1) == targets).sum().item())
                samples += len(targets)
            print(f"epoch {epoch}: loss {loss_sum / samples:.4f} accuracy {correct / samples:.4f}")

    return run


def lightning_default(task: Task) -> Run:
    """Lightning's default Trainer: bar, checkpoint, CSV log, and epoch means through self.log."""
    import lightning
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.make_model()

        def configure_optimizers(self) -> Optimizer:
            return task.make_optimizer(self.parameters())

        def training_step(self, batch: Batch, _: int) -> Tensor:
            inputs, targets = batch
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, targets)
            accuracy = (logits.argmax(dim=1) == targets).float().mean()
            # Epoch means, as the other contenders track; Lightning's own default is the last value.
            self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
            self.log("accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
            return loss

    def run(epochs: int) -> None:
        with TemporaryDirectory() as folder:
            # The CSV log and the tqdm bar are what a plain install of Lightning uses. They are
            # named because it takes TensorBoard, and the slower Rich bar, wherever it finds them,
            # and other peers here bring Rich along.
            trainer = lightning.Trainer(
                max_epochs=epochs,
                accelerator=task.device.type,
                logger=CSVLogger(folder),
                callbacks=[TQDMProgressBar()],
                default_root_dir=folder,
            )
            # Not the list itself: Lightning takes a list for a collection of loaders.
            trainer.fit(Module(), train_dataloaders=Batches(task.batches))

    return run


def lightning_barebones(task: Task) -> Run:
    """Lightning with `barebones=True`: no bar, no log, no checkpoint; self.log does nothing."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.make_model()

        def configure_optimizers(self) -> Optimizer:
            return task.make_optimizer(self.parameters())

        def training_step(self, batch: Batch, _: int) -> Tensor:
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

    def run(epochs: int) -> None:
        trainer = lightning.Trainer(max_epochs=epochs, accelerator=task.device.type, barebones=True)
        trainer.fit(Module(), train_dataloaders=Batches(task.batches))

    return run


def hf_trainer(task: Task) -> Run:
    """Hugging Face's Trainer with its defaults, so also gradient clipping and a linear schedule."""
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        """The Trainer wants the loss from the model."""

        def __init__(self) -> None:
            super().__init__()
            self.model = task.make_model()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def run(epochs: int) -> None:
        model = WithLoss().to(task.device)
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                # One row is one whole batch, which the collator hands on as it is.
                per_device_train_batch_size=1,
                use_cpu=task.device.type == "cpu",
                report_to="none",
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=Batches(task.batches),
                data_collator=lambda rows: {"inputs": rows[0][0], "labels": rows[0][1]},
                optimizers=(task.make_optimizer(model.parameters()), None),
            )
            trainer.train()

    return run


def accelerate_loop(task: Task) -> Run:
    """The plain loop through Accelerate, tracking nothing; the batches need no preparation."""
    from accelerate import Accelerator

    def run(epochs: int) -> None:
        accelerator = Accelerator(cpu=task.device.type == "cpu")
        model, optimizer = accelerator.prepare(*task.new())
        for _ in range(epochs):
            for inputs, targets in task.batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()

    return run


def skorch_default(task: Task, **settings: Any) -> Run:
    """Skorch's classifier with its default callbacks; without a validation split it tracks loss."""
    from skorch import NeuralNetClassifier

    def run(epochs: int) -> None:
        model = task.make_model()
        net = NeuralNetClassifier(
            model,
            criterion=nn.CrossEntropyLoss,
            # Called with skorch's parameter groups and learning rate; the task sets its own.
            optimizer=lambda *_, **__: task.make_optimizer(model.parameters()),
            max_epochs=epochs,
            # The default would hold out a fifth of the data.
            train_split=None,
            iterator_train=lambda *_, **__: task.batches,
            device=str(task.device),
            **settings,
        )
        net.fit(Batches(task.batches), y=None)

    return run


def skorch_disabled(task: Task) -> Run:
    """Skorch with `callbacks="disable"`."""
    return skorch_default(task, callbacks="disable")


def ignite_default(task: Task) -> Run:
    """Ignite's supervised trainer with running loss, accuracy and progress bar."""
    from ignite.engine import create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.metrics import Accuracy, RunningAverage

    def run(epochs: int) -> None:
        model, optimizer = task.new()
        trainer = create_supervised_trainer(
            model,
            optimizer,
            F.cross_entropy,
            device=task.device,
            # loss.item() is what the trainer returns by default; the accuracy needs the rest.
            output_transform=lambda _, targets, logits, loss: (loss.item(), logits, targets),
        )
        RunningAverage(output_transform=lambda output: output[0]).attach(trainer, "loss")
        accuracy = Accuracy(output_transform=lambda output: output[1:], device=task.device)
        accuracy.attach(trainer, "accuracy")
        ProgressBar().attach(trainer, ["loss"])
        trainer.run(task.batches, max_epochs=epochs)

    return run


def ignite_bare(task: Task) -> Run:
    """Ignite's Engine around the plain step, with nothing attached."""
    from ignite.engine import Engine

    def run(epochs: int) -> None:
        model, optimizer = task.new()

        def step(_: Engine, batch: Batch) -> None:
            inputs, targets = batch
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()

        Engine(step).run(task.batches, max_epochs=epochs)

    return run


def keras_fit(task: Task) -> Run:
    """Keras on torch: fit with accuracy and progress bar, on Keras's own model and optimiser."""
    # Keras reads this once, at its first import.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if keras.backend.backend() != "torch":
        raise ImportError(f"Keras runs on {keras.backend.backend()}, not on torch")
    make_model, make_optimizer = task.keras_model, task.keras_optimizer
    if make_model is None or make_optimizer is None:
        raise RuntimeError("the task has no Keras model or no Keras optimiser")

    def run(epochs: int) -> None:
        # With a DataLoader Keras takes the tensors as they are; from a generator it would go
        # through NumPy. batch_size=None: each item is a batch already.
        loader = DataLoader(Batches(task.batches), batch_size=None, collate_fn=lambda batch: batch)
        with keras.device(task.device.type):
            model = make_model()
            model.compile(
                optimizer=make_optimizer(),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            model.fit(loader, epochs=epochs, verbose=1)

    return run


def fastai_default(task: Task) -> Run:
    """Fastai's Learner with its default callbacks, and accuracy on the training batches."""
    # fastai.basics and not fastai.vision, as only the latter needs torchvision. The progress bar
    # joins fastai's default callbacks when its module is imported, as the "all" modules do.
    from fastai.basics import DataLoaders, Learner, OptimWrapper, accuracy

    import_module("fastai.callback.progress")

    def run(epochs: int) -> None:
        model, optimizer = task.new()
        with TemporaryDirectory() as folder:
            learner = Learner(
                # No validation batches, as nobody else has any.
                DataLoaders(task.batches, [], path=folder),
                model,
                loss_func=F.cross_entropy,
                opt_func=OptimWrapper(opt=optimizer),
                # fastai would set its own learning rate on the optimiser.
                lr=optimizer.param_groups[0]["lr"],
                metrics=accuracy,
            )
            # Metrics are for the validation batches unless told so.
            learner.recorder.train_metrics = True
            learner.fit(epochs)

    return run


CONTENDERS: dict[str, Callable[[Task], Run]] = {
    "Bare loop": bare,
    "Bare loop, loss and accuracy on tensors": bare_tensors,
    "Bare loop, .item() every batch": bare_items,
    "Accelerate, hand loop": accelerate_loop,
    "Ignite, bare engine": ignite_bare,
    "Ignite, loss, accuracy and bar": ignite_default,
    "skorch, no callbacks": skorch_disabled,
    "skorch, default callbacks": skorch_default,
    "fastai, default callbacks": fastai_default,
    "Lightning, barebones": lightning_barebones,
    "Lightning, default Trainer": lightning_default,
    "Hugging Face, default Trainer": hf_trainer,
    "Keras on torch, fit": keras_fit,
}


def available(name: str, task: Task) -> str | None:
    """None when the contender can run here, otherwise the reason why it is left out."""
    try:
        CONTENDERS[name](task)
    # RuntimeError: a peer that is installed but built for another torch fails with it on import.
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
