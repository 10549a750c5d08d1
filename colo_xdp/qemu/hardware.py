# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare what the guests see of their machines, before the memory of one is copied to the other.

QEMU loads a state only into a machine that is built alike. What it says when they differ comes
late, on the other host's stderr, and with the guest stopped. The two controllers therefore exchange
what their QEMUs report (Qmp.hardware()), and the primary names each difference. Pure.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping

#: properties that name something on the host, or that follow from it: they may differ
OF_THE_HOST = frozenset(
    (
        "netdev", "drive", "chardev", "memdev", "iothread", "romfile", "romsize", "vhostfd",
        "filename", "evdev", "audiodev", "cgroup", "backend", "display", "hostdev",
        "cyls", "heads", "secs",  # of the image's size, which is compared by itself
    )
)  # fmt: skip
#: devices whose properties are the user's choice; those of others may be set by the firmware
CHOSEN = (
    "virtio-",
    "vhost-",
    "e1000",
    "igb",
    "rtl8139",
    "vmxnet3",
    "ide-",
    "scsi-",
    "nvme",
    "usb-",
)
#: end of the names of what is compared only where both hosts know it
IF_KNOWN = ", queues of its tap"
MAX_BYTES = 1 << 20  # of a peer's report
SHOWN = 6  # differences in one message

_DEVICE = re.compile(r'( *)dev: ([^,]+), id "([^"]*)"')
_ADDRESS = re.compile(r" *class .*, addr ([0-9a-f:.]+)")
_PROPERTY = re.compile(r" *([A-Za-z][\w.-]*) = (.*)")

Hardware = dict[str, str]


def parse_qtree(text: str) -> Hardware:
    """Return the properties in the answer to HMP `info qtree`, by device and property.

    A device is named by its type, and by its PCI address, its id or its number among those of its
    type. Properties that begin with x- are QEMU's own and follow from version and machine.
    """
    found: Hardware = {}
    open_: list[tuple[int, str]] = []  # indentation and name of the devices around
    count: dict[str, int] = {}
    for block in _devices(text):
        m = _DEVICE.match(block[0])
        assert m is not None
        depth, kind = len(m[1]), m[2]
        while open_ and open_[-1][0] >= depth:
            open_.pop()
        address = next((a[1] for line in block if (a := _ADDRESS.match(line))), "")
        around = open_[-1][1] if open_ else ""
        name = f"{around} / {kind}" if around and not address else kind
        count[name] = count.get(name, 0) + 1
        if address or m[3]:
            name += f" at {address}" if address else f" {m[3]}"
        elif count[name] > 1:
            name += f" #{count[name]}"
        open_.append((depth, name))
        found[name] = "there"
        for line in block[1:]:
            p = _PROPERTY.match(line)
            chosen = kind.startswith(CHOSEN) and not (p and p[1].startswith("x-"))
            if p and chosen and p[1] not in OF_THE_HOST:
                found[f"{name}, {p[1]}"] = p[2].strip()
    return found


def _devices(text: str) -> Iterator[list[str]]:
    """Yield the lines of each device, without those of the devices on its buses."""
    block: list[str] = []
    for line in text.splitlines():
        if _DEVICE.match(line):
            if block:
                yield block
            block = [line]
        elif block:
            block.append(line)
    if block:
        yield block


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return one phrase per difference between the primary's machine and the secondary's."""
    gone = [name for name in {**mine, **theirs} if "there" in (mine.get(name), theirs.get(name))]
    gone = [name for name in gone if mine.get(name) != theirs.get(name)]
    out = []
    for name in {**mine, **theirs}:
        a, b = mine.get(name), theirs.get(name)
        if a == b or any(name.startswith((f"{g},", f"{g} /")) for g in gone):
            continue  # what belongs to a device that is not there is not named as well
        if name.endswith(IF_KNOWN) and None in (a, b):
            continue
        if name in gone:
            out.append(f"{name} only {'here' if b is None else 'there'}")
        else:
            out.append(f"{name}: {_shown(a)} here, {_shown(b)} there")
    return out


def tap_queues(mac: str, queues: int) -> Hardware:
    """Return what is compared of a card's tap.

    QEMU loads a card's state only if the other one had as many queues (`max_queue_pairs`), whether
    the guest uses them or not, and `info qtree` does not show them. Not known where `[network]
    guest_mac` makes the question needless, or from an earlier release.
    """
    return {f"network card {mac}{IF_KNOWN}": str(queues)} if queues else {}


def _shown(value: str | None) -> str:
    return "none" if value is None else value


def refusal(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return why these two QEMUs cannot be a pair, or an empty string."""
    found = differences(mine, theirs)
    if not found:
        return ""
    settings = [d for d in found if d.startswith("[")]
    if settings:  # of the two configurations (qemu/migration.py)
        return f"COLO is not entered: both hosts must have the same: {'; '.join(settings)}"
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        "COLO is not entered: the QEMU there (the secondary's) is built in another way than the "
        f"one here: {'; '.join(found[:SHOWN])}{more}"
    )


def encode(hardware: Mapping[str, str]) -> str:
    """Return a report as text for a message of the control channel."""
    return base64.b64encode(zlib.compress(json.dumps(hardware).encode(), 9)).decode()


def decode(text: str) -> Hardware:
    """Return a peer's report. Raises ValueError."""
    unpack = zlib.decompressobj()
    try:
        raw = unpack.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    except zlib.error as e:
        raise ValueError(f"hardware: {e}") from e
    if unpack.unconsumed_tail or not unpack.eof:
        raise ValueError("hardware: too long, or cut off")
    found = json.loads(raw)
    if not isinstance(found, dict) or any(type(v) is not str for v in found.values()):
        raise ValueError("hardware: expected names with text")
    return found
