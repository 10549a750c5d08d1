# SPDX-License-Identifier: GPL-2.0-or-later
"""One life of the guest with one proxy: built from scratch, used by every client, and removed."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colo_xdp.compare.causes import WAITS
from colo_xdp.lab.net import LabError, wait_for
from colo_xdp.lab.pair import Lab
from colo_xdp.tools import price

from .. import waits
from ..arms import TAG, Events, QemuLab, prove
from . import image, lateness, names
from .failover import Failover, fail_over
from .outputs import Outcome, OutputError
from .tools import Tools
from .workloads import DEADLINE_S, WORKLOADS, Place, Workload, prime

NONE, SHADOW, QEMU, FIXED, OURS = ARMS = ("none", "shadow", "QEMU", "ours, fixed", "ours")
COMPARING = (FIXED, OURS)
PROTECT_S = 240.0
SETTLE_S = 20.0
#: MiB; the guest's disk is idle between two checkpoints but for the database and uploads
OVERLAY_LIMIT = 512


@dataclass
class Seen:
    """One workload in one life."""

    outcome: Outcome
    checkpoints: Counter[str] = field(default_factory=Counter)  # by cause
    waited: int = 0  # checkpoints because something had waited
    needless: int = 0  # of these, whose counterpart was on its way
    released: int = 0
    #: in shadow mode: the rate that `explain` predicts for a protected pair
    predicted: float | None = None


@dataclass
class Life:
    """What one life of one arm has shown."""

    workloads: dict[str, Seen] = field(default_factory=dict)
    #: how late each of some released frames was, s (lateness.py)
    lateness: list[float] = field(default_factory=list)
    failover: Failover | None = None
    trouble: list[str] = field(default_factory=list)  # what could not be measured


class _Count:
    """Counts what a proxy does."""

    def __init__(self, lab: Lab, arm: str, events: Events | None) -> None:
        self._lab, self._arm, self._events = lab, arm, events
        self._before: dict[str, Any] = {}
        self._stops, self._at = 0, 0.0
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self._at = time.time()
        if self._arm in (SHADOW, *COMPARING):
            self._before = self._lab.status("primary")
        self._stops = self._events.stops if self._events else 0

    def end(self, outcome: Outcome) -> Seen:
        """Return what there was since begin()."""
        seen = Seen(outcome)
        if self._events:
            seen.checkpoints["STOP"] = self._events.stops - self._stops
        if not self._before:
            return seen
        after, before = self._lab.status("primary"), self._before
        for cause, n in after["checkpoints"]["by_cause"].items():
            made = n - before["checkpoints"]["by_cause"].get(cause, 0)
            if made:
                seen.checkpoints[cause] = made
                seen.waited += made * (cause in WAITS)
        if self._arm == SHADOW:
            seen.predicted = self._prediction(outcome)
        seen.needless = after["patience"]["needless"] - before["patience"]["needless"]
        seen.released = waits.released(after) - waits.released(before)
        return seen

    def _prediction(self, outcome: Outcome) -> float | None:
        doc = self._lab.ask("primary", "explain")
        found = price.estimate([e for e in doc["entries"] if e["at"] >= self._at], doc["now"])
        return outcome.rate * found.left if found else None


class _Qemu(QemuLab):
    late = True  # the guest is used before it is protected


def laboratory(arm: str, build: Path) -> Lab:
    """Return the laboratory of an arm; nothing of it runs yet."""
    kind: Callable[..., Lab] = _Qemu if arm == QEMU else Lab
    overrides = {"compare": {"wait": "fixed"}} if arm == FIXED else None
    lab = kind(
        build, tag=TAG, guest="debian", variant=image.variant(build / "guest"), disks=1,
        overlay_limit=OVERLAY_LIMIT, overrides=overrides,
        vcpus=int(os.environ.get("APPS_VCPUS") or 1), thread="multi",
    )  # fmt: skip
    lab.patience_s = PROTECT_S
    return lab


def enter(lab: Lab, arm: str) -> None:
    """Bring a laboratory that is up into the state of its arm. Raises LabError."""
    if arm == NONE:
        return
    lab.protect()
    if arm == SHADOW:
        lab.ask("primary", "mode", mode="shadow")
        lab.wait_state("primary", "shadow")


def _measure(at: Place, workload: Workload, count: _Count, life: Life) -> None:
    count.begin()
    try:
        outcome = workload.run(at)
    except (OutputError, LabError, OSError) as e:
        # A client that prints nothing of use has not got what it wanted.
        life.trouble.append(f"{workload.title}: {type(e).__name__}: {e}")
        outcome = Outcome.at_deadline(DEADLINE_S)
    life.workloads[workload.key] = count.end(outcome)


def once(
    arm: str,
    build: Path,
    scale: float = 1.0,
    only: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Life:
    """Run one life of one arm. Raises LabError if there is no such pair.

    `only`: keys of workloads.
    """
    life = Life()
    lab = laboratory(arm, build)
    events: Events | None = None
    try:
        lab.up()
        lab.net.join(lab.net.primary)
        with names.server(lab.net.client):
            tools = Tools(lab.build, lab.net.client)
            at = Place(tools, lab.client, scale)
            prime(at)
            if arm not in (NONE, QEMU):  # our controllers add the tap themselves
                lab.net.part(lab.net.primary)
            enter(lab, arm)
            if arm == QEMU:
                events = Events(lab.vm["primary"].qmp)
            count = _Count(lab, arm, events)
            for workload in WORKLOADS:
                if only and workload.key not in only:
                    continue
                _measure(at, workload, count, life)
                seen = life.workloads[workload.key]
                say(f"{arm}: {workload.key}: {seen}")
                _settle(lab, arm)
            if arm in (QEMU, *COMPARING):
                prove(lab, events)
                _settle(lab, arm)
            if arm == OURS:
                _ours(lab, at, life)
                say(f"{arm}: {len(life.lateness)} frames captured, {life.failover}")
    finally:
        if events:
            events.close()
        lab.down()
    return life


def _ours(lab: Lab, at: Place, life: Life) -> None:
    """Measure what only our arm is asked for; at its end, as its PVM dies of it."""
    try:
        life.lateness = lateness.measure(lab, at)
        _settle(lab, OURS)
    except (LabError, OutputError) as e:
        life.trouble.append(f"time to the release: {e}")
    try:
        life.failover = fail_over(lab, at.tools)
    except LabError as e:
        life.trouble.append(f"failover: {e}")


def _settle(lab: Lab, arm: str) -> None:
    """Wait until what one workload has left is over, so that the next one does not pay for it."""
    if arm in COMPARING:
        wait_for(
            "the pair to settle",
            lambda: lab.status("primary").get("state") == "protected",
            SETTLE_S,
        )
