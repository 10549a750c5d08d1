# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces between the engine and its flows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..net.flow_key import FlowKey
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import Packet
from .causes import Cause
from .held_queue import Held, HeldQueue
from .history import HistoryBudget
from .ledger import Ledger
from .patience import Patience
from .policy import Verdict
from .timers import Timers

CONTEXT = 64  # bytes of evidence from the first difference on
BEFORE = 32  # bytes of evidence before it
LONG_AGO = -1  # not a valid epoch


class Requester(Protocol):
    """Something that can differ between the guests, as a divergence report names it."""

    @property
    def verdict(self) -> Verdict: ...  # of the policy
    def text(self) -> str: ...
    def service(self) -> tuple[str, int]: ...
    def svm_deaf(self) -> bool:
        """Return whether what waits shows that the SVM has not got what the PVM has got."""
        ...

    def head_ns(self) -> int:
        """Return the arrival (ns) of the oldest frame of the PVM that waits; 0: none does."""
        ...


class Flow(Protocol):
    """Something that can hold frames."""

    when: int  # see Timers

    @property
    def verdict(self) -> Verdict: ...
    @property
    def epoch(self) -> int:
        """Return the last epoch in which the flow took part; LONG_AGO: none that is valid."""
        ...

    @property
    def held(self) -> Iterable[Held]: ...
    def unhold(self) -> list[Held]: ...
    def defer(self) -> list[Held]: ...
    def forget_svm(self) -> None: ...
    def new_epoch(self, epoch: int) -> None: ...
    def expire(self, now_ns: int) -> int: ...
    def quiet(self) -> bool: ...
    def closed(self) -> bool: ...


class Partial(Flow, Protocol):
    """Flow whose oldest frame can leave in parts."""

    def release_part(self, now_ns: int, whole_segments: bool) -> bool: ...


class Outbox(Protocol):
    """Receives a flow's decisions. Nothing is returned to the flow."""

    def release(self, rec: Frame, agreed: bool = True) -> None:
        """Release the frame now. agreed: because the SVM has sent the same."""
        ...

    def request(self, cause: Cause, flow: Requester, evidence: Evidence = NO_EVIDENCE) -> None:
        """Request a checkpoint, which alone can decide what may leave."""
        ...

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        ...

    def part_verified(self, flow: Partial) -> None:
        """Note that the verified part of the flow's head may leave at the end of the batch."""
        ...


class Reporter(Outbox, Protocol):
    """Outbox of flows that the policy does not hold."""

    def uncompared(self, verdict: Verdict) -> None:
        """Note that a frame is about to leave without being held."""
        ...

    def noticed(self, cause: Cause, flow: Requester, evidence: Evidence) -> None:
        """Report a difference that does not request a checkpoint."""
        ...


@dataclass(slots=True)
class FlowContext:
    """What a flow is given. Times are in ns; max_stream: bytes that the SVM may be ahead.

    timeout_ns: how long the SVM may be ahead; how long a frame of the PVM waits is `patience`.
    """

    outbox: Outbox
    ledger: Ledger
    timers: Timers[Flow]
    histories: HistoryBudget
    timeout_ns: int
    grace_ns: int
    max_stream: int
    patience: Patience
    #: where frames wait during a checkpoint; None: with those of all other flows
    backlog: HeldQueue | None = None


class Comparer(Flow, Protocol):
    """Flow in the engine's tables."""

    key: FlowKey
    last: int  # when it was last seen
    direction: str  # which end opened it: "in" the client, "out" the guest, "" unknown
    bypassed: bool  # by the policy: its frames are not held

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None: ...
    def svm(self, p: Packet, now_ns: int) -> None: ...
    def commit(self, p: Packet) -> None: ...
    def release_ready(self, now_ns: int) -> None: ...
    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool: ...
    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None: ...
    def miss(self) -> None: ...
    def outdate(self, epoch: int) -> None: ...
    def judged(self, verdict: Verdict) -> None: ...
    def removed(self) -> None: ...
    def reclaim(self) -> Comparer: ...
    def stands_for(self, flow: object) -> bool: ...
