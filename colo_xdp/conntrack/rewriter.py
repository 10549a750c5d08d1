# SPDX-License-Identifier: GPL-2.0-or-later
"""Python model of the rewriter in bpf/lib (parsing.h, csum.h, conntrack.h, rewrite.h, icmp.h).

It is the readable form of the rules, and one side of the differential tests: for the same frames
both sides produce the same bytes, reasons and connection entries. The rules and their reasons are
at the head of bpf/lib/conntrack.h and in docs/design/conntrack.md. Nothing here is shared with the
kernel's code except the transition table, on purpose.

Numbers are translated by adding a difference modulo 2**32. Checksums follow RFC 1624, equation 3
(HC' = ~(~HC + ~m + m')), all changes of a segment in one step.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

from ..abi import EPOCH_BASE, FLOW_KEY, Mode, Reason
from .tcp_state import Event, State, next_state

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
_M32 = 0xFFFFFFFF

VLAN_DEPTH = 2  # COLO_VLAN_DEPTH
IP6_EXT_DEPTH = 4  # COLO_IP6_EXT_DEPTH
TCP_OPTIONS = 12  # COLO_TCP_OPTIONS
TAGS = frozenset((0x8100, 0x88A8, 0x9100))
LEARN_WINDOW = 65535

HAVE_ISN_P, HAVE_ISN_S, HAVE_TS_P, HAVE_TS_S = 1, 2, 4, 8
FIN_GUEST, FIN_CLIENT, HAVE_ISN_C, EARLY = 16, 32, 64, 128
PVM_SYN, PVM_ACK, PVM_TS = 1, 2, 4
VOID = 0x40000000  # EPOCH_VOID
HAVE_ANY = HAVE_ISN_P | HAVE_ISN_S | HAVE_TS_P | HAVE_TS_S | HAVE_ISN_C


class BadFrame(ValueError):
    """A frame that contradicts itself; the text states where."""


@dataclass(slots=True)
class Segment:
    """The fields of the kernel's `struct pkt`; see bpf/lib/parsing.h."""

    vlan: int = 0
    l3_off: int = 0
    is_v6: bool = False
    src: bytes = b""
    dst: bytes = b""
    l4_off: int = 0
    l4_proto: int = 0
    frag: bool = False
    is_tcp: bool = False
    is_udp: bool = False
    csum_at: int = 0
    sport: bytes = b""
    dport: bytes = b""
    seq: int = 0
    ack: int = 0
    flags: int = 0
    doff: int = 0
    payload_len: int = 0


def _u16(b: bytes | bytearray, at: int) -> int:
    return int.from_bytes(b[at : at + 2], "big")


def _u32(b: bytes | bytearray, at: int) -> int:
    return int.from_bytes(b[at : at + 4], "big")


def _need(length: int, end: int, what: str) -> None:
    if end > length:
        raise BadFrame(f"{what} ends at {end}, behind {length}")


def vlan_within(vlan: int, tci: int) -> int:
    """Return FLOW_KEY's vlan after one more tag; VID 0 names no VLAN.

    IEEE 802.1Q section 9.6: a priority tag.
    """
    vid = tci & 0xFFF
    return (vlan << 16 | vid) & _M32 if vid else vlan


def parse(frame: bytes, outer_tag: int | None = None) -> Segment:
    """Parse a frame's headers. `outer_tag`: VID of a tag that the kernel has removed.

    Raises BadFrame.
    """
    n = len(frame)
    p = Segment()
    _need(n, 14, "Ethernet header")
    tags = 0
    if outer_tag is not None:
        tags, p.vlan = 1, vlan_within(0, outer_tag)
    proto, off = _u16(frame, 12), 14
    for _ in range(VLAN_DEPTH):
        if proto not in TAGS:
            break
        tags += 1
        if tags > 2:
            raise BadFrame("more than two VLAN tags")
        _need(n, off + 4, "VLAN tag")
        p.vlan = vlan_within(p.vlan, _u16(frame, off))
        proto, off = _u16(frame, off + 2), off + 4
    if proto in TAGS:
        raise BadFrame("more than two VLAN tags")
    p.l3_off = off
    if proto == 0x0800:
        off, stop = _ipv4(frame, off, p)
    elif proto == 0x86DD:
        off, stop = _ipv6(frame, off, p)
    else:
        return p
    if stop > n or off > stop:
        raise BadFrame(f"IP length: {off} to {stop} of {n}")
    p.l4_off = off
    if p.frag:
        return p
    if p.l4_proto == 17:
        _need(stop, off + 8, "UDP header")
        p.sport, p.dport = frame[off : off + 2], frame[off + 2 : off + 4]
        p.payload_len = stop - off - 8
        p.csum_at = off + 6
        p.is_udp = True
    elif p.l4_proto == 6:
        _need(stop, off + 20, "TCP header")
        p.doff = (frame[off + 12] >> 4) * 4
        if p.doff < 20:
            raise BadFrame("TCP data offset below 5")
        _need(stop, off + p.doff, "TCP options")
        p.sport, p.dport = frame[off : off + 2], frame[off + 2 : off + 4]
        p.seq, p.ack, p.flags = _u32(frame, off + 4), _u32(frame, off + 8), frame[off + 13]
        p.payload_len = stop - off - p.doff
        p.csum_at = off + 16
        p.is_tcp = True
    return p


