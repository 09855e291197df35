"""The record: columns, slices, the best row, and files that come back as they were."""

import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import Record
from pellucid.errors import DataError, DataNotFound, UnknownName
from pellucid.record import Table

any_float = st.floats(allow_nan=True, allow_infinity=True)


def table(**columns):
    filled = Table()
    filled.extend(columns, len(next(iter(columns.values()))))
    return filled


def test_a_column_is_an_array_of_its_own():
    numbers = table(a=[1, 2, 3])
    column = numbers["a"]
    assert column.dtype == np.float64 and column.tolist() == [1, 2, 3]
    column[0] = 9
    assert numbers["a"].tolist() == [1, 2, 3]
    numbers.append({"a": 4})  # an array that shared memory would forbid this
    assert numbers.last("a") == 4


def test_a_slice_is_a_table():
    numbers = table(a=range(10), b=range(10, 20))
    part = numbers[-3:]
    assert len(part) == 3 and part["a"].tolist() == [7, 8, 9] and part["b"].tolist() == [17, 18, 19]
    assert numbers[::4]["a"].tolist() == [0, 4, 8] and len(numbers[::4]) == 3
    assert len(numbers[10:]) == 0 and list(numbers[10:]) == ["a", "b"]
    assert len(Table()[1:]) == 0
    part.append({"a": 0})
    assert len(numbers) == 10


def test_where_a_column_has_no_value_it_is_nan():
    numbers = table(a=[1, 2])
    numbers.append({"b": 5})
    numbers.append({"a": 3, "b": 6})
    np.testing.assert_array_equal(numbers["a"], [1, 2, math.nan, 3])
    np.testing.assert_array_equal(numbers["b"], [math.nan, math.nan, 5, 6])
    assert list(numbers) == ["a", "b"] and "b" in numbers and "c" not in numbers


@given(st.lists(st.dictionaries(st.sampled_from("abc"), any_float), max_size=12))
@settings(deadline=None, max_examples=80)
def test_a_table_is_a_list_of_rows(rows):
    numbers = Table()
    for row in rows:
        numbers.append(row)
    assert len(numbers) == len(rows)
    for name in numbers:
        np.testing.assert_array_equal(numbers[name], [row.get(name, math.nan) for row in rows])


def test_the_best_row_is_low_for_losses_and_errors_and_high_for_the_rest():
    numbers = table(**{
        "valid/loss": [3, 1, 2], "valid/error_rate": [0.5, 0.6, 0.1],
        "valid/accuracy": [0.1, 0.9, 0.3],
    })  # fmt: skip
    assert numbers.best_row("valid/loss") == 1
    assert numbers.best_row("valid/error_rate") == 2
    assert numbers.best_row("valid/accuracy") == 1
    assert numbers.best_row("valid/loss", since=2) == 2
    assert numbers.best_row("valid/loss", since=3) is None


def test_the_best_row_passes_over_nan_and_keeps_the_first_of_equals():
    nan = math.nan
    assert table(loss=[nan, 2, nan, 1, 1]).best_row("loss") == 3
    assert table(loss=[nan, nan]).best_row("loss") is None
    assert table(accuracy=[nan, 0.5, 0.5]).best_row("accuracy") == 1


def test_an_infinite_loss_is_never_the_best():
    assert table(loss=[math.inf, math.inf]).best_row("loss") is None
    assert table(loss=[math.inf, 5.0]).best_row("loss") == 1


def test_a_small_improvement_does_not_count():
    losses = table(loss=[1.0, 0.95, 0.93, 0.80])
    assert losses.best_row("loss", min_delta=0.1) == 3
    assert losses[:3].best_row("loss", min_delta=0.1) == 0
    assert losses[:3].best_row("loss", min_delta=0.04) == 1
    assert table(accuracy=[0.5, 0.55, 0.7]).best_row("accuracy", min_delta=0.1) == 2


def test_an_unknown_column_names_the_nearest():
    numbers = table(**{"valid/loss": [1], "valid/accuracy": [2]})
    with pytest.raises(UnknownName, match="did you mean 'valid/loss'"):
        numbers["valid/los"]
    with pytest.raises(UnknownName, match="train first"):
        Table()["train/loss"]
    with pytest.raises(UnknownName, match="no column 'lr'"):
        numbers.last("lr")


def filled_record():
    record = Record()
    record.batches.extend({"epoch": [0, 0], "train/loss": [2.5, math.inf], "lr": [0.1, 1 / 3]}, 2)
    record.epochs.append({"train/loss": 2.0, "valid/loss": math.nan, "seconds": 1.5})
    return record


def test_a_record_finds_a_column_by_batch_else_by_epoch():
    record = filled_record()
    assert record["train/loss"].tolist() == [2.5, math.inf]
    assert record["seconds"].tolist() == [1.5]
    with pytest.raises(UnknownName, match="did you mean 'train/loss'"):
        record["train_loss"]


