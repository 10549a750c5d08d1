# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw the report's pictures; the only module that imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Part, Row, groups_of

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def _bars(ax: Any, rows: list[Row], value: Callable[[Row, str], float | None]) -> None:
    """Draw one group of horizontal bars for each row."""
    arms = [a for a in dict.fromkeys(a for r in rows for a in r.arms)
            if any(value(r, a) is not None for r in rows)]  # fmt: skip
    height = 0.8 / max(1, len(arms))
    for i, a in enumerate(arms):
        at = [y + i * height for y in range(len(rows))]
        width = [value(r, a) or 0.0 for r in rows]
        ax.barh(at, width, height, label=a, color=COLOURS[i % len(COLOURS)])
    ax.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [r.name for r in rows])
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.legend(fontsize=8)


def _held(plt: Any, part: Part) -> Any:
    rows = [r for r in part.rows if "floor" in r.arms]
    if not rows:
        return None
    fig, ax = plt.subplots(figsize=(8, 0.55 * len(rows) + 1.2))
    _bars(ax, rows, lambda r, a: None if a == "floor" else r.ratio(a))
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xlabel(
        "speed by CPU time; 1: forwarding P's frames and dropping S's, with no comparison"
    )
    return fig


def _peer(plt: Any, part: Part) -> Any:
    groups = groups_of([r for r in part.rows if r.base])
    if not groups:
        return None
    sizes = [len(g) * len(g[0].arms) + 1 for g in groups]
    fig, axes = plt.subplots(
        len(groups), 1, figsize=(8, 0.16 * sum(sizes) + 0.7 * len(groups)), squeeze=False,
        sharex=True, height_ratios=sizes,
    )  # fmt: skip
    for (ax,), group in zip(axes, groups, strict=True):
        _bars(ax, group, lambda r, a: max(r.arms[a].median, 10.0))
        ax.set_xscale("log")
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1][0].set_xlabel("CPU ns per frame (log): QEMU's objects and ours")
    return fig


def _guests(plt: Any, part: Part) -> Any:
    rows = [r for r in part.rows if r.unit in ("MiB/s", "ms")]
    if not rows:
        return None
    fig, axes = plt.subplots(len(rows), 1, figsize=(8, 1.25 * len(rows)), squeeze=False)
    for (ax,), r in zip(axes, rows, strict=True):
        arms = list(r.arms)
        ax.barh(arms, [r.arms[a].median for a in arms], color=COLOURS[: len(arms)])
        ax.invert_yaxis()
        ax.set_title(f"{r.name}, {r.unit}", fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
    return fig


def _apps(plt: Any, part: Part) -> Any:
    rows = [r for r in part.rows if r.unit.endswith("/s")]
    if not rows:
        return None
    fig, ax = plt.subplots(figsize=(8, 0.7 * len(rows) + 1.2))
    _bars(ax, rows, lambda r, a: None if a == r.base else r.ratio(a))
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xlabel("rate to that of shadow: both guests run, nothing is held")
    return fig


def _scale(plt: Any, part: Part) -> Any:
    rows = [r for r in part.rows if r.unit == "ns per frame"]
    if not rows:
        return None
    fig, ax = plt.subplots(figsize=(8, 3))
    n = [int(r.name.split()[0].replace(",", "")) for r in rows]
    for i, a in enumerate(rows[0].arms):
        ax.plot(n, [r.arms[a].median for r in rows], "o-", label=a, color=COLOURS[i])
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("connections in the table, each frame of a random one")
    ax.set_ylabel("ns per frame of the PVM")
    ax.legend(fontsize=8)
    return fig


def _goals(plt: Any, parts: list[Part]) -> Any:
    goals = [
        g for p in parts for g in p.goals
        if g.value is not None and math.isfinite(g.value) and g.goal > 0
    ]  # fmt: skip
    if not goals:
        return None
    fig, ax = plt.subplots(figsize=(8, 0.32 * len(goals) + 1.2))
    shown = []
    for g in goals:
        value = max(g.value or 0.0, 1e-3)
        shown.append(min(8.0, max(0.125, value / g.goal if g.at_least else g.goal / value)))
    colour = [COLOURS[2] if g.met else COLOURS[3] for g in goals]
    ax.barh(range(len(goals)), [s - 1 for s in shown], left=1, color=colour)
    ax.set_yticks(range(len(goals)), [g.name for g in goals], fontsize=7)
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.invert_yaxis()
    ax.set_xlabel("reached to wanted (log): right of 1 is met")
    return fig


def draw(parts: list[Part], build: Path) -> list[Path]:
    """Draw every picture for which there are figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_key = {p.key: p for p in parts}
    out = []
    for key, one in (
        ("held", _held), ("peer", _peer), ("guests", _guests), ("apps", _apps), ("scale", _scale),
    ):  # fmt: skip
        fig = one(plt, by_key[key]) if key in by_key else None
        if fig is not None:
            out.append(_save(fig, build / f"bench-{key}.png"))
    fig = _goals(plt, parts)
    if fig is not None:
        out.append(_save(fig, build / "bench-goals.png"))
    plt.close("all")
    return out


def _save(fig: Any, path: Path) -> Path:
    fig.tight_layout()
    fig.savefig(path, dpi=80, bbox_inches="tight")
    return path
