# SPDX-License-Identifier: GPL-2.0-or-later
"""Build frames for tests byte by byte, without using the product."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
GUEST4, CLIENT4 = "10.9.0.1", "10.9.0.2"
GUEST6, CLIENT6 = "fd09::1", "fd09::2"
MACS = bytes.fromhex("020000000002525400000001")


def ones_sum(data: bytes, start: int = 0) -> int:
    """RFC 1071 sum of big-endian words, folded, not inverted."""
    if len(data) & 1:
        data += b"\0"
    s = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while s >> 16:
        s = (s & 0xFFFF) + (s >> 16)
    return s


def timestamps(val: int, ecr: int, *, lead: bytes = b"\x01\x01") -> bytes:
    return lead + struct.pack("!BBII", 8, 10, val, ecr)


def sack(*edges: int, lead: bytes = b"\x01\x01") -> bytes:
    return lead + struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)


def pad(options: bytes) -> bytes:
    return options + bytes(-len(options) % 4)


def addresses(src: str, dst: str) -> bytes:
    family = socket.AF_INET6 if ":" in src else socket.AF_INET
    return socket.inet_pton(family, src) + socket.inet_pton(family, dst)


def l4_sum(src: str, dst: str, proto: int, body: bytes) -> int:
    return ones_sum(body, ones_sum(addresses(src, dst) + struct.pack("!IHH", len(body), 0, proto)))


def tags(vlans: Sequence[tuple[int, int]], ethertype: int) -> bytes:
    out = b"".join(struct.pack("!HH", tpid, tci) for tpid, tci in vlans)
    return out + struct.pack("!H", ethertype)


def ip(
    src: str,
    dst: str,
    proto: int,
    body: bytes,
    *,
    vlans: Sequence[tuple[int, int]] = (),
    ip_options: bytes = b"",
    extensions: Sequence[tuple[int, bytes]] = (),
    fragment: tuple[int, bool] | None = None,
    trailer: bytes = b"",
) -> bytes:
    """An Ethernet frame around `body`. `fragment`: (offset in bytes, more to come)."""
    if ":" in src:
        if fragment:
            frag = struct.pack("!HI", fragment[0] | fragment[1], 7)
            extensions = [*extensions, (44, frag)]
        chain = b""
        for i, (_, content) in enumerate(extensions):
            nxt = extensions[i + 1][0] if i + 1 < len(extensions) else proto
            size = 0 if extensions[i][0] == 44 else (len(content) + 2) // 8 - 1
            chain += bytes([nxt, size]) + content
        first = extensions[0][0] if extensions else proto
        head = struct.pack("!IHBB", 6 << 28, len(chain) + len(body), first, 64)
        packet = head + addresses(src, dst) + chain + body
        return MACS + tags(vlans, 0x86DD) + packet + trailer
    off = (fragment[0] // 8 | fragment[1] << 13) if fragment else 0x4000
    ihl = 5 + len(ip_options) // 4
    total = ihl * 4 + len(body)
    head = struct.pack("!BBHHHBBH", 0x40 | ihl, 0, total, 7, off, 64, proto, 0)
    head += addresses(src, dst) + ip_options
    head = head[:10] + struct.pack("!H", 0xFFFF & ~ones_sum(head)) + head[12:]
    return MACS + tags(vlans, 0x0800) + head + body + trailer


def tcp_segment(
    src: str,
    dst: str,
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    payload: bytes = b"",
    options: bytes = b"",
    *,
    spoil: int = 0,
    partial: bool = False,
    window: int = 4096,
) -> bytes:
    """Build a TCP segment; `spoil` is XORed into its checksum, `partial`: pseudo header only."""
    options = pad(options)
    m = 0xFFFFFFFF
    doff = 5 + len(options) // 4
    head = struct.pack("!HHIIBBHHH", sport, dport, seq & m, ack & m, doff << 4, flags, window, 0, 0)
    body = head + options + payload
    if partial:
        size = struct.pack("!IHH", len(body), 0, 6)
        check = ones_sum(addresses(src, dst) + size)
    else:
        check = 0xFFFF & ~l4_sum(src, dst, 6, body)
    return body[:16] + struct.pack("!H", check ^ spoil) + body[18:]


def icmp_error(
    src: str,
    dst: str,
    typ: int,
    quote: bytes,
    *,
    vlans: Sequence[tuple[int, int]] = (),
    spoil: int = 0,
) -> bytes:
    """Build an ICMP or ICMPv6 error of `src` that quotes a packet (from its IP header on)."""
    body = struct.pack("!BBHI", typ, 0, 0, 1400) + quote
    check = l4_sum(src, dst, 58, body) if ":" in src else ones_sum(body)
    body = body[:2] + struct.pack("!H", (0xFFFF & ~check) ^ spoil) + body[4:]
    return ip(src, dst, 58 if ":" in src else 1, body, vlans=vlans)


def l4_at(frame: bytes) -> tuple[int, int]:
    """Return (offset of the transport header, end of the IP packet); no extension headers."""
    off = 12
    while frame[off : off + 2] in (b"\x81\x00", b"\x88\xa8"):
        off += 4
    v6 = frame[off : off + 2] == b"\x86\xdd"
    off += 2
    if v6:
        return off + 40, off + 40 + int.from_bytes(frame[off + 4 : off + 6], "big")
    ihl = (frame[off] & 15) * 4
    return off + ihl, off + int.from_bytes(frame[off + 2 : off + 4], "big")


def l4_residue(frame: bytes) -> int:
    """Return the sum over pseudo header and segment: 0xFFFF when the checksum is right."""
    off, end = l4_at(frame)
    v6 = frame[off - 40 : off - 39] == b"\x60" and end - off > 0 and _is_v6(frame)
    ends = frame[off - 32 : off] if v6 else _v4_addresses(frame)
    return ones_sum(frame[off:end], ones_sum(ends + struct.pack("!IHH", end - off, 0, 6)))


def _is_v6(frame: bytes) -> bool:
    off = 12
    while frame[off : off + 2] in (b"\x81\x00", b"\x88\xa8"):
        off += 4
    return frame[off : off + 2] == b"\x86\xdd"


def _v4_addresses(frame: bytes) -> bytes:
    off = 12
    while frame[off : off + 2] in (b"\x81\x00", b"\x88\xa8"):
        off += 4
    return frame[off + 14 : off + 22]


def numbers(frame: bytes) -> tuple[int, int]:
    """(seq, ack)."""
    off, _ = l4_at(frame)
    seq, ack = struct.unpack_from("!II", frame, off + 4)
    return int(seq), int(ack)
