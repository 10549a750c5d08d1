# SPDX-License-Identifier: GPL-2.0-or-later
"""Events as sentences."""

from __future__ import annotations

from typing import Any

import pytest

from colo_xdp.controller.story import Kind
from colo_xdp.failover.states import State
from colo_xdp.status.events import line, what

ROWS = (
    ({"kind": "start", "why": "starting"}, "a controller has started: starting"),
    ({"kind": "stop", "why": "stopped by a signal"}, "the controller ends: stopped by a signal"),
    ({"kind": "state", "state": "protected", "why": "equal"}, "protected: equal"),
    ({"kind": "state", "state": "promoted", "why": "x"}, "the secondary guest has taken over: x"),
    ({"kind": "state", "state": "invented", "why": "x"}, "invented: x"),
    ({"kind": "step", "action": "fence", "why": "silent"}, "failover step `fence`: silent"),
    ({"kind": "fenced", "ok": True, "why": ""}, "the fence command has succeeded"),
    ({"kind": "fenced", "ok": False, "why": ""}, "the fence command has failed"),
    ({"kind": "switched", "gap_ms": 31.4, "why": ""}, "received nothing from the guest for 31 ms"),
    ({"kind": "checkpoint_failed", "why": "QMP"}, "a checkpoint failed: QMP"),
    ({"kind": "qemu", "why": "it answers"}, "QEMU of this host: it answers"),
    ({"kind": "peer", "why": "connected"}, "the other host's controller: connected"),
    ({"kind": "data_path", "why": "tap is gone"}, "data path: tap is gone"),
    ({"kind": "operator", "why": "mode paused"}, "an operator asked for `mode paused`"),
    ({"kind": "shutdown", "why": "handover shutdown"}, "this host shuts down: the other one is to"),
    ({"kind": "mark", "why": "f cannot be written (x)"}, "f cannot be written (x)"),
    ({"kind": "role", "why": "the other one"}, "this host changes its role: the other one"),
    ({"kind": "of a later release", "why": "x"}, "of a later release: x"),
)  # fmt: skip


@pytest.mark.parametrize(("event", "says"), ROWS)
def test_each_kind_has_a_sentence(event: dict[str, Any], says: str) -> None:
    assert says in what(event)
    shown = line({"t": 1_700_000_000.25, "role": "primary", **event})
    assert ".250  primary    " in shown and says in shown


def test_the_table_is_complete() -> None:
    assert {e["kind"] for e, _ in ROWS} > set(Kind)
    for state in State:
        sentence = what({"kind": "state", "state": state.value, "why": "x"})
        assert sentence.endswith(": x") and len(sentence) > 8


def test_a_damaged_event_is_shown_as_far_as_it_goes() -> None:
    assert what({"kind": "step"}) == "failover step `?`: "
    assert line({"t": 0}).endswith("None: ")
