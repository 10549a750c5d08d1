# SPDX-License-Identifier: GPL-2.0-or-later
"""Hold what the benchmark has found: figures with their spread, goals, and how they are written.

A figure counts only beside another one of the same run. `ratio` is the arm against the row's base,
turned so that more is better and 1 is as good as the base.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Spread:
    """Median and range of the runs of one figure."""

    median: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        v = list(values)
        return Spread(statistics.median(v), min(v), max(v), len(v))

    def json(self) -> dict[str, float]:
        return {
            "median": _round(self.median),
            "min": _round(self.low),
            "max": _round(self.high),
            "runs": self.runs,
        }


def _round(x: float) -> float:
    """Round to four digits, which is more than any of these figures is worth."""
    if not x or not math.isfinite(x):
        return x
    return round(x, max(0, 3 - math.floor(math.log10(abs(x)))))


def cpu_seconds() -> float:
    """Return the whole machine's CPU time so far, s; interrupts included, stolen time not."""
    with open("/proc/stat") as f:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, f.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@dataclass
class Row:
    """One line of a table: the same thing measured in several ways."""

    name: str
    unit: str
    arms: dict[str, Spread]
    base: str = ""
    higher_is_better: bool = False
    wall: dict[str, Spread] = field(default_factory=dict)

    def ratio(self, arm: str) -> float | None:
        """Return the arm against the base; None if there is nothing to compare."""
        if self.base not in self.arms or arm not in self.arms:
            return None
        mine, base = self.arms[arm].median, self.arms[self.base].median
        up, down = (mine, base) if self.higher_is_better else (base, mine)
        return up / down if up > 0 and down > 0 else None

    def json(self, part: str) -> dict[str, Any]:
        arms: dict[str, dict[str, Any]] = {}
        for a, s in self.arms.items():
            arms[a] = dict(s.json())
            r = self.ratio(a)
            if r is not None:
                arms[a]["ratio"] = _round(r)
            if a in self.wall:
                arms[a]["wall"] = self.wall[a].json()
        return {
            "part": part, "name": self.name, "unit": self.unit, "base": self.base, "arms": arms,
        }  # fmt: skip


@dataclass
class Goal:
    """A goal. `value` None: it could not be measured, and is not met."""

    name: str
    value: float | None
    goal: float
    at_least: bool

    @property
    def met(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def json(self) -> dict[str, Any]:
        return {
            "name": f"{self.name} (at {'least' if self.at_least else 'most'})",
            "value": None if self.value is None else _round(self.value),
            "goal": self.goal,
            "met": self.met,
        }


@dataclass
class Part:
    """One part of the benchmark; `title` heads its table.

    `about`: where and when it was measured, if that is not the same for all parts of a report.
    """

    key: str
    title: str
    rows: list[Row] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    seconds: float = 0.0
    about: str = ""

    def add(
        self, name: str, unit: str, arms: Mapping[str, Spread], *, base: str = "",
        higher_is_better: bool = False, wall: Mapping[str, Spread] | None = None,
    ) -> Row:  # fmt: skip
        """Add a line to the table."""
        row = Row(name, unit, dict(arms), base, higher_is_better, dict(wall or {}))
        self.rows.append(row)
        return row

    def error(self, name: str, why: str) -> None:
        """Note something that could not be measured, with its original error."""
        self.errors.append((name, why))

    def goal(self, name: str, value: float | None, goal: float, *, at_least: bool = True) -> None:
        """Add a goal and what was reached."""
        self.goals.append(Goal(name, value, goal, at_least))


def machine(**more: Any) -> dict[str, Any]:
    """Describe the machine that it was measured on."""
    model = next(
        (x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
         if x.startswith("model name")), platform.machine(),
    )  # fmt: skip
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
        cwd=ROOT,
    ).stdout.strip()  # fmt: skip
    return {
        "cpu": model, "cpus": os.cpu_count(), "kernel": platform.release(),
        "qemu": qemu[0] if qemu else "", "commit": head, "date": time.strftime("%Y-%m-%d"), **more,
    }  # fmt: skip


