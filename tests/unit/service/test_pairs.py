# SPDX-License-Identifier: GPL-2.0-or-later
"""All pairs of a host: by file, by socket, or by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colo_xdp.service.control_socket import ControlError, NotRunning
from colo_xdp.service.pairs import only, pairs
from colo_xdp.status.document import empty

EXAMPLE = Path(__file__).parents[3] / "deploy/examples/primary.toml"


def test_files_and_sockets_are_one_list(tmp_path: Path) -> None:
    etc, run = tmp_path / "etc", tmp_path / "run"
    etc.mkdir()
    run.mkdir()
    text = EXAMPLE.read_text()
    add = f'\nrun_dir = "{run}"\n'
    assert "[datapath]" not in text
    for name in ("web1", "web2"):
        mine = text.replace('pair = "web1"', f'pair = "{name}"')
        (etc / f"{name}.toml").write_text(f"{mine}\n[datapath]{add}")
    (etc / "bad.toml").write_text("pair = 7\n")
    for name in ("web1.primary", "db.secondary", "old.primary", "hung.primary"):
        (run / f"{name}.sock").touch()
    asked: list[str] = []

    def ask(path: str) -> dict[str, Any]:
        name = Path(path).name.removesuffix(".sock")
        asked.append(name)
        if name in ("old.primary", "web2.primary"):
            raise NotRunning("nobody")
        if name == "hung.primary":
            raise ControlError("no answer within 3 s")
        pair, _, role = name.partition(".")
        return empty(pair, role).to_json()

    rows = pairs(etc, run, ask)
    assert sorted(asked) == sorted(
        ["web1.primary", "web2.primary", "db.secondary", "old.primary", "hung.primary"]
    ), "each once"
    said = {(r["pair"], r["role"]): r["trouble"] for r in rows}
    assert [r["pair"] for r in rows] == ["bad", "db", "hung", "old", "web1", "web2"]
    assert "not valid" in said["bad", "-"] and said["web1", "primary"] == ""
    assert "configured in" in said["web2", "primary"]
    assert "left its socket" in said["old", "primary"]
    assert "does not answer" in said["hung", "primary"]
    short = only(rows)
    assert short[1]["status"]["state"] == "starting" and "engine" not in short[1]["status"]
    assert short[0]["status"] is None


def test_a_host_without_pairs(tmp_path: Path) -> None:
    assert pairs(tmp_path / "none", tmp_path / "neither") == []
