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