def as_json(parts: list[Part], about: dict[str, Any]) -> dict[str, Any]:
    """Return build/bench-report.json."""
    results: list[dict[str, Any]] = []
    for p in parts:
        results += [r.json(p.key) for r in p.rows]
        results += [{"part": p.key, "name": n, "error": why} for n, why in p.errors]
    return {
        "machine": about,
        "results": results,
        "goals": [g.json() for p in parts for g in p.goals],
    }


def number(x: float) -> str:
    """Format a number for people."""
    if abs(x) >= 100:
        return f"{x:,.0f}"
    if abs(x) >= 10:
        return f"{x:.1f}"
    return f"{x:.2f}" if x else "0"


def _cell(row: Row, arm: str, short: bool) -> str:
    s = row.arms.get(arm)
    if s is None:
        return ""
    text = number(s.median)
    if s.runs > 1 and not short:
        text += f" [{number(s.low)}..{number(s.high)}]"
    r = row.ratio(arm)
    if r is not None and arm != row.base:
        text += f" **{r:.2f}**"
    if arm in row.wall and not short:
        text += f", wall {number(row.wall[arm].median)}"
    return text


def table(rows: list[Row], short: bool = False) -> list[str]:
    arms = list(dict.fromkeys(a for r in rows for a in r.arms))
    out = ["| |" + "|".join(arms) + "|", "|---|" + "---|" * len(arms)]
    for r in rows:
        out.append(f"| {r.name}, {r.unit} | " + " | ".join(_cell(r, a, short) for a in arms) + " |")
    return out


def _value(g: Goal) -> str:
    return "not measured" if g.value is None else f"{g.value:.3g}"


def goal_table(parts: list[Part]) -> list[str]:
    """Return all goals, including the missed ones."""
    out = ["| goal | wanted | reached | |", "|---|---|---|---|"]
    for g in (g for p in parts for g in p.goals):
        sign = "≥" if g.at_least else "≤"
        met = "met" if g.met else "**missed**"
        out.append(f"| {g.name} | {sign} {g.goal:.4g} | {_value(g)} | {met} |")
    return out


def describe(about: Mapping[str, Any]) -> str:
    """Return what machine() has found as a line."""
    kind = ", quick: few runs" if about.get("quick") else ""
    return (
        f"{about['cpu']}, {about['cpus']} CPUs, Linux {about['kernel']}, {about['qemu']}, "
        f"commit {about['commit']}, {about['date']}{kind}."
    )


def as_markdown(parts: list[Part], about: str) -> str:
    """Return build/bench-report.md."""
    out = [
        "# Benchmark", "", about, "",
        "Each cell: median [lowest..highest run] **ratio to the row's base** (1: as good, more is "
        "better). CPU time of whoever did the work, unless the unit is one of time on the wall.",
        "", "## Goals", "", *goal_table(parts),
    ]  # fmt: skip
    for p in parts:
        out += ["", f"## {p.title}", "", *([p.about, ""] if p.about else [])]
        for rows in groups_of(p.rows):
            out += [*table(rows), ""]
        for name, why in p.errors:
            out += [f"**{name}: not measured.**", "", "```", why.strip()[:4000], "```", ""]
    return "\n".join(out).rstrip() + "\n"


def write(parts: list[Part], about: dict[str, Any], build: Path) -> None:
    """Write report, table and plots."""
    build.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(parts, about), indent=1, allow_nan=False)
    (build / "bench-report.json").write_text(text + "\n")
    (build / "bench-report.md").write_text(as_markdown(parts, describe(about)))


def groups_of(rows: list[Row]) -> list[list[Row]]:
    """Group rows with the same columns into one table."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault(tuple(r.arms), []).append(r)
    return list(groups.values())
