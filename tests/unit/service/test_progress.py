# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said while a request takes its time."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from colo_xdp.service.control_socket import ControlError, NotRunning
from colo_xdp.service.progress import watched


class Controller:
    """Answers a failover when its states have been told."""

    def __init__(self, *states: tuple[str, str] | Exception) -> None:
        self.states = list(states)
        self.done = threading.Event()
        self.fails: Exception | None = None

    def __call__(
        self, path: str, command: str, args: Any = None, timeout: float = 60
    ) -> dict[str, Any]:
        if command == "status":
            now = self.states.pop(0)
            if not self.states:
                self.states.append(now)
                self.done.set()
            if isinstance(now, Exception):
                raise now
            return {"state": now[0], "reason": now[1]}
        assert self.done.wait(10)
        if self.fails:
            raise self.fails
        return {"done": True, "args": args}


def test_changes_are_said_once() -> None:
    fencing, over = ("degraded", "fencing it"), ("promoted", "took over")
    c = Controller(("protected", "equal"), fencing, fencing, NotRunning("gone"), over, over)
    said: list[str] = []
    r = watched("/x", "failover", {"force": True}, said.append, c, after_s=0.01, every_s=0.01)
    assert r == {"done": True, "args": {"force": True}}
    texts = [s.partition(" s: ")[2] for s in said]
    assert texts[:2] == ["protected: equal", "degraded: fencing it"]
    assert "does not answer: gone" in texts[2] and len(texts) == len(set(texts)) <= 4
    assert said[0].startswith("failover, ")


def test_a_request_that_ends_at_once_says_nothing() -> None:
    c = Controller(("protected", "equal"))
    c.done.set()
    assert watched("/x", "checkpoint", {}, pytest.fail, c)["done"]
    c.fails = ControlError("no checkpoint from state solo")
    with pytest.raises(ControlError, match="from state solo"):
        watched("/x", "checkpoint", {}, pytest.fail, c)


def test_a_refusal_that_takes_its_time_arrives() -> None:
    c = Controller(("degraded", "x"), ("degraded", "x"))
    c.fails = ControlError("the fence command failed")
    with pytest.raises(ControlError, match="fence command failed"):
        watched("/x", "failover", {}, lambda text: None, c, after_s=0.01, every_s=0.01)
