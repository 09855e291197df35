"""Beginning with convolutions that pass on what comes in."""

from torch import nn

from ..errors import SetupError
from .by_formula import set_values, weight_layers


def init_identity(model: nn.Module) -> None:
    """Let the first filters of each convolution pass on its input channels, one each.

    The square part is the identity, as `nn.init.dirac_` makes it, the other filters stay as they
    are: so a deep stack begins as a shallow one with random features beside. (Zagoruyko &
    Komodakis, "DiracNets", 2017; in this form Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024.)

    Args:
        model: its convolutions with kernels of odd size are set, in place; those with frozen
            weights (see `whiten`), in groups or transposed are left, and so are biases.

    Raises:
        SetupError: there are none.
    """
    convolutions = [
        layer
        for layer in weight_layers(model).values()
        if isinstance(layer, nn.modules.conv._ConvNd)
        and not layer.transposed
        and layer.groups == 1
        and layer.weight.requires_grad
        and all(size % 2 for size in layer.kernel_size)
    ]
    if not convolutions:
        raise SetupError(
            "There is no convolution that could pass on its input.",
            saw=type(model).__name__,
            do="it takes odd kernels, no groups and trainable weights.",
        )
    for layer in convolutions:
        weight = layer.weight.detach().clone()
        square = min(weight.shape[:2])
        nn.init.dirac_(weight[:square])
        set_values(layer, "weight", weight)
