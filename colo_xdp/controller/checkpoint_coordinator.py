# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary's checkpoints, one at a time, each to its end or its deadline.

The first one is also controller/colo_entry.py's.

The order, always (DESIGN 4): hold everything here, have the secondary hold everything, trigger,
wait for STOP and RESUME of both guests, release what the PVM sent before its STOP, go on under the
next epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from typing import Any

from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.conntrack_map import ConntrackMap
from ..datapath.datapath import DataPath
from ..engine.journal import Divergence, Entry, Journal
from ..failover.decision import State
from ..qemu.qmp import QmpError, QmpTimeout
from .checkpoint import Checkpoint, CheckpointFailed, CheckpointRequest, Step
from .colo_entry import REARM_S, ColoEntry
from .pacing import URGENT, Pacer

log = logging.getLogger("colo_xdp.controller.primary")

BASE_PART = 290  # connections in one message: it must fit into wire.MAX_FLOWS_TEXT
MAX_CLAIMS = 256  # addresses that the secondary is told; as above
RECORD_S = 1.0  # frames of both guests are held meanwhile
REFUSALS = 20  # tries before a secondary that keeps refusing counts as broken


class CheckpointCoordinator(ColoEntry):
    """A host whose guest is copied. What asks for a checkpoint calls request()."""

    def __init__(self, config: Config, datapath: DataPath) -> None:
        super().__init__(config, datapath)
        self.journal = Journal()
        self._wake = asyncio.Event()  # look at what is wanted
        c = config.checkpoint
        self.pacer = Pacer(c.share, config.compare.compare_timeout * 1_000_000)
        self._hurry = False  # what is wanted is wanted now
        self.delayed = self.folded = 0  # checkpoints that had to wait; requests that one served
        self.delay_s = 0.0
        self._waits_since = 0
        self._plan_refused = ""
        self._plan_until = 0.0  # a planned failover begins no later (monotonic, s)
        self._leave_shadow = False
        self._leave_ns = 0  # when that was asked for (monotonic)
        self._ck: Checkpoint | None = None
        self._ended_ns = 0  # the last one that was complete (monotonic)
        self._exposed = (
            False  # the PVM's frames may pass uncompared: as in shadow, but not asked for
        )
        tables = datapath.flows()
        #: connections in numbers that this guest has kept since it took over
        self.own = ConntrackMap(*tables) if tables else None
        #: the SVM's host has them; a former controller may have died before it handed them over
        self._offsets_sent = self.own is None
        self.by_cause: Counter[str] = Counter()
        self.checkpoints_failed = 0
        self.last_checkpoint: dict[str, Any] = {}
        if datapath.sync_state is SyncState.STANDALONE:
            self.view.went_standalone()
        #: frames that are still on their way to this process leave uncompared
        self._uncompared = self.view.guest.standalone and datapath.mode is Mode.BYPASS

    def request(self, cause: Cause, detail: str, why: Divergence | None = None) -> None:
        """Ask for a checkpoint; a request while one is wanted or under way folds into it."""
        # Also while one is under way: its commit feeds frames that may differ again, and the
        # engine asks once per epoch only.
        may = (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED)
        if self.state not in may:
            return
        if self._want is None:
            self._want = CheckpointRequest(cause.value, detail, why)
        else:
            self.folded += 1
        self._hurry |= cause in URGENT
        self._wake.set()

    async def _protect(self) -> None:
        """Enter COLO once, then serve checkpoints, one at a time."""
        await self._until_entered()
        refusals = 0
        while self.state is not State.STOPPED:
            if self._want is None or not self.peer.connected:
                await self._sleep_or_wake(self._next_periodic())
                if self._want is None and self._periodic_due():
                    self._want = CheckpointRequest(Cause.PERIODIC.value, "period")
            if self._want is None or not self.peer.connected or await self._delayed(self._want):
                continue
            want, self._want, self._hurry = self._want, None, False
            if want.cause == Cause.PLANNED and time.monotonic() > self._plan_until:
                self._plan_refused = "it could not begin in time"
                log.error("no planned failover: %s", self._plan_refused)
                want = CheckpointRequest(Cause.OPERATOR.value, "in place of a planned failover")
            try:
                await self._checkpoint(want)
                refusals = 0
            except (CheckpointFailed, QmpError) as e:
                refused = isinstance(e, CheckpointFailed) and e.refused
                if refused and want.cause == Cause.PLANNED:
                    self._plan_refused = str(e)
                    self._want = CheckpointRequest(
                        Cause.OPERATOR.value, f"in place of a planned failover: {e}"
                    )
                    continue
                if refused and refusals < REFUSALS:
                    refusals += 1
                    log.info("checkpoint (%s) not begun: %s; again", want.cause, e)
                    self._want = want
                    await asyncio.sleep(self.config.peer.heartbeat_interval / 1000)
                    continue
                self.checkpoints_failed += 1
                if isinstance(e, QmpTimeout) and await self.qemu.hangs():
                    # not the secondary's fault: it is the one to go on
                    self.view.guest_gone(hung=True)
                # Silence is no second sign beside silence: that would fence over a cut link.
                self.view.checkpoint_due(not (isinstance(e, CheckpointFailed) and e.channel))
                self.become(State.DEGRADED, f"checkpoint ({want.cause}) did not complete: {e}")
                self._decide()

    async def _clear_record(self) -> None:
        """The arbiter stops saying that this guest is alone before the other one counts, so that it
        may take over from then on. A store that is away is told later, at the same price."""
        self.arbiter.paired()
        end = time.monotonic() + RECORD_S
        while self.arbiter.view().recorded and time.monotonic() < end:
            await asyncio.sleep(TICK_S / 5)

    def _next_periodic(self) -> float:
        p = self.config.checkpoint.periodic / 1000
        return min(p, REARM_S) if p else REARM_S

    def _periodic_due(self) -> bool:
        p = self.config.checkpoint.periodic / 1000
        at = self.last_checkpoint.get("at", 0.0)
        return bool(p) and self.state is State.PROTECTED and time.time() - at >= p

    async def _delayed(self, want: CheckpointRequest) -> bool:
        """Whether what is wanted has to wait; then some of that time has passed."""
        if self.view.guest.halted:
            await self._sleep_or_wake(REARM_S)
            return True
        now = time.monotonic_ns()
        wait = self.pacer.begin_ns(now) - now
        if self._hurry or want.cause in URGENT or wait <= 0:
            self._waits_since = 0
            return False
        if not self._waits_since:
            self._waits_since = now
            self.delayed += 1
        await self._sleep_or_wake(wait / 1e9)
        self.delay_s += (time.monotonic_ns() - now) / 1e9
        return True

    async def _sleep_or_wake(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _await(self, ck: Checkpoint, what: str, deadline: float) -> None:
        """Until something about the checkpoint changes; raises CheckpointFailed at the deadline."""
        ck.changed.clear()
        left = deadline - time.monotonic()
        if left <= 0:
            raise CheckpointFailed(f"no {what} within its deadline")
        poll = 0.005 if ck.cause == Cause.INITIAL.value else 0.1
        # Not wait_for(): that of Python 3.11 forgets a cancellation that meets its result, as when
        # the last word of a checkpoint comes with the decision to go solo.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, poll)):
                await ck.changed.wait()
        if ck.failed:
            raise CheckpointFailed(f"the secondary: {ck.failed}", refused=not ck.triggered)
        if self.view.guest.colo_exit:
            raise CheckpointFailed("QEMU has lost the COLO channel (COLO_EXIT)")
        if not self.peer.connected:
            raise CheckpointFailed("the control channel to the secondary is down", channel=True)
        if self.view.guest.gone or not self.qemu.qmp.connected:
            raise CheckpointFailed("QMP to the PVM is down")

    async def _checkpoint(self, want: CheckpointRequest) -> None:
        """One checkpoint from its beginning to its end. Raises CheckpointFailed, QmpError; what is
        held stays held then."""
        n = max(self.dp.epoch, self.view.peer.epoch) + 1
        ck = self._ck = Checkpoint(n, want.cause, time.monotonic_ns())
        if ck.initial:
            self._offsets_sent = self.own is None
        c, q = self.config.checkpoint, self.config.qemu
        deadline = time.monotonic() + (q.enter_timeout if ck.initial else c.deadline) / 1000
        try:
            self.become(State.CHECKPOINTING, f"{want.cause}: {want.detail}")
            await self._prepare(ck, deadline)
            await self._trigger(ck)
            await self._until_resumed(ck, deadline)
            held = await self._commit(ck, want)
        except (CheckpointFailed, QmpError) as e:
            log.info("checkpoint to epoch %d: %s when it failed", n, ck.step.value)
            ck.ended = Step.FAILED
            self._record(want, ck, (self.engine.held_packets, self.engine.held_bytes), str(e))
            raise
        finally:
            self._ck = None
            if not ck.initial:  # which holds nothing for most of its time
                self.pacer.took(ck.began_ns, time.monotonic_ns())
        self._committed(ck, want, held)

    def _hold(self) -> None:
        """Everything of both guests that comes from now on."""
        self._uncompared = False  # also a failed entry can end so: QEMU was in COLO
        self.engine.begin_checkpoint()
        self.dp.mode = Mode.CHECKPOINT

    async def _prepare(self, ck: Checkpoint, deadline: float) -> None:
        """Until both hosts hold everything."""
        if not ck.initial:  # an unprotected PVM is not held up by a peer that is slow to answer
            self._hold()
        own, macs = self.dp.addresses.export(MAX_CLAIMS)
        if own or macs:
            self.peer.send("claims", n=ck.n, addresses=own.hex(), macs=macs.hex())
        self.peer.send("begin", n=ck.n, cause=ck.cause, initial=ck.initial)
        answer = min(deadline, time.monotonic() + self.config.checkpoint.deadline / 1000)
        while ck.step is Step.PREPARING:
            await self._await(ck, "answer of the secondary's controller", answer)
        if ck.initial:
            self._hold()

    async def _trigger(self, ck: Checkpoint) -> None:
        """Ask QEMU: for the first one, to enter COLO."""
        if ck.initial:
            await self.qemu.qmp.prepare(primary=True)
            await self.qemu.qmp.migrate(self.migrate_to)
        elif self.view.guest.halted:  # meanwhile: QEMU would abort
            raise CheckpointFailed(self.view.guest.halted, refused=True)
        else:
            ck.trigger(self._still_ns)
            await self.qemu.qmp.trigger_checkpoint()
        ck.triggered = True

    async def _until_resumed(self, ck: Checkpoint, deadline: float) -> None:
        """Until both guests run the same state, and the secondary has what belongs to it."""
        while ck.step is not Step.RESUMED:
            if ck.initial:
                await self._watch_entry(ck)
            await self._await(ck, "STOP and RESUME of both guests", deadline)
        if ck.initial or not self._offsets_sent:
            await self._hand_offsets(ck, deadline)

    async def _commit(self, ck: Checkpoint, want: CheckpointRequest) -> tuple[int, int]:
        """Release what the PVM sent before its STOP, and go on under the next epoch. Returns what
        was held: frames and bytes."""
        self.drain()  # frames from before STOP may still be in the ring
        held = (self.engine.held_packets, self.engine.held_bytes)
        if self.view.guest.standalone:
            await self._clear_record()
        self.engine.commit_checkpoint(ck.stop_ns, ck.n, time.monotonic_ns())
        # Before the epoch, by which the secondary is told that its guest counts.
        self.view.checkpointed()
        self.dp.sync_state = SyncState.IN_SYNC
        self.dp.epoch = ck.n
        if want.cause == Cause.PLANNED:
            self._fall_silent(ck, want.detail, released=held[0] > 0)
        else:
            self.dp.mode = Mode.RUN
        if self._leave_shadow and self._leave_ns <= ck.stop_ns:
            self._leave_shadow = self._exposed = False
            self.view.set_shadow(False)
        elif self._leave_shadow:  # left behind the STOP: another one has to end it
            self._want = self._want or CheckpointRequest(
                Cause.OPERATOR.value, "leaving shadow mode"
            )
        self._beat()  # a secondary that has just entered waits for this word
        ck.ended = Step.COMMITTED
        return held

    def _fall_silent(self, ck: Checkpoint, why: str, *, released: bool) -> None:
        """The end of a planned failover here. Nothing that is newer than the state which the SVM
        has loaded has left or will: the guests are equal, and this one is silent from here on,
        whoever dies next."""
        self.dp.mode = Mode.DROP
        self.become(State.STOPPED, f"handed over to the secondary: {why}")
        now = time.monotonic_ns()
        last = now if released else ck.stop_ns  # what was held left with the commit
        self.peer.send("downtime_start", us=max(0, now - last) // 1000)
        self.peer.send("shut", why="planned failover", alone=self.view.guest.standalone)

    def _committed(self, ck: Checkpoint, want: CheckpointRequest, held: tuple[int, int]) -> None:
        """The guests are equal: write it down, and say so."""
        self._record(want, ck, held)
        self.by_cause[want.cause] += 1
        self.last_checkpoint = {
            "cause": want.cause,
            "detail": want.detail,
            "pause_ms": (ck.resume_ns - ck.stop_ns) / 1e6,
            "total_ms": (time.monotonic_ns() - ck.began_ns) / 1e6,
            "at": time.time(),
        }
        self.view.checkpoint_due(False)
        self._ended_ns = time.monotonic_ns()
        self.devices.checkpointed(want.cause)
        self.arbiter.paired()
        if want.cause != Cause.PLANNED:
            self.become(State.PROTECTED, f"both guests are equal as of epoch {ck.n} ({want.cause})")

    def _record(
        self, want: CheckpointRequest, ck: Checkpoint, held: tuple[int, int], failed: str = ""
    ) -> None:
        d = want.why
        self.journal.checkpoint(
            Entry(
                time.time(), want.cause, want.detail,
                d.proto if d else "", d.port if d else 0, d.rule if d else "",
                max(0, ck.resume_ns - ck.stop_ns) / 1e6, (time.monotonic_ns() - ck.began_ns) / 1e6,
                *held, failed,
            )
        )  # fmt: skip

    async def _hand_offsets(self, ck: Checkpoint, deadline: float) -> None:
        """What the guest has kept of its own numbers, to the host of its new copy.

        Both guests have resumed and nothing has left or arrived since: what changes from here on
        both hosts see alike.
        """
        entries: list[bytes] = []
        if self.own is not None:
            entries = await asyncio.to_thread(self.own.export, self.dp.promoted_epoch)
        parts = [entries[i : i + BASE_PART] for i in range(0, len(entries), BASE_PART)] or [[]]
        for n, part in enumerate(parts):
            self.peer.send("offsets", n=n, last=n == len(parts) - 1, flows=b"".join(part).hex())
            while ck.based <= n:
                await self._await(ck, "word that the old connections' offsets are there", deadline)
        self._offsets_sent = True
        if entries:
            log.info("offsets of %d connections handed to the new secondary", len(entries))

    def asked_again(self) -> None:
        if self.state is State.STARTING and self.tries.count:
            self.tries.forget()
            self._wake.set()

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.state not in (State.PROTECTED, State.CHECKPOINTING):
            raise ValueError(f"no checkpoint from state {self.state.value}: {self.reason}")
        before = self.dp.epoch
        if self.view.guest.halted:
            raise ValueError(f"no checkpoint now: {self.view.guest.halted}")
        self._want = self._want or CheckpointRequest(Cause.OPERATOR.value, "asked by the operator")
        self._hurry = True
        self._wake.set()
        deadline = time.monotonic() + self.config.checkpoint.deadline / 1000 + 1
        failed = self.checkpoints_failed
        while self.dp.epoch == before and self.checkpoints_failed == failed:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.002)
        if self.dp.epoch == before:
            raise ValueError(f"the checkpoint did not complete: {self.reason}")
        return {"epoch": self.dp.epoch, **self.last_checkpoint}
