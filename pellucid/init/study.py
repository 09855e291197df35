"""The variance study: what initial weights do to the signal and to the gradient through depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import tree
from ..errors import SetupError
from ..snapshot import preserved
from .by_formula import WeightLayer, shown, weight_layers
from .outputs import Outputs, aligned, call

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerStudy:
    """One layer's numbers; sd is the population standard deviation over all values.

    Attributes:
        name: of the module.
        kind: its class.
        mean, sd: of its output.
        grad_sd: of the gradient by its weights; NaN if they get none.
        weight_sd: of its weights.
    """

    name: str
    kind: str
    mean: float
    sd: float
    grad_sd: float
    weight_sd: float


@dataclass(frozen=True)
class InitStudy:
    """What `study_init` saw; prints as a table.

    Attributes:
        layers: a `LayerStudy` each, in the order of their first call.
        unreached: names of the layers that were not called.
    """

    layers: tuple[LayerStudy, ...]
    unreached: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight sd", "output mean", "output sd", "gradient sd")]
        for layer in self.layers:
            numbers = (layer.weight_sd, layer.mean, layer.sd, layer.grad_sd)
            rows.append((shown(layer.name), layer.kind, *(_short(number) for number in numbers)))
        return "\n".join(
            [aligned(rows), *(f"{shown(name)}  not reached" for name in self.unreached)]
        )

    def __repr__(self) -> str:
        sds = [f"{layer.sd:.3g}" for layer in self.layers]
        through = f"output sd {sds[0]} to {sds[-1]}" if sds else "none reached"
        return f"InitStudy({len(sds)} layers; {through})"

    def plot(
        self, label: str = "this model", beside: Mapping[str, InitStudy] | None = None
    ) -> Figure:
        """Draw the standard deviations through depth: of outputs, of gradients, of weights.

        Args:
            label: what this study is called in the legend.
            beside: further studies by label, of models with as many layers.

        Raises:
            SetupError: one of them has more layers, or fewer.
        """
        from ..plots import plot_init_study

        for other, study in (beside or {}).items():
            if len(study.layers) != len(self.layers):
                raise SetupError(
                    "Studies side by side must have the same number of layers.",
                    saw=f"{len(self.layers)} in {label!r}, {len(study.layers)} in {other!r}",
                )
        studies = {label: self, **(beside or {})}
        names = [shown(layer.name) for layer in self.layers]
        return plot_init_study(names, {label: study.columns() for label, study in studies.items()})

    def columns(self) -> dict[str, list[float]]:
        """Return mean, sd, grad_sd and weight_sd as lists, an entry a layer."""
        wanted = ("mean", "sd", "grad_sd", "weight_sd")
        return {name: [getattr(layer, name) for layer in self.layers] for name in wanted}


def study_init(
    model: nn.Module,
    batch: Any,
    loss_func: Callable[..., Tensor] | None = None,
    n_inputs: int = 1,
) -> InitStudy:
    """Send a batch forward and back, and tell how large signal and gradient are at each layer.

    Watched are the Linear and convolution layers. Where initial weights suit the network, the
    standard deviations of outputs stay near 1 through all depth, and those of the gradients alike;
    where they do not, both shrink or grow by a factor a layer. The model is in training mode and
    afterwards untouched, and so is the random state.

    Args:
        model: any, on the device of the batch.
        batch: a tensor of inputs, or inputs and targets as a loader gives them.
        loss_func: `(preds, *targets) -> 0-d tensor`. None sends back gradients drawn from N(0, 1),
            divided by the number of items, as of a mean over the batch.
        n_inputs: how many parts of the batch are inputs.

    Raises:
        SetupError: the model has no such layers, or `batch` is none.
    """
    layers = weight_layers(model)
    if not isinstance(batch, Tensor | tuple | list | dict):
        raise SetupError(
            "study_init takes one batch.",
            saw=tree.describe(batch),
            do="study_init(model, data.one_batch()), data being DataLoaders.",
        )
    x, y = tree.split(batch, n_inputs)
    with preserved(model), torch.enable_grad():
        model.train()
        with Outputs(layers) as outputs:
            preds = call(model, x)
        loss = _noise(preds, x) if loss_func is None else _loss(loss_func, preds, y)
        gradients = _gradients(loss, layers)
        seen = outputs.read()
        studied = tuple(
            LayerStudy(
                name,
                type(layers[name]).__name__,
                output.mean,
                output.sd,
                gradients.get(name, math.nan),
                _sd(layers[name].weight),
            )
            for name, output in seen.items()
        )
    return InitStudy(studied, tuple(name for name in layers if name not in seen))


def _loss(loss_func: Callable[..., Tensor], preds: Any, y: Any) -> Tensor:
    if isinstance(y, tuple):
        return loss_func(preds, *y)
    return loss_func(preds) if y is None else loss_func(preds, y)


def _noise(preds: Any, x: Any) -> Tensor:
    """Return a loss whose gradient by each prediction is a number from N(0, 1) over n."""
    floats = [leaf for leaf in tree.leaves(preds) if torch.is_tensor(leaf) and leaf.requires_grad]
    return sum((leaf * torch.randn_like(leaf)).sum() for leaf in floats) / tree.n_items(x)


def _gradients(loss: Any, layers: Mapping[str, WeightLayer]) -> dict[str, float]:
    """Return the sd of the gradient by each layer's weights, of those that get one."""
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    trained = {
        name: weight
        for name, weight in weights.items()
        if weight is not None and weight.requires_grad
    }
    if not trained or not torch.is_tensor(loss) or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: _sd(grad) for name, grad in zip(trained, found, strict=True) if grad is not None}


def _sd(values: Tensor) -> float:
    return (
        values.detach()
        .to(torch.promote_types(values.dtype, torch.float32))
        .std(correction=0)
        .item()
    )


def _short(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3g}"
