"""summary: what torch itself counts and keeps, attributed to modules; nothing left behind."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pellucid import foundations
from pellucid.errors import SetupError, UnknownName
from pellucid.outline import amount, size
from pellucid.places import Place
from pellucid.summary import summary

# ── models ────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride > 1:
            narrow = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(narrow, nn.BatchNorm2d(after))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet18() -> nn.Module:
    widths = [64, 64, 128, 256, 512]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    stages = [
        nn.Sequential(Block(before, after, 1 if i == 0 else 2), Block(after, after, 1))
        for i, (before, after) in enumerate(pairwise(widths))
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *stages, *head)


class Attention(nn.Module):
    """With a parameter of its own, and attention as a function."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tangled(nn.Module):
    """Shared modules, tied weights, loops, functions, spare parts, several outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.act = nn.ReLU()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), self.act) for _ in range(2))
        self.twice = nn.Sequential(nn.Linear(8, 8), self.act, self.layers[0], self.act)
        self.attention = Attention()
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.spare = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.layers[1].requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(self.act(x))
        for _ in range(3):
            x = self.twice(x)
        x = F.relu(self.attention(x))
        states, _ = self.lstm(x)
        return {"logits": self.head(x), "states": states}


TOKENS = torch.zeros(4, 6, dtype=torch.int64)

MODELS = {
    "resnet": (resnet18, torch.zeros(1, 3, 32, 32)),
    "attention": (Attention, torch.zeros(3, 6, 8)),
    "tangled": (Tangled, TOKENS),
    "encoder": (partial(nn.TransformerEncoderLayer, 8, 2, 16), torch.zeros(5, 3, 8)),
    "one layer": (partial(nn.Linear, 3, 4), torch.zeros(2, 3)),
}


# ── multiply-adds ─────────────────────────────────────────────────────────────────────────────


def test_resnet18_has_its_published_numbers():
    with torch.device("meta"):  # nothing is computed
        found = summary(resnet18(), torch.zeros(1, 3, 224, 224))
    assert found.n_params == found.n_trainable == 11_689_512
    assert found.multiply_adds == 1_814_073_344
    assert found["0"].multiply_adds == 64 * 112 * 112 * 3 * 49
    assert found["5.0.downsample"].multiply_adds == 128 * 28 * 28 * 64
    assert found["10"].multiply_adds == 512_000
    assert found["4"].output == "1×64×56×56"
    assert found.whole.output == "1×1000"
    assert found.param_bytes == 4 * 11_689_512


def by_torch(model, *inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["resnet", "one layer"])
def test_the_whole_is_what_torch_counts(name):
    make, x = MODELS[name]
    model = make()
    assert summary(model, x).multiply_adds == by_torch(model, x)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2),
    st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_a_convolution_multiplies_its_kernel_at_every_place(n, group, out, kernel, stride, d, back):
    groups = 2
    kind = nn.ConvTranspose2d if back else nn.Conv2d
    conv = kind(group * groups, out * groups, kernel, stride, groups=groups, dilation=d)
    x = torch.zeros(n, group * groups, 7, 8)
    y = conv(x)
    places = x[0, 0].numel() if back else y[0, 0].numel()  # where a kernel is laid on
    expected = n * places * kernel**2 * group * out * groups
    assert summary(conv, x).multiply_adds == expected


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"num_layers": 2}, {"bidirectional": True}]
)
def test_recurrent_layers_are_counted(kind, gates, options):
    cell = kind(5, 7, **options)
    sides, layers = 1 + cell.bidirectional, cell.num_layers
    weights = sum(gates * 7 * ((5 if i == 0 else 7 * sides) + 7) for i in range(layers)) * sides
    assert summary(cell, torch.zeros(4, 3, 5)).multiply_adds == 4 * 3 * weights
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, 5), torch.zeros(2, 5)])
    assert summary(cell, (packed,)).multiply_adds == 6 * weights


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_attention_is_counted_whatever_way_it_is_computed(weights, grad):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(grad)
    x = torch.zeros(3, 5, 8)
    expected = 3 * 5 * 8 * 8 * 4 + 2 * 3 * 5 * 5 * 8
    given_all = {"query": x, "key": x, "value": x, "need_weights": weights}
    assert summary(attention, given_all).multiply_adds == expected
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(grad)
    with torch.inference_mode():
        assert summary(encoder, x).multiply_adds == expected + 2 * 3 * 5 * 8 * 16


def test_products_with_a_vector_are_counted():
    class Vector(nn.Module):
        def forward(self, x):
            return x @ torch.ones(4) + torch.ones(3).dot(torch.ones(3))

    assert summary(Vector(), torch.zeros(5, 4)).multiply_adds == 5 * 4 + 3


def test_products_of_rarer_kinds_are_counted():
    class Products(nn.Module):
        def forward(self, x):
            over_batches = torch.addbmm(torch.ones(5, 2), torch.ones(6, 5, 4), torch.ones(6, 4, 2))
            return over_batches, torch.addmv(torch.ones(5), x, torch.ones(4))

    assert summary(Products(), torch.zeros(5, 4)).multiply_adds == 6 * 5 * 4 * 2 + 5 * 4
    bilinear, left, right = nn.Bilinear(3, 4, 2), torch.zeros(7, 5, 3), torch.zeros(7, 5, 4)
    assert summary(bilinear, left, right).multiply_adds == 7 * 5 * 3 * 4 * 2


def test_a_model_of_twice_as_many_layers_takes_twice_as_long_to_outline(monkeypatch):
    steps, walk = [], Place.__iter__
    monkeypatch.setattr(
        Place, "__iter__", lambda place: (steps.append(0) or p for p in walk(place))
    )
    counts = []
    for n in (40, 80):
        steps.clear()
        summary(nn.Sequential(*[nn.Linear(2, 2) for _ in range(n)]), torch.zeros(1, 2))
        counts.append(len(steps))
    assert counts[1] < 2.2 * counts[0]


def test_functional_calls_belong_to_the_module_that_makes_them():
    found = summary(Attention(), torch.zeros(3, 6, 8))
    assert found["qkv"].multiply_adds == 3 * 7 * 8 * 24
    assert found["out"].multiply_adds == 3 * 7 * 8 * 8
    assert found["(itself)"].multiply_adds == 2 * 3 * 7 * 7 * 8
    assert found.whole.parts[-1] is found["(itself)"]


# ── sums and shares ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_a_parts_numbers_are_the_sums_of_its_parts(name):
    make, x = MODELS[name]
    model = make()
    found = summary(model, x)
    for part in found:
        if part.parts:
            for number in ("n_params", "n_trainable", "multiply_adds", "kept"):
                within = sum(getattr(inner, number) for inner in part.parts)
                assert getattr(part, number) == within, (part.name, number)
    assert found.n_params == sum(param.numel() for param in model.parameters())
    trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert found.n_trainable == trainable
    assert found.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())


@pytest.fixture(scope="module")
def tangled():
    return summary(Tangled(), TOKENS)


def test_what_is_shared_is_counted_once_and_marked(tangled):
    assert tangled["head"].note == "weight shared with embed.weight"
    assert tangled["head"].n_params == 11  # its bias
    assert tangled["embed"].n_params == 88
    assert tangled["twice.2"].note == "×3, shared with layers.0"
    assert tangled["twice.2"].n_params == 0
    assert tangled["twice.2"].parts == ()
    assert tangled["twice.2"].multiply_adds == 3 * 24 * 64
    assert tangled["layers.0"].multiply_adds == 24 * 64
    assert tangled["layers.1.1"].note == "shared with act"


def test_calls_are_counted_where_they_are_made(tangled):
    calls = {part.name: part.n_calls for part in tangled if part.kind == "ReLU"}
    assert calls == {
        "act": 2,
        "layers.0.1": 1,
        "layers.1.1": 1,
        "twice.1": 3,
        "twice.3": 3,
        "spare.1": 0,
    }
    assert tangled["twice"].note == "×3"
    assert tangled["act"].note == "×2"
    assert tangled["layers"].n_calls == 0
    assert tangled["layers"].note == ""


def test_what_is_never_called_is_marked(tangled):
    assert tangled["spare"].note == "not used"
    assert tangled["spare.0"].note == tangled["spare.1"].note == ""  # said once
    assert tangled["spare"].output == ""
    attention = summary(nn.MultiheadAttention(4, 2), *[torch.zeros(3, 2, 4)] * 3)
    assert attention["out_proj"].note == "not called, but its parameters are used"


def test_what_is_frozen_is_marked_once(tangled):
    assert tangled["layers.1"].note == "frozen"
    assert tangled["layers.1.0"].note == ""
    assert tangled["layers.1"].n_trainable == 0 < tangled["layers.1"].n_params
    assert tangled["layers"].n_trainable == tangled["layers.0"].n_params


def test_a_modules_own_parameters_have_a_line(tangled):
    token = tangled["attention.token"]
    assert (token.kind, token.output, token.n_params) == ("Parameter", "1×1×8", 8)
    assert [part.label for part in tangled["attention"].parts] == [
        "token",
        "qkv",
        "out",
        "(itself)",
    ]


def test_outputs_are_told_as_they_are(tangled):
    assert tangled.whole.output == "{logits: 4×7×11, states: 4×7×5}"
    assert tangled["lstm"].output == "(4×7×5, (1×4×5, 1×4×5))"
    assert tangled.inputs == "int64 4×6"
    shrinking = nn.Sequential(nn.MaxPool2d(2))
    shrinking.forward = lambda x: shrinking[0](shrinking[0](shrinking[0](x)))
    found = summary(shrinking, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    assert found["0"].output == "float64 1×1×4×4 … float64 1×1×1×1"
    many = summary(nn.Identity(), [torch.zeros(2, 3)] * 40)
    assert many.whole.output.endswith("2×3…") and len(many.whole.output) == 60


def test_a_module_that_knows_its_parent_is_no_endless_tree():
    child = foundations.ReLU()
    child.parent = parent = foundations.Sequential(foundations.Linear(2, 2), child)
    assert [part.label for part in summary(parent, torch.zeros(1, 2))] == ["", "0", "1"]


# ── memory ────────────────────────────────────────────────────────────────────────────────────


def test_what_backward_needs_is_counted_once():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7), nn.Sigmoid(), nn.Dropout())
    found = summary(model, torch.zeros(10, 3))
    # the first layer needs the inputs, which count as such; the ReLU's output serves two layers
    assert {part.name: part.kept for part in found} == {
        "": 4 * 10 * (5 + 7), "0": 0, "1": 4 * 10 * 5, "2": 0, "3": 4 * 10 * 7, "4": 0,
    }  # fmt: skip
    assert summary(model.requires_grad_(False), torch.zeros(10, 3)).kept == 0
    assert summary(model.double(), torch.zeros(10, 3).double()).kept == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_does_not_depend_on_the_callers_mode(mode):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    with mode():
        found = summary(model, torch.zeros(2, 3))
        assert not torch.is_grad_enabled()
    assert found.kept == 4 * 2 * 5


def test_checkpointing_keeps_less():
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(6, 6), body

        def forward(self, x):
            return checkpoint(self.body, self.first(x), use_reentrant=False)

    kept = summary(nn.Sequential(nn.Linear(6, 6), body), torch.zeros(8, 6)).kept
    assert kept == 3 * 4 * 8 * 6
    assert summary(Saving(), torch.zeros(8, 6)).kept == 4 * 8 * 6


def test_what_is_thrown_away_is_not_kept():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.wasted = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(5):
                self.wasted(x).exp()
            return self.used(x).exp()

    found = summary(Wasteful(), torch.zeros(6, 4))
    assert found.kept == 4 * 6 * 4


# ── models of every kind ──────────────────────────────────────────────────────────────────────


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, scale=None):
        y = self.linear(x)
        return y if scale is None else y * scale


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.zeros(2, 3), torch.ones(4)),
        ((torch.zeros(2, 3), torch.ones(4)),),
        ({"scale": torch.ones(4), "x": torch.zeros(2, 3)},),
    ],
)
def test_inputs_are_given_as_the_learner_gives_them(inputs):
    assert summary(Takes(), *inputs).whole.output == "2×4"


@pytest.mark.parametrize("sizes", [((2, 3),), (2, 3), ([2, 3],), (torch.Size([2, 3]),)])
def test_sizes_in_place_of_tensors_are_refused_with_what_to_write(sizes):
    with pytest.raises(SetupError, match=r"needs tensors(.|\n)*torch\.zeros\(2, 3\)"):
        summary(Takes(), *sizes)


def test_a_class_is_no_model():
    with pytest.raises(SetupError, match="give an instance"):
        summary(nn.ReLU, torch.zeros(2, 3))


def test_a_lazy_model_stays_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    state = torch.get_rng_state()
    found = summary(model, torch.zeros(5, 3, 6, 6))
    assert found.n_params == 4 * 27 + 4 + 8 + 64 * 2 + 2
    assert found["3"].multiply_adds == 5 * 64 * 2
    assert type(model[0]) is nn.LazyConv2d
    assert model[0].has_uninitialized_params()
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_from_scratch_has_a_summary_too():
    model = foundations.Sequential(
        foundations.Linear(6, 8), foundations.ReLU(), foundations.Linear(8, 3)
    )
    found = summary(model, torch.zeros(5, 6))
    assert [part.kind for part in found] == ["Sequential", "Linear", "ReLU", "Linear"]
    assert found.n_params == 6 * 8 + 8 + 8 * 3 + 3
    assert found.multiply_adds == 5 * (6 * 8 + 8 * 3)
    assert [part.output for part in found] == ["5×3", "5×8", "5×8", "5×3"]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("way", ["compiled in place", "wrapped"])
def test_a_compiled_model_is_looked_at_as_it_was_written(way):
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(graph) or graph(*args)

    model, x = Takes(), torch.zeros(2, 3)
    expected = repr(summary(model, x))
    torch.compiler.reset()
    if way == "wrapped":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    model(x)
    assert len(ran) == 1
    assert repr(summary(model, x)) == expected
    assert len(ran) == 1
    model(x)
    assert len(ran) == 2


def test_a_forward_of_the_instances_own_is_called_and_kept():
    model = nn.Linear(3, 4)
    own = model.forward = lambda x: F.linear(x, model.weight[:2])
    assert summary(model, torch.zeros(5, 3)).whole.output == "5×2"
    assert vars(model)["forward"] is own


def test_numbers_on_the_meta_device_are_those_of_real_tensors():
    for make, x in (MODELS["resnet"], MODELS["attention"]):
        real = summary(make(), x)
        with torch.device("meta"):
            meta = summary(make(), x)  # the inputs follow the model
        # what is kept differs a little: a backend has its own ways
        assert [replace(part, kept=0, parts=()) for part in real] == [
            replace(part, kept=0, parts=()) for part in meta
        ]


def test_hooks_of_the_users_own_act_as_ever():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_pre_hook(lambda module, inputs: (model[0](inputs[0]).exp(),))
    model[0].register_forward_hook(lambda module, inputs, output: output[:, :2] @ torch.ones(2, 3))
    found = summary(model, torch.zeros(5, 3))
    assert found["0"].n_calls == 2
    assert found.whole.output == "5×3"
    assert found["0"].multiply_adds == 2 * 5 * 9


# ── nothing is left ───────────────────────────────────────────────────────────────────────────


def test_the_model_is_free_afterwards():
    model = Tangled()
    look, seen = summary(model, TOKENS), weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert look.n_params


@pytest.mark.parametrize("fails", [False, True])
def test_a_look_leaves_no_trace_even_where_the_model_fails(fails):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(5 if fails else 4, 2))
    model[1].eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError):
                summary(model, x)
        else:
            summary(model, x)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(param.grad is None and not param._backward_hooks for param in model.parameters())
    assert x.grad is None
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not nn.modules.module._global_forward_hooks


# ── a model that fails ────────────────────────────────────────────────────────────────────────

FAILURE = """\
how far the model came:
                        output   parameters  multiply-adds  kept
