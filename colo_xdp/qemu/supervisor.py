# SPDX-License-Identifier: GPL-2.0-or-later
"""Supervise one QEMU over QMP: find it, stay connected, notice its end, and start a new one.

The controller implements Owner and receives what happens; it calls leave_colo() and
start_incoming().
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from .. import user_command
from ..clock import TICK_S
from .block_layer import ReplicationOptions
from .events import QmpEvent
from .hardware import Hardware
from .migration import MigrationOptions
from .nic import NicError
from .qmp import DEFAULTS, QemuInfo, Qmp, QmpError, QmpRefused, QmpTimeout, refusal
from .replication import DiskReplication

log = logging.getLogger("colo_xdp")

QMP_RETRY_S = 0.2
# how long after a lost QMP connection the tap's carrier may take to show whether QEMU is dead
DEATH_S = 2.0
WATCH_S = 0.5  # a hang is found so long after the deadline of a command at the latest
#: a question whether QEMU answers comes so much later, since its deadline is so much shorter
WATCH_LESS_S = 0.5
HUNG_S = 1.0  # QEMU answers x-colo-lost-heartbeat in 0.1 s; after this time its main loop hangs
REFUSALS = 3  # errors in a row as answers to a mere question, after which nothing is expected of it
REFUSAL_LENGTH = 200  # characters of such an error that are repeated
IN_COLO = ("colo", "active")  # migration states that x-colo-lost-heartbeat ends
NO_DISKS = ReplicationOptions("")
INCOMING_S = 10.0  # deadline of the command that starts a QEMU, and the time between two attempts


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """What the configuration specifies about this QEMU."""

    pair: str
    name: str  # of its guest, for messages: PVM or SVM
    qmp: str
    qmp_oob: str  # the second socket, or empty
    timeout_s: float
    #: of each NIC, in order: its tap, and its MAC address (empty: ask QEMU)
    taps: Mapping[str, str]
    incoming: tuple[str, ...]  # the command that starts a QEMU waiting for its migration
    replication: ReplicationOptions = NO_DISKS
    migration: MigrationOptions = DEFAULTS


class Stakes(Enum):
    """What depends on the current QEMU."""

    NOTHING_YET = "nothing yet"  # if it is gone, the next one is waited for
    GUEST = "guest"  # its end is a death
    WATCHED = "watched"  # the same, and it must answer at any time
    OVER = "over"  # something else takes care of the next one


class Owner(Protocol):
    """The guest's owner, which is informed of what happens."""

    @property
    def stakes(self) -> Stakes:
        """What depends on the QEMU now."""
        ...

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task whose failure is handled."""
        ...

    def on_qmp_event(self, event: QmpEvent) -> None:
        """Handle an event from QEMU."""

    async def on_qemu(self) -> None:
        """QMP is connected (again). Raises QmpError."""

    def on_qemu_found(self, *, there: bool) -> None:
        """Take note of whether a QEMU was found."""

    def on_qemu_refused(self, why: str) -> None:
        """This release cannot work with this QEMU."""

    def on_qemu_trouble(self, trouble: str) -> None:
        """QEMU answers, but only with errors; empty: it does no more."""

    def on_qemu_gone(self) -> None:
        """The QEMU that nothing depended on yet is gone; the next one is waited for."""

    def on_guest_gone(self, *, hung: bool = False) -> None:
        """The guest is dead, or `hung` for good."""

    @property
    def needs_copy(self) -> bool:
        """Whether the other guest serves the clients and this host lacks a QEMU for its copy."""
        ...

    def reconsider(self) -> None:
        """Decide again: something has changed."""


class QemuSupervisor:
    """Supervise this host's QEMU."""

    def __init__(
        self,
        options: QemuOptions,
        owner: Owner,
        tap_alive: Callable[[], bool],
        is_at: Callable[..., None],
    ) -> None:
        """Set the callbacks up; nothing is connected yet.

        `tap_alive`: whether the kernel reports that a process holds the guest's tap.
        `is_at(nic, *macs)`: pass a NIC's MAC addresses to the data path; may raise OSError.
        """
        self.options, self._owner = options, owner
        self._tap_alive, self._is_at = tap_alive, is_at
        self.info: QemuInfo | None = None
        #: of each NIC, as QEMU or the configuration gave it
        self.first_macs = [""] * len(options.taps)
        # the running command [qemu] incoming
        self._launching = False
        self.last_start = float("-inf")  # of the command qemu.incoming (monotonic, s)
        self._starting: asyncio.subprocess.Process | None = None
        #: why nothing can be asked of QEMU although it answers; empty: that is not so
        self.trouble = ""
        self._refusals = 0  # errors in a row
        self.qmp = self._new_qmp()
        self.oob: Qmp | None = None  # the second socket, if configured
        self.disks = DiskReplication(options.replication, self)

    # ---- connecting

    def _new_qmp(self) -> Qmp:
        o = self.options
        return Qmp(o.qmp, o.name, o.timeout_s, self.on_event, self._on_closed)

    def on_event(self, event: QmpEvent) -> None:
        """Handle an event from QEMU."""
        log.debug("%s %s %s", self.qmp.name, event.name, event.data)
        if event.name == "NIC_RX_FILTER_CHANGED":
            self._owner.spawn(self.learn_macs())
        self._owner.on_qmp_event(event)

    def _on_closed(self, why: str) -> None:
        log.warning("%s", why)
        self._answered()  # whoever answered with errors is gone
        if self._owner.stakes is Stakes.OVER:
            return
        self._owner.spawn(self._after_loss()).add_done_callback(self._lost)

    def _lost(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():  # a controller that is being stopped begins nothing new
            self._owner.reconsider()

    async def _after_loss(self) -> None:
        """Find out if QEMU is dead (its tap has no carrier) or only the socket was lost
        (reconnect)."""
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
        # neither QMP nor the kernel shows it alive: shut the path, then report
        self._owner.on_guest_gone()

    async def reconnect(self) -> None:
        """Replace a lost connection. Raises QmpError."""
        self.qmp = self._new_qmp()
        self.info = await self.qmp.connect()
        self._answered()
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
                self._answered()
                self._owner.on_qemu_found(there=True)
            except QmpError as e:
                self._answered(e if isinstance(e, QmpRefused) else None)
                there = await asyncio.to_thread(self._tap_alive)
                self._owner.on_qemu_found(there=there)
                if self._owner.stakes is not Stakes.NOTHING_YET and not there:
                    self._owner.on_guest_gone()  # it died unobserved
                    self._owner.reconsider()
                    return
                if str(e) != said:
                    said = str(e)
                    log.info("%s; waiting for it", e)
                now = time.monotonic()
                if there or not self.options.incoming or not self._owner.needs_copy:
                    missing_since = now
                elif now - missing_since > INCOMING_S:
                    await self.start_incoming()
                    missing_since = time.monotonic()
                await asyncio.sleep(QMP_RETRY_S)
                continue
            await self._connect_oob()
            await self.learn_macs()
            why = refusal(self.info)
            if why:
                self._owner.on_qemu_refused(why)
                return
            while self.qmp.connected:  # otherwise it has died meanwhile: _after_loss() continues
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
        self.oob = Qmp(o.qmp_oob, name, o.timeout_s, lambda e: None, self._on_oob_closed)
        try:
            await self.oob.open()  # now, because a hanging QEMU accepts no connection
        except QmpError as e:
            self.oob = None
            log.warning("[qemu] qmp_oob: %s", e)

    def _on_oob_closed(self, why: str) -> None:
        """Open it again, if only that connection was lost."""
        if self.qmp.connected:
            log.warning("%s", why)
            self._owner.spawn(self._connect_oob())

    async def learn_macs(self) -> list[str]:
        """Pass the MAC addresses of the guest's NICs to the data path.

        Returns the first one of each NIC as last reported, "" if it is unknown.
        """
        for nic, (tap, mac) in enumerate(self.options.taps.items()):
            macs = [mac]
            if not mac:
                try:
                    macs = await self.qmp.guest_macs(tap)
                except (QmpError, NicError) as e:
                    log.warning("%s", e)
                    continue
            self.first_macs[nic] = macs[0]
            try:
                self._is_at(nic, *(bytes.fromhex(m.replace(":", "")) for m in macs))
            except OSError as e:  # no room: all is mirrored then, and the first address is known
                log.warning("not all MAC addresses of the guest could be stored: %s", e)
        return self.first_macs

    async def hardware(self) -> Hardware:
        """Return what both QEMUs must agree on: their machines, and how they migrate. Raises
        QmpError."""
        return {**await self.qmp.hardware(), **self.options.migration.report()}

    async def migration_trouble(self, *, primary: bool) -> str:
        """Return why this QEMU cannot migrate as configured, or an empty string. Raises
        QmpError."""
        o = self.options.migration
        return await self.qmp.migration_trouble(o, primary=primary) if o.report() else ""

    async def prepare(self, *, primary: bool) -> None:
        """Set what a migration into COLO needs, on either side. Raises QmpError."""
        await self.qmp.prepare(primary=primary, migration=self.options.migration)

    async def waits(self) -> bool:
        """Return whether this QEMU waits for a migration, and none has begun. Raises QmpError.

        A QEMU whose incoming migration broke off may stay in the run state `inmigrate`, but its
        listener has accepted its one connection. One that waits says `setup` from QEMU 8.2 on.
        """
        if await self.qmp.status() != "inmigrate":
            return False
        return await self.qmp.migration_status() in ("", "none", "setup")

    async def close(self) -> None:
        """Disconnect; QEMU keeps running."""
        await self.qmp.close()
        if self.oob is not None:
            await self.oob.close()

    # ---- its guest

    async def leave_colo(self) -> None:
        """Execute x-colo-lost-heartbeat; first free a main loop that waits for the dead peer, by
        yank.

        It drains the guest's disks, so their mirrors end before. Raises QmpError when QEMU answers
        neither way.
        """
        await self.disks.mirrors.cut()
        try:
            await self.qmp.lost_heartbeat(HUNG_S)
        except QmpTimeout as e:
            log.warning("%s: cutting its migration channel (yank)", e)
            await self.yank()
            # The first command may have been executed since.
            if await self.qmp.migration_status() in IN_COLO:
                await self.qmp.lost_heartbeat()

    @property
    def way_past(self) -> Qmp:
        """The connection for out-of-band commands, which pass a main loop that hangs."""
        return self.oob if self.oob is not None and self.oob.connected else self.qmp

    async def yank(self, timeout: float | None = None) -> None:
        """Cut QEMU's connections to the other QEMU, out of band. Raises QmpError."""
        if self.disks.any:
            await self.disks.block.yank(timeout)
        else:
            await self.way_past.yank(timeout)

    async def quit(self) -> None:
        """End a QEMU whose guest is worthless. Raises QmpError."""
        await self.disks.mirrors.cut()
        await self.qmp.quit()

    async def hangs(self) -> bool:
        """Return whether this host's QEMU, which missed a deadline, hangs by itself.

        It may only be waiting for the other QEMU; then it continues when its migration channel is
        cut.
        """
        log.warning("%s does not answer: cutting its migration channel (yank)", self.qmp.name)
        try:
            await self.yank(HUNG_S)
        except QmpTimeout:
            return True
        except QmpError as e:
            log.info("%s", e)  # an error is an answer, too
        try:
            await self.qmp.status()
        except QmpTimeout:
            return True
        except QmpError:
            pass
        return False

    def _answered(self, error: QmpRefused | None = None) -> None:
        """Note how a mere question was answered; None: not with an error.

        One error means nothing. If there are only errors, no checkpoint and no takeover can be
        asked for, as of a QEMU that hangs. But its guest may well run, so it is not given up for
        that: whatever needs a command fails by itself.
        """
        trouble = self.trouble
        if error is None:
            self._refusals, trouble = 0, ""
        else:
            self._refusals += 1
            if self._refusals >= REFUSALS and not trouble:  # the text may change each time
                text = " ".join(str(error).split())[:REFUSAL_LENGTH]
                trouble = f"QEMU answers with errors, so nothing can be asked of it: {text}"
        if trouble != self.trouble:
            self.trouble = trouble
            self._owner.on_qemu_trouble(trouble)

    async def watch(self) -> None:
        """Poll QEMU until cancelled, because a hanging QEMU gives no sign by itself.

        Neither does one behind a socket that answers everything with an error.
        """
        timeout_s = self.options.timeout_s
        less_s = min(WATCH_LESS_S, timeout_s / 2)
        while True:
            await asyncio.sleep(WATCH_S + less_s)
            watched = self._owner.stakes is Stakes.WATCHED
            if not (watched or self.trouble) or not self.qmp.connected:
                continue
            try:
                await self.qmp.status(timeout_s - less_s)
                self._answered()
            except QmpRefused as e:
                self._answered(e)
            except QmpTimeout:
                # It may well be busy during a checkpoint, which has a deadline of its own.
                if self._owner.stakes is Stakes.WATCHED and await self.hangs():
                    self._owner.on_guest_gone(hung=True)
                    self._owner.reconsider()
            except QmpError:
                continue

    # ---- the next QEMU

    async def start_incoming(self) -> None:
        """Run the command that starts a QEMU which waits for the other guest's state."""
        argv = self.options.incoming
        if self._launching:
            return
        if self._starting is not None and self._starting.returncode is None:
            log.error(
                "[qemu] incoming: the command is still running, process %d", self._starting.pid
            )
            return
        log.info("starting a new QEMU on this host: %s", " ".join(argv))
        self._launching = True
        self.last_start = time.monotonic()
        try:
            self._starting = await asyncio.create_subprocess_exec(
                *user_command.incoming(self.options.pair, argv), env=user_command.environment()
            )
            async with asyncio.timeout(INCOMING_S):
                status = await self._starting.wait()
        except (OSError, TimeoutError) as e:
            log.error("[qemu] incoming: %s", str(e) or f"not finished within {INCOMING_S:g} s")
            return
        finally:
            self._launching = False
        if status:
            log.error("[qemu] incoming: exit status %d", status)