def test_a_column_that_only_epochs_have_is_suggested_too():
    with pytest.raises(UnknownName, match="did you mean 'valid/loss'"):
        filled_record()["valid/los"]


def same(a, b):
    for name in ("batches", "epochs"):
        one, other = getattr(a, name), getattr(b, name)
        assert list(one) == list(other) and len(one) == len(other)
        for column in one:
            np.testing.assert_array_equal(one[column], other[column])


def test_a_saved_record_comes_back_with_nan_and_infinities(tmp_path):
    record = filled_record()
    path = record.save(tmp_path / "run.json")
    assert path == tmp_path / "run.json"
    loaded = Record.load(path)
    same(loaded, record)
    loaded.epochs.append({"train/loss": 1.0})
    assert len(loaded.epochs) == 2


@given(st.lists(any_float, max_size=8))
@settings(deadline=None, max_examples=40)
def test_every_float_survives_saving_to_the_bit(tmp_path_factory, values):
    record = Record()
    record.batches.extend({"a": values}, len(values))
    same(Record.load(record.save(tmp_path_factory.mktemp("record") / "run.json")), record)


def test_an_empty_record_survives_saving(tmp_path):
    same(Record.load(Record().save(tmp_path / "run.json")), Record())


def test_a_record_pickles():
    same(pickle.loads(pickle.dumps(filled_record())), filled_record())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "3",
        "{}",
        '{"format": "other"}',
        '{"format": "pellucid record 1"}',
        '{"format": "pellucid record 1", "batches": {}}',
        '{"format": "pellucid record 1", "batches": 3, "epochs": {}}',
        '{"format": "pellucid record 1", "batches": {"a": "text"}, "epochs": {}}',
        '{"format": "pellucid record 1", "batches": {"a": [1], "b": [1, 2]}, "epochs": {}}',
        '{"format": "pellucid record 1", "batches": {"a": [null]}, "epochs": {}}',
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(DataError, match="This file is no record") as caught:
        Record.load(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_short_is_refused(tmp_path):
    path = filled_record().save(tmp_path / "run.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="This file is no record"):
        Record.load(path)


def test_a_file_of_bytes_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="This file is no record"):
        Record.load(path)


@pytest.mark.parametrize("name", ["missing.json", ""])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DataNotFound) as caught:
        Record.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_the_file_is_json_that_anyone_can_read(tmp_path):
    record = Record()
    record.epochs.append({"train/loss": 0.5})
    plain = json.loads(record.save(tmp_path / "run.json").read_text())
    assert plain == {
        "format": "pellucid record 1",
        "batches": {},
        "epochs": {"train/loss": [0.5]},
    }


def test_tables_and_records_say_what_they_hold():
    assert repr(Table()) == "Table(0 rows: no columns)"
    assert repr(table(a=[1, 2], b=[3, 4])) == "Table(2 rows: a, b)"
    assert repr(Record()) == "Record(0 epochs, 0 batches)"
    assert repr(filled_record()) == "Record(1 epochs, 2 batches, train/loss 2, valid/loss nan)"


FINE = st.sampled_from([0.1, 1e300, float("nan"), float("inf"), -1.0])
PIECES = st.lists(
    st.tuples(st.sampled_from(["same", "counted", "single", "fine"]), st.integers(0, 1500), FINE),
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(PIECES)
def test_a_column_keeps_every_value_exactly_however_little_memory_it_takes(pieces):
    table, expected = Table(), []
    for kind, n, fine in pieces:
        values = {
            "same": [fine] * n,
            "counted": [float(i) for i in range(n)],
            "single": np.linspace(-1, 1, n, dtype=np.float32).tolist(),
            "fine": [0.5, fine] * (n // 2) + [fine] * (n % 2),
        }[kind]
        table.extend({"x": values}, n)
        expected += values
    if pieces:
        assert table["x"].dtype == np.float64
        np.testing.assert_array_equal(table["x"], np.array(expected, dtype=np.float64))
        np.testing.assert_array_equal(table[-1100:]["x"], table["x"][-1100:])
    if expected:
        assert table.last("x") == expected[-1] or np.isnan(expected[-1])
        assert str(table[0]["x"]) == str(float(expected[0]))


def test_a_long_run_takes_few_bytes_a_batch():
    # nothing for the epoch and a constant rate, two bytes for the batch, four for a loss
    table = Table()
    losses = np.random.default_rng(0).random(1000, dtype=np.float32).tolist()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for epoch in range(100):
        columns = {"epoch": [epoch] * 1000, "batch": range(1000), "lr": [0.1] * 1000}
        table.extend({**columns, "train/loss": losses}, 1000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 100_000 * 8
