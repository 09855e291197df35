"""Precision: autocast for the time of a fit, and gradients that neither vanish nor overflow."""

import pickle
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, AdamW, RMSprop

from pellucid import Callback, DataLoaders, Learner
from pellucid.callbacks import Accumulate, Clip, Debug, NonFinite, Precision, Progress
from pellucid.device import choose_precision
from pellucid.errors import NonFiniteLoss, SetupError
from pellucid.optim import params_of


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def batches(n: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 2, 4, 4), torch.randint(3, (8,))) for _ in range(n)]


def learner(*callbacks, opt_func=SGD, train=None, valid=None) -> Learner:
    data = DataLoaders(train or batches(), valid)
    return Learner(
        cnn(), data, F.cross_entropy, opt_func, 0.05,
        callbacks=[Progress("off"), *callbacks], device="cpu",
    )  # fmt: skip


def by_hand(dtype, opt_func, accumulate=1, clip=None) -> nn.Module:
    """The loop of torch's own documentation."""
    model = cnn().to(memory_format=torch.channels_last)
    opt = opt_func(model.parameters(), lr=0.05, fused=True)
    scaler = GradScaler("cpu", enabled=dtype == torch.float16)
    for _ in range(2):
        for i, (x, y) in enumerate(batches()):
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if (i + 1) % accumulate:
                continue
            scaler.unscale_(opt)
            for param in model.parameters():
                param.grad /= accumulate
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return model


def same_bits(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("opt_func", [SGD, AdamW])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_weights_are_those_of_torchs_own_loop(name, dtype, opt_func):
    learn = learner(Precision(name), opt_func=opt_func)
    learn.fit(2)
    assert same_bits(learn.model, by_hand(dtype, opt_func))


def test_clipping_sees_true_gradients():
    learn = learner(Precision("fp16"), Clip(norm=0.1))
    learn.fit(2)
    assert same_bits(learn.model, by_hand(torch.float16, SGD, clip=0.1))


def test_accumulation_sees_a_factor_that_stays():
    learn = learner(Precision("fp16"), Accumulate(3), Clip(norm=0.1))
    learn.fit(2)
    assert same_bits(learn.model, by_hand(torch.float16, SGD, accumulate=3, clip=0.1))


def test_accumulation_overflows_no_sooner():
    """The gradient is that of a mean all along, not of a sum over 8 items, then 24."""
    scales = []
    watch = Debug("after_batch", lambda learn: scales.append(precision._scaler.get_scale()))
    precision = Precision("fp16")
    learner(precision, Accumulate(3), watch).fit(2)
    assert scales == [65536.0] * 12


class Large(Callback):
    """Let a gradient overflow as it would in half precision, in one batch."""

    changes = True
    order = 12

    def after_backward(self, learn):
        if learn.batch_index == 2:
            learn.model[4].weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize("opt_func", [SGD, AdamW, RMSprop])
def test_a_step_that_overflows_is_not_taken_and_the_run_goes_on(opt_func):
    weights, scales = [], []

    class Watch(Callback):
        order = 200

        def after_batch(self, learn):
            if learn.training:
                weights.append(learn.model[4].weight.detach().clone())
                scales.append(learn.callbacks[1]._scaler.get_scale())

    learn = learner(Precision("fp16"), Large(), Watch(), opt_func=opt_func)
    learn.fit(1)
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [True, False, True, True, True]
    assert scales[1] == 2 * scales[2] == 2 * scales[5]
    assert all(param.isfinite().all() for param in learn.model.parameters())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_loss_that_is_not_finite_still_stops_the_run(name):
    train = batches()
    train[3][0][1, 0, 0, 0] = torch.nan
    learn = learner(Precision(name), train=train)
    with pytest.raises(NonFiniteLoss, match="inputs are not finite in item 1 of the batch"):
        learn.fit(1)
    assert all(param.isfinite().all() for param in learn.model.parameters())
    assert "found_inf" not in vars(learn.opt)


def test_nothing_is_left_on_the_optimiser():
    learn = learner(Precision("fp16"), NonFinite("log"))
    learn.fit(1)
    assert not {"found_inf", "grad_scale"} & set(vars(learn.opt))


@pytest.mark.parametrize("opt_func", [AdamW, RMSprop])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_skipping_goes_with_it(dtype, opt_func):
    train = batches()
    train[3][0][1, 0, 0, 0] = torch.nan
    learn = learner(Precision(dtype), NonFinite("skip"), train=train, opt_func=opt_func)
    learn.fit(2)
    assert learn.record.epochs["train/skipped"].tolist() == [1, 1]
    assert learn.step == 2 * (len(train) - 1)
    assert all(value.isfinite().all() for value in learn.model.state_dict().values())


def test_forward_and_loss_are_in_half_and_everything_is_put_back():
    seen = []

    class Watch(Callback):
        def after_predict(self, learn):
            convolution = learn.model[0].weight
            last = convolution.is_contiguous(memory_format=torch.channels_last)
            seen.append((learn.preds.dtype, convolution.dtype, last, learn.training))

    learn = learner(Precision("bf16"), Watch(), valid=batches(1))
    before = learn.device_reason
    learn.fit(1)
    assert set(seen) == {
        (torch.bfloat16, torch.float32, True, True), (torch.bfloat16, torch.float32, True, False)
    }  # fmt: skip
    assert learn.model[0].weight.is_contiguous() and learn.device_reason == before
    assert not torch.is_autocast_enabled("cpu")
    preds = learn.predict(batches(1)[0][0])
    assert torch.equal(preds, preds.bfloat16().float())  # as it was trained
    assert preds.numpy().dtype == np.float32
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, callbacks=[Raises()])
    assert not torch.is_autocast_enabled("cpu") and learn.model[0].weight.is_contiguous()


