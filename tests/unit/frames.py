# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames as a guest would send them, for the engine's tests. Checksums are left at 0."""

from __future__ import annotations

import struct

GUEST, CLIENT = bytes([10, 9, 0, 2]), bytes([10, 9, 0, 1])
GUEST6, CLIENT6 = bytes(15) + b"\2", bytes(15) + b"\1"
MACS = b"\2\0\0\0\0\1\2\0\0\0\0\2"
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
SYN_OPTS = b"\2\4\5\xb4\4\2\x08\x0a" + bytes(8) + b"\1\3\3\7"
TS = b"\1\1\x08\x0a" + bytes(8)


def ether(ethertype: int, body: bytes, tags: bytes = b"", pad: bool = False) -> bytes:
    frame = MACS + tags + struct.pack("!H", ethertype) + body
    return frame.ljust(60, b"\xaa") if pad else frame


def ip4(
    proto: int,
    body: bytes,
    *,
    options: bytes = b"",
    frag: int = 0x4000,
    ident: int = 1,
    ttl: int = 64,
    tags: bytes = b"",
    pad: bool = False,
) -> bytes:
    ihl = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | ihl,
        0,
        ihl * 4 + len(body),
        ident,
        frag,
        ttl,
        proto,
        0,
        GUEST,
        CLIENT,
    )
    return ether(0x0800, head + options + body, tags, pad)


def ip6(nxt: int, body: bytes, tags: bytes = b"", pad: bool = False) -> bytes:
    head = struct.pack("!IHBB16s16s", 6 << 28, len(body), nxt, 64, GUEST6, CLIENT6)
    return ether(0x86DD, head + body, tags, pad)


def segment(
    seq: int,
    ack: int = 0,
    data: bytes = b"",
    flags: int = ACK,
    *,
    sport: int = 80,
    dport: int = 4000,
    opts: bytes = TS,
    win: int = 500,
) -> bytes:
    doff = (20 + len(opts)) << 2
    head = struct.pack(
        "!HHIIBBHHH", sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, doff, flags, win, 0, 0
    )
    return head + opts + data


def tcp(
    seq: int,
    ack: int = 0,
    data: bytes = b"",
    flags: int = ACK,
    *,
    sport: int = 80,
    dport: int = 4000,
    opts: bytes = TS,
    win: int = 500,
    v6: bool = False,
    tags: bytes = b"",
    pad: bool = False,
    ident: int = 1,
) -> bytes:
    seg = segment(seq, ack, data, flags, sport=sport, dport=dport, opts=opts, win=win)
    if v6:
        return ip6(6, seg, tags, pad)
    return ip4(6, seg, tags=tags, pad=pad, ident=ident)


def udp(data: bytes, *, sport: int = 53, dport: int = 4000, options: bytes = b"") -> bytes:
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    return ip4(17, head + data, options=options)


def echo_reply(data: bytes, *, ident: int = 7, seq: int = 1) -> bytes:
    return ip4(1, struct.pack("!BBHHH", 0, 0, 0xBEEF, ident, seq) + data)
