# SPDX-License-Identifier: GPL-2.0-or-later
"""Python model of the rewriter in bpf/lib (conntrack.h, rewrite.h; headers.py has what it reads).

It is the readable form of the rules, and one side of the differential tests: for the same frames
both sides produce the same bytes, reasons and connection entries. The rules and their reasons are
at the head of bpf/lib/conntrack.h and in docs/design/conntrack.md. Nothing here is shared with the
kernel's code except the transition table, on purpose.

Numbers are translated by adding a difference modulo 2**32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

from ..abi import EPOCH_BASE, Mode, Reason
from .headers import (
    BadFrame,
    OptionOffsets,
    Segment,
    connection_key,
    csum_apply,
    move,
    parse,
    parse_options,
    parse_quote,
    timestamps,
    u16,
)
from .tcp_state import Event, TcpState, next_state

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
_M32 = 0xFFFFFFFF

LEARN_WINDOW = 65535

HAVE_ISN_P, HAVE_ISN_S, HAVE_TS_P, HAVE_TS_S = 1, 2, 4, 8
FIN_GUEST, FIN_CLIENT, HAVE_ISN_C, EARLY = 16, 32, 64, 128
PVM_SYN, PVM_ACK, PVM_TS = 1, 2, 4
VOID = 0x40000000  # EPOCH_VOID
HAVE_ANY = HAVE_ISN_P | HAVE_ISN_S | HAVE_TS_P | HAVE_TS_S | HAVE_ISN_C


@dataclass(slots=True)
class TrackedConnection:
    """The fields of struct colo_flow except the time, in order."""

    epoch: int = 0
    off: int = 0
    tsoff: int = 0
    isn_p: int = 0
    isn_s: int = 0
    ts_p: int = 0
    ts_s: int = 0
    fin_guest: int = 0
    fin_client: int = 0
    state: int = TcpState.CLOSED
    have: int = 0
    have_client: int = 0
    have_pvm: int = 0
    isn_c: int = 0
    pvm_isn: int = 0
    pvm_c: int = 0
    pvm_ts: int = 0

    def forget(self, epoch: int) -> None:
        """Reset the entry for another connection with this key."""
        self.epoch = epoch
        self.have = self.have_client = 0
        self.state = TcpState.CLOSED

    @property
    def isn_known(self) -> bool:
        """Return whether the PVM's SYN has shown the ISN of this entry's connection."""
        return bool(
            self.have_pvm & PVM_ACK and self.have_client & HAVE_ISN_C and self.answers(self.pvm_c)
        )

    def answers(self, acked: int) -> bool:
        """Return whether a SYN-ACK that acks `acked` + 1 answers the client's SYN.

        The SYN may have carried data.
        """
        early = self.have_client & EARLY and (acked - self.isn_c) & _M32 <= LEARN_WINDOW
        return acked == self.isn_c or bool(early)

    @property
    def known(self) -> bool:
        """Return whether ISN_P is known."""
        return bool(self.have_client & HAVE_ISN_P) or self.isn_known

    def note_pvm(self) -> None:
        """Take ISN_P from the PVM's SYN."""
        self.isn_p = self.pvm_isn
        self.have_client |= HAVE_ISN_P
        if self.have_pvm & PVM_TS:
            self.ts_p = self.pvm_ts
            self.have_client |= HAVE_TS_P

    def shift(self) -> tuple[int, int, int]:
        """Return (offset, timestamp offset, ISN_P) as far as they are known, else 0."""
        if not self.have & HAVE_ISN_S or not self.known:
            return 0, 0, 0
        if self.isn_known:
            isn_p, ts_p, ts_known = self.pvm_isn, self.pvm_ts, self.have_pvm & PVM_TS
        else:
            isn_p, ts_p, ts_known = self.isn_p, self.ts_p, self.have_client & HAVE_TS_P
        with_ts = self.have & HAVE_TS_S and ts_known
        return (self.isn_s - isn_p) & _M32, (self.ts_s - ts_p) & _M32 if with_ts else 0, isn_p


