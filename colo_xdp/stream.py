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
with `hist`. Held frames leave in the order they came, with the windows that window.py
allows. QEMU's net/colo-compare.c compares neither flags nor bytes below its position.
What the SVM says is taken in by twin.py.
"""

from __future__ import annotations

from ._seq import HALF, MASK, diff, later
from .comparer import BEFORE, CONTEXT
from .flow import describe_tcp, tcp_port
from .marked import Marked
from .marks import USUAL_HEADERS, is_signed, reserved, urgent_position
from .packet import ACK, CWR, ECE, FIN, RST, SYN, URG, Packet, tcp_options
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence, Record
from .segment import split
from .twin import FLAGS, MAX_RSTS, rst_id

#: how long a verified part of a frame that is smaller than a segment waits for the rest
PART_NS = 5_000_000


class Stream(Marked):
    """One connection, one direction: what the guest sends."""

    __slots__ = ()

    # -- the engine's side

    def text(self) -> str:
        """The flow's name for people."""
        return describe_tcp(self.key)

    def service(self) -> tuple[str, int]:
        """Protocol and the service's port."""
        return "tcp", tcp_port(self.key)

    def expire(self, now_ns: int) -> int:
        """Ask if the head or the SVM's surplus is too old; the next deadline, 0 for none."""
        self.release_part(now_ns, False)
        t = self.host.timeout_ns
        frames = self.held.frames
        head = frames[0][2] if frames else 0
        ahead = self.svm_since()
        if not head and not ahead:
            return 0
        due = min(x for x in (head, ahead) if x) + t
        if self.signed and head and not self.asked:
            due = min(due, self._signed_due(now_ns))
        if due > now_ns:
            return due
        if not self.asked:
            if head and (head <= ahead or not ahead):
                p = frames[0][1]
                cause = Cause.COMPARE_TIMEOUT
                if self.unverifiable:
                    cause = Cause.RETRANSMIT_UNVERIFIABLE
                elif p.flags & RST:
                    cause = Cause.RST_ONE_SIDED
                self.ask(cause, p)
            else:
                self.ask(Cause.SVM_AHEAD)
        return now_ns + t  # stay in the engine's list of flows that wait

    def ask(
        self, cause: Cause, p: Packet | None = None, at: int | None = None,
        svm: bytes = b"", svm_frame: bytes = b"",
    ) -> None:  # fmt: skip
        """Ask for a checkpoint, once per epoch. What is below `at` in `p` is verified."""
        if self.asked:
            return
        self.asked = True
        evidence = NO_EVIDENCE
        if not svm_frame and self.chunks:
            svm_frame = self.chunks[0][0]
        if p is not None:
            o = p.off + (0 if at is None else max(0, diff(at, p.seq)))
            before = p.frame[max(p.off, o - BEFORE) : o]
            rec = next((h[0] for h in self.held if h[1] is p), None)
            evidence = Evidence(
                ((p.seq if at is None else at) - self.origin) & MASK,
                len(before),
                p.frame[o - len(before) : min(o + CONTEXT, p.end)],
                before + svm,
                rec if rec is not None else Record(p.frame, 0),
                svm_frame,
            )
        elif svm or svm_frame:
            evidence = Evidence(svm=svm, svm_frame=svm_frame)
        self.outbox.request(cause, self, evidence)

    # -- the PVM's frames

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None:
        """A frame of the PVM in the current epoch: release it, hold it, or ask."""
        if p.off - p.l4 not in USUAL_HEADERS and is_signed(p):
            self._sign(p)
        held = self.held
        if not held.frames and not self.stuck and not self._dry(p) and self._ready(p):
            self._settle(p)
            self._emit(rec, p)
            return
        host = self.host
        if not held.offer(rec, p, now_ns):
            # like loss on the network: the guest sends it again
            self.outbox.count("queue_full_dropped")
            self.outbox.request(Cause.QUEUE_FULL, self)
            if not held.frames:
                self.head_ok = None
        elif not self.when:
            host.timers.arm(self, now_ns + host.timeout_ns)

    def _dry(self, p: Packet) -> bool:
        """Plain new bytes, and nothing of the SVM to compare them with. Only for speed."""
        return (
            not self.chunks and p.seq == self.ver and p.off != p.end and not p.flags & FLAGS
            and not self.srst and self.sfin is None and self.fin_done is None
        )  # fmt: skip

    def hold(self, rec: Record, p: Packet, now_ns: int) -> None:
        """Append to the frames that wait, whatever the limit."""
        self.held.push(rec, p, now_ns)
        if not self.when:
            self.host.timers.arm(self, now_ns + self.host.timeout_ns)

    def pump(self, now_ns: int) -> None:
        """Release from the head what has become releasable."""
        held = self.held
        frames = held.frames
        while frames and not self.stuck:
            rec, p, _ = frames[0]
            if self._dry(p):
                break
            if not self._ready(p):
                if not self._moot(p):
                    break
                held.pop()
                self.outbox.count("acks_moot")
                continue
            held.pop()
            self._settle(p)
            self._emit(rec, p)

    def _emit(self, rec: Record, p: Packet) -> None:
        """Release a frame, with no more window than the SVM honours.

        A signed one keeps its own. What the client sends beyond the SVM's window it sends again,
        since the PVM's ack of it waits for the SVM's: that costs time, and a wrong signature more.
        """
        if not self.signed:
            rec, cut = self.windows.limit(rec, p, self.spare_ids)
            if cut:
                self.outbox.count("window_shrunk")
        self.outbox.release(rec)

    def release_part(self, now_ns: int, whole_segments: bool) -> bool:
        """Let the verified part of a head that waits for its rest leave as a frame of its own.

        The SVM may be waiting for the very acks that this part will bring (see segment.py).
        Returns whether some verified part is still held.
        """
        v, frames = self.head_ok, self.held.frames
        if not frames or self.stuck or v is None:
            return False
        rec, p, _ = frames[0]
        n = ready = (v - p.seq) & MASK
        # The urgent pointer counts from the frame's own sequence number (RFC 9293 3.8.5).
        if p.flags & (SYN | RST | URG) or not 0 < n < p.end - p.off or not self._acked(p):
            return False
        if self.signed:
            return True  # expire() looks at it
        if self.surg and not self._ready_urgent(p):
            return False
        if self.ace is None:
            self.ace = True if reserved(p) & 1 else None
            if self.ace is None and p.flags & CWR:
                return False  # of the first part only, or of each?
        if whole_segments:
            n -= n % (rec.gso_size or p.end - p.off)
            if not n:
                return True
        (first, p1), (rest, p2) = split(rec, p, n, self.spare_ids, self.ace)
        self.outbox.count("released_in_parts")
        self._settle(p1)
        self._emit(first, p1)
        self.held.replace_head(rest, p2)
        self.head_ok = v
        return n < ready

    def _ready(self, p: Packet) -> bool:
        flags = p.flags
        if flags & FLAGS:
            if flags & RST:
                return self._ready_rst(p)
            if flags & SYN:
                return self._ready_syn(p)
            if not self._ready_fin(p):
                return self._reset_by_svm(p)
        elif p.off != p.end and not self._verified(p):
            return self._reset_by_svm(p)
        if (flags & URG or self.surg) and not self._ready_urgent(p):
            return False
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
            self.ask(Cause.RST_ONE_SIDED, p)
        return False

    def _moot(self, p: Packet) -> bool:
        """A bare ACK that a reset SVM will never send, with the PVM's own reset behind it.

        To the client it is an ACK that the network lost, right before the RST.
        """
        if p.off != p.end or p.flags & FLAGS or not self.srst or len(self.held) < 2:
            return False
        return any(q.flags & RST for _, q, _ in self.held)

    def _verified(self, p: Packet) -> bool:
        """I1 for the payload of the head; moves what agrees from `chunks` to `hist`."""
        s = p.seq
        e = (s + p.end - p.off) & MASK
        v = self.head_ok
        if v is None:
            v = s
            if v == self.ver and self.chunks and self.sfin is None and self._whole(p, e):
                return True
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
                    svm = cframe[coff + i : min(coff + i + CONTEXT, cend)]
                    return self._differ(Cause.PAYLOAD_DIFFERS, p, (v + i) & MASK, svm, cframe)
                hist.add(mine)
                v = ver = self.ver = (ver + n) & MASK
                if coff + n == cend:
                    chunks.popleft()
                    self.host.ledger.discharge_svm()
                else:
                    chunks[0] = (cframe, coff + n, cend, at)
            elif d < 0:
                # a retransmission: only what was proven once may leave again
                o = p.off + ((v - s) & MASK)
                n = min(-d, p.end - o)
                proven = hist.back(-d, n) if hist.size + d >= 0 else self._sent_again(v, n)
                if not proven:
                    self.unverifiable = True
                    break
                n = len(proven)
                if frame[o : o + n] != proven:
                    i = next(i for i in range(n) if frame[o + i] != proven[i])
                    svm = proven[i : i + CONTEXT]
                    return self._differ(Cause.PAYLOAD_DIFFERS, p, (v + i) & MASK, svm)
                v = (v + n) & MASK
            else:
                # The PVM left a hole (we dropped a frame): take over the SVM's bytes, which
                # the PVM's retransmission will be compared with.
                if self.send is None or diff(self.send, v) <= 0:
                    break
                self._take(v)
                ver = v
        self.head_ok = v
        if hist.size > hist.charged:
            self.host.histories.charge(hist)
        if v != e and v != s:
            self.outbox.part_verified(self)
        return v == e

    def _sent_again(self, seq: int, most: int) -> bytes:
        """What the SVM has lately sent from `seq` on, though it had before.

        It gets the same acks, so it often sends the same again as the PVM.
        """
        for first, frame, off, end in reversed(self.again):
            d = (seq - first) & MASK
            if d < end - off:
                return frame[off + d : min(end, off + d + most)]
        return b""

    def _whole(self, p: Packet, e: int) -> bool:
        """The plain case, for speed: the SVM's next segment has the same boundaries and bytes."""
        frame, off, end, _ = self.chunks[0]
        theirs = frame[off:end]
        if (
            len(theirs) != p.end - p.off
            or not p.frame.startswith(theirs, p.off)
            or self.fin_done is not None
        ):
            return False
        self.chunks.popleft()
        self.host.ledger.discharge_svm()
        self.ver = self.head_ok = e
        hist = self.hist
        hist.add(theirs)
        if hist.size > hist.charged:
            self.host.histories.charge(hist)
        return True

    def _begin_at(self, seq: int) -> None:
        """The stream is known from here on (no SYN was seen)."""
        self.ver = self.send = self.origin = seq
        self.drain()

    def _take(self, upto: int) -> None:
        """Move the SVM's bytes below `upto` to the history, not compared."""
        assert self.ver is not None
        need = diff(upto, self.ver)
        while need > 0 and self.chunks:
            frame, off, end, at = self.chunks.popleft()
            n = min(need, end - off)
            self.hist.add(frame[off : off + n])
            need -= n
            if off + n < end:
                self.chunks.appendleft((frame, off + n, end, at))
            else:
                self.host.ledger.discharge_svm()
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
        # Which bytes a RST carries (RFC 9293 3.10.7 allows text) is not part of the stream. Its ack
        # is of no use to who gets it but where it answers a SYN (3.10.7.3): else the number alone
        # is looked at, which depends on how far each guest was. So one RST is as good as another.
        if p.off != p.end:
            return False
        ident = rst_id(p)
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
        # RFC 3168 6.1.1, RFC 9768 3.1: ECN is negotiated in the SYNs' flags.
        other = (twin.flags ^ p.flags) & (ECE | CWR | URG) or reserved(twin) != reserved(p)
        if p.flags & URG and urgent_position(p) - p.seq != urgent_position(twin) - twin.seq:
            other = True
        if other or tcp_options(p).negotiated() != tcp_options(twin).negotiated():
            svm = twin.frame[twin.l4 + 12 : twin.off][:CONTEXT]
            return self._differ(Cause.SYN_OPTIONS_DIFFER, p, svm=svm, svm_frame=twin.frame)
        mine, theirs = p.frame[p.off : p.end], twin.frame[twin.off : twin.end]
        if mine != theirs:  # TCP fast open
            n = min(len(mine), len(theirs))
            i = next((i for i in range(n) if mine[i] != theirs[i]), n)
            svm = theirs[i : i + CONTEXT]
            return self._differ(Cause.PAYLOAD_DIFFERS, p, (p.seq + i) & MASK, svm, twin.frame)
        return True

    def _settle(self, p: Packet) -> None:
        """The head is released: what it said is committed."""
        self.head_ok = None
        flags = p.flags
        e = (p.seq + p.end - p.off) & MASK
        if flags & FLAGS:
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
        if flags & URG or self.surg:
            self._settle_urgent(p, e)
        if flags & ACK:
            a = self.committed_ack
            if a is None or 0 < (p.ack - a) & MASK < HALF:
                self.committed_ack = p.ack

    def _settle_fin(self, f: int) -> None:
        if self.fin_done is None:
            self.fin_done = f
            if self.ver == f:
                self.hist.add(b"\0")  # keeps the history's places; no payload may be there
                self.ver = self.send = (f + 1) & MASK
            self.base = (f + 1) & MASK
        if self.sfin == f:
            self.sfin = None

    def _settle_syn(self, p: Packet, e: int) -> None:
        if self.isn == p.seq:
            return
        keep = self.ssyn is not None and not self.ssyn.twin  # SVM state is of this incarnation
        if not keep:
            self.forget_svm()
        else:
            assert self.ssyn is not None
            self.ssyn.twin = True
        self.isn = p.seq
        self._begin_marks(p, self.ssyn.packet if self.ssyn is not None and keep else None)
        self.windows.open(p, self.ssyn.packet if self.ssyn is not None and keep else None)
        self.origin = (p.seq + 1) & MASK
        self.committed_ack = self.fin_done = None
        self.rst_done.clear()
        self.unverifiable = False
        self.hist.clear()
        self.hist.add(p.frame[p.off : p.end])
        self.base = self.ver = (e + 1) & MASK
        self.host.ledger.discharge_svm(len(self.chunks))
        self.chunks.clear()
        self.send = self.ver
        self.drain()

    def _settle_rst(self, p: Packet) -> None:
        ident = rst_id(p)
        if self.srst:
            twin = ident if ident in self.srst else self.srst[0]
            self.srst.remove(twin)
            self._rst_is_done(twin)
        self._rst_is_done(ident)
        if not self.held.frames:
            # the connection is over on both sides, whatever else the SVM had to say
            rest, syn = self.srst[:], self.ssyn
            self.forget_svm()
            self.srst = rest
            self.ssyn = syn if syn is not None and not syn.twin else None
            self.send = self.ver

    def _rst_is_done(self, ident: tuple[bool, int]) -> None:
        if len(self.rst_done) >= MAX_RSTS:
            self.rst_done.clear()
        self.rst_done.add(ident)

    def commit(self, p: Packet) -> None:
        """A frame that a complete checkpoint contains: released with no comparison."""
        flags = p.flags
        if flags & RST:
            self._rst_is_done(rst_id(p))
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
        if flags & URG and not flags & SYN:
            self._settle_urgent(p, e)
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
            self.hist.add(p.frame[p.end - new : p.end])
            self._forward(e)
            if self.hist.size > self.hist.charged:
                self.host.histories.charge(self.hist)
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
        kept = self.hist.size
        self._take(seq)
        self.hist.cut(self.hist.size - kept)
        if self.send is None or diff(seq, self.send) > 0:
            self.send = seq
        self.drain()
