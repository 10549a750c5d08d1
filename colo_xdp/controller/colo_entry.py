# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary's way into COLO, and back out of an entry that fails.

Until the first checkpoint is complete the guest is its clients' only one: whatever becomes of an
entry, it runs again within a second of its end, and it does not stand still for longer than
enter_stop. What fails twice in the same way is not tried for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from abc import abstractmethod

from ..abi import Mode
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.datapath import DataPath
from ..engine.engine import Engine
from ..failover.decision import State
from ..qemu.qmp import QmpError
from ..qemu.supervisor import IN_COLO
from .checkpoint import Checkpoint, CheckpointFailed, CheckpointRequest
from .guest_lifecycle import GuestLifecycle

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
        """The pair is protected, or a person has asked."""
        self.first, self.count, self._qemu, self._at, self._free = "", 0, (-1, ""), 0.0, True

    def failed(self, why: str, qemu: tuple[int, str], now: float, *, stopped: bool) -> None:
        """`stopped`: the guest stood still for it. `now`: monotonic, s."""
        if _alike(why) == _alike(self.first):
            self.count += 1
        else:
            self.first, self.count = why, 1
        self._qemu, self._at, self._free = qemu, now, not stopped

    @property
    def story(self) -> str:
        """What came of the entries so far: the first cause, and how often."""
        often = f", {self.count} times in the same way" if self.count > 1 else ""
        return f"COLO was not entered{often}: {self.first}" if self.count else ""

    def held_back(self, qemu: tuple[int, str], now: float) -> str:
        """Why the next entry is not tried now, or an empty string."""
        if self.count < 2:
            return ""
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


