# SPDX-License-Identifier: GPL-2.0-or-later
"""Find which of QEMU's network cards is attached to the guest's tap. Pure.

QMP does not report it (there is no query-netdev before QEMU 8, and none that names a tap). The
monitor's `info network` does: it prints a line per card, and below it what the card is connected
to:

    virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01
     \\ n0: index=0,type=tap,ifname=tap-web1,script=no,downscript=no

A tap that was passed as a descriptor (libvirt) is shown as `fd=9` without a name. A card with
several queues has a pair of lines for each; only the first names its MAC address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CARD = re.compile(r"(\S[^:]*): index=\d+,type=nic,.*?macaddr=([0-9a-fA-F:]{17})")
_MORE = re.compile(r"\S[^:]*: index=[1-9]\d*,type=nic,")  # another queue of the card before
_PEER = re.compile(r" \\ \S[^:]*: index=\d+,type=tap,(?:(?:.*,)?ifname=([^,]+))?")


class NicError(ValueError):
    """The card cannot be determined; the text says what to do."""


@dataclass(slots=True)
class Card:
    """A card of the guest; `tap`: the device that it is attached to, if QEMU reports it.

    `queues`: pairs of queues between QEMU and the tap. The guest is offered them with `mq=on` only.
    """

    name: str
    mac: str
    tap: str = ""
    queues: int = 0


def at_tap(text: str, tap: str) -> Card:
    """Return the card attached to `tap`, from the answer to `info network`.

    Raises NicError when there is none, or when more than one might be it.
    """
    cards: dict[str, Card] = {}
    last: Card | None = None
    for line in text.splitlines():
        if m := _CARD.match(line):
            last = cards.setdefault(m[1], Card(m[1], m[2]))
        elif _MORE.match(line):
            continue
        elif (m := _PEER.match(line)) and last is not None:
            last.tap = m[1] or ""
            last.queues += 1
        elif not line.startswith(" "):
            last = None
    there = [c for c in cards.values() if c.tap == tap]
    if len(there) == 1:
        return there[0]
    unknown = [c for c in cards.values() if not c.tap]
    if not there and len(unknown) == 1 == len(cards):
        return unknown[0]
    names = ", ".join(f"{c.name} {c.mac} at {c.tap or 'an unnamed device'}" for c in cards.values())
    raise NicError(
        f"cannot determine which of the guest's network cards is attached to {tap} "
        f"({names or 'it has none'}): set [network] guest_mac"
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
