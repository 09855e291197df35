"""Optimisers by name: SGD, Adam, AdamW and LAMB, each a list of steppers and its usual settings."""

from .optimizer import Optimizer, Params
from .steppers import add_decay, add_momentum, divide_by_spread, to_scale


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and weight decay if they are given.

    Args:
        params: see `Optimizer`; likewise in the others.
        lr: learning rate, the share of the direction that is gone.
        momentum: see `add_momentum`.
        weight_decay: see `add_decay`.
    """

    def __init__(self, params: Params, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        hypers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, [add_decay, add_momentum], hypers)


class Adam(Optimizer):
    """Adaptive moments, with coupled weight decay (Kingma and Ba, 2015).

    Args:
        params: see `Optimizer`.
        lr: about how far a weight moves a step.
        betas: of the averages of the gradient and of its square.
        eps: least size of what is divided by.
        weight_decay: see `add_decay`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, [add_decay, divide_by_spread], hypers)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); arguments as in `Adam`."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, [divide_by_spread, add_decay], hypers)


class LAMB(Optimizer):
    """AdamW whose steps are as long as the weights are (You et al., 2020); arguments as in `Adam`.

    The learning rate is the share of its own size by which a parameter moves.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, [divide_by_spread, add_decay, to_scale], hypers)
