"""Meters: sums over every value equal torch's; units, samples, several calls, compiled code."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_sequence

from pellucid import foundations
from pellucid.hooks import leaves
from pellucid.layers import LayerRecord
from pellucid.meters import (
    FIELDS,
    Meters,
    bounds,
    sum_of_squares,
    unit_extremes,
    units_last,
)
from pellucid.samples import N_SAMPLED

CPU = torch.device("cpu")


class Say(nn.Module):
    """Give what it is told, whatever comes in; it has units in the second dimension."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, x=None):
        return self.outputs.pop(0)


def measured(module: nn.Module, *inputs: torch.Tensor, calls: int = 1) -> Meters:
    meters = Meters({"a": module}, CPU)
    with meters:
        meters.recording = True
        for _ in range(calls):
            out = module(*inputs)
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.sum().backward()
    return meters


def layers_of(meters: Meters) -> LayerRecord:
    """Let the record work out what the sums stand for."""
    layers = LayerRecord(meters.names, meters.types, [])
    no_updates = torch.zeros(0, 3).numpy()
    layers.append((0, 0), meters.rows.numpy(), meters.take_dead().numpy(), no_updates)
    return layers


def statistics(*outputs: torch.Tensor) -> dict[str, float]:
    layers = layers_of(measured(Say(*outputs), calls=len(outputs)))
    names = ("mean", "sd", "abs_max", "near_zero", "dead")
    return {name: layers[f"activations/{name}"][0, 0] for name in names}


def assert_as_torch(found: dict[str, float], x: torch.Tensor) -> None:
    x = x.double()
    size = max(1.0, x.abs().max().item())
    assert found["mean"] == pytest.approx(x.mean().item(), abs=1e-5 * size)
    assert found["sd"] == pytest.approx(x.std(correction=0).item(), abs=1e-5 * size)
    assert found["abs_max"] == pytest.approx(x.abs().max().item(), rel=1e-6)


# ── means, sds, extremes ──────────────────────────────────────────────────────────────────────

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=5)
scales = st.sampled_from([1e-6, 1e-3, 1.0, 300.0])
centres = st.sampled_from([0.0, 0.5, -3.0])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(shapes, scales, centres, dtypes, st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_mean_sd_and_largest_equal_torchs(shape, scale, centre, dtype, seed):
    torch.manual_seed(seed)
    x = ((torch.randn(shape, dtype=torch.float64) + centre) * scale).to(dtype)
    assert_as_torch(statistics(x), x)


@pytest.mark.parametrize(
    "shape", [(500_000,), (64, 20_000), (3, 400_000), (2000, 500), (40, 30, 28, 28), (7, 300, 400)]
)
@pytest.mark.parametrize("centre", [0.0, 1.0])
def test_large_tensors_too(shape, centre):
    x = torch.randn(shape) + centre
    assert_as_torch(statistics(x), x)


def test_a_sum_of_squares_does_not_lose_digits():
    x = torch.randn(80, 50_000) + 1  # a norm of the whole is off by 1e-4
    exact = x.double().square().sum().item()
    assert sum_of_squares(x).item() == pytest.approx(exact, rel=5e-6)
    assert sum_of_squares(x.double()).dtype == torch.float32
    assert sum_of_squares(torch.tensor(-3.0)) == 9


def test_the_memory_format_does_not_matter():
    x = torch.randn(20, 6, 30, 31) + 1
    for other in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2]):
        assert_as_torch(statistics(other), other)
    row = torch.randn(1, 500)
    assert_as_torch(statistics(row.expand(60, 500)), row)


@pytest.mark.parametrize("n", [100, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_sd_beside_a_large_mean_is_that_of_the_sample(n, dtype):
    x = (torch.randn(100, n // 100, dtype=torch.float64) + 1e4).to(dtype)
    found = statistics(x)
    assert found["mean"] == pytest.approx(1e4, rel=1e-5)
    assert found["sd"] == pytest.approx(1, abs=0.04 if n > N_SAMPLED else 0.2)
    # exact where all values are in the sample
    if n < N_SAMPLED:
        assert found["sd"] == pytest.approx(x.double().std(correction=0).item(), rel=1e-2)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 1e-20])
def test_a_constant_has_no_spread(value):
    assert statistics(torch.full((50, 40), value))["sd"] == pytest.approx(0, abs=1e-6)


def test_half_precision_overflows_nowhere():
    x = torch.randn(300, 50).half() * 1000  # the squares are beyond half precision
    assert_as_torch(statistics(x), x)
    x = (torch.randn(300, 50) * 30 + 30_000).half()
    assert statistics(x)["sd"] == pytest.approx(x.double().std().item(), rel=0.05)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 123_456])
