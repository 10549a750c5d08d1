# SPDX-License-Identifier: GPL-2.0-or-later
"""What the rewriter's model reads of a frame, and how it changes one.

The model of bpf/lib/parsing.h, csum.h and icmp.h. Deliberately another parser than net/packet.py:
tests/bpf/test_parsers.py holds both to the kernel's. Checksums follow RFC 1624, equation 3
(HC' = ~(~HC + ~m + m')), all changes of a segment in one step.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..abi import FLOW_KEY

_M32 = 0xFFFFFFFF

VLAN_DEPTH = 2  # COLO_VLAN_DEPTH
IP6_EXT_DEPTH = 4  # COLO_IP6_EXT_DEPTH
TCP_OPTIONS = 12  # COLO_TCP_OPTIONS
TAGS = frozenset((0x8100, 0x88A8, 0x9100))


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


def u16(b: bytes | bytearray, at: int) -> int:
    return int.from_bytes(b[at : at + 2], "big")


def u32(b: bytes | bytearray, at: int) -> int:
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
    proto, off = u16(frame, 12), 14
    for _ in range(VLAN_DEPTH):
        if proto not in TAGS:
            break
        tags += 1
        if tags > 2:
            raise BadFrame("more than two VLAN tags")
        _need(n, off + 4, "VLAN tag")
        p.vlan = vlan_within(p.vlan, u16(frame, off))
        proto, off = u16(frame, off + 2), off + 4
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
        p.seq, p.ack, p.flags = u32(frame, off + 4), u32(frame, off + 8), frame[off + 13]
        p.payload_len = stop - off - p.doff
        p.csum_at = off + 16
        p.is_tcp = True
    return p


def _ipv4(frame: bytes, off: int, p: Segment) -> tuple[int, int]:
    _need(len(frame), off + 20, "IPv4 header")
    ihl, total = (frame[off] & 15) * 4, u16(frame, off + 2)
    if frame[off] >> 4 != 4 or ihl < 20 or total < ihl:
        raise BadFrame("IPv4 version or lengths")
    mapped = bytes(10) + b"\xff\xff"
    p.src, p.dst = mapped + frame[off + 12 : off + 16], mapped + frame[off + 16 : off + 20]
    p.l4_proto = frame[off + 9]
    p.frag = bool(u16(frame, off + 6) & 0x3FFF)
    return off + ihl, off + total


def _ipv6(frame: bytes, off: int, p: Segment) -> tuple[int, int]:
    n = len(frame)
    _need(n, off + 40, "IPv6 header")
    if frame[off] >> 4 != 6:
        raise BadFrame("IPv6 version")
    p.is_v6 = True
    p.src, p.dst = frame[off + 8 : off + 24], frame[off + 24 : off + 40]
    proto, stop = frame[off + 6], off + 40 + u16(frame, off + 4)
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
        p.frag = bool(u16(frame, off + 2) & 0xFFF9)  # otherwise an atomic fragment, a whole packet
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
    size = 40 + u16(frame, p.l3_off + 4) if p.is_v6 else u16(frame, p.l3_off + 2)
    stop = min(len(frame), p.l3_off + size)
    q, off = Segment(vlan=p.vlan, is_v6=p.is_v6), at + 8
    if not p.is_v6:
        if len(frame) < off + 20 or frame[off] >> 4 != 4 or frame[off] & 15 < 5:
            return None
        if u16(frame, off + 6) & 0x1FFF:
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
            if len(frame) < off + 8 or (proto == 44 and u16(frame, off + 2) & 0xFFF8):
                return None
            step = 8 if proto == 44 else (frame[off + 1] + 1) * 8
            proto, off = frame[off], off + step
    if proto != 6 or off + 8 > stop:
        return None
    q.l4_off, q.sport, q.dport = off, frame[off : off + 2], frame[off + 2 : off + 4]
    if off + 20 <= stop:
        q.doff, q.flags, q.seq = (frame[off + 12] >> 4) * 4, frame[off + 13], u32(frame, off + 4)
    return q, stop


@dataclass(slots=True)
class OptionOffsets:
    """Offsets of options from the start of the TCP header; 0: not present."""

    ts: int = 0
    sack: int = 0
    sack_blocks: int = 0


def parse_options(header: bytes) -> OptionOffsets:
    """Parse TCP options as Linux does: the last of a kind counts, a malformed one ends the list."""
    o, i, doff = OptionOffsets(), 20, len(header)
    if doff == 32 and header[20:24] == b"\x01\x01\x08\x0a":
        return OptionOffsets(ts=22)
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


def timestamps(frame: bytes, p: Segment) -> tuple[int, int] | None:
    """Return TSval and TSecr of a segment, if it has them."""
    o = parse_options(frame[p.l4_off : p.l4_off + p.doff])
    if not o.ts:
        return None
    return u32(frame, p.l4_off + o.ts + 2), u32(frame, p.l4_off + o.ts + 6)


def connection_key(p: Segment, *, to_svm: bool) -> bytes:
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


def move(out: bytearray, l4_off: int, moves: dict[int, int]) -> int:
    """Add to words of a TCP header; return what that adds to the checksum's sum."""
    total = 0
    for at, add in moves.items():
        old = u32(out, l4_off + at)
        new = (old + add) & _M32
        struct.pack_into("!I", out, l4_off + at, new)
        total = csum_change(total, old, new, at)
    return total