class ColoEntry(GuestLifecycle):
    """A host whose guest is to be copied for the first time."""

    engine: Engine

    def __init__(self, config: Config, datapath: DataPath) -> None:
        super().__init__(config, datapath)
        self.tries = Tries()
        self._peer_ready = False
        self._peer_qemu = (-1, "")  # which QEMU waits there, of which controller
        self._peer_lacks = ""  # why the secondary is not ready
        self._stopped_for_it = False  # the guest was stopped for the entry under way
        self._still_ns = 0  # since when the guest stands still (monotonic); 0: it runs
        self._want: CheckpointRequest | None = None
        #: frames that are still on their way to this process leave uncompared
        self._uncompared = False

    @abstractmethod
    async def _checkpoint(self, want: CheckpointRequest) -> None:
        """Make one. Raises CheckpointFailed, QmpError."""

    @abstractmethod
    async def _sleep_or_wake(self, seconds: float) -> None:
        """Until somebody wants something."""

    async def _migration(self) -> str | None:
        """State of QEMU's migration; None while QMP does not answer."""
        try:
            return await self.qemu.qmp.migration_status()
        except QmpError:
            return None

    async def _until_entered(self) -> None:
        """Until the guest is in COLO, or the data path is shut."""
        while self.state is not State.STOPPED:
            migration = await self._migration()
            # Undecided: a checkpoint would make it speak, and nobody would decide any more.
            if migration == "colo" and not self.undecided:
                self._want = CheckpointRequest(
                    Cause.CONTROLLER_RESTART.value, "this controller is new"
                )
                return
            lost = migration is not None and migration not in IN_COLO
            if lost and self.view.guest.standalone and self.dp.mode is Mode.CHECKPOINT:
                # Nobody has confirmed the copy of the first checkpoint: the guest may go on alone.
                await self._enter_failed("a former controller did not come to its end")
            if self.undecided:
                pass  # what is waited for the decision says
            elif not (a := self.arbiter.view()).may_transmit:
                self.become(self.state, f"waiting for the {a.name}: nothing leaves this host")
            elif migration is None:
                self.become(self.state, self.view.guest.why or "waiting for this host's QEMU (QMP)")
            elif self.peer.connected and self._peer_ready:
                why = await self.unfit()
                why = why or self.tries.held_back(self._peer_qemu, time.monotonic())
                if why:
                    self.become(self.state, why)
                else:
                    self._peer_ready = False  # of the next SVM it is said anew, also meanwhile
                    self._stopped_for_it = False
                    try:
                        await self._enter()
                        self.tries.forget()
                        return
                    except (CheckpointFailed, QmpError) as e:
                        if not self.view.guest.standalone:  # the copy counts, and could take over
                            self.view.checkpoint_due(True)
                            self.become(State.DEGRADED, f"COLO ended as it was entered: {e}")
                            return
                        if not (isinstance(e, CheckpointFailed) and (e.channel or e.refused)):
                            now, stopped = time.monotonic(), self._stopped_for_it
                            self.tries.failed(str(e), self._peer_qemu, now, stopped=stopped)
                        await self._enter_failed(str(e))
            else:
                lacks = f": {self._peer_lacks}" if self._peer_lacks else ""
                before = f"; {self.tries.story}" if self.tries.count else ""
                self.become(
                    self.state,
                    f"waiting for the secondary (controller, and QEMU -incoming){lacks}{before}",
                )
            await self._sleep_or_wake(REARM_S)

    async def _enter(self) -> None:
        """Initial synchronisation: as a checkpoint, but the PVM's output goes on meanwhile.

        Output is unprotected until the first STOP. What is captured before a QMP round
        trip that brought no STOP was sent before it, so it may leave.
        """
        self.view.entering()
        await self._checkpoint(CheckpointRequest(Cause.INITIAL.value, "entering COLO"))
        state = await self.qemu.qmp.migration_status()
        if state != "colo":
            raise CheckpointFailed(f"QEMU is in `{state}`, not in COLO")

    async def _watch_entry(self, ck: Checkpoint) -> None:
        """One look at an entry under way.

        Raises CheckpointFailed when it can come to no good end, or the guest has stood still for
        too long.
        """
        await self._release_proven(ck)
        m = await self.qemu.qmp.execute("query-migrate")
        state = str(m.get("status", ""))
        if state not in ON_THE_WAY:
            text = f": {m['error-desc']}" if m.get("error-desc") else ""
            raise CheckpointFailed(f"the migration is `{state}`, which does not lead to COLO{text}")
        stood_ms = (time.monotonic_ns() - ck.stop_ns) // 1_000_000 if ck.stop_ns else 0
        if stood_ms > self.config.qemu.enter_stop and not ck.resume_ns:
            status = await self.qemu.qmp.status()
            raise CheckpointFailed(
                f"the PVM stood still for longer than [qemu] enter_stop, in `{status}`, with the "
                f"migration in `{state}`"
            )

    async def _release_proven(self, ck: Checkpoint) -> None:
        """While synchronising: QMP answers in order, so no STOP before an answer means none yet."""
        self.drain()
        mark = time.monotonic_ns()
        await self.qemu.qmp.status()
        self.engine.release_until(ck.stop_ns or mark)

    def _bypass(self) -> None:
        """Nothing is held any more, nor what is still on its way to this process."""
        self.dp.mode = Mode.BYPASS
        self.drain()
        self.engine.release_all()
        self._uncompared = True

    async def _enter_failed(self, why: str) -> None:
        self._bypass()
        self.become(State.STARTING, f"COLO was not entered: {why}")
        self.peer.send("failed", n=max(self.dp.epoch, self.view.peer.epoch) + 1, why=why[:1000])
        began, tried = time.monotonic(), ""
        while self.state is State.STARTING:
            try:
                if await self._run_on(time.monotonic() - began):
                    return
                tried = await self.qemu.qmp.status()
            except QmpError as e:
                tried = str(e)
            if not self.qemu.qmp.connected:
                return  # it is gone, or its socket: whoever looks for it says so
            if time.monotonic() - began > 1:
                self.become(
                    State.STARTING,
                    f"COLO was not entered: {why}; and the PVM stands still ({tried}): trying on",
                )
            await asyncio.sleep(RUN_ON_S)

    async def _run_on(self, since_s: float) -> bool:
        """One try to let the guest run, whatever the entry has left behind; whether it does."""
        migration = await self.qemu.qmp.migration_status()
        if migration == "colo":
            await self.qemu.leave_colo()
        elif migration in CANCELLABLE or migration == "cancelling":
            if since_s > YANK_S:
                with contextlib.suppress(QmpError):  # there may be nothing to cut any more
                    await (self.qemu.oob or self.qemu.qmp).yank()
            if migration != "cancelling":
                await self.qemu.qmp.execute("migrate_cancel")
            elif await self.qemu.qmp.status() != "running":
                return False
        return await self._cont()

    async def _cont(self) -> bool:
        """An entry that broke off leaves the guest stopped. Whether it runs now."""
        state = self.state
        status = await self.qemu.qmp.status()
        if status in STOPPED_BY_IT and self.state is state:  # no checkpoint has begun meanwhile
            log.warning("the PVM is `%s`, as by an entry that broke off: cont", status)
            await self.qemu.qmp.execute("cont")
            status = await self.qemu.qmp.status()
        return status in ("running", "prelaunch")  # prelaunch: started with -S, not stopped by us
