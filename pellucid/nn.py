"""Blocks that torch lacks, each an ordinary module for anyone's model."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SetupError
from .stochastic_depth import checked_rate, drop_items
from .tree import describe

_FEW, _LEAST_VARIANCE = 20, 0.01
"""While fewer items were seen, `RunningBatchNorm` takes no variance for smaller than this."""

_COUNTED_IN = 1024
"""Values are counted by so many: a norm that was made float16 can count to 65,504 only."""


class GeneralReLU(nn.Module):
    """ReLU, optionally with a slope below zero, shifted down, and capped.

    min(leaky_relu(x) - sub, cap), elementwise, any shape. ReLU's outputs have a positive mean;
    taking 0.4 away brings that of normal inputs near zero. Nothing is done in place.

    >>> GeneralReLU(leak=0.1, sub=0.4, cap=6.0)(torch.tensor([-2.0, 0.0, 1.0, 10.0]))
    tensor([-0.6000, -0.4000,  0.6000,  6.0000])

    Args:
        leak: slope below zero; None is 0.
        sub: taken away from every value.
        cap: the largest value, after that.
    """

    def __init__(
        self, leak: float | None = None, sub: float | None = None, cap: float | None = None
    ):
        super().__init__()
        self.leak, self.sub, self.cap = leak, sub, cap

    def forward(self, x: Tensor) -> Tensor:
        """Return a new tensor of the shape of `x`."""
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None:
            x = x - self.sub
        return x if self.cap is None else x.clamp(max=self.cap)

    def extra_repr(self) -> str:
        """Show the settings that are set."""
        settings = {"leak": self.leak, "sub": self.sub, "cap": self.cap}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def gain_of(activation: Callable[[Tensor], Tensor] | None) -> float:
    """Return what weights must make up for, so that an activation keeps the signal's size.

    1 / sqrt(E[f(z)²]) for an elementwise `f` and z from N(0, 1): with weights of standard deviation
    gain / sqrt(fan_in), the mean square is the same from layer to layer. For (leaky) ReLU of slope
    a this is √(2 / (1 + a²)) (He et al., 2015, eq. 15), without an activation 1.

    >>> round(gain_of(nn.ReLU()), 6), round(gain_of(torch.tanh), 3), gain_of(None)
    (1.414214, 1.593, 1.0)
    """
    if activation is None:
        return 1.0
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).to("cpu", torch.float64)  # it may have parameters
    z = torch.linspace(-8, 8, 4097, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2)
    with torch.no_grad():
        mean_square = (activation(z).square() * density).sum() / density.sum()
    return mean_square.rsqrt().item()


def conv_norm_act(
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    act: Callable[[], nn.Module] | None = nn.ReLU,
    norm_last: bool = False,
    zero_norm: bool = False,
) -> nn.Sequential:
    """Return a 2-d convolution, a normalisation and an activation, (n, n_in, h, w) to n_out.

    The weights are drawn from N(0, gain² / fan_in) (He et al., 2015) with the activation's
    `gain_of`. The convolution has a bias (zero) only where there is no norm: a norm would take it
    out again, and brings its own.

    Args:
        n_in: channels that come in.
        n_out: channels that go out.
        kernel: size, odd; the map is padded so that stride 1 keeps its size.
        stride: of the convolution.
        norm: makes the norm of a number of channels: `nn.BatchNorm2d`, `RunningBatchNorm`,
            `nn.InstanceNorm2d`, `partial(nn.GroupNorm, 8)`, as a layer norm
            `partial(nn.GroupNorm, 1)`; None leaves it out.
        act: makes the activation: `nn.ReLU`, `partial(GeneralReLU, leak=0.1)`; None leaves it out.
        norm_last: convolution, activation, norm, instead of the norm before the activation.
        zero_norm: begin with the norm's weight at zero, so that a residual branch that ends here
            begins as nothing (Goyal et al., 2017).

    Raises:
        SetupError: `norm` or `act` is not what makes a module, the kernel is even, or
            `zero_norm` finds no weight.
    """
    if kernel % 2 == 0:
        raise SetupError("A kernel must be odd to keep the map centred.", saw=f"kernel {kernel}")
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=norm is None)
    activation = None if act is None else _maker(act, "act")()
    with torch.no_grad():
        convolution.weight.normal_(0, gain_of(activation) / math.sqrt(n_in * kernel**2))
        if convolution.bias is not None:
            convolution.bias.zero_()
    normalisation = None if norm is None else _maker(norm, "norm")(n_out)
    if zero_norm:
        weight = getattr(normalisation, "weight", None)
        if weight is None:
            raise SetupError(
                "zero_norm needs a norm with a weight.",
                saw=repr(normalisation),
                do="set zero_norm=False, or give such a norm: partial(nn.InstanceNorm2d, "
                "affine=True).",
            )
        nn.init.zeros_(weight)
    after = [activation, normalisation] if norm_last else [normalisation, activation]
    return nn.Sequential(convolution, *(part for part in after if part is not None))


def _maker(given: Callable[..., nn.Module], argument: str) -> Callable[..., nn.Module]:
    if isinstance(given, nn.Module):
        kind = type(given)
        name = f"{'nn.' * kind.__module__.startswith('torch.')}{kind.__name__}"
        raise SetupError(
            f"{argument} must make a module, so that each layer has its own.",
            saw=f"the module {given!r}",
            do=f"give the class, {argument}={name}, or a partial of it.",
        )
    if not callable(given):
        raise SetupError(
            f"{argument} must make a module.",
            saw=repr(given),
            do=f"give a class, {argument}=nn.{'ReLU' if argument == 'act' else 'BatchNorm2d'}, "
            "a partial of one, or None.",
        )
    return given


class RunningBatchNorm(nn.Module):
    """Batch norm for batches of any size, also of one: it normalises by running statistics.

    In training too: by exponential averages of the sums, the sums of squares and the counts of all
    batches so far, this one included. Gradients flow through this batch's part of them, not
    through history. So a small batch is not normalised by its own few numbers alone, and right
    after a training step evaluation gives the same. (The idea is fast.ai's, "Running batch norm",
    2019.) Averages of sums divided by averages of counts need no correction for their start. They
    are kept as mean, variance and count, which gives the same values but does not cancel digits.

    Takes (n, c), (n, c, l), (n, c, h, w), ...; float16 and bfloat16 are normalised in float32.

    Args:
        n_channels: c.
        momentum: weight of a new batch of one or two items, in (0, 1]. One of n items weighs
            1 - (1 - momentum) / sqrt(n - 1).
        eps: added to the variance. A larger one tames small batches further.

    Attributes:
        weight, bias: (c,) each, learnt; at first 1 and 0.
        running_mean, running_var: (c,) each, the population mean and variance.
        running_count: the average number of values per channel in a batch, in units of 1024.
        n_seen: items seen in training. While they are fewer than 20, no variance counts as less
            than 0.01.
    """

    running_mean: Tensor
    running_var: Tensor
    running_count: Tensor
    n_seen: Tensor

    def __init__(self, n_channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        if not 0 < momentum <= 1:
            raise SetupError("momentum must be above 0 and at most 1.", saw=f"{momentum}")
        self.n_channels, self.momentum, self.eps = n_channels, momentum, eps
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))
        self.register_buffer("running_count", torch.zeros(()))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        for buffer in (self.running_mean, self.running_count, self.n_seen):
            buffer.zero_()
        self.running_var.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel; the result has the shape and dtype of `x`.

        Raises:
            SetupError: `x` has no second dimension of `n_channels`.
        """
        if x.ndim < 2 or x.shape[1] != self.n_channels:
            raise SetupError(
                f"RunningBatchNorm({self.n_channels}) takes (n, {self.n_channels}, ...).",
                saw=describe(x),
            )
        wide = x.to(
            torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float)
        )
        mean, var = self.running_mean, self.running_var
        if self.training and x.numel():
            mean, var = self._updated(wide)
        var = var.clamp(min=_LEAST_VARIANCE * (self.n_seen < _FEW))
        scale = self.weight * (var + self.eps).rsqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        centred = wide - mean.view(shape)
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape)).to(x.dtype)

    def _updated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch into the running statistics, and return their mean and variance."""
        n_items, n_values = x.shape[0], x.numel() // self.n_channels
        momentum = 1 - (1 - self.momentum) / math.sqrt(max(n_items - 1, 1))
        past = self.running_count * (1 - momentum)
        self.running_count.copy_(past + momentum * n_values / _COUNTED_IN)
        kept = past / self.running_count  # the past's share in all sums; of nothing, exactly 0
        self.n_seen += n_items
        var, mean = torch.var_mean(x, [i for i in range(x.ndim) if i != 1], correction=0)
        step = mean - self.running_mean
        mean = self.running_mean + (1 - kept) * step
        var = kept * self.running_var + (1 - kept) * (var + kept * step.square())
        self.running_mean.copy_(mean.detach())
        self.running_var.copy_(var.detach())
        return mean, var

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.n_channels}, momentum={self.momentum}, eps={self.eps}"


class Lambda(nn.Module):
    """A function as a module: `Lambda(rotate)` calls `rotate` with what it is called with.

    A model is pickled (by `torch.save`, or on its way to another process) only if the function can
    be: one that `def` names at the top of a file, or a partial of such.
    """

    def __init__(self, func: Callable[..., Any]):
        super().__init__()
        if not callable(func):
            raise SetupError("Lambda needs a function.", saw=repr(func))
        self.func = func

    def forward(self, *inputs: Any) -> Any:
        """Return what the function returns."""
        return self.func(*inputs)

    def extra_repr(self) -> str:
        """Show the function's name."""
        return getattr(self.func, "__qualname__", repr(self.func))

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.func)
        except Exception as error:
            code = getattr(self.func, "__code__", None)
            place = f", made in {code.co_filename}:{code.co_firstlineno}" if code else ""
            raise SetupError(
                "A Lambda's function cannot be pickled, so neither can the model.",
                saw=f"{self!r}{place}",
                do="define it with def at the top of a file: Lambda(that_function).",
            ) from error
        return vars(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lambda:
        # a copy in memory needs no pickling: any function will do
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


class AdaptivePool(nn.Module):
    """The mean over all dimensions after the channels: a model then takes images of any size.

    From (n, c, ...) to (n, c).

    Args:
        flatten: False keeps as many dimensions as came in, (n, c, 1, ...).
        concat: put the largest value of each channel before the means, 2c channels in all.
    """

    def __init__(self, flatten: bool = True, concat: bool = False):
        super().__init__()
        self.flatten, self.concat = flatten, concat

    def forward(self, x: Tensor) -> Tensor:
        """Pool each channel of each item."""
        values = x.unsqueeze(-1).flatten(2)  # (n, c) too has then a last dimension to go over
        pooled = values.mean(-1)
        if self.concat:
            pooled = torch.cat([values.amax(-1), pooled], 1)
        return pooled if self.flatten else pooled.view(*pooled.shape, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"flatten={self.flatten}, concat={self.concat}"


class Residual(nn.Module):
    """act(body(x) + shortcut(x)) (He et al., 2016).

    Args:
        body: the residual branch.
        shortcut: brings x to the shape of what the body gives; None passes it on.
        act: follows the sum; None leaves it out.
        drop: in training, the probability that an item goes without the branch; `drop_items`.
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        act: nn.Module | None = None,
        drop: float = 0.0,
    ):
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = nn.Identity() if act is None else act
        self.drop = checked_rate(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to its input."""
        branch = self.body(x)
        if self.training and self.drop:
            branch = drop_items(branch, self.drop)
        return self.act(branch + self.shortcut(x))

    def extra_repr(self) -> str:
        """Show the rate, if there is one."""
        return f"drop={self.drop:g}" if self.drop else ""


def set_stochastic_depth(model: nn.Module, rate: float) -> None:
    """Train a residual network by stochastic depth: later blocks are left out more often.

    Of L blocks the l-th, counted from 1, is left out with probability l / L · rate, the paper's
    linear rule (Huang et al., 2016, eq. 4).

    Args:
        model: all its `Residual` blocks are set, in the order of definition.
        rate: of the last block, 0 to below 1; 0 switches it off.

    Raises:
        SetupError: the model has no such blocks, or the rate is out of range.
    """
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    if not blocks:
        raise SetupError(
            "Stochastic depth found no residual blocks.",
            saw=f"no pellucid.nn.Residual in {type(model).__name__}",
            do="put a StochasticDepth at the end of each branch.",
        )
    for i, block in enumerate(blocks, 1):
        block.drop = checked_rate(i / len(blocks) * rate)
