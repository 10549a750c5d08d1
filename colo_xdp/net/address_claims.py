# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds frames that claim an address for their sender, and tracks the owners of addresses. Pure.

bpf/lib/addresses.h does the same in C and gives the reasons; a test compares the two frame by
frame. The kernel's maps are read by datapath/addresses.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ..abi import CLAIM_ROUTER, CLAIM_SAYS_ROUTER

MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2
_TAGS = (0x8100, 0x88A8)
_ARP, _IPV6 = 0x0806, 0x86DD
_ICMPV6 = 58
_ROUTER_SOLICIT, _ROUTER_ADVERT, _ADVERT = 133, 134, 136
_OVERRIDE, _ROUTER = 0x20, 0x80


def mac_key(mac: bytes) -> int:
    """Return a MAC address as the maps hold it: mac_key() of bpf/lib/addresses.h, 48 bits."""
    return int.from_bytes(mac[:4], "little") << 16 | int.from_bytes(mac[4:6], "little")


def mac_bytes(key: int) -> bytes:
    """Return the MAC address of a mac_key()."""
    return (key >> 16).to_bytes(4, "little") + (key & 0xFFFF).to_bytes(2, "little")


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim that `address` in `vlan` is at `mac`.

    address: 16 bytes, IPv4 mapped. vlan: as in struct colo_flow_key. flags: CLAIM_*.
    """

    address: bytes
    vlan: int
    mac: bytes
    flags: int = 0


def claimed(frame: bytes) -> Claim | None:
    """Return the address that a frame claims for its sender, if it claims one.

    ARP (RFC 826): the sender. Neighbour discovery (RFC 4861): the source, or the target of an
    advertisement with the override flag.
    """
    if len(frame) < 14:
        return None
    at, vlan, tags = 14, 0, 0
    kind = struct.unpack_from("!H", frame, 12)[0]
    while kind in _TAGS:
        tags += 1
        if tags > 2 or len(frame) < at + 4:
            return None
        tci, kind = struct.unpack_from("!HH", frame, at)
        vlan = vlan << 16 | tci & 0x0FFF
        at += 4
    if kind == _ARP:
        return _claimed_arp(frame[at:], vlan)
    if kind == _IPV6:
        return _claimed_nd(frame[at:], vlan, frame[6:12])
    return None


def _claimed_arp(arp: bytes, vlan: int) -> Claim | None:
    if len(arp) < 28 or arp[:6] != bytes.fromhex("000108000604"):
        return None
    op, first = struct.unpack_from("!H", arp, 6)[0], arp[14]
    if op not in (1, 2) or first in (0, 127) or first >= 224:
        return None
    return Claim(MAPPED + arp[14:18], vlan, arp[8:14])


def _claimed_nd(ip: bytes, vlan: int, source: bytes) -> Claim | None:
    if len(ip) < 48 or ip[6] != _ICMPV6 or ip[7] != 255:
        return None
    kind, address, mac, flags = ip[40], ip[8:24], source, 0
    if not _ROUTER_SOLICIT <= kind <= _ADVERT or ip[41]:
        return None
    if kind == _ROUTER_ADVERT:
        flags = CLAIM_SAYS_ROUTER | CLAIM_ROUTER
    if kind == _ADVERT:
        if len(ip) < 64:
            return None
        flags = CLAIM_SAYS_ROUTER | (CLAIM_ROUTER if ip[44] & _ROUTER else 0)
        if ip[44] & _OVERRIDE:
            address = ip[48:64]
            if len(ip) >= 72 and struct.unpack_from("!H", ip, 4)[0] >= 32 and ip[64:66] == b"\2\1":
                mac = ip[66:72]
    if address == bytes(16) or address[0] == 0xFF:
        return None
    return Claim(address, vlan, mac, flags)


@dataclass(slots=True)
class Entry:
    """Contents of struct colo_claim, except its time."""

    mac: bytes
    epoch: int
    flags: int = 0


@dataclass(slots=True)
class Claims:
    """The two maps of bpf/lib/addresses.h, and what frames change in them."""

    main: bytes | None = None  # CFG_GUEST_MAC; None: nothing is known; six zeros: there is none
    full: bool = False  # MAC_ALL
    max_macs: int = 1024
    max_addresses: int = 256
    macs: dict[bytes, Entry] = field(default_factory=dict)
    addresses: dict[tuple[bytes, int], Entry] = field(default_factory=dict)

    def note(self, frame: bytes, epoch: int) -> None:
        """Note the addresses in a frame that the guest sends."""
        if len(frame) < 14:
            return
        source = frame[6:12]
        if source != self.main and not source[0] & 1:
            if source in self.macs:
                self.macs[source].epoch = epoch
            elif len(self.macs) < self.max_macs:
                self.macs[source] = Entry(source, epoch)
        c = claimed(frame)
        if c is None or (c.mac != self.main and c.mac not in self.macs):
            return
        key, flags = (c.address, c.vlan), c.flags
        old = self.addresses.get(key)
        if old is not None:
            if old.epoch > epoch:
                return
            if old.mac == c.mac and not flags & CLAIM_SAYS_ROUTER:
                flags = old.flags
        if old is not None or len(self.addresses) < self.max_addresses:
            self.addresses[key] = Entry(c.mac, epoch, flags)

    def hear(self, frame: bytes) -> None:
        """Drop the addresses that a frame from the network claims for another machine."""
        if len(frame) < 14:
            return
        if frame[0] & 1:
            self.macs.pop(frame[6:12], None)
        c = claimed(frame)
        if c is not None:
            self.addresses.pop((c.address, c.vlan), None)

    def is_for_guest(self, frame: bytes) -> bool:
        """Return whether pvm_in mirrors the frame."""
        if self.main is None or self.full or len(frame) < 14:
            return True
        return bool(frame[0] & 1) or frame[:6] == self.main or frame[:6] in self.macs
