# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that a promoted guest keeps in its own sequence numbers, on the primary's host.

A guest that took over goes on translating its old connections (bpf/promoted.bpf.c). Its next copy
needs the same offsets, and the programs step out with the last such connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..datapath.conntrack_map import ConntrackMap
from ..datapath.datapath import DataPath

log = logging.getLogger("colo_xdp.controller.primary")

SWEEP_S = 5.0
PART = 290  # connections in one message: it must fit into messages.MAX_FLOWS_TEXT


class PermanentOffsets:
    """The table of this host's own offsets, while there are any."""

    def __init__(self, datapath: DataPath) -> None:
        self._dp = datapath
        tables = datapath.flows()
        self.table = ConntrackMap(*tables) if tables else None
        #: the copy's host has them; a former controller may have died before it sent them
        self.sent = self.table is None

    def new_copy(self) -> None:
        """Send them again: another copy waits."""
        self.sent = self.table is None

    async def parts(self) -> list[bytes]:
        """Export them, in parts of one message each; at least one, possibly empty."""
        entries: list[bytes] = []
        if self.table is not None:
            entries = await asyncio.to_thread(self.table.export, self._dp.promoted_epoch)
        if entries:
            log.info("handing the offsets of %d connections to the secondary", len(entries))
        parts = [b"".join(entries[i : i + PART]) for i in range(0, len(entries), PART)]
        return parts or [b""]

    async def sweep(self, busy: Callable[[], bool]) -> None:
        """Age them; take the programs off with the last one, unless a checkpoint is `busy`."""
        while self.table is not None:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(self.table.sweep, self._dp.promoted_epoch)
            if not self.table.wanted and not busy():
                self.table = None
                await asyncio.to_thread(self._dp.drop_guest)
                log.info("no connection in the guest's own numbers is left")
