"""Law 10: all prose is run. Code in README, docs and docstrings does what it says.

The Python blocks of a page run one after the other in one namespace, in an empty folder. A text
block right after a Python block is what that one prints; digits may differ, the form may not, and
a line of three dots stands for any lines.
"""

import contextlib
import doctest
import io
import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import pellucid

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = [module.name for module in walk_packages(pellucid.__path__, "pellucid.")]


def form(text: str) -> str:
    """Return a text with every number and every run of spaces made the same."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "0", text)).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    printed = None
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            pattern = re.escape(form(code)).replace(re.escape("\n...\n"), r"\n(?:.*\n)+?")
            pattern = pattern.removesuffix(re.escape("\n...")) + r"(?:\n.*)*" * code.endswith(
                "...\n"
            )
            assert re.fullmatch(pattern, form(printed)), printed
            printed = None


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_of_a_docstring_hold(name):
    assert doctest.testmod(import_module(name)).failed == 0


def test_every_picture_and_file_that_a_page_links_to_exists():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_each_folder_in_the_map_of_the_readme_exists_and_none_is_missing():
    readme = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^\| `(\w+)/` \|", readme, re.MULTILINE))
    here = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and any(path.rglob("*.*")) and not ignored(path)
    }
    assert shown == here


def ignored(path: Path) -> bool:
    return f"{path.name}/" in (ROOT / ".gitignore").read_text() or path.name.endswith(".egg-info")
