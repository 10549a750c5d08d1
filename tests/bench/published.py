# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep the published figures: docs/benchmarks.md and the files in tests/bench/report.

The whole benchmark takes hours, so one run may replace some parts only. Each part is kept as
`PART.json` with the machine and the commit that it was measured on. The page, the full table and
the plots are made from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import report
from .report import Goal, Part, Row, Spread

PAGE = report.ROOT / "docs" / "benchmarks.md"
FOLDER = Path(__file__).parent / "report"
BEGIN, END = "<!-- bench: by make bench PUBLISH=1 -->", "<!-- bench: end -->"

#: parts that PAGE shows, and what the rows that it shows have in their name or unit
_SHORT = {"held": "behind by 1", "goodput": "Gbit/s", "peer": "", "guests": "", "apps": "/s",
          "rest": ""}  # fmt: skip

Draw = Callable[[list[Part], Path], list[Path]]


def keep(part: Part, about: Mapping[str, Any], folder: Path) -> None:
    """Write a part into `folder`."""
    text = json.dumps({"about": dict(about), "part": asdict(part)}, indent=1, allow_nan=False)
    (folder / f"{part.key}.json").write_text(text + "\n")


def _spreads(stored: Mapping[str, Any]) -> dict[str, Spread]:
    return {arm: Spread(**values) for arm, values in stored.items()}


def kept(path: Path) -> tuple[Part, dict[str, Any]]:
    """Return a part, and what it was measured on. Raises ValueError."""
    try:
        stored = json.loads(path.read_text())
        part, about = stored["part"], stored["about"]
        part["rows"] = [
            Row(**row | {"arms": _spreads(row["arms"]), "wall": _spreads(row["wall"])})
            for row in part["rows"]
        ]
        part["goals"] = [Goal(**goal) for goal in part["goals"]]
        part["errors"] = [(name, why) for name, why in part["errors"]]
        return Part(**part), about
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e


def publish(
    parts: Sequence[Part], about: Mapping[str, Any], order: Sequence[str], draw: Draw
) -> None:
    """Replace these parts, and make page, table and plots anew. `order`: of all parts there are."""
    FOLDER.mkdir(exist_ok=True)
    for part in parts:
        keep(part, about, FOLDER)
    found = [kept(path) for key in order if (path := FOLDER / f"{key}.json").exists()]
    lines = {report.describe(about) for _, about in found}
    for part, measured in found:
        part.about = "" if len(lines) == 1 else report.describe(measured)
    everything = [part for part, _ in found]
    head = lines.pop() if len(lines) == 1 else "Measured part by part; each says where and when."
    (FOLDER / "bench-report.md").write_text(report.as_markdown(everything, head))
    for old in FOLDER.glob("bench-*.png"):
        old.unlink()
    text = PAGE.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    shown = "\n".join([*_lines(everything, head, draw(everything, FOLDER)), ""])
    PAGE.write_text(before + BEGIN + shown + END + after)


def _lines(parts: list[Part], head: str, plots: list[Path]) -> list[str]:
    """Return what PAGE shows."""
    lines = ["", head, "", *report.goal_table(parts), ""]
    for p in parts:
        rows = [r for r in p.rows if r.base and _SHORT.get(p.key, "\0") in r.name + r.unit]
        if not rows:
            continue
        lines += [f"**{p.title}**", "", *([p.about, ""] if p.about else [])]
        for group in report.groups_of(rows):
            lines += [*report.table(group, short=True), ""]
    return lines + [f"![{x.stem}](../tests/bench/report/{x.name})" for x in plots]
