# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary's connection table as the controller sees it: counting, ageing, export."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .. import abi
from ..conntrack import rewriter
from ..conntrack.timeouts import timeout
from .maps import Map

_HALF = 0x80000000


@dataclass(slots=True)
class ConntrackEntry(rewriter.TrackedConnection):
    """Contents of struct colo_flow; offsets are 32-bit differences, times are in ns."""

    seen_ns: int = 0

    @property
    def certain(self) -> bool:
        """Return whether its offset is known."""
        return bool(self.have & rewriter.HAVE_ISN_S) and self.known

    @property
    def wanted(self) -> bool:
        """Return whether it has an offset, or may have one at the end of a handshake."""
        begun = (self.have | self.have_client) & rewriter.HAVE_ANY  # a FIN begins nothing
        return bool(self.off or self.tsoff or (begun and not self.certain))


def decode(raw: bytes) -> ConntrackEntry:
    """Decode a map value."""
    fields = abi.FLOW.unpack(raw)
    f = ConntrackEntry(*fields[1:])
    f.seen_ns = fields[0]
    return f


class ConntrackMap:
    """Ages entries by conntrack/timeouts.py, and counts them for status and metrics.

    `opening`: connections whose client has not yet shown that it receives the guest's segments
    (bpf/lib/conntrack.h).
    """

    def __init__(self, table: Map, opening: Map) -> None:
        self._map, self._opening = table, opening
        self.limit = table.info.max_entries
        self.tracked = 0
        self.opening = 0
        self.translated = 0
        self.wanted = 0  # translated, or in a handshake that may end so
        self.aged = 0

    def _all(self) -> Iterator[tuple[Map, bytes, bytes]]:
        """Yield map, key and value of every entry.

        What moves meanwhile may come twice, or not at all.
        """
        for m in (self._opening, self._map):
            for key, raw in m.items():
                yield m, key, raw

    def export(self, epoch: int) -> list[bytes]:
        """Return key and value of each connection in the guest's own numbers, or about to be.

        These are the entries whose offset belongs to `epoch`, or is permanent
        (bpf/lib/conntrack.h), and is not known to be 0.
        """
        out = {}
        for _, key, raw in self._all():
            f = decode(raw)
            if f.epoch in (epoch, abi.EPOCH_BASE) and f.wanted:
                out[key] = key + raw
        return list(out.values())

    def adopt(self, data: bytes, *, first: bool) -> None:
        """Add permanent offsets from export() of the host whose guest this one is a copy of.

        first: they replace all entries. Raises ValueError if `data` is truncated, OSError if there
        is no room.
        """
        size = abi.FLOW_KEY.size + abi.FLOW.size
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes are not connections of {size}")
        if first:
            for m in (self._map, self._opening):
                for key in list(m.keys()):
                    m.delete(key)
        for at in range(0, len(data), size):
            key = data[at : at + abi.FLOW_KEY.size]
            fields = abi.FLOW.unpack(data[at + abi.FLOW_KEY.size : at + size])
            mine = (time.monotonic_ns(), abi.EPOCH_BASE, *fields[2:])
            self._map.set(key, abi.FLOW.pack(*mine))

    def give_up(self, epoch: int) -> int:
        """Give up connections whose offsets of `epoch` may no longer hold; return how many.

        No byte of such a connection may be taken for one of another position. Offsets are small
        (clones have one secret and nearly one clock, RFC 6528), so both interpretations can be
        within a client's window. Half of the sequence space away nothing is: the connection's two
        ends ignore each other from now on. Call this only while no program translates.
        """
        given_up = 0
        for m, key, raw in list(self._all()):
            f = decode(raw)
            if f.epoch != epoch or not f.have & rewriter.HAVE_ISN_S:
                continue  # what the guest has not sent yet is learnt from either guest
            if f.certain and not f.off and not f.tsoff:
                continue  # the same numbers either way
            fields = list(abi.FLOW.unpack(raw))
            fields[2] = _HALF
            fields[4] = (f.isn_s + _HALF) & 0xFFFFFFFF
            fields[12] |= rewriter.HAVE_ISN_P
            fields[13] = 0  # whatever the PVM's SYN has shown
            m.set(key, abi.FLOW.pack(*fields))
            given_up += 1
        return given_up

    def sweep(self, epoch: int) -> None:
        """Delete entries that are old or closed.

        Entries of former epochs have offset 0, so nothing is lost.
        """
        now = time.monotonic_ns()
        tracked = opening = translated = wanted = 0
        for m, key, raw in self._all():
            f = decode(raw)
            stale = f.epoch not in (epoch, abi.EPOCH_BASE)
            age = (now - f.seen_ns) / 1e9
            if age > timeout(f.state) or (stale and age > 1):
                m.delete(key)
                self.aged += 1
                continue
            if m is self._map:
                tracked += 1
            elif not stale:
                opening += 1
            if not stale and (f.off or f.tsoff):
                translated += 1
            wanted += not stale and f.wanted
        self.tracked, self.opening = tracked, opening
        self.translated, self.wanted = translated, wanted
