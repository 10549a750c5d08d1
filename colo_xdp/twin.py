# SPDX-License-Identifier: GPL-2.0-or-later
"""One TCP connection's state, and the half of its comparer that takes the SVM's frames.

What the SVM says is only stored here, in the order of the stream; stream.py is the
half that releases the PVM's frames by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import Self

from ._seq import HALF, MASK, diff, later
from .compared import ComparedFlow
from .comparer import CONTEXT, Host
from .flow import FlowKey
from .held_queue import Held
from .history import History
from .marks import FAR, SPARE, ip_id, urgent_position
from .offload_port import OffloadCodec
from .packet import ACK, FIN, RST, SYN, URG, Packet
from .policy import Verdict
from .reasons import Cause
from .window import WindowGate

FLAGS = FIN | SYN | RST
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


class Twin(ComparedFlow, ABC):
    """One connection, one direction: what the guest sends."""

    __slots__ = (
        "ace",
        "again",
        "base",
        "chunks",
        "committed_ack",
        "deaf",
        "fin_done",
        "head_ok",
        "hist",
        "isn",
        "ooo",
        "origin",
        "rst_done",
        "sack",
        "send",
        "sfin",
        "sfin_at",
        "signed",
        "spared",
        "srst",
        "srst_at",
        "ssyn",
        "stuck",
        "surg",
        "unfit",
        "unverifiable",
        "urg_done",
        "ver",
        "windows",
    )

    def __init__(
        self, host: Host, key: FlowKey, epoch: int, verdict: Verdict, direction: str,
        codec: OffloadCodec[Self],
    ) -> None:  # fmt: skip
        super().__init__(host, key, epoch, verdict, direction, codec)
        # of the PVM, kept over checkpoints
        self.base: int | None = None
        self.isn: int | None = None  # of the SYN that was released
        self.origin = 0  # number of the stream's first byte, for reports
        self.committed_ack: int | None = None
        self.fin_done: int | None = None  # place of the FIN that was released
        self.rst_done: set[tuple[bool, int]] = set()
        self.urg_done: tuple[int, ...] = ()  # where urgent data ended that was released, the latest
        #: AE, CWR and ECE are AccECN's counter; None: that was asked for, the answer is not known
        self.ace: bool | None = False
        self.signed = False  # its segments are: they leave as they are, or not at all
        self.deaf = False  # the SVM's numbers are others: it cannot take what the client signs
        self.unfit = False  # not for tier K, whose headers are of other segments than theirs
        self.spared = 0  # IP ids given out
        self.windows = WindowGate()
        self.hist = History()
        # of the PVM, not yet released
        self.head_ok: int | None = None  # the head is verified up to here
        self.unverifiable = False
        # of the SVM, forgotten at each checkpoint
        self.ver: int | None = None
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
        self.stuck = False  # a difference is proven: nothing leaves before the checkpoint

    @abstractmethod
    def ask(
        self, cause: Cause, p: Packet | None = None, at: int | None = None,
        svm: bytes = b"", svm_frame: bytes = b"",
    ) -> None:  # fmt: skip
        """Ask for a checkpoint, once per epoch."""

    # -- the engine's side

    def closed(self) -> bool:
        """The guest has closed or reset it; what comes now are stragglers."""
        return self.fin_done is not None or bool(self.rst_done)

    def new_epoch(self, epoch: int) -> None:
        """Forget what the SVM of the old epoch said (I7)."""
        self.epoch = epoch
        self.deaf = False  # a copy has the same numbers: nothing is translated any more
        self.windows.new_epoch()
        self.asked = self.stuck = False
        self.unverifiable = False
        self.head_ok = None
        self.forget_svm()
        if self.base is None:
            self.ver = self.send = None
            self.hist.clear()
        elif self.ver is not None:
            # verified, but not released: the new SVM will produce it again
            ahead = diff(self.ver, self.base)
            if ahead > 0:
                self.hist.cut(ahead)
            self.ver = self.send = self.base

    def unknown(self, epoch: int) -> None:
        """Forget everything, as of a connection that is met for the first time."""
        self.base = self.isn = self.committed_ack = self.fin_done = None
        self.rst_done.clear()
        self.urg_done = ()
        self.windows = WindowGate()
        self.hist.clear()
        super().unknown(epoch)

    def removed(self) -> None:
        """The flow is out of the tables: nobody asks for its past."""
        self.host.histories.drop(self.hist)

    def unhold(self) -> list[Held]:
        """Give up the frames that wait."""
        self.head_ok = None
        return self.held.drain()

    def svm_since(self) -> int:
        """Arrival of the oldest thing the SVM sent and the PVM did not; 0 if none."""
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

    def forget_svm(self) -> None:
        """Forget what the SVM said, and has not been released."""
        self.host.ledger.discharge_svm(len(self.chunks) + len(self.ooo))
        self.chunks.clear()
        self.ooo.clear()
        self.again.clear()
        self.sack = self.sfin = self.ssyn = None
        self.surg = ()
        self.srst.clear()

    def spare_ids(self, p: Packet, n: int) -> int:
        """See SpareIds. Half the numbers away: a guest that counts gets there last, and one that
        draws its ids (RFC 7739) as seldom there as anywhere."""
        first = ip_id(p) + FAR + self.spared
        self.spared = (self.spared + n) % SPARE
        return first & 0xFFFF

    # -- the SVM's frames

    def svm(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM of the current epoch: only compared, never sent anywhere."""
        flags = p.flags
        if flags & (SYN | RST):
            self._svm_control(p, now_ns)
        elif p.seq != self.send and self._foreign(p.seq):
            # Late, and of an earlier connection on these ports: its ack, its window and its FIN
            # would be read in the numbers of this one.
            self.outbox.count("svm_out_of_window")
            return
        else:
            if flags & ACK:
                a = self.sack
                if a is None or 0 < (p.ack - a) & MASK < HALF:
                    self.sack = p.ack
                self.windows.svm(p)
            if flags & URG:
                self._svm_urgent(urgent_position(p))
            if p.off != p.end:
                self._svm_data(p, now_ns)
            if flags & FIN:
                self._svm_fin((p.seq + p.end - p.off) & MASK, now_ns)
        frames = self.held.frames
        if frames:
            self.pump(now_ns)
        windows = self.windows
        if windows.shrunk and not frames:
            update = windows.update(self.base, self.spare_ids, self.ace)
            if update is not None:
                self.outbox.count("window_updates")
                update.ts_ns = now_ns  # made now: nothing has waited
                self.outbox.release(update)
        if not self.when and (self.chunks or self.ooo or flags & FLAGS):
            self.host.timers.arm(self, now_ns + self.host.timeout_ns)

    def _foreign(self, seq: int) -> bool:
        """Whether a number cannot be of this connection."""
        if self.send is None:
            return False  # nothing is known of it
        reach = self.host.max_stream
        if (seq - self.send + reach) & MASK > 2 * reach:
            return True
        # Below the ISN: what came before it had lower numbers (RFC 6528).
        isn = self.isn
        young = isn is not None and (self.send - isn) & MASK < HALF >> 1
        return isn is not None and young and (seq - isn) & MASK >= HALF

    def _svm_data(self, p: Packet, now_ns: int) -> None:
        host = self.host
        send, off = self.send, p.off
        if p.seq != send:
            if send is not None:
                d = diff(p.seq, send)
                if d < 0:
                    if d + p.end - off <= 0:
                        self.outbox.count("svm_retransmit")
                        if self.ver is not None and diff(self.ver, p.seq) > self.hist.size:
                            self.again.append((p.seq, p.frame, off, p.end))
                            del self.again[:-MAX_AGAIN]
                        return
                    off -= d
            if send is None or d > 0:
                self._svm_early(p, now_ns)
                return
        if not host.ledger.admit_svm():
            self.svm_full()
            return
        assert send is not None
        if self.fin_done is not None and not self.stuck:
            self.stuck = True
            self.ask(Cause.FIN_DIFFERS, svm=p.frame[off : off + CONTEXT], svm_frame=p.frame)
        self.chunks.append((p.frame, off, p.end, now_ns))
        self.send = (send + p.end - off) & MASK
        if self.ooo:
            self.drain()
        if diff(self.send, self.ver or 0) > host.max_stream:
            _, off, end, _ = self.chunks.pop()
            host.ledger.discharge_svm()
            self.send = (self.send - (end - off)) & MASK
            self.outbox.count("stream_full_dropped")
            self.ask(Cause.STREAM_FULL)

    def _svm_early(self, p: Packet, now_ns: int) -> None:
        host, ooo = self.host, self.ooo
        if not host.ledger.admit_svm():
            self.svm_full()
            return
        ref = self.send if self.send is not None else ooo[0][0] if ooo else p.seq
        if abs(diff(p.seq, ref)) > host.max_stream:
            host.ledger.discharge_svm()
            self.outbox.count(
                "svm_out_of_window"
            )  # if it was needed, the PVM's frame will time out
            return
        self.outbox.count("svm_out_of_order")
        insort(ooo, (p.seq, p.frame, p.off, p.end, now_ns), key=lambda g: diff(g[0], ref))

    def svm_full(self) -> None:
        self.outbox.count("svm_queue_full_dropped")
        self.outbox.request(Cause.QUEUE_FULL, self)

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
                self.host.ledger.discharge_svm()
                continue
            self.chunks.append((frame, off - d, end, at))
            self.send = (self.send + end - off + d) & MASK

    def _svm_urgent(self, end: int) -> None:
        # Of bytes that have left the PVM's word counts, which was compared when they did.
        ahead = self.base is None or diff(end, self.base) > 0
        if ahead and end not in self.surg and end not in self.urg_done:
            self.surg = (*self.surg[1 - MAX_URGENT :], end)

    def _svm_fin(self, f: int, now_ns: int) -> None:
        ours = self.send is not None  # else the SVM is one incarnation ahead of the PVM
        if f == self.sfin or (ours and f == self.fin_done):
            self.outbox.count("svm_retransmit")
            return
        early = self.base is not None and diff(f, self.base) < 0
        if ours and (early or self.fin_done is not None):
            self.stuck = True
            self.ask(Cause.FIN_DIFFERS)
        self.sfin, self.sfin_at = f, now_ns

    def _svm_control(self, p: Packet, now_ns: int) -> None:
        if p.flags & RST:
            if p.flags & ACK:
                self.sack = later(self.sack, p.ack)
            ident = rst_id(p)
            if ident in self.rst_done or ident in self.srst:
                self.outbox.count("svm_retransmit")
            elif len(self.srst) >= MAX_RSTS:
                self.svm_full()
            else:
                if not self.srst:
                    self.srst_at = now_ns
                self.srst.append(ident)
            return
        if (self.ssyn is not None and self.ssyn.packet.seq == p.seq) or (
            # sent again by an SVM that a checkpoint made a clone in the handshake
            self.ssyn is None and self.isn == p.seq
        ):
            self.outbox.count("svm_retransmit")
            if p.flags & ACK:
                self.sack = later(self.sack, p.ack)
            return
        # a new incarnation on the SVM; what it said of the old one has no use any more
        self.forget_svm()
        self.send = None
        self.ssyn = Syn(p, now_ns)
        if p.flags & ACK:
            self.sack = p.ack
