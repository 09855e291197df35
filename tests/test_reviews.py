"""What reviewers found broken once, so that it stays mended."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from pellucid import Callback, CancelFit, DataLoaders, Learner, Record
from pellucid.callbacks import Best, OneCycle, Progress
from pellucid.data import digits
from pellucid.errors import CallbackError, SetupError

QUIET = Progress("off")


def batches(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(n)]


def learner(model: nn.Module | None = None, **settings) -> Learner:
    data = DataLoaders(batches(), batches(2), classes=3)
    model = model or nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return Learner(model, data, **{"opt_func": SGD, "lr": 0.1, **settings})


def test_a_metric_that_fails_leaves_all_columns_of_one_length(tmp_path):
    calls = []

    def bad(preds, targets):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return preds.mean()

    learn = learner(metrics=[bad])
    with pytest.raises(RuntimeError, match="broken"):
        learn.fit(1, callbacks=[QUIET])
    learn.fit(1, callbacks=[QUIET])
    record = Record.load(learn.record.save(tmp_path / "record.json"))
    assert len(record["train/loss"]) == len(record["train/bad"]) == 2 + 4


@pytest.mark.parametrize("exchange", [False, True])
def test_a_layer_that_became_trainable_is_not_silently_left_out(exchange):
    learn = learner()
    if not exchange:
        learn.model[0].requires_grad_(False)
    learn.fit(1, callbacks=[QUIET])
    if exchange:
        learn.model[0] = nn.Linear(6, 5)
    learn.model[0].requires_grad_(True)
    with pytest.raises(SetupError, match=r"0\.weight, 0\.bias"):
        learn.fit(1, callbacks=[QUIET])
    learn.reset_optimizer()
    before = learn.model[0].weight.clone()
    learn.fit(1, callbacks=[QUIET])
    assert not torch.equal(before, learn.model[0].weight)


def test_a_learner_with_a_schedule_can_look_before_its_first_fit():
    learn = learner(callbacks=[OneCycle(0.1)])
    assert learn.validate()["loss"] > 0
    assert learn.predict(torch.randn(5, 6)).shape == (5, 3)


def test_an_embedding_with_sparse_gradients_trains():
    data = DataLoaders([(torch.randint(9, (8, 2)), torch.randint(3, (8,)))], classes=3)
    model = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 3))
    Learner(model, data, opt_func=SGD, lr=0.1).fit(1, callbacks=[QUIET])


def test_the_epoch_that_ends_a_fit_is_in_the_table(capsys):
    class Stop(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1:
                raise CancelFit

    learner().fit(5, callbacks=[Stop(), Progress("lines")])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == ["1", "2"]


def test_untouched_also_undoes_what_happens_to_callbacks_and_transforms():
    class Count(Callback):
        n = 0

        def after_batch(self, learn):
            self.n += 1

    count = Count()
    learn = learner(callbacks=[count])
    with learn.untouched():
        learn.fit(1, callbacks=[QUIET])
        learn.callbacks.append(Best())
        learn.data.transforms.append(nn.ReLU())
    assert count.n == 0 and learn.callbacks == [count] and learn.data.transforms == []


def test_the_learning_rate_finder_works_in_validation_and_for_losses_below_zero():
    class Search(Callback):
        def after_validate(self, learn):
            self.found = learn.find_lr(steps=20)

    search = Search()
    learner(callbacks=[search]).fit(1, callbacks=[QUIET])
    assert len(search.found.lrs) >= 2
    below_zero = learner(loss_func=lambda preds, y: nn.functional.cross_entropy(preds, y) - 100)
    assert len(below_zero.find_lr().lrs) > 20


def test_what_counts_as_better_can_be_said():
    learn = learner(metrics=[])
    best = Best("valid/loss", lower_is_better=False)
    record = learn.fit(3, callbacks=[QUIET, best])
    assert best.row == record.epochs["valid/loss"].argmax()


def test_a_loss_with_class_weights_goes_to_the_device():
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert learner(loss_func=loss, device="cpu").loss_func.weight.device.type == "cpu"


def test_a_callback_given_twice_is_refused():
    with pytest.raises(CallbackError, match="twice"):
        learner(callbacks=[QUIET]).fit(1, callbacks=[QUIET])


@pytest.mark.parametrize("give", [lambda x, y: DataLoaders.from_arrays(x, y), DataLoaders])
def test_arrays_where_pairs_or_loaders_belong_are_refused_in_few_words(give):
    with pytest.raises(SetupError, match="from_arrays") as error:
        give(torch.randn(1000, 6), torch.randint(3, (1000,)))
    assert len(str(error.value)) < 400


def test_a_negative_rate_is_no_rate_for_one_cycle_either():
    with pytest.raises(SetupError, match="learning rate"):
        learner().fit_one_cycle(1, lr=-1.0)


def test_rows_of_a_record_can_be_asked_for_by_number():
    record = learner().fit(2, callbacks=[QUIET])
    assert record.epochs[-1]["valid/loss"] == record.epochs["valid/loss"][-1]
    with pytest.raises(SetupError, match="column"):
        record[0]


def test_no_rate_is_suggested_where_the_loss_does_not_fall():
    torch.manual_seed(0)
    data = digits()
    data.train.dataset.arrays = (
        data.train.dataset.arrays[0],
        torch.randint(10, (len(data.train.dataset),)),
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert Learner(model, data, opt_func=SGD).find_lr(end=1).suggestion is None
