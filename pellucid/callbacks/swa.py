"""Stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from .. import tree
from ..averaging import Averages, renew_batch_norm
from ..data import preserved_order
from ..errors import SetupError, are_numbers
from ..events import Callback, CancelFit
from ..learner import Learner
from ..snapshot import preserved_random_state


class SWA(Callback):
    """End the fit with the mean of the weights after each of the last epochs.

    Izmailov et al., 2018, "Averaging weights leads to wider optima and better generalization"; the
    numbers are those of torch.optim.swa_utils. Batch norm's statistics are taken anew for the mean,
    by one more pass over the training data without gradients, before the last validation: the last
    row on record is the final model's. Where a callback ends the fit before, it ends with the mean
    so far; after an error with the plain weights. It wants a rate that stays high to the end.

    Args:
        start: share of the epochs before the first that counts, in [0, 1).

    Attributes:
        holds_average: whether the fit has put the mean into the model.

    Raises:
        SetupError: start is out of its range.
    """

    changes = True
    decides = "which weights the fit ends with"
    order = 55  # when the steps of an epoch are settled

    def __init__(self, start: float = 0.75):
        if not are_numbers(start) or not 0 <= start < 1:
            raise SetupError("SWA takes a share of the epochs in [0, 1).", saw=repr(start))
        self.start = start
        self._averages: Averages | None = None
        self.holds_average = False

    @contextmanager
    def around_fit(self, learn: Learner) -> Generator[None]:
        """Forget everything at the end."""
        self._averages, self._n_averaged, self.holds_average = None, 0, False
        try:
            yield
        finally:
            self._averages = None

    @contextmanager
    def around_epoch(self, learn: Learner) -> Generator[None]:
        """End with the mean if the fit is ended early."""
        try:
            yield
        except CancelFit:
            self._finish(learn)
            raise

    def after_train(self, learn: Learner) -> None:
        """Take this epoch's weights into the mean, and put the mean into the model at the end."""
        if learn.epoch + 1 > self.start * learn.n_epochs:
            self._averages = self._averages or Averages(learn.model)
            self._n_averaged, self._n_batches = self._n_averaged + 1, learn.batch_index + 1
            self._averages.draw(learn.model, 1 / self._n_averaged)
        if learn.epoch + 1 == learn.n_epochs:
            self._finish(learn)

    def _finish(self, learn: Learner) -> None:
        if self._averages is None:
            return
        self._averages.put_into(learn.model)
        self._averages, self.holds_average = None, True
        training, learn.training = learn.training, False
        try:
            with preserved_random_state(), preserved_order(learn.data.train):
                renew_batch_norm(learn.model, self._inputs(learn), partial(_forward, learn))
        finally:
            learn.training, learn.x = training, None

    def _inputs(self, learn: Learner) -> Iterator[Any]:
        for batch in islice(learn.data.train, self._n_batches):
            x = tree.to_device(tree.split(batch, learn.data.n_inputs)[0], learn.device)
            yield learn.data.prepare(x, training=True)


def _forward(learn: Learner, x: Any) -> None:
    learn.x = x
    with learn.around("around_forward"):
        learn.forward()
