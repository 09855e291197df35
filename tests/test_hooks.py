"""Hooks: a list of them, removed on every way out, which keep nothing alive and bend nothing."""

import copy
import gc
import io
import pickle
import signal
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_sequence

from pellucid import CancelFit, DataLoaders, Learner
from pellucid.callbacks import Debug, Progress
from pellucid.errors import SetupError
from pellucid.hooks import Hook, Hooks, find, leaves, tensors_in
from pellucid.nn import Lambda


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))


def seven_parts() -> nn.Sequential:
    """The CNN of the course: four convolutions, a pooling, a flattening, a linear layer."""
    pairs = pairwise([1, 8, 16, 32, 32])
    convolutions = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def count(hook: Hook, *seen: Any) -> None:
    vars(hook)["calls"] = getattr(hook, "calls", 0) + 1


def keep(hook: Hook, *seen: Any) -> None:
    hook.seen = seen


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# ── what they see ─────────────────────────────────────────────────────────────────────────────


def test_a_hook_gets_itself_the_module_its_inputs_and_its_output():
    model, x = net(), torch.randn(3, 4)
    with Hook(model[0], keep) as hook:
        model(x)
    module, inputs, output = hook.seen
    assert module is model[0] and inputs[0] is x
    # the output is what the ReLU then changed in place
    assert torch.equal(output, model[0](x).relu())


def test_a_backward_hook_gets_the_gradient_of_the_output_also_before_an_in_place_relu():
    model, x = net(), torch.randn(3, 4)
    with Hooks(model, keep, backward=True) as hooks:
        model(x).square().sum().backward()
    before = model[0](x).detach().requires_grad_()
    after = before.relu()
    after.retain_grad()
    out = model[2](after)
    out.retain_grad()
    out.square().sum().backward()
    for hook, tensor in zip(hooks, (before, after, out), strict=True):
        module, grad = hook.seen
        assert module is hook.module
        torch.testing.assert_close(grad, tensor.grad)


Pair = namedtuple("Pair", "one other")


class Nested(nn.Module):
    def forward(self, x):
        return {"pair": Pair(x * 2, [x * 3, None]), "count": 7, "indices": x.argmax(1)}


def test_of_a_nested_output_each_tensor_that_needs_it_has_its_gradient_told():
    module, grads = Nested(), []
    x = torch.ones(2, 3, requires_grad=True)
    with Hook(module, lambda hook, module, grad: grads.append(grad), backward=True):
        out = module(x)
        (out["pair"].one.sum() + 5 * out["pair"].other[0].sum()).backward()
    assert sorted(grad[0, 0].item() for grad in grads) == [1, 5]


def test_of_a_recurrent_layer_too():
    module = nn.LSTM(3, 4)
    with Hook(module, count, backward=True) as hook:
        out, (hidden, _) = module(torch.randn(5, 2, 3))
        (out.sum() + hidden.sum()).backward()
    assert hook.calls == 2  # out and hidden; the cell's end went into nothing


