# SPDX-License-Identifier: GPL-2.0-or-later
"""Which addresses are the guest's: the cases of docs/design/addresses.md, on scapy's frames."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether

from colo_xdp import abi
from colo_xdp.datapath.addresses import FORGET_S, SWITCHES_S, AddressTable
from colo_xdp.net.address_claims import MAPPED, Claims, claimed, mac_bytes, mac_key
from colo_xdp.net.announce import Own
from tests.sim.datapath import MapDict

GUEST, OTHER, VRRP = "52:54:00:12:34:56", "02:00:00:00:00:77", "00:00:5e:00:01:07"
ALL = "ff:ff:ff:ff:ff:ff"


def hw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ip(text: str) -> bytes:
    a = ipaddress.ip_address(text)
    return a.packed if a.version == 6 else MAPPED + a.packed


def arp(
    sender: str, op: int = 1, *, mac: str = GUEST, src: str = "", dst: str = ALL, tag: Any = None
) -> bytes:
    head = Ether(src=src or mac, dst=dst)
    return bytes(
        (head / tag if tag else head) / ARP(op=op, hwsrc=mac, psrc=sender, pdst="10.9.0.1")
    )


def nd(body: Any, source: str = "fd09::2", *, mac: str = GUEST, hops: int = 255) -> bytes:
    return bytes(Ether(src=mac, dst="33:33:00:00:00:01") / IPv6(src=source, hlim=hops) / body)


def na(target: str = "fd09::2", **flags: int) -> Any:
    return ICMPv6ND_NA(tgt=target, **({"R": 0, "O": 1, "S": 0} | flags))


def noted(*frames: bytes, first: str = GUEST) -> dict[str, tuple[str, int]]:
    c = Claims(main=hw(first))
    for f in frames:
        c.note(f, 1)
    out = {}
    for (address, _), e in c.addresses.items():
        raw = address[12:] if address.startswith(MAPPED) else address
        out[str(ipaddress.ip_address(raw))] = (e.mac.hex(":"), e.flags)
    return out


@pytest.mark.parametrize("op", [1, 2])
def test_the_sender_of_arp(op: int) -> None:
    assert noted(arp("10.9.0.2", op)) == {"10.9.0.2": (GUEST, 0)}


def test_what_claims_nothing_about_the_sender() -> None:
    syn = TCP(dport=443, flags="S")
    nothing = [
        arp("0.0.0.0"),  # a probe (RFC 5227 2.1.1)
        arp("127.0.0.1"),
        arp("224.0.0.18"),
        arp("10.9.0.2", 3),
        arp("10.9.0.2")[:41],
        # a guest that routes sends other people's packets with its own MAC
        bytes(Ether(src=GUEST) / IP(src="10.9.0.254") / syn),
        bytes(Ether(src=GUEST) / IPv6(src="fd09::fe") / syn),
        nd(ICMPv6ND_NS(tgt="fd09::2"), "::"),  # duplicate address detection: not yet its own
        nd(ICMPv6ND_RS(), "::"),
        nd(na(), hops=254),
        nd(na("ff02::5")),
        nd(na())[:77],
    ]
    for frame in nothing:
        assert claimed(frame) is None and noted(frame) == {}, frame.hex()


def test_neighbour_discovery() -> None:
    r = abi.CLAIM_SAYS_ROUTER | abi.CLAIM_ROUTER
    assert noted(nd(ICMPv6ND_NS(tgt="fd09::1"))) == {"fd09::2": (GUEST, 0)}
    assert noted(nd(ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=GUEST), "fe80::2")) == {
        "fe80::2": (GUEST, 0)
    }
    assert noted(nd(ICMPv6ND_RA(), "fe80::2")) == {"fe80::2": (GUEST, r)}
    assert noted(nd(na("fd09::7"))) == {"fd09::7": (GUEST, abi.CLAIM_SAYS_ROUTER)}
    assert noted(nd(na(R=1) / ICMPv6NDOptDstLLAddr(lladdr=GUEST))) == {"fd09::2": (GUEST, r)}
    # A proxy does not override (RFC 4861 7.2.8): its own address is what it says of itself.
    assert noted(nd(na("fd09::99", O=0))) == {"fd09::2": (GUEST, abi.CLAIM_SAYS_ROUTER)}


def test_what_it_has_said_of_being_a_router_is_kept_until_it_says_otherwise() -> None:
    asks, router, host = nd(ICMPv6ND_NS(tgt="fd09::1")), nd(na(R=1)), nd(na(R=0))
    r = abi.CLAIM_SAYS_ROUTER | abi.CLAIM_ROUTER
    assert noted(asks, router, asks) == {"fd09::2": (GUEST, r)}
    assert noted(router, host, asks) == {"fd09::2": (GUEST, abi.CLAIM_SAYS_ROUTER)}


def test_a_mac_address_of_another_machine_is_not_announced() -> None:
    assert noted(arp("10.9.0.9", 2, mac=OTHER, src=GUEST)) == {}
    assert noted(nd(na() / ICMPv6NDOptDstLLAddr(lladdr=OTHER))) == {}
    # VRRP (RFC 5798 7.3): the virtual MAC is the guest's, since it sends with it.
    advert = bytes(Ether(src=VRRP, dst="01:00:5e:00:00:12") / IP(src="10.9.0.2", proto=112))
    both = noted(advert, arp("10.9.0.100", mac=VRRP, src=GUEST), arp("10.9.0.2"))
    assert both == {"10.9.0.100": (VRRP, 0), "10.9.0.2": (GUEST, 0)}


def test_tags() -> None:
    c = Claims(main=hw(GUEST))
    c.note(arp("10.9.0.2", tag=Dot1Q(vlan=7)), 1)
    c.note(arp("10.9.0.2", tag=Dot1AD(vlan=5) / Dot1Q(vlan=7)), 1)
    assert {vlan for _, vlan in c.addresses} == {7, 5 << 16 | 7}
    c.hear(arp("10.9.0.2", mac=OTHER))  # another network
    assert len(c.addresses) == 2
    assert claimed(arp("10.9.0.2", tag=Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3))) is None


def test_an_address_that_another_machine_has_now() -> None:
    c = Claims(main=hw(GUEST))
    c.note(arp("10.9.0.2"), 1)
    c.note(arp("10.9.0.100"), 1)
    c.hear(arp("10.9.0.100", mac=OTHER))  # keepalived there has become the master
    assert set(c.addresses) == {(ip("10.9.0.2"), 0)}
    c.note(nd(na("fd09::100")), 1)
    c.hear(nd(na("fd09::100"), "fd09::77", mac=OTHER))
    assert set(c.addresses) == {(ip("10.9.0.2"), 0)}
    c.note(arp("10.9.0.100"), 1)  # and back
    assert len(c.addresses) == 2


def test_a_virtual_mac_that_moves() -> None:
    c = Claims(main=hw(GUEST))
    c.note(arp("10.9.0.100", mac=VRRP), 1)
    assert c.is_for_guest(hw(VRRP) + hw(OTHER) + b"\x08\x00")
    c.hear(bytes(Ether(src=VRRP, dst="01:00:5e:00:00:12") / IP(src="10.9.0.3", proto=112)))
    assert not c.is_for_guest(hw(VRRP) + hw(OTHER) + b"\x08\x00") and not c.macs


def test_what_is_mirrored() -> None:
    c = Claims()
    to = {m: hw(m) + hw(OTHER) + b"\x08\x00" for m in (GUEST, OTHER, ALL, "33:33:00:00:00:01")}
    assert all(c.is_for_guest(f) for f in to.values()), "nobody knows who the guest is"
    c.main = hw(GUEST)
    assert [c.is_for_guest(f) for f in to.values()] == [True, False, True, True]
    c.note(arp("10.9.0.7", mac=OTHER), 1)  # a machine behind the guest
    assert c.is_for_guest(to[OTHER])
    c.macs.clear()
    c.full = True
    assert c.is_for_guest(to[OTHER]), "not all of its MACs can be known"


def test_a_full_table_notes_no_more() -> None:
    c = Claims(main=hw(GUEST), max_macs=2, max_addresses=3)
    for n in range(9):
        c.note(arp(f"10.9.0.{n + 1}"), 1)
        c.note(Ether(src=f"02:00:00:00:01:{n:02x}").build(), 1)
    assert len(c.macs) == 2 and len(c.addresses) == 3


def test_only_a_claim_of_the_state_that_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SVM that had diverged said to be the master; the copied state never did."""
    addresses, macs = MapDict(), MapDict()
    t = AddressTable(addresses, macs)
    now = 10**15
    monkeypatch.setattr("time.monotonic_ns", lambda: now)

    def put(address: str, mac: str, epoch: int, flags: int = 0, seen: int = now) -> None:
        key = abi.ADDRESS.pack(ip(address), 0)
        addresses[key] = abi.CLAIM.pack(seen, mac_key(hw(mac)), epoch, flags)

    put("10.9.0.100", GUEST, 6)
    put("10.9.0.2", GUEST, 7)
    put("fd09::2", GUEST, 7, abi.CLAIM_SAYS_ROUTER)
    put("10.9.0.9", VRRP, 7)
    first = hw(GUEST)
    mine = [Own(ip("10.9.0.2"), 0, first), Own(ip("fd09::2"), 0, first, False)]
    assert t.own(first, 7) == mine, "the virtual MAC is with another machine now"
    assert len(t.own(first, None)) == 3, "a primary's guest goes on"
    assert not t.sweep(7) and len(addresses) == 3
    put("10.9.0.3", GUEST, 7, seen=now - int(FORGET_S * 1e9) - 1)
    assert t.own(first, 7) == mine
    assert not t.sweep(None) and len(addresses) == 3
    t.forget_all()
    assert t.own(first, 7) == []


