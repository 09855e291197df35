"""The lessons: each script runs in its quick form, and each notebook is what its script gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

LESSONS = Path(__file__).parents[1] / "lessons"
SCRIPTS = sorted(LESSONS.glob("[0-9][0-9]_*.py"))

lessons = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def notebook_of(script: Path) -> nbformat.NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def test_no_lesson_is_forgotten():
    # a script under another name would never be run, a notebook without one never rebuilt
    others = {path.name for path in LESSONS.iterdir() if path.is_file()} - {"build.py", "README.md"}
    expected = {script.name for script in SCRIPTS}
    assert others == expected | {script.with_suffix(".ipynb").name for script in SCRIPTS}
    assert len({script.name[:2] for script in SCRIPTS}) == len(SCRIPTS) > 0


@lessons
def test_the_quick_form_runs_and_its_claims_hold(script, tmp_path, request):
    if re.search(r"\bmnist\(", script.read_text()):
        request.getfixturevalue("real_data")
    environment = {**os.environ, "LESSONS": "quick", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(LESSONS.parent)
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "All claims hold.", ran.stdout[-3000:]


@lessons
def test_the_lesson_is_in_the_table_of_lessons(script):
    assert f"]({script.stem}.ipynb) |" in (LESSONS / "README.md").read_text()


@lessons
def test_the_notebook_has_the_cells_of_the_script(script):
    asked = jupytext.read(script, fmt="py:percent").cells
    built = notebook_of(script).cells
    assert [(cell.cell_type, cell.source) for cell in built] == [
        (cell.cell_type, cell.source) for cell in asked
    ], "make lessons"


@lessons
def test_the_notebook_ran_from_top_to_bottom_without_error(script):
    code = [cell for cell in notebook_of(script).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert outputs[-1].text.splitlines()[-1] == "All claims hold."


@lessons
def test_the_notebook_is_small_and_holds_nothing_volatile(script):
    path, notebook = script.with_suffix(".ipynb"), notebook_of(script)
    assert path.stat().st_size <= 500_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells] == [
        f"cell-{i:03}" for i in range(len(notebook.cells))
    ]
    assert all(not cell.metadata for cell in notebook.cells)
    assert "/tmp/" not in path.read_text() and "0x7f" not in path.read_text()


@lessons
def test_quick_or_full_is_chosen_in_one_place(script):
    code = [cell.source for cell in jupytext.read(script, fmt="py:percent").cells
            if cell.cell_type == "code"]  # fmt: skip
    asking = [i for i, source in enumerate(code) if "QUICK" in source]
    assert asking == [0]
