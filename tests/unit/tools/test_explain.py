# SPDX-License-Identifier: GPL-2.0-or-later
"""The why of checkpoints for people: tables, bytes side by side, and what is suggested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.config.file import ConfigError, parse
from colo_xdp.engine.journal import MAX_GROUPS, Divergence, Journal, JournalEntry
from colo_xdp.engine.waits import WAIT_BUCKETS
from colo_xdp.net import hexdump
from colo_xdp.net.frame import Evidence, Frame
from colo_xdp.status.document import empty
from colo_xdp.tools.explain import ADVICE, comment, duration, rules_text, text
from colo_xdp.tools.suggest import MIN_SEEN, Change, _set, apply, changes, diff
from tests.unit.controller.fakes import EXAMPLES
from tests.unit.tools.test_price import NOW

CONFIG = (EXAMPLES / "primary.toml").read_text()
KNOWN = {"compare_timeout": 3000, "max_queue_size": 1024, "ring_pages": 1024}
WEB = JournalEntry(1000.0, "payload_differs", "x", "tcp", 80, "default", 12.0, 30.0, 5, 7000)
DIFFERENCE = Divergence(
    5, Cause.PAYLOAD_DIFFERS, "tcp 10.0.0.1:80 > 10.0.0.2:4000", "tcp", 80, "default",
    Evidence(107, 2, b"abcd", b"abXd", Frame(b"\1" * 60, 5), b"\2" * 60),
)  # fmt: skip


def doc(
    *entries: JournalEntry, differences: int = 0, rules: list[Any] | None = None
) -> dict[str, Any]:
    j = Journal()
    for e in entries:
        j.checkpoint(e)
    for _ in range(differences):
        j.divergence(DIFFERENCE, 1000.0)
    return j.to_json() | {"rules": rules or [], "now": NOW}


def status(buckets: dict[int, int]) -> dict[str, Any]:
    s = empty("web1", "primary").to_json()
    for at, n in buckets.items():
        s["wait"]["buckets"][at] = n
    return s


def test_the_table_has_one_line_per_cause_service_and_rule() -> None:
    late = JournalEntry(1500.0, "compare_timeout", "x", "udp", 53, "dns", 20.0, 50.0, 1, 100)
    lost = replace(late, at=1600.0, failed="QMP to the PVM is down")
    out = text(doc(WEB, WEB, WEB, late, lost, differences=2), last=1)
    rows = [" ".join(x.split()) for x in out.splitlines()]
    assert "3 75% 12.0 / 12.0 30.0 5, 7000 payload_differs tcp 80 default" in rows
    assert "1 25% 20.0 / 20.0 50.0 1, 100 compare_timeout udp 53 dns" in rows
    assert "1 failed:" in rows and "compare_timeout: QMP to the PVM is down" in rows
    assert "the last 1 differences:" in rows and any(r.startswith("#2 ") for r in rows)
    assert "^^" in out
    assert "payload_differs" not in text(doc(WEB, late), since=1200.0)
    assert text(doc(WEB), since=2000.0) == "no checkpoint in this time"


def test_every_cause_has_advice() -> None:
    assert set(ADVICE) == set(Cause)


def test_only_failed_checkpoints_are_a_story_too() -> None:
    assert "1 failed:" in text(doc(replace(WEB, failed="no answer")))


def test_bytes_side_by_side() -> None:
    lines = hexdump.compare(
        bytes(range(40)), bytes(range(20)) + b"\xff" + bytes(range(21, 30)), 20, 520
    )
    assert lines[0].split()[:3] == ["500", "both", "00"]
    assert lines[1].split()[:3] == ["516", "PVM", "10"] and " ff " in lines[2]
    assert lines[3].index("^^") == lines[2].index("ff")
    assert lines[4].split()[:2] == ["532", "PVM"]
    assert hexdump.compare(b"", b"", 0, 0)


def test_times_and_comments() -> None:
    assert [duration(x) for x in ("90", "90s", "15m", "2h", "1d")] == [90, 90, 900, 7200, 86400]
    for bad in ("", "x", "-1s", "0", "nan", "5w"):
        with pytest.raises(ValueError):
            duration(bad)
    d = doc(differences=1)["divergences"][0]
    assert comment(d) == (
        "#1 payload_differs: tcp 10.0.0.1:80 > 10.0.0.2:4000, byte 107: 0x63 of the PVM, "
        "0x58 of the SVM, rule default"
    )
    assert "nothing of the SVM" in comment(d | {"svm": "6162"})


def test_rules_as_a_table() -> None:
    rule = {"name": "dns", "action": "pass", "flows": 3, "uncompared": 70, "differences": 0}
    assert rules_text([rule]).splitlines()[1].split() == ["dns", "pass", "3", "70", "0"]
    assert "(former)" in rules_text([rule | {"action": ""}])


def test_a_flood_of_ports_keeps_the_sums_right_and_memory_bounded() -> None:
    j = Journal()
    for port in range(3 * MAX_GROUPS):
        j.checkpoint(replace(WEB, port=port))
        j.divergence(DIFFERENCE, 1.0)
    assert len(j.groups) <= MAX_GROUPS + 1
    assert sum(g.count for g in j.groups.values()) == 3 * MAX_GROUPS
    page = j.frames_json(3 * MAX_GROUPS - 3, 2)
    assert [p["serial"] for p in page["pairs"]] == [3 * MAX_GROUPS - 2, 3 * MAX_GROUPS - 1]
    assert page["pairs"][0]["pvm_frame"] == "01" * 60 and page["seen"] == 3 * MAX_GROUPS


# -- suggestions


def test_a_port_that_keeps_differing_gets_a_rule_that_loads() -> None:
    wanted = changes(doc(*[WEB] * MIN_SEEN), status({}), KNOWN)
    assert (
        len(wanted) == 1 and "client of this port may find its connection broken" in wanted[0].why
    )
    rules = parse(apply(CONFIG, wanted)).rules
    assert [(r.name, r.action, r.port) for r in rules] == [
        ("suggested-tcp-80", "mirror-only", "80")
    ]
    out = diff(CONFIG, "web1.toml", wanted)
    assert out.startswith("--- web1.toml\n") and "\n+[[rule]]\n" in out and "\n-" not in out[14:]


def test_once_is_not_enough_and_what_is_there_is_not_suggested_again() -> None:
    few = doc(*[WEB] * (MIN_SEEN - 1))
    assert changes(few, status({}), KNOWN) == [] and diff(CONFIG, "x", []) == ""
    there = [{"name": "suggested-tcp-80"}]
    assert changes(doc(*[WEB] * 50, rules=there), status({}), KNOWN) == []


def test_timeouts_follow_what_was_measured() -> None:
    late = doc(*[replace(WEB, cause="compare_timeout")] * MIN_SEEN)
    slow = next(i for i, b in enumerate(WAIT_BUCKETS) if b >= 1.0)
    (longer,) = changes(late, status({0: 500, slow: 500}), KNOWN)
    assert (longer.key, longer.value) == ("compare_timeout", "6000")
    (shorter,) = changes(late, status({0: 1000}), KNOWN)
    assert (shorter.key, shorter.value) == ("compare_timeout", "100")
    assert changes(late, status({}), KNOWN) == []


@pytest.mark.parametrize(
    ("cause", "key", "value"),
    [("queue_full", "max_queue_size", "4096"), ("event_lost", "ring_pages", "2048")],
)
def test_what_was_too_small_grows(cause: str, key: str, value: str) -> None:
    wanted = changes(doc(*[replace(WEB, cause=cause, port=0)] * MIN_SEEN), status({}), KNOWN)
    assert [(c.key, c.value) for c in wanted] == [(key, value)]
    c = parse(apply(CONFIG, wanted))
    assert (
        str(c.compare.max_queue_size if key == "max_queue_size" else c.datapath.ring_pages) == value
    )


def test_a_key_is_set_where_it_stands_in_its_section_or_in_a_new_one() -> None:
    one = Change("because", "compare", "compare_timeout", "77")
    for text_ in (
        "[peer]\ncompare_timeout = 1\n[compare]\na = 1\ncompare_timeout = 5 # mine\n",
        "[compare] # ours\nmax = 2\n[[rule]]\nx = 1\n",
        "[peer]\na = 1\n[[rule]]\nx = 1\n",
    ):
        new = "\n".join(_set(text_.splitlines(), one))
        section = new.split("[compare]")[1].split("[[")[0]
        assert "compare_timeout = 77" in section and "= 5" not in new


def test_a_suggestion_that_could_not_be_loaded_is_an_error() -> None:
    with pytest.raises(ConfigError):
        apply(CONFIG, [Change("because", "compare", "compare_timeout", "0")])
