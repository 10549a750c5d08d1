# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares one TCP connection's output of both guests, byte by byte.

Numbers are the primary guest's (the secondary host translates, but for the SYN).
The rules are I1 (bytes), I2 (acks) and I3 (flags) of the design:

    base        next PVM byte to be released
    ver         next byte to be verified, base or later; the bytes below it, as far
                as they are kept, are `hist`: produced by the SVM or in a checkpoint
    ver..send   bytes the SVM produced and the PVM not yet, in `chunks`
    ooo         what the SVM produced beyond a hole (or before ver is known)

A verified byte moves from `chunks` to `hist` at once, so that no byte is compared
twice however the two guests cut their segments; retransmissions are then compared
with `hist`. Held frames leave in the order they came.
 Their windows
are what `window.py` says. QEMU's net/colo-compare.c
compares neither flags nor bytes below its position.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from ._seq import HALF, MASK, diff, later
from .flow import FlowKey, describe_tcp
from .packet import ACK, FIN, RST, SYN, URG, Packet, tcp_options
from .reasons import Cause
from .record import Record
from .segment import split
from .window import WindowGate

_FLAGS = FIN | SYN | RST
_CONTEXT = 32
_MAX_RSTS = 16
#: how long a verified part of a frame that is smaller than a segment waits for the rest
PART_NS = 5_000_000


#: a frame that waits: record, parsed, CLOCK_MONOTONIC ns from which its timeout runs
Held = tuple[Record, Packet, int]


class Host(Protocol):
    """What a comparer needs of the engine."""

    epoch: int
    timeout_ns: int
    grace_ns: int
    max_packets: int
    max_stream: int
    max_history: int
    pvm_packets: int
    pvm_bytes: int
    svm_packets: int

    def emit(self, rec: Record, now_ns: int) -> None: ...
    def ask(
        self, cause: Cause, flow: str, offset: int = 0, pvm: bytes = b"", svm: bytes = b""
    ) -> None: ...
    def count(self, name: str, n: int = 1) -> None: ...
    def arm(self, flow: Flow, when_ns: int) -> None: ...
    def charge_history(self, stream: Stream) -> None: ...
    def part_verified(self, stream: Stream) -> None: ...


class Flow(Protocol):
    """What the engine needs of a comparer."""

    key: FlowKey
    epoch: int
    last: int
    when: int
    held: deque[Held]

    def unhold(self) -> list[Held]: ...
    def new_epoch(self, epoch: int) -> None: ...
    def expire(self, now_ns: int) -> int: ...
    def quiet(self) -> bool: ...
    def closed(self) -> bool: ...
    def text(self) -> str: ...


@dataclass(slots=True)
class _Syn:
    """The SVM's SYN of its newest incarnation. `seq` is its own ISN, never compared."""

    packet: Packet
    at: int
    twin: bool = False  # the PVM's SYN has been released


def _rst_id(p: Packet) -> tuple[bool, int]:
    # A RST with ACK answers a segment without one and may have seq 0: its ack names it.
    return (True, p.ack) if p.flags & ACK else (False, p.seq)


