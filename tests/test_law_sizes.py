"""Law 11, sizes: what has grown too big to be read in one go is named here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pellucid

PACKAGE = Path(pellucid.__file__).parent
README = PACKAGE.parent / "README.md"

FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS, MAX_LOOP, MAX_README = 400, 60, 8, 600, 170

SAY_NOTHING = {"utils", "util", "common", "core", "base", "helpers", "misc", "config"}


def n_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Give every function and method of a file, nested ones too, with its qualified name."""
    yield from _functions(ast.parse(path.read_text()), "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{prefix}{child.name}" if named else prefix
        if named and not isinstance(child, ast.ClassDef):
            yield name, child
        yield from _functions(child, f"{name}." if named else prefix)


ALL = [
    (f"{name}: {where}", node) for name, path in FILES.items() for where, node in functions(path)
]


def test_there_is_something_to_measure():
    names = [name for name, _ in ALL]
    assert "learner.py: Learner.__init__" in names
    assert "callbacks/trace.py: _noted.noted" in names


def test_no_file_is_over_400_lines():
    sizes = {name: n_lines(path) for name, path in FILES.items()}
    assert {name: n for name, n in sizes.items() if n > MAX_FILE} == {}


def test_no_function_is_over_60_lines():
    sizes = {name: node.end_lineno - node.lineno + 1 for name, node in ALL}
    assert {name: n for name, n in sizes.items() if n > MAX_FUNCTION} == {}


def test_nothing_takes_more_than_8_arguments():
    counts = {}
    for name, node in ALL:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts[name] = len([arg for arg in arguments if arg.arg not in ("self", "cls")])
    assert {name: n for name, n in counts.items() if n > MAX_ARGUMENTS} == {}


def test_no_keywords_are_passed_through():
    taking = {name for name, node in ALL if node.args.kwarg}
    python_wants_it = {"events.py: Callback.__init_subclass__"}
    as_the_model_takes_it = {
        "callbacks/compile.py: _Run._call",
        "gradient_checkpointing.py: _twice",
    }
    assert taking == python_wants_it | as_the_model_takes_it


def test_files_are_named_by_their_content():
    parts = {part.removesuffix(".py") for name in FILES for part in name.split("/")}
    assert parts & SAY_NOTHING == set()


def test_the_timetable_and_the_learner_together_stay_under_600_lines():
    assert n_lines(FILES["events.py"]) + n_lines(FILES["learner.py"]) < MAX_LOOP


def test_the_readme_is_read_in_one_go():
    assert not README.exists() or n_lines(README) <= MAX_README
