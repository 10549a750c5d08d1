# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary's part in entering COLO: a QEMU that waits, `ready`, and an entry that is given up.

The primary makes the entry (controller/colo_entry.py) and may give it up at any step. Its message
about that can be lost, and each of the two controllers can be replaced meanwhile. So `ready` is
repeated as long as a QEMU waits here, and the primary's heartbeats tell of an end that no message
reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from ..abi import Mode
from ..config.file import Config
from ..datapath.host import HostDataPath
from ..failover.states import Role, State
from ..peer.channel import Peer
from ..qemu.disks import DiskError
from ..qemu.hardware import encode
from ..qemu.qmp import QmpError
from ..qemu.supervisor import QemuSupervisor
from .guest_lifecycle import GuestLifecycle
from .held_frames import HeldFrames
from .pair_view import PairView

REMIND_S = 2.0  # longer than the primary takes from `ready` to its next state


class Joining(Protocol):
    """The controller of the guest that is to become the SVM."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    life: GuestLifecycle
    held: HeldFrames
    state: State

    def become(self, state: State, why: str) -> None:
        """Change the state and say why."""

    def begin_entry(self, n: int) -> None:
        """Hold for the checkpoint to epoch n, which is the first; the SVM is fit for it."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...


class SecondaryEntry:
    """What the secondary does for the first checkpoint of a copy, up to its `begin`."""

    def __init__(self, controller: Joining) -> None:
        self._c = controller
        self.wanted = False  # `ready` is to be repeated: a QEMU waits for the primary's migration
        self.qemus = 0  # how many QEMUs have waited here
        self._remind_at = 0.0
        self._looking = False  # for an SVM that an entry has left behind

    # ---- ready

    async def announce(self) -> None:
        """Say that a new QEMU waits here. Raises QmpError."""
        self.wanted = True
        self.qemus += 1
        self._c.become(State.STARTING, "the SVM waits for the primary's migration")
        await self.send_ready()

    def peer_connected(self) -> None:
        """Say so to a peer that may not know it."""
        if self.wanted:
            self._c.spawn(self._ready_again())

    def remind(self) -> None:
        """Send `ready` again to a primary that gave up an entry, while a QEMU waits here.

        Also to a guest that is alone: what kept this host from being ready may be mended.
        """
        c = self._c
        now = time.monotonic()
        alone = (State.STARTING.value, State.SOLO.value, State.PROMOTED.value)
        waits = self.wanted and c.view.peer.state in alone
        if not waits or not c.peer.connected or not c.qemu.qmp.connected:
            self._remind_at = now + REMIND_S
        elif now >= self._remind_at:
            self._remind_at = now + REMIND_S
            c.spawn(self._ready_again())

    async def _ready_again(self) -> None:
        with contextlib.suppress(QmpError):
            if await self._c.qemu.waits():
                await self.send_ready()

    async def send_ready(self) -> None:
        """Send `ready`: a QEMU waits here. If the SVM is unfit, send `failed` instead."""
        c = self._c
        why, sizes = await c.life.unfit(), {}
        if not why:
            try:
                sizes = await c.qemu.disks.replica.serve()
            except DiskError as e:
                why = f"COLO is not entered: {e}"
        if why:
            c.become(State.STARTING, why)
            c.peer.send("failed", n=0, why=why)
        else:
            seen = encode(await c.qemu.hardware())
            names = [net.name for net in c.config.networks]
            c.peer.send(
                "ready",
                epoch=c.dp.epoch,
                qemu=self.qemus,
                disks=sizes,
                hardware=seen,
                nics=dict(zip(names, c.qemu.first_macs, strict=True)),
            )

    async def check(self, n: int) -> None:
        """Check what may have changed since this host sent `ready`, then begin to hold."""
        c = self._c
        try:
            why = await c.life.unfit()
            status = await c.qemu.qmp.status()
            if not why and status != "inmigrate":
                why = f"the SVM's QEMU is `{status}`, not waiting (-incoming)"
            if not why:
                await c.qemu.prepare(primary=False)
        except QmpError as e:
            why = str(e)
        if why:
            c.peer.send("failed", n=n, why=why)
            if c.state is State.STARTING:
                c.become(State.STARTING, why)
            return
        c.begin_entry(n)

    # ---- the end of an entry

    def on_beat(self, beat: dict[str, Any]) -> None:
        """Conclude from the primary's heartbeat that an entry has ended."""
        c = self._c
        if not self._was_given_up(beat):
            return
        if c.held.hold is not None:
            self._given_up("it is not entering it any more")
        elif not self.wanted and c.qemu.qmp.connected and not self._looking:
            self._looking = True
            c.spawn(self._look_for_abandoned())

    def on_failed(self, why: str) -> None:
        """Take the primary's message that it has given up the entry."""
        if self._c.state is State.STARTING and not self._c.view.pair.confirmed:
            self._given_up(why)

    def _was_given_up(self, beat: dict[str, Any]) -> bool:
        """Return whether the entry that this side holds for has ended without a message about it.

        A primary is `checkpointing` from before its `begin` until the entry ends, so no heartbeat
        in between carries `starting`, or `solo`, which is what its next controller finds. Its
        `failed` may have reached no controller, or one that was still checking whether the SVM is
        fit.
        """
        return (
            self._c.state is State.STARTING
            and not self._c.view.pair.confirmed
            and beat["role"] == Role.PRIMARY.value
            and beat["state"] in (State.STARTING.value, State.SOLO.value)
        )

    def was_missed(self, beat: dict[str, Any]) -> bool:
        """Return whether the primary has completed an entry whose end a dead controller of this
        side has not recorded: the pair would count as protected by a guest that may not take over.

        Without a restart the primary completes no entry before this side has reported its RESUME.
        """
        hold = self._c.held.hold
        return (
            self._c.state is State.STARTING
            and not self._c.view.pair.confirmed
            and hold is not None
            and hold.resume is None
            and beat["role"] == Role.PRIMARY.value
            and beat["state"] == State.PROTECTED.value
        )

    def _given_up(self, why: str) -> None:
        """Stop holding: the primary has given up entering COLO.

        A QEMU that has begun to load is of no use any more. This controller waits for its
        successor, as it does after the end of any guest.
        """
        c = self._c
        if c.held.hold is None:
            return
        c.held.take()
        c.view.not_in_colo()
        c.dp.mode = Mode.DROP
        self.wanted = False  # until it is certain that this QEMU can be used again
        c.spawn(self._after_given_up(why[:500]))

    async def _after_given_up(self, why: str) -> None:
        c = self._c
        try:
            waits = await c.qemu.waits()
        except QmpError:
            return  # gone, which on_qemu_gone() reports; or it hangs: _look_for_abandoned() goes on
        if c.state is not State.STARTING or c.held.hold is not None:
            return
        if waits:
            self.wanted = True
            c.become(State.STARTING, f"the primary has given up entering COLO: {why}")
        else:
            c.become(
                State.STOPPED,
                f"the primary has given up entering COLO: {why}; a new QEMU with -incoming is "
                "needed here",
            )

    async def _look_for_abandoned(self) -> None:
        """Replace a QEMU that an entry unknown to this controller has left in COLO.

        Such a QEMU waits for ever (colo_process_incoming_thread() in QEMU's migration/colo.c). One
        that runs outside COLO is left alone, whatever it migrates: somebody has started it without
        -incoming.
        """
        c = self._c
        try:
            migration = await c.qemu.qmp.migration_status()
            loading = migration == "active" and await c.qemu.qmp.status() == "inmigrate"
        except QmpError:
            return
        finally:
            self._looking = False
        left = migration == "colo" or loading
        if c.state is State.STARTING and c.held.hold is None and left:
            c.view.not_in_colo()
            c.dp.mode = Mode.DROP
            c.become(
                State.STOPPED,
                "the SVM was left behind by an entry into COLO that the primary has given up; "
                "a new QEMU with -incoming is needed here",
            )
