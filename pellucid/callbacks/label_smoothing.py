"""Label smoothing, in training alone."""

from collections.abc import Generator
from contextlib import contextmanager

from ..errors import SetupError, are_numbers
from ..events import Callback
from ..learner import Learner
from ..losses import smoothed


class LabelSmoothing(Callback):
    """Train by smoothed targets, validate by plain ones (Szegedy et al., 2016; see `losses`).

    So validation losses can be compared with those of other runs. Training losses on record are
    the smoothed ones; metrics see the labels as they are. (To smooth in validation too, give the
    learner `partial(F.cross_entropy, label_smoothing=0.1)` as its loss.)

    Args:
        smoothing: how much of the target goes evenly to all classes, 0 to 1.

    Raises:
        SetupError: smoothing is out of range; or, in the fit, the loss is no plain cross entropy.
    """

    changes = True
    order = -10  # before those that mix losses

    def __init__(self, smoothing: float = 0.1):
        if not are_numbers(smoothing) or not 0 <= smoothing <= 1:
            raise SetupError("LabelSmoothing takes a share from 0 to 1.", saw=repr(smoothing))
        self.smoothing = smoothing

    @contextmanager
    def around_batch(self, learn: Learner) -> Generator[None]:
        """Let the loss of a training batch be the smoothed one."""
        loss_func = learn.loss_func
        if learn.training:
            soft = smoothed(loss_func, self.smoothing)
            # a look from within the batch validates by the plain loss
            learn.loss_func = lambda *given: (soft if learn.training else loss_func)(*given)
        try:
            yield
        finally:
            learn.loss_func = loss_func