def test_one_nan_or_infinity_among_many_is_seen(odd, place):
    x = torch.randn(200, 1000)
    x.view(-1)[place] = odd
    found = statistics(x)
    assert not math.isfinite(found["mean"]) and not math.isfinite(found["abs_max"])
    assert not math.isfinite(found["sd"])


# ── units ─────────────────────────────────────────────────────────────────────────────────────

FORMATS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
}


@pytest.mark.parametrize("size", [(3, 4), (16, 16)], ids=["small map", "large map"])
@pytest.mark.parametrize("name", FORMATS)
def test_dead_units_are_counted_exactly(name, size):
    x = torch.randn(8, 10, *size)
    x[:, [1, 4]] = 0
    x[:, 7] = -0.3  # at rest elsewhere than at zero
    x[:, 8] = 0
    x[5, 8, 2, 3] = 1e-30  # moved once, a little
    assert statistics(FORMATS[name](x))["dead"] == pytest.approx(0.3)


def test_a_unit_is_dead_if_it_was_in_every_call():
    one, other = torch.randn(6, 4), torch.randn(6, 4)
    one[:, :2] = other[:, 1:3] = 0
    assert statistics(one, other)["dead"] == 0.25
    one[:, 1], other[:, 1] = 1.0, 2.0  # at rest, but not at one value
    assert statistics(one, other)["dead"] == 0


def test_a_nan_is_not_dead():
    x = torch.zeros(6, 4)
    x[2, 1] = math.nan
    assert statistics(x)["dead"] == 0.75


def test_units_of_a_linear_layer_are_in_the_last_dimension_of_a_convolution_in_the_second():
    x = torch.randn(5, 4, 6)
    linear, conv = nn.Linear(6, 8), nn.Conv1d(4, 8, 1)
    with torch.no_grad():
        for module in (linear, conv):
            module.weight[:2], module.bias[:2] = 0, 0
    # each followed by an activation, which goes by the layer before it
    for layer in (linear, conv):
        model = nn.Sequential(layer, nn.ReLU())
        meters = Meters(leaves(model), CPU)
        with meters:
            meters.recording = True
            model(x)
        assert meters.take_dead()[0, 0] == pytest.approx(2 / 8)
        assert meters._meters[1][0].unit_low.shape == (8,)


def test_where_units_are():
    last = [nn.Linear(2, 2), nn.LayerNorm(2), nn.RMSNorm(2), nn.Embedding(2, 2), nn.LSTM(2, 2),
            nn.Bilinear(2, 2, 2), nn.MultiheadAttention(2, 1)]  # fmt: skip
    second = [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm1d(2), nn.GroupNorm(1, 2)]
    for module in last:
        assert units_last([module, nn.ReLU(), nn.Tanh()]) == [True] * 3
    for module in second:
        assert units_last([module, nn.ReLU(), nn.Tanh()]) == [False] * 3
    assert units_last([nn.ReLU(), nn.Linear(2, 2)]) == [False, True]
    assert units_last([nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()]) == [True, False, False]


def test_where_units_of_less_common_modules_are():
    matrix = nn.Module()
    matrix.weight = nn.Parameter(torch.ones(2, 3))
    last = [matrix, spectral_norm(nn.Linear(2, 2)), nn.LazyLinear(2),
            foundations.Linear(2, 2), foundations.LayerNorm(2)]  # fmt: skip
    images = (2, 4, 4)
    second = [spectral_norm(nn.Conv1d(2, 2, 1)), nn.LazyConv2d(2, 3), nn.LayerNorm(images),
              nn.RMSNorm(images), nn.PReLU(2), foundations.Conv2d(2, 2, 1),
              foundations.LayerNorm(images), foundations.BatchNorm(2)]  # fmt: skip
    for module in last:
        assert units_last([module, nn.ReLU()]) == [True] * 2
    for module in second:
        assert units_last([module, nn.ReLU()]) == [False] * 2


