# SPDX-License-Identifier: GPL-2.0-or-later
"""Output of the SVM on one TCP connection that the PVM has not produced yet, in stream order.

This module compares nothing and requests nothing; compare/tcp.py does. Sequence numbers are the
PVM's, except for the SYN's.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum, auto

from ..net.packet import ACK, RST, Packet
from ..net.seqnum import HALF, MASK, diff, later
from .history import History
from .ledger import Ledger

MAX_RSTS = 16
MAX_AGAIN = 16
MAX_URGENT = 8


@dataclass(slots=True)
class Syn:
    """The SVM's SYN of its newest incarnation. `seq` is its own ISN, which is never compared."""

    packet: Packet
    at: int
    matched: bool = False  # the PVM's SYN has been released


def rst_id(p: Packet) -> tuple[bool, int]:
    # A RST with ACK answers a segment without one and may have seq 0: its ack identifies it.
    return (True, p.ack) if p.flags & ACK else (False, p.seq)


class Push(Enum):
    """Result of storing payload of the SVM."""

    STORED = auto()
    EARLY = auto()  # stored; follows a gap, or the position in the stream is not known
    KNOWN = auto()  # all of it is already known
    FOREIGN = auto()  # too far from the stream's position to belong to it
    FULL = auto()  # no room
    BEYOND = auto()  # the SVM is too far ahead


