# SPDX-License-Identifier: GPL-2.0-or-later
"""Flow keys of frames that a guest sent: compact bytes, and their text for operators.

A key is what both guests' frames of one flow have in common: guest first, peer second, everything
in network byte order, VLANs (TPID and VID of each tag) at the end.

TCP keys are in a table of their own and have no header: source, destination, ports, tags. Their
length identifies the address family (12..28 bytes for IPv4, 36..52 for IPv6), so an untagged IPv4
key is one slice of the frame. All other keys start with three bytes: class, IP version (0: none),
number of VLANs.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from ..abi import UNMIRRORED_KEY

#: hashable identity of a flow
FlowKey = bytes

UDP, ICMP, FRAGMENT, IP, ETHER, OPAQUE, ARP, NDP = b"UIFPEOAN"
_NAMES = {UDP: "udp", ICMP: "icmp", FRAGMENT: "fragment", IP: "ip", ETHER: "ether"}
_NAMES |= {OPAQUE: "opaque", ARP: "arp", NDP: "ndp"}


def datagram_key(cls: int, version: int, ident: bytes, tags: bytes) -> FlowKey:
    """Return the key of a flow that is not TCP; `ident` is what follows the three header bytes."""
    return bytes((cls, version, len(tags) >> 2)) + ident + tags


def _address(raw: bytes) -> str:
    if len(raw) == 4:
        return str(IPv4Address(raw))
    return str(IPv6Address(raw)) if len(raw) == 16 else raw.hex(":")


def _ends(raw: bytes, size: int, ports: bytes = b"") -> str:
    a, b = _address(raw[:size]), _address(raw[size : 2 * size])
    if not ports:
        return f"{a} > {b}"
    sport, dport = int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:4], "big")
    if size == 16:
        a, b = f"[{a}]", f"[{b}]"
    return f"{a}:{sport} > {b}:{dport}"


def _vlan(tags: bytes) -> str:
    ids = [int.from_bytes(tags[i + 2 : i + 4], "big") for i in range(0, len(tags), 4)]
    return "".join(f" vlan {i}" for i in ids)


def unmirrored_key(key: FlowKey, tcp: bool) -> bytes | None:
    """Pack struct colo_unmirrored_key of a TCP or UDP flow; return None for any other."""
    if not tcp:
        if key[0] != UDP:
            return None
        tags = key[len(key) - 4 * key[2] :]
        ends = key[3 : len(key) - len(tags)]
    else:
        size = 12 if len(key) < 36 else 36
        ends, tags = key[:size], key[size:]
    half = (len(ends) - 4) // 2
    mapped = b"" if half == 16 else bytes(10) + b"\xff\xff"
    vlan = 0
    for at in range(0, len(tags), 4):
        vlan = vlan << 16 | int.from_bytes(tags[at + 2 : at + 4], "big")
    return UNMIRRORED_KEY.pack(
        mapped + ends[:half],
        mapped + ends[half : 2 * half],
        ends[2 * half : 2 * half + 2],
        ends[2 * half + 2 :],
        vlan,
        6 if tcp else 17,
    )


def describe_tcp(key: FlowKey) -> str:
    """Return the text of a TCP key, like 'tcp 10.9.0.2:80 > 10.9.0.1:4000'."""
    size, n = (4, 12) if len(key) < 36 else (16, 36)
    return f"tcp {_ends(key, size, key[2 * size : n])}{_vlan(key[n:])}"


def describe_datagram(key: FlowKey) -> str:
    """Return the text of any other key, like 'udp 10.9.0.2:53 > 10.9.0.1:4000'."""
    cls, version, tags = key[:3]
    end = len(key) - 4 * tags
    ident, vlan = key[3:end], _vlan(key[end:])
    name = _NAMES.get(cls, "?")
    if version:
        size = 4 if version == 4 else 16
        rest = ident[2 * size :]
        if cls == UDP:
            return f"{name} {_ends(ident, size, rest)}{vlan}"
        more = f" type {rest[0]}" if cls in (ICMP, NDP) else f" proto {rest[0]}"
        if len(rest) == 3:
            more += f" id {int.from_bytes(rest[1:], 'big')}"
        return f"{name} {_ends(ident, size)}{more}{vlan}"
    if len(ident) == 14:  # destination MAC first, as in the frame
        return f"{name} {ident[8:].hex(':')} > {ident[2:8].hex(':')} type 0x{ident[:2].hex()}{vlan}"
    return f"{name} {ident.hex()}{vlan}"


def tcp_port(key: FlowKey) -> int:
    """Return the service's port of a TCP key: the lower one."""
    n = 8 if len(key) < 36 else 32
    return min(int.from_bytes(key[n : n + 2], "big"), int.from_bytes(key[n + 2 : n + 4], "big"))


def datagram_name(key: FlowKey) -> tuple[str, int]:
    """Return the protocol name and the service's port (0: none) of any other key."""
    name = _NAMES.get(key[0], "?") if key else "?"
    if not key or key[0] != UDP:
        return name, 0
    n = 3 + (8 if key[1] == 4 else 32)
    ports = key[n : n + 4]
    return name, min(int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:], "big"))
