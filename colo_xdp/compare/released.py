# SPDX-License-Identifier: GPL-2.0-or-later
"""State of one TCP connection that has left or is verified. A checkpoint does not change it.

released_nxt  next byte of the PVM to be released
verified      next byte to be verified, at or after released_nxt; the bytes before it, as far
              as they are kept, are `history`: produced by the SVM or contained in a checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass

from ..net.packet import Packet
from ..net.seqnum import HALF, MASK, diff
from .flow import CONTEXT
from .history import History
from .tcp_secondary import MAX_RSTS, MAX_URGENT, SvmStream


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why bytes of the PVM cannot leave: the SVM's bytes in their place, and its frame.

    Without bytes: they cannot be verified, since the history does not reach that far.
    """

    svm: bytes = b""
    svm_frame: bytes = b""


UNPROVEN = Mismatch()


class ReleasedStream:
    """What has left or is verified. Sequence numbers are the PVM's; None: not known."""

    __slots__ = (
        "committed_ack",
        "fin_done",
        "history",
        "isn",
        "origin",
        "released_nxt",
        "rst_done",
        "urg_done",
        "verified",
    )

    def __init__(self) -> None:
        self.released_nxt: int | None = None
        self.verified: int | None = None
        self.history = History()
        self.isn: int | None = None  # of the SYN that was released
        self.origin = 0  # number of the stream's first byte, for reports
        self.committed_ack: int | None = None
        self.fin_done: int | None = None  # position of the released FIN
        self.rst_done: set[tuple[bool, int]] = set()
        self.urg_done: tuple[int, ...] = ()  # where urgent data ended, the latest

    def forget(self) -> None:
        """Forget everything, as if the connection were new."""
        self.released_nxt = self.isn = self.committed_ack = self.fin_done = None
        self.rst_done.clear()
        self.urg_done = ()
        self.history.clear()

    def roll_back(self) -> None:
        """Forget what is verified but not released: the next epoch's SVM will produce it again."""
        if self.released_nxt is None:
            self.verified = None
            self.history.clear()
        elif self.verified is not None:
            ahead = diff(self.verified, self.released_nxt)
            if ahead > 0:
                self.history.cut(ahead)
            self.verified = self.released_nxt

    def over(self) -> bool:
        """Return whether the guest has closed or reset it: what follows are stragglers."""
        return self.fin_done is not None or bool(self.rst_done)

    def data(self, e: int) -> None:
        """Note that payload up to `e` leaves."""
        base = self.released_nxt
        if base is None or 0 < (e - base) & MASK < HALF:
            self.released_nxt = e

    def fin(self, f: int) -> bool:
        """Note that a FIN at `f` leaves.

        Returns whether it is the first and was the next to be verified.
        """
        if self.fin_done is not None:
            return False
        self.fin_done = f
        self.released_nxt = (f + 1) & MASK
        if self.verified != f:
            return False
        self.history.add(b"\0")  # keeps the history's offsets right; no payload may be there
        self.verified = self.released_nxt
        return True

    def syn(self, seq: int, e: int, payload: bytes) -> None:
        """Note that the SYN of a new incarnation leaves, with payload up to `e`."""
        self.isn = seq
        self.origin = (seq + 1) & MASK
        self.committed_ack = self.fin_done = None
        self.rst_done.clear()
        self.urg_done = ()
        self.history.clear()
        self.history.add(payload)
        self.released_nxt = self.verified = (e + 1) & MASK

    def rst(self, ident: tuple[bool, int]) -> None:
        """Note that a reset, or its counterpart, leaves."""
        if len(self.rst_done) >= MAX_RSTS:
            self.rst_done.clear()
        self.rst_done.add(ident)

    def urgent(self, end: int) -> None:
        """Note that a segment with this end of urgent data leaves."""
        if end not in self.urg_done:
            self.urg_done = (*self.urg_done[1 - MAX_URGENT :], end)

    # -- bytes of the SVM that become history

    def begin_at(self, seq: int, theirs: SvmStream) -> None:
        """Set the position from which on the stream is known (no SYN was seen)."""
        self.verified = self.origin = seq
        theirs.begin_at(seq)

    def verify(self, p: Packet, v: int, theirs: SvmStream) -> tuple[int, Mismatch | None]:
        """Compare payload of the PVM from `v` on; move what agrees from `theirs` to `history`.

        Returns up to where it agrees, and what is wrong there; None: the SVM has not sent the rest.
        """
        frame, history, chunks = p.frame, self.history, theirs.chunks
        s, verified = p.seq, self.verified
        e = (s + p.end - p.off) & MASK
        assert verified is not None
        while v != e:
            d = diff(v, verified)
            o = p.off + ((v - s) & MASK)
            if d == 0:
                if not chunks:
                    break
                cframe, coff, cend, _ = chunks[0]
                n = min(cend - coff, p.end - o)
                mine = frame[o : o + n]
                if mine != cframe[coff : coff + n]:
                    i = next(i for i in range(n) if mine[i] != cframe[coff + i])
                    svm = cframe[coff + i : min(coff + i + CONTEXT, cend)]
                    return (v + i) & MASK, Mismatch(svm, cframe)
                history.add(mine)
                v = verified = self.verified = (verified + n) & MASK
                theirs.used(coff + n)
            elif d < 0:
                # A retransmission: only what was verified once may leave again.
                n = min(-d, p.end - o)
                proven = history.back(-d, n) if history.size + d >= 0 else theirs.sent_again(v, n)
                if not proven:
                    return v, UNPROVEN
                n = len(proven)
                if frame[o : o + n] != proven:
                    i = next(i for i in range(n) if frame[o + i] != proven[i])
                    return (v + i) & MASK, Mismatch(proven[i : i + CONTEXT])
                v = (v + n) & MASK
            else:
                # The PVM left a gap (a frame was dropped here): take over the SVM's bytes, with
                # which the PVM's retransmission will be compared.
                if theirs.svm_nxt is None or diff(theirs.svm_nxt, v) <= 0:
                    break
                self._take(v, theirs)
                verified = v
        return v, None

    def _take(self, upto: int, theirs: SvmStream) -> None:
        """Move the SVM's bytes below `upto` to the history without comparing them."""
        assert self.verified is not None
        theirs.move(diff(upto, self.verified), self.history)
        self.verified = upto

    # -- what a checkpoint contains

    def commit_data(self, p: Packet, theirs: SvmStream) -> None:
        """Note payload that leaves without comparison."""
        n = p.end - p.off
        e = (p.seq + n) & MASK
        if self.verified is None:
            self.begin_at(p.seq, theirs)
        assert self.verified is not None
        new = diff(e, self.verified)
        if new > 0:
            if new > n:  # a frame in between was lost: its bytes are unknown
                self.history.clear()
                new = n
            self.history.add(p.frame[p.end - new : p.end])
            self._forward(e, theirs)
        if self.released_nxt is None or diff(e, self.released_nxt) > 0:
            self.released_nxt = e

    def jump(self, seq: int, theirs: SvmStream) -> None:
        """Note that everything below `seq` has left, with unknown bytes."""
        if self.verified is None:
            self.begin_at(seq, theirs)
        elif diff(seq, self.verified) > 0:
            self.history.clear()
            self._forward(seq, theirs)
        self.released_nxt = seq

    def _forward(self, seq: int, theirs: SvmStream) -> None:
        """Drop the SVM's bytes below `seq`, which are of no more use."""
        kept = self.history.size
        self._take(seq, theirs)
        self.history.cut(self.history.size - kept)
        if theirs.svm_nxt is None or diff(seq, theirs.svm_nxt) > 0:
            theirs.svm_nxt = seq
        theirs.drain()
