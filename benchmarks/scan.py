"""How fast are 60,000 files found, and how much memory do a million names take?

Files of no bytes in a temporary folder, names alone; CPU time, in turns.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from glob import iglob
from pathlib import Path

from measure import in_turns, report, spread, table

from pellucid.data.files import IMAGE_EXTENSIONS, scan

REPEATS, FOLDERS, FILES = 9, 30, 2000

PROBE = """
import resource
from pellucid.data.files import FileNames
{imports}
def mib():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20
names = (f"train/n{{i % 1000:08d}}/n{{i % 1000:08d}}_{{i:06d}}.JPEG" for i in range(10**6))
before = mib()
held = {statement}
print(mib() - before)
"""
HOLDERS = {
    "pellucid FileNames": ("", "FileNames('.', names)"),
    "list of str": ("", "list(names)"),
    "list of pathlib.Path": ("from pathlib import Path", "[Path(name) for name in names]"),
}


def make_files(root: Path) -> None:
    for i in range(FOLDERS):
        (root / f"n{i:08d}").mkdir()
        for j in range(FILES):
            (root / f"n{i:08d}" / f"n{i:08d}_{j:05d}.JPEG").touch()


def by_walk(root: Path) -> list[str]:
    """What fastai's get_files does, by the functions it calls, without its objects."""
    return [
        f"{folder}/{name}"
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS  # noqa: PTH122
    ]


def by_glob(root: Path) -> list[str]:
    # the plain functions that people use are what is timed here, hence not pathlib's
    found = iglob(f"{root}/**/*", recursive=True)  # noqa: PTH207
    return [n for n in found if os.path.splitext(n)[1].lower() in IMAGE_EXTENSIONS]  # noqa: PTH122


def by_rglob(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS]


def memory(imports: str, statement: str) -> float:
    """Return how many MiB a fresh process grows by when it holds a million names."""
    code = PROBE.format(imports=imports, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    ways = {
        "pellucid scan": scan,
        "os.walk": by_walk,
        "glob": by_glob,
        "pathlib rglob": by_rglob,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(root)
        assert {len(way(root)) for way in ways.values()} == {FOLDERS * FILES}
        times = in_turns({name: partial(way, root) for name, way in ways.items()}, REPEATS)
    rows = [
        [
            name,
            spread([1000 * second for second in seconds], 0),
            spread([a / b for a, b in zip(seconds, times["pellucid scan"], strict=True)], 2),
            f"{statistics.median(seconds) / (FOLDERS * FILES) * 1e6:.2f}",
        ]
        for name, seconds in times.items()
    ]
    heads = ["way", "ms", "times scan's", "µs a file"]
    held = [[name, f"{memory(*code):.0f}"] for name, code in HOLDERS.items()]
    report(
        "scan",
        "Finding files",
        "python benchmarks/scan.py",
        f"## {FOLDERS * FILES:,} files in {FOLDERS} folders",
        "Only `scan` sorts, and only it and os.walk follow links to folders.",
        table(heads, rows),
        "## A million names of 41 letters held",
        table(["as", "MiB"], held),
    )


if __name__ == "__main__":
    main()
