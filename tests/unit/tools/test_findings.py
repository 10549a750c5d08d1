# SPDX-License-Identifier: GPL-2.0-or-later
"""The findings of doctor as text, as JSON and side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from colo_xdp.service import examine
from colo_xdp.tools import findings
from colo_xdp.tools.findings import FAIL, OK, WARN, Check, Report, between, columns, link_up, worst

FINE = Check("root", OK, "yes")
DOWN = Check("tap", FAIL, "tap0 is down", "ip link set tap0 up", link_up("tap0"), "lan")
HERE = Report("web1", "primary", "hosta", "0.1.0", True, (FINE, DOWN))
THERE = Report("web1", "secondary", "hostb", "0.1.0", True, (FINE, replace(DOWN, level=WARN)))


def test_as_text() -> None:
    assert FINE.lines() == ["ok    root: yes"]
    assert DOWN.lines() == ["FAIL  tap (lan): tap0 is down", "      -> ip link set tap0 up"]
    assert worst([FINE, DOWN]) == FAIL and worst([]) == OK


def test_as_json_and_back_without_what_is_for_its_own_host() -> None:
    doc = json.loads(json.dumps(HERE.to_json()))
    assert doc["level"] == "fail" and doc["checks"][1] == {
        "key": "tap", "nic": "lan", "level": "fail", "text": "tap0 is down",
        "remedy": "ip link set tap0 up", "fix": "ip link set tap0 up",
    }  # fmt: skip
    assert Report.from_json(doc) == replace(HERE, checks=(FINE, replace(DOWN, fix=None)))
    assert Report.from_json(doc | {"zeal": 1}).host == "hosta", "a later release may say more"


@pytest.mark.parametrize(
    "change",
    [
        {"checks": None}, {"checks": [7]}, {"checks": [{"key": "a"}]}, {"host": None, "checks": {}},
        {"checks": [{"key": "a", "nic": "", "level": "bad", "text": "", "remedy": ""}]},
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(change: dict[str, Any]) -> None:
    doc: Any = HERE.to_json() | change
    if change.get("host", "") is None:
        doc = []
    with pytest.raises(ValueError, match="not a"):
        Report.from_json(doc)


def test_side_by_side() -> None:
    lines = columns(HERE, replace(THERE, checks=(FINE, *THERE.checks[1:], Check("x", OK, "only"))))
    assert lines[0].split() == ["hosta", "hostb"]
    assert lines[1].split() == ["ok", "ok", "root"] and lines[2].strip() == "yes"
    assert lines[3].split() == ["FAIL", "warn", "tap", "(lan)"]
    assert lines[4].strip() == "tap0 is down", "what both say is said once"
    (only,) = (x for x in lines if x.endswith("  x"))
    assert only.split() == ["-", "ok", "x"] and lines[-1].strip() == "hostb: only"
    other = replace(DOWN, text="tap7 is down", remedy="")
    lines = [x.strip() for x in columns(HERE, replace(THERE, checks=(FINE, other)))]
    assert "hosta: tap0 is down" in lines and "-> ip link set tap0 up" in lines
    assert "hostb: tap7 is down" in lines


@pytest.mark.parametrize(
    ("release", "ahead", "blur", "said"),
    [
        ("0.1.0", 0.1, 0.5, [("releases", OK), ("clocks", OK)]),
        ("0.1.0", 2.9, 1.0, [("releases", OK), ("clocks", OK)]),
        ("0.2.0", 0.1, 0.5, [("releases", WARN), ("clocks", OK)]),
        ("0.1.0", 60.0, 0.5, [("releases", OK), ("clocks", WARN)]),
        ("0.1.0", -60.0, 0.5, [("releases", OK), ("clocks", WARN)]),
    ],
)
def test_of_both_hosts_together(
    release: str, ahead: float, blur: float, said: list[tuple[str, int]]
) -> None:
    found = between(HERE, replace(THERE, release=release), ahead, blur)
    assert [(c.key, c.level) for c in found] == said
    for c in found:
        assert bool(c.remedy) == (c.level != OK)
    if abs(ahead) == 60:
        want = "hostb's clock is 60 s " + ("ahead of" if ahead > 0 else "behind")
        assert found[1].text.startswith(f"{want} that of hosta")


def test_a_report_fits_into_a_message_and_keeps_what_is_worst() -> None:
    many = [Check(f"k{i}", OK, '"' * 900) for i in range(100)]
    long = replace(HERE, checks=(*many, DOWN, *many))
    sent = examine.compact(json.dumps(long.to_json() | {"fixed": []}).encode())
    assert len(sent) <= 61440
    report = Report.from_json(json.loads(sent))
    assert replace(DOWN, fix=None) in report.checks and 20 < len(report.checks) < 100
    assert max(len(c.text) for c in report.checks) == 500
    small = examine.compact(json.dumps(HERE.to_json()).encode())
    assert json.loads(small) == HERE.to_json()
    for wrong in (b"", b"[]", b"{}", b"nonsense", b'{"checks": 3}'):
        with pytest.raises(ValueError, match="no report"):
            examine.compact(wrong)


def test_each_fix_names_its_command_and_how_to_take_it_back() -> None:
    fixes = [
        link_up("tap0"), findings.join_bridge("tap0", "br0"),
        findings.quickack("10.0.0.2", "ip route replace 10.0.0.2 dev eth2 quickack 1"),
        findings.run_dir("/run/x"), findings.key_mode("/k", 0o644),
    ]  # fmt: skip
    assert {f.kind for f in fixes} == set(findings.FixKind)
    assert [f.in_path for f in fixes] == [True, True, False, False, False]
    assert [f.undo for f in fixes] == [
        "ip link set tap0 down", "ip link set tap0 nomaster", "ip route del 10.0.0.2",
        "rmdir /run/x", "chmod 644 /k",
    ]  # fmt: skip


def test_hosts_of_one_name_are_told_apart_by_their_roles() -> None:
    assert columns(HERE, replace(THERE, host="hosta"))[0].split() == ["primary", "secondary"]


def test_a_report_of_the_other_host_steers_no_terminal() -> None:
    bad = Check("tap\x1b[2J", FAIL, "\x1b]52;c;eA==\x07", "\r\x1b[A", nic="\x1b")
    report = Report.from_json(replace(HERE, host="\x1bc", checks=(bad,)).to_json())
    text = "".join([*report.checks[0].lines(), *columns(HERE, report)])
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
