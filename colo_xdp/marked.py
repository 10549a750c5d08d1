# SPDX-License-Identifier: GPL-2.0-or-later
"""What a connection's segments say besides bytes, acks and windows, as stream.py compares it.

Urgent data is output; signed segments cannot be changed. What else the headers have (marks.py) is
not compared, and kept as the PVM made it.
"""

from __future__ import annotations

from abc import ABC

from ._seq import MASK, diff
from .limits import NEVER
from .marks import counts_in_ace, is_atomic, is_signed, urgent_position
from .packet import SYN, URG, Packet
from .reasons import Cause
from .twin import MAX_URGENT, Twin

#: how long a signed frame of which a part is verified, and which cannot be cut, waits for the rest:
#: a SVM that does not wait for acks has sent it by then, or sent again what it has (RFC 6298 2.4)
SIGNED_PART_NS = 200_000_000


class Marked(Twin, ABC):
    """A connection, between twin.py and stream.py."""

    __slots__ = ()

    def _differ(
        self, cause: Cause, p: Packet, at: int | None = None, svm: bytes = b"",
        svm_frame: bytes = b"",
    ) -> bool:  # fmt: skip
        self.stuck = True
        self.ask(cause, p, at, svm, svm_frame)
        return False

    def _begin_marks(self, syn: Packet, twin: Packet | None) -> None:
        """A new incarnation. `twin`: the SVM's SYN, None if a checkpoint contains ours."""
        self.urg_done = ()
        self.ace = counts_in_ace(syn)
        self.signed = is_signed(syn)
        self.deaf = self.signed and twin is not None and twin.seq != syn.seq
        self.unfit = self.signed or self.ace is True or not is_atomic(syn)

    # -- signed segments

    def _sign(self, p: Packet) -> None:
        """A signed frame of the PVM.

        What the client signs is about the PVM's numbers. A SVM with others drops it once it is
        translated, and says no more: only a checkpoint helps, from which on the numbers are equal.
        """
        if not self.signed:
            self.signed = self.unfit = True
            self.outbox.count("signed_connections")
        if self.deaf and not p.flags & SYN:
            self.ask(Cause.SIGNED_CONNECTION, p)

    def _signed_due(self, now_ns: int) -> int:
        """When the head has waited for long enough as a whole of which a part is verified."""
        v, (_, p, at) = self.head_ok, self.held[0]
        if v is None or not 0 < (v - p.seq) & MASK < p.end - p.off:
            return NEVER
        if at + SIGNED_PART_NS <= now_ns:
            self.ask(Cause.SIGNED_CONNECTION, p)
        return at + SIGNED_PART_NS

    # -- urgent data

    def _ready_urgent(self, p: Packet) -> bool:
        """Urgent data ends where the SVM has said that it does.

        Applications read by it (the byte out of band, SIOCATMARK), so it is output as bytes are. A
        guest that has more to say may say so with the later place only (RFC 9293 3.8.5).
        """
        if p.flags & URG:
            u = urgent_position(p)
            if u in self.surg or u in self.urg_done:
                return True
            # The first to carry the last urgent byte says so, or it never was one.
            passed = self.send is not None and diff(self.send, u) >= 0
            return self._differ(Cause.URGENT_DIFFERS, p) if passed else False
        size = p.end - p.off
        for u in self.surg:
            if 0 < (u - p.seq) & MASK <= size:
                return self._differ(Cause.URGENT_DIFFERS, p, (u - 1) & MASK)
        return True

    def _settle_urgent(self, p: Packet, e: int) -> None:
        if p.flags & URG and (u := urgent_position(p)) not in self.urg_done:
            self.urg_done = (*self.urg_done[1 - MAX_URGENT :], u)
        self.surg = tuple(
            u for u in self.surg if u not in self.urg_done and diff(u, e) > 0
        )  # fmt: skip