Sequential              -               418         25.3 k     -
├─ 0        Sequential  2×4×8×8          48         4.61 k     -
└─ 1        Sequential  -               370         20.7 k     -
   ├─ 0     Conv2d      2×8×6×6         296         20.7 k     -
   └─ 1     Linear      -                74              -     -  failed here, given 2×8×6×6"""


def test_a_model_that_fails_tells_how_far_it_came():
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(36, 2), nn.ReLU())
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        summary(nn.Sequential(first, second, nn.Flatten()), torch.zeros(2, 1, 8, 8))
    [note] = caught.value.__notes__
    assert note == FAILURE


def test_an_error_that_the_model_catches_itself_is_no_failure():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, x):
            try:
                return self.narrow(x)
            except RuntimeError:
                return self.wide(x)

    found = summary(Careful(), torch.zeros(4, 5))
    assert found["wide"].output == found.whole.output == "4×2"
    assert found["narrow"].note == ""
    model = nn.Sequential(Careful(), nn.Linear(9, 9))
    with pytest.raises(RuntimeError) as caught:
        summary(model, torch.zeros(4, 5))
    assert caught.value.__notes__[0].splitlines()[-1].endswith("failed here, given 4×2")


# ── as text ───────────────────────────────────────────────────────────────────────────────────

TEXT = """\
called with float32 10×1×8×8
                         output    parameters  multiply-adds      kept
