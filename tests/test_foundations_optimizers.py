"""foundations: optimisers beside torch's, LAMB beside its paper, steppers and groups."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.errors import SetupError, UnknownName
from pellucid.foundations import (
    LAMB,
    SGD,
    Adam,
    AdamW,
    Linear,
    Optimizer,
    Parameter,
    Sequential,
    add_decay,
    cross_entropy,
    moving_average,
)

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
PLAIN = {"foreach": False, "fused": False}


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (5,), ())]


def run(make, steps=30, dtype=torch.float32, change=lambda step, group: None):
    """Take steps with the same random gradients; the second parameter misses every third."""
    params = parameters(dtype)
    opt = make(params)
    for step in range(steps):
        change(step, opt.param_groups[0])
        for number, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=dtype)
            if number == 1 and step % 3 == 1:
                p.grad = None
        opt.step()
    return [p.detach() for p in params]


SGDS = [{}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}]


@both_precisions
@pytest.mark.parametrize("hypers", SGDS)
def test_sgd_equals_torchs_to_the_bit(hypers, dtype):
    ours = run(lambda params: SGD(params, lr=0.1, **hypers), dtype=dtype)
    theirs = run(lambda params: torch.optim.SGD(params, lr=0.1, **hypers, **PLAIN), dtype=dtype)
    assert all(map(torch.equal, ours, theirs))


ADAMS = [
    (Adam, torch.optim.Adam, {}),
    (Adam, torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"weight_decay": 0.5, "betas": (0.5, 0.99), "eps": 1e-5}),
]


@both_precisions
@pytest.mark.parametrize(("ours", "theirs", "hypers"), ADAMS)
def test_adam_and_adamw_equal_torchs(ours, theirs, hypers, dtype):
    results = [run(lambda params, kind=kind: kind(params, lr=0.02, **hypers), dtype=dtype)
               for kind in (ours, theirs)]  # fmt: skip
    tolerance = dict.fromkeys(["rtol", "atol"], 1e-12 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_defaults_are_torchs(kind):
    ours, theirs = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}[kind], getattr(torch.optim, kind)
    [group], [torchs] = (make(parameters(), lr=0.1).param_groups for make in (ours, theirs))
    assert {name: torchs[name] for name in group if name != "params"} == {
        name: value for name, value in group.items() if name != "params"
    }


@both_precisions
def test_lamb_is_the_papers_algorithm(dtype):
    lr, (beta1, beta2), eps, decay = 0.02, (0.9, 0.99), 1e-6, 0.1

    def by_the_paper(params):
        # You et al. 2020, algorithm 2 with φ(z) = z, one layer after the other
        memory = [{"m": 0.0, "v": 0.0, "t": 0} for _ in params]

        class Paper:
            param_groups = ({},)

            @staticmethod
            def step():
                for x, kept in zip(params, memory, strict=True):
                    if x.grad is None:
                        continue
                    g = x.grad
                    kept["t"] += 1
                    kept["m"] = beta1 * kept["m"] + (1 - beta1) * g
                    kept["v"] = beta2 * kept["v"] + (1 - beta2) * g * g
                    m = kept["m"] / (1 - beta1 ** kept["t"])
                    v = kept["v"] / (1 - beta2 ** kept["t"])
                    u = m / (v**0.5 + eps) + decay * x.detach()
                    ratio = x.detach().pow(2).sum() ** 0.5 / u.pow(2).sum() ** 0.5
                    x.data = x.data - lr * ratio * u

        return Paper()

    ours = run(lambda p: LAMB(p, lr, (beta1, beta2), eps, decay), dtype=dtype)
    tolerance = dict.fromkeys(["rtol", "atol"], 1e-12 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(ours, run(by_the_paper, dtype=dtype), **tolerance)


def test_lamb_moves_each_parameter_by_the_same_share_of_its_size():
    params = [Parameter(torch.randn(50) * scale) for scale in (0.01, 1.0, 100.0)]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(50)
    LAMB(params, lr=0.01).step()
    for p, old in zip(params, before, strict=True):
        assert ((p - old).norm() / old.norm()).item() == pytest.approx(0.01, rel=1e-4)


def test_lamb_leaves_zero_weights_and_zero_gradients_finite():
    zero, still = Parameter(torch.zeros(3)), Parameter(torch.ones(3))
    zero.grad, still.grad = torch.ones(3), torch.zeros(3)
    LAMB([zero, still], lr=0.1, weight_decay=0).step()
    torch.testing.assert_close(zero.detach(), torch.full((3,), -0.1))
    assert torch.equal(still.detach(), torch.ones(3))


# ── steppers ──────────────────────────────────────────────────────────────────────────────────


def test_decay_alone_shrinks_a_weight():
    p = Parameter(torch.tensor([2.0]))
    p.grad = torch.zeros(1)
    SGD([p], lr=1, weight_decay=0.1).step()
    assert p.item() == pytest.approx(0.9 * 2)


def test_coupled_and_decoupled_decay_differ_in_what_adam_does_to_them():
    shrunk = []
    for kind in (Adam, AdamW):
        p = Parameter(torch.tensor([2.0]))
        p.grad = torch.zeros(1)
        kind([p], lr=0.01, weight_decay=0.1).step()
        shrunk.append(2 - p.item())
    # coupled: the decay is divided by its own size, 1; decoupled: lr · decay · w
    assert shrunk == pytest.approx([0.01, 0.002], rel=1e-3)


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=20), beta=st.floats(0.1, 0.99))
@settings(deadline=None, max_examples=60)
def test_a_moving_average_is_debiased_to_a_true_weighted_mean(values, beta):
    state = {}
    for n, value in enumerate(values, start=1):
        average = moving_average(state, "mean", torch.tensor(value).double(), beta, n)
    weights = [beta ** (len(values) - n) for n in range(1, len(values) + 1)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert average.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_an_optimiser_is_any_list_of_steppers():
    def only_signs(direction, param, state, group):
        state["seen"] = state.get("seen", 0) + 1
        return direction.sign() * group["size"]

    p = Parameter(torch.tensor([3.0, -3.0]))
    opt = Optimizer([p], [only_signs, add_decay], {"lr": 0.5, "size": 2.0, "weight_decay": 0.1})
    p.grad = torch.tensor([0.001, 7.0])
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([3 - 0.5 * 2.3, -3 - 0.5 * 1.7]))
    assert opt.state[p] == {"seen": 1}


# ── groups, gradients, schedules ──────────────────────────────────────────────────────────────


def test_hyper_parameters_may_be_scheduled_and_differ_between_groups():
    def warm(step, group):
        group["lr"], group["momentum"] = 0.01 * step, 0.9 - 0.03 * step  # ends at momentum 0

    def make(kind, **form):
        return lambda params: kind(
            [{"params": params[:1], "momentum": 0.5}, {"params": params[1:], "lr": 0.3}],
            lr=0.1, momentum=0.9, **form,
        )  # fmt: skip

    ours = run(make(SGD), change=warm, steps=31)
    assert all(map(torch.equal, ours, run(make(torch.optim.SGD, **PLAIN), change=warm, steps=31)))
    opt = make(SGD)(parameters())
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.3]
    assert repr(opt) == (
        "SGD(lr=0.1, momentum=0.5, weight_decay=0.0; lr=0.3, momentum=0.9, weight_decay=0.0)"
    )


def test_zero_grad_drops_the_gradients_of_its_own_parameters_alone():
    body, head = Linear(3, 3), Linear(3, 2)
    opt = SGD(head.parameters(), lr=0.1)
    Sequential(body, head)(torch.ones(1, 3)).sum().backward()
    opt.zero_grad()
    assert all(p.grad is None for p in head.parameters())
    assert all(p.grad is not None for p in body.parameters())


def test_micro_batches_make_one_step_of_the_whole_batch():
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    one = Linear(4, 3)
    two = copy.deepcopy(one)
    opts = [SGD(layer.parameters(), lr=0.5) for layer in (one, two)]
    cross_entropy(one(x), y).backward()
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        (cross_entropy(two(x[part]), y[part]) / 3).backward()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_a_step_is_no_part_of_the_graph_and_keeps_the_gradient():
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = SGD([p], lr=0.1, momentum=0.5)
    opt.step()
    assert p.is_leaf and p.requires_grad and torch.equal(p.grad, torch.ones(2))
    p.grad.zero_()  # the velocity is not the gradient itself
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.1 - 0.05))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("kind", [SGD, AdamW, LAMB])
def test_a_model_and_its_optimiser_copy_together_and_go_on_alike(kind, way):
    layer = Linear(3, 2)
    pair = layer, kind(layer.parameters(), lr=0.1)

    def go_on(layer, opt):
        for _ in range(3):
            opt.zero_grad()
            layer(torch.arange(6.0).view(2, 3)).square().sum().backward()
            opt.step()

    go_on(*pair)
    twins = way(pair)
    go_on(*pair)
    assert not torch.equal(pair[0].weight, twins[0].weight)
    go_on(*twins)
    assert torch.equal(pair[0].weight, twins[0].weight)


def test_what_cannot_be_optimised_is_refused():
    p = Parameter(torch.ones(2))
    with pytest.raises(SetupError, match="none at all"):
        SGD([], lr=0.1)
    with pytest.raises(SetupError, match="saw: Tensor"):
        SGD([p * 2], lr=0.1)
    with pytest.raises(SetupError, match="saw: Linear"):
        SGD([Linear(1, 1)], lr=0.1)
    with pytest.raises(SetupError, match="given twice"):
        SGD([{"params": [p]}, {"params": [p]}], lr=0.1)
    with pytest.raises(UnknownName, match=r"no hyper-parameter 'momentun'.\n.*mean 'momentum'"):
        SGD([{"params": [p], "momentun": 0.9}], lr=0.1)