class Stream:
    """One connection, one direction: what the guest sends."""

    __slots__ = (
        "_head_ok",
        "asked",
        "base",
        "chunks",
        "committed_ack",
        "epoch",
        "fin_done",
        "held",
        "hist",
        "hist_cap",
        "host",
        "isn",
        "key",
        "last",
        "ooo",
        "origin",
        "rst_done",
        "sack",
        "send",
        "sfin",
        "sfin_at",
        "srst",
        "srst_at",
        "ssyn",
        "stuck",
        "unverifiable",
        "ver",
        "when",
        "windows",
    )

    def __init__(self, host: Host, key: FlowKey, epoch: int) -> None:
        self.host, self.key, self.epoch = host, key, epoch
        self.last = self.when = 0
        # of the PVM, kept over checkpoints
        self.base: int | None = None
        self.isn: int | None = None  # of the SYN that was released
        self.origin = 0  # number of the stream's first byte, for reports
        self.committed_ack: int | None = None
        self.fin_done: int | None = None  # place of the FIN that was released
        self.rst_done: set[tuple[bool, int]] = set()
        self.windows = WindowGate()
        self.hist = bytearray()
        self.hist_cap = 0  # as far as the engine has accounted for it
        # of the PVM, not yet released
        self.held: deque[Held] = deque()
        self._head_ok: int | None = None  # the head is verified up to here
        self.unverifiable = False
        # of the SVM, forgotten at each checkpoint
        self.ver: int | None = None
        self.send: int | None = None
        self.chunks: deque[tuple[bytes, int, int, int]] = deque()  # frame, off, end, arrival
        self.ooo: list[tuple[int, bytes, int, int, int]] = []  # seq, then as above
        self.sack: int | None = None  # highest ack
        self.sfin: int | None = None
        self.sfin_at = self.srst_at = 0
        self.srst: list[tuple[bool, int]] = []  # resets with no twin yet
        self.ssyn: _Syn | None = None
        self.asked = False  # this flow has asked for a checkpoint in this epoch
        self.stuck = False  # a difference is proven: nothing leaves before the checkpoint

    # -- the engine's side

    def text(self) -> str:
        """The flow's name for people."""
        return describe_tcp(self.key)

    def quiet(self) -> bool:
        """Nothing of either side waits."""
        return not self.held and not self._svm_since()

    def closed(self) -> bool:
        """The guest has closed or reset it; what comes now are stragglers."""
        return self.fin_done is not None or bool(self.rst_done)

    def new_epoch(self, epoch: int) -> None:
        """Forget what the SVM of the old epoch said (I7). The engine resets its own counts."""
        self.epoch = epoch
        self.windows.new_epoch()
        self.asked = self.stuck = False
        self.unverifiable = False
        self._head_ok = None
        self._forget_svm()
        if self.base is None:
            self.ver = self.send = None
            self.hist.clear()
        elif self.ver is not None:
            # verified, but not released: the new SVM will produce it again
            ahead = diff(self.ver, self.base)
            if ahead > 0:
                del self.hist[-ahead:]
            self.ver = self.send = self.base

    def _forget_svm(self) -> None:
        self.chunks.clear()
        self.ooo.clear()
        self.sack = self.sfin = self.ssyn = None
        self.srst.clear()

    def _drop_svm(self) -> None:
        # as above in the middle of an epoch, where the engine counts what is stashed
        self.host.svm_packets -= len(self.chunks) + len(self.ooo)
        self._forget_svm()

    def expire(self, now_ns: int) -> int:
        """Ask if the head or the SVM's surplus is too old; the next deadline, 0 for none."""
        self.release_part(now_ns, False)
        t = self.host.timeout_ns
        head = self.held[0][2] if self.held else 0
        ahead = self._svm_since()
        if not head and not ahead:
            return 0
        due = min(x for x in (head, ahead) if x) + t
        if due > now_ns:
            return due
        if not self.asked:
            if head and (head <= ahead or not ahead):
                p = self.held[0][1]
                cause = Cause.COMPARE_TIMEOUT
                if self.unverifiable:
                    cause = Cause.RETRANSMIT_UNVERIFIABLE
                elif p.flags & RST:
                    cause = Cause.RST_ONE_SIDED
                self._ask(cause, p)
            else:
                self._ask(Cause.SVM_AHEAD)
        return now_ns + t  # stay in the engine's list of flows that wait

    def _svm_since(self) -> int:
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

    def unhold(self) -> list[Held]:
        """Give up the frames that wait; the caller counts them."""
        held = list(self.held)
        self.held.clear()
        self._head_ok = None
        return held

    def _ask(
        self, cause: Cause, p: Packet | None = None, at: int | None = None, svm: bytes = b""
    ) -> None:
        if self.asked:
            return
        self.asked = True
        offset, pvm = 0, b""
        if p is not None:
            at = p.seq if at is None else at
            o = p.off + diff(at, p.seq)
            pvm = p.frame[max(o, p.off) : min(o + _CONTEXT, p.end)]
            offset = (at - self.origin) & MASK
        self.host.ask(cause, self.text(), offset, pvm, svm)

    def _differ(self, cause: Cause, p: Packet, at: int | None = None, svm: bytes = b"") -> bool:
        self.stuck = True
        self._ask(cause, p, at, svm)
        return False

    # -- the PVM's frames

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None:
        """A frame of the PVM in the current epoch: release it, hold it, or ask."""
        if not self.held and not self.stuck and self._ready(p):
            self._settle(p)
            self._emit(rec, p, now_ns)
            return
        host = self.host
        if host.pvm_packets >= host.max_packets:
            # like loss on the network: the guest sends it again
            host.count("queue_full_dropped")
            host.ask(Cause.QUEUE_FULL, self.text())
            if not self.held:
                self._head_ok = None
            return
        self.hold(rec, p, now_ns)

    def hold(self, rec: Record, p: Packet, now_ns: int) -> None:
        """Append to the frames that wait, whatever the limit."""
        host = self.host
        host.pvm_packets += 1
        host.pvm_bytes += len(rec.frame)
        self.held.append((rec, p, now_ns))
        if not self.when:
            host.arm(self, now_ns + host.timeout_ns)

    def pump(self, now_ns: int) -> None:
        """Release from the head what has become releasable."""
        held, host = self.held, self.host
        while held and not self.stuck:
            rec, p, _ = held[0]
            if not self._ready(p):
                break
            held.popleft()
            host.pvm_packets -= 1
            host.pvm_bytes -= len(rec.frame)
            self._settle(p)
            self._emit(rec, p, now_ns)

    def _emit(self, rec: Record, p: Packet, now_ns: int) -> None:
        """Release a frame, with no more window than the SVM honours."""
        rec, cut = self.windows.limit(rec, p)
        if cut:
            self.host.count("window_shrunk")
        self.host.emit(rec, now_ns)

    def release_part(self, now_ns: int, whole_segments: bool) -> bool:
        """Let the verified part of a head that waits for its rest leave as a frame of its own.

        The SVM may be waiting for the very acks that this part will bring (see segment.py).
        Returns whether some verified part is still held.
        """
        v = self._head_ok
        if not self.held or self.stuck or v is None:
            return False
        rec, p, at = self.held[0]
        n = ready = (v - p.seq) & MASK
        # The urgent pointer counts from the frame's own sequence number (RFC 9293 3.8.5).
        if p.flags & (SYN | RST | URG) or not 0 < n < p.end - p.off or not self._acked(p):
            return False
        if whole_segments:
            n -= n % (rec.gso_size or p.end - p.off)
            if not n:
                return True
        (first, p1), (rest, p2) = split(rec, p, n)
        self.host.pvm_bytes -= len(rec.frame) - len(rest.frame)
        self.host.count("released_in_parts")
        self._settle(p1)
        self._emit(first, p1, now_ns)
        self.held[0] = (rest, p2, at)
        self._head_ok = v
        return n < ready

    def _ready(self, p: Packet) -> bool:
        flags = p.flags
        if flags & _FLAGS:
            if flags & RST:
                return self._ready_rst(p)
            if flags & SYN:
                return self._ready_syn(p)
            if not self._ready_fin(p):
                return self._reset_by_svm(p)
        elif p.off != p.end and not self._verified(p):
            return self._reset_by_svm(p)
        return self._acked(p)

    def _acked(self, p: Packet) -> bool:
        """I2: the SVM has acked as much, or a released frame did."""
        if not p.flags & ACK:
            return True
        a = self.committed_ack
        if a is not None and (a - p.ack) & MASK < HALF:
            return True
        a = self.sack
        return a is not None and (a - p.ack) & MASK < HALF

    def _reset_by_svm(self, p: Packet) -> bool:
        # The head needs what a reset SVM will never produce. (If only an ack is missing,
        # the PVM's reset may be next: wait.)
        if self.srst and not self.stuck:
            self._ask(Cause.RST_ONE_SIDED, p)
        return False

    def _verified(self, p: Packet) -> bool:
        """I1 for the payload of the head; moves what agrees from `chunks` to `hist`."""
        s = p.seq
        e = (s + p.end - p.off) & MASK
        v = self._head_ok
        if v is None:
            v = s
        elif v == e:
            return True
        if self.ver is None:
            self._begin_at(s)
        fin = self.fin_done if self.sfin is None else self.sfin
        if fin is not None and diff(e, fin) > 0 and diff(fin, s) >= 0:
            return self._differ(Cause.FIN_DIFFERS, p, fin)
        frame, hist, chunks = p.frame, self.hist, self.chunks
        ver = self.ver
        assert ver is not None
        while v != e:
            d = diff(v, ver)
            if d == 0:
                if not chunks:
                    break
                cframe, coff, cend, at = chunks[0]
                o = p.off + ((v - s) & MASK)
                n = min(cend - coff, p.end - o)
                mine = frame[o : o + n]
                if mine != cframe[coff : coff + n]:
                    i = next(i for i in range(n) if mine[i] != cframe[coff + i])
                    svm = cframe[coff + i : min(coff + i + _CONTEXT, cend)]
                    return self._differ(Cause.PAYLOAD_DIFFERS, p, (v + i) & MASK, svm)
                hist += mine
                v = ver = self.ver = (ver + n) & MASK
                if coff + n == cend:
                    chunks.popleft()
                    self.host.svm_packets -= 1
                else:
                    chunks[0] = (cframe, coff + n, cend, at)
            elif d < 0:
                # a retransmission: only what was proven once may leave again
                o = p.off + ((v - s) & MASK)
                n = min(-d, p.end - o)
                h = len(hist) + d
                if h < 0:
                    self.unverifiable = True
                    break
                if frame[o : o + n] != hist[h : h + n]:
                    i = next(i for i in range(n) if frame[o + i] != hist[h + i])
                    svm = bytes(hist[h + i : h + i + _CONTEXT])
                    return self._differ(Cause.PAYLOAD_DIFFERS, p, (v + i) & MASK, svm)
                v = (v + n) & MASK
            else:
                # The PVM left a hole (we dropped a frame): take over the SVM's bytes, which
                # the PVM's retransmission will be compared with.
                if self.send is None or diff(self.send, v) <= 0:
                    break
                self._take(v)
                ver = v
        self._head_ok = v
        if len(hist) > self.hist_cap:
            self.host.charge_history(self)
        if v != e and v != s:
            self.host.part_verified(self)
        return v == e

    def _begin_at(self, seq: int) -> None:
        """The stream is known from here on (no SYN was seen)."""
        self.ver = self.send = self.origin = seq
        self._drain()

    def _take(self, upto: int) -> None:
        """Move the SVM's bytes below `upto` to the history, not compared."""
        assert self.ver is not None
        need = diff(upto, self.ver)
        while need > 0 and self.chunks:
            frame, off, end, at = self.chunks.popleft()
            n = min(need, end - off)
            self.hist += frame[off : off + n]
            need -= n
            if off + n < end:
                self.chunks.appendleft((frame, off + n, end, at))
            else:
                self.host.svm_packets -= 1
        self.ver = upto

    def _ready_fin(self, p: Packet) -> bool:
        if p.off != p.end and not self._verified(p):
            return False
        f = (p.seq + p.end - p.off) & MASK
        if self.fin_done is not None:
            return f == self.fin_done or self._differ(Cause.FIN_DIFFERS, p, f)
        if self.ver is None:
            self._begin_at(f)
        if self.sfin is not None:
            if self.sfin != f:
                return self._differ(Cause.FIN_DIFFERS, p, f)
            return self.ver == f
        if self.send is None:
            return False  # the SVM is one incarnation ahead
        beyond = diff(self.send, f) > 0 or any(diff(g[0] + g[3] - g[2], f) > 0 for g in self.ooo)
        return self._differ(Cause.FIN_DIFFERS, p, f) if beyond else False

    def _ready_rst(self, p: Packet) -> bool:
        # Which bytes a RST carries (RFC 9293 3.10.7 allows text) is not part of the stream.
        if p.off != p.end:
            return False
        ident = _rst_id(p)
        return ident in self.rst_done or bool(self.srst)

    def _ready_syn(self, p: Packet) -> bool:
        if self.isn == p.seq:
            return self._acked(p) and p.off == p.end  # sent again, its twin was seen
        syn = self.ssyn
        if syn is None or syn.twin:
            return self._reset_by_svm(p)
        twin = syn.packet
        if (twin.flags ^ p.flags) & (SYN | ACK) or (p.flags & ACK and twin.ack != p.ack):
            return False
        if tcp_options(p).negotiated() != tcp_options(twin).negotiated():
            svm = twin.frame[twin.l4 + 20 : twin.off][:_CONTEXT]
            return self._differ(Cause.SYN_OPTIONS_DIFFER, p, svm=svm)
        if p.frame[p.off : p.end] != twin.frame[twin.off : twin.end]:
            return self._differ(Cause.PAYLOAD_DIFFERS, p, svm=twin.frame[twin.off : twin.end][:32])
        return True

    def _settle(self, p: Packet) -> None:
        """The head is released: what it said is committed."""
        self._head_ok = None
        flags = p.flags
        e = (p.seq + p.end - p.off) & MASK
        if flags & _FLAGS:
            if flags & RST:
                self._settle_rst(p)
                return
            if flags & SYN:
                self._settle_syn(p, e)
            else:
                self._settle_fin(e)
        elif p.off != p.end:
            self.unverifiable = False
            base = self.base
            if base is None or 0 < (e - base) & MASK < HALF:
                self.base = e
        if flags & ACK:
            a = self.committed_ack
            if a is None or 0 < (p.ack - a) & MASK < HALF:
                self.committed_ack = p.ack

    def _settle_fin(self, f: int) -> None:
        if self.fin_done is None:
            self.fin_done = f
            if self.ver == f:
                self.hist += b"\0"  # keeps the history's places; no payload may be there
                self.ver = self.send = (f + 1) & MASK
            self.base = (f + 1) & MASK
        if self.sfin == f:
            self.sfin = None

    def _settle_syn(self, p: Packet, e: int) -> None:
        if self.isn == p.seq:
            return
        keep = self.ssyn is not None and not self.ssyn.twin  # SVM state is of this incarnation
        if not keep:
            self._drop_svm()
        else:
            assert self.ssyn is not None
            self.ssyn.twin = True
        self.isn = p.seq
        self.windows.open(p)
        self.origin = (p.seq + 1) & MASK
        self.committed_ack = self.fin_done = None
        self.rst_done.clear()
        self.unverifiable = False
        self.hist.clear()
        self.hist += p.frame[p.off : p.end]
        self.base = self.ver = (e + 1) & MASK
        self.host.svm_packets -= len(self.chunks)
        self.chunks.clear()
        self.send = self.ver
        self._drain()

    def _settle_rst(self, p: Packet) -> None:
        ident = _rst_id(p)
        if self.srst:
            twin = ident if ident in self.srst else self.srst[0]
            self.srst.remove(twin)
            self._rst_is_done(twin)
        self._rst_is_done(ident)
        if not self.held:
            # the connection is over on both sides, whatever else the SVM had to say
            rest, syn = self.srst[:], self.ssyn
            self._drop_svm()
            self.srst = rest
            self.ssyn = syn if syn is not None and not syn.twin else None
            self.send = self.ver

    def _rst_is_done(self, ident: tuple[bool, int]) -> None:
        if len(self.rst_done) >= _MAX_RSTS:
            self.rst_done.clear()
        self.rst_done.add(ident)

    def commit(self, p: Packet) -> None:
        """A frame that a complete checkpoint contains: released with no comparison."""
        flags = p.flags
        if flags & RST:
            self._rst_is_done(_rst_id(p))
            return
        n = p.end - p.off
        e = (p.seq + n) & MASK
        self.windows.commit(p)
        if flags & SYN:
            if self.isn != p.seq:
                if self.ssyn is not None:
                    self.ssyn.twin = False
                self._settle_syn(p, e)
        elif n:
            self._commit_data(p, e, n)
        if flags & FIN and (self.base is None or diff(e, self.base) >= 0):
            if self.base != e or self.ver != e:
                self._jump(e)
            self._settle_fin(e)
        if flags & ACK:
            self.committed_ack = later(self.committed_ack, p.ack)

    def _commit_data(self, p: Packet, e: int, n: int) -> None:
        if self.ver is None:
            self._begin_at(p.seq)
        assert self.ver is not None
        new = diff(e, self.ver)
        if new > 0:
            if new > n:  # a frame in between was lost: nothing is known of its bytes
                self.hist.clear()
                new = n
            self.hist += p.frame[p.end - new : p.end]
            self._forward(e)
            if len(self.hist) > self.hist_cap:
                self.host.charge_history(self)
        if self.base is None or diff(e, self.base) > 0:
            self.base = e

    def _jump(self, seq: int) -> None:
        if self.ver is None:
            self._begin_at(seq)
        elif diff(seq, self.ver) > 0:
            self.hist.clear()
            self._forward(seq)
        self.base = seq

    def _forward(self, seq: int) -> None:
        """The SVM's bytes below seq are of no more use."""
        kept = len(self.hist)
        self._take(seq)
        del self.hist[kept:]
        if self.send is None or diff(seq, self.send) > 0:
            self.send = seq
        self._drain()

    # -- the SVM's frames

    def svm(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM of the current epoch: only compared, never sent anywhere."""
        flags = p.flags
        if flags & (SYN | RST):
            self._svm_control(p, now_ns)
        else:
            if flags & ACK:
                a = self.sack
                if a is None or 0 < (p.ack - a) & MASK < HALF:
                    self.sack = p.ack
                self.windows.svm(p)
            if p.off != p.end:
                self._svm_data(p, now_ns)
            if flags & FIN:
                self._svm_fin((p.seq + p.end - p.off) & MASK, now_ns)
        if self.held:
            self.pump(now_ns)
        if not self.held and (update := self.windows.update(self.base)) is not None:
            self.host.count("window_updates")
            update.ts_ns = now_ns  # made now: nothing has waited
            self.host.emit(update, now_ns)
        if not self.when and (self.chunks or self.ooo or flags & _FLAGS):
            self.host.arm(self, now_ns + self.host.timeout_ns)

    def _svm_data(self, p: Packet, now_ns: int) -> None:
        host = self.host
        send, off = self.send, p.off
        if p.seq != send:
            if send is not None:
                d = diff(p.seq, send)
                if d < 0:
                    if d + p.end - off <= 0:
                        host.count("svm_retransmit")
                        return
                    off -= d
            if send is None or d > 0:
                self._svm_early(p, now_ns)
                return
        if host.svm_packets >= host.max_packets:
            self._svm_full()
            return
        assert send is not None
        if self.fin_done is not None and not self.stuck:
            self.stuck = True
            self._ask(Cause.FIN_DIFFERS, svm=p.frame[off : off + _CONTEXT])
        self.chunks.append((p.frame, off, p.end, now_ns))
        host.svm_packets += 1
        self.send = (send + p.end - off) & MASK
        if self.ooo:
            self._drain()
        if diff(self.send, self.ver or 0) > host.max_stream:
            _, off, end, _ = self.chunks.pop()
            host.svm_packets -= 1
            self.send = (self.send - (end - off)) & MASK
            host.count("stream_full_dropped")
            self._ask(Cause.STREAM_FULL)

    def _svm_early(self, p: Packet, now_ns: int) -> None:
        host, ooo = self.host, self.ooo
        if host.svm_packets >= host.max_packets:
            self._svm_full()
            return
        ref = self.send if self.send is not None else ooo[0][0] if ooo else p.seq
        if abs(diff(p.seq, ref)) > host.max_stream:
            host.count("svm_out_of_window")  # if it was needed, the PVM's frame will time out
            return
        host.count("svm_out_of_order")
        host.svm_packets += 1
        insort(ooo, (p.seq, p.frame, p.off, p.end, now_ns), key=lambda g: diff(g[0], ref))

    def _svm_full(self) -> None:
        self.host.count("svm_queue_full_dropped")
        self.host.ask(Cause.QUEUE_FULL, self.text())

    def _drain(self) -> None:
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
                self.host.svm_packets -= 1
                continue
            self.chunks.append((frame, off - d, end, at))
            self.send = (self.send + end - off + d) & MASK

    def _svm_fin(self, f: int, now_ns: int) -> None:
        ours = self.send is not None  # else the SVM is one incarnation ahead of the PVM
        if f == self.sfin or (ours and f == self.fin_done):
            self.host.count("svm_retransmit")
            return
        early = self.base is not None and diff(f, self.base) < 0
        if ours and (early or self.fin_done is not None):
            self.stuck = True
            self._ask(Cause.FIN_DIFFERS)
        self.sfin, self.sfin_at = f, now_ns

    def _svm_control(self, p: Packet, now_ns: int) -> None:
        host = self.host
        if p.flags & RST:
            if p.flags & ACK:
                self.sack = later(self.sack, p.ack)
            ident = _rst_id(p)
            if ident in self.rst_done or ident in self.srst:
                host.count("svm_retransmit")
            elif len(self.srst) >= _MAX_RSTS:
                self._svm_full()
            else:
                if not self.srst:
                    self.srst_at = now_ns
                self.srst.append(ident)
            return
        if (self.ssyn is not None and self.ssyn.packet.seq == p.seq) or (
            # sent again by an SVM that a checkpoint made a clone in the handshake
            self.ssyn is None and self.isn == p.seq
        ):
            host.count("svm_retransmit")
            if p.flags & ACK:
                self.sack = later(self.sack, p.ack)
            return
        # a new incarnation on the SVM; what it said of the old one has no use any more
        self._drop_svm()
        self.send = None
        self.ssyn = _Syn(p, now_ns)
        if p.flags & ACK:
            self.sack = p.ack
