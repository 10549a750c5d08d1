# SPDX-License-Identifier: GPL-2.0-or-later
"""What is announced at a takeover, read back by scapy's independent parser."""

from __future__ import annotations

import ipaddress

from scapy.layers.inet6 import ICMPv6ND_NA, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether

from colo_xdp.net.announce import MAPPED, Own, announcements

MAC = "52:54:00:12:34:56"
HW = bytes.fromhex(MAC.replace(":", ""))
VRRP = bytes.fromhex("00005e000107")
V4 = MAPPED + ipaddress.IPv4Address("10.9.0.2").packed
V6 = ipaddress.IPv6Address("fd09::2").packed
LOCAL6 = ipaddress.IPv6Address("fe80::2").packed


def test_addresses_seen_and_configured() -> None:
    own = [Own(V4, 0, HW), Own(V6, 0, HW, False)]
    frames = [Ether(f) for f in announcements(MAC, own, [], ["10.9.0.2", "10.9.0.3"])]
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
    own = [Own(V4, 7, HW), Own(V6, 5 << 16 | 7, HW, False)]
    frames = [Ether(f) for f in announcements(MAC, own, [], [])]
    tags = {(f.type, tuple(t.vlan for t in f.iterpayloads() if isinstance(t, Dot1Q)))
            for f in frames if Dot1Q in f or ARP not in f}  # fmt: skip
    assert len(frames) == 5  # RARP: none, 7, 5/7; ARP in 7; NA in 5/7
    assert (0x8100, (7,)) in tags
    assert sum(bytes(f)[12:14] == b"\x88\xa8" for f in frames) == 2


def test_each_address_with_the_mac_that_the_guest_used_for_it() -> None:
    own = [Own(V4, 0, VRRP), Own(V6, 0, HW, False)]
    frames = [Ether(f) for f in announcements(MAC, own, [VRRP, b"\2\0\0\0\0\7"], ["10.9.0.9"])]
    rarps = {(f.src, bytes(f)[22:28].hex(":")) for f in frames if f.type == 0x8035}
    want = {MAC, "00:00:5e:00:01:07", "02:00:00:00:00:07"}
    assert rarps == {(m, m) for m in want}, "switches learn each of them"
    arps = {f[ARP].psrc: (f.src, f[ARP].hwsrc) for f in frames if f.type == 0x0806}
    assert arps == {
        "10.9.0.2": ("00:00:5e:00:01:07", "00:00:5e:00:01:07"),
        "10.9.0.9": (MAC, MAC),
    }


def advertised(own: list[Own], configured: list[str]) -> dict[str, int]:
    frames = [Ether(f) for f in announcements(MAC, own, [], configured)]
    return {f[ICMPv6ND_NA].tgt: f[ICMPv6ND_NA].R for f in frames if ICMPv6ND_NA in f}


def test_the_router_flag_is_the_guests_own() -> None:
    """A host takes a router that advertises R=0 off its default routers (RFC 4861 7.2.5)."""
    assert advertised([Own(V6, 0, HW, True)], []) == {"fd09::2": 1}
    assert advertised([Own(V6, 0, HW, False)], []) == {"fd09::2": 0}
    assert advertised([Own(V6, 0, HW, None)], []) == {}, "it has not said: RARP has to do"
    # An interface forwards or does not: what it has said at one address holds for all.
    assert advertised([Own(V6, 0, HW, None), Own(LOCAL6, 0, HW, True)], ["fd09::3"]) == {
        "fd09::2": 1,
        "fe80::2": 1,
        "fd09::3": 1,
    }
    assert advertised([Own(V6, 0, HW, None), Own(LOCAL6, 0, VRRP, True)], []) == {"fe80::2": 1}
    assert advertised([Own(V6, 0, HW, None), Own(LOCAL6, 7, HW, True)], []) == {"fe80::2": 1}
    assert advertised([Own(V6, 0, HW, None)], ["fd09::2"]) == {"fd09::2": 0}, "a person's word"
