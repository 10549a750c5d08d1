# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary host: hold and compare the PVM's output, ask for checkpoints, go solo.

Order of a checkpoint, always (DESIGN 4): hold everything here, have the
secondary hold everything, trigger, wait for STOP and RESUME of both guests,
release what the PVM sent before its STOP, go on under the next epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from . import abi
from .abi import Bond, Mode
from .beacon import Flag
from .compare import Engine
from .config import Config
from .controller import IN_COLO, INCOMING_S, TICK_S, Controller
from .datapath import DataPath
from .failover import Action, Role, State
from .flowtable import FlowTable
from .journal import Divergence, Entry, Journal
from .qmp import QmpError, QmpTimeout
from .qmp_event import QmpEvent
from .reasons import Cause
from .record import Record
from .report import rules_json
from .ring import Event
from .speaker import Speaker
from .status import WAIT_BUCKETS

log = logging.getLogger("colo_xdp.primary")

REARM_S = 0.5
SWEEP_S = 5.0
BASE_PART = 290  # connections in one message: it must fit into wire.MAX_FLOWS_TEXT
BRIDGE_S = 1.0  # between two looks at the ports of the tap's bridge
RECORD_S = 1.0  # frames of both guests are held meanwhile
REFUSALS = 20  # tries before a secondary that keeps refusing counts as broken
LOSS_CHECK_NS = 100_000_000
SWEEP = 400  # connections of tier K looked at in that time: a million in 4 minutes


