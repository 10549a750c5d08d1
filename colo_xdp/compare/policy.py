# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that decide which of the guest's flows are compared. Pure.

The first rule that matches decides. A flow that none matches falls to the defaults at the end: ARP
and NDP pass (both are answered from tables that differ for reasons no client sees), everything else
is compared. A flow is judged once, when it is first seen; new rules judge all flows again.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from .. import validate
from ..net.packet import ACK, SYN, Kind, Packet

MAX_RULES = 64

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class RuleAction(StrEnum):
    """What is done with a flow. Clients' frames reach both guests unless it is DROP_SECONDARY."""

    COMPARE = "compare"  # held until the SVM has sent the same
    PASS = "pass"  # released at once; the SVM's output is dropped uncompared
    MIRROR_ONLY = "mirror-only"  # released at once, compared later; differences are only counted
    DROP_SECONDARY = "drop-secondary"  # as pass, and clients' frames do not reach the SVM


#: kinds of frames by the names in a rule's `protocol`
PROTOCOLS: dict[str, frozenset[Kind]] = {
    "any": frozenset(Kind),
    "tcp": frozenset((Kind.TCP,)),
    "udp": frozenset((Kind.UDP,)),
    "icmp": frozenset((Kind.ICMP,)),
    "arp": frozenset((Kind.ARP,)),
    "ndp": frozenset((Kind.NDP,)),
    # fragments: by the datagram they make up
    "other": frozenset((Kind.IP, Kind.ETHER, Kind.OPAQUE)),
}


def _network(v: object) -> str | None:
    want = "expected an address or a network such as 10.0.0.0/8"
    if not isinstance(v, str):
        return want
    try:
        ipaddress.ip_network(v)
    except ValueError as e:
        return f"{want} ({e})"
    return None


def _port_range(text: str) -> tuple[int, int] | None:
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        return None
    a, b = int(low), int(high) if dash else int(low)
    return (a, b) if 0 < a <= b <= 65535 else None


def _ports(v: object) -> str | None:
    if isinstance(v, str) and _port_range(v):
        return None
    return 'expected a port or a range, as text: "53" or "6000-6010"'


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One [[rule]]: which flows match, and what is done with them."""

    name: str = validate.key(
        validate.pattern(
            r"(?!default)[a-z0-9][a-z0-9-]{0,31}",
            "1 to 32 of a-z, 0-9 and -, not beginning with default",
        ),
        "name of the rule, and label of its counters",
    )
    action: str = validate.key(
        validate.choice(*(str(a) for a in RuleAction)),
        "what is done with the flow",
    )
    protocol: str = validate.key(
        validate.choice(*PROTOCOLS),
        "protocol of the flow",
        default="any",
    )
    address: str = validate.key(
        validate.or_empty(_network, "any"),
        'address or network of the other end; "": any',
        default="",
    )
    port: str = validate.key(
        validate.or_empty(_ports, "any"),
        'port or port range of the guest (TCP, UDP); "": any',
        default="",
    )
    peer_port: str = validate.key(
        validate.or_empty(_ports, "any"),
        'port or port range of the other end; "": any',
        default="",
    )
    direction: str = validate.key(
        validate.choice("any", "in", "out"),
        'which side opened the connection: "in": a client, "out": the guest; if no SYN '
        "was seen, the lower port is taken for the server's",
        default="any",
    )

    nic: str = validate.key(
        validate.or_empty(validate.pattern(r"[a-z0-9-]{1,10}", "a name"), "any"),
        'name of the NIC ([[network]]) whose flows match; "": any',
        default="",
    )

    def contradiction(self) -> str:
        """Return why no flow can ever match, or an empty string."""
        ported = {"any", "tcp", "udp"}
        if (self.port or self.peer_port) and self.protocol not in ported:
            return f"{self.protocol} has no ports"
        if self.address and self.protocol == "arp":
            return "arp has no address of the other end here; use no address"
        if self.direction != "any" and self.protocol not in ported:
            return f"{self.protocol} has no direction; use tcp or udp"
        return ""

    @cached_property
    def _net(self) -> IPNetwork | None:
        return ipaddress.ip_network(self.address) if self.address else None

    @cached_property
    def _port(self) -> tuple[int, int] | None:
        return _port_range(self.port)

    @cached_property
    def _peer_port(self) -> tuple[int, int] | None:
        return _port_range(self.peer_port)

    def fits(self, s: Subject) -> bool:
        """Return whether the rule matches this flow."""
        if s.kind not in PROTOCOLS[self.protocol]:
            return False
        if self._net is not None:
            if s.address is None or s.address.version != self._net.version:
                return False
            if s.address not in self._net:
                return False
        if self._port and not self._port[0] <= s.port <= self._port[1]:
            return False
        if self._peer_port and not self._peer_port[0] <= s.peer_port <= self._peer_port[1]:
            return False
        return self.direction in ("any", s.direction)


@dataclass(frozen=True, slots=True)
class Subject:
    """Properties that a rule can match. Ports are 0 and direction is "" if there are none."""

    kind: Kind
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None
    port: int
    peer_port: int
    direction: str


def subject(p: Packet, direction: str = "") -> Subject:
    """Return the properties of the flow of a frame that the guest sent.

    direction: if it is known already.
    """
    f, kind = p.frame, p.kind
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    if p.l3 and kind not in (Kind.ARP, Kind.ETHER, Kind.OPAQUE):
        if f[p.l3] >> 4 == 4:
            address = ipaddress.IPv4Address(f[p.l3 + 16 : p.l3 + 20])
        else:
            address = ipaddress.IPv6Address(f[p.l3 + 24 : p.l3 + 40])
    port = peer_port = 0
    if kind in (Kind.TCP, Kind.UDP):
        port = int.from_bytes(f[p.l4 : p.l4 + 2], "big")
        peer_port = int.from_bytes(f[p.l4 + 2 : p.l4 + 4], "big")
        if direction:
            pass
        elif kind is Kind.TCP and p.flags & SYN:
            direction = "in" if p.flags & ACK else "out"
        else:
            direction = "in" if port <= peer_port else "out"
    return Subject(kind, address, port, peer_port, direction)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision of a rule."""

    rule: str
    action: RuleAction


def _defaults(arp: str, ndp: str, other: str) -> tuple[Rule, ...]:
    return (
        Rule(name="default-arp", action=arp, protocol="arp"),
        Rule(name="default-ndp", action=ndp, protocol="ndp"),
        Rule(name="default-other", action=other, protocol="other"),
        Rule(name="default", action="compare"),
    )


@dataclass(frozen=True)
class Policy:
    """Rules in force. `arp`, `ndp` and `other` are the actions of the defaults."""

    rules: tuple[Rule, ...] = ()
    arp: str = "pass"
    ndp: str = "pass"
    other: str = "compare"
    order: tuple[Rule, ...] = field(init=False)
    verdicts: tuple[Verdict, ...] = field(init=False)

    def __post_init__(self) -> None:
        order = (*self.rules, *_defaults(self.arp, self.ndp, self.other))
        object.__setattr__(self, "order", order)
        object.__setattr__(
            self, "verdicts", tuple(Verdict(r.name, RuleAction(r.action)) for r in order)
        )

    def judge(self, s: Subject) -> Verdict:
        """Return what is done with a flow."""
        return next(v for r, v in zip(self.order, self.verdicts, strict=True) if r.fits(s))