@given(st.lists(st.integers(1, 6), min_size=0, max_size=5), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=80)
def test_extremes_of_units_are_those_of_each_ones_values(shape, last, wide):
    x = torch.randn([*shape, 300] if wide and not last and len(shape) > 1 else shape)
    low, high = unit_extremes(x, last)
    units = x.reshape(1, -1) if x.ndim < 2 else x.movedim(-1 if last else 1, 0).flatten(1)
    assert torch.equal(low, units.amin(1)) and torch.equal(high, units.amax(1))


def test_taking_the_dead_begins_a_new_window():
    meters = Meters({"a": nn.ReLU()}, CPU)
    assert meters.take_dead().isnan().all()
    with meters:
        meters.recording = True
        meters._modules[0](-torch.ones(3, 4))
    assert meters.take_dead()[0, 0] == 1
    assert meters.take_dead().isnan().all()


def test_calls_with_several_numbers_of_units_share_the_first_ones():
    assert statistics(torch.zeros(3, 4), torch.randn(3, 6))["dead"] == 0
    assert statistics(torch.zeros(3, 6), torch.randn(3, 4))["dead"] == pytest.approx(2 / 6)
    assert statistics(torch.zeros(3, 6), torch.tensor(1.0), torch.zeros(2))[
        "dead"
    ] == pytest.approx(5 / 6)


def test_units_that_a_window_did_not_see_do_not_count():
    meters = Meters({"a": nn.ReLU()}, CPU)
    with meters:
        meters.recording = True
        meters._modules[0](torch.randn(3, 6))
        meters.take_dead()
        meters._modules[0](torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]))
    assert meters.take_dead()[0, 0] == 0.5


