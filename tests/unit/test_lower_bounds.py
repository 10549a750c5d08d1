# SPDX-License-Identifier: GPL-2.0-or-later
"""Every requirement has a lower bound, and each of them is what the target installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.lower_bounds import ROOT, declared, pins

PYPROJECT = ROOT / "pyproject.toml"


def test_the_target_installs_every_bound_of_the_project() -> None:
    text = PYPROJECT.read_text()
    installed = dict(p.split("==") for p in pins(declared()))
    # read another way: every quoted word with >= in the file but that of Python itself
    doc = tomllib.loads(text)
    quoted = {w for w in text.split('"') if ">=" in w and not w.startswith(">=") and "\n" not in w}
    assert {w.split(",")[0] for w in quoted} == {f"{k}>={v}" for k, v in installed.items()}
    assert len(installed) == len(declared()) >= len(doc["project"]["dependencies"]) + 2
    assert installed["pyroute2"] == "0.9.1"


@pytest.mark.parametrize("wrong", ["pyroute2", "pyroute2==0.9.1", "pyroute2<1", "typer~=0.15"])
def test_a_requirement_without_a_lower_bound_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="a lower bound is needed"):
        pins(["scapy>=2.7", wrong])


def test_extras_and_build_are_among_what_is_declared(tmp_path: Path) -> None:
    f = tmp_path / "pyproject.toml"
    f.write_text(
        '[build-system]\nrequires = ["a>=1"]\n[project]\ndependencies = ["b>=2,<3"]\n'
        '[project.optional-dependencies]\ndev = ["c.d>=0.1"]\nbench = ["e-f>=5"]\n'
    )
    assert pins(declared(f)) == ["a==1", "b==2", "c.d==0.1", "e-f==5"]
