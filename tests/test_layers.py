"""The record of layers: joined rows equal the union, it saves and loads, it draws for any size."""

import gc
import io
import json
import math
import pickle
import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from pellucid import Record, layers_plot
from pellucid.errors import DataError, UnknownName
from pellucid.histograms import ACTIVATIONS, GRADIENTS
from pellucid.layers import LayerRecord
from pellucid.meters import FIELDS

N_BINS = ACTIVATIONS.n_bins
Recording = tuple[np.ndarray, np.ndarray, np.ndarray]


def row_of(values: np.ndarray, saturated: float = math.nan) -> np.ndarray:
    """Return what meters would measure of some values, all of them in the sample."""
    n = len(values)
    if not n:
        sums = [0, 0, 0, math.inf, -math.inf, 0, 0]
    else:
        spread = ((values - values.mean()) ** 2).sum()
        squares = (values**2).sum()
        sums = [n, values.sum(), squares, values.min(), values.max(), n, spread]
    counts = np.zeros(N_BINS)
    np.add.at(counts, np.searchsorted(ACTIVATIONS.edges(), values, side="right") - 1, 1)
    return np.concatenate([[*sums, saturated], counts]).astype(np.float32)


def recordings(n: int, n_layers: int = 2, n_parameters: int = 3, seed: int = 0) -> list[Recording]:
    """Make up recordings of whole numbers, so that all sums are exact; some hold nothing."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        rows = [
            [
                row_of(random.integers(-9, 10, random.integers(0, 5)).astype(float), layer)
                for layer in range(n_layers)
            ]
            for _ in range(2)
        ]
        dead = random.integers(0, 5, (2, n_layers)) / 4
        updates = random.integers(0, 9, (n_parameters, 3)).astype(float)
        dead[random.random(dead.shape) < 0.2] = math.nan
        updates[random.random(updates.shape) < 0.2] = math.nan
        made.append((np.array(rows), dead, updates))
    return made


def filled(made: list[Recording], capacity: int = 192) -> LayerRecord:
    n_layers, n_parameters = made[0][0].shape[1], len(made[0][2])
    layers = LayerRecord(
        [f"block.{i}" for i in range(n_layers)],
        ["Linear"] * n_layers,
        [f"block.{i}.weight" for i in range(n_parameters)],
        capacity,
    )
    for batch, recording in enumerate(made):
        layers.append((batch, batch), *recording)
    return layers


# ── joining ───────────────────────────────────────────────────────────────────────────────────


def nan_mean(values: list[np.ndarray]) -> np.ndarray:
    told = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / told.sum(axis=0)


@given(st.integers(1, 90), st.integers(1, 6).map(lambda half: 2 * half), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_joined_row_is_one_recording_of_all_its_batches(n, capacity, seed):
    made = recordings(n, seed=seed)
    layers = filled(made, capacity)
    assert layers.batches[0, 0] == 0 and layers.batches[-1, 1] == n - 1
    assert (layers.batches[1:, 0] == layers.batches[:-1, 1] + 1).all()
    for i, (first, last) in enumerate(layers.batches):
        part = made[first : last + 1]
        for which, kind in enumerate(("activations", "gradients")):
            sums, histograms = (found[i] for found in layers.of_kind(kind))
            rows = np.stack([rows[which] for rows, _, _ in part]).astype(float)
            for j, field in enumerate(FIELDS):
                how = {"low": np.min, "high": np.max}.get(field, np.sum)
                np.testing.assert_array_equal(sums[:, j], how(rows[..., j], axis=0))
            np.testing.assert_array_equal(histograms, rows[..., len(FIELDS) :].sum(0))
            dead = nan_mean([dead[which] for _, dead, _ in part])
            np.testing.assert_allclose(layers[f"{kind}/dead"][i], dead)
        updates = nan_mean([updates for _, _, updates in part])
        for j, name in enumerate(("norm", "gradient", "update")):
            np.testing.assert_allclose(layers[f"parameters/{name}"][i], updates[:, j])


@pytest.mark.parametrize("capacity", [2, 4, 10, 192])
@pytest.mark.parametrize("n", [1, 191, 192, 193, 2000])
def test_all_of_a_long_run_has_one_resolution(n, capacity):
    nothing = np.zeros((2, 1, len(FIELDS) + N_BINS)), np.zeros((2, 1)), np.zeros((1, 3))
    layers = filled([nothing] * n, capacity)
    lengths = layers.batches[:, 1] - layers.batches[:, 0] + 1
    assert lengths.sum() == n
    assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0]
    assert math.log2(lengths[0]).is_integer() or len(layers) == 1
    assert min(n, capacity / 2) <= len(layers) <= capacity


def test_memory_is_taken_at_the_start():
    made = recordings(300, seed=1)
    layers = filled(made[:1])
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for batch in range(1, 3000):
            layers.append((batch, batch), *made[batch % 300])
        gc.collect()  # Python keeps small tuples for use again
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 10_000 and most - before < 60_000
    assert layers.batches[-1, 1] == 2999


def test_192_rows_take_what_is_said():
    def size(n_layers, n_parameters):
        tracemalloc.start()
        layers = LayerRecord(["a"] * n_layers, ["A"] * n_layers, ["p"] * n_parameters)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert not len(layers)
        return taken

    nothing = size(0, 0)
    assert (size(10, 0) - nothing) / 10 == pytest.approx(230e3, rel=0.03)
    assert (size(0, 10) - nothing) / 10 == pytest.approx(9e3, rel=0.05)


@pytest.mark.parametrize("capacity", [0, 1, 3, -2])
def test_an_odd_capacity_is_refused(capacity):
    with pytest.raises(ValueError, match="even number"):
        LayerRecord(["a"], ["A"], ["p"], capacity)


# ── what is shown ─────────────────────────────────────────────────────────────────────────────


def test_statistics_are_what_they_are_called():
    values = np.array([-2.0, 0.0, 0.0, 0.0005, 6.0])
    rows = np.stack([row_of(values, 1), row_of(np.zeros(0))])[:, None]
    layers = filled([(rows, np.array([[0.25], [math.nan]]), np.array([[3.0, 2.0, 1e-3]]))])
    assert layers["activations/mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert layers["activations/sd"] == pytest.approx(values.std(), rel=1e-6)
    assert layers["activations/abs_max"].tolist() == [[6.0]]
    assert layers["activations/near_zero"] == pytest.approx(0.6)
    assert layers["activations/saturated"] == pytest.approx(0.2)
    assert layers["activations/dead"].tolist() == [[0.25]]
    histogram = layers["activations/histogram"]
    assert histogram.shape == (1, 1, N_BINS) and histogram.sum() == pytest.approx(1)
    for name in ("mean", "sd", "abs_max", "near_zero", "saturated", "dead", "histogram"):
        assert np.isnan(layers[f"gradients/{name}"]).all()
    updates = [layers[f"parameters/{name}"].item() for name in ("norm", "gradient", "update")]
    assert updates == [3.0, 2.0, 1e-3]
    # the extreme may be a negative one
    rows[0, 0] = row_of(-values)
    assert filled([(rows, np.zeros((2, 1)), np.zeros((1, 3)))])["activations/abs_max"] == 6


def test_names_are_listed_and_an_unknown_one_names_the_nearest():
    layers = filled(recordings(3))
    assert len(list(layers)) == 17 and all(name in layers for name in layers)
    assert "activations/median" not in layers
    assert all(len(layers[name]) == len(layers) == 3 for name in layers)
    with pytest.raises(UnknownName, match="did you mean 'activations/near_zero'"):
        layers["activations/nearzero"]
    with pytest.raises(UnknownName, match="did you mean 'gradients'"):
        layers.edges("gradient")
    with pytest.raises(UnknownName, match="did you mean 'activations'"):
        layers.plot_histograms("activation")
    with pytest.raises(UnknownName, match="no statistic 3"):
        layers[3]  # ty: ignore[invalid-argument-type]
    with pytest.raises(UnknownName, match="did you mean 'activations/sd'"):
        layers["sd"]
    with pytest.raises(UnknownName, match=r'layers\["activations/sd"\]\[:, 1\]'):
        layers[layers.names[1]]


def test_edges_are_those_of_the_kind():
    layers = filled(recordings(1))
    assert layers.edges("activations").tolist() == ACTIVATIONS.edges().tolist()
    assert layers.edges("gradients").tolist() == GRADIENTS.edges().tolist()


def test_what_is_given_is_a_copy():
    layers = filled(recordings(3))
    for name in layers:
        layers[name][:] = -1
    layers.batches[:] = -1
    for name in layers:
        assert not (layers[name] == -1).all()
    assert (layers.batches >= 0).all()


@pytest.mark.filterwarnings("error")
def test_nan_and_infinities_join_without_a_warning_and_are_seen():
    odd = row_of(np.array([100.0])), row_of(np.array([1.0]))
    odd[0][:7] = [1, math.inf, math.inf, math.nan, math.inf, 1, math.nan]
    rows = np.stack([np.stack(odd)] * 2)
    opposite = rows.copy()
    opposite[:, 0, 1] = -math.inf
    layers = filled([(rows, np.zeros((2, 2)), np.zeros((1, 3))),
                     (opposite, np.zeros((2, 2)), np.zeros((1, 3)))] * 3, 2)  # fmt: skip
    assert len(layers) == 2
    for name in ("mean", "sd", "abs_max"):
        assert not np.isfinite(layers[f"activations/{name}"][:, 0]).any()
        assert np.isfinite(layers[f"activations/{name}"][:, 1]).all()


def test_a_record_of_layers_says_how_much_it_holds():
    assert repr(filled(recordings(3))) == "LayerRecord(3 rows, 2 layers, 3 parameters)"


# ── files ─────────────────────────────────────────────────────────────────────────────────────


def assert_same(one: LayerRecord, other: LayerRecord) -> None:
    assert (one.names, one.types, one.parameters) == (other.names, other.types, other.parameters)
    np.testing.assert_array_equal(one.batches, other.batches)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@given(st.integers(0, 40), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_a_saved_record_comes_back_and_goes_on(tmp_path_factory, n, seed):
    made = recordings(n + 30, seed=seed)
    record = Record()
    record.layers = filled(made[:n] or made[:1], capacity=8)
    path = record.save(tmp_path_factory.mktemp("record") / "run.json")
    loaded = Record.load(path).layers
    assert isinstance(loaded, LayerRecord)
    assert_same(loaded, record.layers)
    for batch, recording in enumerate(made[n:], n):
        for layers in (loaded, record.layers):
            layers.append((batch, batch), *recording)
    assert_same(loaded, record.layers)
    pickle.loads(pickle.dumps(record.layers))


def test_a_record_of_before_without_layers_still_loads(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"format": "pellucid record 1", "batches": {"a": [1]}, "epochs": {}}')
    record = Record.load(path)
    assert record.layers is None and record["a"].tolist() == [1]
    assert "layers" not in json.loads(Record().save(path).read_text())


SPOILT: dict[str, Any] = {
    "no table": 3,
    "a list": [],
    "nothing": {},
    "no rows": {"rows": None},
    "more rows than there are": {"rows": 4},
    "more rows than fit": {"rows": 400},
    "another number of layers": {"names": ["a"]},
    "an odd capacity": {"capacity": 7},
    "no numbers": {"arrays": {}},
    "no base 64": {"arrays": dict.fromkeys(("batches", "sums", "histograms", "updates"), "?!")},
    "no counts": {"recordings": None},
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_part_is_refused(tmp_path, name):
    record = Record()
    record.layers = filled(recordings(3))
    path = record.save(tmp_path / "run.json")
    plain = json.loads(path.read_text())
    change = SPOILT[name]
    plain["layers"] = plain["layers"] | change if isinstance(change, dict) and change else change
    path.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="no record"):
        Record.load(path)


# ── pictures ──────────────────────────────────────────────────────────────────────────────────


def to_draw(n_layers: int, n_rows: int, kind: str = "plain") -> LayerRecord:
    random = np.random.default_rng(0)
    made = []
    for i in range(n_rows):
        rows = np.array(
            [
                [row_of(random.normal(size=40) * scale, 3 * (layer % 2) or math.nan)
                 for layer in range(n_layers)]
                for scale in (1.0, 0.01)
            ]
        )  # fmt: skip
        dead, updates = random.random((2, n_layers)), random.random((n_layers, 3)) * 1e-3
        if kind == "nothing measured in every other" and i % 2:
            rows[:], dead[:], updates[:] = row_of(np.zeros(0)), math.nan, math.nan
        if kind == "no gradients":
            rows[1], dead[1], updates[:, 1] = row_of(np.zeros(0)), math.nan, math.nan
        if kind == "NaN":
            rows[..., 1:5], updates[:] = math.nan, math.nan
            rows[..., len(FIELDS) :], rows[..., -1] = 0, 40
        if kind == "infinite":
            rows[..., 1:5], updates[:] = math.inf, math.inf
        if kind == "all zero":
            rows[:], dead[:], updates[:] = row_of(np.zeros(40)), 1, 0
        made.append((rows, dead, updates))
    return filled(made)


PLOTS = {
    "plot": (),
    "plot_histograms": (),
    "plot_histograms of gradients": ("gradients",),
    "plot_levels": (),
    "plot_levels of gradients": ("gradients",),
    "plot_shares": (),
    "plot_updates": (),
}


TOGETHER = ("plot", "plot_histograms of gradients")
"""These two are drawn from all the parts that there are."""


def draw(layers: LayerRecord, name: str) -> Figure:
    drawing = getattr(layers, name.split()[0])(*PLOTS[name])
    assert isinstance(drawing, Figure)
    drawing.savefig(io.BytesIO(), format="png", dpi=30)
    return drawing


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize(("n_layers", "n_rows"), [(1, 1), (5, 3)])
def test_plots_draw_for_few_layers_and_for_one_row(n_layers, n_rows, name):
    draw(to_draw(n_layers, n_rows), name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*TOGETHER, "plot_levels", "plot_shares"])
def test_plots_draw_for_fifty_layers(name):
    draw(to_draw(50, 2), name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("kind", ["nothing measured in every other", "NaN", "infinite", "all zero"])
def test_plots_draw_what_is_odd(kind, name):
    draw(to_draw(2, 3, kind), name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PLOTS)
def test_without_gradients_the_rest_is_drawn(name):
    layers = to_draw(2, 3, "no gradients")
    if "gradients" in name:
        with pytest.raises(DataError, match="No gradients were recorded"):
            draw(layers, name)
    else:
        draw(layers, name)


@pytest.mark.parametrize("name", [name for name in PLOTS if name != "plot_updates"])
def test_a_record_of_nothing_says_what_to_do(name):
    with pytest.raises(DataError, match=r"train with callbacks\.Telemetry"):
        draw(LayerRecord(["a"], ["A"], ["p"]), name)


def test_a_line_has_the_colour_of_its_layer_in_every_panel():
    layers = to_draw(4, 3)
    sums, histograms = layers.of_kind("gradients")  # what is frozen has no gradients
    sums[:, :2, :3], sums[:, :2, 5], histograms[:, :2] = 0, 0, 0
    drawing = layers.plot()
    lines = [axes.lines for axes in drawing.axes if len(axes.lines) == 4]
    assert len(lines) == 3
    for three in zip(*lines, strict=True):
        assert len({(line.get_label(), tuple(line.get_color())) for line in three}) == 1


def test_a_picture_shows_each_layer_that_was_measured():
    layers = to_draw(6, 2)
    sums, histograms = layers.of_kind("activations")
    sums[:, 4, :3], sums[:, 4, 5], histograms[:, 4] = 0, 0, 0
    titles = [axes.get_title() for axes in draw(layers, "plot_histograms").axes]
    shown = [f"block.{i} Linear" for i in (0, 1, 2, 3, 5)]
    assert [title for title in titles if title] == shown


def test_a_parameter_that_rests_looks_like_none_that_is_unknown_or_usual():
    layers = filled(recordings(1, n_parameters=4))
    layers._updates[0, :, 2], layers._n_updates[0, :, 2] = [0.0, 1e-3, 1e-7, math.nan], 1
    axes, _ = draw(layers, "plot_updates").axes
    [image] = axes.collections
    assert isinstance(image, QuadMesh)
    colours = image.to_rgba(image.get_array()).reshape(4, 4)[:, :3]
    np.testing.assert_array_equal(colours[0], colours[2])  # below the scale
    assert abs(colours[0] - colours[1]).max() > 0.5
    assert image.get_array().mask.ravel().tolist() == [False] * 3 + [True]
    unknown = np.array(axes.get_facecolor()[:3])
    for scale in ("RdBu_r", "Reds"):
        assert abs(colormaps[scale](np.linspace(0, 1, 99))[:, :3] - unknown).max(1).min() > 0.1


@pytest.mark.parametrize("n", [5, 60, 300])
def test_the_names_beside_a_map_do_not_lie_one_over_another(n):
    layers = filled(recordings(1, n_parameters=n))
    drawing = layers.plot_updates()
    drawing.canvas.draw()
    [names, *_] = [axes.get_yticklabels() for axes in drawing.axes]
    boxes = sorted((name.get_window_extent() for name in names), key=lambda box: box.y0)
    assert len(names) >= min(n, 60)
    assert all(one.y1 <= other.y0 + 1 for one, other in pairwise(boxes))


def test_a_long_name_keeps_its_numbers_and_its_end():
    name = "encoder.layers.11.attention.projection.weight"
    assert layers_plot._shortened(name, 45) == name
    assert layers_plot._shortened(name, 36) == "e.l.11.attention.projection.weight"
    assert layers_plot._shortened(name, 26) == "e.l.11.a.projection.weight"
    assert layers_plot._shortened(name, 20) == "e.l.11.a.p.weight"
    assert layers_plot._shortened("a_name_that_has_one_part Linear", 10) == "…rt Linear"
    assert len(layers_plot._shortened("block.0.1 AdaptiveAvgPool2d", 24)) <= 24
