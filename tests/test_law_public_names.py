"""The public face: every name once, real, documented and annotated."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import pellucid

PACKAGE = Path(pellucid.__file__).parent

FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

SUBPACKAGES = sorted(
    ".".join(["pellucid", *path.parent.relative_to(PACKAGE).parts])
    for path in PACKAGE.rglob("__init__.py")
    if path.parent != PACKAGE
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imported(body: list[ast.stmt]) -> dict[str, str]:
    """Return the names that `from .module import name` brings, and where from."""
    return {
        alias.asname or alias.name: "." * node.level + (node.module or "")
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


# ── the package ───────────────────────────────────────────────────────────────────────────────


def for_type_checkers() -> dict[str, str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return imported(block.body)


def test_all_lists_what_type_checkers_see():
    assert pellucid.__all__ == sorted(for_type_checkers())


@pytest.mark.parametrize("name", pellucid.__all__)
def test_a_public_name_leads_to_its_home(name):
    home = importlib.import_module(for_type_checkers()[name], "pellucid")
    assert getattr(pellucid, name) is getattr(home, name)
    assert name in dir(pellucid)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pellucid' has no attribute 'Lerner'"):
        _ = pellucid.Lerner


def test_a_star_import_brings_exactly_the_public_names():
    space: dict[str, object] = {}
    exec("from pellucid import *", space)
    assert sorted(set(space) - {"__builtins__"}) == pellucid.__all__


# ── its folders ───────────────────────────────────────────────────────────────────────────────


def test_there_are_folders():
    assert {"pellucid.callbacks", "pellucid.data", "pellucid.vision"} <= set(SUBPACKAGES)


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_folders_all_is_real_and_complete(name):  # its order is ruff's affair
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, public) for public in module.__all__)
    brought = imported(ast.parse(Path(module.__file__).read_text()).body)
    assert set(module.__all__) == {public for public in brought if public[0] != "_"}
    assert all(home[0] == "." for home in brought.values())


def test_every_callback_is_public_where_callbacks_are_looked_for():
    for path in (PACKAGE / "callbacks").glob("[!_]*.py"):
        module = importlib.import_module(f"pellucid.callbacks.{path.stem}")
        for name, thing in vars(module).items():
            if inspect.isclass(thing) and thing.__module__ == module.__name__ and name[0] != "_":
                is_callback = issubclass(thing, pellucid.Callback)
                assert is_callback == (name in pellucid.callbacks.__all__), name


# ── documented and annotated ──────────────────────────────────────────────────────────────────


def public_things(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Give the public classes and functions of a file, and the public methods of those classes."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.ClassDef, Function)) or node.name[0] == "_":
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                dunder = isinstance(method, Function) and method.name[:2] == "__"
                if isinstance(method, Function) and (method.name[0] != "_" or dunder):
                    yield f"{node.name}.{method.name}", method


PUBLIC = {
    f"{file}: {name}": node for file, path in FILES.items() for name, node in public_things(path)
}


def is_overload(node: ast.AST) -> bool:
    return any(ast.unparse(mark) == "overload" for mark in getattr(node, "decorator_list", []))


def is_dunder(name: str) -> bool:
    # what Python itself defines needs no words; neither does a constructor, see its class
    return name.split(".")[-1][:2] == "__" and not name.endswith("__call__")


def test_there_is_something_public():
    assert "learner.py: Learner.fit" in PUBLIC
    assert "schedules.py: linear" in PUBLIC


def test_every_file_begins_with_a_docstring():
    assert [
        f for f, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


def test_everything_public_has_a_docstring():
    bare = [
        name
        for name, node in PUBLIC.items()
        if not is_overload(node) and not is_dunder(name) and not ast.get_docstring(node)
    ]
    assert bare == []


def test_a_docstring_begins_with_a_full_sentence():
    broken = [
        name
        for name, node in PUBLIC.items()
        if (text := ast.get_docstring(node)) and text.splitlines()[0].rstrip()[-1] not in ".:"
    ]
    assert broken == []


def test_everything_public_is_annotated_in_full():
    lacking = []
    for name, node in PUBLIC.items():
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
            lacking += [
                f"{name}({arg.arg})"
                for arg in arguments
                if arg.annotation is None and arg.arg not in ("self", "cls")
            ]
            if node.returns is None and node.name not in ("__init__", "__init_subclass__"):
                lacking.append(f"{name} -> ?")
    assert lacking == []


def test_every_argument_that_is_described_exists():
    # a docstring's Args must not drift from the signature
    wrong = []
    for name, node in PUBLIC.items():
        described = _described(ast.get_docstring(node) or "")
        made_by = node if isinstance(node, Function) else PUBLIC.get(f"{name}.__init__")
        if described and made_by is not None:
            arguments = [*made_by.args.posonlyargs, *made_by.args.args, *made_by.args.kwonlyargs]
            arguments += [made_by.args.vararg, made_by.args.kwarg]
            wrong += [f"{name}: {d}" for d in described if d not in [a.arg for a in arguments if a]]
    assert wrong == []


def _described(doc: str) -> list[str]:
    """Return the names in the Args section of a Google-style docstring."""
    lines = doc.splitlines()
    if "Args:" not in lines:
        return []
    names = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and line[4:5] not in ("", " "):
            names += [name.strip() for name in line.split(":")[0].split(",")]
    return names
