"""The tower from scratch: all of a small deep-learning library, to be read in an evening.

It stands on torch's tensors and on autograd, which finds gradients; nothing here uses `torch.nn`,
`torch.optim` or `torch.utils.data`, and all of it computes what these compute. To be read in this
order:

1.  `..stats`            variance, covariance, correlation: what all the rest keeps an eye on
2.  `parameter.py`       a tensor that is to be trained
3.  `composite.py`       a thing made of parts that finds them by itself
4.  `handle.py`          what takes a hook off again
5.  `module.py`          a composite that computes: calls, hooks, modes, moving, saving
6.  `initialisation.py`  random weights that keep a signal alive
7.  `linear.py`          weighted sums
8.  `activations.py`     the bend between them
9.  `sequential.py`      one layer after the other
10. `losses.py`          from logits to one number, by way of logsumexp
11. `steppers.py`        momentum, decay, moving averages: what makes optimisers differ
12. `optimizer.py`       what moves parameters by such steppers
13. `optimizers.py`      SGD, Adam, AdamW, LAMB
14. `data.py`            data set, sampler, batches

Here a model can be trained, and a `Learner` trains it as it does any other:

>>> import torch
>>> from pellucid import DataLoaders, Learner
>>> from pellucid.callbacks import Progress
>>> from pellucid.foundations import SGD, Linear, ReLU, Sequential, cross_entropy
>>> x = torch.randn(200, 2)
>>> y = (x.prod(1) > 0).long()
>>> model = Sequential(Linear(2, 30), ReLU(), Linear(30, 2))
>>> data = DataLoaders.from_arrays((x[:150], y[:150]), (x[150:], y[150:]), 10, classes=2)
>>> learn = Learner(model, data, cross_entropy, SGD, device="cpu", callbacks=[Progress("off")])
>>> record = learn.fit(20, lr=0.3)
>>> record.epochs[-1]["valid/loss"] < 0.4  # a guess between two costs log 2, 0.69
True

And then for images:

15. `convolution.py`     the same small layer at every place
16. `pooling.py`         many places become one
17. `norms.py`           layer, group and instance norm
18. `batchnorm.py`       the norm that remembers
"""

from ..stats import (
    correlation,
    covariance,
    mean_absolute_deviation,
    standard_deviation,
    variance,
)
from .activations import ReLU
from .batchnorm import BatchNorm
from .composite import Composite
from .convolution import Conv2d, unfold, windows
from .data import BatchSampler, DataLoader, Dataset, Sampler, collate
from .handle import HookHandle
from .initialisation import fans, kaiming_normal, xavier_normal
from .linear import Flatten, Linear
from .losses import (
    binary_cross_entropy_with_logits,
    binary_nll,
    cross_entropy,
    log_softmax,
    logsumexp,
    mean_squared_error,
    nll,
    softmax,
)
from .module import Module
from .norms import GroupNorm, InstanceNorm, LayerNorm, moments, standardised
from .optimizer import Optimizer
from .optimizers import LAMB, SGD, Adam, AdamW
from .parameter import Parameter
from .pooling import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d
from .sequential import Sequential
from .steppers import (
    add_decay,
    add_momentum,
    divide_by_spread,
    moving_average,
    to_scale,
)

__all__ = [
    "LAMB",
    "SGD",
    "Adam",
    "AdamW",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm",
    "BatchSampler",
    "Composite",
    "Conv2d",
    "DataLoader",
    "Dataset",
    "Flatten",
    "GroupNorm",
    "HookHandle",
    "InstanceNorm",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "Optimizer",
    "Parameter",
    "ReLU",
    "Sampler",
    "Sequential",
    "add_decay",
    "add_momentum",
    "binary_cross_entropy_with_logits",
    "binary_nll",
    "collate",
    "correlation",
    "covariance",
    "cross_entropy",
    "divide_by_spread",
    "fans",
    "kaiming_normal",
    "log_softmax",
    "logsumexp",
    "mean_absolute_deviation",
    "mean_squared_error",
    "moments",
    "moving_average",
    "nll",
    "softmax",
    "standard_deviation",
    "standardised",
    "to_scale",
    "unfold",
    "variance",
    "windows",
    "xavier_normal",
]