class SharedActivation(nn.Module):
    """One ReLU behind a wide layer and behind a narrow one."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 5)
        self.activation, self.head = nn.ReLU(inplace=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.activation(self.narrow(self.activation(self.wide(x)))))


def test_an_activation_that_layers_of_several_widths_share():
    model = SharedActivation()
    with torch.no_grad():  # its units 1 and 2 rest behind both, 3 and 6 behind the wide one
        model.wide.bias[[1, 2, 3, 6]] = model.narrow.bias[[1, 2]] = -100
    meters = Meters(leaves(model), CPU)
    with meters:
        meters.recording = True
        for _ in range(2):
            model(torch.randn(40, 6)).sum().backward()
    i = meters.names.index("activation")
    assert meters.rows[:, i, 0].tolist() == [2 * 40 * (12 + 5)] * 2
    assert meters.take_dead()[0, i] == pytest.approx(3 / 12)


# ── what is measured ──────────────────────────────────────────────────────────────────────────


def test_several_calls_of_one_module_add_up():
    parts = [torch.randn(n, 5) * n for n in (3, 8, 1)]
    assert_as_torch(statistics(*parts), torch.cat(parts))
    meters = measured(Say(*parts), calls=3)
    assert meters.rows[0, 0, len(FIELDS) :].sum() == meters.rows[0, 0, 0] == 60


def test_gradients_are_those_of_the_outputs():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(7, 4)
    with Meters(leaves(model), CPU) as meters:
        meters.recording = True
        model(x).square().sum().backward()
    outs = [x]
    for part in (model[0], torch.relu, model[2]):
        outs.append(part(outs[-1]))
        outs[-1].retain_grad()
    outs[-1].square().sum().backward()
    layers = layers_of(meters)
    for i, out in enumerate(outs[1:]):
        assert layers["gradients/mean"][0, i] == pytest.approx(out.grad.mean().item(), abs=1e-5)
        sd = out.grad.std(correction=0).item()
        assert layers["gradients/sd"][0, i] == pytest.approx(sd, abs=1e-5)


def test_of_several_outputs_the_first_floats_are_measured():
    meters = measured(nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert meters.rows[0, 0, 0] == 40 and meters.rows[1, 0, 0] == 0
    x = torch.randn(2, 3)
    assert_as_torch(statistics({"count": torch.ones(9).long(), "out": [None, x]}), x)


def test_of_a_packed_sequence_the_values_are_measured():
    x = torch.randn(6, 3)
    assert_as_torch(statistics(pack_sequence([x[:4], x[4:]])), x)
    module = nn.LSTM(3, 4)
    meters = measured(module, pack_sequence([x[:4], x[4:]]))
    assert meters.rows[0, 0, 0] == 6 * 4 and meters._meters[0][0].unit_low.shape == (4,)


UNMEASURABLE: dict[str, Callable[[], Any]] = {
    "whole numbers": lambda: torch.ones(3).long(),
    "nothing": lambda: None,
    "text": lambda: "text",
    "empty": lambda: torch.zeros(0, 4),
    "complex": lambda: torch.ones(3) * 1j,
    "sparse": lambda: torch.ones(3, 4).to_sparse(),
    "compressed": lambda: torch.ones(3, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
    ),
    "eight bits": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "elsewhere": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", UNMEASURABLE)
def test_what_is_not_measurable_is_passed_over(name):
    meters = measured(Say(UNMEASURABLE[name]()))
    assert not meters.fired and meters.rows[0, 0, 0] == 0
    x = torch.randn(4, 3)
    assert_as_torch(statistics([UNMEASURABLE[name](), x]), x)


@pytest.mark.parametrize("first", [False, True])
def test_calls_in_inference_mode_are_measured(first):
    module = nn.Linear(3, 4)
    with Meters({"a": module}, CPU) as meters:
        meters.recording = True
        for inference in (first, not first):
            with torch.inference_mode(inference):
                module(torch.randn(5, 3))
        meters.clear()
        meters.take_dead()
        module(torch.randn(5, 3)).sum().backward()
    assert meters.rows[:, 0, 0].tolist() == [20, 20] and meters.take_dead()[0, 0] == 0


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_calls_within_a_transform_are_passed_over(transform):
    module, x = nn.Linear(3, 4), torch.randn(5, 3)
    with Meters({"a": module}, CPU) as meters:
        meters.recording = True
        expected = transform(module)(x)
        assert not meters.fired
        module(x)
    assert meters.rows[0, 0, 0] == 20
    torch.testing.assert_close(expected, transform(module)(x))


def test_only_while_recording():
    model = nn.Linear(3, 2)
    meters = Meters({"a": model}, CPU)
    x = torch.randn(4, 3)
    with meters:
        model(x).sum().backward()
        assert not meters.fired
        meters.recording = True
        out = model(x).sum()
        meters.recording = False
        out.backward()
        assert meters.rows[0, 0, 0] == 8 and meters.rows[1, 0, 0] == 0
        meters.recording = True
    assert not meters.recording and not model._forward_hooks


def test_without_gradients_only_activations_are_measured():
    with torch.no_grad():
        meters = measured(nn.Linear(3, 2), torch.randn(4, 3))
    assert meters.rows[0, 0, 0] == 8 and meters.rows[1, 0, 0] == 0


def test_clearing_begins_anew_in_the_same_memory():
    meters = measured(nn.Tanh(), torch.randn(4, 3))
    before, address = meters.rows.clone(), meters.rows.data_ptr()
    meters.clear()
    fresh = Meters({"a": nn.Tanh()}, CPU)
    assert meters.rows.data_ptr() == address and not torch.equal(before, meters.rows)
    torch.testing.assert_close(meters.rows, fresh.rows, equal_nan=True)


def test_what_was_cleared_unread_is_forgotten():
    module = nn.ReLU()
    with Meters({"a": module}, CPU) as meters:
        meters.recording = True
        module(torch.rand(6, 4) + 1)
        meters.clear()
        module(-torch.ones(3, 4))
    low, high = FIELDS.index("low"), FIELDS.index("high")
    assert meters.rows[0, 0, [low, high]].tolist() == [0, 0]
    assert meters.take_dead()[0, 0] == 1


def test_reading_adds_nothing_and_may_come_between_calls():
    modules = {"a": nn.Tanh(), "b": nn.ReLU()}
    often, once = Meters(modules, CPU), Meters(modules, CPU)
    with often, once:
        often.recording = once.recording = True
        for width in (4, 7, 2):
            x = torch.randn(5, width, requires_grad=True)
            modules["b"](modules["a"](x)).sum().backward()
            first = often.rows.clone()
            torch.testing.assert_close(often.rows, first, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(often.rows, once.rows, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(often.take_dead(), once.take_dead())


def test_measuring_does_not_bend_a_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    with Meters(leaves(model), CPU) as meters:
        meters.recording = True
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# ── saturation ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "bound"),
    [
        (nn.Tanh(), (-1, 1)), (nn.Sigmoid(), (0, 1)), (nn.Hardsigmoid(), (0, 1)),
        (nn.Hardtanh(), (-1, 1)), (nn.Hardtanh(-3, 5), (-3, 5)), (nn.Softsign(), (-1, 1)),
        (nn.ReLU6(), (-math.inf, 6)),
    ],
)  # fmt: skip
def test_saturated_is_within_1_percent_of_a_bound(module, bound):
    below, above = bounds(module)
    low, high = bound
    width = high - low if math.isfinite(low) else 6
    assert above == pytest.approx(high - 0.01 * width)
    assert below == pytest.approx(low + 0.01 * width)
    x = torch.linspace(-100, 100, 4_001).reshape(-1, 1)
    out = module(x)
    expected = ((out <= below) | (out >= above)).float().mean().item()
    assert 0 < expected < 1
    layers = layers_of(measured(module, x))
    assert layers["activations/saturated"][0, 0] == pytest.approx(expected)
    assert math.isnan(layers["gradients/saturated"][0, 0])


def test_what_has_no_bounds_is_not_saturated():
    assert bounds(nn.ReLU()) is None
    assert math.isnan(layers_of(measured(nn.ReLU(), torch.ones(3)))["activations/saturated"][0, 0])


# ── torch.compile ─────────────────────────────────────────────────────────────────────────────


def test_compiled_it_is_one_graph_a_mode_and_counts_the_same():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(300, 80), nn.ReLU(inplace=True), nn.Linear(80, 3))
    twin, backend = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    with Meters(leaves(model), CPU) as ours, Meters(leaves(twin), CPU) as eager:
        # the second and the last, of other sizes, have more values than a sample takes
        for batch, n in enumerate([256, 256, 230, 256, 230]):
            x = torch.randn(n, 300)
            for meters, module in ((ours, compiled), (eager, twin)):
                meters.clear()
                meters.recording = batch != 3
                module(x).square().sum().backward()
            kinds = slice(0, 2 if batch else 1)  # the gradients of the first are left out
            torch.testing.assert_close(
                ours.rows[kinds], eager.rows[kinds], rtol=1e-4, atol=1e-3, equal_nan=True
            )
            torch.testing.assert_close(ours.take_dead()[0], eager.take_dead()[0], equal_nan=True)
    assert not torch._dynamo.utils.counters["graph_break"]
    # once without the memory for gradients, once with; once for any size; once not recorded
    assert backend.frame_count <= 4
    before = ours.rows.clone()
    compiled(torch.randn(256, 300)).sum().backward()
    torch.testing.assert_close(ours.rows, before, equal_nan=True)
    torch.compiler.reset()


def test_compiled_a_shared_activation_counts_the_same():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = SharedActivation()
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with Meters(leaves(model), CPU) as ours, Meters(leaves(twin), CPU) as eager:
        ours.recording = eager.recording = True
        for batch in range(3):
            x = torch.randn(7, 6)
            for meters, module in ((ours, compiled), (eager, twin)):
                meters.clear()
                module(x).square().sum().backward()
            kinds = slice(0, 2 if batch else 1)
            torch.testing.assert_close(
                ours.rows[kinds], eager.rows[kinds], rtol=1e-4, atol=1e-3, equal_nan=True
            )
            # the gradients of the first batch are left out as a whole, not in part
            assert batch or not ours.rows[1, :, 0].any()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
