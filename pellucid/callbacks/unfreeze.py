"""Gradual unfreezing: the head first, then stage by stage down to the input."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from ..errors import SetupError, are_whole
from ..events import Callback
from ..freezing import freeze_to, frozen, unfreeze
from ..learner import Learner
from ..roles import stages


class Unfreeze(Callback):
    """Train the model's last stage, and one stage more every few epochs (Howard and Ruder, 2018).

    What is not yet free is frozen to the bit, batch norm's statistics too; see `freezing.freeze`
    and, for what a stage is, `roles.stages`. The optimiser holds all from the beginning and keeps
    its momentum. When the fit ends, in whatever way, everything is free.

    Args:
        every: epochs after which the next stage is let go.

    Raises:
        SetupError: `every` is not 1 or more; something is frozen already; or the model has only one
            stage.
    """

    changes = True
    decides = "when layers are unfrozen"

    def __init__(self, every: int = 1):
        if not are_whole(every) or every < 1:
            raise SetupError("Unfreeze takes a number of epochs, 1 or more.", saw=repr(every))
        self.every = every

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Check that the stages are this callback's, and free all at the end."""
        if not isinstance(learn.model, nn.Module):
            raise SetupError("Unfreeze needs a torch module.", saw=type(learn.model).__name__)
        held = frozen(learn.model)
        if held:
            raise SetupError(
                "Unfreeze freezes by itself, and would let go what is frozen already.",
                saw=", ".join(held[:4]),
                do="call unfreeze(learn.model) and learn.reset_optimizer() first.",
            )
        if len(stages(learn.model)) < 2:
            raise SetupError("Unfreeze needs a model of two stages or more; see roles.stages.")
        try:
            yield
        finally:
            unfreeze(learn.model)

    def before_epoch(self, learn: Learner) -> None:
        """Free what trains in this epoch."""
        freeze_to(learn.model, len(stages(learn.model)) - 1 - learn.epoch // self.every)