def _ipv4(frame: bytes, off: int, p: Segment) -> tuple[int, int]:
    _need(len(frame), off + 20, "IPv4 header")
    ihl, total = (frame[off] & 15) * 4, _u16(frame, off + 2)
    if frame[off] >> 4 != 4 or ihl < 20 or total < ihl:
        raise BadFrame("IPv4 version or lengths")
    mapped = bytes(10) + b"\xff\xff"
    p.src, p.dst = mapped + frame[off + 12 : off + 16], mapped + frame[off + 16 : off + 20]
    p.l4_proto = frame[off + 9]
    p.frag = bool(_u16(frame, off + 6) & 0x3FFF)
    return off + ihl, off + total


def _ipv6(frame: bytes, off: int, p: Segment) -> tuple[int, int]:
    n = len(frame)
    _need(n, off + 40, "IPv6 header")
    if frame[off] >> 4 != 6:
        raise BadFrame("IPv6 version")
    p.is_v6 = True
    p.src, p.dst = frame[off + 8 : off + 24], frame[off + 24 : off + 40]
    proto, stop = frame[off + 6], off + 40 + _u16(frame, off + 4)
    off += 40
    extensions = (0, 43, 60)
    for _ in range(IP6_EXT_DEPTH):
        if proto not in extensions:
            break
        _need(min(n, stop), off + 8, "IPv6 extension header")
        proto, off = frame[off], off + (frame[off + 1] + 1) * 8
    if proto in extensions:
        raise BadFrame("more IPv6 extension headers than are stepped over")
    if proto == 44:
        _need(min(n, stop), off + 8, "IPv6 fragment header")
        p.frag = bool(_u16(frame, off + 2) & 0xFFF9)  # otherwise an atomic fragment, a whole packet
        proto, off = frame[off], off + 8
    p.l4_proto = proto
    return off, stop


def parse_quote(frame: bytes, p: Segment) -> tuple[Segment, int] | None:
    """Return the TCP segment that an ICMP error quotes, and where the quote ends (bpf/lib/icmp.h).

    None if the frame is not an error, or quotes no segment whose sequence number can be read.
    `doff` is 0 if the quote ends within the TCP header.
    """
    at = p.l4_off
    if p.frag or p.l4_proto not in (1, 58) or len(frame) < at + 8:
        return None
    errors = (1, 2, 3, 4) if p.is_v6 else (3, 4, 11, 12)
    if p.l4_proto != (58 if p.is_v6 else 1) or frame[at] not in errors:
        return None
    size = 40 + _u16(frame, p.l3_off + 4) if p.is_v6 else _u16(frame, p.l3_off + 2)
    stop = min(len(frame), p.l3_off + size)
    q, off = Segment(vlan=p.vlan, is_v6=p.is_v6), at + 8
    if not p.is_v6:
        if len(frame) < off + 20 or frame[off] >> 4 != 4 or frame[off] & 15 < 5:
            return None
        if _u16(frame, off + 6) & 0x1FFF:
            return None
        proto, mapped = frame[off + 9], bytes(10) + b"\xff\xff"
        q.src, q.dst = mapped + frame[off + 12 : off + 16], mapped + frame[off + 16 : off + 20]
        off += (frame[off] & 15) * 4
    else:
        if len(frame) < off + 40 or frame[off] >> 4 != 6:
            return None
        proto = frame[off + 6]
        q.src, q.dst = frame[off + 8 : off + 24], frame[off + 24 : off + 40]
        off += 40
        for _ in range(IP6_EXT_DEPTH + 1):
            if proto not in (0, 43, 60, 44):
                break
            if len(frame) < off + 8 or (proto == 44 and _u16(frame, off + 2) & 0xFFF8):
                return None
            step = 8 if proto == 44 else (frame[off + 1] + 1) * 8
            proto, off = frame[off], off + step
    if proto != 6 or off + 8 > stop:
        return None
    q.l4_off, q.sport, q.dport = off, frame[off : off + 2], frame[off + 2 : off + 4]
    if off + 20 <= stop:
        q.doff, q.flags, q.seq = (frame[off + 12] >> 4) * 4, frame[off + 13], _u32(frame, off + 4)
    return q, stop


@dataclass(slots=True)
class TcpOptions:
    """Offsets of options from the start of the TCP header; 0: not present."""

    ts: int = 0
    sack: int = 0
    sack_blocks: int = 0


