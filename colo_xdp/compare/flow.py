# SPDX-License-Identifier: GPL-2.0-or-later
"""What the engine asks of its flows, and what it gives to them."""

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
from .policy import Verdict
from .timers import Timers

CONTEXT = 64  # bytes of evidence from the first difference on
BEFORE = 32  # and before it
LONG_AGO = -1  # no epoch


class Source(Protocol):
    """What can differ between the guests, as a divergence names it."""

    @property
    def verdict(self) -> Verdict: ...  # of the policy
    def text(self) -> str: ...
    def service(self) -> tuple[str, int]: ...


class Flow(Protocol):
    """What can wait."""

    when: int  # see Timers

    @property
    def verdict(self) -> Verdict: ...
    @property
    def epoch(self) -> int:
        """The last one that it was in; LONG_AGO: none that counts."""
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
    """A flow whose oldest frame can leave in parts."""

    def release_part(self, now_ns: int, whole_segments: bool) -> bool: ...


class Outbox(Protocol):
    """Where a flow puts what it has decided. Nothing comes back."""

    def release(self, rec: Frame) -> None:
        """The frame may leave now."""
        ...

    def request(self, cause: Cause, flow: Source, evidence: Evidence = NO_EVIDENCE) -> None:
        """Only a checkpoint can tell what may leave."""
        ...

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        ...

    def part_verified(self, flow: Partial) -> None:
        """The flow's head is verified in part, which may leave when the batch is over."""
        ...


class Reporter(Outbox, Protocol):
    """What flows use that the policy does not hold."""

    def uncompared(self, verdict: Verdict) -> None:
        """A frame is about to leave that is not held."""
        ...

    def noticed(self, cause: Cause, flow: Source, evidence: Evidence) -> None:
        """A difference for which nobody is asked."""
        ...


@dataclass(slots=True)
class FlowContext:
    """What a flow is given. Times are ns, max_stream is bytes of the SVM ahead."""

    outbox: Outbox
    ledger: Ledger
    timers: Timers[Flow]
    histories: HistoryBudget
    timeout_ns: int
    grace_ns: int
    max_stream: int
    #: where frames wait while a checkpoint is under way; None: with those of all other flows
    backlog: HeldQueue | None = None


class Comparer(Flow, Protocol):
    """A flow in the engine's tables."""

    key: FlowKey
    last: int  # when it was seen last
    direction: str  # who opened it: "in" a client, "out" the guest, "" unknown
    bypassed: bool  # by the policy: its frames wait for nothing

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