class SvmStream:
    """What the SVM has sent. `svm_nxt` is the number of the next byte in order; None: not known.

    The buffered frames (`chunks` in order, `out_of_order` after a gap) are charged to the ledger.
    """

    __slots__ = (
        "_ledger",
        "chunks",
        "out_of_order",
        "svm_ack",
        "svm_fin",
        "svm_fin_at",
        "svm_nxt",
        "svm_retransmits",
        "svm_rst_at",
        "svm_rst_place",
        "svm_rsts",
        "svm_syn",
        "svm_urgent",
    )

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.svm_nxt: int | None = None
        self.chunks: deque[tuple[bytes, int, int, int]] = deque()  # frame, off, end, arrival
        self.out_of_order: list[tuple[int, bytes, int, int, int]] = []  # seq, then as above
        self.svm_ack: int | None = None  # highest ack
        # retransmissions that the history does not reach: seq, frame, off, end
        self.svm_retransmits: list[tuple[int, bytes, int, int]] = []
        self.svm_urgent: tuple[int, ...] = ()  # ends of urgent data that the PVM has not signalled
        self.svm_fin: int | None = None
        self.svm_fin_at = self.svm_rst_at = 0
        self.svm_rsts: list[tuple[bool, int]] = []  # resets without a counterpart yet
        # where the first of them ended its stream; None: it answers a segment and says nothing
        self.svm_rst_place: int | None = None
        self.svm_syn: Syn | None = None

    def forget(self) -> None:
        """Forget the SVM's output, but not its position in the stream."""
        self._ledger.discharge_svm(len(self.chunks) + len(self.out_of_order))
        self.chunks.clear()
        self.out_of_order.clear()
        self.svm_retransmits.clear()
        self.svm_ack = self.svm_fin = self.svm_syn = None
        self.svm_urgent = ()
        self.svm_rsts.clear()
        self.svm_rst_place = None

    def since(self) -> int:
        """Return the arrival (ns) of the oldest output without a counterpart; 0 if none."""
        old = []
        if self.chunks:
            old.append(self.chunks[0][3])
        if self.out_of_order:
            old.append(self.out_of_order[0][4])
        if self.svm_fin is not None:
            old.append(self.svm_fin_at)
        if self.svm_rsts:
            old.append(self.svm_rst_at)
        if self.svm_syn is not None and not self.svm_syn.matched:
            old.append(self.svm_syn.at)
        return min(old) if old else 0

    # -- bytes

    def push(self, p: Packet, now_ns: int, verified: int | None, reach: int) -> Push:
        """Store what is new in a segment's payload.

        verified: the next byte to be verified; reach: how many bytes the SVM may be ahead of it.
        """
        send, off = self.svm_nxt, p.off
        if p.seq != send:
            if send is not None:
                d = diff(p.seq, send)
                if d < 0:
                    if d + p.end - off <= 0:
                        return Push.KNOWN
                    off -= d
            if send is None or d > 0:
                return self._push_early(p, now_ns, reach)
        if not self._ledger.admit_svm():
            return Push.FULL
        assert send is not None
        self.chunks.append((p.frame, off, p.end, now_ns))
        self.svm_nxt = (send + p.end - off) & MASK
        if self.out_of_order:
            self.drain()
        if diff(self.svm_nxt, verified or 0) > reach:
            _, off, end, _ = self.chunks.pop()
            self._ledger.discharge_svm()
            self.svm_nxt = (self.svm_nxt - (end - off)) & MASK
            return Push.BEYOND
        return Push.STORED

    def _push_early(self, p: Packet, now_ns: int, reach: int) -> Push:
        out_of_order = self.out_of_order
        if not self._ledger.admit_svm():
            return Push.FULL
        ref = (
            self.svm_nxt
            if self.svm_nxt is not None
            else out_of_order[0][0]
            if out_of_order
            else p.seq
        )
        if abs(diff(p.seq, ref)) > reach:
            self._ledger.discharge_svm()
            return Push.FOREIGN
        insort(out_of_order, (p.seq, p.frame, p.off, p.end, now_ns), key=lambda g: diff(g[0], ref))
        return Push.EARLY

    def drain(self) -> None:
        """Move to `chunks` what is no longer out of order."""
        out_of_order = self.out_of_order
        assert self.svm_nxt is not None
        while out_of_order:
            seq, frame, off, end, at = out_of_order[0]
            d = diff(seq, self.svm_nxt)
            if d > 0:
                break
            del out_of_order[0]
            if end - off + d <= 0:
                self._ledger.discharge_svm()
                continue
            self.chunks.append((frame, off - d, end, at))
            self.svm_nxt = (self.svm_nxt + end - off + d) & MASK

    def begin_at(self, seq: int) -> None:
        """Set the position from which on the stream is known."""
        self.svm_nxt = seq
        self.drain()

    def drop_chunks(self) -> None:
        """Forget the bytes in order."""
        self._ledger.discharge_svm(len(self.chunks))
        self.chunks.clear()

    def drop_first(self) -> None:
        """Drop the first chunk, which has been compared."""
        self.chunks.popleft()
        self._ledger.discharge_svm()

    def used(self, upto: int) -> None:
        """Drop the bytes of the first chunk before its offset `upto`, which have been compared."""
        frame, _, end, at = self.chunks[0]
        if upto == end:
            self.drop_first()
        else:
            self.chunks[0] = (frame, upto, end, at)

    def move(self, n: int, history: History) -> None:
        """Move the next `n` bytes, or all there are, to the history."""
        while n > 0 and self.chunks:
            frame, off, end, _ = self.chunks[0]
            size = min(n, end - off)
            history.add(frame[off : off + size])
            n -= size
            self.used(off + size)

    def keep_again(self, p: Packet) -> None:
        """Keep a retransmission that is older than the history."""
        self.svm_retransmits.append((p.seq, p.frame, p.off, p.end))
        del self.svm_retransmits[:-MAX_AGAIN]

    def sent_again(self, seq: int, most: int) -> bytes:
        """Return what the SVM has lately retransmitted from `seq` on, at most `most` bytes.

        It gets the same acks as the PVM, so it often retransmits the same.
        """
        for first, frame, off, end in reversed(self.svm_retransmits):
            d = (seq - first) & MASK
            if d < end - off:
                return frame[off + d : min(end, off + d + most)]
        return b""

    def is_beyond(self, place: int) -> bool:
        """Return whether the SVM has sent bytes beyond a position of the stream."""
        assert self.svm_nxt is not None
        ends = (seq + end - off for seq, _, off, end, _ in self.out_of_order)
        return diff(self.svm_nxt, place) > 0 or any(diff(end, place) > 0 for end in ends)

    def is_foreign(self, seq: int, reach: int, isn: int | None) -> bool:
        """Return whether a sequence number cannot belong to this connection.

        reach: how far it may be from the next byte; isn: of the PVM's SYN that was released.
        """
        send = self.svm_nxt
        if send is None:
            return False  # nothing is known about it
        if (seq - send + reach) & MASK > 2 * reach:
            return True
        # Below the ISN: an earlier connection had lower numbers (RFC 6528).
        young = isn is not None and (send - isn) & MASK < HALF >> 1
        return isn is not None and young and (seq - isn) & MASK >= HALF

    # -- flags

    def control(
        self, p: Packet, now_ns: int, isn: int | None, resets: Container[tuple[bool, int]]
    ) -> Push:
        """Note a SYN or a reset; return STORED, KNOWN or FULL.

        isn, resets: the SYN and the resets of the PVM that were released.
        """
        if p.flags & RST:
            if p.flags & ACK:
                self.acked(p.ack)
            ident = rst_id(p)
            if ident in resets or ident in self.svm_rsts:
                return Push.KNOWN
            place = p.seq if p.flags & ACK else None
            return Push.STORED if self.reset(ident, place, now_ns) else Push.FULL
        syn = self.svm_syn
        # the second case: a retransmission by an SVM that a checkpoint cloned during the handshake
        if syn.packet.seq == p.seq if syn is not None else isn == p.seq:
            if p.flags & ACK:
                self.acked(p.ack)
            return Push.KNOWN
        self.begin(p, now_ns)
        return Push.STORED

    def acked(self, ack: int) -> None:
        """Note an ack of the SVM."""
        self.svm_ack = later(self.svm_ack, ack)

    def urgent(self, end: int, released_nxt: int | None, done: tuple[int, ...]) -> None:
        """Note that the SVM's urgent data ends here, unless that has left (`done`).

        For bytes that have left, the PVM's pointer counts, which was compared when they left.
        """
        ahead = released_nxt is None or diff(end, released_nxt) > 0
        if ahead and end not in self.svm_urgent and end not in done:
            self.svm_urgent = (*self.svm_urgent[1 - MAX_URGENT :], end)

    def finish(self, place: int, now_ns: int) -> None:
        """Note the SVM's FIN."""
        self.svm_fin, self.svm_fin_at = place, now_ns

    def reset(self, ident: tuple[bool, int], place: int | None, now_ns: int) -> bool:
        """Note a reset by the SVM; return False if there are too many to keep."""
        if len(self.svm_rsts) >= MAX_RSTS:
            return False
        if not self.svm_rsts:
            self.svm_rst_at, self.svm_rst_place = now_ns, place
        self.svm_rsts.append(ident)
        return True

    def take_rst(self, ident: tuple[bool, int]) -> tuple[bool, int]:
        """Remove the counterpart of a reset of the PVM: the same one, or else the oldest."""
        found = ident if ident in self.svm_rsts else self.svm_rsts[0]
        self.svm_rsts.remove(found)
        self.svm_rst_place = None
        return found

    def begin(self, syn: Packet, now_ns: int) -> None:
        """Start a new incarnation; output of the old one is of no more use."""
        self.forget()
        self.svm_nxt = None
        self.svm_syn = Syn(syn, now_ns)
        if syn.flags & ACK:
            self.svm_ack = syn.ack
