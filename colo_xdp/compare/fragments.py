# SPDX-License-Identifier: GPL-2.0-or-later
"""Reassembles IP fragments into datagrams (RFC 791 section 3.2, RFC 8200 section 4.5). Pure.

Fragments are compared as whole datagrams, so it does not matter how each guest fragmented them.
None leaves before all are verified: a client could otherwise combine fragments of both guests. A
set that overlaps itself is never complete (RFC 5722); it waits for the checkpoint that
compare_timeout requests.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ..net.frame import Evidence, Frame
from ..net.packet import Packet, parse
from .causes import Cause
from .flow import FlowContext
from .held_queue import Held, HeldQueue
from .policy import Verdict

#: datagrams in assembly of which some fragments left with a checkpoint; older ones are forgotten
MAX_COMMITTED = 64
_MAX_DATAGRAM = 65535
_Key = tuple[bytes, bytes]  # flow, identification


def _sum(data: bytes) -> int:
    n = int.from_bytes(data, "big")
    return (n - 1) % 0xFFFF + 1 if n else 0


@dataclass(slots=True)
class _Set:
    """One datagram in assembly."""

    pieces: dict[int, bytes] = field(default_factory=dict)  # offset in bytes -> payload
    total: int | None = None
    first: bytes = b""  # the frame at offset 0, up to its payload
    l3: int = 0
    broken: bool = False
    since: int = 0

    def add(self, p: Packet) -> None:
        v4 = p.frame[p.l3] >> 4 == 4
        offset = (p.seq & 0x1FFF) * 8 if v4 else p.seq & 0xFFF8
        more = p.seq & 0x2000 if v4 else p.seq & 1
        body = p.frame[p.off : p.end]
        end = offset + len(body)
        if self.pieces.get(offset) == body and (more or self.total == end):
            return  # a duplicate
        overlaps = any(o < end and offset < o + len(b) for o, b in self.pieces.items())
        odd = more and len(body) % 8
        beyond = self.total is not None and (end > self.total or not more)
        if overlaps or odd or beyond or end > _MAX_DATAGRAM or not body:
            self.broken = True
            return
        if not more:
            if any(o + len(b) > end for o, b in self.pieces.items()):
                self.broken = True
            self.total = end
        if not offset:
            self.first, self.l3 = p.frame[: p.off], p.l3
        self.pieces[offset] = body

    def whole(self) -> bytes | None:
        """Return the frame that was fragmented; None while something is missing."""
        if self.broken or self.total is None or not self.first:
            return None
        if sum(map(len, self.pieces.values())) != self.total:
            return None
        head = bytearray(self.first)
        l3 = self.l3
        if head[l3] >> 4 == 4:
            if len(head) - l3 + self.total > _MAX_DATAGRAM:
                self.broken = True
                return None
            struct.pack_into("!H", head, l3 + 2, len(head) - l3 + self.total)
            head[l3 + 6] &= 0x40  # offset 0, no more fragments
            head[l3 + 7] = 0
            head[l3 + 10 : l3 + 12] = b"\0\0"
            struct.pack_into("!H", head, l3 + 10, 0xFFFF & ~_sum(bytes(head[l3:])))
        else:  # an atomic fragment (RFC 6946)
            length = len(head) - l3 - 40 + self.total
            if length > _MAX_DATAGRAM:
                self.broken = True
                return None
            struct.pack_into("!H", head, l3 + 4, length)
            struct.pack_into("!H", head, len(head) - 6, 0)
        return bytes(head) + b"".join(self.pieces[o] for o in sorted(self.pieces))


def _ident(p: Packet) -> _Key:
    v4 = p.frame[p.l3] >> 4 == 4
    return p.key, p.frame[p.l3 + 4 : p.l3 + 6] if v4 else p.frame[p.off - 4 : p.off]


class Fragments:
    """Datagrams in assembly, of both guests. To the engine it is a flow that holds frames."""

    def __init__(self, host: FlowContext, epoch: int, verdict: Verdict) -> None:
        self.host, self.outbox, self.verdict, self.epoch = host, host.outbox, verdict, epoch
        self.when = 0
        self.asked = False
        self._pvm: dict[_Key, _Set] = {}
        self._svm: dict[_Key, _Set] = {}
        self._waiting: dict[_Key, HeldQueue] = {}  # fragments of the PVM, not yet released

    # -- frames

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> Frame | None:
        """Add a fragment of the PVM; return the datagram if it is complete.

        It leaves as its fragments.
        """
        host = self.host
        if not host.ledger.room():
            self.outbox.count("queue_full_dropped")
            self.outbox.request(Cause.QUEUE_FULL, self)
            return None
        key = _ident(p)
        s = self._pvm.setdefault(key, _Set(since=now_ns))
        s.add(p)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = HeldQueue(host.ledger)
        waiting.push(rec, p, now_ns)
        frame = s.whole()
        if frame is None:
            if not self.when:
                host.timers.arm(self, now_ns + host.timeout_ns)
            return None
        del self._pvm[key], self._waiting[key]
        parts = tuple(r for r, _, _ in waiting.drain())
        self.outbox.count("datagrams_assembled")
        # TCP may have to leave in other segments than these: then as a GSO frame of their size.
        gso = max(536, max(map(len, s.pieces.values())) - 60) if p.proto == 6 else 0
        return Frame(frame, rec.ts_ns, gso_size=gso, sent=all(r.sent for r in parts), parts=parts)

    def svm(self, p: Packet, now_ns: int) -> Packet | None:
        """Add a fragment of the SVM; return the datagram if it is complete."""
        host = self.host
        key = _ident(p)
        s = self._svm.get(key)
        if s is None:
            if not host.ledger.admit_svm():
                self.outbox.count("svm_queue_full_dropped")
                self.outbox.request(Cause.QUEUE_FULL, self)
                return None
            s = self._svm[key] = _Set(since=now_ns)
        s.add(p)
        frame = s.whole()
        if frame is None:
            if not self.when:
                host.timers.arm(self, now_ns + host.timeout_ns)
            return None
        del self._svm[key]
        host.ledger.discharge_svm()
        return parse(frame)

    def commit(self, p: Packet, now_ns: int) -> None:
        """Note a fragment that left with a checkpoint: both guests may send the rest."""
        key = _ident(p)
        s = self._pvm.setdefault(key, _Set(since=now_ns))
        s.add(p)
        if s.whole() is not None or s.broken:
            del self._pvm[key]
        elif len(self._pvm) > MAX_COMMITTED:
            old = next((k for k, t in self._pvm.items() if k not in self._waiting), None)
            if old is not None:
                del self._pvm[old]

    # -- called by the engine

    def text(self) -> str:
        """Return the flow's name for operators."""
        return "fragments"

    def svm_deaf(self) -> bool:
        """Return False: fragments show nothing of that kind."""
        return False

    def head_ns(self) -> int:
        """Return 0: it is not known which of them counts."""
        return 0

    def service(self) -> tuple[str, int]:
        """Return the protocol and port 0: there is none."""
        return "fragment", 0

    @property
    def held(self) -> list[Held]:
        """Return the held frames, oldest first."""
        sets = (self._waiting[key] for key in self._pvm if key in self._waiting)
        return sorted((h for waiting in sets for h in waiting), key=lambda h: h[2])

    def unhold(self) -> list[Held]:
        """Remove and return the held frames. Fragments that have left stay known."""
        held = self.held
        for key in [k for k in self._pvm if k in self._waiting]:
            s = self._pvm.pop(key)
            kept = _Set(since=s.since)
            offsets = {self._offset(p) for _, p, _ in self._waiting.pop(key).drain()}
            kept.pieces = {o: b for o, b in s.pieces.items() if o not in offsets}
            if kept.pieces:
                if 0 in kept.pieces:
                    kept.first, kept.l3 = s.first, s.l3
                last = max(kept.pieces)
                if s.total == last + len(kept.pieces[last]):
                    kept.total = s.total
                self._pvm[key] = kept
        return held

    def defer(self) -> list[Held]:
        """Remove and return the held frames, as a checkpoint that will decide about them begins."""
        return self.unhold()

    @staticmethod
    def _offset(p: Packet) -> int:
        v4 = p.frame[p.l3] >> 4 == 4
        return (p.seq & 0x1FFF) * 8 if v4 else p.seq & 0xFFF8

    def new_epoch(self, epoch: int) -> None:
        """Begin an epoch: the SVM is a copy of a PVM that has sent what left."""
        self.epoch = epoch
        self.asked = False
        self.forget_svm()

    def forget_svm(self) -> None:
        """Forget the SVM's output."""
        self.host.ledger.discharge_svm(len(self._svm))
        self._svm.clear()

    def begin(self) -> None:
        """Expect the rest of partly sent datagrams from the SVM.

        Called once the checkpoint's frames have left.
        """
        for key, s in self._pvm.items():
            copy = _Set(dict(s.pieces), s.total, s.first, s.l3, s.broken, s.since)
            self._svm[key] = copy
            self.host.ledger.charge_svm()

    def expire(self, now_ns: int) -> int:
        """Request a checkpoint if a datagram has been incomplete for too long.

        Returns the next deadline, 0 for none.
        """
        t = self.host.timeout_ns
        for key in [k for k, s in self._svm.items() if s.since + t <= now_ns]:
            del self._svm[key]
            self.host.ledger.discharge_svm()
            self.outbox.count("svm_datagram_expired")
        left = [k for k, s in self._pvm.items() if k not in self._waiting and s.since + t <= now_ns]
        for key in left:
            del self._pvm[key]
        waits = self.held
        due = [s.since + t for s in self._svm.values()]
        if waits:
            due.append(waits[0][2] + t)
            if due[-1] <= now_ns:
                if not self.asked:
                    self.asked = True
                    rec = waits[0][0]
                    evidence = Evidence(pvm=rec.frame[14:78], pvm_frame=rec)
                    self.outbox.request(Cause.COMPARE_TIMEOUT, self, evidence)
                due[-1] = now_ns + t
        return min(due) if due else 0

    def quiet(self) -> bool:
        """Return whether nothing of either guest waits."""
        return not self._pvm and not self._svm

    def closed(self) -> bool:
        """Return True: it is not a connection."""
        return True
