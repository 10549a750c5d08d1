# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU that follows one that is over: looked for, or started by `[qemu] incoming`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from ..config.file import Config
from ..failover.states import State
from ..qemu.qmp import QmpError
from ..qemu.supervisor import INCOMING_S, QMP_RETRY_S, QemuSupervisor


class Replaceable(Protocol):
    """A controller whose guest is over."""

    config: Config
    qemu: QemuSupervisor
    state: State
    role_changed: bool

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...

    def superseded(self) -> bool:
        """Whether this host's guest is worthless, since the other one certainly serves alone."""
        ...

    async def leave_network(self) -> None:
        """Take the tap of a worthless guest out of the bridge."""

    async def on_replacement_qemu(self) -> None:
        """Accept a new QEMU that waits for the other guest's state."""


class Replacement:
    """Replaces a QEMU that is over by one that waits for the other guest's state (-incoming)."""

    def __init__(self, controller: Replaceable) -> None:
        self._c = controller
        self.wanted = False  # asked for by a person here or on the other host: start one at once
        self.off = False  # this host is about to go: no new copy here, but for a person's request
        self._search: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look for one until this controller is stopped no more, or its role has changed."""
        if self._search is None or self._search.done():
            self._search = self._c.spawn(self._run())

    async def _run(self) -> None:
        c, started = self._c, 0.0
        while c.state is State.STOPPED and not c.role_changed:
            await asyncio.sleep(QMP_RETRY_S)
            if self.wanted:
                self.off = False
            if self.off or not c.superseded():
                continue
            await c.leave_network()
            if not c.qemu.qmp.connected:
                with contextlib.suppress(QmpError):
                    await c.qemu.reconnect()
            status, waits = "", False
            with contextlib.suppress(QmpError):
                status = await c.qemu.qmp.status()
                waits = await c.qemu.waits()
            if waits:
                await c.on_replacement_qemu()
                continue
            with contextlib.suppress(QmpError):
                if status:
                    await c.qemu.quit()
            wanted, self.wanted = self.wanted, False
            now = time.monotonic()
            # also by QemuSupervisor.connect(), where a copy was missing
            started = max(started, c.qemu.last_start)
            if c.config.qemu.incoming and (wanted or now - started > INCOMING_S):
                started = now
                await c.qemu.start_incoming()
