# SPDX-License-Identifier: GPL-2.0-or-later
"""Find which of QEMU's network cards is attached to the guest's tap. Pure.

QMP does not report it (there is no query-netdev before QEMU 8, and none that names a tap). The
monitor's `info network` does: it prints a line per card, and below it what the card is connected
to:

    virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01
     \\ n0: index=0,type=tap,ifname=tap-web1,script=no,downscript=no

A tap that was passed as a descriptor (libvirt) is shown as `fd=9` without a name. A card with
several queues has a pair of lines for each; only the first names its MAC address. Cards at a hub
are listed below it (`hub 0`), with the port in front of the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CARD = re.compile(
    r"( \\ \S+?: )?(\S[^:]*): index=0,type=nic(?:,(?:.*?macaddr=([0-9a-fA-F:]{17}))?|$)"
)
_MORE = re.compile(r"\S[^:]*: index=[1-9]\d*,type=nic,")  # another queue of the card before
_BACKEND = re.compile(r" \\ \S[^:]*: index=\d+,type=([^,]+)(?:,(.*))?")
_IFNAME = re.compile(r"(?:^|,)ifname=([^,]+)")


class NicError(ValueError):
    """The card cannot be determined; the text says what to do."""


@dataclass(slots=True)
class Card:
    """A card of the guest.

    `backend`: the type of what it is attached to, such as "tap"; "": nothing. `tap`: the device, if
    QEMU reports it. `queues`: pairs of queues between QEMU and the tap; the guest is offered them
    with `mq=on` only.
    """

    name: str
    mac: str
    backend: str = ""
    tap: str = ""
    queues: int = 0

    def __str__(self) -> str:
        at = self.tap or (f"an unnamed {self.backend} device" if self.backend else "no device")
        return f"{self.name} {self.mac} at {at}"


def parse(text: str) -> list[Card]:
    """Return the guest's cards, from the answer to `info network`."""
    cards: dict[str, Card] = {}
    last: Card | None = None
    for line in text.splitlines():
        if m := _CARD.match(line):
            last = cards.setdefault(m[2], Card(m[2], m[3] or "", "hubport" if m[1] else ""))
            last = None if m[1] else last
        elif _MORE.match(line):
            continue
        elif (m := _BACKEND.match(line)) and last is not None:
            last.backend = m[1]
            if m[1] == "tap":
                last.queues += 1
                if named := _IFNAME.search(m[2] or ""):
                    last.tap = named[1]
        elif not line.startswith(" "):
            last = None
    return list(cards.values())


def at_tap(cards: list[Card], tap: str) -> Card:
    """Return the card attached to `tap`.

    Raises NicError when there is none, or when more than one might be it.
    """
    there = [c for c in cards if c.tap == tap]
    if len(there) == 1:
        return there[0]
    unknown = [c for c in cards if not c.tap]
    if not there and len(unknown) == 1 == len(cards):
        return unknown[0]
    names = ", ".join(map(str, cards))
    raise NicError(
        f"cannot determine which of the guest's network cards is attached to {tap} "
        f"({names or 'it has none'}): set [network] guest_mac"
    )


def refusal(cards: list[Card], taps: Mapping[str, str]) -> str:
    """Return why a guest with these cards cannot be one of a pair, or an empty string.

    `taps`: the configured taps with their guest_mac ("" if there is none). What a card that is not
    among them sends would leave both hosts, uncompared.
    """
    macs = {mac.lower() for mac in taps.values() if mac}
    alive = [c for c in cards if c.backend]
    unnamed = [c for c in alive if c.backend == "tap" and not c.tap and c.mac.lower() not in macs]
    if len(unnamed) == len(taps) == len(alive) == 1:
        unnamed = []  # the only card, at the only tap
    lost = [c for c in alive if c in unnamed or c.backend != "tap" or (c.tap and c.tap not in taps)]
    here = {c.tap for c in alive} | {c.mac.lower() for c in alive}
    empty = [tap for tap, mac in taps.items() if tap not in here and mac.lower() not in here]
    if empty and not lost and cards and len(taps) > 1:
        return f"no network card of the guest is at {' and '.join(empty)}, which [network] names"
    if not lost:
        return ""
    return (
        "these network cards of the guest are at no tap of the configuration, so both hosts would "
        f"let out what they send: {', '.join(map(str, lost))}; give each a [[network]] (with "
        "guest_mac where QEMU does not name the tap), or take it away"
    )


@dataclass(frozen=True, slots=True)
class Multiqueue:
    """How many queues lie between the guest and the tap, and what the guest can use of them."""

    queues: int  # QEMU's at the tap
    mq: bool  # whether the card offers more than one
    vectors: int  # interrupts of the card; 0: not known
    vcpus: int

    def obstacles(self) -> list[tuple[str, str]]:
        """Return what keeps the guest from using all queues, each with a remedy."""
        n = self.queues
        if n <= 1:
            return []
        device = f"-device virtio-net-pci,...,mq=on,vectors={2 * n + 2}"
        found = []
        if not self.mq:
            found.append((f"the tap has {n}, and the card offers the guest one (mq=off)", device))
        elif 0 < self.vectors < 2 * n + 2:
            found.append((f"{self.vectors} interrupts for {n} queues: they share them", device))
        if self.vcpus < n:
            found.append(
                (f"{n} for a guest with {self.vcpus} vCPUs, which uses no more than those",
                 f"queues={self.vcpus}, or -smp {n}; alike on both hosts")
            )  # fmt: skip
        return found


def multiqueue(card: Card, hardware: Mapping[str, str], vcpus: int) -> Multiqueue:
    """Return what is known of a card's queues, from parse_qtree()'s answer."""
    mac = f'"{card.mac}"'
    name = next((k[:-5] for k, v in hardware.items() if k.endswith(", mac") and v == mac), "")
    vectors = hardware.get(f"{name.partition(' / ')[0]}, vectors", "0").split()[0]
    return Multiqueue(
        card.queues,
        hardware.get(f"{name}, mq") == "true",
        int(vectors) if vectors.isdecimal() else 0,
        vcpus,
    )
