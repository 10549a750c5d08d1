# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames that the secondary has in hand while a checkpoint runs, and what becomes of them.

What the SVM sent before it resumed is void: the checkpoint has replaced the guest that sent it.
What the clients sent waits until the new guest runs, since it has to meet the new guest's sequence
numbers. While nothing is held every frame goes on at once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..datapath.ring import CapturedFrame
from ..qemu.event import QmpEvent

log = logging.getLogger("colo_xdp.controller.secondary")

Send = Callable[[CapturedFrame], None]


@dataclass(slots=True)
class Hold:
    """Those of one checkpoint. Times: CLOCK_MONOTONIC, ns; `deadline` in s."""

    n: int  # the epoch that it leads to
    began_ns: int
    deadline: float  # the SVM is to stop before
    stop_ns: int = 0
    resume: QmpEvent | None = None  # the SVM runs the new state, the primary has not said it does
    stopped: bool = False  # by somebody, not by a checkpoint: it runs on as it was
    planned: bool = False  # the primary falls silent at the end: held until the takeover
    client: deque[CapturedFrame] = field(default_factory=deque)
    svm: deque[CapturedFrame] = field(default_factory=deque)

    def again(self, n: int, deadline: float) -> None:
        """Asked for again after a failure: go on holding what is held."""
        self.n, self.deadline = n, deadline
        self.stop_ns, self.resume, self.stopped = 0, None, False

    @property
    def pause_ms(self) -> float:
        """How long the SVM stood still; 0: it is not known."""
        return (self.resume.ts_ns - self.stop_ns) / 1e6 if self.resume and self.stop_ns else 0.0


class HeldFrames:
    """Frames of the SVM and for it, on their way through this process."""

    def __init__(
        self, deliver: Send, forward: Send, transmits: Callable[[], bool], limit: int
    ) -> None:
        """`deliver`: to the SVM; `forward`: of it. `speaks`: the guest does so for itself by now,
        and what it said as a copy is void. `limit`: frames of each side."""
        self._deliver, self._forward, self._transmits = deliver, forward, transmits
        self.limit = limit
        self.hold: Hold | None = None
        self.resume_ns = 0  # of the guest that runs: what it sent before is void
        self.overflow = 0  # given up because too many were waiting
        self.stale = 0  # of the SVM from before its RESUME: void

    @property
    def count(self) -> int:
        """Frames that wait for the end of a checkpoint."""
        h = self.hold
        return len(h.client) + len(h.svm) if h else 0

    # ---- frames

    def from_client(self, event: CapturedFrame) -> None:
        """One for the SVM."""
        if self.hold is None:
            self._deliver(event)
        else:
            self._keep(self.hold.client, event)

    def from_svm(self, event: CapturedFrame) -> None:
        """One of the SVM."""
        if self.hold is None:
            self._let_out(event, late=False)
        else:
            self._keep(self.hold.svm, event)

    def _keep(self, queue: deque[CapturedFrame], event: CapturedFrame) -> None:
        if len(queue) >= self.limit:
            queue.popleft()
            self.overflow += 1
        queue.append(event)

    def _let_out(self, event: CapturedFrame, *, late: bool) -> None:
        if event.ts_ns < self.resume_ns or (self._transmits() and not late):
            self.stale += 1
        else:
            self._forward(event)

    # ---- a checkpoint

    def begin(self, n: int, now_ns: int, deadline: float, *, planned: bool) -> None:
        """Hold everything from now on, for the checkpoint that leads to epoch n."""
        if self.hold is None:
            self.hold = Hold(n, now_ns, deadline)
        else:
            self.hold.again(n, deadline)
        self.hold.planned = planned

    def take(self) -> Hold | None:
        """Hold nothing any more. What was held is the caller's; dropped, it is void."""
        h, self.hold = self.hold, None
        return h

    def resumed(self, h: Hold, event: QmpEvent) -> None:
        """The SVM runs the state of that checkpoint: what it sends from here on is valid."""
        self.resume_ns = event.ts_ns
        if not h.began_ns <= event.ts_ns <= event.seen_ns:
            # The clock was set meanwhile. Too late a RESUME only drops what TCP sends again.
            log.warning("RESUME has an impossible time stamp: the clock was set")
            self.resume_ns = event.seen_ns

    def let_go(self, h: Hold) -> None:
        """The guest that runs gets what clients sent, and they what it said."""
        for event in h.client:
            self._deliver(event)
        for event in h.svm:
            self._let_out(event, late=False)

    def let_go_standalone(self, h: Hold) -> None:
        """The same at a takeover, when the guest speaks for itself already. Without its RESUME
        nobody knows which state said what is here: void, and TCP says it again."""
        for event in h.client:
            self._deliver(event)
        if h.resume is not None:
            for event in h.svm:
                self._let_out(event, late=True)