@dataclass(slots=True)
class Rewriter:
    """Tracks and translates; both tables are keyed by struct colo_flow_key as bytes."""

    epoch: int = 0
    mode: Mode = Mode.RUN
    limit: int = 65536
    flows: dict[bytes, TrackedConnection] = field(default_factory=dict)
    # least recently used first
    opening: dict[bytes, TrackedConnection] = field(default_factory=dict)

    def to_svm(self, frame: bytes, outer_tag: int | None = None) -> tuple[bytes, Reason]:
        """Return a client's frame as the SVM must see it."""
        return self._frame(frame, outer_tag, to_svm=True)

    def from_svm(self, frame: bytes, outer_tag: int | None = None) -> tuple[bytes, Reason]:
        """Return a frame of the SVM in the PVM's numbers."""
        return self._frame(frame, outer_tag, to_svm=False)

    def note_pvm_header(self, frame: bytes, outer_tag: int | None = None) -> Reason:
        """Note a copy of a SYN of the PVM, which reaches no guest."""
        if self.mode != Mode.RUN:
            return Reason.DROP_PVM_SYN_UNKNOWN
        try:
            p = parse(frame, outer_tag)
        except BadFrame:
            return Reason.NOTE_UNPARSED
        if not p.is_tcp or p.flags & (SYN | RST) != SYN:
            return Reason.NOTE_UNPARSED
        n, _ = self._lookup(connection_key(p, to_svm=False))
        acks = bool(p.flags & ACK)
        acked = (p.ack - 1) & _M32 if acks else 0
        if n is None:
            return Reason.DROP_PVM_SYN_UNKNOWN
        another = acks and n.have_client & HAVE_ISN_C and not n.answers(acked)
        if n.epoch == EPOCH_BASE and not another:
            return Reason.DROP_PVM_SYN_UNKNOWN
        ts = timestamps(frame, p)
        had_ts = n.have_pvm & PVM_SYN and n.pvm_isn == p.seq and n.have_pvm & PVM_TS
        if ts and not had_ts:  # a retransmission has a newer value, like the guest's own
            n.pvm_ts = ts[0]
        n.have_pvm = PVM_SYN | (PVM_ACK if acks else 0) | (PVM_TS if ts or had_ts else 0)
        n.pvm_isn, n.pvm_c = p.seq, acked
        return Reason.DROP_PVM_SYN

    def _frame(self, frame: bytes, outer_tag: int | None, *, to_svm: bool) -> tuple[bytes, Reason]:
        try:
            p = parse(frame, outer_tag)
        except BadFrame:
            return frame, Reason.NOTE_UNPARSED
        if not p.is_tcp:
            return self._quote(frame, p) if to_svm else (frame, Reason.PASS_REDIRECTED)
        key = connection_key(p, to_svm=to_svm)
        n, reason = self._find(key, p, to_svm=to_svm)
        if n is None:
            return frame, reason
        o = parse_options(frame[p.l4_off : p.l4_off + p.doff])
        ts = timestamps(frame, p)
        unknown = False
        if to_svm:
            unknown = self._learn_client(n, p, ts)
        else:
            self._learn_guest(n, p, ts)
        n.off, n.tsoff, isn_p = n.shift()
        off, tsoff = n.off, n.tsoff
        event = self._event(n, p, to_svm=to_svm)
        if event is not None:
            n.state = next_state(n.state, event)
        if (
            to_svm
            and self.opening.get(key) is n
            and self._heard(n, p, isn_p)
            and not self._promote(key, n)
        ):
            return frame, Reason.PASS_FLOW_TABLE_FULL
        if unknown:
            return frame, Reason.PASS_OFFSET_UNKNOWN
        # The primary recognises a retransmitted SYN by its number.
        if not to_svm and p.flags & SYN and self.mode != Mode.TAKEOVER and n.epoch != EPOCH_BASE:
            return frame, reason
        moves = self._moves(p, o, off, tsoff, to_svm=to_svm)
        if not moves:
            return frame, reason
        return self._apply(frame, p, moves), Reason.PASS_REWRITTEN

    def _lookup(self, key: bytes) -> tuple[TrackedConnection | None, TrackedConnection | None]:
        """Return (the valid entry, else one that may be reused)."""
        old = self.flows.get(key)
        if old is not None and old.epoch in (self.epoch, EPOCH_BASE):
            return old, None
        n = self.opening.get(key)
        if n is not None:
            self.opening[key] = self.opening.pop(key)
            if n.epoch == self.epoch:
                return n, None
        return None, old or n

    def _find(
        self, key: bytes, p: Segment, *, to_svm: bool
    ) -> tuple[TrackedConnection | None, Reason]:
        n, old = self._lookup(key)
        if n is not None:
            return n, Reason.PASS_REDIRECTED
        flags = p.flags & (SYN | RST | ACK)
        begins = flags == SYN or (not to_svm and flags == SYN | ACK)
        if self.mode == Mode.TAKEOVER or not begins:
            return None, Reason.PASS_REDIRECTED
        if old is None:
            if len(self.opening) >= self.limit:
                del self.opening[next(iter(self.opening))]
            n = self.opening[key] = TrackedConnection(epoch=self.epoch)
            return n, Reason.PASS_REDIRECTED
        old.forget(self.epoch)
        return old, Reason.PASS_REDIRECTED

    @staticmethod
    def _heard(n: TrackedConnection, p: Segment, isn_p: int) -> bool:
        """Return whether the client acks what it can know only from the guest."""
        return bool(
            n.state >= TcpState.ESTABLISHED
            and p.flags & (RST | ACK) == ACK
            and n.have & HAVE_ISN_S
            and n.known
            and (p.ack - isn_p - 1) & _M32 <= LEARN_WINDOW
        )

    def _promote(self, key: bytes, n: TrackedConnection) -> bool:
        """Move an entry from `opening` to `flows`.

        Returns False if there is no room; the connection is then given up.
        """
        room = key in self.flows or len(self.flows) < self.limit
        if room:
            self.flows[key] = replace(n)
        n.epoch = self.epoch ^ VOID
        return room

    def _learn_client(self, n: TrackedConnection, p: Segment, ts: tuple[int, int] | None) -> bool:
        """Learn from a client's segment.

        Returns True if the offset would have to come from its ack, which is not usable.
        """
        flags = p.flags & (SYN | RST | ACK)
        if flags == SYN:
            if n.have & HAVE_ISN_S and n.known:
                return False  # may be a stray duplicate: the guest's answer will show
            if n.have_client & HAVE_ISN_C and n.isn_c != p.seq:
                n.forget(self.epoch)
                if self.mode == Mode.TAKEOVER:
                    return False
            n.isn_c = p.seq
            n.have_client |= HAVE_ISN_C | (EARLY if p.payload_len else 0)
            return False
        if not flags & ACK or flags & RST:
            return False
        if n.isn_known:
            # Copied, since the next connection's SYN may be noted before this one has ended.
            if not n.have_client & HAVE_ISN_P or n.isn_p != n.pvm_isn:
                n.note_pvm()
            return False
        if n.have_client & HAVE_ISN_P:
            return False
        knows_c = bool(n.have_client & HAVE_ISN_C)
        if flags & SYN:
            learn = bool(n.have & HAVE_ISN_S) and (not knows_c or n.isn_c == p.seq)
        else:
            learn = knows_c and (p.seq - n.isn_c - 1) & _M32 <= LEARN_WINDOW
        if not learn:
            return False
        if flags & SYN:
            n.isn_c = p.seq
            n.have_client |= HAVE_ISN_C
        if (n.have | n.have_client) & EARLY:
            answers = n.have_pvm & PVM_SYN and (p.ack - n.pvm_isn - 1) & _M32 <= LEARN_WINDOW
            if not flags & SYN or not answers:
                return True
            n.note_pvm()
            return False
        n.isn_p = (p.ack - 1) & _M32
        n.have_client |= HAVE_ISN_P
        if ts:
            n.ts_p = ts[1]
            n.have_client |= HAVE_TS_P
        return False

    def _learn_guest(self, n: TrackedConnection, p: Segment, ts: tuple[int, int] | None) -> None:
        known = bool(n.have & HAVE_ISN_S)
        if p.flags & (SYN | RST) != SYN:
            if known and not p.flags & RST and (p.payload_len or p.flags & FIN) and not n.known:
                n.have |= EARLY
            return
        other = known and n.isn_s != p.seq
        acked = (p.ack - 1) & _M32
        if p.flags & ACK and n.have_client & HAVE_ISN_C:
            fresh = not n.answers(acked)
        else:
            fresh = other
        if n.epoch == EPOCH_BASE and (not known or other):
            fresh = True  # both guests share the ISN in it; another ISN is each guest's own
        if fresh:
            n.forget(self.epoch)
            known = False
            if self.mode == Mode.TAKEOVER:
                return
        if p.flags & ACK and not n.have_client & HAVE_ISN_C:
            n.isn_c = acked
            n.have_client |= HAVE_ISN_C
        ts_known = n.have_pvm & PVM_TS if n.isn_known else n.have_client & HAVE_TS_P
        if ts and (not known or other or not ts_known):
            n.ts_s = ts[0]
            n.have |= HAVE_TS_S
        n.isn_s = p.seq
        n.have |= HAVE_ISN_S | (EARLY if p.payload_len else 0)

    @staticmethod
    def _event(n: TrackedConnection, p: Segment, *, to_svm: bool) -> Event | None:
        end = (p.seq + p.payload_len + 1) & _M32
        if not to_svm:
            if p.flags & RST:
                return Event.GUEST_RST
            if p.flags & SYN:
                return Event.GUEST_SYNACK if p.flags & ACK else Event.GUEST_SYN
            if not p.flags & FIN:
                return Event.GUEST_DATA
            n.fin_guest = end
            n.have |= FIN_GUEST
            return Event.GUEST_FIN
        if p.flags & RST:
            return Event.CLIENT_RST
        if p.flags & SYN:
            return Event.CLIENT_SYNACK if p.flags & ACK else Event.CLIENT_SYN
        beyond = (p.ack + n.off - n.fin_guest) & _M32
        acks_fin = bool(n.have & FIN_GUEST and p.flags & ACK and beyond < 1 << 31)
        if p.flags & FIN:
            n.fin_client = end
            n.have_client |= FIN_CLIENT
            return Event.CLIENT_FIN_ACK if acks_fin else Event.CLIENT_FIN
        if not p.flags & ACK:
            return None
        return Event.CLIENT_ACK_FIN if acks_fin else Event.CLIENT_ACK

    @staticmethod
    def _moves(
        p: Segment, o: OptionOffsets, off: int, tsoff: int, *, to_svm: bool
    ) -> dict[int, int]:
        """Return {offset in the TCP header: what to add there}."""
        moves: dict[int, int] = {}
        if not to_svm:
            if p.flags & (RST | ACK) == RST | ACK and p.seq == 0:
                return moves  # RFC 9293 section 3.10.7.1: answers a segment without an ack
            if off:
                moves[4] = -off
            if o.ts and tsoff:
                moves[o.ts + 2] = -tsoff
            return moves
        if p.flags & ACK and off:
            moves[8] = off
        if p.flags & ACK and o.ts and tsoff:
            moves[o.ts + 6] = tsoff
        if o.sack and off:
            for i in range(2 * o.sack_blocks):
                moves[o.sack + 2 + 4 * i] = off
        return moves

    def _quote(self, frame: bytes, p: Segment) -> tuple[bytes, Reason]:
        """Translate an ICMP error about a segment of the guest to the guest's own numbers."""
        found = parse_quote(frame, p)
        if found is None:
            return frame, Reason.PASS_REDIRECTED
        q, stop = found
        n, _ = self._lookup(connection_key(q, to_svm=False))
        if n is None:
            return frame, Reason.PASS_REDIRECTED
        off, tsoff, _ = n.shift()
        lead = frame[q.l4_off + 20 : q.l4_off + 24]
        usual = q.doff == 32 and q.l4_off + 32 <= stop and lead == b"\x01\x01\x08\x0a"
        o = OptionOffsets(ts=22) if usual else OptionOffsets()
        moves = {at: -by for at, by in self._moves(q, o, off, tsoff, to_svm=False).items()}
        if not moves:
            return frame, Reason.PASS_REDIRECTED
        out = bytearray(frame)
        total = move(out, q.l4_off, moves)
        at = q.l4_off + 16
        if at + 2 <= stop:
            old = u16(out, at)
            struct.pack_into("!H", out, at, csum_apply(old, total))
            total += (~old & 0xFFFF) + u16(out, at)
        check = csum_apply(u16(frame, p.l4_off + 2), total)
        struct.pack_into("!H", out, p.l4_off + 2, check)
        return bytes(out), Reason.PASS_REWRITTEN

    @staticmethod
    def _apply(frame: bytes, p: Segment, moves: dict[int, int]) -> bytes:
        out = bytearray(frame)
        total = move(out, p.l4_off, moves)
        check = csum_apply(u16(frame, p.csum_at), total)
        struct.pack_into("!H", out, p.csum_at, check)
        return bytes(out)
