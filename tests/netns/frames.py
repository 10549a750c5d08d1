# SPDX-License-Identifier: GPL-2.0-or-later
"""Build frames for the namespace tests by hand, so that every checksum is known."""

from __future__ import annotations

import socket
import struct

GUEST_MAC = bytes.fromhex("525400123456")
CLIENT_MAC = bytes.fromhex("020000000001")


def csum(data: bytes, start: int = 0) -> int:
    """RFC 1071 sum, folded, not inverted."""
    if len(data) % 2:
        data += b"\0"
    total = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _frame(
    proto: int, l4: bytes, at: int, partial: bool, v6: bool, vlan: int, reverse: bool,
    tos: int = 0, ident: int = 1, df: bool = True,
) -> bytes:  # fmt: skip
    if v6:
        a, b = (socket.inet_pton(socket.AF_INET6, x) for x in ("fd09::2", "fd09::1"))
    else:
        a, b = (socket.inet_aton(x) for x in ("10.9.0.2", "10.9.0.1"))
    smac, dmac = GUEST_MAC, CLIENT_MAC
    if reverse:
        a, b, smac, dmac = b, a, dmac, smac
    pseudo = csum(a + b + struct.pack("!HH", proto, len(l4)))
    value = pseudo if partial else 0xFFFF & ~csum(l4, pseudo)
    l4 = l4[:at] + struct.pack("!H", value) + l4[at + 2 :]
    if v6:
        ip = struct.pack("!IHBB", 0x60000000 | tos << 20, len(l4), proto, 64) + a + b
        et = 0x86DD
    else:
        ip = struct.pack(
            "!BBHHHBBH", 0x45, tos, 20 + len(l4), ident, 0x4000 * df, 64, proto, 0
        ) + a + b  # fmt: skip
        ip = ip[:10] + struct.pack("!H", 0xFFFF & ~csum(ip)) + ip[12:]
        et = 0x0800
    tag = struct.pack("!HH", 0x8100, vlan) if vlan else b""
    return dmac + smac + tag + struct.pack("!H", et) + ip + l4


def tcp(
    payload: bytes = b"",
    *,
    seq: int = 1000,
    ack: int = 5000,
    flags: int = 0x18,
    sport: int = 80,
    dport: int = 40000,
    options: bytes = b"\1\1\x08\x0a" + bytes(8),
    partial: bool = False,
    v6: bool = False,
    vlan: int = 0,
    reverse: bool = False,
    window: int = 4096,
    reserved: int = 0,
    urgent: int = 0,
    tos: int = 0,
    ident: int = 1,
    df: bool = True,
) -> bytes:
    """Build a TCP frame of the guest (reverse: of the client).

    reserved: the bits behind the header's length, AE being 1.
    """
    if reverse:
        sport, dport = dport, sport
    doff = (20 + len(options)) // 4 << 4 | reserved
    head = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, doff, flags, window, 0, urgent)
    return _frame(
        6, head + options + payload, 16, partial, v6, vlan, reverse, tos, ident, df
    )  # fmt: skip


def udp(
    payload: bytes = b"",
    *,
    sport: int = 53,
    dport: int = 40000,
    partial: bool = False,
    v6: bool = False,
    vlan: int = 0,
) -> bytes:
    """Build a UDP frame of the guest."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0)
    return _frame(17, head + payload, 6, partial, v6, vlan, False)


def checksum_fits(frame: bytes, l4: int, partial: bool) -> bool:
    """Check IPv4's header checksum and TCP's or UDP's (the pseudo header's sum if `partial`)."""
    udp = frame[23 if l4 == 34 else 20] == 17
    at = l4 + (6 if udp else 16)
    addresses = frame[26:34] if l4 == 34 else frame[22:54]
    pseudo = csum(addresses + struct.pack("!HH", 17 if udp else 6, len(frame) - l4))
    if l4 == 34 and csum(frame[14:34]) != 0xFFFF:
        return False
    if partial:
        return struct.unpack_from("!H", frame, at)[0] == pseudo
    return (udp and frame[at : at + 2] == b"\0\0") or csum(frame[l4:], pseudo) == 0xFFFF


def tcp_checksum_ok(frame: bytes) -> bool:
    """Return whether an untagged IPv4 TCP frame's checksum is complete and correct."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return False
    l4 = frame[34 : 14 + struct.unpack_from("!H", frame, 16)[0]]
    return csum(l4, csum(frame[26:34] + struct.pack("!HH", 6, len(l4)))) == 0xFFFF
