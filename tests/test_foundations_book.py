"""foundations as a book: its size, what it stands on, its table of contents, its examples."""

import ast
import re
from pathlib import Path

import pytest

from pellucid import foundations, stats

FOLDER = Path(foundations.__file__).parent
FILES = {path.name: path for path in sorted(FOLDER.glob("*.py"))}
CHAPTERS = re.findall(r"^\d+\. +`(\w+\.py)`", foundations.__doc__, re.MULTILINE)


def imports(path):
    """Give (module, names) of all that a file imports, with the dots of relative ones."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module, [alias.name for alias in node.names]


@pytest.mark.parametrize("name", FILES)
def test_a_chapter_is_under_150_lines(name):
    assert len(FILES[name].read_text().splitlines()) < 150


@pytest.mark.parametrize("name", FILES)
def test_it_stands_on_tensors_and_the_ground_alone(name):
    for module, names in imports(FILES[name]):
        if module.startswith("torch"):
            assert (module, set(names) - {"Tensor"}) == ("torch", set())
        if module.startswith(".."):
            assert module in {"..errors", "..tree", "..stats"}
    used = set(re.findall(r"\btorch\.(\w+)", FILES[name].read_text()))
    if name != "__init__.py":  # which says that it does without them
        assert used.isdisjoint({"nn", "optim", "utils", "func", "fx"})


def test_every_file_is_a_chapter():
    assert sorted(CHAPTERS) == sorted(set(FILES) - {"__init__.py"})


def test_no_chapter_needs_a_later_one():
    for number, name in enumerate(CHAPTERS):
        needed = {
            f"{module[1:]}.py" for module, _ in imports(FILES[name]) if re.match(r"\.\w", module)
        }
        if name == "composite.py":
            needed.discard("module.py")  # for type checkers alone
        assert needed <= set(CHAPTERS[:number]), name


def test_every_public_thing_is_listed_and_the_statistics_are_the_librarys():
    public = {
        node.name
        for path in FILES.values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    }
    helpers = {"held", "once", "pair", "highest", "per_channel", "check_channels"}
    assert public - helpers <= set(foundations.__all__)
    for name in ("variance", "standard_deviation", "covariance", "correlation",
                 "mean_absolute_deviation"):  # fmt: skip
        assert getattr(foundations, name) is getattr(stats, name)
