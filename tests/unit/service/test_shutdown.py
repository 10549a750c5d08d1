# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that shuts down is told from a unit that is stopped; `handover --at-shutdown` does so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colo_xdp import cli
from colo_xdp.service import shutdown

run = CliRunner().invoke


def systemctl(where: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = where / "systemctl"
    program.write_text(f"#!/bin/sh\n[ $1 = is-system-running ] || exit 9\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("state", "ends"),
    [
        ("stopping", True), ("maintenance", True),
        ("running", False), ("degraded", False), ("starting", False), ("offline", False),
        ("", False),
    ],
)  # fmt: skip
def test_systemd_knows(
    state: str, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl(tmp_path, f"echo {state}; exit 1", monkeypatch)
    assert shutdown.host_ends() is ends


def test_who_does_not_answer_shuts_nothing_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(shutdown, "ANSWER_S", 0.2)
    assert not shutdown.host_ends()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert not shutdown.host_ends()


@pytest.mark.parametrize("ends", [False, True])
def test_at_shutdown_means_at_shutdown_only(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def ask(where: Any, run_dir: str, command: str, progress: bool = False, **args: Any) -> Any:
        asked.append({"command": command, **args})
        return {"steps": ["a step"], "done": True, "state": "stopped", "reason": "handed over"}

    monkeypatch.setattr(shutdown, "host_ends", lambda: ends)
    monkeypatch.setattr(cli.operations, "ask", ask)
    r = run(cli.app, ["handover", "--at-shutdown", "/etc/colo-xdp/web1.toml"])
    assert r.exit_code == 0
    if ends:
        assert asked[-1] == {"command": "handover", "shutdown": True}
        assert "stopped: handed over" in r.output
    else:
        assert not asked and "does not shut down" in r.output
        assert run(cli.app, ["handover", "web1"]).exit_code == 0
        assert asked[-1] == {"command": "handover", "shutdown": False}, (
            "a person may do so any time"
        )
