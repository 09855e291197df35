"""What does `import pellucid` cost beside `import torch`?

Fresh processes in turns: CPU time until the import is done, memory, and modules.
"""

import json
import statistics
import subprocess
import sys

from measure import report, spread, table

REPEATS = 5
STATEMENTS = {
    "nothing": "pass",
    "import torch": "import torch",
    "import pellucid": "import pellucid",
    "from pellucid import Learner": "from pellucid import Learner",
    "accelerate": "import accelerate",
    "lightning": "import lightning",
    "skorch": "import skorch",
    "ignite": "import ignite.engine",
    "transformers Trainer": "from transformers import Trainer",
    "fastai.basics": "from fastai.basics import Learner",
    "keras on torch": "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras",
}
PROBE = """
import resource, sys
{statement}
used = resource.getrusage(resource.RUSAGE_SELF)
pages = int(open("/proc/self/statm").read().split()[1])  # what getrusage says began with the parent
mib = pages * resource.getpagesize() / 2**20
print(f"[{{used.ru_utime + used.ru_stime}}, {{mib}}, {{len(sys.modules)}}]")
"""


def probe(statement: str) -> tuple[float, float, float] | None:
    """Return CPU seconds, MiB and modules; None if the import fails."""
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(json.loads(done.stdout.splitlines()[-1])) if not done.returncode else None


def main() -> None:
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STATEMENTS}
    for round_number in range(REPEATS + 1):
        for name, statement in STATEMENTS.items():
            found = probe(statement)
            if found and round_number:
                figures[name].append(found)
    torch_seconds = [seconds for seconds, _, _ in figures["import torch"]]
    rows = [
        [
            name,
            f"{statistics.median(seconds for seconds, _, _ in found):.2f}",
            spread([a[0] / b for a, b in zip(found, torch_seconds, strict=True)], 3),
            f"{statistics.median(mib for _, mib, _ in found):.0f}",
            f"{found[0][2]}",
        ]
        for name, found in figures.items()
        if found
    ]
    missing = [name for name, found in figures.items() if not found]
    heads = ["import", "CPU s", "times torch", "MiB", "modules"]
    left_out = f"Not installed here: {', '.join(missing)}." if missing else ""
    what = "Import time and memory"
    report("imports", what, "python benchmarks/imports.py", table(heads, rows), left_out)


if __name__ == "__main__":
    main()
