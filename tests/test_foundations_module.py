"""foundations: Parameter and Module, what they hold, and what happens to all of it at once."""

import copy
import gc
import io
import pickle
import weakref
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.errors import SetupError
from pellucid.foundations import BatchNorm, Conv2d, Linear, Module, Parameter, ReLU, Sequential


class Net(Module):
    """Parts in every kind of place, without super().__init__()."""

    def __init__(self):
        self.scale = Parameter(torch.ones(2))
        self.body = [Linear(2, 3), ReLU()]
        self.heads = {"a": Linear(3, 2), "b": (Linear(3, 1), [BatchNorm(4)])}
        self.size = 7
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
        return self.heads["a"](x) * self.scale


NAMES = [
    "scale", "body.0.weight", "body.0.bias", "heads.a.weight", "heads.a.bias",
    "heads.b.0.weight", "heads.b.0.bias", "heads.b.1.0.weight", "heads.b.1.0.bias",
]  # fmt: skip


def names(pairs):
    return [name for name, _ in pairs]


# ── Parameter ─────────────────────────────────────────────────────────────────────────────────


def test_a_parameter_is_a_tensor_that_wants_its_gradient():
    p = Parameter(torch.tensor(3.0))
    assert repr(p) == "tensor(3., requires_grad=True)"
    assert repr(Parameter(torch.tensor(3.0), requires_grad=False)) == "tensor(3.)"
    assert isinstance(p, torch.Tensor) and p.is_leaf
    (p * p).backward()
    assert p.grad == 6


def test_what_is_computed_from_a_parameter_is_none():
    p = Parameter(torch.ones(2))
    for result in (p * 2, p.t(), p[0], p.detach(), torch.stack([p, p]), p.sum()):
        assert type(result) is torch.Tensor


@pytest.mark.parametrize("wanted", [True, False])
def test_a_parameter_copies_and_pickles_as_one(wanted):
    p = Parameter(torch.randn(3), wanted)
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(twin) is Parameter and twin.is_leaf and twin.requires_grad is wanted
        assert torch.equal(twin, p) and twin.data_ptr() != p.data_ptr()


# ── what a module holds ───────────────────────────────────────────────────────────────────────


def test_lists_tuples_and_dicts_are_looked_into():
    net = Net()
    assert names(net.named_parameters()) == NAMES
    assert names(net.named_buffers()) == [
        "seen", "heads.b.1.0.running_mean", "heads.b.1.0.running_var",
        "heads.b.1.0.num_batches_tracked",
    ]  # fmt: skip
    assert names(net.named_children()) == [
        "body.0", "body.1", "heads.a", "heads.b.0", "heads.b.1.0",
    ]  # fmt: skip
    assert names(net.named_modules()) == ["", *names(net.named_children())]
    assert [type(m) for m in net.modules()] == [
        Net, Linear, ReLU, Linear, Linear, BatchNorm,
    ]  # fmt: skip
    assert next(net.parameters()) is net.scale
    assert names(net.named_parameters(recurse=False)) == ["scale"]
    assert list(map(id, net.buffers(recurse=False))) == [id(net.seen)]


def test_what_is_put_into_a_list_later_is_found():
    net = Net()
    net.body.append(Linear(3, 3))
    assert "body.2.weight" in names(net.named_parameters())
    del net.body[0]
    assert "body.0.weight" not in names(net.named_parameters())


def test_a_new_value_replaces_the_old_one():
    net = Net()
    net.scale = Parameter(torch.zeros(5))
    net.scale = Parameter(torch.zeros(6))
    assert names(net.named_parameters()) == NAMES
    assert net.scale.shape == (6,)
    net.scale = 3
    assert names(net.named_parameters()) == NAMES[1:]
    net.body = ReLU()
    assert names(net.named_parameters()) == NAMES[3:]
    net.seen = torch.ones(1)
    assert dict(net.named_buffers())["seen"] == 1
    net.seen = None
    assert "seen" not in names(net.named_buffers())
    del net.heads
    assert list(net.parameters()) == []


kinds = {
    "parameter": lambda: Parameter(torch.zeros(1)),
    "module": lambda: Linear(1, 1, bias=False),
    "list": lambda: [Linear(1, 1, bias=False), Parameter(torch.zeros(1)), {"k": ReLU()}],
    "tensor": lambda: torch.zeros(1),
    "number": lambda: 3,
}
expected_names = {
    "parameter": [""], "module": [".weight"], "list": [".1", ".0.weight"],
    "tensor": [], "number": [],
}  # fmt: skip


