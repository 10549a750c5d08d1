# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary's checkpoints, one at a time, each to its end or its deadline.

The order is always the same: hold everything here; have the secondary hold everything; trigger;
wait for STOP and RESUME of both guests; release what the PVM sent before its STOP; go on under the
next epoch. Of the first one controller/colo_entry.py does the part that enters COLO.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..compare.causes import LOSSES, URGENT, WAITS, Cause
from ..config.file import Config
from ..datapath.host import HostDataPath
from ..engine.journal import Divergence, Journal, JournalEntry
from ..failover.arbiter import Arbiter
from ..failover.states import State
from ..peer.channel import Peer
from ..qemu.events import QmpEvent
from ..qemu.qmp import QmpError, QmpTimeout
from ..qemu.supervisor import QemuSupervisor
from .checkpoint import Checkpoint, CheckpointFailed, CheckpointRequest, Step
from .colo_entry import REARM_S, ColoEntry
from .copy_health import CopyHealth
from .device_watch import DeviceWatch
from .guest_lifecycle import GuestLifecycle
from .pacing import Pacer
from .pair_view import PairView
from .permanent_offsets import PermanentOffsets
from .pvm_output import PvmOutput
from .shadow import ShadowMode
from .story import Kind, Story
from .switchover import Switchover

log = logging.getLogger("colo_xdp.controller.primary")

MAX_CLAIMS = 256  # addresses that are sent to the secondary; they must fit into one message
IDLE_S = 10.0  # the longest sleep while no checkpoint is wanted
RECORD_S = 1.0  # frames of both guests are held meanwhile
REFUSALS = 20  # tries before a secondary that keeps refusing counts as broken


class Checkpointed(Protocol):
    """The controller of the PVM, as far as its checkpoints concern it."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    arbiter: Arbiter
    devices: DeviceWatch
    state: State
    reason: str
    journal: Journal
    output: PvmOutput
    life: GuestLifecycle
    shadow: ShadowMode
    story: Story

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

    def reconsider(self) -> None:
        """Decide anew."""

    def copy_lost(self, why: str) -> None:
        """Count the SVM as lost."""

    def drain(self) -> None:
        """Read what is in the event ring."""

    def beat(self) -> None:
        """Send a heartbeat now."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...


