# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the policy does not hold: passed ones, and ones that are only watched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .comparer import Comparer, Flow, Host
from .flow import FlowKey
from .held_queue import Held, HeldQueue
from .ledger import Ledger
from .packet import Packet
from .policy import Verdict
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence, Record

if TYPE_CHECKING:
    from .stream import Stream


class Passed:
    """A flow of which nothing is compared: the PVM's frames leave, the SVM's are dropped."""

    __slots__ = ("_text", "direction", "epoch", "held", "host", "key", "last", "verdict", "when")

    def __init__(
        self, host: Host, key: FlowKey, epoch: int, verdict: Verdict, direction: str, text: str
    ) -> None:
        self.host, self.key, self.epoch, self._text = host, key, epoch, text
        self.verdict, self.direction = verdict, direction
        self.last = self.when = 0
        self.held: deque[Held] = deque(maxlen=0)

    def text(self) -> str:
        """The flow's name for people."""
        return self._text

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None:
        """A frame of the PVM leaves."""
        self.host.uncompared(self.verdict)
        self.host.emit(rec, now_ns)

    def svm(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM ends here."""
        self.host.count("svm_uncompared_dropped")

    def commit(self, p: Packet) -> None:
        """A checkpoint contains it: nothing is to be remembered."""

    def pump(self, now_ns: int) -> None:
        """Nothing waits."""

    def forget_svm(self) -> None:
        """Nothing is stashed."""

    def unhold(self) -> list[Held]:
        """Nothing waits."""
        return []

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


class Budget:
    """What is kept to compare watched flows behind, of all of them together: nothing that leaves
    waits for it, so it has no part in what may be held."""

    __slots__ = ("frames", "ledger")

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        #: left in a checkpoint or shortly before, to be compared when it is over
        self.frames = HeldQueue(ledger)

    def commit(self, of: Callable[[Packet, bool], Comparer | None], stop_ns: int) -> list[Held]:
        """A checkpoint contains what was captured at stop_ns or before; the rest of what is kept,
        for catch_up()."""
        kept = self.frames.drain()
        for rec, p, _ in kept:
            if rec.ts_ns <= stop_ns and (flow := of(p, False)) is not None:
                flow.commit(p)
        return [held for held in kept if held[0].ts_ns > stop_ns]


class Watching:
    """The engine as a watched flow's comparer sees it: nothing is released, nobody asked."""

    __slots__ = ("_engine", "_flow", "ledger")

    def __init__(self, engine: Host, flow: Watched, budget: Budget) -> None:
        self._engine, self._flow, self.ledger = engine, flow, budget.ledger

    epoch = property(lambda self: self._engine.epoch)
    timeout_ns = property(lambda self: self._engine.timeout_ns)
    grace_ns = property(lambda self: self._engine.grace_ns)
    max_stream = property(lambda self: self._engine.max_stream)
    max_history = property(lambda self: self._engine.max_history)

    def emit(self, rec: Record, now_ns: int) -> None:
        """It has left long ago."""

    def ask(self, cause: Cause, flow: Flow, evidence: Evidence = NO_EVIDENCE) -> None:
        if cause is Cause.QUEUE_FULL:
            self._engine.count("watched_given_up")  # no difference: nobody knows
        else:
            self._engine.noticed(cause, flow, evidence)
        self._flow.lost = True
        self._engine.arm(self._flow, 1)  # not here: the comparer is in the middle of something

    def count(self, name: str, n: int = 1) -> None:
        if name not in ("queue_full_dropped", "svm_queue_full_dropped"):  # see ask()
            self._engine.count(name, n)

    def uncompared(self, verdict: Verdict) -> None:
        self._engine.uncompared(verdict)

    def noticed(self, cause: Cause, flow: Flow, evidence: Evidence) -> None:
        self._engine.noticed(cause, flow, evidence)

    def arm(self, flow: Flow, when_ns: int) -> None:
        self._engine.arm(flow, when_ns)

    def charge_history(self, stream: Stream) -> None:
        self._engine.charge_history(stream)

    def part_verified(self, stream: Stream) -> None:
        """Parts need not leave: the whole has."""


class Watched(Passed):
    """A flow whose frames leave at once and are compared behind.

    After a difference the two guests go apart with no checkpoint to bring them together, so
    nothing more is learnt from it before the next one: `lost`. So it is if more waits to be
    compared than the budget has room for.
    """

    __slots__ = ("_budget", "_missed", "inner", "lost")

    inner: Comparer

    def __init__(
        self, host: Host, key: FlowKey, epoch: int, verdict: Verdict, direction: str, text: str,
        budget: Budget,
    ) -> None:  # fmt: skip
        super().__init__(host, key, epoch, verdict, direction, text)
        self.lost = False
        self._missed = False  # frames of the epoch that begins next
        self._budget = budget

    def watcher(self) -> Host:
        """The host for `inner`."""
        return Watching(self.host, self, self._budget)

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None:
        super().pvm(rec, p, now_ns)
        rec.sent = True
        self.compare(rec, p, now_ns)

    def compare(self, rec: Record, p: Packet, now_ns: int) -> None:
        """Behind: it has left."""
        if not self.lost:
            self.inner.pvm(rec, p, now_ns)

    def pvm_in_checkpoint(self, rec: Record, p: Packet, now_ns: int) -> None:
        """It leaves at once, and is compared when the next epoch has begun."""
        super().pvm(rec, p, now_ns)
        rec.sent = True
        if not self._budget.frames.offer(rec, p, now_ns):
            self.miss()

    def miss(self) -> None:
        """A frame of the epoch that begins next was not kept."""
        if not self._missed:
            self._missed = True
            self.host.count("watched_given_up")

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

    def quiet(self) -> bool:
        return self.inner.quiet()

    def closed(self) -> bool:
        return self.inner.closed()


def catch_up(flow: Comparer | None, rec: Record, p: Packet, now_ns: int) -> None:
    """A frame that has left, to be compared under the epoch that has begun."""
    if isinstance(flow, Watched):
        flow.compare(rec, p, now_ns)
    elif flow is not None and not isinstance(flow, Passed):  # the rules are others now
        flow.pvm(rec, p, now_ns)