class Raises(Callback):
    def after_predict(self, learn):
        raise ZeroDivisionError


def test_full_precision_changes_nothing():
    plain, full = learner(), learner(Precision("fp32"))
    for learn in (plain, full):
        learn.fit(1)
    assert same_bits(plain.model, full.model)


def test_auto_takes_what_the_device_gains_from_and_says_why(capsys, monkeypatch):
    for feature in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)
    assert choose_precision(torch.device("cpu"))[0] == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision(torch.device("cpu")) == ("bf16", "this CPU has AVX-512 BF16")
    learn = learner(Precision())
    learn.callbacks = [learn.callbacks[0]]
    learn.fit(1)
    assert "bf16: this CPU has AVX-512 BF16" in capsys.readouterr().out
    assert same_bits(learn.model, by_hand_one_epoch())


def by_hand_one_epoch() -> nn.Module:
    learn = learner(Precision("bf16"))
    learn.fit(1)
    return learn.model


def test_it_pickles_after_a_fit():
    learn = learner(Precision("fp16"))
    learn.fit(1)
    assert repr(pickle.loads(pickle.dumps(learn.callbacks[0]))) == "Precision(dtype='fp16')"
    assert all(param.grad is None for param in params_of(learn.opt))


def test_another_word_is_refused():
    with pytest.raises(SetupError, match='"auto", "bf16", "fp16" or "fp32"'):
        Precision("half")


class Within(Callback):
    """Do something in a batch of the fit."""

    def __init__(self, act):
        self.act = act

    def after_batch(self, learn):
        if learn.training and learn.batch_index == 2:
            self.act(learn)


@pytest.mark.parametrize("opt_func", [partial(SGD, momentum=0.9), AdamW])
@pytest.mark.parametrize("fits", [("bf16", None), (None, "bf16"), ("fp16", None, "bf16")])
def test_the_optimisers_state_is_laid_out_as_the_weights_are(fits, opt_func):
    """A fused step goes by places in memory, torch's loop over parameters does not."""

    def trained(**form):
        learn = learner(opt_func=partial(opt_func, **form))
        learn.model[1] = nn.Identity()  # batch norm leaves a bias no gradient, AdamW makes it one
        for name in fits:
            learn.fit(1, callbacks=[Precision(name)] if name else [])
        return learn.model

    ours, theirs = trained(fused=True).parameters(), trained(foreach=True).parameters()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_a_fit_within_leaves_the_layout_alone_and_the_end_gives_back_the_users():
    strides = []

    def fit(learn):
        with learn.untouched():
            learn.fit(1)
        strides.append(learn.model[0].weight.stride())

    learn = learner(Precision("bf16"), opt_func=AdamW)
    learn.fit(1, callbacks=[Within(fit)])
    plain = cnn()[0].weight
    assert strides == [plain.to(memory_format=torch.channels_last).stride()]
    assert learn.model[0].weight.stride() == plain.stride()
    learn.model.to(memory_format=torch.channels_last)
    learn.reset_optimizer()
    learn.fit(1)
    assert learn.model[0].weight.stride() == strides[0]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_loss_in_half_precision_will_do(name, n):
    def loss_func(preds, y):
        return preds.abs().mean()  # autocast leaves it in the precision of preds

    dtypes = []
    watch = Within(lambda learn: dtypes.append(learn.loss.dtype))
    weighed = Accumulate(n, weigh=lambda learn: (learn.y >= 0).sum())
    learn = learner(Precision(name), watch, weighed)
    learn.loss_func = loss_func
    learn.fit(3)
    assert set(dtypes) == {torch.bfloat16 if name == "bf16" else torch.float16}
    assert learn.record["train/loss"][-1] < learn.record["train/loss"][0]


@pytest.mark.parametrize("callback", [Precision("bf16"), Precision(), Clip(1.0), Clip(value=1.0)])
def test_what_lbfgs_would_pass_by_is_refused(callback):
    with pytest.raises(SetupError, match="LBFGS"):
        learner(callback, opt_func=LBFGS).fit(1)
    learner(Precision("fp32"), opt_func=LBFGS).fit(1)
