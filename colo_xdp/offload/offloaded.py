# SPDX-License-Identifier: GPL-2.0-or-later
"""Placeholder in the engine's tables for an offloaded flow: any call reclaims it and is passed on.

Reading its properties reclaims nothing. What waits in the kernel waits for nothing here, and the
placeholder can be forgotten, since the kernel's state is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..compare.compared import ComparedFlow
from ..compare.held_queue import Held
from ..compare.policy import Verdict
from ..net.frame import Frame
from ..net.packet import Packet


class OffloadedFlow:
    """Placeholder for `flow`, which is as it was when it was offloaded.

    reclaim(flow) puts it back in its place, and continues it from the kernel's state.
    """

    __slots__ = ("_reclaim", "direction", "epoch", "flow", "key")

    bypassed = False
    when = 0  # the kernel has what waits
    held: Iterable[Held] = ()

    def __init__(self, flow: ComparedFlow, reclaim: Callable[[ComparedFlow], None]) -> None:
        self.flow = flow
        self._reclaim: Callable[[ComparedFlow], None] | None = reclaim
        self.key, self.direction = flow.key, flow.direction
        self.epoch = flow.epoch  # in which it was offloaded; older than any new rules

    def reclaim(self) -> ComparedFlow:
        """Return the flow itself, which is back in its place from now on."""
        reclaim, self._reclaim = self._reclaim, None
        if reclaim is not None:
            reclaim(self.flow)
        return self.flow

    # -- properties

    @property
    def verdict(self) -> Verdict:
        """Return the verdict of the rules that were in force."""
        return self.flow.verdict

    @property
    def last(self) -> int:
        """Return when it was last seen here."""
        return self.flow.last

    @last.setter
    def last(self, now_ns: int) -> None:
        self.flow.last = now_ns

    def quiet(self) -> bool:
        """Return True: nothing waits here."""
        return True

    def closed(self) -> bool:
        """Return True: it ages like a closed flow."""
        return True

    def stands_for(self, flow: object) -> bool:
        """Return whether `flow` is the one that the kernel has."""
        return flow is self or flow is self.flow

    def outdate(self, epoch: int) -> None:
        """Do nothing: its epoch is older, so it is judged again when it is reclaimed."""

    def removed(self) -> None:
        """Drop the flow's history here. The kernel still has the flow."""
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
