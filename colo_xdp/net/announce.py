# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the frames that announce a guest on its new host: it does not know that it moved. Pure.

RARP, with which QEMU announces a migrated guest (net/announce.c), teaches switches the port. A
gratuitous ARP request (RFC 5227 section 3, RFC 5944 section 4.6) and an unsolicited neighbour
advertisement with the override flag (RFC 4861 section 7.2.6) make neighbours update their entries.
The secondary sends them at a takeover (controller/takeover.py), several times, as one may be lost.

Which addresses: see bpf/lib/addresses.h. Each is announced with the MAC address that the guest has
used for it. An advertisement also states whether its sender is a router, and hosts believe it (RFC
4861 section 7.2.5). So none is built for an address for which the guest has not stated that.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .address_claims import MAPPED

#: when, in seconds after the takeover, as QEMU's own RARPs
ANNOUNCE_TIMES = (0.0, 0.05, 0.2, 0.45, 0.8)

BROADCAST = b"\xff" * 6
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
ROUTER, OVERRIDE = 0x80000000, 0x20000000


@dataclass(frozen=True, slots=True)
class Own:
    """An address of the guest.

    address: 16 bytes, IPv4 mapped. vlan: as in struct colo_flow_key. mac: its MAC address. router:
    whether the guest claims there to be a router (None: not stated).
    """

    address: bytes
    vlan: int
    mac: bytes
    router: bool | None = None


def announcements(
    mac: str, own: Iterable[Own], macs: Iterable[bytes], configured: Iterable[str]
) -> list[bytes]:
    """Return the frames that announce a guest: a RARP per MAC and VLAN, then one per address.

    mac: the first MAC address. macs: others from which it sends. configured: addresses as text,
    untagged, at `mac` unless the guest has claimed otherwise.
    """
    first = bytes.fromhex(mac.replace(":", ""))
    known = {(o.address, o.vlan): o for o in own}
    routers = {(o.mac, o.vlan) for o in known.values() if o.router}
    for text in configured:
        ip = ipaddress.ip_address(text)
        key = (ip.packed if ip.version == 6 else MAPPED + ip.packed, 0)
        if key not in known or known[key].router is None:
            at = known[key].mac if key in known else first
            known[key] = Own(*key, at, (at, 0) in routers)
    untagged = {(m, 0) for m in (first, *macs)}
    out = [
        _frame(BROADCAST, hw, vlan, 0x8035, _arp(3, hw, bytes(4), hw, bytes(4)))
        for hw, vlan in sorted(untagged | {(o.mac, o.vlan) for o in known.values()})
    ]
    for (address, vlan), o in sorted(known.items()):
        if address.startswith(MAPPED):
            ip4 = address[12:]
            out.append(_frame(BROADCAST, o.mac, vlan, 0x0806, _arp(1, o.mac, ip4, bytes(6), ip4)))
        elif o.router is not None or (o.mac, vlan) in routers:
            # An interface forwards or does not (RFC 4861 section 6.2.2), whichever of its addresses
            # states it.
            router = o.router is None or o.router
            out.append(
                _frame(ALL_NODES_MAC, o.mac, vlan, 0x86DD, _advertisement(o.mac, address, router))
            )
    return out


def _frame(dst: bytes, src: bytes, vlan: int, ethertype: int, body: bytes) -> bytes:
    # One tag: the VID alone; two: outer << 16 | inner (bpf/lib/parsing.h).
    tags = b""
    if vlan >> 16:
        tags += struct.pack("!HH", 0x88A8, vlan >> 16)
    if vlan & 0xFFFF:
        tags += struct.pack("!HH", 0x8100, vlan & 0xFFFF)
    return (dst + src + tags + struct.pack("!H", ethertype) + body).ljust(60, b"\0")


def _arp(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, op) + sha + spa + tha + tpa


def _advertisement(hw: bytes, address: bytes, router: bool) -> bytes:
    flags = OVERRIDE | (ROUTER if router else 0)
    body = struct.pack("!BBHI", 136, 0, 0, flags) + address + b"\x02\x01" + hw
    pseudo = address + ALL_NODES + struct.pack("!II", len(body), 58)
    total = sum(struct.unpack(f"!{len(pseudo + body) // 2}H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255)
    return head + address + ALL_NODES + body