class Built(OrderedDict):
    """A dict with a constructor of its own, as those that models of language give."""

    def __init__(self, out: torch.Tensor):
        super().__init__(out=out, past=None)


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "packed sequence": lambda x: pack_sequence([x[:2], x[2:]]),
    "default dict": lambda x: defaultdict(list, out=x),
    "a dict of its own kind": Built,
    "with a size": lambda x: [x.shape, (None, x)],
    "of torch's own kind": lambda x: x.max(dim=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_any_kind_is_looked_into_and_not_built_again(kind):
    module, grads = Lambda(KINDS[kind]), []
    x = torch.ones(3, 4, requires_grad=True)
    with Hook(module, lambda hook, module, grad: grads.append(grad), backward=True):
        [given] = [tensor for tensor in tensors_in(module(x * 1)) if tensor.requires_grad]
        (5 * given).sum().backward()
    [grad] = grads
    assert grad.shape == given.shape and (grad == 5).all()


def test_where_an_output_holds_no_tensors_there_are_none():
    for output in (None, "text", 3, [], {"a": [None, "b"]}, iter([torch.ones(2)])):
        assert tensors_in(output) == []
    assert tensors_in(tensor := torch.ones(2))[0] is tensor


class Table(nn.Module):
    """Give a parameter back as it is."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.table


def test_a_parameter_that_is_given_back_keeps_no_hook():
    module = Table()
    with Hook(module, count, backward=True):
        for _ in range(3):
            module(None).sum().backward()
    assert not module.table._backward_hooks


def test_without_gradients_a_backward_hook_is_silent():
    model = net()
    with Hooks(model, count, backward=True) as hooks, torch.no_grad():
        model(torch.randn(3, 4))
    assert not any(hasattr(hook, "calls") for hook in hooks)


def test_what_a_hook_returns_changes_nothing():
    model, x = net(), torch.randn(3, 4)
    expected = model(x)
    expected.sum().backward()
    grads = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    for backward in (False, True):
        with Hooks(model, lambda *seen: torch.zeros(3, 5), backward=backward):
            out = model(x)
            out.sum().backward()
        assert torch.equal(out, expected)
        assert all(map(torch.equal, grads, [param.grad for param in model.parameters()]))
        model.zero_grad()


# ── removed on every way out ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", [Hook, Hooks])
def test_at_the_end_of_the_with_no_hook_is_left(kind, backward):
    model = net()
    with kind(model[0] if kind is Hook else model, count, backward):
        assert n_hooks(model) == (1 if kind is Hook else 3)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_whatever_is_raised_within_no_hook_is_left(fault):
    model = net()
    with pytest.raises(fault), Hooks(model, count):
        model(torch.randn(3, 4))
        raise fault
    assert n_hooks(model) == 0


def test_a_real_ctrl_c_within_the_model_leaves_no_hook():
    model = net()
    with pytest.raises(KeyboardInterrupt), Hooks(model, lambda *_: signal.raise_signal(2)):
        model(torch.randn(3, 4))
    assert n_hooks(model) == 0


def test_a_cancelled_fit_leaves_no_hook(data, model, quiet):
    def cancel(hook, *seen):
        raise CancelFit

    def hooked(learn):
        learn.hooks = Hooks(learn.model, cancel)

    learn = Learner(model, data, callbacks=[quiet, Debug("before_fit", hooked)], device="cpu")
    learn.fit(1)
    assert len(learn.record.batches) == 0
    assert n_hooks(model) == 5  # the user holds them,
    del learn.hooks  # and lets them go
    assert n_hooks(model) == 0


def test_with_the_last_reference_the_hook_goes_without_the_garbage_collector():
    model = net()
    gc.disable()
    try:
        hooks = Hooks(model, keep)
        model(torch.randn(3, 4))
        held = hooks[1]
        del hooks
        assert [len(part._forward_hooks) for part in model] == [0, 1, 0]
        del held
        assert n_hooks(model) == 0
    finally:
        gc.enable()


def test_a_forgotten_hook_keeps_neither_model_nor_activations():
    model = net()
    x = torch.randn(3, 4)
    hooks = [Hooks(model, keep), Hooks(model, keep, backward=True)]
    out = model(x)
    out.sum().backward()
    seen = [weakref.ref(thing) for thing in (model, out, *hooks[0], *hooks[1])]
    gc.disable()
    try:
        # in this order the model goes last, of itself: nothing refers in a circle
        del out, hooks, model
        assert [reference() for reference in seen] == [None] * len(seen)
    finally:
        gc.enable()


def test_the_module_does_not_keep_the_hook():
    model = net()
    hook = Hook(model[0], keep)
    model(torch.randn(3, 4))
    reference = weakref.ref(hook)
    del hook
    assert reference() is None


def test_a_graph_that_outlives_the_hook_no_longer_calls_it():
    model, grads = net(), []
    with Hooks(model, lambda hook, module, grad: grads.append(grad), backward=True):
        out = model(torch.randn(3, 4)).sum()
    out.backward()
    hooks = Hooks(model, lambda hook, module, grad: grads.append(grad), backward=True)
    out = model(torch.randn(3, 4)).sum()
    del hooks
    out.backward()
    assert not grads


def test_removing_twice_does_nothing_more():
    model = net()
    hooks = Hooks(model, count)
    with hooks, hooks[0]:
        hooks[0].remove()
        hooks.remove()
    hooks.remove()
    assert all(hook.removed for hook in hooks)
    model(torch.randn(3, 4))
    assert not any(hasattr(hook, "calls") for hook in hooks)


def test_what_cannot_be_hooked_is_refused_and_what_was_set_before_removed():
    model = net()
    with pytest.raises(SetupError, match="needs a module"):
        Hooks([*model, torch.relu], count)
    assert n_hooks(model) == 0
    with pytest.raises(SetupError, match="needs a function"):
        Hook(model[0], "count")  # ty: ignore[invalid-argument-type]
    assert n_hooks(model) == 0


@pytest.mark.parametrize("given", [nn.Linear(2, 3), "0", 3, leaves(net())], ids=type)
def test_what_is_no_list_of_modules_is_refused(given):
    with pytest.raises(SetupError, match=r"leaves\(model\)\.values\(\)"):
        Hooks(given, count)


def test_a_class_is_no_condition():
    with pytest.raises(SetupError, match=r"isinstance\(module, Linear\)"):
        find(net(), nn.Linear)


# ── a copy of the model is another model ──────────────────────────────────────────────────────


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("backward", [False, True])
def test_a_copied_model_is_not_watched(way: Callable[[nn.Module], nn.Module], backward):
    model = net()
    with Hooks(model, count, backward) as hooks:
        twin = way(model)
        twin(torch.randn(3, 4)).sum().backward()
        assert not any(hasattr(hook, "calls") for hook in hooks)
        model(torch.randn(3, 4)).sum().backward()
        assert all(hook.calls == 1 for hook in hooks)


# ── a list ────────────────────────────────────────────────────────────────────────────────────


def test_hooks_are_a_list():
    model = seven_parts()
    hooks = Hooks(model, count)
    items = list(hooks)
    assert [hook.module for hook in items] == list(model)
    assert len(hooks) == 7 and hooks[0] is items[0] and hooks[-1] is items[6]
    assert hooks[1:3] == items[1:3] and hooks[::-2] == items[::-2]
    assert hooks[[0, 4]] == [items[0], items[4]] and hooks[[]] == []
    assert items[3] in hooks and hooks.index(items[3]) == 3
    assert list(reversed(hooks)) == items[::-1]
    with pytest.raises(IndexError):
        hooks[7]


MASK = [True, False, False, True, False, False, True]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_mask_or_a_list_of_numbers_may_be_an_array(kind):
    hooks = Hooks(seven_parts(), count)
    items = list(hooks)
    assert hooks[kind(MASK)] == [items[0], items[3], items[6]]
    assert hooks[kind([False] * 7)] == []
    assert hooks[kind([2, -1])] == [items[2], items[6]]
    assert hooks[np.argmax([1, 5, 2])] is items[1]


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError):
        Hooks(net(), count)[[True, False]]


def test_deleting_removes():
    model = seven_parts()
    hooks = Hooks(model, count)
    third = hooks[2]
    del hooks[2]
    assert third.removed and len(hooks) == 6 and third not in hooks
    assert not model[2]._forward_hooks
    del hooks[-2:]
    assert [len(part._forward_hooks) for part in model] == [1, 1, 0, 1, 1, 0, 0]


def test_hooks_show_how_many_and_what():
    hooks = Hooks(seven_parts(), count)
    assert repr(hooks).startswith("Hooks (7 items)\n  Hook(Sequential, count)\n")
    assert repr(hooks[-1]) == "Hook(Linear, count)"
    many = Hooks([nn.ReLU() for _ in range(30)], count, backward=True)
    assert repr(many).splitlines()[-1] == "  ..." and len(repr(many).splitlines()) == 12
    many[0].remove()
    assert repr(many[0]) == "Hook(ReLU, count, backward, removed)"


# ── finding modules ───────────────────────────────────────────────────────────────────────────


def test_find_searches_all_depths_and_gives_each_once():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared, "c": net()})
    assert list(find(model, lambda m: isinstance(m, nn.Linear))) == ["a.0", "c.0", "c.2"]
    convolutions = find(seven_parts(), lambda m: isinstance(m, nn.Conv2d))
    assert list(convolutions) == [f"{i}.0" for i in range(4)]


def test_leaves_do_the_computing():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "normed": spectral_norm(nn.Linear(4, 4)),
            "body": nn.Sequential(nn.LSTM(4, 3), nn.Sequential(nn.Tanh())),
            "attention_2": nn.Identity(),
        }
    )
    assert list(leaves(model)) == ["attention", "normed", "body.0", "body.1.0", "attention_2"]
    assert list(leaves(nn.Linear(2, 3))) == [""]
    assert list(leaves(nn.MultiheadAttention(4, 2))) == [""]


# ── torch.compile ─────────────────────────────────────────────────────────────────────────────


def add_up(hook: Hook, module: nn.Module, *seen: Any) -> None:
    hook.total.add_(seen[-1].detach().sum())


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def test_hooks_are_compiled_into_the_models_one_graph_and_leave_it(fresh_compiler):
    model, backend = net(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    assert list(leaves(compiled)) == ["0", "1", "2"]
    with Hooks(model, add_up) as forward, Hooks(model, add_up, backward=True) as backward:
        for hook in (*forward, *backward):
            hook.total = torch.zeros(())
        for factor in (1, 2):
            compiled(torch.full((3, 4), 0.5) * factor).sum().backward()
    assert backend.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    seen = [hook.total.clone() for hook in (*forward, *backward)]
    compiled(torch.ones(3, 4)).sum().backward()
    assert [hook.total for hook in (*forward, *backward)] == seen
    for hook, by_hand in zip((*forward, *backward), totals_by_hand(model), strict=True):
        torch.testing.assert_close(hook.total, by_hand)


def totals_by_hand(model: nn.Sequential) -> list[torch.Tensor]:
    values, grads = torch.zeros(3), torch.zeros(3)
    for factor in (1, 2):
        outs = [torch.full((3, 4), 0.5) * factor]
        for part in (model[0], torch.relu, model[2]):
            outs.append(part(outs[-1]))
            outs[-1].retain_grad()
        outs[-1].sum().backward()
        values += torch.stack([out.detach().sum() for out in outs[1:]])
        grads += torch.stack([out.grad.sum() for out in outs[1:]])
    return [*values, *grads]


# ── in a fit ──────────────────────────────────────────────────────────────────────────────────


def test_statistics_by_hand_as_in_the_course(data, model):
    """Mean and sd of each layer in each training batch, with nothing but a hook."""

    def append_stats(hook, module, inputs, output):
        if module.training:
            stats = vars(hook).setdefault("stats", ([], []))
            stats[0].append(output.detach().mean())
            stats[1].append(output.detach().std())

    assert isinstance(data, DataLoaders)
    learn = Learner(model, data, callbacks=[Progress("off")], device="cpu")
    with Hooks(model, append_stats) as hooks:
        learn.fit(2)
    assert [len(hook.stats[0]) for hook in hooks] == [10] * 5
    assert n_hooks(model) == 0