def test_what_the_primary_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    p, s = AddressTable(MapDict(), MapDict()), AddressTable(MapDict(), MapDict())
    now = 10**15
    monkeypatch.setattr("time.monotonic_ns", lambda: now)
    p._macs.set(b"a" * 8, abi.CLAIM.pack(now, mac_key(hw(VRRP)), 3, 0))
    old = now - int(SWITCHES_S * 1e9) - 1
    p._macs.set(b"b" * 8, abi.CLAIM.pack(old, mac_key(hw(OTHER)), 3, 0))
    both = abi.CLAIM_SAYS_ROUTER | abi.CLAIM_ROUTER
    p._addresses.set(
        abi.ADDRESS.pack(ip("fd09::2"), 7), abi.CLAIM.pack(now, mac_key(hw(VRRP)), 3, both)
    )
    addresses, macs = p.export(256)
    s.announced(8, addresses, macs, running=7)
    assert s.macs(7) == [] and s.macs(8) == [hw(VRRP)]
    assert s.own(hw(GUEST), 7) == []
    assert s.own(hw(GUEST), 8) == [Own(ip("fd09::2"), 7, hw(VRRP), True)]
    for a, m in ((addresses[:-1], macs), (addresses, macs[1:])):
        with pytest.raises(ValueError, match="no addresses"):
            s.announced(9, a, m, running=8)
    assert s.macs(9) == []


