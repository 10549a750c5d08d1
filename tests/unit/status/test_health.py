# SPDX-License-Identifier: GPL-2.0-or-later
"""The health sentence: every state of both roles, and what is worth a word besides."""

from __future__ import annotations

from typing import Any

import pytest

from colo_xdp.failover.states import Role, State
from colo_xdp.status.document import empty
from colo_xdp.status.health import Level, health

OK, WARNING, CRITICAL = Level


def doc(role: str, state: str, *, active: bool, **more: Any) -> dict[str, Any]:
    """A document; keys with dots lead into its objects."""
    s = empty("web1", role).to_json()
    s.update(state=state, reason="because", mode="run")
    s["active"]["transmitting"] = active
    s["peer"].update(connected=True, state="protected")
    s["if_peer_died"]["outcome"] = "takes_over" if role == "secondary" else "goes_solo"
    for key, value in more.items():
        *way, last = key.split("__")
        at = s
        for part in way:
            at = at[part]
        at[last] = value
    return s


#: role, state, whether the guest here transmits -> level, part of the sentence
TABLE = (
    ("primary", "starting", True, WARNING, "not protected yet: because"),
    ("primary", "starting", False, CRITICAL, "is not heard: because"),
    ("primary", "protected", True, OK, "protected: either host may fail"),
    ("primary", "protected", False, CRITICAL, "nothing reaches the network"),
    ("primary", "checkpointing", True, OK, "protected: either host may fail"),
    ("primary", "checkpointing", False, CRITICAL, "nothing reaches the network"),
    ("primary", "degraded", True, WARNING, "protection is impaired: because"),
    ("primary", "degraded", False, CRITICAL, "protection is impaired: because"),
    ("primary", "solo", True, WARNING, "runs without a copy (because)"),
    ("primary", "solo", False, CRITICAL, "is not heard"),
    ("primary", "promoted", True, WARNING, "runs without a copy (because)"),
    ("primary", "promoted", False, CRITICAL, "is not heard"),
    ("primary", "paused", True, WARNING, "no failover takes place without an operator"),
    ("primary", "paused", False, CRITICAL, "nothing reaches the network"),
    ("primary", "shadow", True, WARNING, "shadow mode"),
    ("primary", "shadow", False, WARNING, "shadow mode"),
    ("primary", "stopped", True, CRITICAL, "silent for good"),
    ("primary", "stopped", False, CRITICAL, "silent for good: because"),
    ("secondary", "starting", True, WARNING, "not protected yet"),
    ("secondary", "starting", False, WARNING, "is not heard: because"),
    ("secondary", "protected", True, OK, "protected: either host may fail"),
    ("secondary", "protected", False, OK, "protected: either host may fail"),
    ("secondary", "checkpointing", True, OK, "protected: either host may fail"),
    ("secondary", "checkpointing", False, OK, "protected: either host may fail"),
    ("secondary", "degraded", True, WARNING, "protection is impaired"),
    ("secondary", "degraded", False, WARNING, "protection is impaired: because"),
    ("secondary", "solo", True, WARNING, "runs without a copy"),
    ("secondary", "solo", False, CRITICAL, "is not heard"),
    ("secondary", "promoted", True, WARNING, "runs without a copy (because)"),
    ("secondary", "promoted", False, CRITICAL, "is not heard"),
    ("secondary", "paused", True, WARNING, "without an operator"),
    ("secondary", "paused", False, WARNING, "without an operator"),
    ("secondary", "shadow", True, WARNING, "shadow mode"),
    ("secondary", "shadow", False, WARNING, "shadow mode"),
    ("secondary", "stopped", True, CRITICAL, "silent for good"),
    ("secondary", "stopped", False, CRITICAL, "silent for good"),
)


@pytest.mark.parametrize(("role", "state", "active", "level", "says"), TABLE)
def test_every_state_has_a_sentence(
    role: str, state: str, active: bool, level: Level, says: str
) -> None:
    h = health(doc(role, state, active=active))
    assert h.level is level and says in h.sentence, h


def test_the_table_is_complete() -> None:
    assert {row[:3] for row in TABLE} == {
        (r.value, s.value, a) for r in Role for s in State for a in (True, False)
    }


LINK = {"name": "mgmt", "silent_ms": 80.0, "echo_age_ms": 90.0, "rtt_us": 500.0, "sent": 9,
        "received": 8, "refused": {}, "trouble": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data_path__trouble": "tap-web1 is down"}, "tap-web1 is down"),
        ({"heartbeat_links": [LINK | {"silent_ms": 3000.0}]}, "heartbeat link mgmt is silent"),
        ({"heartbeat_links": [LINK | {"silent_ms": None}]}, "heartbeat link mgmt is silent"),
        ({"heartbeat_links": [LINK | {"trouble": "no device"}]}, "mgmt: no device"),
        ({"disks__lost": "root: I/O error"}, "root: I/O error"),
        ({"disks__room_trouble": "little room"}, "little room"),
        ({"active__disks_unproven": True}, "may lack writes"),
        ({"failover__trouble": "etcd is away"}, "arbiter: etcd is away"),
        ({"held": {"packets": 900, "bytes": 1, "limit": 1024}}, "900 of 1024 frames are held"),
        ({"failures": ["KeyError(1)"]}, "internal error: KeyError(1)"),
    ],
)
def test_what_needs_attention_makes_it_a_warning(more: dict[str, Any], says: str) -> None:
    h = health(doc("primary", "protected", active=True, **more))
    assert h.level is WARNING and says in h.sentence
    assert h.sentence.startswith("protected: either host may fail; ")
    worse = health(doc("primary", "stopped", active=False, **more))
    assert worse.level is CRITICAL and says in worse.sentence


def test_a_good_heartbeat_link_is_no_news() -> None:
    assert health(doc("primary", "protected", active=True, heartbeat_links=[LINK])).level is OK


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"qemu__gone": True}, "its QEMU is gone"),
        ({"active__lease": "none"}, "this host has no lease"),
        ({"port": "listening"}, "its tap is listening"),
        ({"mode": "drop"}, "in the mode drop"),
    ],
)
def test_why_a_guest_is_not_heard(more: dict[str, Any], says: str) -> None:
    for state in ("protected", "solo"):
        assert says in health(doc("primary", state, active=False, **more)).sentence


def test_the_other_guest_may_serve_alone() -> None:
    for state in ("starting", "stopped"):
        h = health(doc("primary", state, active=False, peer__state="promoted"))
        assert h.level is WARNING, h
    away = doc("primary", "stopped", active=False, peer__state="promoted", peer__connected=False)
    assert health(away).level is CRITICAL, "what it said before it went does not count"
    alone = doc("secondary", "degraded", active=False, peer__connected=False)
    assert health(alone).level is CRITICAL


def test_a_pair_whose_controllers_do_not_talk_is_not_well() -> None:
    h = health(doc("secondary", "protected", active=False, peer__connected=False))
    assert h.level is WARNING and "the control channel to the other host is down" in h.sentence


@pytest.mark.parametrize("outcome", ["lost", "waits"])
def test_protected_means_that_the_other_host_may_die(outcome: str) -> None:
    died = {"outcome": outcome, "sentence": "no guest would serve"}
    h = health(doc("secondary", "protected", active=False, if_peer_died=died))
    assert h.level is WARNING and "no guest would serve" in h.sentence
    assert "may fail" not in h.sentence


def test_a_pair_that_needs_an_operator_says_so() -> None:
    h = health(doc("primary", "protected", active=True, if_peer_died__outcome="operator"))
    assert h.level is OK and "an operator decides then" in h.sentence
