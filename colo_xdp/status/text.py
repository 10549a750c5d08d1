# SPDX-License-Identifier: GPL-2.0-or-later
"""The status, the flows and the list of pairs as plain text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .glance import Glance, glance, size
from .health import Level, health

_MARK = {Level.OK: "  ", Level.WARNING: "! ", Level.CRITICAL: "!!"}


def text(s: Mapping[str, Any], now: float, before: Mapping[str, Any] | None = None) -> str:
    """Return the lines about one host of a pair, at the unix time `now`."""
    return plain(glance(s, now, before))


def plain(g: Glance) -> str:
    """Return a view without colours. `!` marks what needs attention."""
    width = max([12, *(len(line.name) for line in g.lines())])
    out = [g.title, f"{g.health.level}: {g.health.sentence}"]
    for lines in g.sections.values():
        out.append("")
        out += [f"{_MARK[x.level]}{x.name:<{width}} {x.text}".rstrip() for x in lines]
    return "\n".join(out)


def flows(doc: Mapping[str, Any]) -> str:
    """Return the answer to `flows` as a table."""
    rows = doc["flows"]
    lines = [
        f"{'bytes':>11} {'held':>5} {'waits ms':>9} {'idle s':>8}  {'path':<10} {'rule':<16} flow"
    ]
    for r in rows:
        sent = "-" if r["bytes"] is None else size(r["bytes"])
        lines.append(
            f"{sent:>11} {r['held']:>5} {r['wait_ms']:>9.1f} {r['idle_ms'] / 1000:>8.1f}  "
            f"{r['path']:<10} {r['rule']:<16} {r['flow']}" + (f" at {r['nic']}" if r["nic"] else "")
        )
    more = doc["matched"] - len(rows)
    if more:
        lines.append(f"and {more} more of {doc['seen']}: see --limit")
    if not doc["whole"]:
        lines.append("there are too many connections to look at all of them in time")
    return "\n".join(lines)


def pairs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the list of a host's pairs; each row has the name, and a status or a trouble."""
    lines = [f"{'pair':<11} {'role':<10} {'state':<14} {'other host':<14} health"]
    for r in rows:
        s = r["status"]
        if s is None:
            lines.append(f"{r['pair']:<11} {r['role']:<10} {'-':<14} {'-':<14} {r['trouble']}")
            continue
        p, h = s["peer"], health(s)
        peer = (p["state"] or "connected") if p["connected"] else "not connected"
        lines.append(
            f"{s['pair']:<11} {s['role']:<10} {s['state']:<14} {peer:<14} {h.level}: {h.sentence}"
        )
    return "\n".join(lines)
