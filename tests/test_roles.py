"""Roles: every parameter in one of them; and optimisers made of them are what one would write."""

import copy
import pickle
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from pellucid import DataLoaders, Learner, foundations
from pellucid.callbacks import Debug, OneCycle, Schedule
from pellucid.errors import SetupError, UnknownName
from pellucid.joint import Joint
from pellucid.muon import Muon
from pellucid.nn import RunningBatchNorm
from pellucid.optim import build_optimizer, guards
from pellucid.roles import ROLES, ByRole, roles, stages
from pellucid.schedules import constant
from pellucid.vision import mlp, simple_cnn, small_resnet, xresnet18


class Tied(nn.Module):
    """A language model whose head is its embedding, with learnt positions."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.gate = nn.Parameter(torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.tokens.weight


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lstm, self.out = nn.Embedding(7, 4), nn.LSTM(4, 6, 2), nn.Linear(6, 3)


MODELS = {
    "mlp": lambda: mlp(6, 3),
    "simple_cnn": lambda: simple_cnn(1, 3, (4, 8), norm=nn.BatchNorm2d),
    "running": lambda: simple_cnn(1, 3, (4, 8), norm=RunningBatchNorm),
    "small_resnet": lambda: small_resnet(1, 3, (4, 8)),
    "xresnet18": lambda: xresnet18(3, 5, (8, 8, 8, 8)),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ),
    "tied": Tied,
    "reader": Reader,
    "linear": lambda: nn.Linear(6, 3),
    "shared": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 3, nn.PReLU(), nn.Linear(4, 2)),
    "image norm": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.LayerNorm([4, 5, 5])),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "foundations": lambda: foundations.Sequential(
        foundations.Linear(4, 3), foundations.ReLU(), foundations.Linear(3, 2)
    ),
    "none": nn.ReLU,
}


def names(model: nn.Module) -> dict[str, list[str]]:
    return {role: [name for name, _ in named] for role, named in roles(model).items() if named}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_role(name):
    model = MODELS[name]()
    found = [pair for named in roles(model).values() for pair in named]
    assert tuple(roles(model)) == ROLES
    assert {id(param) for _, param in found} == {id(param) for param in model.parameters()}
    assert len(found) == len(list(model.parameters()))
    assert dict(found).keys() == dict(model.named_parameters()).keys()


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(2, 3, 3),
    "norm": lambda: nn.GroupNorm(2, 4),
    "gru": lambda: nn.GRU(3, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "embedding": lambda: nn.EmbeddingBag(5, 3),
    "slope": nn.PReLU,
    "wrapped": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), max_size=6), st.booleans())
def test_it_holds_for_anything_stacked_and_shared(kinds, shared):
    layers = [LAYERS[kind]() for kind in kinds]
    model = nn.Sequential(*layers, *layers[:1] * shared)
    found = [pair for named in roles(model).values() for pair in named]
    assert sorted(name for name, _ in found) == sorted(dict(model.named_parameters()))
    assert len({id(param) for _, param in found}) == len(found)
    assert len(roles(model)["head"]) <= 1
    for role in ("matrix", "conv"):
        assert all(param.ndim > 1 for _, param in roles(model)[role])


def test_what_is_what():
    assert names(mlp(6, 3)) == {
        "matrix": ["1.weight"], "bias": ["1.bias", "3.bias"], "head": ["3.weight"]
    }  # fmt: skip
    found = names(Tied())
    assert found["embedding"] == ["positions", "tokens.weight"]
    assert found["norm"] == ["gate", "body.norm1.weight", "body.norm2.weight"]
    assert found["matrix"][0] == "body.self_attn.in_proj_weight"
    assert "head" not in found
    found = names(Reader())
    assert (found["embedding"], found["head"]) == (["emb.weight"], ["out.weight"])
    assert len(found["matrix"]) == len(found["bias"]) - 1 == 4
    assert "head" not in names(MODELS["transformer"]())  # it ends in a norm
    assert names(MODELS["image norm"]())["norm"] == ["1.weight"]  # of three dimensions
    assert names(MODELS["xresnet18"]())["head"] == ["9.weight"]
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.Flatten())
    assert names(conv)["head"] == ["2.weight"]


def test_the_head_can_be_named():
    assert [name for name, _ in roles(mlp(6, 3), head="1")["head"]] == ["1.weight"]
    with pytest.raises(UnknownName, match="no layer 'fc' with a weight"):
        roles(mlp(6, 3), head="fc")


def test_stages_go_from_the_input_to_the_head():
    model = small_resnet(1, 3, (4, 8))
    assert [len(stage) for stage in stages(model)] == [2, 1, 1, 1]
    assert stages(model)[0] == [model[0], model[1]]
    assert stages(nn.Sequential(model)) == stages(model)
    transformer = MODELS["transformer"]()
    assert stages(transformer) == [[layer] for layer in transformer.layers]
    linear_model = nn.Linear(2, 2)
    assert stages(linear_model) == [[linear_model]]


# ── optimisers ────────────────────────────────────────────────────────────────────────────────


def groups_of(optimizer: Optimizer) -> list[tuple[str, float, int]]:
    return [(g["role"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]


def train(model: nn.Module, opt: Optimizer, steps: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(3)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
        opt.step()
    return [param.detach().clone() for param in model.parameters()]


def assert_same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, ours, theirs))


def test_norm_and_bias_do_not_decay_and_the_rest_is_as_by_hand(model):
    theirs = copy.deepcopy(model)
    ours = build_optimizer(ByRole(partial(AdamW, weight_decay=0.3)), model, 0.01)
    assert type(ours) is AdamW
    assert groups_of(ours) == [("matrix", 0.3, 1), ("norm", 0, 1), ("bias", 0, 3), ("head", 0.3, 1)]
    assert all(group["fused"] for group in ours.param_groups)
    vectors = [param for param in theirs.parameters() if param.ndim == 1]
    rest = [param for param in theirs.parameters() if param.ndim > 1]
    groups = [{"params": rest}, {"params": vectors, "weight_decay": 0.0}]
    by_hand = AdamW(groups, lr=0.01, weight_decay=0.3, fused=True)
    assert_same_bits(train(model, ours), train(theirs, by_hand))


@pytest.mark.parametrize("opt_func, form", [(SGD, "fused"), (RMSprop, "foreach")])
def test_groups_are_made_in_the_fastest_form_there_is(opt_func, form, model):
    ours = build_optimizer(ByRole(opt_func), model, 0.01)
    assert all(group[form] for group in ours.param_groups)
    plain = build_optimizer(ByRole(partial(opt_func, foreach=False)), model, 0.01)
    assert not any(group.get("fused") or group["foreach"] for group in plain.param_groups)


def test_a_sparse_embedding_gets_the_plain_form():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    [group, *_] = build_optimizer(ByRole(partial(SGD)), model, 0.1).param_groups
    assert not group["fused"] and not group["foreach"]


def test_rates_by_role_and_depth_multiply_the_common_one(model, data, quiet):
    maker = ByRole(partial(SGD, momentum=0.9), lr_factors={"bias": 64}, depth_decay=0.5)
    theirs = copy.deepcopy(model)
    opt = build_optimizer(maker, model, 0.001)
    seen = [(g["stage"], g["role"], g["lr"], g["lr_factor"]) for g in opt.param_groups]
    assert seen == [
        (0, "matrix", 0.001, 0.5), (0, "norm", 0.001, 0.5), (0, "bias", 0.001, 32),
        (1, "bias", 0.001, 64), (1, "head", 0.001, 1),
    ]  # fmt: skip
    rates = {"0.weight": 0.5, "0.bias": 32, "1.weight": 0.5, "1.bias": 32, "4.bias": 64}
    by_hand = SGD(
        [{"params": [p], "lr": 0.001 * rates.get(n, 1)} for n, p in theirs.named_parameters()],
        momentum=0.9,
        fused=True,
    )
    assert_same_bits(train(model, opt), train(theirs, by_hand))
    assert [group["lr"] for group in opt.param_groups] == [0.001] * 5


def test_whatever_sets_the_rate_keeps_the_factors(model, data, quiet):
    learn = Learner(model, data, opt_func=ByRole(SGD, lr_factors={"bias": 0}), callbacks=[quiet])
    before = copy.deepcopy(model.state_dict())
    learn.find_lr(steps=5)
    learn.fit(1, lr=0.1)
    factors = [constant(1.0), constant(1.0), constant(0.0), constant(1.0)]
    learn.fit(1, callbacks=[OneCycle(0.1), Schedule("lr_factor", factors)])
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {"0.weight", "1.weight", "4.weight"} <= moved
    assert not {"0.bias", "1.bias", "4.bias"} & moved


def test_a_step_that_fails_leaves_the_rates_as_they_were(model):
    opt = Joint([SGD([{"params": model.parameters(), "lr_factor": 2.0}], lr=0.1)])
    opt.parts[0].step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert opt.param_groups[0]["lr"] == 0.1


def joint(model: nn.Module) -> Optimizer:
    others = {"matrix": partial(SGD, momentum=0.9), "bias": partial(SGD, momentum=0.9)}
    return build_optimizer(ByRole(Adam, others, lr_factors={"matrix": 3.0}), model, 0.01)


def test_two_optimisers_in_one_step_as_two(model):
    theirs = copy.deepcopy(model)
    opt = joint(model)
    assert [type(part) for part in opt.parts] == [SGD, SGD, Adam]
    named = dict(theirs.named_parameters())
    one = SGD([named["0.weight"]], lr=0.03, momentum=0.9, fused=True)
    two = SGD([named[n] for n in ("0.bias", "1.bias", "4.bias")], lr=0.01, momentum=0.9, fused=True)
    three = Adam([named["1.weight"], named["4.weight"]], lr=0.01, fused=True)
    ours = train(model, opt)
    torch.manual_seed(3)
    for _ in range(4):
        theirs.zero_grad()
        F.cross_entropy(theirs(torch.randn(8, 6)), torch.arange(8) % 3).backward()
        for each in (one, two, three):
            each.step()
    assert_same_bits(ours, [param.detach() for param in theirs.parameters()])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_joint_optimiser_goes_on_where_it_was_saved(way, model):
    opt = joint(model)
    train(model, opt)
    if way == "state_dict":
        twin = copy.deepcopy(model)
        its = joint(twin)
        its.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    else:
        pair = (model, opt)
        twin, its = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for group in (*opt.param_groups, *its.param_groups):
        group["lr"] = 0.02  # the parts still hear of it
    assert guards(opt) and guards(its)
    assert_same_bits(train(model, opt), train(twin, its))


def test_a_joint_optimiser_can_be_switched_off_and_takes_groups_and_closures(model):
    opt = joint(model)
    before = train(model, opt)
    for bad in (1.0, 0.0):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.found_inf = torch.tensor(bad)
        assert opt.step(lambda: 7) == 7
        del opt.found_inf
        assert not any("found_inf" in vars(part) for part in opt.parts)
        same = all(map(torch.equal, before, model.parameters()))
        assert same == bool(bad)
    new = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [new]})
    new.grad = torch.ones(2)
    opt.step()
    assert (new < 1).all() and opt.param_groups[-1] is opt.parts[-1].param_groups[-1]


def test_frozen_parameters_are_left_out(model):
    model[0].requires_grad_(False)
    assert [group["role"] for group in build_optimizer(ByRole(), model, 0.1).param_groups] == [
        "norm", "bias", "head"
    ]  # fmt: skip


def test_a_function_that_asks_for_the_model_gets_it(model):
    seen = []

    def maker(params, lr, model):
        seen.append(model)
        return SGD(params, lr)

    build_optimizer(maker, model, 0.1)
    assert seen == [model]


def test_a_copied_optimiser_can_still_be_switched_off(model):
    # torch's copies forget the mark, though the fused step honours the switch
    opt = build_optimizer(AdamW, model, 0.1)
    assert guards(opt) and guards(copy.deepcopy((model, opt))[1])
    assert not guards(RMSprop(model.parameters()))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"others": {"convs": SGD}}, UnknownName),
        ({"no_decay": ["biases"]}, UnknownName),
        ({"lr_factors": {"Head": 2}}, UnknownName),
        ({"lr_factors": {"head": -2}}, SetupError),
        ({"depth_decay": 0}, SetupError),
        ({"depth_decay": 1.5}, SetupError),
        ({"depth_decay": "0.5"}, SetupError),
        ({"lr_factors": {"head": "2"}}, SetupError),
        ({"lr_factors": 2}, SetupError),
        ({"others": Muon}, SetupError),
    ],
)
def test_slips_are_refused(settings, error):
    with pytest.raises(error):
        ByRole(**settings)


def test_a_factor_of_0_is_none_of_them():
    ByRole(lr_factors={"embedding": 0})


def test_joint_takes_torchs_optimisers_but_lbfgs(model):
    with pytest.raises(SetupError, match="LBFGS"):
        Joint([torch.optim.LBFGS(model.parameters())])


def test_state_that_begins_with_the_optimiser_is_kept(model):
    """Adagrad makes its sums, `optim.fastest` gives SGD its momentum, before the first step."""
    makers = [torch.optim.Adagrad, partial(torch.optim.SGD, momentum=0.9)]
    for maker in makers:
        joint = build_optimizer(ByRole(maker, lr_factors={"bias": 2}), model, 0.1)
        assert isinstance(joint, Joint) and set(joint.state) == set(model.parameters())
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        joint.step()


def test_the_rates_on_record_and_in_a_plan_are_those_of_the_steps(quiet):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = DataLoaders([(torch.randn(5, 4), torch.randint(3, (5,)))] * 6, classes=3)
    opt_func = ByRole(partial(SGD, momentum=0.0), lr_factors={"bias": 3}, depth_decay=0.5)
    learn = Learner(model, data, opt_func=opt_func, lr=0.1, callbacks=[quiet])
    moved = []

    def look(learn):
        before = [param.detach().clone() for param in model.parameters()]
        moved.append((before, [param.grad.clone() for param in model.parameters()]))

    figure = learn.plan(2, [OneCycle(0.1)])
    learn.fit(2, callbacks=[OneCycle(0.1), Debug("after_backward", look)])
    names = ["lr/matrix 0", "lr/bias 0", "lr/head 1", "lr/bias 1"]
    assert {name for name in learn.record.batches if name.startswith("lr")} == set(names)
    moved.append(([param.detach() for param in model.parameters()], None))
    for i, ((before, grads), (after, _)) in enumerate(pairwise(moved)):
        for name, old, new, grad in zip(names, before, after, grads, strict=True):
            torch.testing.assert_close(new, old - learn.record[name][i] * grad)
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert drawn["bias 0"].max() == pytest.approx(3 * drawn["matrix 0"].max())
    assert drawn["head 1"].tolist() == pytest.approx(learn.record["lr/head 1"].tolist())
