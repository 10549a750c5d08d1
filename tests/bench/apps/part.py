# SPDX-License-Identifier: GPL-2.0-or-later
"""Real applications in five arms: rows, goals, and the lives that they come from.

The arms take turns, as one life differs from the next by more than some proxies do: a figure is the
median of the lives of its arm. What two guests cost on these CPUs is in the arm `shadow`, where
both run and nothing is held, so it is the base of each ratio.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from colo_xdp.datapath.source import LoadError
from colo_xdp.lab.net import LabError
from colo_xdp.qemu.disks import DiskError
from colo_xdp.qemu.qmp import QmpError
from colo_xdp.service.control_socket import NotRunning

from ..report import Part, Spread
from . import lives
from .lives import ARMS, COMPARING, OURS, QEMU, SHADOW, Life, Seen
from .outputs import quantile
from .workloads import WORKLOADS, Workload

LIVES = 5
#: of a workload's usual length, with --quick
QUICK = 0.5
AGREE, CONTENDED, FAR_AHEAD, LOGIN = 0.7, 0.6, 20.0, 2.0
CONTENDED_P99_MS, NEEDLESS, PREDICTED = 1000.0, 1e-3, 2.0
LATENESS_US = ((0.5, 50.0), (0.99, 1000.0))
FAILURES = (LabError, DiskError, QmpError, NotRunning, LoadError, OSError, ValueError)

Lives = Mapping[str, Sequence[Life]]


def wanted_lives(quick: bool) -> int:
    """Return how many lives each arm gets: APPS_LIVES, if that is set. Raises ValueError."""
    lives_of_each = int(os.environ.get("APPS_LIVES") or (1 if quick else LIVES))
    if lives_of_each < 1:
        raise ValueError("APPS_LIVES is less than 1")
    return lives_of_each


def wanted_workloads() -> tuple[str, ...]:
    """Return the keys in APPS_ONLY; none: all workloads. Raises ValueError."""
    only = tuple((os.environ.get("APPS_ONLY") or "").split())
    known = {w.key for w in WORKLOADS}
    if unknown := {*only} - known:
        raise ValueError(
            f"APPS_ONLY: no {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return only


def run(part: Part, quick: bool, build: Path) -> None:
    """Run all arms in turns."""
    found: dict[str, list[Life]] = {arm: [] for arm in ARMS}
    build, only = build.absolute(), wanted_workloads()

    def say(text: str) -> None:
        print(f"  {text}", flush=True)

    for turn in range(wanted_lives(quick)):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            try:
                life = lives.once(arm, build, QUICK if quick else 1.0, only, say=say)
            except FAILURES as e:
                part.error(f"applications, {arm}, life {turn + 1}", f"{type(e).__name__}: {e}")
                continue
            found[arm].append(life)
            for why in life.trouble:
                part.error(f"applications, {arm}, life {turn + 1}", why)
    add_rows(part, found)
    add_goals(part, found)


def of(found: Lives, arm: str, workload: str) -> list[Seen]:
    """Return a workload in each life of an arm that has it."""
    return [x.workloads[workload] for x in found[arm] if workload in x.workloads]


def _spreads(
    found: Lives, workload: str, value: Callable[[Seen], float], arms: Sequence[str] = ARMS
) -> dict[str, Spread]:
    seen = {arm: of(found, arm, workload) for arm in arms}
    return {arm: Spread.of(map(value, some)) for arm, some in seen.items() if some}


def add_rows(part: Part, found: Lives) -> None:
    """Add what the lives have shown to the table."""
    for w in WORKLOADS:
        _add_workload(part, found, w)
    for q, _ in LATENESS_US:
        late = lateness_us(found, q)
        if late:
            part.add(f"from the later guest's frame to its release: p{q * 100:g}", "us", late)
    for name, unit, value in (
        ("failover: longest time without the end of a transaction", "s", lambda f: f.gap),
        ("failover: the same of a line every 20 ms", "s", lambda f: f.echo_gap),
        ("failover: errors of clients", "count", lambda f: float(f.errors)),
    ):
        values = [value(x.failover) for x in found[OURS] if x.failover]
        if values:
            part.add(name, unit, {OURS: Spread.of(values)})


def lateness_us(found: Lives, q: float) -> dict[str, Spread]:
    """Return a quantile of the lateness in each life of our arm."""
    values = [quantile(x.lateness, q) * 1e6 for x in found[OURS] if x.lateness]
    return {OURS: Spread.of(values)} if values else {}


def _add_workload(part: Part, found: Lives, w: Workload) -> None:
    rates = _spreads(found, w.key, lambda s: s.outcome.rate * w.per_operation)
    if not rates:
        return
    part.add(w.title, w.unit, rates, base=SHADOW, higher_is_better=True)
    part.add(f"{w.title}: p50", "ms", _spreads(found, w.key, lambda s: s.outcome.p50), base=SHADOW)
    part.add(f"{w.title}: p99", "ms", _spreads(found, w.key, lambda s: s.outcome.p99), base=SHADOW)
    counts: tuple[tuple[str, Callable[[Seen], float]], ...] = (
        ("errors", lambda s: s.outcome.errors),
        ("not ended at its deadline", lambda s: s.outcome.hung),
        ("checkpoints", lambda s: sum(s.checkpoints.values())),
    )
    for name, count in counts:
        values = _spreads(found, w.key, count)
        if any(v.high for v in values.values()):
            part.add(f"{w.title}: {name}", "count", values)
    told = [s.predicted for s in of(found, SHADOW, w.key) if s.predicted]
    if told:
        part.add(f"{w.title}: what explain predicts for ours", w.unit,
                 {SHADOW: Spread.of(x * w.per_operation for x in told)})  # fmt: skip
    causes = {c for arm in COMPARING for s in of(found, arm, w.key) for c in s.checkpoints}
    for cause in sorted(causes):
        values = _spreads(found, w.key, lambda s, c=cause: s.checkpoints[c], COMPARING)  # type: ignore[misc]
        part.add(f"{w.title}: checkpoints for {cause}", "count", values)


def rate(found: Lives, arm: str, workload: str) -> float | None:
    """Return the median rate of a workload in an arm; None if it has none."""
    some = of(found, arm, workload)
    return Spread.of(s.outcome.rate for s in some).median if some else None


def to(found: Lives, workload: str, base: str, arm: str = OURS) -> float | None:
    """Return how fast an arm is to another one; None if one of them has no figure."""
    mine, other = rate(found, arm, workload), rate(found, base, workload)
    return mine / other if mine is not None and other else None


def off_by(found: Lives, workload: str) -> float | None:
    """Return the factor between what shadow mode predicts and what protection then costs."""
    told = [s.predicted for s in of(found, SHADOW, workload) if s.predicted]
    paid = rate(found, OURS, workload)
    if not told or not paid:
        return None
    ratio = Spread.of(told).median / paid
    return max(ratio, 1 / ratio)


def needless(found: Lives, arm: str = OURS) -> float | None:
    """Return the share of needless checkpoints in the frames that were released."""
    seen = [s for life in found[arm] for s in life.workloads.values()]
    released = sum(s.released for s in seen)
    return sum(s.needless for s in seen) / released if released else None


def add_goals(part: Part, found: Lives) -> None:
    """Add the goals, and what was reached."""
    for w in WORKLOADS:
        part.goal(f"applications, ours to QEMU's proxy: {w.title}", to(found, w.key, QEMU), 1.0)
    for w in WORKLOADS:
        if w.agree:
            part.goal(f"applications, ours to shadow: {w.title}", to(found, w.key, SHADOW), AGREE)
    part.goal(
        "applications, ours to shadow: one hot row, 4 clients",
        to(found, "tpcb-4", SHADOW), CONTENDED,
    )  # fmt: skip
    p99 = [s.outcome.p99 for s in of(found, OURS, "tpcb-4")]
    part.goal(
        "applications, ours: p99 of one hot row, 4 clients, ms",
        Spread.of(p99).median if p99 else None, CONTENDED_P99_MS, at_least=False,
    )  # fmt: skip
    part.goal(
        "applications, ours to QEMU's proxy: one hot row, 4 clients, far ahead",
        to(found, "tpcb-4", QEMU), FAR_AHEAD,
    )  # fmt: skip
    part.goal(
        "applications, what explain predicts in shadow mode for one hot row, 4 clients: off by "
        "a factor of", off_by(found, "tpcb-4"), PREDICTED, at_least=False,
    )  # fmt: skip
    login = to(found, "login", SHADOW)
    part.goal(
        "applications, time of an ssh login to shadow's", 1 / login if login else None, LOGIN,
        at_least=False,
    )  # fmt: skip
    part.goal(
        "applications, ours: needless checkpoints per released frame", needless(found), NEEDLESS,
        at_least=False,
    )  # fmt: skip
    for q, most in LATENESS_US:
        late = lateness_us(found, q).get(OURS)
        part.goal(
            f"applications, ours: from the later guest's frame to its release, p{q * 100:g}, us",
            late.median if late else None, most, at_least=False,
        )  # fmt: skip
    failovers = [x.failover for x in found[OURS]]
    errors = [f.errors for f in failovers if f is not None]
    part.goal(
        "applications, errors of clients at a failover, the worst life",
        float(max(errors)) if errors and None not in failovers else None, 0.0, at_least=False,
    )  # fmt: skip