def test_a_checkpoint_that_never_comes_takes_nothing_from_what_the_svm_has_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The primary tells, and dies in that checkpoint: the SVM takes over as it was."""
    p, s = AddressTable(MapDict(), MapDict()), AddressTable(MapDict(), MapDict())
    now = 10**15
    monkeypatch.setattr("time.monotonic_ns", lambda: now)

    def put(t: AddressTable, address: str, mac: str, epoch: int) -> None:
        claim = abi.CLAIM.pack(now, mac_key(hw(mac)), epoch, 0)
        t._macs.set(mac_key(hw(mac)).to_bytes(8, "little"), claim)
        t._addresses.set(abi.ADDRESS.pack(ip(address), 0), claim)

    first = hw(GUEST)
    for t in (s, p):
        put(t, "10.9.0.2", GUEST, 7)
        put(t, "10.9.0.3", VRRP, 7)
        put(t, "10.9.0.9", VRRP, 7)
    put(p, "10.9.0.4", OTHER, 7)  # the SVM has never said that it has this one
    claims = p.export(256)
    mine = [Own(ip("10.9.0.2"), 0, first), Own(ip("10.9.0.3"), 0, hw(VRRP))]
    for n in (8, 8, 9):  # failed, and asked for again
        s.announced(n, *claims, running=7)
    assert len(s.own(first, 9)) == 4
    s._addresses.delete(abi.ADDRESS.pack(ip("10.9.0.9"), 0))  # another machine says it is its own
    s.undo(7)
    assert s.own(first, 7) == mine and sorted(s.macs(7)) == sorted([first, hw(VRRP)])
    assert s.own(first, None) == mine, "nor does it tell others later"


def test_an_address_that_moves_before_the_primary_tells_again_has_moved() -> None:
    s, key = AddressTable(MapDict(), MapDict()), abi.ADDRESS.pack(ip("10.9.0.3"), 0)
    now, mac = time.monotonic_ns(), mac_key(hw(GUEST))
    s._addresses.set(key, abi.CLAIM.pack(now, mac, 7, 0))
    claims = s.export(256)
    s.announced(8, *claims, running=7)
    s._addresses.delete(key)
    s.announced(9, *claims, running=7)
    s.undo(7)
    assert s.own(hw(GUEST), 7) == []


def test_what_a_checkpoint_has_brought_is_not_undone() -> None:
    s, key = AddressTable(MapDict(), MapDict()), abi.ADDRESS.pack(ip("10.9.0.3"), 0)
    now, mac = time.monotonic_ns(), mac_key(hw(GUEST))
    s._addresses.set(key, abi.CLAIM.pack(now, mac, 7, 0))
    claims = s.export(256)
    s.announced(8, *claims, running=7)
    s.undo(8)
    assert len(s.own(hw(GUEST), 8)) == 1
    s.announced(9, *claims, running=8)
    s.undo(8)
    assert len(s.own(hw(GUEST), 8)) == 1 and s.own(hw(GUEST), 7) == []


def test_a_table_that_is_full_says_so() -> None:
    macs = MapDict()
    t = AddressTable(MapDict(), macs)
    for n in range(macs.info.max_entries):
        assert not t.sweep(None)
        macs[n.to_bytes(8, "little")] = abi.CLAIM.pack(time.monotonic_ns(), n, 1, 0)
    assert t.sweep(None)


def test_mac_keys() -> None:
    for mac in (GUEST, OTHER, VRRP, ALL):
        assert mac_bytes(mac_key(hw(mac))) == hw(mac)
        assert mac_key(hw(mac)) < 1 << 48
