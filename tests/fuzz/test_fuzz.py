# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the corpora by themselves, and a bounded run of the fuzzer on each target."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .run import HERE
from .targets import TARGETS

#: about 5 s each
RUNS = {"datagram": 50_000, "capture": 20_000, "config": 20_000, "engine": 40_000}
ROOT = Path(__file__).parents[2]


def test_every_target_has_a_corpus() -> None:
    for name in TARGETS:
        assert len(list((HERE / "corpus" / name).iterdir())) >= 3, name


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    for path in sorted((HERE / "corpus" / name).iterdir()):
        TARGETS[name](path.read_bytes())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", TARGETS)
def test_a_bounded_run(name: str) -> None:
    r = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, "-seed=1", "-max_total_time=60",
         f"-runs={RUNS.get(name, 100_000)}"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert r.returncode == 0, r.stderr[-3000:]
    assert "Done " in r.stderr


def test_the_fuzzer_sees_a_fault() -> None:
    """A target that is wrong for some input of its corpus ends with an error."""
    code = (
        "import sys; from tests.fuzz import targets, run\n"
        "def bad(data): assert b'compare' not in data\n"
        "targets.TARGETS['config'] = bad\n"
        "sys.argv[1:] = ['config', '-runs=100']; run.main()"
    )
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert r.returncode != 0 and b"crash-" in r.stderr
