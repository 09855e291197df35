"""Muon: torch's on matrices, and on flattened convolutions; one optimiser beside others."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_law_no_hidden_reads import readings
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import pellucid.muon
from pellucid import DataLoaders, Learner
from pellucid.callbacks import Clip, NonFinite, OneCycle, Progress
from pellucid.errors import SetupError
from pellucid.joint import Joint
from pellucid.muon import Muon, orthogonalized
from pellucid.optim import guard, guards, params_of
from pellucid.roles import ByRole


@pytest.fixture
def in_bf16(monkeypatch):
    """Compute in what torch's Muon always computes in."""
    monkeypatch.setattr(pellucid.muon, "choose_precision", lambda device: ("bf16", "said so"))


def stepped(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int = 6) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        for param in params:
            param.grad = torch.randn(len(param), param[0].numel()).view_as(param)
        optimizer.step()


def params(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


MATRICES = [(4, 9), (16, 16), (9, 4), (16, 16), (1, 5), (5, 1)]


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("ns_steps", [3, 5])
def test_on_matrices_it_is_torchs_to_rounding(adjust, nesterov, ns_steps, in_bf16):
    ours, theirs = params(MATRICES), params(MATRICES)
    same = {"lr": 0.02, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust}
    stepped(Muon(ours, **same), ours)
    stepped(torch.optim.Muon(theirs, **same), theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-6)


def test_in_float32_it_is_torchs_to_the_rounding_of_bf16():
    ours, theirs = params(MATRICES), params(MATRICES)
    stepped(Muon(ours, lr=0.02, adjust_lr_fn="original"), ours)
    stepped(torch.optim.Muon(theirs, lr=0.02), theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0.02 * 6 * 0.03)


def test_a_convolution_is_the_matrix_of_its_filters(in_bf16):
    shapes = [(8, 3, 3, 3), (8, 4, 5), (6, 2, 1, 1)]
    ours, flat = params(shapes), params(shapes)
    flat = [nn.Parameter(param.detach().flatten(1)) for param in flat]
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    stepped(Muon(ours, lr=0.1, adjust_lr_fn="original"), ours)
    stepped(torch.optim.Muon(flat, lr=0.1), flat)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for our, matrix in zip(ours, flat, strict=True):
        torch.testing.assert_close(our.flatten(1), matrix, rtol=0, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.floats(1e-3, 1e3))
def test_singular_values_come_near_one(rows, columns, n, scale):
    torch.manual_seed(rows * columns)
    # a well-conditioned matrix: Newton-Schulz needs more steps for tiny singular values
    u, _, v = torch.linalg.svd(torch.randn(n, rows, columns), full_matrices=False)
    k = min(rows, columns)
    matrices = u @ torch.diag(torch.linspace(0.3, 1, k)) @ v * scale
    found = orthogonalized(matrices).float()
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.25
    assert torch.equal(orthogonalized(matrices[0]), orthogonalized(matrices[:1])[0])


def test_the_airbench_recipe_is_what_its_loop_does(in_bf16):
    """Filter norms are reset before the step, no factor, three iterations; momentum as a sum."""
    shape, lr, momentum = (8, 4, 3, 3), 0.24, 0.6
    [ours], [theirs] = params([shape]), params([shape])
    optimizer = Muon([ours], lr, 0.0, momentum, ns_steps=3, adjust_lr_fn="none", reset_norm=True)
    stepped(optimizer, [ours])
    buffer, w = torch.zeros(shape), theirs.detach().clone()
    for step in range(6):
        torch.manual_seed(step)
        g = torch.randn(8, 36).view(shape)
        buffer = buffer * momentum + g
        direction = torch.optim._muon._zeropower_via_newtonschulz(
            (g + momentum * buffer).flatten(1), (3.4445, -4.7750, 2.0315), 3, 1e-7
        )
        w = w * len(w) ** 0.5 / w.norm() - lr * direction.view(shape)
    torch.testing.assert_close(ours.detach(), w, rtol=0, atol=0.02)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(SetupError, match="two dimensions or more"):
        Muon([torch.zeros(3, requires_grad=True)])
    with pytest.raises(SetupError, match="adjust_lr_fn"):
        Muon(params([(2, 2)]), adjust_lr_fn="orignal")
    with pytest.raises(SetupError, match="momentum"):
        Muon(params([(2, 2)]), momentum=1.0)
    with pytest.raises(SetupError, match="learning rate"):
        Muon(params([(2, 2)]), lr=-1)
    with pytest.raises(SetupError, match="weight_decay -1"):
        Muon(params([(2, 2)]), weight_decay=-1)
    with pytest.raises(SetupError, match=r"ns_steps 2\.5"):
        Muon(params([(2, 2)]), ns_steps=2.5)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(params([(2, 2, 3)]))  # the reason for our own


@pytest.mark.parametrize("reset_norm", [False, True])
def test_a_step_switched_off_moves_nothing_even_with_nan(reset_norm):
    own = params([(4, 3, 3), (4, 4)])
    optimizer = Muon(own, lr=0.1, reset_norm=reset_norm)
    twin_params = params([(4, 3, 3), (4, 4)])
    twin = Muon(twin_params, lr=0.1, reset_norm=reset_norm)
    stepped(optimizer, own, 2)
    stepped(twin, twin_params, 2)
    for param in own:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.found_inf = torch.ones(())
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert repr(optimizer.state_dict()) == repr(before)
    optimizer.found_inf = torch.zeros(())
    stepped(optimizer, own, 3)
    stepped(twin, twin_params, 3)
    for a, b in zip(own, twin_params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_step_that_can_be_switched_off_reads_nothing_back():
    optimizer = Muon(params([(4, 3, 3), (4, 4), (4, 4)]), lr=0.1)
    with guard(optimizer, torch.zeros(())):
        assert not readings(stepped, optimizer, params_of(optimizer), 2)


# ── with a learner ────────────────────────────────────────────────────────────────────────────


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def images() -> DataLoaders:
    x = torch.randn(40, 1, 6, 6)
    y = x[:, 0, 2:4, 2:4].mean((1, 2)).gt(0).long()
    return DataLoaders.from_arrays((x, y), (x, y), batch_size=8, classes=3)


WITH_MUON = ByRole(
    partial(SGD, momentum=0.9),
    {"matrix": Muon, "conv": partial(Muon, momentum=0.6, ns_steps=3)},
    lr_factors={"matrix": 0.5, "conv": 0.5},
)


def test_muon_beside_sgd_is_one_optimiser(images):
    model, theirs = network(), network()
    quiet = Progress("off")
    learn = Learner(model, images, opt_func=WITH_MUON, lr=0.05, callbacks=[quiet], device="cpu")
    learn.fit(2)
    assert isinstance(learn.opt, Joint) and guards(learn.opt)
    assert [type(part) for part in learn.opt.parts] == [Muon, Muon, SGD]
    named = dict(theirs.named_parameters())
    matrix, conv = named.pop("4.weight"), named.pop("0.weight")
    vectors = [param for param in named.values() if param.ndim == 1]
    by_hand = [
        Muon([matrix], 0.025), Muon([conv], 0.025, momentum=0.6, ns_steps=3),
        SGD([{"params": vectors}, {"params": [named["6.weight"]]}], 0.05, 0.9, fused=True),
    ]  # fmt: skip
    theirs.train()
    for param in theirs.parameters():  # as the guard begins
        if param is not matrix and param is not conv:
            by_hand[2].state[param]["momentum_buffer"] = torch.zeros_like(param)
    images.train.epoch = 0
    for _ in range(2):
        for x, y in images.train:
            theirs.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            for each in by_hand:
                each.step()
    for ours, its in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-6)


def test_schedules_clipping_and_finding_rates_act_on_all_of_it(images):
    learn = Learner(network(), images, opt_func=WITH_MUON, callbacks=[Progress("off")])
    learn.find_lr(steps=4)
    record = learn.fit(3, callbacks=[OneCycle(0.1), Clip(norm=1.0)])
    rates, momenta = ([n for n in record.batches if n.startswith(h)] for h in ("lr/", "momentum/"))
    assert "lr/conv" in rates and "momentum/bias" in momenta
    for names in (rates, momenta):
        shapes = [record[name] / record[name].max() for name in names]
        assert all(shape == pytest.approx(shapes[0], rel=1e-5) for shape in shapes)
    assert record.epochs["valid/loss"][-1] < record.epochs["valid/loss"][0]
    assert "Muon" in repr(learn.opt_func)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_learner_with_muon_copies_and_the_copy_trains_alike(way, images):
    opt_func = ByRole(AdamW, {"matrix": Muon, "conv": Muon})
    learn = Learner(network(), images, opt_func=opt_func, callbacks=[Progress("off")])
    learn.fit(1)
    twin = copy.deepcopy(learn) if way == "deepcopy" else pickle.loads(pickle.dumps(learn))
    assert guards(twin.opt)
    learn.fit(1)
    twin.fit(1)
    ours, its = learn.model.state_dict(), twin.model.state_dict()
    assert all(ours[name].equal(its[name]) for name in ours)


def test_nan_in_a_batch_is_a_step_that_muon_does_not_take(images):
    learn = Learner(network(), images, opt_func=WITH_MUON, lr=0.05, callbacks=[Progress("off")])
    seen = []

    def spoilt(x):
        seen.append(x)
        return x * float("nan") if len(seen) == 3 else x

    images.transforms.append(spoilt)
    learn.fit(1, callbacks=[NonFinite("skip")])
    assert all(tensor.isfinite().all() for tensor in learn.model.state_dict().values())
    state = [value for values in learn.opt.state.values() for value in values.values()]
    assert all(value.isfinite().all() for value in state if isinstance(value, Tensor))
