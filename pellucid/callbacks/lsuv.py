"""Initial weights by the first batch."""

from ..errors import SetupError
from ..events import Callback
from ..init import LSUVReport, lsuv
from ..learner import Learner
from ..sharding import in_shards


class LSUV(Callback):
    """Give the model's layers unit variance on the first batch, just before it; see `init.lsuv`.

    The batch is what the model is about to get, after all transforms and callbacks. Acts once in a
    learner's life: one that has taken steps already is left as it is.

    Args:
        tol: how far from 1 the standard deviations, and from 0 the means, may be.
        max_passes: at most so often the batch goes through to set the layers.

    Attributes:
        report: what was done; None before.

    Raises:
        SetupError: in the fit: the model is in shards, and new.
    """

    order = 85  # after those that change the batch, before those that compile or watch the model
    changes = True

    def __init__(self, tol: float = 1e-3, max_passes: int = 20):
        self.tol, self.max_passes = tol, max_passes
        self.report: LSUVReport | None = None

    def before_fit(self, learn: Learner) -> None:
        """See whether the learner is new."""
        self._due = learn.step == 0
        if self._due and in_shards(learn.model):
            raise SetupError(
                "LSUV cannot set layers in shards.",
                do="call init.lsuv(learn.model, x) with a batch x before the fit.",
            )

    def before_batch(self, learn: Learner) -> None:
        """Set the layers, if this is the first batch to train on."""
        if learn.training and self._due:
            self._due = False
            self.report = lsuv(learn.model, learn.x, self.tol, self.max_passes)