class CheckpointCoordinator:
    """Makes checkpoints. Whoever needs one calls request() or order()."""

    def __init__(self, controller: Checkpointed) -> None:
        self._c = c = controller
        self.entry = ColoEntry(c, self)
        self.switchover = Switchover(c, self)
        self.offsets = PermanentOffsets(c.dp.nics)
        self.health = CopyHealth(self.entry.tries.forget)
        self.pacer = Pacer(c.config.checkpoint.share, c.config.compare.compare_timeout * 1_000_000)
        self._serving: asyncio.Task[Any] | None = None
        self._wake = asyncio.Event()  # look at what is wanted
        self.wanted: CheckpointRequest | None = None
        self._hurry = False  # it is wanted now
        self.running: Checkpoint | None = None
        self._still_ns = 0  # since when the guest stands still (monotonic); 0: it runs
        self.ended_ns = 0  # when the last one was complete (monotonic)
        self._waits_since = 0
        # for status and metrics
        self.delayed = self.folded = 0  # those that had to wait; requests that another one served
        self.delay_s = 0.0
        self.by_cause: Counter[str] = Counter()
        self.failures = 0
        self.failed_why = ""  # of the last one; empty: it is complete
        self.last: dict[str, Any] = {}

    # ---- what is wanted

    def request(self, cause: Cause, detail: str, why: Divergence | None = None) -> None:
        """Ask for a checkpoint; a request while one is wanted or in progress folds into it."""
        # Also while one is in progress: its commit feeds frames that may differ again, and the
        # engine asks once per epoch only.
        if self._c.state not in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED):
            return
        if self.wanted is None:
            self.wanted = CheckpointRequest(cause.value, detail, why)
        else:
            self.folded += 1
        self._hurry |= cause in URGENT
        self._wake.set()

    def order(self, want: CheckpointRequest, *, instead: bool = False, hurry: bool = False) -> None:
        """Ask for a checkpoint whatever the state; `instead` of the one that is wanted already.

        `hurry`: it is not delayed for its price.
        """
        if instead or self.wanted is None:
            self.wanted = want
        self._hurry |= hurry
        self._wake.set()

    def wake(self) -> None:
        """Look again at what may be done: something has changed."""
        self._wake.set()

    # ---- serving

    @property
    def serving(self) -> bool:
        """Whether serve() was ever called."""
        return self._serving is not None

    def serve(self, before: Callable[[], Awaitable[None]] | None = None) -> None:
        """Enter COLO once, then make checkpoints; `before` all that, do this."""
        self.cancel()  # begun for a QEMU that came while this host went solo
        self._serving = self._c.spawn(self._serve(before))

    def cancel(self) -> None:
        """Make no further checkpoint, and do not finish the one in progress."""
        if self._serving is not None:
            self._serving.cancel()

    async def _serve(self, before: Callable[[], Awaitable[None]] | None = None) -> None:
        if before is not None:
            await before()
        c, refusals = self._c, 0
        if await self.entry.until_entered():
            new = CheckpointRequest(Cause.CONTROLLER_RESTART.value, "this controller is new")
            self.order(new, instead=True)
        while c.state is not State.STOPPED:
            want = await self._next()
            if want is None:
                continue
            try:
                await self.make(want)
                refusals = 0
            except (CheckpointFailed, QmpError) as e:
                refused = isinstance(e, CheckpointFailed) and e.refused
                if refused and want.cause == Cause.SWITCHOVER:
                    self.switchover.refuse(str(e))
                    self.wanted = _in_place_of_a_switchover(str(e))
                elif refused and refusals < REFUSALS:
                    refusals += 1
                    log.info("checkpoint (%s) not begun: %s; again", want.cause, e)
                    self.wanted = want
                    await asyncio.sleep(c.config.peer.heartbeat_interval / 1000)
                else:
                    await self._failed(want, e)

    async def _next(self) -> CheckpointRequest | None:
        """Wait for what is wanted, and for its time. None: look again."""
        c = self._c
        if self.wanted is None or not c.peer.connected:
            await self.sleep_or_wake(self._next_look())
            if self.wanted is None and self._periodic_due():
                self.wanted = CheckpointRequest(Cause.PERIODIC.value, "period")
        if self.wanted is None or not c.peer.connected or await self._delayed(self.wanted):
            return None
        want, self.wanted, self._hurry = self.wanted, None, False
        if want.cause == Cause.SWITCHOVER and not self.switchover.in_time():
            return _in_place_of_a_switchover("")
        return want

    async def _failed(self, want: CheckpointRequest, e: Exception) -> None:
        c = self._c
        self.failures += 1
        if isinstance(e, QmpTimeout) and await c.qemu.hangs():
            # not the secondary's fault: it is the one to go on
            c.view.guest_gone(hung=True)
        # Silence is no second sign beside silence: that would fence over a cut link.
        c.view.checkpoint_due(not (isinstance(e, CheckpointFailed) and e.channel))
        self.failed_why = f"checkpoint ({want.cause}) did not complete: {e}"
        c.story.tell(Kind.CHECKPOINT_FAILED, self.failed_why)
        c.become(State.DEGRADED, self.failed_why)
        c.reconsider()

    def _next_look(self) -> float:
        """Return the longest time that may pass until the next look (s): what is wanted wakes it,
        but not what makes it possible."""
        p = self._c.config.checkpoint.periodic / 1000
        if p:
            return min(p, REARM_S)
        return IDLE_S if self.wanted is None else REARM_S

    def _periodic_due(self) -> bool:
        p = self._c.config.checkpoint.periodic / 1000
        at = self.last.get("at", 0.0)
        return bool(p) and self._c.state is State.PROTECTED and time.time() - at >= p

    async def _delayed(self, want: CheckpointRequest) -> bool:
        """Return whether what is wanted has to wait; then some of that time has passed."""
        if self._c.view.guest.halted:
            await self.sleep_or_wake(REARM_S)
            return True
        now = time.monotonic_ns()
        wait = self.pacer.begin_ns(now) - now
        if self._hurry or want.cause in URGENT or wait <= 0:
            self._waits_since = 0
            return False
        if not self._waits_since:
            self._waits_since = now
            self.delayed += 1
        await self.sleep_or_wake(wait / 1e9)
        self.delay_s += (time.monotonic_ns() - now) / 1e9
        return True

    async def sleep_or_wake(self, seconds: float) -> None:
        """Sleep until the time is over or something is wanted."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # ---- what happens meanwhile

    def on_stop(self, event: QmpEvent) -> bool:
        """Note a STOP of the PVM. Returns whether a checkpoint of ours accounts for it."""
        ck = self.running
        self.entry.guest_stopped = True
        self._still_ns = min(event.ts_ns, event.seen_ns)  # later: the clock was set
        if ck is None:
            return False
        if ck.resume_ns:
            # What the guest has sent since its RESUME is in no checkpoint yet.
            self.order(
                CheckpointRequest(
                    Cause.OPERATOR.value,
                    "QEMU stopped the PVM again before the end of a checkpoint",
                )
            )
        else:
            ck.pvm_stopped(event)
            self._still_ns = ck.stop_ns
        ck.changed.set()
        return True

    def on_resume(self, event: QmpEvent) -> None:
        """Note a RESUME of the PVM."""
        self._still_ns = 0
        if self.running is not None:
            self.running.pvm_resumed(event)
            self.running.changed.set()

    def on_qmp_event(self) -> None:
        """Let the one in progress look at QEMU again."""
        if self.running is not None:
            self.running.changed.set()

    def stands_still(self, since_ns: int) -> None:
        """Note what QMP says of a guest whose events nobody listened to; 0: it runs."""
        self._still_ns = (self._still_ns or since_ns) if since_ns else 0

    def on_message(self, msg: dict[str, Any]) -> None:
        """Take what the secondary reports of the one in progress."""
        if self.running is not None:
            self.running.heard(msg)

    async def _await(self, ck: Checkpoint, what: str, deadline: float) -> None:
        """Wait until something about the checkpoint changes. Raises CheckpointFailed."""
        c = self._c
        ck.changed.clear()
        left = deadline - time.monotonic()
        if left <= 0:
            raise CheckpointFailed(f"no {what} within its deadline")
        poll = 0.005 if ck.initial else 0.1
        # Not wait_for(): that of Python 3.11 forgets a cancellation that meets its result, as when
        # the last message of a checkpoint comes with the decision to go solo.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, poll)):
                await ck.changed.wait()
        if ck.failed:
            raise CheckpointFailed(f"the secondary: {ck.failed}", refused=not ck.triggered)
        if c.view.guest.colo_exit:
            raise CheckpointFailed("QEMU has lost the COLO channel (COLO_EXIT)")
        if c.view.guest.copy_lost:
            raise CheckpointFailed(c.view.guest.copy_lost)
        if not c.peer.connected:
            raise CheckpointFailed("the control channel to the secondary is down", channel=True)
        if c.view.guest.gone or not c.qemu.qmp.connected:
            raise CheckpointFailed("QMP to the PVM is down")

    # ---- one checkpoint

    async def make(self, want: CheckpointRequest) -> None:
        """Make one, from its beginning to its end.

        Raises CheckpointFailed or QmpError; what is held stays held then.
        """
        c = self._c
        n = max(c.dp.epoch, c.view.peer.epoch) + 1
        ck = self.running = Checkpoint(n, want.cause, time.monotonic_ns())
        if ck.initial:
            self.offsets.new_copy()
        limit_ms = c.config.qemu.enter_timeout if ck.initial else c.config.checkpoint.deadline
        deadline = time.monotonic() + limit_ms / 1000
        try:
            c.become(State.CHECKPOINTING, f"{want.cause}: {want.detail}")
            await self._prepare(ck, deadline)
            await self._trigger(ck)
            await self._until_resumed(ck, deadline)
            held = await self._commit(ck, want)
        except (CheckpointFailed, QmpError) as e:
            log.info("checkpoint to epoch %d: %s when it failed", n, ck.step.value)
            ck.ended = Step.FAILED
            self._record(want, ck, c.output.held, str(e))
            raise
        finally:
            self.running = None
            if not ck.initial:  # which holds nothing for most of its time
                self.pacer.took(ck.began_ns, time.monotonic_ns())
        self._committed(ck, want, held)

    async def _prepare(self, ck: Checkpoint, deadline: float) -> None:
        """Wait until both hosts hold everything."""
        c = self._c
        if not ck.initial:  # an unprotected PVM is not held up by a peer that is slow to answer
            c.output.hold()
        for i, nic in enumerate(c.dp.nics):
            own, macs = nic.addresses.export(MAX_CLAIMS)
            if own or macs:
                c.peer.send("claims", n=ck.n, nic=i, addresses=own.hex(), macs=macs.hex())
        c.peer.send("begin", n=ck.n, cause=ck.cause, initial=ck.initial)
        answer = min(deadline, time.monotonic() + c.config.checkpoint.deadline / 1000)
        while ck.step is Step.PREPARING:
            await self._await(ck, "answer of the secondary's controller", answer)
        if ck.initial:
            c.output.hold()

    async def _trigger(self, ck: Checkpoint) -> None:
        """Ask QEMU for it: for the first one, to enter COLO."""
        c = self._c
        if why := await c.qemu.disks.mirrors.whole():  # QEMU would empty the overlays all the same
            raise CheckpointFailed(why)
        if ck.initial:
            await self.entry.start()
        elif c.view.guest.halted:  # meanwhile: QEMU would abort
            raise CheckpointFailed(c.view.guest.halted, refused=True)
        else:
            ck.trigger(self._still_ns)
            await c.qemu.qmp.trigger_checkpoint()
        ck.triggered = True

    async def _until_resumed(self, ck: Checkpoint, deadline: float) -> None:
        """Wait until both guests run the same state and the secondary has the offsets of it."""
        while ck.step is not Step.RESUMED:
            if ck.initial:
                await self.entry.watch(ck)
            await self._prove_disks(ck)
            await self._await(ck, "STOP and RESUME of both guests", deadline)
        if ck.initial or not self.offsets.sent:
            await self._send_offsets(ck, deadline)

    async def _prove_disks(self, ck: Checkpoint) -> None:
        """Once the PVM stands still, tell the secondary whether its images are of this checkpoint.

        QEMU empties the secondary's overlays in any case, so the secondary counts the checkpoint
        only with this message. It should not wait for QEMU, which answers little while it sends
        the guest's state: if it dies then, the secondary has that state, and must be told. Raises
        CheckpointFailed, QmpError.
        """
        c, mirrors = self._c, self._c.qemu.disks.mirrors
        if not c.qemu.disks.any or not ck.stop_ns or ck.disks_whole:
            return
        try:
            if not mirrors.still_whole and (why := await mirrors.whole()):
                raise CheckpointFailed(why)
        except QmpError:
            if mirrors.ended_whole:
                c.peer.send("disks_whole", n=ck.n)
            raise
        ck.disks_whole = True
        c.peer.send("disks_whole", n=ck.n)

    async def _send_offsets(self, ck: Checkpoint, deadline: float) -> None:
        """Send the guest's own offsets to the host of its new copy.

        Both guests have resumed and nothing has left or arrived since: both hosts see every later
        change alike.
        """
        parts = await self.offsets.parts()
        for n, part in enumerate(parts):
            self._c.peer.send(
                "offsets",
                n=n,
                nic=part.nic,
                first=part.first,
                last=n == len(parts) - 1,
                flows=part.flows.hex(),
            )
            while ck.based <= n:
                await self._await(ck, "confirmation of the old connections' offsets", deadline)
        self.offsets.sent = True

    async def _commit(self, ck: Checkpoint, want: CheckpointRequest) -> tuple[int, int]:
        """Release what the PVM sent before its STOP, and go on under the next epoch.

        Returns what was held: frames and bytes.
        """
        c = self._c
        await self._prove_disks(ck)
        if why := await c.qemu.disks.mirrors.whole():  # by asking, too
            raise CheckpointFailed(why)
        c.drain()  # frames from before STOP may still be in the ring
        held = c.output.held
        if c.view.guest.standalone:
            await self._clear_record()
        c.output.commit_checkpoint(ck.stop_ns, ck.n, time.monotonic_ns())
        # Before the epoch, which tells the secondary that its guest counts.
        c.view.checkpointed()
        c.dp.sync_state = SyncState.IN_SYNC
        c.dp.epoch = ck.n
        if want.cause == Cause.SWITCHOVER:
            self.switchover.fall_silent(ck, want.detail, released=held[0] > 0)
        else:
            c.dp.mode = Mode.RUN
        if c.shadow.committed(ck.stop_ns):
            self.order(CheckpointRequest(Cause.OPERATOR.value, "leaving shadow mode"))
        c.beat()  # a secondary that has just entered waits for this epoch
        ck.ended = Step.COMMITTED
        return held

    async def _clear_record(self) -> None:
        """Have the arbiter forget that this guest is alone before the other one counts, so that it
        may take over from then on. A store that does not answer learns it later, at the same
        price."""
        arbiter = self._c.arbiter
        arbiter.paired()
        end = time.monotonic() + RECORD_S
        while arbiter.view().recorded and time.monotonic() < end:
            await asyncio.sleep(TICK_S / 5)

    def _committed(self, ck: Checkpoint, want: CheckpointRequest, held: tuple[int, int]) -> None:
        """Record and report that the guests are equal."""
        c = self._c
        self._record(want, ck, held)
        self.by_cause[want.cause] += 1
        self.last = {
            "cause": want.cause,
            "detail": want.detail,
            "pause_ms": (ck.resume_ns - ck.stop_ns) / 1e6,
            "total_ms": (time.monotonic_ns() - ck.began_ns) / 1e6,
            "at": time.time(),
        }
        c.view.checkpoint_due(False)
        self.failed_why = ""
        self.ended_ns = time.monotonic_ns()
        if ck.initial:
            c.output.patience.new_copy()
        else:
            c.output.patience.checkpointed(
                self.ended_ns - ck.began_ns, missed=want.cause == Cause.COMPARE_TIMEOUT
            )
        c.devices.checkpointed(want.cause, want.why.nic if want.why else "")
        c.arbiter.paired()
        if want.cause != Cause.SWITCHOVER:
            c.become(State.PROTECTED, f"both guests are equal as of epoch {ck.n} ({want.cause})")
        self._judge_copy(ck, deaf=want.why is not None and want.why.svm_deaf)

    def _judge_copy(self, ck: Checkpoint, *, deaf: bool) -> None:
        """Give an SVM up that goes wrong again after each checkpoint."""
        c = self._c
        agreed = c.output.agreed()
        # In shadow mode clients answer the PVM alone: an SVM that differs once agrees with nothing
        # more until the checkpoint.
        if ck.initial or c.view.shadow:
            self.health.new_copy(agreed)
            return
        arrived = sum(nic.arrived() for nic in c.dp.nics)
        traffic = c.view.peer.traffic
        if why := self.health.checkpointed(
            ck.cause, deaf=deaf, agreed=agreed, arrived=arrived, traffic=traffic
        ):
            self.entry.tries.failed(
                why, self.entry.peer_qemu, time.monotonic(), stopped=True, proven=False
            )
            c.copy_lost(why)

    def _record(
        self, want: CheckpointRequest, ck: Checkpoint, held: tuple[int, int], failed: str = ""
    ) -> None:
        d = want.why
        differed = min(ck.began_ns, d.since_ns) if d else ck.began_ns
        before = self.ended_ns
        # In shadow mode a full queue is what one difference leads to: nothing behind it matches.
        kind = WAITS | {Cause.QUEUE_FULL} if self._c.view.shadow else WAITS
        waited = d is not None and d.cause in kind
        if waited and (crossed := self._c.output.crossed_ns(before)):
            differed = min(differed, crossed)
        followed = self._c.output.followed_ns(before, differed) if before else 0
        self._c.journal.checkpoint(
            JournalEntry(
                time.time(), want.cause, want.detail,
                d.proto if d else "", d.port if d else 0, d.rule if d else "",
                max(0, ck.resume_ns - ck.stop_ns) / 1e6, (time.monotonic_ns() - ck.began_ns) / 1e6,
                *held, failed, d is not None and (waited or d.cause not in LOSSES),
                max(0, differed - before) / 1e6 if before else 0.0,
                (ck.began_ns - differed) / 1e6, max(0, followed - before) / 1e6,
            )
        )  # fmt: skip

    # ---- the operator

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make one for the operator. Raises ValueError where that is impossible, or failed."""
        c = self._c
        if c.state not in (State.PROTECTED, State.CHECKPOINTING):
            raise ValueError(f"no checkpoint from state {c.state.value}: {c.reason}")
        before = c.dp.epoch
        if c.view.guest.halted:
            raise ValueError(f"no checkpoint now: {c.view.guest.halted}")
        self.order(CheckpointRequest(Cause.OPERATOR.value, "asked by the operator"), hurry=True)
        deadline = time.monotonic() + c.config.checkpoint.deadline / 1000 + 1
        failures = self.failures
        while c.dp.epoch == before and self.failures == failures:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.002)
        if c.dp.epoch == before:
            raise ValueError(f"the checkpoint did not complete: {c.reason}")
        return {"epoch": c.dp.epoch, **self.last}


def _in_place_of_a_switchover(why: str) -> CheckpointRequest:
    text = "in place of a switchover" + (f": {why}" if why else "")
    return CheckpointRequest(Cause.OPERATOR.value, text)
