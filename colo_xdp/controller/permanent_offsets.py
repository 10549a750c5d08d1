# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that a promoted guest keeps in its own sequence numbers, on the primary's host.

A guest that took over goes on translating its old connections (bpf/promoted.bpf.c). Its next copy
needs the same offsets, and the programs step out with the last such connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..datapath.conntrack_map import ConntrackMap
from ..datapath.datapath import DataPath

log = logging.getLogger("colo_xdp.controller.primary")

SWEEP_S = 5.0
PART = 290  # connections in one message: it must fit into messages.MAX_FLOWS_TEXT


@dataclass(frozen=True, slots=True)
class Part:
    """Offsets of a NIC's connections, as one message has them; the `first` part replaces all."""

    nic: int
    first: bool
    flows: bytes


class PermanentOffsets:
    """The tables of this host's own offsets, while there are any: one for each NIC."""

    def __init__(self, nics: Sequence[DataPath]) -> None:
        self._nics = nics
        #: by the number of the NIC
        self.tables: dict[int, ConntrackMap] = {}
        for i, nic in enumerate(nics):
            if maps := nic.flows():
                self.tables[i] = ConntrackMap(*maps)
        #: the copy's host has them; a former controller may have died before it sent them
        self.sent = not self.tables

    def new_copy(self) -> None:
        """Send them again: another copy waits."""
        self.sent = not self.tables

    async def parts(self) -> list[Part]:
        """Export them, in parts of one message each; at least one for a NIC, possibly empty."""
        out: list[Part] = []
        for i, nic in enumerate(self._nics):
            entries: list[bytes] = []
            if i in self.tables:
                entries = await asyncio.to_thread(self.tables[i].export, nic.promoted_epoch)
            if entries:
                log.info("handing the offsets of %d connections to the secondary", len(entries))
            for at in range(0, max(1, len(entries)), PART):
                out.append(Part(i, at == 0, b"".join(entries[at : at + PART])))
        return out

    async def sweep(self, busy: Callable[[], bool]) -> None:
        """Age them; take the programs off with the last one, unless a checkpoint is `busy`."""
        while self.tables:
            await asyncio.sleep(SWEEP_S)
            for i, table in list(self.tables.items()):
                nic = self._nics[i]
                await asyncio.to_thread(table.sweep, nic.promoted_epoch)
                if not table.wanted and not busy():
                    del self.tables[i]
                    await asyncio.to_thread(nic.drop_guest)
                    log.info("no connection in the guest's own numbers is left at NIC %d", i)
