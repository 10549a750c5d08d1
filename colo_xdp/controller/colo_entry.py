# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary's entry into COLO, and the way back out of one that fails.

Until the first checkpoint is complete the guest is its clients' only one: however an entry ends,
the guest runs again within a second, and it never stands still for longer than enter_stop. An
entry that fails twice in the same way is not repeated for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from typing import Any, Protocol

from ..abi import Mode
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.host import HostDataPath
from ..failover.arbiter import Arbiter
from ..failover.states import State
from ..peer.channel import Peer
from ..qemu import hardware
from ..qemu.disks import DiskError
from ..qemu.qmp import QmpError
from ..qemu.supervisor import IN_COLO, QemuSupervisor
from .checkpoint import Checkpoint, CheckpointFailed, CheckpointRequest
from .guest_lifecycle import GuestLifecycle
from .pair_view import PairView
from .pvm_output import PvmOutput

log = logging.getLogger("colo_xdp.controller.primary")

REARM_S = 0.5
RUN_ON_S = 0.05  # between two tries to let the guest run
YANK_S = 0.5  # a migration that has been cancelled and is still there is cut off
#: states of a migration that is on its way into COLO (MigrationStatus, qapi/migration.json)
ON_THE_WAY = ("", "none", "setup", "wait-unplug", "active", "device", "colo")
#: those that `migrate_cancel` ends
CANCELLABLE = (
    "setup", "wait-unplug", "active", "device", "pre-switchover", "postcopy-active",
    "postcopy-paused", "postcopy-recover",
)  # fmt: skip
#: run states that `cont` ends
STOPPED_BY_IT = ("paused", "postmigrate", "finish-migrate")
BACKOFF_S = (2.0, 300.0)  # after the same failure twice; doubled with each further one
BACKOFF_FREE_S = 30.0  # at most, if the guest was not stopped for it


class Tries:
    """Entries that failed. The same failure twice is a reason to stop trying.

    Then another QEMU on the secondary (or the same one, if the guest was not stopped for it) is
    waited for, and longer each time; a person may ask at once (forget()).
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The copy has agreed with its original, or a person has asked."""
        self.first, self.count, self._qemu, self._at, self._free = "", 0, (-1, ""), 0.0, True
        self._proven = True

    def entered(self) -> None:
        """The pair is protected. That says nothing about a copy that proved to be none."""
        if self._proven:
            self.forget()

    def failed(
        self, why: str, qemu: tuple[int, str], now: float, *, stopped: bool, proven: bool = True
    ) -> None:
        """Note what came of an entry.

        stopped: the guest stood still for it. proven: False: it succeeded, but the copy was none.
        now: monotonic, s.
        """
        self._proven = proven
        if _alike(why) == _alike(self.first):
            self.count += 1
        else:
            self.first, self.count = why, 1
        self._qemu, self._at, self._free = qemu, now, not stopped

    @property
    def story(self) -> str:
        """What came of the entries so far: the first cause, and how often."""
        often = f", {self.count} times in the same way" if self.count > 1 else ""
        what = "COLO was not entered" if self._proven else "COLO was left"
        return f"{what}{often}: {self.first}" if self.count else ""

    def held_back(self, qemu: tuple[int, str], now: float) -> str:
        """Why the next entry is not tried now, or an empty string."""
        if self.count < 2:
            return ""
        if qemu != self._qemu and self._free:
            return ""  # what failed may have been that QEMU, and a try costs the guest nothing
        longest = BACKOFF_FREE_S if self._free else BACKOFF_S[1]
        wait = min(longest, BACKOFF_S[0] * 2.0 ** (self.count - 2))
        if qemu == self._qemu and not self._free:
            return (
                f"{self.story}; not tried again before another QEMU waits on the secondary, or "
                "`colo-xdp mode protected` asks for it"
            )
        if now < self._at + wait:
            return f"{self.story}; the next try is {wait:.0f} s after the last one"
        return ""


def _alike(why: str) -> str:
    """Numbers are no difference."""
    return re.sub(r"\d+", "#", why)


