# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at what waits in the fast path, and takes back what may wait in vain.

The kernel compares, but it has no timers and requests no checkpoint. So the engine looks now and
then (Engine.tick): what has waited for half of its time is reclaimed, and its flow decides as on
the slow path. The same look shows whether the guests wait for each other's clients
(engine/silence.py), for which both paths have to be seen together.

All times are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from ..compare.flow import Flow
from ..compare.limits import NEVER
from ..compare.patience import Patience
from ..compare.tcp import TcpFlow
from ..compare.timers import Clock, Timers
from ..net.flow_key import FlowKey
from ..offload.kernel_format import KernelPath, Overdue, is_stream
from .flow_table import FlowTable
from .silence import Silence


class FastPathWatch:
    """The engine's looks at the fast path."""

    def __init__(
        self,
        clock: Clock,
        fast: KernelPath,
        flows: FlowTable,
        timers: Timers[Flow],
        patience: Patience,
        timeout_ns: int,
    ) -> None:
        self._clock, self._fast, self._flows, self._timers = clock, fast, flows, timers
        self._patience, self._timeout_ns = patience, timeout_ns
        self._silence = Silence(patience)
        self._next_ns = 0
        self.due_ns = NEVER  # when something that waits in the fast path is to be looked at

    @property
    def waits(self) -> bool:
        """Return whether anything has been seen to wait in the fast path."""
        return self.due_ns != NEVER

    @property
    def step_ns(self) -> int:
        """Return the time between two looks while disagreement lasts."""
        return self._silence.step_ns

    def silent_ns(self) -> int:
        """Return when the guests will have been silent for long enough; NEVER: they have been."""
        return self._silence.look_ns()

    def look(self, now_ns: int) -> None:
        """Reclaim what has waited in the fast path for half of the time that it may wait."""
        if not self._fast.enabled or now_ns < self._next_ns:
            return
        patience, timeout = self._patience, self._timeout_ns
        half = patience.ns // 2
        oldest = self._fast.oldest_ns()
        late = self._fast.overdue(now_ns - half) if 0 < oldest <= now_ns - half else []
        self.reclaim([x.key for x in late if x.held or x.since_ns <= now_ns - timeout // 2])
        self._next_ns = now_ns + patience.ns // 8
        if patience.adaptive:
            self._next_ns = now_ns + min(patience.ns // 8, patience.quiet_ns)
            soon = min(half, patience.quiet_ns)
            self.due_ns = max(oldest + soon, now_ns + soon) if oldest else NEVER

    def crossed(self, now_ns: int) -> TcpFlow | None:
        """Return a flow of the PVM that waits in vain, if the guests wait for each other's clients.

        What waits for that in the fast path is reclaimed first.
        """
        if self._fast.enabled:
            self._silence.note(self._fast.moved_ns())
        pvm_ns, svm_ns = self._silence.crossed_before(now_ns)
        if not pvm_ns:
            return None
        late: list[Overdue] = []
        if self._fast.enabled:
            overdue = self._fast.overdue(max(pvm_ns, svm_ns))
            late = [
                x
                for x in overdue
                if x.payload and is_stream(x.key) and x.since_ns <= (pvm_ns if x.held else svm_ns)
            ]
        pvm, svm = self.waiting(pvm_ns, svm_ns)
        if not (pvm or any(x.held for x in late)) or not (svm or any(not x.held for x in late)):
            return None
        self.reclaim([x.key for x in late])
        pvm, svm = self.waiting(pvm_ns, svm_ns)
        return pvm if svm else None

    def waiting(self, pvm_ns: int, svm_ns: int) -> tuple[TcpFlow | None, bool]:
        """Return a flow in which the PVM waits in vain, and whether the SVM is ahead in another.

        Each since the time given for it, or longer.
        """
        return self._silence.waiting(self._timers.flows(), self._clock.epoch, pvm_ns, svm_ns)

    def reclaim_all(self) -> None:
        """Reclaim everything that waits in the fast path."""
        self.reclaim(self._fast.outstanding())

    def reclaim(self, keys: list[FlowKey]) -> None:
        """Take these flows back, also those that the engine's tables do not have any more."""
        for key in keys:
            flow = self._flows.table(key).get(key)
            if flow is not None:
                flow.reclaim()
                continue
            state = self._fast.reclaim(key)
            if state is not None:
                self._flows.restore_evicted(key, state)