Sequential               10×3             243         7.68 k  5.00 KiB
├─ 0        Sequential   10×4×4×4          48         5.76 k  5.00 KiB
│  ├─ 0     Conv2d       10×4×4×4          40         5.76 k         -
│  ├─ 1     BatchNorm2d  10×4×4×4           8              -  2.50 KiB
│  └─ 2     ReLU         10×4×4×4           -              -  2.50 KiB
├─ 1        Flatten      10×64              -              -         -
└─ 2        Linear       10×3             195         1.92 k         -  frozen

parameters     243, 195 of them frozen
multiply-adds  7.68 k in one pass forward
memory         parameters 972 B, buffers 40 B; kept for backward 5.00 KiB"""


def small() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(body, nn.Flatten(), nn.Linear(64, 3).requires_grad_(False))


def test_the_table_in_full():
    found = summary(small(), torch.zeros(10, 1, 8, 8))
    assert str(found) == repr(found) == TEXT


def test_depth_says_how_much_is_printed_and_changes_no_number():
    x = torch.zeros(10, 1, 8, 8)
    full, short = summary(small(), x), summary(small(), x, depth=1)
    assert list(full) == list(short)
    lines = [line.split() for line in str(full).splitlines()]
    assert [line.split() for line in str(short).splitlines()] == [
        line for line in lines if line[:1] != ["│"]
    ]
    assert len(str(summary(small(), x, depth=0)).splitlines()) == len(lines) - 6


@pytest.mark.parametrize("depth", ["all", -1, 1.5])
def test_a_depth_is_a_whole_number_or_none(depth):
    with pytest.raises(SetupError, match="depth must be 0 or more"):
        summary(nn.Linear(2, 3), torch.zeros(1, 2), depth=depth)


def test_a_part_is_found_by_its_name(tangled):
    assert tangled["attention.qkv"].kind == "Linear"
    assert tangled[""] is tangled.whole
    with pytest.raises(UnknownName, match=r"did you mean 'attention\.qkv'"):
        tangled["attention.qvk"]


def test_numbers_are_told_with_three_digits():
    amounts = [0, 7, 999, 1000, 9994, 9995, 99_950, 999_499, 999_500, 1.5e12, 2.5e18]
    assert list(map(amount, amounts)) == [
        "0", "7", "999", "1.00 k", "9.99 k", "10.0 k", "100 k", "999 k", "1.00 M", "1.50 T",
        "2500 P",
    ]  # fmt: skip
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 MiB",
    ]
