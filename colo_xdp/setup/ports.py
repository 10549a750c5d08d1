# SPDX-License-Identifier: GPL-2.0-or-later
"""What other pairs of a host use, and a block of ports that none of them does. Pure.

A pair takes PER_PAIR ports in a row, the same on both hosts, so that a firewall needs one range.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .. import validate
from ..config.schema import Config

FIRST = 9846
PER_PAIR = 10
LAST = 65535 - PER_PAIR + 1


class NoPorts(ValueError):
    """No block of ports is free."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one pair. VNIs have the numbers of the block, too."""

    base: int

    @property
    def control(self) -> int:
        return self.base

    @property
    def metrics(self) -> int:
        return self.base + 1

    @property
    def migration(self) -> int:
        return self.base + 2

    @property
    def nbd(self) -> int:
        return self.base + 3

    def heartbeat(self, i: int) -> int:
        """Return that of heartbeat link `i` (UDP), of 4 at most."""
        return self.base + 4 + i

    def vni(self, i: int) -> int:
        """Return that of the VXLAN of NIC `i`, of 8 at most."""
        return self.base + i

    @property
    def numbers(self) -> range:
        return range(self.base, self.base + PER_PAIR)

    def __str__(self) -> str:
        return f"{self.base} to {self.base + PER_PAIR - 1}"


def of(config: Config) -> Ports | None:
    """Return the block of a pair that init has set up; None if another number begins it."""
    control = validate.split(config.peer.local)
    metrics = validate.split(config.metrics.listen)
    if control is None or metrics is None or control[1] > LAST or metrics[1] != control[1] + 1:
        return None
    return Ports(control[1])


def choose(taken: Iterable[int]) -> Ports:
    """Return the first block, counted from FIRST, that contains none of these numbers.

    Raises NoPorts.
    """
    numbers = set(taken)
    for base in range(FIRST, LAST + 1, PER_PAIR):
        if numbers.isdisjoint(Ports(base).numbers):
            return Ports(base)
    raise NoPorts(f"no {PER_PAIR} free ports in a row from {FIRST} on")


@dataclass(frozen=True, slots=True)
class Use:
    """One thing that a pair has for itself; `what` is such as "device tap-web1"."""

    pair: str
    key: str
    what: str
    number: int = 0  # of a port or a VNI


def uses(config: Config) -> Iterator[Use]:
    """Return everything in a configuration that no other pair of this host may have."""
    pair = config.pair
    for net in config.networks:
        yield Use(pair, "[network] tap", f"device {net.tap}")
        yield Use(pair, "[network] peer_link", f"device {net.peer_link}")
        if net.vxlan_remote:
            vni = net.vxlan_vni
            yield Use(pair, "[network] vxlan_vni", f"VNI {vni}", vni)
    for key, path in (("qmp", config.qemu.qmp), ("qmp_oob", config.qemu.qmp_oob)):
        if path:
            yield Use(pair, f"[qemu] {key}", f"socket {path}")
    addresses = {
        "[peer] local": config.peer.local,
        "[metrics] listen": config.metrics.listen,
        "[nbd] local": config.nbd.local,
    }
    for key, address in addresses.items():
        if (where := validate.split(address)) is not None:
            yield Use(pair, key, f"port {where[1]}", where[1])
    for text in config.peer.heartbeat_links:
        if (ends := validate.path_ends(text)) is not None:
            yield Use(pair, "[peer] heartbeat_links", f"port {ends[0][1]}", ends[0][1])
    for key in ("migrate_uri", "reverse_uri"):
        if m := re.fullmatch(r"tcp:.*:(\d{1,5})(?:,.*)?", getattr(config.qemu, key)):
            yield Use(pair, f"[qemu] {key}", f"port {m[1]}", int(m[1]))


def conflicts(config: Config, others: Iterable[Config]) -> list[str]:
    """Return a sentence for each thing of this pair that another pair of the host has, too."""
    theirs = {use.what: use for other in others for use in uses(other)}
    found: dict[str, str] = {}
    for use in uses(config):
        if there := theirs.get(use.what):
            found[use.what] = (
                f"{use.key}: {use.what} is that of pair {there.pair} ({there.key} in its file)"
            )
    return list(found.values())
