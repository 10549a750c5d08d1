# SPDX-License-Identifier: GPL-2.0-or-later
"""The primary host: its guest is the PVM, which clients hear; go solo when the SVM is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ..abi import Mode, SyncState
from ..compare.causes import Cause
from ..compare.limits import NEVER
from ..config.file import Config
from ..datapath import devices, netlink
from ..datapath.host import HostDataPath
from ..datapath.ring import CapturedFrame
from ..engine.journal import Journal
from ..failover.decision import Action
from ..failover.facts import OwnGuest
from ..failover.states import Role, State
from ..peer.heartbeat_datagram import Flag
from ..qemu.events import STANDS_STILL, News, QmpEvent
from ..qemu.qmp import QmpError
from ..qemu.supervisor import IN_COLO, INCOMING_S
from . import switchover
from .checkpoint import CheckpointRequest
from .checkpoint_coordinator import CheckpointCoordinator
from .colo_entry import CANCELLABLE, REARM_S
from .controller import Controller
from .device_watch import PACE_S
from .mirror_watch import MirrorWatch
from .pvm_output import PvmOutput
from .shadow import ShadowMode
from .story import Kind

log = logging.getLogger("colo_xdp.controller.primary")

LOOK_S = 0.2  # between two looks at a guest of which nothing is known
BRIDGE_S = 1.0  # between two looks at the ports of the tap's bridge
PLUGGED_S = 5.0  # between two looks at the guest's disks
LOSS_CHECK_NS = 100_000_000
LOSS_CHECK_REST = 5  # so many times as long at rest: whoever fills the ring wakes this loop
SWEEP = 400  # connections of the fast path looked at in that time: a million in 4 minutes


class Primary(Controller):
    """Controller of the PVM's host."""

    role = Role.PRIMARY

    def __init__(self, config: Config, datapath: HostDataPath) -> None:
        super().__init__(config, datapath)
        if datapath.sync_state is SyncState.STANDALONE:
            self.view.went_standalone()
        self.journal = Journal()
        self.output = PvmOutput(
            config,
            datapath,
            lambda cause, detail, why: self.checkpoints.request(cause, detail, why),
            lambda d: self.journal.divergence(d, time.time()),
            uncompared=self.view.guest.standalone and datapath.mode is Mode.BYPASS,
        )
        self.shadow = ShadowMode(self.view, self.output)
        self.checkpoints = CheckpointCoordinator(self)
        self.entry = self.checkpoints.entry
        self.mirrors = MirrorWatch(self)
        self._going_solo = False  # decided and in progress: no checkpoint may begin
        self._lost = datapath.lost_events()
        self._lost_checked = 0
        self._own_guest = OwnGuest.UNKNOWN
        self._booted_again = False  # since it is known that the other guest has ended
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "ready": self._on_ready,
            "heartbeat": self._on_beat,
            "promoted": lambda msg: self._demote(f"the secondary took over: {msg['why']}"),
            "missed": lambda msg: self.hooks_lost(
                f"on the secondary's host: {msg['why']}", unseen=False, still=False
            ),
            "switchover": self._on_switchover,
            "downtime": self._on_downtime,
            "request": self._on_request,
            "failed": self._on_failed,
            **dict.fromkeys(("begin_ack", "resumed", "offsets_ack"), self.checkpoints.on_message),
        }
        self._adopt()

    def _adopt(self) -> None:
        """Begin in the state in which a former controller left the data path."""
        dp = self.dp
        if dp.adopted and self.output.uncompared:
            self.state = State.SOLO
            self.reason = "the guest went standalone under a former controller"
        elif dp.adopted and dp.mode in (Mode.RUN, Mode.CHECKPOINT):
            # A former controller held frames that are lost with it; only a checkpoint
            # makes both sides equal again. Until then nothing is decided.
            dp.mode = Mode.CHECKPOINT
            self.output.begin_checkpoint()
            self.state = State.DEGRADED
            self.reason = "a former controller's data path was taken over: a checkpoint is needed"
        elif dp.mode is Mode.DROP and not self.undecided:
            self.state = State.STOPPED
            self.reason = "the data path was shut by a former controller"

    # ---- frames

    def on_frame(self, event: CapturedFrame) -> None:
        if self.state is not State.STOPPED:
            self.output.on_frame(event)

    def on_batch(self) -> None:
        self.output.flush()

    # ---- a data path that began with nothing

    @property
    def undecided(self) -> bool:
        return self.dp.undecided

    @property
    def own_guest(self) -> OwnGuest:
        """Return what the guest here is. One that has booted while the other host's guest still ran
        standalone may lack what that one did until its end, so it counts as new after a reset. Its
        own disks lack that after a reset, too, and whether or not there is a QEMU yet."""
        peer = self.view.peer
        if peer.ended and self.config.replicated_disks:
            return OwnGuest.OUTDATED
        if self._own_guest is not OwnGuest.NEW or not (peer.ended or peer.shut):
            return self._own_guest
        return OwnGuest.NEW if self._booted_again else OwnGuest.UNKNOWN

    async def _boot_again(self) -> None:
        """Reset a guest that nobody has heard yet: the other host's guest has ended."""
        try:
            await self.qemu.qmp.execute("system_reset")
        except QmpError as e:
            log.warning("the guest is not reset: %s", e)
            return
        log.info("the guest is reset: it may have booted while the other host's guest was active")
        self._booted_again = True
        self.reconsider()

    async def _look_at_guest(self) -> None:
        """Find out whether QEMU's guest is a new one, for as long as it matters."""
        while self.undecided and self.state is State.STARTING:
            if self._own_guest is OwnGuest.NEW and self.own_guest is OwnGuest.UNKNOWN:
                await self._boot_again()
            migration = await self.entry.migration() if self.qemu.qmp.connected else None
            seen = OwnGuest.UNKNOWN
            if migration is None:
                self._booted_again = False  # whoever comes next has not been reset
            else:
                known = {"colo": OwnGuest.PAIRED, "none": OwnGuest.NEW}
                seen = known.get(migration or "none", OwnGuest.OLD)
            if seen is not self._own_guest:
                self._own_guest = seen
                self.reconsider()
            await asyncio.sleep(LOOK_S)

    def _open(self, why: str) -> None:
        """Let this host's guest transmit for the first time since the data path began, alone."""
        self.view.went_standalone()
        self.output.uncompared = True
        self.dp.sync_state = SyncState.STANDALONE
        self.dp.mode = Mode.BYPASS
        self.dp.undecided = False
        self.view.new_pair()  # what was asked for is done: the pair that may follow is another one
        self.become(State.STARTING, why)
        self.spawn(self.open_network())
        self.checkpoints.wake()

    # ---- time

    def on_tick(self, now_ns: int) -> None:
        # While the control channel is cut timeouts go on: what waits too long has to be known.
        cut = self.state is State.DEGRADED and self.dp.mode is Mode.RUN and not self.peer.connected
        if self.state is State.PROTECTED or cut:
            self.output.tick(now_ns)
            if self._hurry_ns() <= now_ns and self.output.gather(now_ns, self.devices.cut_nics):
                self.checkpoints.request(Cause.PEER_LINK, self.devices.trouble)
        else:
            self.output.end_backpressure(now_ns)
        rest = LOSS_CHECK_REST if self.asleep else 1
        if now_ns - self._lost_checked >= LOSS_CHECK_NS * rest:
            self._lost_checked = now_ns
            lost = self.dp.lost_events()
            self.output.sweep(now_ns, SWEEP)
            if lost > self._lost:
                missing, self._lost = lost - self._lost, lost
                self.checkpoints.request(
                    Cause.EVENT_LOST, f"{missing} frames did not fit into the event ring"
                )

    def tick_ns(self) -> int:
        return min(self.output.tick_ns(), self._hurry_ns())

    @property
    def at_rest(self) -> bool:
        return self.output.at_rest

    @property
    def asleep(self) -> bool:
        return self.output.asleep

    # ---- a data path that is not whole (controller/device_watch.py)

    def _hurry_ns(self) -> int:
        """Return when a checkpoint is due for what waits while nothing of the SVM arrives: no
        sooner than a pause as long as the last one took."""
        cks = self.checkpoints
        busy = cks.wanted is not None or cks.running is not None or not self.peer.connected
        if busy or not self.devices.cut or self.state is not State.PROTECTED:
            return NEVER
        took_ns = int(cks.last.get("total_ms", 0.0) * 1e6)
        return cks.ended_ns + max(int(PACE_S * 1e9), took_ns)

    def hooks_lost(self, what: str, *, unseen: bool, still: bool) -> None:
        """Make both guests equal again.

        If the PVM's frames may have left uncompared the SVM does not know what clients know, as in
        shadow mode, until a later checkpoint.
        """
        if self.state not in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED):
            return
        self.output.void_flows(time.monotonic_ns())
        if not still:
            self.checkpoints.request(Cause.HOOKS_LOST, what)
        if unseen and self.shadow.expose(still=still):
            self.beat()

    def data_path_back(self) -> None:
        self.checkpoints.request(Cause.PEER_LINK, "it is whole again")

    # ---- the guest

    def on_qmp(self, event: QmpEvent) -> None:
        if self.state is State.SOLO:
            self.life.on_event_alone(event)
        if why := self.qemu.disks.mirrors.on_event(event):
            self.copy_lost(why)
        if event.name == "STOP":
            ours = self.checkpoints.on_stop(event)
            if not ours and self.state is State.PROTECTED and not self.view.guest.halted:
                self.spawn(self._find_out_who_stopped_it())
        elif event.name == "RESUME":
            self._guest_runs()
            self.checkpoints.on_resume(event)
        else:
            self.checkpoints.on_qmp_event()

    def copy_lost(self, why: str) -> None:
        """Count the SVM as lost: no checkpoint can make it a copy any more.

        It stays one of the last checkpoint, so it may still take over if this host dies now.
        """
        log.warning("%s", why)
        if self.state in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED):
            self.view.copy_lost(why)
            self.become(State.DEGRADED, why)
            self.reconsider()

    async def _find_out_who_stopped_it(self) -> None:
        """React to a PVM that stands still though no checkpoint of ours has stopped it."""
        status, fate = await self.life.stands_still()
        if self.state is not State.PROTECTED or self.checkpoints.running is not None:
            return
        if fate is None:
            what = f"by a person (`{status}`)" if status else "and runs again"
            self.guest_changed(f"the PVM was stopped {what}: it runs on with the SVM")
        else:
            self.life.on_news(News(fate, f"the PVM stands still (`{status}`)"))

    async def _find_out_whether_it_runs(self) -> str:
        """Ask: QMP does not repeat the events that it had while nobody listened.

        Returns the run state; an empty string when QEMU does not answer.
        """
        try:
            status = await self.qemu.qmp.status()
        except QmpError:
            return ""
        if status == "running":
            self.checkpoints.stands_still(0)
            self._guest_runs()
        # `colo`: by a checkpoint that a former controller has asked for
        elif status in ("paused", "colo") or status in STANDS_STILL:
            self.checkpoints.stands_still(time.monotonic_ns())
            if status in STANDS_STILL and not self.view.guest.halted:
                news = News(STANDS_STILL[status], f"the PVM stands still (`{status}`)")
                self.life.on_news(news)
        return status

    def guest_changed(self, why: str) -> None:
        self.checkpoints.request(Cause.GUEST_EVENT, why)

    def _guest_runs(self) -> None:
        if self.life.resumed():
            self.guest_changed("the PVM runs again after it stood still")

    @property
    def ends_the_pair(self) -> bool:
        return True

    def release_last(self) -> int:
        self.checkpoints.cancel()
        self.drain()
        return self.output.release_all()

    def forget_copy(self) -> None:
        self.checkpoints.cancel()

    # ---- the peer's messages

    def peer_connected(self) -> None:
        self.view.checkpoint_due(False)

    def on_message(self, msg: dict[str, Any]) -> None:
        handler = self._handlers.get(msg["type"])
        if handler is not None:
            handler(msg)

    def _on_ready(self, msg: dict[str, Any]) -> None:
        """A QEMU waits there: another SVM than the one that died."""
        self.entry.peer_ready = True
        self.view.peer_open()
        self.entry.peer_qemu = (msg.get("qemu", 0), self.peer.peer_boot)
        self.entry.peer_disks = msg["disks"]
        self.entry.peer_hardware = msg["hardware"]
        self.entry.peer_nics = msg["nics"]
        self.entry.peer_lacks = ""
        self.arbiter.peer_open()
        self.checkpoints.wake()
        self._protect_again()

    def _on_beat(self, msg: dict[str, Any]) -> None:
        if self.state is State.STOPPED:
            return
        if self.view.shadow and msg["shadow"] and msg["role"] == Role.SECONDARY.value:
            self.shadow.confirmed()
        if msg["state"] == State.PROMOTED.value:
            self._demote("the secondary transmits for the guest")
        elif self._older_than(msg):
            self._demote("the other host runs the PVM: this data path knows less of it")

    def _on_request(self, msg: dict[str, Any]) -> None:
        full = msg["cause"] == Cause.OVERLAY_FULL
        cause = Cause.OVERLAY_FULL if full else Cause.GUEST_EVENT
        if not full:
            self.checkpoints.health.svm_changed()
        self.checkpoints.request(cause, f"the secondary: {msg['why'][:200]}")

    def _on_switchover(self, msg: dict[str, Any]) -> None:
        try:
            self.checkpoints.switchover.plan(msg["why"])
        except ValueError as e:
            log.warning("%s", e)

    def _on_downtime(self, msg: dict[str, Any]) -> None:
        self.last_failover = {"gap_ms": msg["gap_us"] / 1e3, "took_ms": msg["took_us"] / 1e3}
        log.info("no frame of the guest reached the network for %.1f ms", msg["gap_us"] / 1e3)
        self.story.tell(Kind.SWITCHED, "", gap_ms=msg["gap_us"] / 1e3)

    def _on_failed(self, msg: dict[str, Any]) -> None:
        if self.checkpoints.running is None and self.state in (State.STARTING, State.SOLO):
            self.entry.peer_lacks = msg["why"][:300]
        else:
            self.checkpoints.on_message(msg)

    def on_heartbeat_flags(self, flags: Flag) -> None:
        alone = Flag.SVM in flags and Flag.STANDALONE in flags and Flag.SHUT not in flags
        if alone and self.state is not State.STOPPED:
            self._demote("the secondary transmits for the guest, as its heartbeat datagrams say")

    @property
    def waiting(self) -> bool:
        cks = self.checkpoints
        return cks.wanted is not None or (cks.running is None and self.dp.mode is Mode.CHECKPOINT)

    def _older_than(self, msg: dict[str, Any]) -> bool:
        """Return which of two primaries has to yield, after this host lost its pins (a reboot).

        A pair's epochs only grow: the host with the smaller one has missed what came after.
        """
        if msg["role"] != Role.PRIMARY.value or msg["state"] == State.STOPPED.value:
            return False
        mine: int = self.dp.epoch
        theirs: int = msg["epoch"]
        return theirs > mine or (theirs == mine and self.config.role == "secondary")

    def _demote(self, why: str) -> None:
        """Fall silent for good: a secondary that has taken over must not be contradicted."""
        self.dp.mode = Mode.DROP
        self.dp.undecided = False
        self.checkpoints.cancel()
        self.become(State.STOPPED, why)

    async def leave_network(self) -> None:
        """Not sooner: until then clients' frames that come here are mirrored to the other one."""
        try:
            await asyncio.to_thread(self.dp.close_network)
        except (devices.NoSuchDevice, netlink.NetlinkError, OSError) as e:
            log.debug("the tap is not taken out of the bridge: %s", e)  # it went with its guest

    def paired(self) -> bool:
        return self.state in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED)

    def outdated(self, why: str) -> None:
        self._demote(why)

    def on_arbiter(self) -> None:
        self.checkpoints.wake()

    # ---- protecting, and protecting again

    def _protect_again(self) -> None:
        """Enter COLO with the new secondary that waits for a guest which has been alone."""
        if self.state is State.SOLO and self.entry.peer_ready:
            self.become(State.STARTING, "a new secondary waits: protecting again")
            self.checkpoints.serve(self._leave_former_pair)

    async def _leave_former_pair(self) -> None:
        while self.state is State.STARTING:
            try:
                if await self.qemu.qmp.migration_status() not in IN_COLO:
                    break
                await self.qemu.leave_colo()
            except QmpError as e:
                log.warning("%s", e)
            await asyncio.sleep(REARM_S)
        self.view.new_pair()
        self.checkpoints.wanted = None

    async def on_replacement_qemu(self) -> None:
        if taps := self.dp.in_bridge:
            log.error(
                "[network] bridge is needed to become the secondary: %s is in one",
                " and ".join(taps),
            )
            await asyncio.sleep(INCOMING_S)
            return
        self.change_role("the other guest serves, and a new QEMU waits here for its state")

    async def start(self) -> None:
        await super().start()
        if self.undecided:
            self.spawn(self._look_at_guest())
        elif self.dp.mode is not Mode.DROP:  # a former controller may have died before this
            self.spawn(self.open_network())
        self.spawn(self._watch_bridge())
        self.spawn(self.mirrors.run())
        self.spawn(self._watch_disks())
        cks = self.checkpoints
        self.spawn(cks.offsets.sweep(lambda: cks.running is not None))

    async def _watch_disks(self) -> None:
        """Give the pair up when the guest gets a disk or a network card that nobody looks after.

        In COLO QEMU plugs no device in, but it changes the medium of one; and notices nothing if a
        person does so on both hosts, whose guests write to it each by itself.
        """
        while True:
            await asyncio.sleep(PLUGGED_S)
            if self.state is not State.PROTECTED or not self.qemu.qmp.connected:
                continue
            with contextlib.suppress(QmpError):
                if why := await self.life.uncovered():
                    self.copy_lost(why)

    async def _watch_bridge(self) -> None:
        while True:
            if self.dp.mode in (Mode.RUN, Mode.CHECKPOINT):  # else it may live elsewhere by now
                await asyncio.to_thread(self.dp.watch_bridge)
            await asyncio.sleep(BRIDGE_S)

    async def on_qemu(self) -> None:
        await self.qemu.disks.adopt()
        status = await self._find_out_whether_it_runs()
        if self.state is State.SOLO:
            await self.qemu.disks.mirrors.cut()  # a write to a dead host would wait for ever
            migration = await self.entry.migration()
            if migration in IN_COLO:  # a former controller died before this
                try:
                    await self.qemu.leave_colo()
                except QmpError as e:  # or QEMU was just about to
                    log.warning("%s (the PVM goes on all the same)", e)
            # an entry did not lead to COLO, and its controller has died since
            stopped = status in ("postmigrate", "finish-migrate")
            if migration in (*IN_COLO, "failed") or stopped:
                self.spawn(self._let_run())
        elif (
            not self.checkpoints.serving
            and not self._going_solo
            and self.state is not State.STOPPED
        ):
            self.checkpoints.serve()

    async def _let_run(self) -> None:
        """See to it that a guest which is alone runs, also when QEMU has to be waited for."""
        began = time.monotonic()
        while self.state is State.SOLO:
            with contextlib.suppress(QmpError):
                await self.qemu.disks.mirrors.cut()
                migration = await self.qemu.qmp.migration_status()
                if migration in IN_COLO:
                    await self.qemu.leave_colo()  # what was tried before has failed
                    runs = await self.entry.cont()
                elif migration not in CANCELLABLE:
                    runs = await self.entry.cont()
                elif await self.qemu.qmp.enters_colo():
                    runs = await self.entry.run_on(time.monotonic() - began)
                else:
                    return  # somebody moves the guest to another host
                if runs:
                    return
            await asyncio.sleep(REARM_S)

    # ---- failover

    async def perform(self, action: Action, why: str) -> None:
        if action is Action.GO_SOLO:
            await self._go_solo(why)
        elif action is Action.OPEN:
            self._open(why)
        elif action is Action.STOP:
            self._demote(why)
            self.peer.send("shut", why=why, standalone=self.view.guest.standalone)
        elif action is Action.ASK_SHUT:
            self.become(self.state if self.undecided else State.DEGRADED, why)
            self.asks = not self.peer.send("demote", why=why)
            await asyncio.sleep(self.config.peer.heartbeat_interval / 1000)
        elif action is Action.REARM:
            self.checkpoints.order(CheckpointRequest(Cause.PEER_GAP.value, why), hurry=True)
            self.become(State.CHECKPOINTING, why)

    async def _go_solo(self, why: str) -> None:
        self._going_solo = True
        try:
            await self._leave_pair(why)
        finally:
            self._going_solo = False

    async def _leave_pair(self, why: str) -> None:
        lost = self.view.guest.copy_lost or self.checkpoints.failed_why
        self.checkpoints.failed_why = ""
        self.checkpoints.cancel()
        self.entry.peer_ready = False
        self.peer.send("demote", why=why)
        self.drain()
        self.view.went_standalone()
        self.output.uncompared = True
        self.dp.sync_state = SyncState.STANDALONE
        released = self.output.release_all()
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
        why = f"{lost} ({why})" if lost else why
        self.become(State.SOLO, f"{why}; {released} held frames released")
        self.spawn(self._let_run())
        self._protect_again()

    async def switch_over(self, deadline: float, why: str) -> bool:
        return await self.checkpoints.switchover.run(deadline, why)

    def switchover_steps(self) -> list[str]:
        return [step.format(qmp=self.config.qemu.qmp) for step in switchover.STEPS]

    def failover_steps(self, *, force: bool) -> list[str]:
        f = self.config.failover
        steps = [f"fence the secondary: {' '.join(f.fence)}"] if f.fence and not force else []
        held, _ = self.output.held
        return [
            *steps,
            f"release the {held} held frames of the PVM",
            "data path: bypass (the PVM's frames pass uncompared)",
            f"QMP {self.config.qemu.qmp}: x-colo-lost-heartbeat",
        ]

    # ---- the operator

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        return await self.checkpoints.command(args)

    def asked_again(self) -> None:
        if self.state is State.STARTING and self.entry.tries.count:
            self.entry.tries.forget()
            self.checkpoints.wake()

    def new_policy(self) -> None:
        self.output.set_policy(self.config)

    def set_shadow(self, on: bool) -> None:
        if on == self.view.shadow and not self.shadow.leaving:
            return
        if on:
            self.shadow.begin()
            self.beat()
        else:
            self.shadow.leave()
            want = CheckpointRequest(Cause.OPERATOR.value, "leaving shadow mode")
            self.checkpoints.order(want, hurry=True)
