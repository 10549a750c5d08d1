# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate one QEMU: its run state, COLO and events, and the controllers' QMP connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.migration import MigrationOptions
from colo_xdp.qemu.nic import Card
from colo_xdp.qemu.qmp import QemuInfo, QmpError

from .disk import SimBlock
from .guest import Guest
from .process import OfProcess

if TYPE_CHECKING:
    from .host import Side


class Qemu:
    """One QEMU: run state, COLO, and the events it sends."""

    def __init__(self, side: Side, *, incoming: bool) -> None:
        self.side, self.alive, self.running = side, True, not incoming
        self.incoming = incoming  # whether it runs the pair's SVM
        self.migration = ""
        self.hung = self.channel_lost = self.loading = self.leaving = False
        self.client: SimQmp | None = None
        self._busy = self.cancelled = False
        self.still = ""  # the run state of a stopped guest, if it is an unusual one
        self.block = SimBlock(side, lambda: self.alive)
        self.draining = False  # the main loop waits for the disks, and answers nothing

    def status(self) -> str:
        if self.running:
            colo = self.migration == "colo" and self.incoming
            return "colo" if colo or self.loading else "running"
        if self.still:
            return self.still
        return "inmigrate" if self.incoming and not self.migration else "paused"

    def event(self, name: str, **data: Any) -> None:
        """Send an event to whoever is connected: late, but in order."""
        if self.client is not None:
            self.client.event(name, self.side.world.ns(), data)

    def die(self, *, silently: bool = False) -> None:
        if not self.alive:
            return
        self.alive = self.running = False
        if silently:
            return
        self.side.world.note("%s QEMU dies", self.side.name)
        other = self.side.other.qemu
        if self.client is not None:
            self.client.closed()
        if self.incoming and self.migration == "colo":
            return  # a primary's QEMU notices only when it attempts a checkpoint
        if other.alive and other.migration == "colo":
            self.side.world.later(self.side.world.rnd.uniform(0.1, 3), other.lose_channel)

    # -- what a guest does, or a person at another QMP socket

    def guest_off(self) -> None:
        """Let the guest shut itself down, which ends QEMU."""
        if self.alive and self.running:
            self.running, self.still = False, "shutdown"
            self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            world, c = self.side.world, self.client
            read = max(0.0, c.last - world.ms_exact()) if c is not None else 0.0  # before EOF
            world.later(read + world.rnd.uniform(0.2, 5), self.die)

    def reset(self) -> None:
        """Execute system_reset, or let the guest reboot; the controllers see only the event."""
        if self.alive and self.running:
            self.event("RESET", guest=False, reason="host-qmp-system-reset")

    def stop(self) -> None:
        """Execute `stop`."""
        if self.alive and self.running and not self._busy and not self.side.other.qemu._busy:
            self.running, self.still = False, "paused"
            self.event("STOP")

    def cont(self) -> None:
        """Execute `cont`."""
        if self.still == "finish-migrate":
            raise QmpError("Migration is not finalized yet")
        if not self.running:
            self.event("RESUME")
            self.side.resume()

    def cancel(self) -> None:
        """Execute `migrate_cancel`."""
        if self.migration == "active":
            self.cancelled = True

    def lose_channel(self) -> None:
        if self.alive and self.migration == "colo" and not self.channel_lost:
            # and it stays in `colo` unchanged until lost-heartbeat arrives
            self.channel_lost = True
            self.event("COLO_EXIT")

    def checkpoint(self, *, first: bool) -> None:
        """Request a checkpoint; requests during one are folded into it."""
        if not self._busy and (first or (self.migration == "colo" and not self.channel_lost)):
            self._busy = True
            self.side.world.spawn(self._checkpoint(first))

    async def _wait(self, other: Qemu, low: float, high: float) -> bool:
        """Wait some ms; return False when either QEMU has died meanwhile."""
        world = self.side.world
        await asyncio.sleep(world.rnd.uniform(low, high) / 1000)
        while self.hung and self.alive:
            await asyncio.sleep(0.01)
        whole = not (world.colo_cut or other.channel_lost or self.cancelled)
        return self.alive and other.alive and whole

    async def _checkpoint(self, first: bool) -> None:
        p, s, world = self.side, self.side.other, self.side.world
        svm = s.qemu
        try:
            if first:
                if not svm.alive or svm.status() != "inmigrate":
                    return self._failed(svm, first)
                self.migration = svm.migration = "active"
                self.incoming = self.channel_lost = self.cancelled = False
                if not await self._wait(svm, 5, 40):
                    return self._failed(svm, first)
            if not await self._wait(svm, 0.1, 3):
                return self._failed(svm, first)
            if not first:
                svm.halt("colo")
                if not await self._wait(svm, 0.05, 1):
                    return self._failed(svm, first)
            await self._drain()
            if not first and svm.migration != "colo":  # the SVM has left meanwhile
                return self._failed(svm, first)
            self.halt("" if first else "colo")
            image = p.guest
            assert image is not None
            if first and world.entry_trap:
                return self._goes_wrong(image)
            svm.loading = True
            whole = await self._wait(svm, 0.5, world.rnd.choice((4, 4, 25, 300)))
            if not whole and not first and not self.alive and svm.alive:
                whole = world.rnd.random() < 0.5  # all of it may already have been on its way
            if not whole:
                return self._failed(svm, first)
            s.guest, s.stale = image.clone(world.entropy_s), p.stale
            svm.block.load(self.block)
            s._attach()
            world.cloned(s, first=first)
            svm.migration = self.migration = "colo"
            svm.event("RESUME")
            s.resume()
            svm.loading = False
            if not await self._wait(svm, 0.02, 1):
                return self._failed(svm, first)
            self.event("RESUME")
            p.resume()
        finally:
            self._busy = svm.loading = False

    async def _drain(self) -> None:
        """Wait for the end of all writes, as vm_stop() does; nothing else is done meanwhile."""
        self.draining = True
        try:
            while self.block.flying and self.alive:
                await asyncio.sleep(0.0005)
        finally:
            self.draining = False

    def halt(self, still: str) -> None:
        """Stop as vm_stop_force_state() does: a stopped guest is not stopped again, but its run
        state changes. For a checkpoint that is `colo` on both sides (migration/colo.c)."""
        if self.running:
            self.running = False
            self.event("STOP")
        self.still = still

    def _goes_wrong(self, image: Guest) -> None:
        """Let an entry fail without anybody reporting it.

        Causes: the capability return-path left on before QEMU 11, pause-before-switchover, or a
        secondary that cannot continue.
        """
        world, svm = self.side.world, self.side.other.qemu
        how, world.entry_trap = world.entry_trap, ""
        world.note("the entry ends as %s", how)
        if how == "completed":
            self.migration, self.still = "completed", "postmigrate"
            svm.side.guest, svm.side.stale = image.clone(world.entropy_s), self.side.stale
            svm.migration = "completed"
            svm.event("RESUME")
            svm.side.resume()
        else:
            self.migration, self.still = "colo", "finish-migrate"

    def _failed(self, svm: Qemu, first: bool) -> None:
        self.side.world.note("checkpoint fails in QEMU")
        if first and self.migration != "colo":
            self.migration = "cancelled" if self.cancelled else "failed"
            if self.side.world.scene.roles and svm.migration == "active":
                svm.die()  # QEMU exits when an incoming migration is cut off
            return
        for q in (self, svm):
            q.lose_channel()

    def lost_heartbeat(self) -> None:
        """Execute x-colo-lost-heartbeat."""
        if self.migration != "colo":  # get_colo_mode(): an entry that is under way goes on
            raise QmpError("not in COLO")
        if self.leaving:  # failover_request_active() in QEMU's migration/colo-failover.c
            raise QmpError("COLO failover is already activated")
        self.leaving = True
        self.side.world.spawn(self._leave())

    async def _leave(self) -> None:
        while self.loading and self.alive:  # QEMU: FAILOVER_STATUS_RELAUNCH
            await asyncio.sleep(0.0002)
        await self._drain()
        self.block.leave()
        self.migration, self.leaving = "completed", False
        if self.still == "finish-migrate":
            self.still = "paused"
        elif self.running:
            self.event("STOP")
            self.event("RESUME")
        elif self.alive:
            self.event("RESUME")
            self.side.resume()
        other = self.side.other.qemu
        if other.alive:
            self.side.world.later(0.5, other.lose_channel)


