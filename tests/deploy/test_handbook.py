# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that docs/operator/alerts.md says of the shipped rules what they do."""

from __future__ import annotations

import re

import pytest

from .rules import ROOT, Alert, alerts
from .test_alerts import table

PAGE = ROOT / "docs/operator/alerts.md"
PARTS = ("Meaning", "Clients see", "Causes", "Do", "Over when")
UNITS = {"s": "second", "m": "minute", "h": "hour"}
#: what an expression compares flags with
FLAGS = {"0", "1"}


def entries() -> dict[str, str]:
    """Return the sections of the page that are named like an alert."""
    parts = re.split(r"^#{2,3} (.+)\n", PAGE.read_text(), flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: text for name, text in found.items() if name.startswith("Colo")}


def words(duration: str) -> str:
    """Return a duration of Prometheus as the page writes it."""
    n, unit = int(duration[:-1]), UNITS[duration[-1]]
    return f"{n} {unit}{'s' * (n != 1)}"


def figures(expr: str) -> list[tuple[str, ...]]:
    """Return what an expression has of durations and limits, each in the ways to write it."""
    spans = [(words(d),) for d in re.findall(r"\[(\w+)\]", expr)]
    plain = re.sub(r'"[^"]*"|\[\w+\]', "", expr)
    limits = set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.])", plain)) - FLAGS
    return spans + [(n, f"{float(n) * 100:g} %") for n in sorted(limits)]


def test_each_alert_has_an_entry_and_each_entry_an_alert() -> None:
    assert len(alerts()) > 20 and list(entries()) == [a.name for a in alerts()]


@pytest.mark.parametrize("alert", alerts(), ids=lambda a: a.name)
def test_an_entry_says_what_its_rule_does(alert: Alert) -> None:
    text = entries()[alert.name]
    when = f"after {words(alert.wait)}" if alert.wait else "at once"
    assert text.startswith(f"\n*{alert.severity.capitalize()}, {when}.*\n")
    assert re.findall(r"^- \*\*([A-Z][\w ]+)\*\*", text, re.M) == list(PARTS)
    plain = " ".join(text.split())
    for forms in figures(alert.expr):
        assert any(re.search(rf"\b{re.escape(f)}(?!\w)", plain) for f in forms), forms


@pytest.mark.parametrize("alert", alerts(), ids=lambda a: a.name)
def test_a_rule_leads_to_its_entry(alert: Alert) -> None:
    url = alert.annotations["runbook_url"]
    root = "file:///usr/share/doc/colo-xdp/"  # of `make install`
    page, anchor = url.removeprefix(root).split("#")
    assert url.startswith(root) and ROOT / page == PAGE and anchor == alert.name.lower()
    assert alert.severity in ("critical", "warning", "info")
    assert alert.annotations["summary"].startswith("{{ $labels.pair }}: ")


def test_the_contents_name_each_alert() -> None:
    head = PAGE.read_text().split("\n## ")[0]
    assert re.findall(r"\[(Colo\w+)\]\(#", head) == [a.name for a in alerts()]


def test_the_table_is_what_was_tested() -> None:
    section = PAGE.read_text().split("\n## What fires when\n")[1].split("\n## ")[0]
    rows = [x for x in section.splitlines() if x.startswith("|")]
    assert rows == table().splitlines()


def test_a_wrong_figure_would_be_seen() -> None:
    assert figures('rate(a{b="7"}[5m]) > 0.8 * c and x == 1 or y == -1') == [
        ("5 minutes",), ("0.8", "80 %"),
    ]  # fmt: skip
    assert (words("1m"), words("10s"), words("6h")) == ("1 minute", "10 seconds", "6 hours")
