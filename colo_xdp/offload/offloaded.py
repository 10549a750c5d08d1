# SPDX-License-Identifier: GPL-2.0-or-later
"""Stands in the engine's tables for a flow that the fast path has: any call reclaims it and is
passed on.

To look at it reclaims nothing: what the kernel has waits for nothing here, and can be forgotten, as
it can tell of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..compare.compared import ComparedFlow
from ..compare.held_queue import Held
from ..compare.policy import Verdict
from ..net.frame import Frame
from ..net.packet import Packet


class OffloadedFlow:
    """`flow` is what it was when it was given. reclaim(flow) puts it in its place again, and lets
    it go on from what the kernel had."""

    __slots__ = ("_reclaim", "direction", "epoch", "flow", "key")

    bypassed = False
    when = 0  # the kernel has what waits
    held: Iterable[Held] = ()

    def __init__(self, flow: ComparedFlow, reclaim: Callable[[ComparedFlow], None]) -> None:
        self.flow = flow
        self._reclaim: Callable[[ComparedFlow], None] | None = reclaim
        self.key, self.direction = flow.key, flow.direction
        self.epoch = flow.epoch  # in which it was given; of older rules than those that come

    def reclaim(self) -> ComparedFlow:
        """The flow itself, in its place from now on."""
        reclaim, self._reclaim = self._reclaim, None
        if reclaim is not None:
            reclaim(self.flow)
        return self.flow

    # -- to be looked at

    @property
    def verdict(self) -> Verdict:
        """Of the rules that were in force."""
        return self.flow.verdict

    @property
    def last(self) -> int:
        """When it was seen here last."""
        return self.flow.last

    @last.setter
    def last(self, now_ns: int) -> None:
        self.flow.last = now_ns

    def quiet(self) -> bool:
        """Nothing waits here."""
        return True

    def closed(self) -> bool:
        """It ages as if it were."""
        return True

    def stands_for(self, flow: object) -> bool:
        """Whether it is this one that the kernel has."""
        return flow is self or flow is self.flow

    def outdate(self, epoch: int) -> None:
        """It is of an older epoch: it will be judged anew when it is reclaimed."""

    def removed(self) -> None:
        """The kernel still has it; what was kept of its past here is gone."""
        self.flow.removed()

    # -- calls

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        self.reclaim().pvm(rec, p, now_ns)

    def svm(self, p: Packet, now_ns: int) -> None:
        self.reclaim().svm(p, now_ns)

    def commit(self, p: Packet) -> None:
        self.reclaim().commit(p)

    def release_ready(self, now_ns: int) -> None:
        self.reclaim().release_ready(now_ns)

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        return self.reclaim().pvm_in_checkpoint(rec, p, now_ns)

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        self.reclaim().catch_up(rec, p, now_ns)

    def miss(self) -> None:
        self.reclaim().miss()

    def unhold(self) -> list[Held]:
        return self.reclaim().unhold()

    def defer(self) -> list[Held]:
        return self.reclaim().defer()

    def forget_svm(self) -> None:
        self.reclaim().forget_svm()

    def new_epoch(self, epoch: int) -> None:
        self.reclaim().new_epoch(epoch)

    def judged(self, verdict: Verdict) -> None:
        self.reclaim().judged(verdict)

    def expire(self, now_ns: int) -> int:
        return self.reclaim().expire(now_ns)
