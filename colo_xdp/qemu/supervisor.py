# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU over QMP: found, kept in touch with, missed when it is gone, and started anew."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from .. import user_command
from ..clock import TICK_S
from .event import QmpEvent
from .nic import NicError
from .qmp import QemuInfo, Qmp, QmpError, QmpTimeout, refusal

log = logging.getLogger("colo_xdp")

QMP_RETRY_S = 0.2
DEATH_S = 2.0  # how long a lost QMP connection may wait for the tap's carrier to tell why
WATCH_S = 0.5
HUNG_S = 1.0  # QEMU answers x-colo-lost-heartbeat in 0.1 s; after this its main loop hangs
IN_COLO = ("colo", "active")  # states of the migration that x-colo-lost-heartbeat ends
INCOMING_S = 10.0  # deadline of the command that starts a QEMU, and the time between two tries


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """What the configuration says of it."""

    pair: str
    name: str  # of its guest, for people: PVM or SVM
    qmp: str
    qmp_oob: str  # the second socket, or empty
    timeout_s: float
    tap: str
    guest_mac: str  # empty: QEMU is asked
    incoming: tuple[str, ...]  # the command that starts one which waits


class Stakes(Enum):
    """What depends on the QEMU that is there."""

    NOTHING_YET = "nothing yet"  # one that is gone is waited for
    GUEST = "guest"  # its end is a death
    WATCHED = "watched"  # that too, and it is to answer at any time
    OVER = "over"  # somebody else looks for the next one


