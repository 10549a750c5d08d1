# SPDX-License-Identifier: GPL-2.0-or-later
"""Parse QMP events as they arrive on the wire. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