@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([*kinds, "delete"]))))
@settings(deadline=None, max_examples=80)
def test_any_sequence_of_assignments_leaves_what_the_last_of_each_name_says(steps):
    module, last = Module(), {}
    for name, kind in steps:
        if kind != "delete":
            setattr(module, name, kinds[kind]())
            last[name] = kind
        elif last.pop(name, None):
            delattr(module, name)
    expected = {name + rest for name, kind in last.items() for rest in expected_names[kind]}
    assert set(names(module.named_parameters())) == expected
    assert len(list(module.parameters())) == len(expected)


def test_what_is_shared_is_counted_once():
    layer = Linear(3, 3)
    model = Sequential(layer, ReLU(), layer)
    assert names(model.named_parameters()) == ["0.weight", "0.bias"]
    assert len(list(model.modules())) == 3
    assert names(model.named_children()) == ["0", "1"]
    other = Linear(3, 3)
    other.weight = layer.weight
    model = Sequential(layer, other)
    assert names(model.named_parameters()) == ["0.weight", "0.bias", "1.bias"]
    # the same tensor under each of its names, as torch has it
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model.to(torch.float64)
    assert other.weight is layer.weight and other.weight.dtype == torch.float64


def test_a_part_may_know_its_parent_and_itself():
    net = Net()
    net.body[0].parent = net
    net.body[0].me = [net.body[0]]
    assert names(net.named_parameters()) == NAMES
    assert len(net.train().state_dict()) == len(NAMES) + 4
    assert "..." in repr(net)


@pytest.mark.parametrize(
    "thing",
    [
        nn.Linear(2, 2),
        [nn.ReLU()],
        nn.Parameter(torch.ones(1)),
        torch.ones(1, requires_grad=True),
        {Linear(2, 2)},
        [deque([Parameter(torch.ones(1))])],
        frozenset([nn.ReLU()]),
    ],
    ids=[
        "torch's layer",
        "in a list",
        "torch's parameter",
        "a tensor with gradient",
        "in a set",
        "in a deque",
        "in a frozen set",
    ],
)
def test_what_would_be_left_untrained_is_refused(thing):
    module = Module()
    module.kind, module.other, module.kinds = (
        nn.Linear,
        Linear,
        {nn.ReLU, ReLU},
    )  # classes are no parts
    module.seen = deque([torch.ones(2)], maxlen=3), {"relu", 3}  # nor is this
    assert list(module.parameters()) == []
    module.part = thing
    with pytest.raises(SetupError, match=r"part.* nobody would train"):
        list(module.parameters())


# ── calls and hooks ───────────────────────────────────────────────────────────────────────────


def test_a_module_without_forward_says_so():
    with pytest.raises(SetupError, match="Module has no forward"):
        Module()(1)


def test_a_hook_hears_module_inputs_and_output_until_it_is_removed():
    layer, heard, x = Linear(2, 3), [], torch.randn(4, 2)
    handle = layer.register_forward_hook(lambda *what: heard.append(what))
    out = layer(x)
    [(module, inputs, output)] = heard
    assert module is layer and inputs[0] is x and output is out
    handle.remove()
    handle.remove()
    layer(x)
    assert len(heard) == 1 and not layer._forward_hooks


def test_hooks_go_in_order_and_each_handle_removes_its_own():
    layer, heard = ReLU(), []
    hooks = [layer.register_forward_hook(lambda m, i, o, n=n: heard.append(n)) for n in range(3)]
    hooks[1].remove()
    hooks.append(layer.register_forward_hook(lambda m, i, o: heard.append(3)))
    hooks[1].remove()
    layer(torch.ones(1))
    assert heard == [0, 2, 3]
    assert not ReLU()._forward_hooks


def test_a_hook_may_replace_the_output_and_leaves_at_the_end_of_a_with():
    layer = ReLU()
    with (
        pytest.raises(KeyError),
        layer.register_forward_hook(lambda module, inputs, output: output + 1),
    ):
        assert layer(torch.zeros(1)) == 1
        raise KeyError
    assert layer(torch.zeros(1)) == 0


def test_a_hook_that_is_a_module_is_no_part():
    class Watch(Module):
        def forward(self, module, inputs, output):
            self.seen = output

    layer, watch = Linear(2, 2), Watch()
    layer.register_forward_hook(watch)
    layer(torch.ones(1, 2))
    assert watch.seen.shape == (1, 2) and list(layer.children()) == []


def test_every_layer_of_a_model_can_be_listened_to():
    # the four lines of the lesson: mean and deviation behind each convolution
    convolutions = [Conv2d(a, b, 3, 2, 1) for a, b in ((3, 16), (16, 32), (32, 64), (64, 128))]
    heard = []
    for layer in convolutions:
        layer.register_forward_hook(lambda m, i, o: heard.append((o.mean(), o.std(), o.shape)))
    Sequential(*convolutions)(torch.randn(2, 3, 64, 64))
    assert [shape[-1] for *_, shape in heard] == [32, 16, 8, 4]


