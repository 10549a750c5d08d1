# SPDX-License-Identifier: GPL-2.0-or-later
"""What is announced at a takeover, read back by scapy's independent parser."""

from __future__ import annotations

import ipaddress

from scapy.layers.inet6 import ICMPv6ND_NA, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether

from colo_xdp.announce import MAPPED, announcements

MAC = "52:54:00:12:34:56"
V4 = MAPPED + ipaddress.IPv4Address("10.9.0.2").packed
V6 = ipaddress.IPv6Address("fd09::2").packed


def test_addresses_seen_and_configured() -> None:
    frames = [Ether(f) for f in announcements(MAC, [(V4, 0), (V6, 0)], ["10.9.0.2", "10.9.0.3"])]
    assert all(f.src == MAC and len(bytes(f)) >= 60 for f in frames)
    rarp, *rest = frames
    assert rarp.type == 0x8035 and rarp.dst == "ff:ff:ff:ff:ff:ff"
    arps = [f[ARP] for f in rest if ARP in f]
    assert [(a.op, a.psrc, a.pdst, a.hwsrc) for a in arps] == [
        (1, ip, ip, MAC) for ip in ("10.9.0.2", "10.9.0.3")
    ]
    (na,) = (f for f in rest if ICMPv6ND_NA in f)
    assert (na.dst, na[IPv6].dst, na[IPv6].hlim) == ("33:33:00:00:00:01", "ff02::1", 255)
    assert (na[ICMPv6ND_NA].tgt, na[ICMPv6ND_NA].O, na[ICMPv6ND_NA].S) == ("fd09::2", 1, 0)
    again = IPv6(bytes(na[IPv6]))
    del again[ICMPv6ND_NA].cksum
    assert bytes(again) == bytes(na[IPv6]), "the checksum is right"


def test_each_vlan_gets_its_own() -> None:
    frames = [Ether(f) for f in announcements(MAC, [(V4, 7), (V6, 5 << 16 | 7)], [])]
    tags = {(f.type, tuple(t.vlan for t in f.iterpayloads() if isinstance(t, Dot1Q)))
            for f in frames if Dot1Q in f or ARP not in f}  # fmt: skip
    assert len(frames) == 5  # RARP: none, 7, 5/7; ARP in 7; NA in 5/7
    assert (0x8100, (7,)) in tags
    assert sum(bytes(f)[12:14] == b"\x88\xa8" for f in frames) == 2
