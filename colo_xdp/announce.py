# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest that has moved says to its network, made by us since the guest does not know.

RARP, as QEMU announces itself (net/announce.c), teaches switches the port. A gratuitous ARP
request (RFC 5227 3, RFC 5944 4.6) and an unsolicited neighbour advertisement with the override
flag (RFC 4861 7.2.6) make neighbours renew their entries. Pure.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable

BROADCAST = b"\xff" * 6
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2
OVERRIDE = 0x20000000


def announcements(
    mac: str, seen: Iterable[tuple[bytes, int]], configured: Iterable[str]
) -> list[bytes]:
    """Frames that announce a guest: a RARP per VLAN, then one per address.

    `seen`: addresses of 16 bytes, IPv4 mapped, with struct colo_flow_key.vlan;
    `configured`: addresses as text, untagged.
    """
    hw = bytes.fromhex(mac.replace(":", ""))
    known = set(seen)
    for text in configured:
        ip = ipaddress.ip_address(text)
        known.add((ip.packed if ip.version == 6 else MAPPED + ip.packed, 0))
    out = [
        _frame(BROADCAST, hw, vlan, 0x8035, _arp(3, hw, bytes(4), hw, bytes(4)))
        for vlan in sorted({vlan for _, vlan in known} | {0})
    ]
    for address, vlan in sorted(known):
        if address.startswith(MAPPED):
            ip4 = address[12:]
            out.append(_frame(BROADCAST, hw, vlan, 0x0806, _arp(1, hw, ip4, bytes(6), ip4)))
        else:
            out.append(_frame(ALL_NODES_MAC, hw, vlan, 0x86DD, _advertisement(hw, address)))
    return out


def _frame(dst: bytes, src: bytes, vlan: int, ethertype: int, body: bytes) -> bytes:
    # One tag: the VID alone; two: outer << 16 | inner (bpf/parsing.h).
    tags = b""
    if vlan >> 16:
        tags += struct.pack("!HH", 0x88A8, vlan >> 16)
    if vlan & 0xFFFF:
        tags += struct.pack("!HH", 0x8100, vlan & 0xFFFF)
    return (dst + src + tags + struct.pack("!H", ethertype) + body).ljust(60, b"\0")


def _arp(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, op) + sha + spa + tha + tpa


def _advertisement(hw: bytes, address: bytes) -> bytes:
    body = struct.pack("!BBHI", 136, 0, 0, OVERRIDE) + address + b"\x02\x01" + hw
    pseudo = address + ALL_NODES + struct.pack("!II", len(body), 58)
    total = sum(struct.unpack(f"!{len(pseudo + body) // 2}H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255)
    return head + address + ALL_NODES + body