class Owner(Protocol):
    """Who the guest belongs to, and what is told to it."""

    @property
    def stakes(self) -> Stakes:
        """What depends on the QEMU now."""
        ...

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task whose failure is looked at."""
        ...

    def on_qmp_event(self, event: QmpEvent) -> None:
        """QEMU says something."""

    async def on_qemu(self) -> None:
        """QMP is (again) connected. Raises QmpError."""

    def on_qemu_found(self, *, there: bool) -> None:
        """Somebody has looked for one."""

    def on_qemu_refused(self, why: str) -> None:
        """It is none that this release can work with."""

    def on_qemu_gone(self) -> None:
        """The one that nothing depended on yet is gone; the next one is waited for."""

    def on_guest_gone(self, *, hung: bool = False) -> None:
        """It is dead, or `hung` for good."""

    @property
    def needs_copy(self) -> bool:
        """Whether the other guest serves the clients and this host lacks a QEMU for its copy."""
        ...

    def reconsider(self) -> None:
        """Something has changed."""


class QemuSupervisor:
    """Looks after this host's QEMU."""

    def __init__(
        self,
        options: QemuOptions,
        owner: Owner,
        tap_alive: Callable[[], bool],
        is_at: Callable[..., None],
    ) -> None:
        """`tap_alive`: the kernel's word that somebody holds the guest's tap. `is_at`: tell the
        data path the guest's MAC addresses; may raise OSError."""
        self.options, self._owner = options, owner
        self._tap_alive, self._is_at = tap_alive, is_at
        self.info: QemuInfo | None = None
        self.first_mac = ""  # of the guest, as QEMU or the configuration has told
        self._starting: asyncio.subprocess.Process | None = None  # the command qemu.incoming
        self.qmp = self._new_qmp()
        self.oob: Qmp | None = None  # the second socket, if one is configured

    # ---- connecting

    def _new_qmp(self) -> Qmp:
        o = self.options
        return Qmp(o.qmp, o.name, o.timeout_s, self.on_event, self._on_closed)

    def on_event(self, event: QmpEvent) -> None:
        """QEMU says something."""
        log.debug("%s %s %s", self.qmp.name, event.name, event.data)
        if event.name == "NIC_RX_FILTER_CHANGED":
            self._owner.spawn(self.learn_macs())
        self._owner.on_qmp_event(event)

    def _on_closed(self, why: str) -> None:
        log.warning("%s", why)
        if self._owner.stakes is Stakes.OVER:
            return
        self._owner.spawn(self._after_loss()).add_done_callback(lambda _t: self._owner.reconsider())

    async def _after_loss(self) -> None:
        """QMP is gone: dead QEMU (its tap has no carrier) or only a lost socket (connect again)."""
        end = time.monotonic() + DEATH_S
        while time.monotonic() < end:
            if not await asyncio.to_thread(self._tap_alive):
                if self._owner.stakes is Stakes.NOTHING_YET:  # wait for the next one
                    self._owner.on_qemu_gone()
                    self.qmp = self._new_qmp()
                    await self.connect()
                else:
                    self._owner.on_guest_gone()
                return
            with contextlib.suppress(QmpError):
                await self.reconnect()
                log.info("QMP is back")
                await self._owner.on_qemu()
                return
            await asyncio.sleep(TICK_S)
        # neither QMP nor a word from the kernel: shut the path, then say so
        self._owner.on_guest_gone()

    async def reconnect(self) -> None:
        """A connection in place of the one that was lost. Raises QmpError."""
        self.qmp = self._new_qmp()
        self.info = await self.qmp.connect()
        await self._connect_oob()
        await self.learn_macs()

    async def connect(self) -> None:
        """Wait for a QEMU that can be worked with, or until it is certain that there is none.

        Where a copy of the other guest is missing, `[qemu] incoming` is run again and again: an
        SVM's QEMU exits when an entry into COLO breaks off while it loads (process_incoming_
        migration_co() in QEMU's migration/migration.c), and its controller may have died with it.
        """
        said = ""
        missing_since = time.monotonic()
        while True:
            try:
                self.info = await self.qmp.connect()
                self._owner.on_qemu_found(there=True)
            except QmpError as e:
                there = await asyncio.to_thread(self._tap_alive)
                self._owner.on_qemu_found(there=there)
                if self._owner.stakes is not Stakes.NOTHING_YET and not there:
                    self._owner.on_guest_gone()  # it died while nobody looked
                    self._owner.reconsider()
                    return
                if str(e) != said:
                    said = str(e)
                    log.info("%s; waiting for it", e)
                now = time.monotonic()
                if there or not self.options.incoming or not self._owner.needs_copy:
                    missing_since = now
                elif now - missing_since > INCOMING_S:
                    missing_since = now
                    await self.start_incoming()
                await asyncio.sleep(QMP_RETRY_S)
                continue
            await self._connect_oob()
            await self.learn_macs()
            why = refusal(self.info)
            if why:
                self._owner.on_qemu_refused(why)
                return
            while self.qmp.connected:  # else it has died meanwhile: _after_loss() goes on
                try:
                    await self._owner.on_qemu()
                    return
                except QmpError as e:
                    log.warning("%s", e)
                    await asyncio.sleep(QMP_RETRY_S)
            return

    async def _connect_oob(self) -> None:
        o = self.options
        if not o.qmp_oob:
            return
        if self.oob is not None:
            await self.oob.close()
        name = f"{self.qmp.name} (oob)"
        self.oob = Qmp(o.qmp_oob, name, o.timeout_s, lambda e: None, lambda why: None)
        try:
            await self.oob.open()  # now: a QEMU that hangs accepts nobody
        except QmpError as e:
            self.oob = None
            log.warning("[qemu] qmp_oob: %s", e)

    async def learn_macs(self) -> str:
        """Tell the data path which frames are for the guest; returns its first MAC address, as it
        was last told, "" if nobody can say it."""
        macs = [self.options.guest_mac]
        if not macs[0]:
            try:
                macs = await self.qmp.guest_macs(self.options.tap)
            except (QmpError, NicError) as e:
                log.warning("%s", e)
                return self.first_mac
        self.first_mac = macs[0]
        try:
            self._is_at(*(bytes.fromhex(m.replace(":", "")) for m in macs))
        except OSError as e:  # no room: everything is mirrored then, and the first one is known
            log.warning("not all MAC addresses of the guest are known: %s", e)
        return self.first_mac

    async def close(self) -> None:
        """Let it alone."""
        await self.qmp.close()
        if self.oob is not None:
            await self.oob.close()

    # ---- its guest

    async def leave_colo(self) -> None:
        """x-colo-lost-heartbeat. A main loop that waits for the dead peer is freed by yank first.

        Raises QmpError when QEMU answers neither way.
        """
        try:
            await self.qmp.lost_heartbeat(HUNG_S)
        except QmpTimeout as e:
            log.warning("%s: cutting its migration channel (yank)", e)
            await (self.oob or self.qmp).yank()
            # The first one may have been carried out since.
            if await self.qmp.migration_status() in IN_COLO:
                await self.qmp.lost_heartbeat()

    async def hangs(self) -> bool:
        """Whether this host's QEMU, which has let a deadline pass, hangs of its own.

        It may wait for the other one: then it goes on when its migration channel is cut.
        """
        log.warning("%s does not answer: cutting its migration channel (yank)", self.qmp.name)
        try:
            await (self.oob or self.qmp).yank(HUNG_S)
        except QmpTimeout:
            return True
        except QmpError as e:
            log.info("%s", e)  # but it answers
        try:
            await self.qmp.status()
        except QmpTimeout:
            return True
        except QmpError:
            pass
        return False

    async def watch(self) -> None:
        """A QEMU that hangs gives no sign of its own. Until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self._owner.stakes is not Stakes.WATCHED or not self.qmp.connected:
                continue
            try:
                await self.qmp.status()
            except QmpTimeout:
                # While a checkpoint runs it may well be busy; that has a deadline of its own.
                if self._owner.stakes is Stakes.WATCHED and await self.hangs():
                    self._owner.on_guest_gone(hung=True)
                    self._owner.reconsider()
            except QmpError:
                continue

    # ---- the next one

    async def start_incoming(self) -> None:
        """Run the command that starts a QEMU which waits for the other guest's state."""
        argv = self.options.incoming
        if self._starting is not None and self._starting.returncode is None:
            log.error("[qemu] incoming: the command still runs, process %d", self._starting.pid)
            return
        log.info("starting this host's QEMU anew: %s", " ".join(argv))
        try:
            self._starting = await asyncio.create_subprocess_exec(
                *user_command.incoming(self.options.pair, argv), env=user_command.environment()
            )
            async with asyncio.timeout(INCOMING_S):
                status = await self._starting.wait()
        except (OSError, TimeoutError) as e:
            log.error("[qemu] incoming: %s", str(e) or f"no end within {INCOMING_S:g} s")
            return
        if status:
            log.error("[qemu] incoming: exit status %d", status)
