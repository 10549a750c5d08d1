# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the policy does not hold: passed ones, and ones that are only watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..net.flow_key import FlowKey
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import Packet
from .causes import Cause
from .compared import ComparedFlow
from .flow import LONG_AGO, Comparer, Flow, FlowContext, Partial, Reporter, Source
from .held_queue import Held, HeldQueue
from .ledger import Ledger
from .policy import Verdict
from .timers import Timers


class BypassedFlow:
    """A flow of which nothing is compared: the PVM's frames leave, the SVM's are dropped."""

    __slots__ = ("direction", "epoch", "key", "last", "outbox", "verdict", "when")

    bypassed = True
    held: Iterable[Held] = ()

    def __init__(
        self, outbox: Reporter, key: FlowKey, epoch: int, verdict: Verdict, direction: str
    ) -> None:
        self.outbox, self.key, self.epoch = outbox, key, epoch
        self.verdict, self.direction = verdict, direction
        self.last = self.when = 0

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """A frame of the PVM leaves."""
        self.outbox.uncompared(self.verdict)
        self.outbox.release(rec)

    def svm(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM ends here."""
        self.outbox.count("svm_uncompared_dropped")

    def commit(self, p: Packet) -> None:
        """A checkpoint contains it: nothing is to be remembered."""

    def release_ready(self, now_ns: int) -> None:
        """Nothing waits."""

    def forget_svm(self) -> None:
        """Nothing is stashed."""

    def unhold(self) -> list[Held]:
        """Nothing waits."""
        return []

    def defer(self) -> list[Held]:
        """Nothing waits."""
        return []

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """A frame of the PVM leaves, checkpoint or not."""
        self.pvm(rec, p, now_ns)
        return True

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """A frame has left that was to be compared behind; the rules are others now."""

    def miss(self) -> None:
        """A frame of the SVM's next epoch was not kept; nobody wants it."""

    def outdate(self, epoch: int) -> None:
        """Other rules are in force from this epoch on: be judged anew when next seen."""
        self.new_epoch(epoch)
        self.epoch = LONG_AGO

    def judged(self, verdict: Verdict) -> None:
        """The rules in force want for it what those before did."""
        self.verdict = verdict

    def removed(self) -> None:
        """Nothing was kept of its past."""

    def reclaim(self) -> Comparer:
        """The fast path never has it."""
        return self

    def stands_for(self, flow: object) -> bool:
        """Whether it is this one in the tables."""
        return flow is self

    def new_epoch(self, epoch: int) -> None:
        """Nothing was remembered."""
        self.epoch = epoch

    def expire(self, now_ns: int) -> int:
        """Nothing waits."""
        return 0

    def quiet(self) -> bool:
        """Nothing waits."""
        return True

    def closed(self) -> bool:
        """Its end is not looked for; it ages like a closed one."""
        return True


class MonitorBudget:
    """What is kept to compare watched flows behind, of all of them together: nothing that leaves
    waits for it, so it has no part in what may be held."""

    __slots__ = ("frames", "ledger")

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        #: left in a checkpoint or shortly before, to be compared when it is over
        self.frames = HeldQueue(ledger)

    def host(self, host: FlowContext) -> FlowContext:
        """What a watched flow is given, but for its outbox."""
        return replace(host, ledger=self.ledger, backlog=self.frames)

    def commit(self, of: Callable[[Packet, bool], Comparer | None], stop_ns: int) -> list[Held]:
        """A checkpoint contains what was captured at stop_ns or before; the rest of what is kept,
        to be compared under the epoch that begins."""
        kept = self.frames.drain()
        for rec, p, _ in kept:
            if rec.ts_ns <= stop_ns and (flow := of(p, False)) is not None:
                flow.commit(p)
        return [held for held in kept if held[0].ts_ns > stop_ns]


class MonitorOutbox:
    """The outbox of a flow whose frames have left: nothing is released, nobody asked."""

    __slots__ = ("_flow", "_outbox")

    def __init__(self, outbox: Reporter, flow: MonitoredFlow) -> None:
        self._outbox, self._flow = outbox, flow

    def release(self, rec: Frame) -> None:
        """It has left long ago."""

    def request(self, cause: Cause, flow: Source, evidence: Evidence = NO_EVIDENCE) -> None:
        """A difference; or there is no room, and nobody knows."""
        if cause is Cause.QUEUE_FULL:
            self._outbox.count("monitor_given_up")
        else:
            self._outbox.noticed(cause, flow, evidence)
        self._flow.lose()

    def count(self, name: str, n: int = 1) -> None:
        """Nothing is dropped for want of room, see request()."""
        if name not in ("queue_full_dropped", "svm_queue_full_dropped"):
            self._outbox.count(name, n)

    def part_verified(self, flow: Partial) -> None:
        """Parts need not leave: the whole has."""


class MonitoredFlow(BypassedFlow):
    """A flow whose frames leave at once and are compared behind.

    After a difference the two guests go apart with no checkpoint to bring them together, so
    nothing more is learnt from it before the next one: `lost`. So it is if more waits to be
    compared than the budget has room for.
    """

    __slots__ = ("_budget", "_missed", "_timers", "inner", "lost")

    inner: ComparedFlow  # an ordinary one, whose outbox is self.monitor()

    def __init__(
        self, outbox: Reporter, key: FlowKey, epoch: int, verdict: Verdict, direction: str,
        budget: MonitorBudget, timers: Timers[Flow],
    ) -> None:  # fmt: skip
        super().__init__(outbox, key, epoch, verdict, direction)
        self.lost = False
        self._missed = False  # frames of the epoch that begins next
        self._budget, self._timers = budget, timers

    def monitor(self) -> MonitorOutbox:
        """What becomes of the decisions of `inner`."""
        return MonitorOutbox(self.outbox, self)

    def lose(self) -> None:
        """Nothing more is learnt from it in this epoch."""
        self.lost = True
        self._timers.arm(self, 1)  # not here: the comparer is in the middle of something

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        super().pvm(rec, p, now_ns)
        rec.sent = True
        self.catch_up(rec, p, now_ns)

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Behind: it has left."""
        if not self.lost:
            self.inner.pvm(rec, p, now_ns)

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """It leaves at once, and is compared when the next epoch has begun."""
        super().pvm(rec, p, now_ns)
        rec.sent = True
        if not self._budget.frames.offer(rec, p, now_ns):
            self.miss()
        return True

    def miss(self) -> None:
        """A frame of the epoch that begins next was not kept."""
        if not self._missed:
            self._missed = True
            self.outbox.count("monitor_given_up")

    def svm(self, p: Packet, now_ns: int) -> None:
        if self.lost:
            super().svm(p, now_ns)
        else:
            self.inner.svm(p, now_ns)

    def expire(self, now_ns: int) -> int:
        """After a difference: what was kept to compare with is of no more use."""
        if self.lost:
            self.inner.unhold()
            self.inner.forget_svm()
        return 0

    def commit(self, p: Packet) -> None:
        self.inner.commit(p)

    def new_epoch(self, epoch: int) -> None:
        super().new_epoch(epoch)
        self.lost, self._missed = self._missed, False
        self.inner.new_epoch(epoch)

    def judged(self, verdict: Verdict) -> None:
        super().judged(verdict)
        self.inner.judged(verdict)

    def removed(self) -> None:
        self.inner.removed()

    def quiet(self) -> bool:
        return self.inner.quiet()

    def closed(self) -> bool:
        return self.inner.closed()
