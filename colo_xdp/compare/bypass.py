# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the policy does not hold: bypassed ones, and monitored ones.

The engine's flow table makes them in place of compared flows, by the policy's verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..net.flow_key import FlowKey
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import Packet
from .causes import Cause
from .compared import ComparedFlow
from .flow import LONG_AGO, Comparer, Flow, FlowContext, Partial, Reporter, Requester
from .held_queue import Held, HeldQueue
from .ledger import Ledger
from .policy import Verdict
from .timers import Timers


class BypassedFlow:
    """Flow that is not compared: the PVM's frames leave, the SVM's are dropped."""

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
        """Release a frame of the PVM."""
        self.outbox.uncompared(self.verdict)
        self.outbox.release(rec, False)

    def svm(self, p: Packet, now_ns: int) -> None:
        """Drop a frame of the SVM."""
        self.outbox.count("svm_uncompared_dropped")

    def commit(self, p: Packet) -> None:
        """Ignore a frame that a checkpoint contains: no state is kept."""

    def release_ready(self, now_ns: int) -> None:
        """Do nothing: no frame is held."""

    def forget_svm(self) -> None:
        """Do nothing: no output of the SVM is kept."""

    def unhold(self) -> list[Held]:
        """Return no frames: none is held."""
        return []

    def defer(self) -> list[Held]:
        """Return no frames: none is held."""
        return []

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Release a frame of the PVM although a checkpoint is under way."""
        self.pvm(rec, p, now_ns)
        return True

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Ignore a frame that left while the rules had it compared."""

    def miss(self) -> None:
        """Ignore that a frame of the SVM's next epoch was not kept: it is not needed."""

    def outdate(self, epoch: int) -> None:
        """Have the flow judged again when it is next seen, by the rules of this epoch."""
        self.new_epoch(epoch)
        self.epoch = LONG_AGO

    def judged(self, verdict: Verdict) -> None:
        """Take the verdict of the rules in force, which is the same action as before."""
        self.verdict = verdict

    def removed(self) -> None:
        """Do nothing: no state is kept."""

    def reclaim(self) -> Comparer:
        """Return the flow itself: it is never offloaded."""
        return self

    def stands_for(self, flow: object) -> bool:
        """Return whether this object represents `flow` in the tables."""
        return flow is self

    def new_epoch(self, epoch: int) -> None:
        """Begin an epoch; no state is kept."""
        self.epoch = epoch

    def expire(self, now_ns: int) -> int:
        """Return 0: there is no deadline."""
        return 0

    def quiet(self) -> bool:
        """Return True: no frame waits."""
        return True

    def closed(self) -> bool:
        """Return True: its end is not tracked, so it ages like a closed flow."""
        return True


class MonitorBudget:
    """Budget for what monitored flows keep to compare later.

    Nothing that leaves waits for it, so it does not count toward the limits on held frames.
    """

    __slots__ = ("frames", "ledger")

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        #: frames that left in a checkpoint or shortly before, to be compared after it
        self.frames = HeldQueue(ledger)

    def host(self, host: FlowContext) -> FlowContext:
        """Return a monitored flow's context, except for its outbox."""
        return replace(host, ledger=self.ledger, backlog=self.frames)

    def commit(self, of: Callable[[Packet, bool], Comparer | None], stop_ns: int) -> list[Held]:
        """Commit what was captured at stop_ns (CLOCK_MONOTONIC) or before.

        Returns the other frames, which are compared in the next epoch.
        """
        kept = self.frames.drain()
        for rec, p, _ in kept:
            if rec.ts_ns <= stop_ns and (flow := of(p, False)) is not None:
                flow.commit(p)
        return [held for held in kept if held[0].ts_ns > stop_ns]


class MonitorOutbox:
    """Outbox of a flow whose frames have already left: it releases nothing and requests nothing."""

    __slots__ = ("_flow", "_outbox")

    def __init__(self, outbox: Reporter, flow: MonitoredFlow) -> None:
        self._outbox, self._flow = outbox, flow

    def release(self, rec: Frame, agreed: bool = True) -> None:
        """Do nothing: the frame left long ago."""

    def request(self, cause: Cause, flow: Requester, evidence: Evidence = NO_EVIDENCE) -> None:
        """Report a difference, or count that there was no room. The flow is lost for this epoch."""
        if cause is Cause.QUEUE_FULL:
            self._outbox.count("monitor_given_up")
        else:
            self._outbox.noticed(cause, flow, evidence)
        self._flow.lose()

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter. Frames are not dropped for lack of room; see request()."""
        if name not in ("queue_full_dropped", "svm_queue_full_dropped"):
            self._outbox.count(name, n)

    def part_verified(self, flow: Partial) -> None:
        """Do nothing: the whole frame has left already."""


class MonitoredFlow(BypassedFlow):
    """Flow whose frames leave at once and are compared afterwards.

    After a difference no checkpoint brings the guests together again. So nothing more can be learnt
    from the flow before the next checkpoint: it is `lost`. The same holds if more waits to be
    compared than the budget has room for.
    """

    __slots__ = ("_budget", "_missed", "_timers", "inner", "lost")

    inner: ComparedFlow  # an ordinary flow whose outbox is self.monitor()

    def __init__(
        self,
        outbox: Reporter,
        key: FlowKey,
        epoch: int,
        verdict: Verdict,
        direction: str,
        budget: MonitorBudget,
        timers: Timers[Flow],
    ) -> None:
        super().__init__(outbox, key, epoch, verdict, direction)
        self.lost = False
        self._missed = False  # frames of the next epoch were not kept
        self._budget, self._timers = budget, timers

    def monitor(self) -> MonitorOutbox:
        """Return the outbox for `inner`."""
        return MonitorOutbox(self.outbox, self)

    def lose(self) -> None:
        """Give the flow up for this epoch."""
        self.lost = True
        self._timers.arm(self, 1)  # not here: the comparer is still running

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        super().pvm(rec, p, now_ns)
        rec.sent = True
        self.catch_up(rec, p, now_ns)

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Compare a frame that has left."""
        if not self.lost:
            self.inner.pvm(rec, p, now_ns)

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Release the frame at once, and keep it to be compared when the next epoch has begun."""
        super().pvm(rec, p, now_ns)
        rec.sent = True
        if not self._budget.frames.offer(rec, p, now_ns):
            self.miss()
        return True

    def miss(self) -> None:
        """Note that a frame of the next epoch was not kept."""
        if not self._missed:
            self._missed = True
            self.outbox.count("monitor_given_up")

    def svm(self, p: Packet, now_ns: int) -> None:
        if self.lost:
            super().svm(p, now_ns)
        else:
            self.inner.svm(p, now_ns)

    def expire(self, now_ns: int) -> int:
        """Drop what was kept to compare with, after a difference."""
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
