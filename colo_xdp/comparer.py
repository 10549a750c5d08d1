# SPDX-License-Identifier: GPL-2.0-or-later
"""What the engine and the comparers of single flows ask of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .flow import FlowKey
from .held_queue import Held, HeldQueue
from .ledger import Ledger
from .packet import Packet
from .policy import Verdict
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence, Record

if TYPE_CHECKING:
    from .stream import Stream

CONTEXT = 64  # bytes of evidence from the first difference on
BEFORE = 32  # and before it


class Host(Protocol):
    """What a comparer needs of the engine."""

    epoch: int
    timeout_ns: int
    grace_ns: int
    max_stream: int
    max_history: int
    ledger: Ledger

    def emit(self, rec: Record, now_ns: int) -> None: ...
    def ask(self, cause: Cause, flow: Flow, evidence: Evidence = NO_EVIDENCE) -> None: ...
    def count(self, name: str, n: int = 1) -> None: ...
    def uncompared(self, verdict: Verdict) -> None: ...
    def noticed(self, cause: Cause, flow: Flow, evidence: Evidence) -> None: ...
    def arm(self, flow: Flow, when_ns: int) -> None: ...
    def charge_history(self, stream: Stream) -> None: ...
    def part_verified(self, stream: Stream) -> None: ...


class Flow(Protocol):
    """What the engine needs of a comparer."""

    key: FlowKey
    epoch: int
    last: int
    when: int
    verdict: Verdict  # of the policy
    direction: str  # who opened it: "in" a client, "out" the guest, "" unknown

    @property
    def held(self) -> Sequence[Held] | HeldQueue: ...
    def unhold(self) -> list[Held]: ...
    def forget_svm(self) -> None: ...
    def new_epoch(self, epoch: int) -> None: ...
    def expire(self, now_ns: int) -> int: ...
    def quiet(self) -> bool: ...
    def closed(self) -> bool: ...
    def text(self) -> str: ...


class Comparer(Flow, Protocol):
    """A flow in the engine's tables."""

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None: ...
    def svm(self, p: Packet, now_ns: int) -> None: ...
    def commit(self, p: Packet) -> None: ...
    def pump(self, now_ns: int) -> None: ...