def test_a_dropped_model_is_freed_although_its_handle_is_held():
    net = Net()
    handle, gone = net.register_forward_hook(print), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    handle.remove()


# ── all of it at once ─────────────────────────────────────────────────────────────────────────


def test_train_and_eval_reach_every_part():
    net = Net()
    assert all(module.training for module in net.modules())
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    net.heads["b"][0].train()
    assert [m.training for m in net.modules()].count(True) == 1
    assert all(module.training for module in net.train().modules())


def test_to_moves_parameters_buffers_and_gradients_and_keeps_their_identity():
    net = Net()
    net(torch.ones(1, 2)).sum().backward()
    before, copied = list(net.parameters()), copy.deepcopy(net.state_dict())
    assert net.to("cpu", torch.float64) is net
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    for p in net.parameters():
        assert p.dtype == torch.float64 and p.requires_grad
        assert p.grad is None or p.grad.dtype == torch.float64
    assert net.scale.grad is not None
    counter = net.heads["b"][1][0].num_batches_tracked
    assert (net.seen.dtype, counter.dtype) == (torch.float64, torch.int64)
    for name, tensor in net.to(torch.float32).state_dict().items():
        assert torch.equal(tensor, copied[name])


def test_gradients_add_up_until_they_are_dropped():
    net, x = Net(), torch.ones(1, 2)
    net(x).sum().backward()
    once = net.scale.grad.clone()
    net(x).sum().backward()
    assert torch.equal(net.scale.grad, 2 * once)
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_state_dict_goes_to_another_model_and_to_a_file():
    one, two = Net(), Net()
    one.seen += 3
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {*NAMES, *names(one.named_buffers())}
    assert two.load_state_dict(state) == ([], [])
    for name, tensor in two.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr() and not tensor.requires_grad


def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_copied():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    wrong = {name: tensor + 1 for name, tensor in before.items() if name != "scale"}
    wrong["body.0.weight"], wrong["body.9.weight"] = torch.ones(3, 3), torch.ones(1)
    with pytest.raises(SetupError) as caught:
        net.load_state_dict(wrong)
    assert str(caught.value) == (
        "These weights do not fit Net.\n"
        "  saw: missing: scale; unexpected: body.9.weight; "
        "of another shape: body.0.weight (float32 3×3 for float32 3×2)"
    )
    with pytest.raises(SetupError, match=r"shape: body\.0\.weight"):
        net.load_state_dict(wrong, strict=False)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    del wrong["body.0.weight"]
    missing, unexpected = net.load_state_dict(wrong, strict=False)
    assert (missing, unexpected) == (["scale", "body.0.weight"], ["body.9.weight"])
    assert torch.equal(net.seen, before["seen"] + 1)
    assert torch.equal(net.scale, before["scale"])


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_module_copies_with_hooks_modes_and_buffers(way):
    net = Net().eval()
    net.heads["b"][0].weight = net.heads["a"].weight  # sharing survives
    net.register_forward_hook(print)
    twin = copied(net, way)
    assert not any(module.training for module in twin.modules())
    assert twin.heads["b"][0].weight is twin.heads["a"].weight
    assert len(twin._forward_hooks) == 1
    ours, theirs = net.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        for p in twin.parameters():
            p += 1
    assert not torch.equal(net.scale, twin.scale)


def copied(net, way):
    if way == "pickle":
        return pickle.loads(pickle.dumps(net))
    if way == "deepcopy":
        return copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_module_shows_its_parts_and_the_shapes_of_its_parameters():
    assert repr(Net()) == (
        "Net(scale 2\n"
        "  (body.0): Linear(weight 3×2, bias 3)\n"
        "  (body.1): ReLU()\n"
        "  (heads.a): Linear(weight 2×3, bias 2)\n"
        "  (heads.b.0): Linear(weight 1×3, bias 1)\n"
        "  (heads.b.1.0): BatchNorm(weight 4, bias 4, momentum 0.1)\n"
        ")"
    )
    inner = Sequential(Conv2d(1, 2, 3, stride=2, padding=1), Sequential(ReLU()))
    assert repr(inner) == (
        "Sequential(\n"
        "  (0): Conv2d(weight 2×1×3×3, bias 2, stride (2, 2), padding (1, 1))\n"
        "  (1): Sequential(\n"
        "    (0): ReLU()\n"
        "  )\n"
        ")"
    )
