# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary host: hold and compare the PVM's output, ask for checkpoints, go solo."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from bisect import bisect_left
from typing import Any

from .. import abi
from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..compare.causes import Cause
from ..compare.limits import NEVER
from ..config.file import Config
from ..datapath import attach
from ..datapath.conntrack_map import ConntrackMap
from ..datapath.datapath import DataPath
from ..datapath.ring import CapturedFrame
from ..engine.engine import Engine
from ..engine.waits import WAIT_BUCKETS
from ..failover.decision import Action, OwnGuest, Role, State
from ..net.frame import Frame
from ..peer.heartbeat import Flag
from ..qemu.event import QmpEvent
from ..qemu.guest_event import STANDS_STILL, News
from ..qemu.qmp import QmpError
from ..qemu.supervisor import IN_COLO, INCOMING_S
from .checkpoint import CheckpointRequest
from .checkpoint_coordinator import CheckpointCoordinator
from .colo_entry import REARM_S
from .device_watch import PACE_S

log = logging.getLogger("colo_xdp.controller.primary")

SWEEP_S = 5.0
LOOK_S = 0.2  # between two looks at a guest of which nothing is known
BRIDGE_S = 1.0  # between two looks at the ports of the tap's bridge
LOSS_CHECK_NS = 100_000_000
SWEEP = 400  # connections of the fast path looked at in that time: a million in 4 minutes


