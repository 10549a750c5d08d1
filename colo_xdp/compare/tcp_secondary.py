# SPDX-License-Identifier: GPL-2.0-or-later
"""What the SVM has said of one TCP connection, and the PVM not yet: in the order of the stream.

Nothing is compared here and nothing asked for: compare/tcp.py does that. Numbers are the primary
guest's but for the SYN's.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from ..net.packet import ACK, Packet
from ..net.seqnum import MASK, diff, later
from .history import History
from .ledger import Ledger

MAX_RSTS = 16
MAX_AGAIN = 16
MAX_URGENT = 8


@dataclass(slots=True)
class Syn:
    """The SVM's SYN of its newest incarnation. `seq` is its own ISN, never compared."""

    packet: Packet
    at: int
    twin: bool = False  # the PVM's SYN has been released


def rst_id(p: Packet) -> tuple[bool, int]:
    # A RST with ACK answers a segment without one and may have seq 0: its ack names it.
    return (True, p.ack) if p.flags & ACK else (False, p.seq)


class Push(Enum):
    """What has become of payload of the SVM."""

    STORED = auto()
    EARLY = auto()  # stored: there is a hole before it, or the stream's place is not known
    KNOWN = auto()  # all of it is
    FOREIGN = auto()  # so far from the stream's place that it is not of it
    FULL = auto()  # there is no room for it
    BEYOND = auto()  # the SVM is too far ahead


