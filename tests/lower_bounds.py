# SPDX-License-Identifier: GPL-2.0-or-later
"""`make test-lower-bounds`: what pyproject.toml declares, with the oldest versions that it allows.

A virtual environment in build/lower-bounds gets each bound exactly (`==`) and runs what uses it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHERE = ROOT / "build/lower-bounds"
BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\d.]+)(,<[\d.]+)?")
#: run in the old environment
RUNS = (
    ("pytest", "-q", "tests/unit"),
    ("pytest", "-q", "tests/bpf/test_verdicts.py", "tests/netns/test_roles.py"),
    ("pytest", "-q", "tests/lease"),
    ("tests.fuzz.run", "packet", "-max_total_time=3"),
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    # the old libraries have no types of their own; it is mypy that is tried
    ("mypy", "--python-executable", str(ROOT / ".venv/bin/python")),
)
PLOT = "import matplotlib; matplotlib.use('Agg'); import tests.bench.plots"


def declared(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Every requirement of the project, of its extras and of its build."""
    doc = tomllib.loads(pyproject.read_text())
    extras = doc["project"]["optional-dependencies"].values()
    return [
        *doc["build-system"]["requires"], *doc["project"]["dependencies"],
        *(r for extra in extras for r in extra),
    ]  # fmt: skip


def pins(requirements: list[str]) -> list[str]:
    """The oldest version of each. Raises ValueError for one without a lower bound."""
    out = []
    for r in requirements:
        m = BOUND.fullmatch(r)
        if not m:
            raise ValueError(f"{r}: a lower bound is needed, as in name>=1.2 or name>=1.2,<2")
        out.append(f"{m['name']}=={m['version']}")
    return out


def main() -> int:
    python = str(WHERE / "bin/python")
    quiet = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    steps = [
        ["/usr/bin/python3", "-m", "venv", "--clear", "--system-site-packages", str(WHERE)],
        [python, *quiet, *pins(declared())],
        [python, *quiet, "--no-build-isolation", "--no-deps", str(ROOT)],
        [python, "-c", PLOT],
        *([python, "-m", *run] for run in RUNS),
    ]
    for step in steps:
        print("+", " ".join(step), flush=True)
        if subprocess.run(step, cwd=ROOT, check=False).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