class CheckpointFailed(RuntimeError):
    """A checkpoint did not complete; what is held stays held.

    `refused`: the secondary's controller said no before QEMU was asked, so it can be tried again.
    `channel`: its controller cannot be heard, which says nothing of its QEMU.
    """

    def __init__(self, why: str, *, refused: bool = False, channel: bool = False) -> None:
        super().__init__(why)
        self.refused, self.channel = refused, channel


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint in progress. Times: CLOCK_MONOTONIC, ns."""

    n: int
    cause: str
    began_ns: int
    begun: bool = False
    triggered: bool = False
    stop_ns: int = 0
    resume_ns: int = 0
    done: bool = False
    based: int = 0  # parts of the guest's own offsets that the secondary has taken over
    failed: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Want:
    """A checkpoint that is asked for; `why`: the divergence that did, if one did."""

    cause: str
    detail: str
    why: Divergence | None = None


class Primary(Controller):
    """Controller of the PVM's host."""

    role = Role.PRIMARY

    def __init__(self, config: Config, datapath: DataPath) -> None:
        super().__init__(config, datapath)
        self.engine = Engine(
            config.limits(),
            config.policy(),
            self._release,
            request_checkpoint=lambda d: self.request(
                d.cause, f"{d.flow} at {d.evidence.offset}", d
            ),
            on_wait=self._on_wait,
            on_divergence=lambda d: self.journal.divergence(d, time.time()),
            unmirror=datapath.unmirror,
            fast=datapath.fast,
        )
        self.journal = Journal()
        self.engine.epoch = datapath.epoch
        self._injector = datapath.injectors["release"]
        self._want: Want | None = None
        self._leave_shadow = False
        self._leave_ns = 0  # when that was asked for (monotonic)
        self._plan_refused = ""
        self._wake = asyncio.Event()
        self._peer_ready = False
        self._guard: asyncio.Task[Any] | None = None
        self._ck: Checkpoint | None = None
        table = datapath.flows()
        #: connections in numbers that this guest has kept since it took over
        self.own = FlowTable(table) if table else None
        #: the SVM's host has them; a former controller may have died before it handed them over
        self._handed = self.own is None
        self._lost = datapath.lost_events()
        self._lost_checked = 0
        self.by_cause: Counter[str] = Counter()
        self.checkpoints_failed = 0
        self.last_checkpoint: dict[str, Any] = {}
        self.waits = [0] * (len(WAIT_BUCKETS) + 1)
        self.wait_sum = 0.0
        datapath.unmirror(None)  # what a former controller's rules said
        self.spoke_alone = datapath.bond is Bond.ALONE
        #: frames that are still on their way to this process leave uncompared
        self._uncompared = self.spoke_alone and datapath.mode is Mode.BYPASS
        if datapath.adopted and self._uncompared:
            self.state = State.SOLO
            self.reason = "the guest spoke alone under a former controller"
        elif datapath.adopted and datapath.mode in (Mode.RUN, Mode.CHECKPOINT):
            # A former controller held frames that are lost with it; only a checkpoint
            # makes both sides equal again. Until then nothing is decided.
            datapath.mode = Mode.CHECKPOINT
            self.engine.begin_checkpoint()
            self.state = State.DEGRADED
            self.reason = "a former controller's data path was taken over: a checkpoint is needed"
        elif datapath.mode is Mode.DROP:
            self.state = State.STOPPED
            self.reason = "the data path was shut by a former controller"

    # ---- frames

    def on_event(self, event: Event) -> None:
        if self.state is State.STOPPED:
            return
        rec = Record(
            event.frame, event.ts_ns, event.gso_size, event.partial, captured=event.captured
        )
        if event.source == abi.Source.PVM:
            if self._uncompared:
                self._release(rec)
            else:
                self.engine.from_pvm(rec, time.monotonic_ns())
        elif not self._uncompared:
            self.engine.from_svm(rec, event.epoch, time.monotonic_ns())

    def on_batch(self) -> None:
        self.engine.flush(time.monotonic_ns())

    def _release(self, rec: Record) -> None:
        self._injector.send(rec.frame, rec.gso_size, rec.partial)

    def _on_wait(self, ns: int) -> None:
        s = ns / 1e9
        self.waits[bisect_left(WAIT_BUCKETS, s)] += 1
        self.wait_sum += s

    def on_tick(self, now_ns: int) -> None:
        # While the control channel is cut timeouts go on: what waits too long has to be known.
        cut = self.state is State.DEGRADED and self.dp.mode is Mode.RUN and not self.peer.connected
        if self.state is State.PROTECTED or cut:
            self.engine.tick(now_ns)
        else:
            self.engine.unbrake(now_ns)
        if now_ns - self._lost_checked >= LOSS_CHECK_NS:
            self._lost_checked = now_ns
            lost = self.dp.lost_events()
            if self.dp.fast is not None:
                self.dp.fast.sweep(now_ns, SWEEP)
            if lost > self._lost:
                missing, self._lost = lost - self._lost, lost
                self.request(Cause.EVENT_LOST, f"{missing} frames did not fit into the event ring")

    def tick_ns(self) -> int:
        return self.engine.tick_ns()

    # ---- checkpoints

    def request(self, cause: Cause, detail: str, why: Divergence | None = None) -> None:
        """Ask for a checkpoint; a request while one is wanted or under way folds into it."""
        # Also while one is under way: its commit feeds frames that may differ again, and the
        # engine asks once per epoch only.
        may = (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED)
        if self.state in may and self._want is None:
            self._want = Want(cause.value, detail, why)
            self._wake.set()

    def on_qmp(self, event: QmpEvent) -> None:
        ck = self._ck
        if event.name == "STOP":
            if ck is not None:
                ck.stop_ns = event.ts_ns
                if not ck.began_ns <= event.ts_ns <= event.seen_ns:
                    # The clock was set meanwhile. Too early a STOP only costs a checkpoint more.
                    log.warning("STOP has an impossible time stamp: the clock was set")
                    ck.stop_ns = ck.began_ns
            elif self.state is State.PROTECTED:
                self.request(Cause.OPERATOR, "QEMU stopped the PVM without being asked by us")
        elif event.name == "RESUME" and ck is not None and ck.stop_ns:
            ck.resume_ns = event.ts_ns
        if ck is not None:
            ck.changed.set()

    def peer_connected(self) -> None:
        self.checkpoint_overdue = False

    def on_message(self, msg: dict[str, Any]) -> None:
        kind, ck = msg["type"], self._ck
        if kind == "ready":
            self._peer_ready, self.peer_vm_gone = True, False  # another SVM than the one that died
            if self.speaker is not None:
                self.speaker.revived()
            self._wake.set()
            self._protect_again()
        elif kind == "beat":
            if self.state is State.STOPPED:
                return
            waits = self.shadow and not self._leave_shadow and not self.engine.shadow
            if waits and msg["shadow"] and msg["role"] == Role.SECONDARY.value:
                self.engine.set_shadow(True, time.monotonic_ns())
            if msg["state"] == State.TAKEN_OVER.value:
                self._stand_down("the secondary speaks for the guest")
            elif self._older_than(msg):
                self._stand_down("the other host runs the PVM: this data path knows less of it")
        elif kind == "taken":
            self._stand_down(f"the secondary took over: {msg['why']}")
        elif kind == "plan":
            try:
                self._plan(msg["why"])
            except ValueError as e:
                log.warning("no hand-over: %s", e)
        elif kind == "resumed":
            self.last_failover = {"gap_ms": msg["gap_us"] / 1e3, "took_ms": msg["took_us"] / 1e3}
            log.info("the network heard nothing of the guest for %.1f ms", msg["gap_us"] / 1e3)
        elif kind == "based" and ck is not None:
            ck.based = max(ck.based, msg["n"] + 1)
            ck.changed.set()
        elif ck is not None and kind in ("begun", "done", "failed") and msg["n"] == ck.n:
            if kind == "begun":
                ck.begun = True
            elif kind == "done":
                ck.done = True
            else:
                ck.failed = msg["why"]
            ck.changed.set()

    def on_beacon(self, flags: Flag) -> None:
        speaks = Flag.SVM in flags and Flag.ALONE in flags and Flag.SHUT not in flags
        if speaks and self.state is not State.STOPPED:
            self._stand_down("the secondary speaks for the guest, as its beacons say")

    @property
    def waiting(self) -> bool:
        return self._want is not None or (self._ck is None and self.dp.mode is Mode.CHECKPOINT)

    def _older_than(self, msg: dict[str, Any]) -> bool:
        """Two primaries, since this host has lost what was pinned (a reboot): the pair's epochs
        only ever grow, so who has the smaller one has missed what came after."""
        if msg["role"] != Role.PRIMARY.value or msg["state"] == State.STOPPED.value:
            return False
        mine: int = self.dp.epoch
        theirs: int = msg["epoch"]
        return theirs > mine or (theirs == mine and self.config.role == "secondary")

    def _stand_down(self, why: str) -> None:
        """Never speak against a secondary that has taken over."""
        self.dp.mode = Mode.DROP
        if self._guard is not None:
            self._guard.cancel()
        self.become(State.STOPPED, why)

    def paired(self) -> bool:
        return self.state in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED)

    def outdated(self, why: str) -> None:
        self._stand_down(why)

    def on_lease(self) -> None:
        self._wake.set()

    def _protect_again(self) -> None:
        """A new secondary waits for the guest that has been alone until now."""
        if self.state is State.SOLO and self._peer_ready:
            self.become(State.STARTING, "a new secondary waits: protecting again")
            self._guard = self.spawn(self._leave_and_protect())

    async def _leave_and_protect(self) -> None:
        while self.state is State.STARTING:
            try:
                if await self.qmp.migration_status() not in IN_COLO:
                    break
                await self.leave_colo()  # of the pair that was
            except QmpError as e:
                log.warning("%s", e)
            await asyncio.sleep(REARM_S)
        self.operator = self.forced = self.checkpoint_overdue = False
        self.fence_result = self._want = None
        await self._protect()

    async def succeed(self) -> None:
        net = self.config.network
        if not net.bridge and self.dp.in_bridge:
            log.error("[network] bridge is needed to become the secondary: %s is in one", net.tap)
            await asyncio.sleep(INCOMING_S)
            return
        self.change_role("the other guest speaks, and a new QEMU waits here for its state")

    async def _hand_offsets(self, ck: Checkpoint, deadline: float) -> None:
        """What the guest has kept of its own numbers, to the host of its new copy.

        Both guests have resumed and nothing has left or arrived since: what changes from here on
        both hosts see alike.
        """
        entries: list[bytes] = []
        if self.own is not None:
            entries = await asyncio.to_thread(self.own.export, self.dp.base_epoch)
        parts = [entries[i : i + BASE_PART] for i in range(0, len(entries), BASE_PART)] or [[]]
        for n, part in enumerate(parts):
            self.peer.send("base", n=n, last=n == len(parts) - 1, flows=b"".join(part).hex())
            while ck.based <= n:
                await self._await(ck, "word that the old connections' offsets are there", deadline)
        self._handed = True
        if entries:
            log.info("offsets of %d connections handed to the new secondary", len(entries))

    async def start(self) -> None:
        await super().start()
        self.spawn(self._watch_bridge())
        if self.own is not None:
            self.spawn(self._sweep_own(self.own))

    async def _sweep_own(self, own: FlowTable) -> None:
        """The programs that translate step out with the last connection that needs them."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(own.sweep, self.dp.base_epoch)
            if not own.wanted and not self._ck:
                self.own = None
                await asyncio.to_thread(self.dp.drop_guest)
                log.info("no connection in the guest's own numbers is left")
                return

    async def _watch_bridge(self) -> None:
        while True:
            if self.dp.mode in (Mode.RUN, Mode.CHECKPOINT):  # else it may live elsewhere by now
                await asyncio.to_thread(self.dp.watch_bridge)
            await asyncio.sleep(BRIDGE_S)

    async def on_qemu(self) -> None:
        if self.state is State.SOLO:
            migration = await self._migration()
            if migration in IN_COLO:  # a former controller died before this
                try:
                    await self.leave_colo()
                except QmpError as e:  # or QEMU was just about to
                    log.warning("%s (the PVM goes on all the same)", e)
            if migration in (*IN_COLO, "failed"):
                self.spawn(self._let_run())
        elif self._guard is None and self.state is not State.STOPPED:
            self._guard = self.spawn(self._protect())

    async def _protect(self) -> None:
        """Enter COLO once, then serve checkpoints, one at a time."""
        while self.state is not State.STOPPED:
            migration = await self._migration()
            if migration == "colo":
                self._want = Want(Cause.CONTROLLER_RESTART.value, "this controller is new")
                break
            lost = migration is not None and migration not in IN_COLO
            if lost and self.spoke_alone and self.dp.mode is Mode.CHECKPOINT:
                # Nobody has confirmed the copy of the first checkpoint: the guest may go on alone.
                await self._enter_failed("a former controller did not come to its end")
            if self.speaker is not None and not self.speaker.may_speak:
                self.become(self.state, "waiting for the lease: nothing leaves this host")
            elif migration is not None and self.peer.connected and self._peer_ready:
                self._peer_ready = False  # of the next SVM it is to be said anew, also meanwhile
                try:
                    await self._enter()
                    break
                except (CheckpointFailed, QmpError) as e:
                    await self._enter_failed(str(e))
            else:
                self.become(
                    self.state, "waiting for the secondary (controller, and QEMU -incoming)"
                )
            await self._sleep_or_wake(REARM_S)
        refusals = 0
        while self.state is not State.STOPPED:
            if self._want is None or not self.peer.connected:
                await self._sleep_or_wake(self._next_periodic())
                if self._want is None and self._periodic_due():
                    self._want = Want(Cause.PERIODIC.value, "period")
            if self._want is None or not self.peer.connected:
                continue
            want, self._want = self._want, None
            try:
                await self._checkpoint(want)
                refusals = 0
            except (CheckpointFailed, QmpError) as e:
                refused = isinstance(e, CheckpointFailed) and e.refused
                if refused and want.cause == Cause.PLANNED:
                    self._plan_refused = str(e)
                    self._want = Want(Cause.OPERATOR.value, f"in place of a planned failover: {e}")
                    continue
                if refused and refusals < REFUSALS:
                    refusals += 1
                    log.info("checkpoint (%s) not begun: %s; again", want.cause, e)
                    self._want = want
                    await asyncio.sleep(self.config.peer.heartbeat_interval / 1000)
                    continue
                self.checkpoints_failed += 1
                if isinstance(e, QmpTimeout) and await self.hangs():
                    # not the secondary's fault: it is the one to go on
                    self.vm_gone = self.vm_hangs = True
                # Silence is no second sign beside silence: that would fence over a cut link.
                self.checkpoint_overdue = not (isinstance(e, CheckpointFailed) and e.channel)
                self.become(State.DEGRADED, f"checkpoint ({want.cause}) did not complete: {e}")
                self._decide()

    def _bypass(self) -> None:
        """Nothing is held any more, nor what is still on its way to this process."""
        self.dp.mode = Mode.BYPASS
        self._drain()
        self.engine.release_all()
        self._uncompared = True

    async def _clear_record(self, s: Speaker) -> None:
        """The store stops saying that this guest is alone before the other one counts, so that it
        may take over from then on. A store that is away is told later, at the same price."""
        s.paired()
        end = time.monotonic() + RECORD_S
        while s.recorded and time.monotonic() < end:
            await asyncio.sleep(TICK_S / 5)

    async def _migration(self) -> str | None:
        """State of QEMU's migration; None while QMP does not answer."""
        try:
            return await self.qmp.migration_status()
        except QmpError:
            return None

    def _next_periodic(self) -> float:
        p = self.config.checkpoint.periodic / 1000
        return min(p, REARM_S) if p else REARM_S

    def _periodic_due(self) -> bool:
        p = self.config.checkpoint.periodic / 1000
        at = self.last_checkpoint.get("at", 0.0)
        return bool(p) and self.state is State.PROTECTED and time.time() - at >= p

    async def _sleep_or_wake(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _enter(self) -> None:
        """Initial synchronisation: as a checkpoint, but the PVM's output goes on meanwhile.

        Output is unprotected until the first STOP. What is captured before a QMP round
        trip that brought no STOP was sent before it, so it may leave.
        """
        self.colo_exit = False
        self._handed = self.own is None
        await self._checkpoint(Want(Cause.INITIAL.value, "entering COLO"))
        if await self.qmp.migration_status() != "colo":
            raise CheckpointFailed(f"QEMU is in `{await self.qmp.migration_status()}`, not in COLO")

    async def _enter_failed(self, why: str) -> None:
        self._bypass()
        self.become(State.STARTING, f"COLO was not entered: {why}")
        try:
            await self._cont()
        except QmpError as e:
            log.warning("%s", e)

    async def _cont(self) -> bool:
        """A first checkpoint that broke off leaves the guest stopped. Whether it runs now."""
        state = self.state
        status = await self.qmp.status()
        if status == "paused" and self.state is state:  # no checkpoint has begun meanwhile
            log.warning("the PVM is paused, as by a checkpoint that broke off: cont")
            await self.qmp.execute("cont")
        return status in ("paused", "running")

    async def _let_run(self) -> None:
        """The guest is alone: see to it that it runs, also when QEMU has to be waited for."""
        while self.state is State.SOLO:
            with contextlib.suppress(QmpError):
                if await self._cont():
                    return
            await asyncio.sleep(REARM_S)

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
        if self.colo_exit:
            raise CheckpointFailed("QEMU has lost the COLO channel (COLO_EXIT)")
        if not self.peer.connected:
            raise CheckpointFailed("the control channel to the secondary is down", channel=True)
        if self.vm_gone or not self.qmp.connected:
            raise CheckpointFailed("QMP to the PVM is down")

    async def _checkpoint(self, want: Want) -> None:
        cause, detail = want.cause, want.detail
        initial = cause == Cause.INITIAL
        n = max(self.dp.epoch, self.peer_epoch) + 1
        began = time.monotonic_ns()
        ck = self._ck = Checkpoint(n, cause, began)
        c, q = self.config.checkpoint, self.config.qemu
        deadline = time.monotonic() + (q.enter_timeout if initial else c.deadline) / 1000
        try:
            self.become(State.CHECKPOINTING, f"{cause}: {detail}")
            if (
                not initial
            ):  # an unprotected PVM is not to be held up by a peer that is slow to answer
                self._uncompared = False  # also a failed entry can end so: QEMU was in COLO
                self.engine.begin_checkpoint()
                self.dp.mode = Mode.CHECKPOINT
            self.peer.send("begin", n=n, cause=cause, initial=initial)
            answer = min(deadline, time.monotonic() + c.deadline / 1000)
            while not ck.begun:
                await self._await(ck, "answer of the secondary's controller", answer)
            if initial:
                self._uncompared = False
                self.engine.begin_checkpoint()
                self.dp.mode = Mode.CHECKPOINT
                await self.qmp.prepare(primary=True)
                await self.qmp.migrate(self.migrate_to)
            else:
                ck.stop_ns = 0
                await self.qmp.trigger_checkpoint()
            ck.triggered = True
            while not (ck.resume_ns and ck.done):
                if initial:
                    await self._release_proven(ck)
                    if await self.qmp.migration_status() == "failed":
                        raise CheckpointFailed("the migration failed")
                await self._await(ck, "STOP and RESUME of both guests", deadline)
            if initial or not self._handed:
                await self._hand_offsets(ck, deadline)
            self._drain()  # frames from before STOP may still be in the ring
            held = (self.engine.held_packets, self.engine.held_bytes)
            if self.spoke_alone and self.speaker is not None:
                await self._clear_record(self.speaker)
            self.engine.commit_checkpoint(ck.stop_ns, n, time.monotonic_ns())
            # Before the epoch, by which the secondary is told that its guest counts.
            self.spoke_alone, self.dp.bond = False, Bond.EQUAL
            self.dp.epoch = n
            if cause == Cause.PLANNED:
                # Nothing that is newer than the state which the SVM has loaded has left or will:
                # the guests are equal, and this one is silent from here on, whoever dies next.
                self.dp.mode = Mode.DROP
                self.become(State.STOPPED, f"handed over to the secondary: {detail}")
                now = time.monotonic_ns()
                last = now if held[0] else ck.stop_ns  # what was held left with the commit
                self.peer.send("silent", us=max(0, now - last) // 1000)
                self.peer.send("gone", why="planned failover", alone=self.spoke_alone)
            else:
                self.dp.mode = Mode.RUN
            if self._leave_shadow and self._leave_ns <= ck.stop_ns:
                self._leave_shadow = self.shadow = False
            self._beat()  # a secondary that has just entered waits for this word
        except (CheckpointFailed, QmpError) as e:
            self._record(want, ck, (self.engine.held_packets, self.engine.held_bytes), str(e))
            raise
        finally:
            self._ck = None
        self._record(want, ck, held)
        self.by_cause[cause] += 1
        self.last_checkpoint = {
            "cause": cause,
            "detail": detail,
            "pause_ms": (ck.resume_ns - ck.stop_ns) / 1e6,
            "total_ms": (time.monotonic_ns() - began) / 1e6,
            "at": time.time(),
        }
        self.checkpoint_overdue = False
        if self.speaker is not None:
            self.speaker.paired()
        if cause != Cause.PLANNED:
            self.become(State.PROTECTED, f"both guests are equal as of epoch {n} ({cause})")

    def _record(self, want: Want, ck: Checkpoint, held: tuple[int, int], failed: str = "") -> None:
        d = want.why
        self.journal.checkpoint(
            Entry(
                time.time(), want.cause, want.detail,
                d.proto if d else "", d.port if d else 0, d.rule if d else "",
                max(0, ck.resume_ns - ck.stop_ns) / 1e6, (time.monotonic_ns() - ck.began_ns) / 1e6,
                *held, failed,
            )
        )  # fmt: skip

    async def _release_proven(self, ck: Checkpoint) -> None:
        """While synchronising: QMP answers in order, so no STOP before an answer means none yet."""
        self._drain()
        mark = time.monotonic_ns()
        await self.qmp.status()
        self.engine.release_until(ck.stop_ns or mark)

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.state not in (State.PROTECTED, State.CHECKPOINTING):
            raise ValueError(f"no checkpoint from state {self.state.value}: {self.reason}")
        before = self.dp.epoch
        self._want = self._want or Want(Cause.OPERATOR.value, "asked by the operator")
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

    # ---- failover

    async def perform(self, action: Action, why: str) -> None:
        if action is Action.GO_SOLO:
            await self._go_solo(why)
        elif action is Action.STOP:
            self.dp.mode = Mode.DROP
            if self._guard is not None:
                self._guard.cancel()
            self.become(State.STOPPED, why)
            self.peer.send("gone", why=why, alone=self.spoke_alone)
        elif action is Action.ASK_SHUT:
            self.become(State.DEGRADED, why)
            self.asks = not self.peer.send("solo", why=why)
            await asyncio.sleep(self.config.peer.heartbeat_interval / 1000)
        elif action is Action.REARM:
            self._want = self._want or Want(Cause.PEER_GAP.value, why)
            self.become(State.CHECKPOINTING, why)
            self._wake.set()

    async def _go_solo(self, why: str) -> None:
        if self._guard is not None:
            self._guard.cancel()
        self._peer_ready = False
        self.peer.send("solo", why=why)
        self._drain()
        self.spoke_alone = self._uncompared = True
        self.dp.bond = Bond.ALONE
        released = self.engine.release_all()
        self.dp.mode = Mode.BYPASS
        self._drain()
        try:
            await self.leave_colo()
        except QmpError as e:
            log.warning("%s (the PVM goes on all the same)", e)
        if self.state is State.STOPPED:  # the secondary has taken over meanwhile
            return
        self.become(State.SOLO, f"{why}; {released} held frames released")
        self.spawn(self._let_run())
        self._protect_again()

    def _plan(self, why: str) -> None:
        if self.state not in (State.PROTECTED, State.CHECKPOINTING):
            raise ValueError(f"no planned failover from state {self.state.value}: {self.reason}")
        if self.shadow or self._leave_shadow:
            raise ValueError("no planned failover from shadow mode: leave it first")
        s = self.speaker
        if s is not None and not s.held:
            why = s.trouble or "another host holds the lease"
            raise ValueError(f"no planned failover, the SVM could not get the lease: {why}")
        self._plan_refused = ""
        self._want = Want(Cause.PLANNED.value, why)
        self._wake.set()

    async def hand_over(self, deadline: float) -> bool:
        failed = self.checkpoints_failed
        self._plan("asked by the operator")
        while time.monotonic() < deadline and self.checkpoints_failed == failed:
            if self._plan_refused:
                raise ValueError(f"no planned failover: {self._plan_refused}")
            if self.state is State.STOPPED and self.peer_state == State.TAKEN_OVER.value:
                return True
            await asyncio.sleep(TICK_S)
        return False

    def failover_steps(self, *, planned: bool, force: bool) -> list[str]:
        f, qmp = self.config.failover, self.config.qemu.qmp
        if planned:
            return [
                "hold every frame of both guests",
                f"QMP {qmp}: migrate-set-parameters x-checkpoint-delay (a checkpoint)",
                "release what the PVM sent before its STOP",
                "data path: drop (the PVM is silent)",
                "the secondary: x-colo-lost-heartbeat, data path: takeover, announcements",
                f"QMP {qmp}: quit",
            ]
        steps = [f"fence the secondary: {' '.join(f.fence)}"] if f.fence and not force else []
        held = self.engine.held_packets
        return [
            *steps,
            f"release the {held} held frames of the PVM",
            "data path: bypass (the PVM's frames pass uncompared)",
            f"QMP {self.config.qemu.qmp}: x-colo-lost-heartbeat",
        ]

    # ---- policy and mode

    def new_policy(self) -> None:
        self.engine.set_policy(self.config.policy())

    def set_shadow(self, on: bool) -> None:
        """Shadow begins when the secondary says that it has heard of it: it would take over from
        what clients know more than it does. It ends with a checkpoint whose STOP comes later:
        until then the SVM may not know what clients know, though everything is held from now on."""
        if on == self.shadow and not self._leave_shadow:
            return
        self._leave_shadow = not on
        if on:
            self.shadow = True
            self._beat()
        else:
            self._leave_ns = time.monotonic_ns()
            self.engine.set_shadow(False, time.monotonic_ns())
            self._want = self._want or Want(Cause.OPERATOR.value, "leaving shadow mode")
            self._wake.set()

    def tell(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        if name == "explain":
            return self.journal.to_json() | {"rules": rules_json(self.engine)}
        after, limit = args.get("after", 0), args.get("limit", 8)
        if type(after) is not int or type(limit) is not int or not 1 <= limit <= 64:
            raise ValueError("capture: `after` is a number, `limit` one from 1 to 64")
        return self.journal.frames_json(after, limit)

    # ---- status

    def status(self) -> dict[str, Any]:
        from .report import primary_status

        return primary_status(self)
