# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices checkpoints that were requested too soon: the counterpart was on its way.

The flow that requested one because its head had waited is remembered until the checkpoint is
complete. What the SVM sends until it stops is not compared any more, but if it is what the head
waited for, the checkpoint was needless, and the wait shows how long the SVM needs.
"""

from __future__ import annotations

from ..compare.compared import ComparedFlow
from ..compare.flow import Requester
from ..compare.tcp_wait import FLAGS
from ..net.packet import Kind, Packet, datagram_body
from ..net.seqnum import HALF, MASK


def _answers(theirs: Packet, mine: Packet) -> bool:
    """Return whether the SVM's frame carries what the first byte, or the flag, of the PVM's is."""
    if theirs.key != mine.key or theirs.kind is not mine.kind:
        return False
    if mine.kind is not Kind.TCP:
        return datagram_body(theirs) == datagram_body(mine)
    if mine.flags & FLAGS:
        return not (theirs.flags ^ mine.flags) & FLAGS
    size = mine.end - mine.off
    if not size:
        return (theirs.ack - mine.ack) & MASK < HALF
    at = theirs.off + ((mine.seq - theirs.seq) & MASK)
    n = min(size, theirs.end - at)
    return n > 0 and theirs.frame[at : at + n] == mine.frame[mine.off : mine.off + n]


def _is_bare_ack(p: Packet) -> bool:
    return p.kind is Kind.TCP and p.off == p.end and not p.flags & FLAGS


class Suspect:
    """The head of the flow that requested the checkpoint which has begun, if it did by waiting."""

    __slots__ = ("_head", "_since_ns")

    def __init__(self) -> None:
        self._head: Packet | None = None
        self._since_ns = 0

    def __bool__(self) -> bool:
        return self._head is not None

    def begin(self, flow: Requester | str) -> bool:
        """Remember the flow's head as the checkpoint begins; False: it has left meanwhile."""
        if not isinstance(flow, ComparedFlow):
            return True  # fragments: nobody looks
        if not flow.held:
            return False
        rec, self._head, _ = flow.held[0]
        self._since_ns = rec.ts_ns
        return True

    def answered(self, theirs: Packet, ts_ns: int) -> int:
        """Return how long the head has waited if this, captured at ts_ns, is what it waited for.

        Otherwise 0; 1 for a bare ack, whose wait shows nothing.
        """
        if self._head is None or not _answers(theirs, self._head):
            return 0
        bare, self._head = _is_bare_ack(self._head), None
        return 1 if bare else max(1, ts_ns - self._since_ns)

    def clear(self) -> None:
        """Forget it: the checkpoint is complete."""
        self._head = None