class SvmStream:
    """`send` is the number of the next byte in order; None: not known. What is stashed, `chunks` in
    order and `ooo` beyond a hole, is charged to the ledger."""

    __slots__ = (
        "_ledger", "again", "chunks", "ooo", "sack", "send", "sfin", "sfin_at", "srst", "srst_at",
        "ssyn", "surg",
    )  # fmt: skip

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.send: int | None = None
        self.chunks: deque[tuple[bytes, int, int, int]] = deque()  # frame, off, end, arrival
        self.ooo: list[tuple[int, bytes, int, int, int]] = []  # seq, then as above
        self.sack: int | None = None  # highest ack
        # what it sent again and the history does not reach: seq, frame, off, end
        self.again: list[tuple[int, bytes, int, int]] = []
        self.surg: tuple[int, ...] = ()  # where urgent data ends of which the PVM has not spoken
        self.sfin: int | None = None
        self.sfin_at = self.srst_at = 0
        self.srst: list[tuple[bool, int]] = []  # resets with no twin yet
        self.ssyn: Syn | None = None

    def forget(self) -> None:
        """Forget what it said, but for its place in the stream."""
        self._ledger.discharge_svm(len(self.chunks) + len(self.ooo))
        self.chunks.clear()
        self.ooo.clear()
        self.again.clear()
        self.sack = self.sfin = self.ssyn = None
        self.surg = ()
        self.srst.clear()

    def since(self) -> int:
        """Arrival of the oldest thing that the PVM did not send; 0 if none."""
        old = []
        if self.chunks:
            old.append(self.chunks[0][3])
        if self.ooo:
            old.append(self.ooo[0][4])
        if self.sfin is not None:
            old.append(self.sfin_at)
        if self.srst:
            old.append(self.srst_at)
        if self.ssyn is not None and not self.ssyn.twin:
            old.append(self.ssyn.at)
        return min(old) if old else 0

    # -- bytes

    def push(self, p: Packet, now_ns: int, ver: int | None, reach: int) -> Push:
        """Store what is new of a segment's payload. ver: the next byte to be verified; reach: so
        many bytes the SVM may be ahead of it."""
        send, off = self.send, p.off
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
        self.send = (send + p.end - off) & MASK
        if self.ooo:
            self.drain()
        if diff(self.send, ver or 0) > reach:
            _, off, end, _ = self.chunks.pop()
            self._ledger.discharge_svm()
            self.send = (self.send - (end - off)) & MASK
            return Push.BEYOND
        return Push.STORED

    def _push_early(self, p: Packet, now_ns: int, reach: int) -> Push:
        ooo = self.ooo
        if not self._ledger.admit_svm():
            return Push.FULL
        ref = self.send if self.send is not None else ooo[0][0] if ooo else p.seq
        if abs(diff(p.seq, ref)) > reach:
            self._ledger.discharge_svm()
            return Push.FOREIGN
        insort(ooo, (p.seq, p.frame, p.off, p.end, now_ns), key=lambda g: diff(g[0], ref))
        return Push.EARLY

    def drain(self) -> None:
        """Move what is no longer out of order."""
        ooo = self.ooo
        assert self.send is not None
        while ooo:
            seq, frame, off, end, at = ooo[0]
            d = diff(seq, self.send)
            if d > 0:
                break
            del ooo[0]
            if end - off + d <= 0:
                self._ledger.discharge_svm()
                continue
            self.chunks.append((frame, off - d, end, at))
            self.send = (self.send + end - off + d) & MASK

    def begin_at(self, seq: int) -> None:
        """The stream is known from here on."""
        self.send = seq
        self.drain()

    def drop_chunks(self) -> None:
        """Forget the bytes in order."""
        self._ledger.discharge_svm(len(self.chunks))
        self.chunks.clear()

    def drop_first(self) -> None:
        """The first chunk has been compared."""
        self.chunks.popleft()
        self._ledger.discharge_svm()

    def used(self, upto: int) -> None:
        """The bytes of the first chunk below its offset `upto` have been compared."""
        frame, _, end, at = self.chunks[0]
        if upto == end:
            self.drop_first()
        else:
            self.chunks[0] = (frame, upto, end, at)

    def move(self, n: int, hist: History) -> None:
        """Move the next `n` bytes, or all there are, to the history."""
        while n > 0 and self.chunks:
            frame, off, end, _ = self.chunks[0]
            size = min(n, end - off)
            hist.add(frame[off : off + size])
            n -= size
            self.used(off + size)

    def keep_again(self, p: Packet) -> None:
        """It has sent this again, and it is older than what the history reaches."""
        self.again.append((p.seq, p.frame, p.off, p.end))
        del self.again[:-MAX_AGAIN]

    def sent_again(self, seq: int, most: int) -> bytes:
        """What it has lately sent from `seq` on, though it had before.

        It gets the same acks, so it often sends the same again as the PVM.
        """
        for first, frame, off, end in reversed(self.again):
            d = (seq - first) & MASK
            if d < end - off:
                return frame[off + d : min(end, off + d + most)]
        return b""

    def is_beyond(self, place: int) -> bool:
        """Whether it has sent bytes beyond a place of the stream."""
        assert self.send is not None
        ends = (seq + end - off for seq, _, off, end, _ in self.ooo)
        return diff(self.send, place) > 0 or any(diff(end, place) > 0 for end in ends)

    # -- flags

    def acked(self, ack: int) -> None:
        """It has acked as much."""
        self.sack = later(self.sack, ack)

    def urgent(self, end: int) -> None:
        """It says that urgent data ends here."""
        self.surg = (*self.surg[1 - MAX_URGENT :], end)

    def finish(self, place: int, now_ns: int) -> None:
        """Its FIN is here."""
        self.sfin, self.sfin_at = place, now_ns

    def reset(self, ident: tuple[bool, int], now_ns: int) -> bool:
        """It has reset the connection; False: so often that this is not kept."""
        if len(self.srst) >= MAX_RSTS:
            return False
        if not self.srst:
            self.srst_at = now_ns
        self.srst.append(ident)
        return True

    def begin(self, syn: Packet, now_ns: int) -> None:
        """A new incarnation; what it said of the old one has no use any more."""
        self.forget()
        self.send = None
        self.ssyn = Syn(syn, now_ns)
        if syn.flags & ACK:
            self.sack = syn.ack