def parse_options(header: bytes) -> TcpOptions:
    """Parse TCP options as Linux does: the last of a kind counts, a malformed one ends the list."""
    o, i, doff = TcpOptions(), 20, len(header)
    if doff == 32 and header[20:24] == b"\x01\x01\x08\x0a":
        return TcpOptions(ts=22)
    for _ in range(TCP_OPTIONS):
        if i + 1 > doff or header[i] == 0:
            break
        if header[i] == 1:
            i += 1
            continue
        if i + 2 > doff:
            break
        kind, size = header[i], header[i + 1]
        if size < 2 or i + size > doff:
            break
        if kind == 8 and size == 10:
            o.ts = i
        if kind == 5 and size >= 10 and (size - 2) % 8 == 0:
            o.sack, o.sack_blocks = i, (size - 2) // 8
        i += size
    return o


def _timestamps(frame: bytes, p: Segment) -> tuple[int, int] | None:
    """Return TSval and TSecr of a segment, if it has them."""
    o = parse_options(frame[p.l4_off : p.l4_off + p.doff])
    if not o.ts:
        return None
    return _u32(frame, p.l4_off + o.ts + 2), _u32(frame, p.l4_off + o.ts + 6)


def _key(p: Segment, *, to_svm: bool) -> bytes:
    """Pack the key of a segment's connection as struct colo_flow_key."""
    if to_svm:
        return FLOW_KEY.pack(p.dst, p.src, p.dport, p.sport, p.vlan)
    return FLOW_KEY.pack(p.src, p.dst, p.sport, p.dport, p.vlan)


def csum_change(total: int, old: int, new: int, at: int) -> int:
    """Add to `total` the change of a 32-bit word, `at` bytes into the checksummed range.

    RFC 1071 section 2(B).
    """
    # Sums are over the words as they lie in memory, here read as big-endian.
    if at & 1:
        old, new = ((x << 8 | x >> 24) & _M32 for x in (old, new))
    return total + (~old & _M32) + new


def csum_apply(check: int, total: int) -> int:
    """Return the checksum after changes that add `total`: RFC 1624, equation 3.

    Zero has two forms in one's complement. As in the kernel, ~HC is taken over 32 bits: then the
    sum is never 0, and the result never 0xFFFF.
    """
    while total >> 32:
        total = (total & _M32) + (total >> 32)
    s = total + (~check & _M32)
    while s >> 16:
        s = (s & 0xFFFF) + (s >> 16)
    return ~s & 0xFFFF


def _move(out: bytearray, l4_off: int, moves: dict[int, int]) -> int:
    """Add to words of a TCP header; return what that adds to the checksum's sum."""
    total = 0
    for at, add in moves.items():
        old = _u32(out, l4_off + at)
        new = (old + add) & _M32
        struct.pack_into("!I", out, l4_off + at, new)
        total = csum_change(total, old, new, at)
    return total


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
    state: int = State.CLOSED
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
        self.state = State.CLOSED

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
        n, _ = self._lookup(_key(p, to_svm=False))
        acks = bool(p.flags & ACK)
        acked = (p.ack - 1) & _M32 if acks else 0
        if n is None:
            return Reason.DROP_PVM_SYN_UNKNOWN
        another = acks and n.have_client & HAVE_ISN_C and not n.answers(acked)
        if n.epoch == EPOCH_BASE and not another:
            return Reason.DROP_PVM_SYN_UNKNOWN
        ts = _timestamps(frame, p)
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
        key = _key(p, to_svm=to_svm)
        n, reason = self._find(key, p, to_svm=to_svm)
        if n is None:
            return frame, reason
        o = parse_options(frame[p.l4_off : p.l4_off + p.doff])
        ts = _timestamps(frame, p)
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
            n.state >= State.ESTABLISHED
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
    def _moves(p: Segment, o: TcpOptions, off: int, tsoff: int, *, to_svm: bool) -> dict[int, int]:
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
        n, _ = self._lookup(_key(q, to_svm=False))
        if n is None:
            return frame, Reason.PASS_REDIRECTED
        off, tsoff, _ = n.shift()
        lead = frame[q.l4_off + 20 : q.l4_off + 24]
        usual = q.doff == 32 and q.l4_off + 32 <= stop and lead == b"\x01\x01\x08\x0a"
        o = TcpOptions(ts=22) if usual else TcpOptions()
        moves = {at: -by for at, by in self._moves(q, o, off, tsoff, to_svm=False).items()}
        if not moves:
            return frame, Reason.PASS_REDIRECTED
        out = bytearray(frame)
        total = _move(out, q.l4_off, moves)
        at = q.l4_off + 16
        if at + 2 <= stop:
            old = _u16(out, at)
            struct.pack_into("!H", out, at, csum_apply(old, total))
            total += (~old & 0xFFFF) + _u16(out, at)
        check = csum_apply(_u16(frame, p.l4_off + 2), total)
        struct.pack_into("!H", out, p.l4_off + 2, check)
        return bytes(out), Reason.PASS_REWRITTEN

    @staticmethod
    def _apply(frame: bytes, p: Segment, moves: dict[int, int]) -> bytes:
        out = bytearray(frame)
        total = _move(out, p.l4_off, moves)
        check = csum_apply(_u16(frame, p.csum_at), total)
        struct.pack_into("!H", out, p.csum_at, check)
        return bytes(out)
