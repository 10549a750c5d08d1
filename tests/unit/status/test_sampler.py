# SPDX-License-Identifier: GPL-2.0-or-later
"""What is sampled of either controller, and that sampling ends none.

tests/netns/test_history.py compares it with the status document, on real programs.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.status import sampler
from colo_xdp.status.document import empty
from colo_xdp.status.history import History, sample
from tests.unit.controller.fakes import primary, secondary


def row(s: dict[str, Any], role: str) -> dict[str, Any]:
    """All columns but that of a clock, with an empty document before it."""
    out = sample(s, empty("web1", role).to_json(), 0.0, 10.0)
    out.pop("silent_ms")
    return out


def test_a_primary_is_sampled() -> None:
    c, _, _ = primary()
    c.checkpoints.by_cause[Cause.PERIODIC.value] = 3
    c.checkpoints.by_cause[Cause.OPERATOR.value] = 1
    c.output.waits[3] = 10
    c.output.waits[9] = 1
    c.output.nics[0].engine._outbox.released = 70
    got = row(sampler.reading(c), "primary")
    assert got["checkpoints"] == {"periodic": 3, "operator": 1}
    assert got["frames_per_s"] == 7 and got["wait_p50_ms"] and got["transmitting"] is True


def test_a_secondary_is_sampled() -> None:
    c, _, _ = secondary()
    c.checkpoints_loaded = 5
    got = row(sampler.reading(c), "secondary")
    assert got["checkpoints"] == {"loaded": 5} and got["transmitting"] is False


def test_a_row_is_taken_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    c, _, _ = primary()
    now = [100.0]
    monkeypatch.setattr(sampler.time, "monotonic", lambda: now[0])
    history = History(0.0)
    for _ in range(25):
        sampler.take(c, history)
        now[0] += 1.0
    assert history.to_json().count("\n[") == 3


def test_a_failure_is_logged_and_costs_a_row_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c, _, _ = primary()
    now = [100.0]
    monkeypatch.setattr(sampler.time, "monotonic", lambda: now[0])

    def fails(progs: object = None) -> Any:
        raise KeyError("what nobody thought of")

    with monkeypatch.context() as m, caplog.at_level(logging.WARNING):
        m.setattr(c.dp, "counters", fails)
        history = History(0.0)
        for _ in range(5):  # once in an interval
            sampler.take(c, history)
    assert len(caplog.records) == 1 and "what nobody thought of" in caplog.text
    now[0] += 10
    sampler.take(c, history)
    assert history.to_json().count("\n[") == 1
