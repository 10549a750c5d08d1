# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary's connection table as the controller sees it: counting and ageing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import abi, rewrite, tcp_state
from .loader import Map

_HALF = 0x80000000


@dataclass(frozen=True, slots=True)
class Flow:
    """struct colo_flow; offsets in the 32-bit space of the header, times in ns."""

    seen_ns: int
    epoch: int
    off: int
    tsoff: int
    isn_p: int
    isn_s: int
    ts_p: int
    ts_s: int
    fin_guest: int
    fin_client: int
    state: int
    have: int
    have_client: int

    @property
    def wanted(self) -> bool:
        """Whether it has an offset, or may have one at the end of a handshake."""
        known = self.have & rewrite.HAVE_ISN_S and self.have_client & rewrite.HAVE_ISN_P
        begun = (self.have | self.have_client) & rewrite.HAVE_ANY  # a FIN begins nothing
        return bool(self.off or self.tsoff or (begun and not known))


def decode(raw: bytes) -> Flow:
    """A flow from its map value."""
    return Flow(*abi.FLOW.unpack(raw)[:13])


class FlowTable:
    """Ageing by the timeouts of tcp_state; numbers for status and metrics."""

    def __init__(self, table: Map) -> None:
        self._map = table
        self.limit = table.info.max_entries
        self.tracked = 0
        self.translated = 0
        self.wanted = 0  # translated, or in a handshake that may end so
        self.aged = 0

    def export(self, epoch: int) -> list[bytes]:
        """Connections in the guest's own numbers, or about to be: key and value of each.

        Those whose offset is of `epoch`, or for good (bpf/flow.h), and is not known to be 0.
        """
        out = []
        for key, raw in self._map.items():
            f = decode(raw)
            if f.epoch in (epoch, abi.EPOCH_BASE) and f.wanted:
                out.append(key + raw)
        return out

    def adopt(self, data: bytes, *, first: bool) -> None:
        """Offsets for good, from export() of the host whose guest this one is a copy of.

        `first`: they replace all. Raises ValueError when they are not whole, OSError when there is
        no room.
        """
        size = abi.FLOW_KEY.size + abi.FLOW.size
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes are not connections of {size}")
        if first:
            for key in list(self._map.keys()):
                self._map.delete(key)
        for at in range(0, len(data), size):
            key = data[at : at + abi.FLOW_KEY.size]
            words = abi.FLOW.unpack(data[at + abi.FLOW_KEY.size : at + size])
            mine = (time.monotonic_ns(), abi.EPOCH_BASE, *words[2:])
            self._map.set(key, abi.FLOW.pack(*mine))

    def give_up(self, epoch: int) -> int:
        """Nobody knows whether offsets of `epoch` still hold: no byte of such a connection may be
        taken for one of another place. Returns how many there are.

        Offsets are small (clones have one secret and nearly one clock, RFC 6528), so both answers
        can be in a client's window. Half of the sequence space away nothing is: the connection's
        two ends ignore each other from now on. Only while no program translates.
        """
        given_up = 0
        for key, raw in list(self._map.items()):
            words = list(abi.FLOW.unpack(raw))
            f = Flow(*words[:13])
            known = f.have & rewrite.HAVE_ISN_S and f.have_client & rewrite.HAVE_ISN_P
            if f.epoch != epoch or not f.have & rewrite.HAVE_ISN_S:
                continue  # what the guest has not said yet is learnt from whoever says it
            if known and not f.off and not f.tsoff:
                continue  # the same numbers either way
            words[2] = _HALF
            words[4] = (f.isn_s + _HALF) & 0xFFFFFFFF
            words[12] |= rewrite.HAVE_ISN_P
            self._map.set(key, abi.FLOW.pack(*words))
            given_up += 1
        return given_up

    def sweep(self, epoch: int) -> None:
        """Delete what is old or closed. Entries of former epochs have offset 0: nothing is lost."""
        now = time.monotonic_ns()
        tracked = translated = wanted = 0
        for key, raw in self._map.items():
            f = decode(raw)
            stale = f.epoch not in (epoch, abi.EPOCH_BASE)
            age = (now - f.seen_ns) / 1e9
            if age > tcp_state.timeout(f.state) or (stale and age > 1):
                self._map.delete(key)
                self.aged += 1
                continue
            tracked += 1
            if not stale and (f.off or f.tsoff):
                translated += 1
            wanted += not stale and f.wanted
        self.tracked, self.translated, self.wanted = tracked, translated, wanted