class SimQmp(OfProcess):
    """Stand in for colo_xdp.qemu.qmp.Qmp."""

    def __init__(
        self,
        side: Side,
        name: str,
        on_event: Callable[[QmpEvent], None],
        on_close: Callable[[str], None],
        *,
        oob: bool = False,
    ) -> None:
        self._oob, self._process = oob, side.process
        self._side, self.name, self.connected = side, name, False
        self._on_event, self._on_close = on_event, on_close
        self._last = 0.0
        self._to = side.qemu

    def event(self, name: str, ts_ns: int, data: dict[str, Any]) -> None:
        world = self._side.world
        at = max(
            self._last, world.ms_exact() + world.rnd.choice((0.01, 1, 20)) * world.rnd.random()
        )
        self._last = at + 0.001
        world.later(at - world.ms_exact(), lambda: self._event(name, ts_ns, data))

    def _event(self, name: str, ts_ns: int, data: dict[str, Any]) -> None:
        if self.connected and not self.dead:
            self._side.world.note("%s QMP event %s", self._side.name, name)
            self._on_event(QmpEvent(name, data, ts_ns, self._side.world.ns()))

    def closed(self) -> None:
        if self.connected:
            self.connected = False
            self._side.world.later(0.1, lambda: None if self.dead else self._on_close("closed"))

    @property
    def last(self) -> float:
        """Return when the last event will have been read, ms."""
        return self._last

    async def _call(self, what: str) -> Qemu:
        if what == "connect":
            self._to = self._side.qemu
        world, q = self._side.world, self._to
        await asyncio.sleep(world.rnd.uniform(0.05, 1) / 1000)
        end = world.ns() + 1_000_000_000
        while (q.hung or self._waits_for_disks(q)) and q.alive and world.ns() < end:
            await asyncio.sleep(0.01 if q.hung else 0.001)
        while self._last > world.ms_exact():  # answers do not overtake events
            await asyncio.sleep((self._last - world.ms_exact()) / 1000)
        hung = q.hung or self._waits_for_disks(q)
        if self.dead or not q.alive or hung or (what != "connect" and not self.connected):
            raise QmpError(f"{self.name}: {what}: no answer")
        return q

    def _waits_for_disks(self, q: Qemu) -> bool:
        return q.draining and bool(q.block.flying) and not self._oob

    async def open(self) -> None:
        await self._call("connect")
        self.connected = True

    async def connect(self) -> QemuInfo:
        q = await self._call("connect")
        self.connected, q.client = True, self
        return QemuInfo((7, 2, 0), True, q.status())

    async def status(self, timeout: float | None = None) -> str:
        return (await self._call("status")).status()

    async def migration_status(self, timeout: float | None = None) -> str:
        return (await self._call("query-migrate")).migration

    async def prepare(self, *, primary: bool, migration: MigrationOptions) -> None:
        await self._call("prepare")

    async def enters_colo(self) -> bool:
        await self._call("query-migrate-capabilities")
        return True

    async def migrate(self, uri: str) -> None:
        (await self._call("migrate")).checkpoint(first=True)

    async def trigger_checkpoint(self) -> None:
        (await self._call("trigger")).checkpoint(first=False)

    async def yank(self, timeout: float | None = None) -> None:
        await self._call("yank")

    async def quit(self) -> None:
        (await self._call("quit")).die()

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        (await self._call("x-colo-lost-heartbeat")).lost_heartbeat()

    async def hardware(self) -> dict[str, str]:
        return {}  # both are alike

    async def cards(self) -> list[Card]:
        return []

    async def guest_macs(self, tap: str) -> list[str]:
        return ["52:54:00:00:00:02"]

    async def execute(
        self, command: str, args: Any = None, timeout: Any = None, *, oob: bool = False
    ) -> Any:
        q = await self._call(command)
        if self._side.world.scene.disk and hasattr(q.block, command.replace("-", "_")):
            return q.block.command(command, args or {})
        if command == "query-block":
            return []
        if command == "query-migrate":
            return {"status": q.migration} if q.migration else {}
        if command == "migrate_cancel":
            q.cancel()
        if command == "cont":
            q.cont()
        if command == "system_reset":
            q.reset()
            q.side.booted()
        return [{"main-mac": "52:54:00:00:00:02"}]

    async def close(self) -> None:
        self.connected = False
