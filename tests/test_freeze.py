"""Freezing: what is frozen keeps every bit, batch norm's statistics too; and it thaws by stages."""

import copy
import pickle
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from pellucid import Callback, CancelEpoch, CancelFit, Learner, foundations
from pellucid.callbacks import Accumulate, Clip, NonFinite, Unfreeze
from pellucid.errors import SetupError
from pellucid.freezing import freeze, freeze_to, unfreeze
from pellucid.nn import RunningBatchNorm
from pellucid.roles import ByRole, stages


@pytest.fixture
def model() -> nn.Module:
    """Three stages: two with a norm and dropout, and a head."""
    layers = []
    for n_in, norm in ((6, nn.BatchNorm1d(8)), (8, nn.BatchNorm1d(8))):
        layers += [nn.Linear(n_in, 8), norm, nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not value.equal(before[name])}


BODY = {f"{i}.{name}" for i in (0, 1, 4, 5) for name in ("weight", "bias")} | {
    f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")
}
HEAD = {"8.weight", "8.bias"}

OPTIMISERS = {
    "decay and momentum": partial(AdamW, weight_decay=0.5),
    "by role": ByRole(partial(SGD, momentum=0.9, weight_decay=0.5), lr_factors={"bias": 8}),
}


@pytest.mark.parametrize("opt_func", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("others", [[], [Accumulate(2), Clip(norm=1.0), NonFinite("skip")]])
def test_what_is_frozen_keeps_every_bit(opt_func, others, model, data, quiet):
    learn = Learner(model, data, opt_func=opt_func, lr=0.1, callbacks=[quiet, *others])
    learn.fit(1)  # the optimiser holds everything, with momentum
    before = bits(model)
    freeze(*model[:8])
    learn.fit(2)
    assert moved(model, before) == HEAD
    unfreeze(*model[:8])
    learn.fit(1)
    assert moved(model, before) == HEAD | BODY


def test_it_is_the_loop_by_hand_with_the_body_in_evaluation_mode(model, data, quiet):
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    theirs, loader = copy.deepcopy(model), copy.deepcopy(data.train)
    freeze(*model[:8])
    Learner(model, data, opt_func=SGD, lr=0.1, callbacks=[quiet]).fit(2)
    opt = SGD(theirs[8].parameters(), lr=0.1, fused=True)
    for _ in range(2):
        for x, y in loader:
            opt.zero_grad()
            with torch.no_grad():
                x = theirs[:8].eval()(x)
            F.cross_entropy(theirs[8](x), y).backward()
            opt.step()
    assert all(bits(model)[name].equal(value) for name, value in theirs.state_dict().items())


def test_frozen_batch_norm_stays_in_evaluation_and_dropout_does_not(model):
    freeze(model[:8])
    model.train()
    assert [layer.training for layer in model] == [True, False, True, True] * 2 + [True]
    x = torch.randn(5, 6)
    assert not model[:2](x).requires_grad
    unfreeze(model)
    assert all(layer.training for layer in model.train())


def test_norms_may_go_on_training(model, data, quiet):
    freeze(*model[:8], norms=False)
    before = bits(model)
    Learner(model, data, lr=0.1, callbacks=[quiet]).fit(1)
    linear = {f"{i}.{name}" for i in (0, 4) for name in ("weight", "bias")}
    assert moved(model, before) == (BODY | HEAD) - linear


@pytest.mark.parametrize(
    "norm",
    [
        lambda: RunningBatchNorm(4),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    ],
)
def test_whatever_keeps_buffers_is_frozen(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm())
    model.train()(torch.randn(4, 1, 6, 6))
    before = bits(model)
    freeze(model)
    model.train()(torch.randn(4, 1, 6, 6) + 3)
    assert moved(model, before) == set()


def test_a_part_of_a_frozen_module_that_keeps_buffers_follows_train():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(3))
            self.drop = nn.Dropout(0.5)

    model = Masked()
    freeze(model)
    model.eval()
    assert not model.drop.training
    model.train()
    assert (model.training, model.drop.training) == (False, True)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_frozen_model_copies_frozen_and_on_its_own(way, model):
    freeze(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    unfreeze(model)
    assert not twin.train()[1].training and model.train()[1].training
    unfreeze(twin)
    assert twin.train()[1].training


def test_an_optimiser_made_while_frozen_is_refused_after(model, data, quiet):
    freeze(*model[:8])
    learn = Learner(model, data, callbacks=[quiet])
    learn.fit(1)
    unfreeze(model)
    with pytest.raises(SetupError, match="unfrozen or exchanged"):
        learn.fit(1)
    learn.reset_optimizer()
    learn.fit(1)


def test_only_torch_modules_are_frozen(model):
    with pytest.raises(SetupError, match="Only torch modules"):
        freeze(foundations.Linear(2, 2))
    with pytest.raises(SetupError, match="saw: list"):
        freeze([model])


# ── stage by stage ────────────────────────────────────────────────────────────────────────────


def trainable(model: nn.Module) -> list[bool]:
    return [all(p.requires_grad for p in model[i].parameters()) for i in (0, 1, 4, 5, 8)]


def test_the_first_stages_are_frozen(model):
    assert len(stages(model)) == 3
    for n, expected in enumerate(["11111", "00111", "00001", "00000"]):
        freeze_to(model, n)
        assert trainable(model) == [flag == "1" for flag in expected]
    freeze_to(model, -2)
    assert all(trainable(model))


class Diary(Callback):
    """Notes which parts moved in each epoch."""

    def __init__(self):
        self.moved: list[set[str]] = []

    def before_epoch(self, learn: Learner) -> None:
        self._before = bits(learn.model)

    def after_epoch(self, learn: Learner) -> None:
        self.moved.append(moved(learn.model, self._before))


@pytest.mark.parametrize("others", [[], [Accumulate(2)], [NonFinite("skip")]])
@pytest.mark.parametrize("opt_func", OPTIMISERS.values(), ids=OPTIMISERS)
def test_stages_thaw_from_the_head_to_the_input(opt_func, others, model, data, quiet):
    diary = Diary()
    learn = Learner(model, data, opt_func=opt_func, lr=0.1, callbacks=[quiet, diary, *others])
    learn.fit(5, callbacks=[Unfreeze(every=2)])
    second = HEAD | {name for name in BODY if name[0] in "45"}
    assert diary.moved == [HEAD, HEAD, second, second, HEAD | BODY]
    assert all(trainable(model))
    learn.fit(1)
    assert diary.moved[-1] == HEAD | BODY


@pytest.mark.parametrize("fault", [RuntimeError(), KeyboardInterrupt(), CancelFit(), CancelEpoch()])
def test_in_whatever_way_the_fit_ends_all_is_free(fault, model, data, quiet):
    class Raises(Callback):
        def after_loss(self, learn: Learner) -> None:
            raise fault

    learn = Learner(model, data, callbacks=[quiet])
    with suppress(RuntimeError, KeyboardInterrupt):
        learn.fit(1, callbacks=[Unfreeze(), Raises()])
    assert all(trainable(model))
    assert all(layer.training for layer in model.train())


def test_what_it_cannot_do_is_refused(model, data, quiet):
    with pytest.raises(SetupError, match="1 or more"):
        Unfreeze(0)
    learn = Learner(nn.Linear(6, 3), data, callbacks=[quiet, Unfreeze()])
    with pytest.raises(SetupError, match="two stages"):
        learn.fit(1)
    freeze(model[0])
    with pytest.raises(SetupError, match=r"0\.weight, 0\.bias"):
        Learner(model, data, callbacks=[quiet, Unfreeze()]).fit(1)
    assert not model[0].weight.requires_grad
    bare = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    freeze(bare[1])  # which has statistics, and no parameters
    with pytest.raises(SetupError, match="saw: 1\n"):
        Learner(bare, data, callbacks=[quiet, Unfreeze()]).fit(1)