class Enterer(Protocol):
    """The controller whose guest is to be copied for the first time."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    arbiter: Arbiter
    state: State
    output: PvmOutput
    life: GuestLifecycle

    @property
    def undecided(self) -> bool:
        """Whether nobody has decided yet that this host's guest may transmit."""
        ...

    @property
    def migrate_to(self) -> str:
        """The URI where the other host's QEMU waits."""
        ...

    def become(self, state: State, why: str) -> None:
        """Change the state."""

    def drain(self) -> None:
        """Read what is in the event ring."""


class Checkpoints(Protocol):
    """What makes checkpoints (controller/checkpoint_coordinator.py); the first one too."""

    async def make(self, want: CheckpointRequest) -> None:
        """Make one. Raises CheckpointFailed, QmpError."""

    async def sleep_or_wake(self, seconds: float) -> None:
        """Sleep until the time is over or something is wanted."""


class ColoEntry:
    """Brings the PVM into COLO, and back to its clients when that fails."""

    def __init__(self, controller: Enterer, checkpoints: Checkpoints) -> None:
        self._c, self._checkpoints = controller, checkpoints
        self.tries = Tries()
        self.peer_ready = False  # a QEMU waits on the secondary, and nothing is against it
        self.peer_qemu = (-1, "")  # which QEMU waits there, of which controller
        self.peer_disks: dict[str, Any] = {}  # sizes of the images that it exports, bytes
        self._compared = ((-1, ""), "")  # the QEMU there that is built like the one here
        self.peer_hardware = ""  # what it reports of its machine
        self.peer_nics: dict[str, Any] = {}  # the NICs that its configuration names, in order
        self._copied_to = (-1, "")  # which QEMU has the disks, or gets them now
        self.peer_lacks = ""  # why the secondary is not ready
        self.guest_stopped = False  # the guest was stopped for the entry in progress

    async def migration(self) -> str | None:
        """Return the state of QEMU's migration; None while QMP does not answer."""
        try:
            return await self._c.qemu.qmp.migration_status()
        except QmpError:
            return None

    async def until_entered(self) -> bool:
        """Wait until the guest is in COLO, or the data path is shut.

        Returns whether the guest was in COLO before: only a checkpoint makes the pair equal then.
        """
        c, ran_s = self._c, time.monotonic()
        await self._drop_mirrors()
        while c.state is not State.STOPPED:
            migration = await self.migration()
            awaits_svm = await self._awaits_svm(migration)
            if not awaits_svm:
                ran_s = time.monotonic()
                # Undecided: a checkpoint would make it transmit, and nobody would decide any more.
                if migration == "colo" and not c.undecided:
                    return True
            elif time.monotonic() - ran_s <= c.config.qemu.enter_stop / 1000:
                if c.peer.connected:  # else the reason is what the decision makes of that
                    c.become(
                        c.state,
                        "a former controller began to enter COLO: the PVM stands still until QEMU "
                        "reports that the SVM has its state",
                    )
                await self._checkpoints.sleep_or_wake(RUN_ON_S)
                continue
            lost = migration is not None and migration not in IN_COLO
            if awaits_svm or (lost and c.view.guest.standalone and c.dp.mode is Mode.CHECKPOINT):
                # Nobody has confirmed the copy of the first checkpoint: the guest may go on alone.
                await self._failed("a former controller did not finish it")
            if c.undecided:
                pass  # the decision says what is waited for
            elif not (a := c.arbiter.view()).may_transmit:
                c.become(c.state, f"waiting for the {a.name}: nothing leaves this host")
            elif migration is None:
                c.become(c.state, c.view.guest.why or "waiting for this host's QEMU (QMP)")
            elif c.peer.connected and self.peer_ready:
                if await self._alike() and await self._copy_disks() and await self._try():
                    return False
            else:
                await self._drop_mirrors()
                lacks = f": {self.peer_lacks}" if self.peer_lacks else ""
                before = f"; {self.tries.story}" if self.tries.count else ""
                c.become(
                    c.state,
                    f"waiting for the secondary (controller, and QEMU -incoming){lacks}{before}",
                )
            await self._checkpoints.sleep_or_wake(REARM_S)
        return False

    async def _drop_mirrors(self) -> None:
        """End mirrors that lead nowhere, but not those of a guest that is in COLO."""
        c = self._c
        if not c.qemu.disks.mirrors.mirroring or await self.migration() in (None, *IN_COLO):
            return
        with contextlib.suppress(QmpError):
            await c.qemu.disks.mirrors.cut()

    async def _alike(self) -> bool:
        """Return whether both QEMUs are built alike; else the state has the differences."""
        c = self._c
        if self._compared == (self.peer_qemu, self.peer_hardware):
            return True
        try:
            why = self._other_nics() or await c.life.unfit()
            why = why or hardware.refusal(
                await c.qemu.hardware(), hardware.decode(self.peer_hardware)
            )
        except ValueError as e:
            why = f"COLO is not entered: the secondary's report: {e}"
        except QmpError as e:
            why = str(e)
        if why:
            c.become(c.state, why)
        else:
            self._compared = self.peer_qemu, self.peer_hardware
        return not why

    def _other_nics(self) -> str:
        """Return why the two configurations do not name the same NICs, or an empty string."""
        mine, theirs = [net.name for net in self._c.config.networks], list(self.peer_nics)
        if mine == theirs:
            for name, mac in zip(mine, self._c.qemu.first_macs, strict=True):
                there = self.peer_nics[name]
                if isinstance(there, str) and mac and there and mac.lower() != there.lower():
                    return (
                        f"COLO is not entered: the NIC {name} is the card {mac} here and {there} "
                        "on the secondary's host: the taps are exchanged, here or there"
                    )
            return ""
        return (
            f"COLO is not entered: [network] here has the NICs {', '.join(mine)} in this order, on "
            f"the secondary's host {', '.join(theirs)}"
        )

    async def _copy_disks(self) -> bool:
        """Copy the guest's disks to the secondary, a step at a time. Returns whether it is done."""
        c, mirrors = self._c, self._c.qemu.disks.mirrors
        if not c.qemu.disks.any:
            return True
        try:
            if mirrors.mirroring and self._copied_to != self.peer_qemu:
                await mirrors.cut()
            if not mirrors.mirroring:
                why = await c.life.unfit()
                why = why or self.tries.held_back(self.peer_qemu, time.monotonic())
                if why:
                    c.become(c.state, why)
                    return False
                self._copied_to = self.peer_qemu
                await mirrors.start(self.peer_disks)
            if await mirrors.copied():
                return True
            c.become(c.state, str(mirrors.copying))
        except (DiskError, QmpError) as e:
            self.tries.failed(str(e), self.peer_qemu, time.monotonic(), stopped=False)
            with contextlib.suppress(QmpError):
                await mirrors.cut()
            c.become(c.state, f"COLO was not entered: {e}")
        return False

    async def _awaits_svm(self, migration: str | None) -> bool:
        """Return whether an entry of a former controller still keeps the guest stopped.

        QEMU's run state is `finish-migrate` until the SVM's QEMU reports that it has the whole
        state (colo_process_checkpoint() in QEMU's migration/colo.c). It may never report that.
        """
        if self._c.undecided or migration not in IN_COLO or not self._c.view.guest.standalone:
            return False
        try:
            return await self._c.qemu.qmp.status() == "finish-migrate"
        except QmpError:
            return True  # ask again

    async def _try(self) -> bool:
        """Enter, unless something is against it. Returns whether the entry is over for good:
        the guest is in COLO, or it has a copy that counts and COLO has ended."""
        c = self._c
        why = await c.life.unfit()
        why = why or self.tries.held_back(self.peer_qemu, time.monotonic())
        if why:
            c.become(c.state, why)
            return False
        self.peer_ready, self._compared = False, ((-1, ""), "")
        self.guest_stopped = False
        try:
            await self._enter()
            self.tries.entered()
            return True
        except (CheckpointFailed, QmpError) as e:
            if not c.view.guest.standalone:  # the copy counts, and could take over
                c.view.checkpoint_due(True)
                c.become(State.DEGRADED, f"COLO ended as it was entered: {e}")
                return True
            if not (isinstance(e, CheckpointFailed) and (e.channel or e.refused)):
                now, stopped = time.monotonic(), self.guest_stopped
                self.tries.failed(str(e), self.peer_qemu, now, stopped=stopped)
            await self._failed(str(e))
            return False

    async def _enter(self) -> None:
        """Synchronise for the first time: a checkpoint during which the PVM's output goes on.

        Output is unprotected until the first STOP. A frame that is captured before a QMP round
        trip that brought no STOP was sent before it, so it may leave.
        """
        self._c.view.entering()
        await self._checkpoints.make(CheckpointRequest(Cause.INITIAL.value, "entering COLO"))
        state = await self._c.qemu.qmp.migration_status()
        if state != "colo":
            raise CheckpointFailed(f"QEMU is in `{state}`, not in COLO")

    async def start(self) -> None:
        """Ask QEMU to enter COLO. Raises QmpError."""
        await self._c.qemu.prepare(primary=True)
        await self._c.qemu.qmp.migrate(self._c.migrate_to)

    async def watch(self, ck: Checkpoint) -> None:
        """Look once at an entry in progress.

        Raises CheckpointFailed when it cannot succeed any more, or when the guest has stood still
        for too long.
        """
        qmp = self._c.qemu.qmp
        await self._release_proven(ck)
        m = await qmp.execute("query-migrate")
        state = str(m.get("status", ""))
        if state not in ON_THE_WAY:
            text = f": {m['error-desc']}" if m.get("error-desc") else ""
            raise CheckpointFailed(f"the migration is `{state}`, which does not lead to COLO{text}")
        stood_ms = (time.monotonic_ns() - ck.stop_ns) // 1_000_000 if ck.stop_ns else 0
        if stood_ms > self._c.config.qemu.enter_stop and not ck.resume_ns:
            status = await qmp.status()
            raise CheckpointFailed(
                f"the PVM stood still for longer than [qemu] enter_stop, in `{status}`, with the "
                f"migration in `{state}`"
            )

    async def _release_proven(self, ck: Checkpoint) -> None:
        """Release, while synchronising, what the PVM sent before any STOP.

        QMP answers in order: no STOP before an answer means that there was none yet.
        """
        self._c.drain()
        mark = time.monotonic_ns()
        await self._c.qemu.qmp.status()
        self._c.output.release_until(ck.stop_ns or mark)

    def _bypass(self) -> None:
        """Hold nothing any more, nor what is still on its way to this process."""
        self._c.dp.mode = Mode.BYPASS
        self._c.drain()
        self._c.output.release_all()
        self._c.output.uncompared = True

    async def _failed(self, why: str) -> None:
        """Give the guest back to its clients, and let it run again."""
        c = self._c
        self._bypass()
        c.become(State.STARTING, f"COLO was not entered: {why}")
        c.peer.send("failed", n=max(c.dp.epoch, c.view.peer.epoch) + 1, why=why[:1000])
        c.view.order_withdrawn()  # it was about the copy that is given up, not about the next one
        with contextlib.suppress(QmpError):  # leaving COLO tries it again
            await c.qemu.disks.mirrors.cut()
        began, tried = time.monotonic(), ""
        while c.state is State.STARTING:
            try:
                if await self.run_on(time.monotonic() - began):
                    return
                tried = await c.qemu.qmp.status()
            except QmpError as e:
                tried = str(e)
            if not c.qemu.qmp.connected:
                return  # it is gone, or its socket: whoever looks for it reports that
            if time.monotonic() - began > 1:
                c.become(
                    State.STARTING,
                    f"COLO was not entered: {why}; and the PVM stands still ({tried}): trying on",
                )
            await asyncio.sleep(RUN_ON_S)

    async def run_on(self, since_s: float) -> bool:
        """Try once to let the guest run, whatever the entry has left behind; whether it does."""
        qemu = self._c.qemu
        migration = await qemu.qmp.migration_status()
        if migration == "colo":
            await qemu.leave_colo()
        elif migration in CANCELLABLE or migration == "cancelling":
            if since_s > YANK_S:
                with contextlib.suppress(QmpError):  # there may be nothing to cut any more
                    await qemu.yank()
            if migration != "cancelling":
                await qemu.qmp.execute("migrate_cancel")
            elif await qemu.qmp.status() != "running":
                return False
        return await self.cont()

    async def cont(self) -> bool:
        """Let a guest run that an entry has left stopped. Returns whether it runs now."""
        c = self._c
        state = c.state
        status = await c.qemu.qmp.status()
        if status in STOPPED_BY_IT and c.state is state:  # no checkpoint has begun meanwhile
            log.warning("the PVM is `%s`, as by an entry that broke off: cont", status)
            await c.qemu.qmp.execute("cont")
            status = await c.qemu.qmp.status()
        return status in ("running", "prelaunch")  # prelaunch: started with -S, not stopped by us
