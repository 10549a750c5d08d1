# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of pinned sets of programs when another one is loaded: by their names alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.datapath import loader

SECONDARY = loader.Source("secondary", "text", (), (), (), "ring")
TAG = f"secondary_{SECONDARY.tag}_"


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_dead_controller_has_half_pinned_is_in_nobodys_way(
    tmp_path: Path, whole: bool
) -> None:
    other = {"config", "flows", "idle_promoted_1_", "whole_primary_2_", "prog_primary_2_x"}
    mine = {f"prog_{TAG}svm_in", f"map_{TAG}config"} | ({f"whole_{TAG}"} if whole else set())
    older = {"idle_secondary_0_", "prog_secondary_0_svm_in", "map_secondary_0_config"}
    for name in other | mine | older:
        (tmp_path / name).touch()
    loader._set_aside(str(tmp_path), SECONDARY, (), whole=whole)
    left = {p.name for p in tmp_path.iterdir()}
    kept = mine if whole else set()
    assert left == (other - {"whole_primary_2_"}) | {"idle_primary_2_"} | kept


def test_marks_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("idle_secondary_0_", "prog_secondary_0_a", "map_secondary_0_b"):
        (tmp_path / name).touch()
    gone: list[str] = []
    monkeypatch.setattr(loader.os, "unlink", lambda path: gone.append(Path(path).name))
    loader._set_aside(str(tmp_path), SECONDARY, (), whole=False)
    assert gone[0] == "idle_secondary_0_" and len(gone) == 3


@pytest.mark.parametrize("role", ["primary", "secondary", "promoted"])
def test_every_size_that_is_configured_reaches_the_programs(role: str) -> None:
    """A macro that no source mentions would leave its default in force without a word."""
    options = loader.Options(fast=True, lease=True, rewrite_at_xdp=True)
    sources = "".join(p.read_text() for p in loader.source_dir().rglob("*.[ch]"))
    for events in ("ring", "perf"):
        for o in (options, replace(options, rewrite_at_xdp=False)):
            flags = loader._source(role, "/nowhere", o, events).flags
            macros = [m[1] for f in flags if (m := re.match(r"-D(\w+)", f))]
            assert "COLO_BUFFERS" in macros and "COLO_LEASE" in macros
            unused = [m for m in macros if not re.search(rf"\b{m}\b", sources)]
            assert not unused
