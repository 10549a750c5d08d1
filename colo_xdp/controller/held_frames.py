# SPDX-License-Identifier: GPL-2.0-or-later
"""The frames that the secondary holds while a checkpoint runs, and what becomes of them.

Frames that the SVM sent before it resumed are void: the checkpoint has replaced the guest that sent
them. Frames from clients wait until the new guest runs, since they have to meet the new guest's
sequence numbers. Outside a checkpoint every frame goes on at once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..datapath.ring import CapturedFrame
from ..qemu.events import QmpEvent

log = logging.getLogger("colo_xdp.controller.secondary")

Send = Callable[[CapturedFrame], None]


@dataclass(slots=True)
class Hold:
    """The frames held for one checkpoint. Times: CLOCK_MONOTONIC, ns; `deadline` in s."""

    n: int  # the epoch that the checkpoint leads to
    began_ns: int
    deadline: float  # the SVM must stop before this time
    stop_ns: int = 0
    resume: QmpEvent | None = None  # the SVM runs the new state, the primary has not confirmed it
    stopped: bool = False  # somebody, no checkpoint, stopped the SVM: it runs on unchanged
    planned: bool = False  # a switchover: the PVM falls silent, frames wait for the takeover
    client: deque[CapturedFrame] = field(default_factory=deque)
    svm: deque[CapturedFrame] = field(default_factory=deque)

    def again(self, n: int, deadline: float) -> None:
        """Go on holding: the checkpoint is asked for again after a failure."""
        self.n, self.deadline = n, deadline
        self.stop_ns, self.resume, self.stopped = 0, None, False

    @property
    def pause_ms(self) -> float:
        """How long the SVM stood still; 0 when that is unknown."""
        return (self.resume.ts_ns - self.stop_ns) / 1e6 if self.resume and self.stop_ns else 0.0


class HeldFrames:
    """Passes on or holds the frames from and to the SVM that come through this process."""

    def __init__(
        self, deliver: Send, forward: Send, transmits: Callable[[], bool], limit: int
    ) -> None:
        """Set the outputs: `deliver` sends to the SVM, `forward` sends on what the SVM sent.

        `transmits`: whether the guest has been promoted, so that what it sent as a copy is void.
        `limit`: the frames that may wait, for each direction.
        """
        self._deliver, self._forward, self._transmits = deliver, forward, transmits
        self.limit = limit
        self.hold: Hold | None = None
        self.resume_ns = 0  # RESUME of the guest that runs; frames sent before it are void
        self.overflow = 0  # dropped because too many were waiting
        self.stale = 0  # void frames of the SVM, for example from before its RESUME

    @property
    def count(self) -> int:
        """The number of frames that wait for the end of a checkpoint."""
        h = self.hold
        return len(h.client) + len(h.svm) if h else 0

    # ---- frames

    def from_client(self, event: CapturedFrame) -> None:
        """Deliver a frame from a client to the SVM, or hold it."""
        if self.hold is None:
            self._deliver(event)
        else:
            self._keep(self.hold.client, event)

    def from_svm(self, event: CapturedFrame) -> None:
        """Forward a frame of the SVM, or hold it."""
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
        """End the hold. The caller gets the frames; if it drops them, they are void."""
        h, self.hold = self.hold, None
        return h

    def resumed(self, h: Hold, event: QmpEvent) -> None:
        """Note that the SVM runs the checkpoint's state: what it sends from now on is valid."""
        self.resume_ns = event.ts_ns
        if not h.began_ns <= event.ts_ns <= event.seen_ns:
            # The clock was set meanwhile. A RESUME that is dated too late only drops frames,
            # which TCP retransmits.
            log.warning("RESUME has an impossible timestamp: the clock was set")
            self.resume_ns = event.seen_ns

    def let_go(self, h: Hold) -> None:
        """Pass on the held frames: those of clients to the guest that runs, and its own to them."""
        for event in h.client:
            self._deliver(event)
        for event in h.svm:
            self._let_out(event, late=False)

    def let_go_standalone(self, h: Hold) -> None:
        """Pass on the held frames at a takeover, when the guest transmits already.

        Without its RESUME nobody knows which state sent the frames of the SVM that are held here.
        They are void then, and TCP retransmits their data.
        """
        for event in h.client:
            self._deliver(event)
        if h.resume is not None:
            for event in h.svm:
                self._let_out(event, late=True)
