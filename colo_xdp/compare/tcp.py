# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares one TCP connection's output of both guests, byte by byte.

Sequence numbers are the PVM's (the secondary host translates all but the SYN). Payload, acks and
flags follow the rules of docs/design/compare-rules.md:

    released_nxt        next byte of the PVM to be released
    verified            next byte to be verified, at or after released_nxt; the bytes before it,
                        as far as they are kept, are `history`: produced by the SVM or contained
                        in a checkpoint
    verified..svm_nxt   bytes that the SVM has produced and the PVM has not, in `chunks`
    out_of_order        what the SVM has produced after a gap (or before `verified` is known)

The first two are in `sent` (compare/released.py), the others in `theirs`
(compare/tcp_secondary.py). A verified byte moves from `chunks` to `history` at once, so no byte is
compared twice, however the two guests segment the stream. Retransmissions are compared with
`history`. Held frames leave in the order in which they came, with the windows that
compare/window.py allows. QEMU's net/colo-compare.c compares neither flags nor bytes below its
position.
"""

from __future__ import annotations

from typing import Self

from ..net.flow_key import FlowKey, describe_tcp, tcp_port
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import ACK, CWR, FIN, RST, SYN, URG, Packet
from ..net.segment import split
from ..net.seqnum import HALF, MASK, diff, later
from ..net.tcp_headers import FAR, SPARE, USUAL_HEADERS, ip_id, is_signed, reserved, urgent_position
from .causes import Cause
from .compared import ComparedFlow
from .evidence import of_segment
from .flow import CONTEXT, FlowContext
from .held_queue import Held
from .offload_port import OffloadCodec
from .policy import Verdict
from .released import UNPROVEN, ReleasedStream
from .tcp_headers import Marks, syns_differ
from .tcp_secondary import Push, SvmStream, rst_id
from .tcp_wait import FLAGS, due_ns, overdue, repeats
from .window import WindowGate

_STORED = Push.STORED
#: How long (ns) a verified part of a frame that is smaller than a segment waits for the rest.
PART_NS = 5_000_000


class TcpFlow(ComparedFlow):
    """One connection, in the direction in which the guest sends."""

    __slots__ = (
        "diverged",
        "head_ok",
        "marks",
        "sent",
        "spared",
        "theirs",
        "unverifiable",
        "windows",
    )

    def __init__(
        self,
        host: FlowContext,
        key: FlowKey,
        epoch: int,
        verdict: Verdict,
        direction: str,
        codec: OffloadCodec[Self],
    ) -> None:
        super().__init__(host, key, epoch, verdict, direction, codec)
        self.sent = ReleasedStream()
        self.theirs = SvmStream(host.ledger)
        self.windows = WindowGate()
        self.marks = Marks()
        self.spared = 0  # IP IDs handed out
        self.head_ok: int | None = None  # the head is verified up to here
        self.unverifiable = False
        self.diverged = False  # a difference is certain: nothing leaves before the checkpoint

    # -- called by the engine

    def text(self) -> str:
        """Return the flow's name for operators."""
        return describe_tcp(self.key)

    def service(self) -> tuple[str, int]:
        """Return the protocol and the service's port."""
        return "tcp", tcp_port(self.key)

    def closed(self) -> bool:
        """Return whether the guest has closed or reset it: what follows are stragglers."""
        return self.sent.over()

    def new_epoch(self, epoch: int) -> None:
        """Begin an epoch: forget the output of the previous epoch's SVM."""
        self.epoch = epoch
        self.marks.deaf = False  # a copy has the same numbers: nothing needs translation
        self.windows.new_epoch()
        self.asked = self.diverged = False
        self.unverifiable = False
        self.head_ok = None
        self.forget_svm()
        self.sent.roll_back()
        self.theirs.svm_nxt = self.sent.verified

    def reset(self, epoch: int) -> None:
        """Forget everything, as if the connection were new."""
        self.sent.forget()
        self.windows = WindowGate()
        super().reset(epoch)

    def removed(self) -> None:
        """Drop the flow's history when it leaves the tables."""
        self.host.histories.drop(self.sent.history)

    def unhold(self) -> list[Held]:
        """Remove and return the held frames."""
        self.head_ok = None
        return self.held.drain()

    def svm_since(self) -> int:
        """Return the arrival (ns) of the SVM's oldest unmatched output; 0 if none."""
        return self.theirs.since()

    def forget_svm(self) -> None:
        """Forget output of the SVM that has not been released."""
        self.theirs.forget()

    def spare_ids(self, p: Packet, n: int) -> int:
        """Return the first of `n` spare IP IDs (see SpareIds).

        They are half the ID space away: a guest that counts gets there last, and one that draws its
        IDs (RFC 7739) gets there no more often than anywhere.
        """
        first = ip_id(p) + FAR + self.spared
        self.spared = (self.spared + n) % SPARE
        return first & 0xFFFF

    def expire(self, now_ns: int) -> int:
        """Request a checkpoint if the head or the SVM's surplus is overdue.

        Returns the next deadline, 0 for none.
        """
        self.release_part(now_ns, False)
        return overdue(self, now_ns)

    def ask(
        self,
        cause: Cause,
        p: Packet | None = None,
        at: int | None = None,
        svm: bytes = b"",
        svm_frame: bytes = b"",
    ) -> None:
        """Request a checkpoint, once per epoch. What lies below `at` in `p` is verified."""
        if self.asked:
            return
        self.asked = True
        if not svm_frame and self.theirs.chunks:
            svm_frame = self.theirs.chunks[0][0]
        if p is None:
            evidence = Evidence(svm=svm, svm_frame=svm_frame) if svm or svm_frame else NO_EVIDENCE
        else:
            rec = next((h[0] for h in self.held if h[1] is p), None)
            evidence = of_segment(p, rec, self.sent.origin, at, svm, svm_frame)
        self.outbox.request(cause, self, evidence)

    def _differ(
        self,
        cause: Cause,
        p: Packet,
        at: int | None = None,
        svm: bytes = b"",
        svm_frame: bytes = b"",
    ) -> bool:
        self.diverged = True
        self.ask(cause, p, at, svm, svm_frame)
        return False

    # -- the PVM's frames

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Release or hold a frame of the PVM in the current epoch, or request a checkpoint."""
        if p.off - p.l4 not in USUAL_HEADERS and is_signed(p):
            self._sign(p)
        held = self.held
        if not held.frames and not self.diverged and not self._dry(p) and self._ready(p):
            self._settle(p)
            self._emit(rec, p)
            return
        host = self.host
        if not held.offer(rec, p, now_ns):
            # as a loss on the network: the guest retransmits
            self.outbox.count("queue_full_dropped")
            self.outbox.request(Cause.QUEUE_FULL, self)
            if not held.frames:
                self.head_ok = None
            return
        due = now_ns + host.patience.ns
        if p.flags & RST:
            due = min(due, due_ns(self, p, now_ns))
        if self.theirs.out_of_order and host.patience.adaptive:
            due = min(due, now_ns + host.patience.quiet_ns)
        if not self.when or due < self.when:  # wait_for(), without the call
            host.timers.arm(self, due)
        if p.flags & RST and self.theirs.svm_rsts:
            self.release_ready(now_ns, by_svm=False)
        if len(held.frames) > 1 and p.seq == held.frames[0][1].seq:
            host.patience.repeated()
            if repeats(self, p, now_ns):
                self.ask(Cause.REPEATED, held.frames[0][1])

    def svm_deaf(self) -> bool:
        return bool(self.held) and not self.acked(self.held[0][1])

    def svm_hole(self) -> int:
        """Return the arrival (ns) of the SVM's output beyond a hole that the head waits for."""
        theirs, frames = self.theirs, self.held.frames
        if not frames or not theirs.out_of_order or theirs.chunks or theirs.svm_nxt is None:
            return 0
        p = frames[0][1]
        needs = p.off != p.end and diff((p.seq + p.end - p.off) & MASK, theirs.svm_nxt) > 0
        return theirs.out_of_order[0][4] if needs else 0

    def _dry(self, p: Packet) -> bool:
        """Return whether `p` is plain new payload with nothing of the SVM to compare.

        For speed only.
        """
        theirs, sent = self.theirs, self.sent
        return (
            not theirs.chunks
            and p.seq == sent.verified
            and p.off != p.end
            and not p.flags & FLAGS
            and not theirs.svm_rsts
            and theirs.svm_fin is None
            and sent.fin_done is None
        )

    def hold(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Hold a frame regardless of the limit."""
        self.held.push(rec, p, now_ns)
        self.wait_for(self.host.patience.look_ns(due_ns(self, p, now_ns), now_ns))

    def release_ready(self, now_ns: int, *, by_svm: bool = True) -> None:
        """Release from the head whatever has become releasable.

        by_svm: by a frame of the SVM, so that what has waited has waited for that.
        """
        held, chunks = self.held, self.theirs.chunks
        frames = held.frames
        while frames and not self.diverged:
            rec, p, _ = frames[0]
            if not chunks and self._dry(p):
                break
            if not self._ready(p):
                if not self._superseded(p):
                    break
                held.pop()
                self.outbox.count("acks_superseded")
                continue
            held.pop()
            if by_svm and (p.off != p.end or p.flags & FLAGS):  # kernels delay their acks by 200 ms
                self.host.patience.answered(rec.ts_ns, self.asked)
            self._settle(p)
            self._emit(rec, p, by_svm)

    def _emit(self, rec: Frame, p: Packet, agreed: bool = True) -> None:
        """Release a frame, with no more window than the SVM honours.

        A signed frame keeps its window. What the client sends beyond the SVM's window it has to
        send again, since the PVM's ack of it waits for the SVM's. That costs time; a wrong
        signature would cost more.
        """
        if not self.marks.signed:
            rec, cut = self.windows.limit(rec, p, self.spare_ids)
            if cut:
                self.outbox.count("window_shrunk")
        self.outbox.release(rec, agreed)

    def release_part(self, now_ns: int, whole_segments: bool) -> bool:
        """Release the verified part of a head that waits for its rest, as a frame of its own.

        The SVM may be waiting for the very acks that this part will bring (see net/segment.py).
        Returns whether some verified part is still held.
        """
        v, frames = self.head_ok, self.held.frames
        if not frames or self.diverged or v is None:
            return False
        rec, p, _ = frames[0]
        n = ready = (v - p.seq) & MASK
        # The urgent pointer counts from the frame's own sequence number (RFC 9293 section 3.8.5).
        if p.flags & (SYN | RST | URG) or not 0 < n < p.end - p.off or not self.acked(p):
            return False
        if self.marks.signed:
            return True  # expire() handles it
        if self.theirs.svm_urgent and not self._ready_urgent(p):
            return False
        if self.marks.ace is None:
            self.marks.ace = True if reserved(p) & 1 else None
            if self.marks.ace is None and p.flags & CWR:
                return False  # unknown whether CWR belongs to the first part only, or to each
        if whole_segments:
            n -= n % (rec.gso_size or p.end - p.off)
            if not n:
                return True
        (first, p1), (rest, p2) = split(rec, p, n, self.spare_ids, self.marks.ace)
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
        if (flags & URG or self.theirs.svm_urgent) and not self._ready_urgent(p):
            return False
        return self.acked(p)

    def acked(self, p: Packet) -> bool:
        """Return whether the SVM, or a released frame, has acked as much."""
        if not p.flags & ACK:
            return True
        a = self.sent.committed_ack
        if a is not None and (a - p.ack) & MASK < HALF:
            return True
        a = self.theirs.svm_ack
        return a is not None and (a - p.ack) & MASK < HALF

    def _reset_by_svm(self, p: Packet) -> bool:
        # The head needs something that an SVM which has reset will never produce. (If only an ack
        # is missing, or it is a FIN, the PVM's own reset may be next: wait.)
        if self.theirs.svm_rsts and not self.diverged:
            if self.reset_ns(p):
                self.wait_for(due_ns(self, p, self.theirs.svm_rst_at))
            else:
                self.ask(Cause.RST_ONE_SIDED, p)
        return False

    def reset_ns(self, p: Packet) -> int:
        """Return when (ns) the SVM has reset the connection where `p` is the PVM's FIN; 0: not so.

        A guest that closes with unread data sends a RST in place of the FIN, and one that is sent
        data after it has closed sends a RST after the FIN (RFC 2525 section 2.17). Which of the two
        it is depends on when the client's last data came, and applications see no difference.
        """
        sent, theirs = self.sent, self.theirs
        if not p.flags & FIN or theirs.svm_rst_place is None or theirs.svm_nxt is None:
            return 0
        f = (p.seq + p.end - p.off) & MASK
        alike = f == theirs.svm_rst_place == sent.verified and not theirs.is_beyond(f)
        return theirs.svm_rst_at if alike else 0

    def _superseded(self, p: Packet) -> bool:
        """Return whether `p` is a bare ACK that will not be matched before the PVM's reset.

        The SVM has reset and will never send it, and the PVM's own reset is queued behind it.

        To the client it is an ACK that the network lost right before the RST.
        """
        if p.off != p.end or p.flags & FLAGS or not self.theirs.svm_rsts or len(self.held) < 2:
            return False
        return any(q.flags & RST for _, q, _ in self.held)

    def _verified(self, p: Packet) -> bool:
        """Verify the head's payload; move what agrees from `chunks` to `history`."""
        sent, theirs = self.sent, self.theirs
        s = p.seq
        e = (s + p.end - p.off) & MASK
        v = self.head_ok
        if v is None:
            v = s
            if (
                v == sent.verified
                and theirs.chunks
                and theirs.svm_fin is None
                and self._whole(p, e)
            ):
                return True
        elif v == e:
            return True
        if sent.verified is None:
            sent.begin_at(s, theirs)
        fin = sent.fin_done if theirs.svm_fin is None else theirs.svm_fin
        if fin is not None and diff(e, fin) > 0 and diff(fin, s) >= 0:
            return self._differ(Cause.FIN_DIFFERS, p, fin)
        v, wrong = sent.verify(p, v, theirs)
        if wrong is UNPROVEN:
            self.unverifiable = True
        elif wrong is not None:
            return self._differ(Cause.PAYLOAD_DIFFERS, p, v, wrong.svm, wrong.svm_frame)
        self.head_ok = v
        if sent.history.size > sent.history.charged:
            self.host.histories.charge(sent.history)
        if v != e and v != s:
            self.outbox.part_verified(self)
        return v == e

    def _whole(self, p: Packet, e: int) -> bool:
        """Verify the plain case fast: the SVM's next segment has the same boundaries and bytes.

        Deliberately duplicates what verify() does in that case, since nearly all payload passes
        here.
        """
        sent, theirs = self.sent, self.theirs
        frame, off, end, _ = theirs.chunks[0]
        payload = frame[off:end]
        if (
            len(payload) != p.end - p.off
            or not p.frame.startswith(payload, p.off)
            or sent.fin_done is not None
        ):
            return False
        theirs.drop_first()
        sent.verified = self.head_ok = e
        history = sent.history
        history.add(payload)
        if history.size > history.charged:
            self.host.histories.charge(history)
        return True

    def _ready_fin(self, p: Packet) -> bool:
        if p.off != p.end and not self._verified(p):
            return False
        sent, theirs = self.sent, self.theirs
        f = (p.seq + p.end - p.off) & MASK
        if sent.fin_done is not None:
            return f == sent.fin_done or self._differ(Cause.FIN_DIFFERS, p, f)
        if sent.verified is None:
            sent.begin_at(f, theirs)
        if theirs.svm_fin is not None:
            if theirs.svm_fin != f:
                return self._differ(Cause.FIN_DIFFERS, p, f)
            return sent.verified == f
        if theirs.svm_nxt is None:
            return False  # the SVM is one incarnation ahead
        if theirs.is_beyond(f):
            return self._differ(Cause.FIN_DIFFERS, p, f)
        return bool(self.reset_ns(p)) and self._resets_next()

    def _resets_next(self) -> bool:
        """Return whether the PVM's own reset is held behind the head: nothing but acks between."""
        for i, (_, q, _) in enumerate(self.held.frames):
            if i and (q.off != q.end or q.flags & (SYN | FIN | URG)):
                break
            if i and q.flags & RST:
                return True
        return False

    def _ready_rst(self, p: Packet) -> bool:
        # The bytes that a RST carries (RFC 9293 section 3.10.7 allows text) are not part of the
        # stream. Its ack is of no use to the receiver unless it answers a SYN (section 3.10.7.3).
        # Otherwise only the number is checked, which depends on how far each guest was. So one RST
        # is as good as another.
        if p.off != p.end:
            return False
        ident = rst_id(p)
        return ident in self.sent.rst_done or bool(self.theirs.svm_rsts)

    def _ready_syn(self, p: Packet) -> bool:
        if self.sent.isn == p.seq:
            return self.acked(p) and p.off == p.end  # a retransmission whose counterpart was seen
        syn = self.theirs.svm_syn
        if syn is None or syn.matched:
            return self._reset_by_svm(p)
        svm_syn = syn.packet
        if (svm_syn.flags ^ p.flags) & (SYN | ACK) or (p.flags & ACK and svm_syn.ack != p.ack):
            return False
        d = syns_differ(p, svm_syn)
        return d is None or self._differ(d.cause, p, d.at, d.svm, svm_syn.frame)

    def _settle(self, p: Packet) -> None:
        """Commit what the head carries, as it is released."""
        self.head_ok = None
        sent, flags = self.sent, p.flags
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
            base = sent.released_nxt
            if base is None or 0 < (e - base) & MASK < HALF:
                sent.released_nxt = e
        if flags & URG or self.theirs.svm_urgent:
            self._settle_urgent(p, e)
        if flags & ACK:
            a = sent.committed_ack
            if a is None or 0 < (p.ack - a) & MASK < HALF:
                sent.committed_ack = p.ack

    def _settle_fin(self, f: int) -> None:
        if self.sent.fin(f):
            self.theirs.svm_nxt = self.sent.verified
        if self.theirs.svm_fin == f:
            self.theirs.svm_fin = None

    def _settle_syn(self, p: Packet, e: int) -> None:
        sent, theirs = self.sent, self.theirs
        if sent.isn == p.seq:
            return
        svm_syn = None
        if theirs.svm_syn is not None and not theirs.svm_syn.matched:
            # the SVM's state belongs to this incarnation
            theirs.svm_syn.matched = True
            svm_syn = theirs.svm_syn.packet
        else:
            self.forget_svm()
        self.marks.begin(p, svm_syn)
        self.windows.open(p, svm_syn)
        self.unverifiable = False
        sent.syn(p.seq, e, p.frame[p.off : p.end])
        theirs.drop_chunks()
        theirs.begin_at((e + 1) & MASK)

    def _settle_rst(self, p: Packet) -> None:
        sent, theirs = self.sent, self.theirs
        self.windows.shrunk = None  # no room to announce any more
        ident = rst_id(p)
        if theirs.svm_rsts:
            sent.rst(theirs.take_rst(ident))
        sent.rst(ident)
        if not self.held.frames:
            # the connection has ended on both sides, whatever else the SVM had to send
            rest, syn = theirs.svm_rsts[:], theirs.svm_syn
            self.forget_svm()
            theirs.svm_rsts = rest
            theirs.svm_syn = syn if syn is not None and not syn.matched else None
            theirs.svm_nxt = sent.verified

    def commit(self, p: Packet) -> None:
        """Note a frame that a complete checkpoint contains; it leaves without comparison."""
        sent, theirs, flags = self.sent, self.theirs, p.flags
        if flags & RST:
            self.windows.shrunk = None
            sent.rst(rst_id(p))
            return
        n = p.end - p.off
        e = (p.seq + n) & MASK
        self.windows.commit(p)
        if flags & SYN:
            if sent.isn != p.seq:
                if theirs.svm_syn is not None:
                    theirs.svm_syn.matched = False
                self._settle_syn(p, e)
        elif n:
            sent.commit_data(p, theirs)
            if sent.history.size > sent.history.charged:
                self.host.histories.charge(sent.history)
        if flags & URG and not flags & SYN:
            self._settle_urgent(p, e)
        if flags & FIN and (sent.released_nxt is None or diff(e, sent.released_nxt) >= 0):
            if sent.released_nxt != e or sent.verified != e:
                sent.jump(e, theirs)
            self._settle_fin(e)
        if flags & ACK:
            sent.committed_ack = later(sent.committed_ack, p.ack)

    # -- urgent data

    def _ready_urgent(self, p: Packet) -> bool:
        """Check that urgent data ends where the SVM's does.

        Applications depend on it (the out-of-band byte, SIOCATMARK), so it is output like payload.
        A guest that has more urgent data may signal only the later end (RFC 9293 section 3.8.5).
        """
        sent, theirs = self.sent, self.theirs
        if p.flags & URG:
            u = urgent_position(p)
            if u in theirs.svm_urgent or u in sent.urg_done:
                return True
            # The first segment with the last urgent byte signals it, or it never was urgent.
            passed = theirs.svm_nxt is not None and diff(theirs.svm_nxt, u) >= 0
            return self._differ(Cause.URGENT_DIFFERS, p) if passed else False
        size = p.end - p.off
        for u in theirs.svm_urgent:
            if 0 < (u - p.seq) & MASK <= size:
                return self._differ(Cause.URGENT_DIFFERS, p, (u - 1) & MASK)
        return True

    def _settle_urgent(self, p: Packet, e: int) -> None:
        sent, theirs = self.sent, self.theirs
        if p.flags & URG:
            sent.urgent(urgent_position(p))
        theirs.svm_urgent = tuple(
            u for u in theirs.svm_urgent if u not in sent.urg_done and diff(u, e) > 0
        )

    # -- signed segments

    def _sign(self, p: Packet) -> None:
        """Note a signed frame of the PVM.

        The client's signatures cover the PVM's numbers. An SVM with other numbers drops such
        segments once they are translated, and stops sending. Only a checkpoint helps, after which
        the numbers are equal.
        """
        if not self.marks.signed:
            self.marks.signed = self.marks.unfit = True
            self.outbox.count("signed_connections")
        if self.marks.deaf and not p.flags & SYN:
            self.ask(Cause.SIGNED_CONNECTION, p)

    # -- the SVM's frames

    def svm(self, p: Packet, now_ns: int) -> None:
        """Compare a frame of the SVM in the current epoch. It is never sent anywhere."""
        flags, theirs = p.flags, self.theirs
        if flags & (SYN | RST):
            self._svm_control(p, now_ns)
        elif p.seq != theirs.svm_nxt and theirs.is_foreign(
            p.seq, self.host.max_stream, self.sent.isn
        ):
            # A late frame of an earlier connection on these ports: its ack, window and FIN would be
            # misread in the numbers of this one.
            self.outbox.count("svm_out_of_window")
            return
        else:
            if flags & ACK:
                a = theirs.svm_ack
                if a is None or 0 < (p.ack - a) & MASK < HALF:
                    theirs.svm_ack = p.ack
                self.windows.svm(p)
            if flags & URG:
                theirs.urgent(urgent_position(p), self.sent.released_nxt, self.sent.urg_done)
            if p.off != p.end:
                place, sent = theirs.svm_nxt, self.sent
                what = theirs.push(p, now_ns, sent.verified, self.host.max_stream)
                if what is not _STORED or sent.fin_done is not None:
                    self._svm_pushed(what, p, place)
            if flags & FIN:
                self._svm_fin((p.seq + p.end - p.off) & MASK, now_ns)
        frames = self.held.frames
        if frames:
            self.release_ready(now_ns)
        windows = self.windows
        if windows.shrunk and not frames:
            update = windows.update(self.sent.released_nxt, self.spare_ids, self.marks.ace)
            if update is not None:
                self.outbox.count("window_updates")
                update.ts_ns = now_ns  # just made: it has not waited
                self.outbox.release(update)
        if not self.when and (theirs.chunks or theirs.out_of_order or flags & FLAGS):
            self.host.timers.arm(self, now_ns + self.host.timeout_ns)

    def _svm_pushed(self, what: Push, p: Packet, place: int | None) -> None:
        """Handle the result of storing payload of the SVM. place: end of what was known before."""
        sent, outbox = self.sent, self.outbox
        if what in (Push.STORED, Push.BEYOND):
            if sent.fin_done is not None and not self.diverged:
                self.diverged = True
                assert place is not None
                new = p.off + ((place - p.seq) & MASK)
                self.ask(Cause.FIN_DIFFERS, svm=p.frame[new : new + CONTEXT], svm_frame=p.frame)
            if what is Push.BEYOND:
                outbox.count("stream_full_dropped")
                self.ask(Cause.STREAM_FULL)
        elif what is Push.KNOWN:
            outbox.count("svm_retransmit")
            self.host.patience.repeated()
            if sent.verified is not None and diff(sent.verified, p.seq) > sent.history.size:
                self.theirs.keep_again(p)
        elif what is Push.FULL:
            self._svm_full()
        elif what is Push.EARLY:
            outbox.count("svm_out_of_order")
            if self.held.frames and self.host.patience.adaptive:
                self.wait_for(self.theirs.out_of_order[0][4] + self.host.patience.quiet_ns)
        else:
            outbox.count("svm_out_of_window")  # if it was needed, the PVM's frame will time out

    def _svm_full(self) -> None:
        self.outbox.count("svm_queue_full_dropped")
        self.outbox.request(Cause.QUEUE_FULL, self)

    def _svm_fin(self, f: int, now_ns: int) -> None:
        sent, theirs = self.sent, self.theirs
        ours = theirs.svm_nxt is not None  # otherwise the SVM is one incarnation ahead of the PVM
        if f == theirs.svm_fin or (ours and f == sent.fin_done):
            self.outbox.count("svm_retransmit")
            return
        early = sent.released_nxt is not None and diff(f, sent.released_nxt) < 0
        if ours and (early or sent.fin_done is not None):
            self.diverged = True
            self.ask(Cause.FIN_DIFFERS)
        theirs.finish(f, now_ns)

    def _svm_control(self, p: Packet, now_ns: int) -> None:
        sent = self.sent
        what = self.theirs.control(p, now_ns, sent.isn, sent.rst_done)
        if what is Push.KNOWN:
            self.outbox.count("svm_retransmit")
        elif what is Push.FULL:
            self._svm_full()
