# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP events: read as they arrive, and what they report of the guest's life. Pure.

Names, reasons and actions come from QEMU's qapi/run-state.json (SHUTDOWN, RESET, POWERDOWN,
GUEST_PANICKED, GUEST_CRASHLOADED, ShutdownCause, GuestPanicAction) and qapi/block-core.json
(BLOCK_IO_ERROR). STOP and RESUME are not interpreted here: they belong to a checkpoint. The
controller acts on the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event; `ts_ns` is QEMU's timestamp as CLOCK_MONOTONIC, `seen_ns` when it was read."""

    name: str
    data: dict[str, Any]
    ts_ns: int
    seen_ns: int


def read(msg: Any, offset_ns: int, seen_ns: int) -> QmpEvent | None:
    """Parse an event (docs/interop/qmp-spec.rst of QEMU, 2.5); return None if it has no name.

    offset_ns is CLOCK_REALTIME - CLOCK_MONOTONIC. QEMU gives -1 when its clock fails. An event
    without a usable time gets one in the future, which cannot be a real one: STOP then counts as
    early and RESUME as late, which is the safe side for both.
    """
    name = msg.get("event") if isinstance(msg, Mapping) else None
    if not isinstance(name, str) or not name:
        return None
    ts, ts_ns = msg.get("timestamp"), seen_ns + 1
    if isinstance(ts, dict):
        s, us = ts.get("seconds"), ts.get("microseconds")
        if type(s) is int and type(us) is int and 0 <= s < 1 << 40 and 0 <= us < 1_000_000:
            ts_ns = s * 1_000_000_000 + us * 1000 - offset_ns
    data = msg.get("data")
    return QmpEvent(name, data if isinstance(data, dict) else {}, ts_ns, seen_ns)


class Fate(Enum):
    """What becomes of this guest."""

    OFF = auto()  # it shut itself down: neither guest is to continue
    DEAD = auto()  # it does not continue; the other one may
    ENDED = auto()  # its QEMU is being ended from outside: a death, as by kill
    CHANGED = auto()  # it continues in a state that its copy does not have
    HALTED = auto()  # it is about to stop until something on its host is repaired


@dataclass(frozen=True, slots=True)
class News:
    """The fate of the guest, and the sentence that gives the reason."""

    fate: Fate
    why: str


_BY_GUEST = {
    "guest-shutdown": "the guest has shut itself down",
    "guest-reset": "the guest has rebooted, which ends a QEMU with -no-reboot",
}
_BY_HOST = {
    "host-qmp-quit": "QEMU was told to end (`quit` over QMP)",
    "host-qmp-system-reset": "system_reset, which ends a QEMU with -no-reboot",
    "host-signal": "QEMU was ended by a signal",
    "host-ui": "QEMU's window was closed",
    "host-error": "QEMU ends because of an error on its host",
}

#: run states of a stopped QEMU; in any state not listed here a person has stopped it
STANDS_STILL = {
    "io-error": Fate.HALTED,
    "internal-error": Fate.DEAD,
    "guest-panicked": Fate.DEAD,
    "shutdown": Fate.OFF,
}


def news(event: QmpEvent, who: str) -> News | None:
    """Return what an event means for the guest `who` ("PVM", "SVM"); None: not of this kind."""
    reason, by_guest = str(event.data.get("reason", "")), event.data.get("guest") is True
    action = str(event.data.get("action", ""))
    if event.name == "SHUTDOWN":
        if reason == "guest-panic":
            return News(Fate.DEAD, f"the {who} has panicked")
        if by_guest:
            return News(Fate.OFF, _BY_GUEST.get(reason, f"the guest has ended itself ({reason})"))
        return News(Fate.ENDED, _BY_HOST.get(reason, f"QEMU ends ({reason or 'no reason given'})"))
    if event.name == "RESET":
        by = "by itself" if by_guest else "from outside"
        return News(Fate.CHANGED, f"the {who} was reset {by} ({reason or 'no reason given'})")
    if event.name == "POWERDOWN":
        return News(Fate.CHANGED, f"the {who}'s power button was pressed (system_powerdown)")
    if event.name in ("GUEST_PANICKED", "GUEST_CRASHLOADED"):
        if action == "pause" and who == "SVM":
            return None  # STOP follows: a checkpoint makes it a copy again
        fate = Fate.CHANGED if action == "run" else Fate.DEAD
        return News(fate, f"the {who} has panicked (action {action or 'unknown'})")
    if event.name == "BLOCK_IO_ERROR" and action == "stop":
        return News(Fate.HALTED, f"the {who} stops on an I/O error of {_disk(event)}")
    return None


def _disk(event: QmpEvent) -> str:
    d = event.data
    name = d.get("device") or d.get("node-name") or d.get("qom-path") or "a disk without a name"
    what = f"disk {name} ({d.get('operation', 'unknown operation')}"
    if d.get("nospace") is True:
        return f"{what}: no space left)"
    return f"{what}: {d['reason']})" if d.get("reason") else f"{what})"
