"""Law 7, imports point down: the layers of the design, no cycle, and nothing heavy at the start."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pellucid

PACKAGE = Path(pellucid.__file__).parent

LAYERS = {
    "ground": "errors tree device randomness stats plots histograms samples layers "
    "layers_plot record snapshot weights outline flops checkpoint",
    "parts": "foundations nn stochastic_depth init losses metrics schedules optim hooks meters "
    "places summary "
    "joint roles muon freezing averaging "
    "gan gradient_checkpointing mixing nonfinite tally distributed sharding data vision diagnosis",
    "loop": "events binding slips looks engines learner",
    "callbacks": "callbacks",
    "edge": "report trained ablation cli __main__",
}
"""From the ground up: a file may import what stands in its own line or above it."""

LEVEL = {name: i for i, names in enumerate(LAYERS.values()) for name in names.split()}

CONVENIENCES = {
    "binding -> callbacks.non_finite",
    "binding -> callbacks.progress",
    "learner -> callbacks.find_lr",
    "learner -> callbacks.schedule",
    "learner -> callbacks.trace",
}
"""What is fetched when it is called: the default table, and by Learner's two-line methods."""

HEAVY = ["matplotlib", "rich", "PIL", "simplejpeg", "cyclopts", "pooch", "requests", "filelock",
         "IPython", "safetensors"]  # fmt: skip


@dataclass(frozen=True)
class Import:
    source: str  # dotted, within the package: "data.loader"; "" is the package's own __init__
    target: str
    inside: bool  # of the package
    lazy: bool  # within a function


def modules() -> dict[str, Path]:
    """Return every file by its dotted name; a folder stands for its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[Import]:
    yield from _imports(ast.parse(MODULES[name].read_text()), name, lazy=False)


def _imports(node: ast.AST, name: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue  # never run
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield from _named(name, alias.name, None, lazy)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield from _named(name, _absolute(name, child), alias.name, lazy)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, name, lazy or function)


def _absolute(name: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = ["pellucid", *name.split(".")] if name else ["pellucid"]
    if MODULES[name].name != "__init__.py":
        parts.pop()
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _named(source: str, module: str, name: str | None, lazy: bool) -> Iterator[Import]:
    if module.split(".")[0] != "pellucid":
        yield Import(source, module.split(".")[0], inside=False, lazy=lazy)
        return
    inner = module.removeprefix("pellucid").lstrip(".")
    deeper = f"{inner}.{name}".lstrip(".")
    yield Import(source, deeper if name and deeper in MODULES else inner, inside=True, lazy=lazy)


ALL = [found for name in MODULES for found in imports_of(name)]


def level(module: str) -> int:
    return LEVEL[module.split(".")[0]]


def arrow(found: Import) -> str:
    return f"{found.source} -> {found.target}"


def test_the_reading_of_imports_is_itself_right():
    seen = {(arrow(found), found.lazy) for found in ALL if found.inside}
    assert ("learner -> events", False) in seen  # from . import events
    assert ("data.loader -> errors", False) in seen  # from ..errors import ...
    assert ("callbacks -> callbacks.best", False) in seen
    assert ("learner -> callbacks.schedule", True) in seen
    assert ("record -> plots", True) in seen
    assert not any("events -> learner" in pair for pair, _ in seen)  # for type checkers alone


def test_every_file_has_a_layer():
    assert {name.split(".")[0] for name in MODULES if name} - set(LEVEL) == set()


def test_imports_point_down():
    # the package's own __init__ stands outside: it fetches names when they are asked for
    upward = {
        arrow(found)
        for found in ALL
        if found.inside
        and found.source
        and found.target
        and not found.lazy
        and level(found.target) > level(found.source)
    }
    assert upward == set()


def test_only_the_learners_conveniences_import_upwards_and_when_called():
    upward = {
        arrow(found)
        for found in ALL
        if found.inside
        and found.source
        and found.target
        and found.lazy
        and level(found.target) > level(found.source)
    }
    assert upward == CONVENIENCES


def test_no_callback_imports_another():
    between = {
        arrow(found)
        for found in ALL
        if found.source.startswith("callbacks.") and found.target.split(".")[0] == "callbacks"
    }
    assert between == set()


def test_nothing_imports_the_edge_or_the_package_itself():
    to_the_package = {arrow(found) for found in ALL if found.inside and found.target == ""}
    assert to_the_package <= {"cli -> "}  # for the version
    edge = LAYERS["edge"].split()
    to_the_edge = {
        arrow(found)
        for found in ALL
        if found.inside
        and found.target.split(".")[0] in edge
        and found.target.split(".")[0] != found.source.split(".")[0]
    }
    assert to_the_edge <= {"__main__ -> cli", "cli -> report", "cli -> trained"}


def test_there_is_no_cycle():
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in ALL:
        if found.inside and not found.lazy:
            graph[found.source].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")


def test_everything_but_torch_is_imported_on_first_use():
    allowed = {*sys.stdlib_module_names, "torch", "numpy"}
    at_once = {arrow(found) for found in ALL if not found.inside and not found.lazy}
    foreign = {pair for pair in at_once if pair.split(" -> ")[1] not in allowed}
    assert foreign <= {"cli -> cyclopts"}


def test_the_names_of_all_that_is_imported_are_known_dependencies():
    known = {*sys.stdlib_module_names, *HEAVY, "torch", "numpy"}
    assert {found.target for found in ALL if not found.inside} <= known


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after running code."""
    program = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return set(answer.stdout.split())


def test_import_pellucid_alone_loads_neither_torch_nor_anything_heavy():
    assert loaded_by("import pellucid") & {"torch", "numpy", *HEAVY} == set()


def test_the_learner_loads_torch_and_nothing_heavier():
    loaded = loaded_by("from pellucid import Learner")
    assert "torch" in loaded
    assert loaded & set(HEAVY) == set()


def test_the_whole_library_loads_nothing_heavier():
    names = [f"pellucid.{name}".rstrip(".") for name in MODULES if level_below_the_edge(name)]
    assert loaded_by(f"import {', '.join(names)}") & set(HEAVY) == set()


def level_below_the_edge(name: str) -> bool:
    return not name or level(name) < list(LAYERS).index("edge")
