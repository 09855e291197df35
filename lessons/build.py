"""Build the executed notebooks from the lessons' scripts, in their full form.

python lessons/build.py                  all of them
python lessons/build.py 2 03_callbacks   those whose names begin so

A notebook holds the cells of its script and what they printed and drew, and nothing that differs
from one build to the next but measured times.
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

LESSONS = Path(__file__).parent
MAX_BYTES = 500_000


def scripts() -> list[Path]:
    """Return the lessons in order."""
    return sorted(LESSONS.glob("[0-9][0-9]_*.py"))


def build(script: Path) -> Path:
    """Execute one script as a notebook beside it and return the notebook's path.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed, a claim at the end for one.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    with tempfile.TemporaryDirectory() as folder:  # whatever a lesson writes goes there
        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,  # else it depends on the clock how output is cut in pieces
        )
        client.execute()
    path = script.with_suffix(".ipynb")
    nbformat.write(stripped(notebook), path)
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path.name} has {path.stat().st_size:,} bytes, over {MAX_BYTES:,}")
    return path


def stripped(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what would differ in a rebuild: random ids, versions, time stamps."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:03}", {}
    return notebook


def main() -> None:
    """Build those that are asked for, one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"  # sums are split by thread: one, and a rebuild is equal
    os.environ.pop("LESSONS", None)  # the full form
    wanted = tuple(name.zfill(2) if name.isdigit() else name for name in sys.argv[1:])
    for script in scripts():
        if not wanted or script.name.startswith(wanted):
            path = build(script)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
