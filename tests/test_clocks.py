"""Clocks: waiting, computing and the start are told apart; time is a number that the test moves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pellucid import Callback, CancelBatch, CancelEpoch, DataLoaders, Learner
from pellucid.callbacks import Clocks, Progress, clocks


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(clocks, "perf_counter", time)
    return time


class Slow(Callback):
    def __init__(self, time: Time, seconds: float, first: float):
        self.time, self.seconds, self.first = time, seconds, first

    def after_loss(self, learn):
        self.time.now += self.seconds
        if learn.training and not learn.epoch and not learn.batch_index:
            self.time.now += self.first


def fitted(time, waits: float, computes: float, *callbacks, epochs: int = 2, metrics=()) -> Clocks:
    class Loads:
        def __len__(self):
            return 5

        def __iter__(self):
            for _ in range(5):
                time.now += waits
                yield torch.randn(4, 6), torch.randint(3, (4,))

    watch = Clocks()
    learn = Learner(
        nn.Linear(6, 3), DataLoaders(Loads(), Loads()), F.cross_entropy, metrics=metrics,
        callbacks=[Progress("off"), watch, Slow(time, computes, 7.0), *callbacks], device="cpu",
    )  # fmt: skip
    learn.fit(epochs)
    return watch


def test_the_start_is_a_clock_of_its_own(time):
    watch = fitted(time, 1.0, 3.0)
    assert watch.cold == 1 + 3 + 7
    assert watch.waiting == 9 and watch.warm == 9 * 4


@pytest.mark.parametrize(
    ("waits", "computes", "found"),
    [
        (1.0, 3.0, "data-bound: 25% "),
        (1.0, 9.0, "compute-bound: 10% "),
        (0.0, 1.0, "compute-bound: 0% "),
    ],
)
def test_the_verdict_comes_after_the_first_epoch(time, capsys, waits, computes, found):
    fitted(time, waits, computes)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "bound" in line]
    assert line.startswith(found) and f"the first batch took {waits + computes + 7:.2f} s" in line


def test_what_is_done_with_a_batch_after_it_is_no_waiting(time):
    class Measures:
        def __call__(self, preds, y):
            time.now += 2.0
            return torch.zeros(())

    class Reads(Callback):
        order = 500

        def after_batch(self, learn):
            time.now += 4.0

    watch = fitted(time, 1.0, 3.0, Reads(), metrics=[Measures()])
    assert watch.waiting == 9 and watch.warm == 9 * (1 + 3 + 2 + 4)


def test_a_cancelled_batch_counts_too(time):
    class Cancels(Callback):
        changes = True

        def before_batch(self, learn):
            if learn.batch_index == 2:
                raise CancelBatch

    watch = fitted(time, 1.0, 3.0, Cancels())
    assert watch.waiting == 9 and watch.warm == 7 * 4 + 2 * 1


def test_a_pass_that_is_left_counts_until_then(time):
    class Leaves(Callback):
        changes = True

        def __init__(self, moment):
            setattr(self, moment, self._leave)

        def _leave(self, learn):
            if learn.training and learn.batch_index == 1:
                raise CancelEpoch

    for moment in ("after_batch", "after_loss"):
        watch = fitted(time, 1.0, 3.0, Leaves(moment))
        assert watch.waiting == 3


def test_what_is_done_before_a_pass_is_no_waiting(time):
    class Prepares(Callback):
        order = 500

        def before_train(self, learn):
            time.now += 50.0

    assert fitted(time, 1.0, 3.0, Prepares()).waiting == 9


def test_too_few_batches_are_said_to_be(time, capsys):
    watch = Clocks()
    assert watch.verdict == "too few batches to tell what decides the pace"
    watch = fitted(time, 1.0, 3.0, epochs=0)
    assert "bound" not in capsys.readouterr().out and watch.cold is None


def test_in_many_processes_only_the_first_speaks(time, capsys, monkeypatch):
    monkeypatch.setattr(clocks, "is_first", lambda: False)
    fitted(time, 0.1, 0.1)
    assert not capsys.readouterr().out
