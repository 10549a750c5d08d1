# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of a drill's commands, and how it ends. tests/e2e/test_restarts.py has a real one."""

from __future__ import annotations

from typing import Any

import pytest

from colo_xdp.controller.command import Command
from colo_xdp.service import drill as module
from colo_xdp.service.control_socket import NotRunning
from colo_xdp.service.drill import DrillError, drill


def at(role: str, state: str, gap: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"role": role, "state": state, "reason": f"{role} {state}", "last_failover": gap}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests, each answered by what the test puts first into `answers`."""
    calls: list[Any] = []

    def request(path: str, command: str, *_: Any, **__: Any) -> Any:
        calls.append(command)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    answers: list[Any] = []
    monkeypatch.setattr(module, "request", request)
    monkeypatch.setattr("time.sleep", lambda s: None)
    calls.append(answers)
    return calls


def test_a_drill_ends_with_the_roles_changed(asked: list[Any]) -> None:
    asked[0] += [
        at("primary", "protected"), {"done": True}, {"here": True}, NotRunning("no controller"),
        at("secondary", "starting", {"gap_ms": 31.4}), at("secondary", "protected"),
    ]  # fmt: skip
    said = list(drill("/x.sock", 10))
    assert asked[1:4] == [Command.STATUS, Command.SWITCHOVER, Command.REPROTECT]
    assert "received nothing from the guest for 31 ms" in said[1]
    assert "protected again after" in said[-1] and "roles changed" in said[-1]


def test_a_drill_begins_on_a_protected_primary_only(asked: list[Any]) -> None:
    asked[0] += [at("secondary", "protected")]
    with pytest.raises(DrillError, match="begins on the primary of a protected pair"):
        list(drill("/x.sock", 10))


def test_a_drill_that_does_not_end_says_what_it_waits_for(asked: list[Any]) -> None:
    asked[0] += [at("primary", "protected"), {"done": True}, {"here": True}]
    with pytest.raises(DrillError, match="not protected again within 0 s"):
        list(drill("/x.sock", 0))