class Primary(CheckpointCoordinator):
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
        self.engine.epoch = datapath.epoch
        self._injector = datapath.injectors["release"]
        self._guard: asyncio.Task[Any] | None = None
        self._going_solo = False  # decided, and on its way: no checkpoint may begin
        self._lost = datapath.lost_events()
        self._lost_checked = 0
        self._own_guest = OwnGuest.UNKNOWN
        self.waits = [0] * (len(WAIT_BUCKETS) + 1)
        self.wait_sum = 0.0
        datapath.unmirror(None)  # what a former controller's rules said
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
        elif datapath.mode is Mode.DROP and not self.undecided:
            self.state = State.STOPPED
            self.reason = "the data path was shut by a former controller"

    # ---- frames

    def on_event(self, event: CapturedFrame) -> None:
        if self.state is State.STOPPED:
            return
        rec = Frame(
            event.frame, event.ts_ns, event.gso_size, event.partial,
            punt_seq=event.punt_seq, gso_type=event.gso_type,
        )  # fmt: skip
        if event.source == abi.Source.PVM:
            if self._uncompared:
                self._release(rec)
            else:
                self.engine.from_pvm(rec, time.monotonic_ns())
        elif not self._uncompared:
            self.engine.from_svm(rec, event.epoch, time.monotonic_ns())

    def on_batch(self) -> None:
        self.engine.flush(time.monotonic_ns())

    def _release(self, rec: Frame) -> None:
        self._injector.send(rec.frame, rec.gso_size, rec.partial, rec.gso_type)

    def _on_wait(self, ns: int) -> None:
        s = ns / 1e9
        self.waits[bisect_left(WAIT_BUCKETS, s)] += 1
        self.wait_sum += s

    # ---- a data path that began with nothing

    @property
    def undecided(self) -> bool:
        return self.dp.undecided

    @property
    def own_guest(self) -> OwnGuest:
        return self._own_guest

    async def _look_at_guest(self) -> None:
        """Whether QEMU's guest is a new one, for as long as it matters."""
        while self.undecided and self.state is State.STARTING:
            migration = await self._migration() if self.qemu.qmp.connected else None
            seen = OwnGuest.UNKNOWN
            if migration is not None:
                known = {"colo": OwnGuest.PAIRED, "none": OwnGuest.NEW}
                seen = known.get(migration or "none", OwnGuest.OLD)
            if seen is not self._own_guest:
                self._own_guest = seen
                self._decide()
            await asyncio.sleep(LOOK_S)

    def _open(self, why: str) -> None:
        """The first word of this host's guest since the data path began: it speaks alone."""
        self.view.went_standalone()
        self._uncompared = True
        self.dp.sync_state = SyncState.STANDALONE
        self.dp.mode = Mode.BYPASS
        self.dp.undecided = False
        self.view.new_pair()  # what was asked for is done: the pair that may follow is another one
        self.become(State.STARTING, why)
        self.spawn(self.open_network())
        self._wake.set()

    def on_tick(self, now_ns: int) -> None:
        # While the control channel is cut timeouts go on: what waits too long has to be known.
        cut = self.state is State.DEGRADED and self.dp.mode is Mode.RUN and not self.peer.connected
        if self.state is State.PROTECTED or cut:
            self.engine.tick(now_ns)
            if self._hurry_ns() <= now_ns and self.engine.gather(now_ns):
                self.request(Cause.PEER_LINK, self.devices.trouble)
        else:
            self.engine.end_backpressure(now_ns)
        if now_ns - self._lost_checked >= LOSS_CHECK_NS:
            self._lost_checked = now_ns
            lost = self.dp.lost_events()
            if self.dp.fast is not None:
                self.dp.fast.sweep(now_ns, SWEEP)
            if lost > self._lost:
                missing, self._lost = lost - self._lost, lost
                self.request(Cause.EVENT_LOST, f"{missing} frames did not fit into the event ring")

    def tick_ns(self) -> int:
        return min(self.engine.tick_ns(), self._hurry_ns())

    # ---- a data path that is not whole (controller/device_watch.py)

    def _hurry_ns(self) -> int:
        """When a checkpoint is due for what waits, while nothing of the SVM arrives: the next one
        not before a pause as long as the last one took."""
        busy = self._want is not None or self._ck is not None or not self.peer.connected
        if busy or not self.devices.cut or self.state is not State.PROTECTED:
            return NEVER
        took_ns = int(self.last_checkpoint.get("total_ms", 0.0) * 1e6)
        return self._ended_ns + max(int(PACE_S * 1e9), took_ns)

    def hooks_lost(self, what: str, *, unseen: bool, still: bool) -> None:
        """Both guests are to be equal again. If the PVM may have spoken uncompared the SVM does
        not know what clients know: as in shadow mode, until a later checkpoint."""
        if self.state not in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED):
            return
        self.engine.void_flows(time.monotonic_ns())
        if not still:
            self.request(Cause.HOOKS_LOST, what)
        if unseen and (not self.view.shadow or self._leave_shadow or self._exposed):
            self.view.set_shadow(True)
            self._exposed, self._leave_shadow = still, not still
            self._leave_ns = time.monotonic_ns()
            self._beat()

    def data_path_back(self) -> None:
        self.request(Cause.PEER_LINK, "it is whole again")

    # ---- checkpoints

    def on_qmp(self, event: QmpEvent) -> None:
        ck = self._ck
        if self.state is State.SOLO:
            self.on_event_alone(event)
        if event.name == "STOP":
            self._stopped_for_it = True
            self._still_ns = min(event.ts_ns, event.seen_ns)  # later: the clock was set
            if ck is not None and ck.resume_ns:
                # What the guest has said since its RESUME is in no checkpoint yet.
                self._want = self._want or CheckpointRequest(
                    Cause.OPERATOR.value,
                    "QEMU stopped the PVM again before the end of a checkpoint",
                )
            elif ck is not None:
                ck.pvm_stopped(event)
                self._still_ns = ck.stop_ns
            elif self.state is State.PROTECTED and not self.view.guest.halted:
                self.spawn(self._stopped_by_whom())
        elif event.name == "RESUME":
            self._still_ns = 0
            self.on_resumed()
            if ck is not None:
                ck.pvm_resumed(event)
        if ck is not None:
            ck.changed.set()

    async def _stopped_by_whom(self) -> None:
        """The PVM stands still, and no checkpoint of ours has stopped it."""
        status, fate = await self.stands_still()
        if self.state is not State.PROTECTED or self._ck is not None:
            return
        if fate is None:
            what = f"by a person (`{status}`)" if status else "and runs again"
            self.request(Cause.GUEST_EVENT, f"the PVM was stopped {what}: it runs on with the SVM")
        else:
            self.on_news(News(fate, f"the PVM stands still (`{status}`)"))

    async def _whether_it_runs(self) -> None:
        """QMP does not repeat the events that it had while nobody listened."""
        try:
            status = await self.qemu.qmp.status()
        except QmpError:
            return
        if status == "running":
            self._still_ns = 0
            self.on_resumed()
        elif status == "paused" or status in STANDS_STILL:
            self._still_ns = self._still_ns or time.monotonic_ns()
            if status in STANDS_STILL and not self.view.guest.halted:
                self.on_news(News(STANDS_STILL[status], f"the PVM stands still (`{status}`)"))

    def on_changed(self, why: str) -> None:
        self.request(Cause.GUEST_EVENT, why)

    def on_resumed(self) -> None:
        if self.view.guest.halted:
            super().on_resumed()
            self.request(Cause.GUEST_EVENT, "the PVM runs again after it stood still")

    @property
    def ends_the_pair(self) -> bool:
        return True

    def release_last(self) -> int:
        if self._guard is not None:
            self._guard.cancel()
        self.drain()
        return self.engine.release_all()

    def forget_copy(self) -> None:
        if self._guard is not None:
            self._guard.cancel()

    def peer_connected(self) -> None:
        self.view.checkpoint_due(False)

    def on_message(self, msg: dict[str, Any]) -> None:
        kind, ck = msg["type"], self._ck
        if kind == "ready":
            self._peer_ready = True
            self.view.peer_open()  # another SVM than the one that died
            self._peer_qemu, self._peer_lacks = (msg.get("qemu", 0), self.peer.peer_boot), ""
            self.arbiter.peer_open()
            self._wake.set()
            self._protect_again()
        elif kind == "heartbeat":
            if self.state is State.STOPPED:
                return
            waits = self.view.shadow and not self._leave_shadow and not self.engine.shadow
            waits = waits and not self._exposed
            if waits and msg["shadow"] and msg["role"] == Role.SECONDARY.value:
                self.engine.set_shadow(True, time.monotonic_ns())
            if msg["state"] == State.PROMOTED.value:
                self._demote("the secondary speaks for the guest")
            elif self._older_than(msg):
                self._demote("the other host runs the PVM: this data path knows less of it")
        elif kind == "promoted":
            self._demote(f"the secondary took over: {msg['why']}")
        elif kind == "missed":
            self.hooks_lost(f"on the secondary's host: {msg['why']}", unseen=False, still=False)
        elif kind == "switchover":
            try:
                self._plan(msg["why"])
            except ValueError as e:
                log.warning("no hand-over: %s", e)
        elif kind == "downtime":
            self.last_failover = {"gap_ms": msg["gap_us"] / 1e3, "took_ms": msg["took_us"] / 1e3}
            log.info("the network heard nothing of the guest for %.1f ms", msg["gap_us"] / 1e3)
        elif kind == "request":
            self.request(Cause.GUEST_EVENT, f"the secondary: {msg['why'][:200]}")
        elif kind == "failed" and ck is None and self.state is State.STARTING:
            self._peer_lacks = msg["why"][:300]
        elif ck is not None and kind in ("begin_ack", "resumed", "failed", "offsets_ack"):
            ck.heard(msg)

    def on_heartbeat_flags(self, flags: Flag) -> None:
        transmits = Flag.SVM in flags and Flag.ALONE in flags and Flag.SHUT not in flags
        if transmits and self.state is not State.STOPPED:
            self._demote("the secondary speaks for the guest, as its beacons say")

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

    def _demote(self, why: str) -> None:
        """Never speak against a secondary that has taken over."""
        self.dp.mode = Mode.DROP
        self.dp.undecided = False
        if self._guard is not None:
            self._guard.cancel()
        self.become(State.STOPPED, why)

    async def leave_network(self) -> None:
        """Not sooner: until then clients' frames that come here are mirrored to the other one."""
        try:
            await asyncio.to_thread(self.dp.close_network)
        except (attach.NoSuchDevice, attach.NetlinkError, OSError) as e:
            log.debug("the tap is not taken out of the bridge: %s", e)  # it went with its guest

    def paired(self) -> bool:
        return self.state in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED)

    def outdated(self, why: str) -> None:
        self._demote(why)

    def on_arbiter(self) -> None:
        self._wake.set()

    def _protect_again(self) -> None:
        """A new secondary waits for the guest that has been alone until now."""
        if self.state is State.SOLO and self._peer_ready:
            self.become(State.STARTING, "a new secondary waits: protecting again")
            if self._guard is not None:  # begun for a QEMU that came while this went solo
                self._guard.cancel()
            self._guard = self.spawn(self._leave_and_protect())

    async def _leave_and_protect(self) -> None:
        while self.state is State.STARTING:
            try:
                if await self.qemu.qmp.migration_status() not in IN_COLO:
                    break
                await self.qemu.leave_colo()  # of the pair that was
            except QmpError as e:
                log.warning("%s", e)
            await asyncio.sleep(REARM_S)
        self.view.new_pair()
        self._want = None
        await self._protect()

    async def on_replacement_qemu(self) -> None:
        net = self.config.network
        if not net.bridge and self.dp.in_bridge:
            log.error("[network] bridge is needed to become the secondary: %s is in one", net.tap)
            await asyncio.sleep(INCOMING_S)
            return
        self.change_role("the other guest speaks, and a new QEMU waits here for its state")

    async def start(self) -> None:
        await super().start()
        if self.undecided:
            self.spawn(self._look_at_guest())
        elif self.dp.mode is not Mode.DROP:  # a former controller may have died before this
            self.spawn(self.open_network())
        self.spawn(self._watch_bridge())
        if self.own is not None:
            self.spawn(self._sweep_own(self.own))

    async def _sweep_own(self, own: ConntrackMap) -> None:
        """The programs that translate step out with the last connection that needs them."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.to_thread(own.sweep, self.dp.promoted_epoch)
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
        await self._whether_it_runs()
        if self.state is State.SOLO:
            migration = await self._migration()
            if migration in IN_COLO:  # a former controller died before this
                try:
                    await self.qemu.leave_colo()
                except QmpError as e:  # or QEMU was just about to
                    log.warning("%s (the PVM goes on all the same)", e)
            if migration in (*IN_COLO, "failed"):
                self.spawn(self._let_run())
        elif self._guard is None and not self._going_solo and self.state is not State.STOPPED:
            self._guard = self.spawn(self._protect())

    async def _let_run(self) -> None:
        """The guest is alone: see to it that it runs, also when QEMU has to be waited for."""
        while self.state is State.SOLO:
            with contextlib.suppress(QmpError):
                if await self._cont():
                    return
            await asyncio.sleep(REARM_S)

    # ---- failover

    async def perform(self, action: Action, why: str) -> None:
        if action is Action.GO_SOLO:
            await self._go_solo(why)
        elif action is Action.OPEN:
            self._open(why)
        elif action is Action.STOP:
            self.dp.mode = Mode.DROP
            self.dp.undecided = False
            if self._guard is not None:
                self._guard.cancel()
            self.become(State.STOPPED, why)
            self.peer.send("shut", why=why, alone=self.view.guest.standalone)
        elif action is Action.ASK_SHUT:
            self.become(self.state if self.undecided else State.DEGRADED, why)
            self.asks = not self.peer.send("demote", why=why)
            await asyncio.sleep(self.config.peer.heartbeat_interval / 1000)
        elif action is Action.REARM:
            self._want, self._hurry = (
                self._want or CheckpointRequest(Cause.PEER_GAP.value, why),
                True,
            )
            self.become(State.CHECKPOINTING, why)
            self._wake.set()

    async def _go_solo(self, why: str) -> None:
        self._going_solo = True
        try:
            await self._leave_pair(why)
        finally:
            self._going_solo = False

    async def _leave_pair(self, why: str) -> None:
        if self._guard is not None:
            self._guard.cancel()
        self._peer_ready = False
        self.peer.send("demote", why=why)
        self.drain()
        self.view.went_standalone()
        self._uncompared = True
        self.dp.sync_state = SyncState.STANDALONE
        released = self.engine.release_all()
        self.dp.mode = Mode.BYPASS
        if self.undecided:
            self.dp.undecided = False
            await self.open_network()
        self.drain()
        try:
            await self.qemu.leave_colo()
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
        if self.view.shadow or self._leave_shadow:
            raise ValueError("no planned failover from shadow mode: leave it first")
        a = self.arbiter.view()
        if a.needs_grant and not a.granted:
            why = self.arbiter.trouble or f"another host holds the {a.name}"
            raise ValueError(f"no planned failover, the SVM could not get the {a.name}: {why}")
        if self.view.guest.halted:
            raise ValueError(f"no planned failover: {self.view.guest.halted}")
        self._plan_refused = ""
        # as long as the command waits, which then says that it is not done
        ms = self.config.checkpoint.deadline + 2 * self.config.qemu.qmp_timeout
        self._plan_until = time.monotonic() + ms / 1000
        self._want = CheckpointRequest(Cause.PLANNED.value, why)
        self._wake.set()

    async def hand_over(self, deadline: float) -> bool:
        failed = self.checkpoints_failed
        self._plan("asked by the operator")
        while time.monotonic() < deadline and self.checkpoints_failed == failed:
            if self._plan_refused:
                raise ValueError(f"no planned failover: {self._plan_refused}")
            if self.state is State.STOPPED and self.view.peer.state == State.PROMOTED.value:
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
        if on == self.view.shadow and not self._leave_shadow:
            return
        self._leave_shadow = not on
        if on:
            self.view.set_shadow(True)
            self._beat()
        else:
            self._leave_ns = time.monotonic_ns()
            self.engine.set_shadow(False, time.monotonic_ns())
            self._want = self._want or CheckpointRequest(
                Cause.OPERATOR.value, "leaving shadow mode"
            )
            self._hurry = True
            self._wake.set()
