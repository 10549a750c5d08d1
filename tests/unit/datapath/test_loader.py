# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of pinned sets of programs when another one is loaded: by their names alone."""

from __future__ import annotations

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
