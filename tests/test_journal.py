"""What is written stays, whatever instant the writer is killed at."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pellucid.ablation.journal import append_line, cut_torn_line, read_lines, replace_json
from pellucid.errors import DataError

ROWS = [{"n": 1, "text": "a\nb"}, {"n": 2.5, "text": "ü×"}, {"n": None, "text": ""}]


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    cut_torn_line(path)
    for row in ROWS:
        append_line(path, row)
    assert read_lines(path) == ROWS
    assert len(path.read_bytes().splitlines()) == 3


def test_numbers_that_are_none_come_back(tmp_path):
    append_line(tmp_path / "rows", {"a": float("nan"), "b": float("-inf"), "c": 0.1 + 0.2})
    [row] = read_lines(tmp_path / "rows")
    assert (repr(row["a"]), row["b"], row["c"]) == ("nan", float("-inf"), 0.1 + 0.2)


def test_a_line_cut_anywhere_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed
    path = tmp_path / "rows"
    for row in ROWS:
        append_line(path, row)
    whole = path.read_bytes()
    for n_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:n_bytes])
        kept = whole[:n_bytes].count(b"\n")
        assert read_lines(path) == ROWS[:kept]
        cut_torn_line(path)
        append_line(path, {"next": 1})
        assert read_lines(path) == [*ROWS[:kept], {"next": 1}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff\xfe", b"", b"\x00\x00"])
def test_a_whole_line_that_is_no_row_is_named(line, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"Line 2 of .*rows cannot be read"):
        read_lines(path)


def killed_at(instant: int, path: Path) -> None:
    """Replace a file, and be killed before or after the n-th thing that reaches the disk."""
    left = iter(range(instant))

    def dying(act):
        def acts(*args):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args)

        return acts

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)
    replace_json(path, {"new": True})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_replaced_file_is_the_old_or_the_new_one_in_full(tmp_path):
    path = tmp_path / "study.json"
    seen = []
    for instant in range(5):
        replace_json(path, {"new": False})
        process = multiprocessing.get_context("fork").Process(
            target=killed_at, args=(instant, path)
        )
        process.start()
        process.join()
        seen.append((process.exitcode, json.loads(path.read_text())["new"]))
    # killed before the content, the name or the folder is safe; then not at all
    assert seen == [(-9, False), (-9, False), (-9, True), (0, True), (0, True)]
