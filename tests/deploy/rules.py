# SPDX-License-Identifier: GPL-2.0-or-later
"""The alert rules as they are shipped, read without a YAML parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yml"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert of the file."""

    name: str
    expr: str
    wait: str  # as Prometheus writes it, "" for none
    severity: str
    annotations: dict[str, str]


def rule_metrics() -> set[str]:
    """Return the metrics that the rules read, as they are scraped."""
    return set(re.findall(r"(?<![\w:])colo_xdp_\w+(?=[{\[\s)])", RULES.read_text()))


def alerts() -> list[Alert]:
    """Return the alerts in the order of the file."""
    return [_alert(part) for part in RULES.read_text().split("      - alert: ")[1:]]


def _alert(text: str) -> Alert:
    name = text.split("\n", 1)[0]
    lines = [x for x in text.splitlines()[1:] if not x.lstrip().startswith("#")]
    text = "\n".join(lines)
    expr = re.search(r"^ {8}expr: (?:\|-\n((?: {10}.*\n)+)|(.*)\n)", text, re.M)
    wait = re.search(r"^ {8}for: (\w+)$", text, re.M)
    severity = re.search(r"^ {8}labels: \{severity: (\w+)\}$", text, re.M)
    notes = re.findall(r"^ {10}(\w+): (['\"])(.*)\2$", text, re.M)
    assert expr and severity, name
    return Alert(
        name,
        re.sub(r"\s+", " ", expr[1] or expr[2]).strip(),
        wait[1] if wait else "",
        severity[1],
        {key: value for key, _, value in notes},
    )
