# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary host: isolate the SVM, hold frames during a checkpoint, take over.

In MODE_RUN the kernel does everything and no frame comes to this process. During a checkpoint the
frames of both directions do. Those that the SVM sent before it resumed are void, since the
checkpoint has replaced the guest that sent them. Those of clients wait until the new guest runs,
since they have to meet the new guest's sequence numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from .. import abi
from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.conntrack_map import ConntrackMap
from ..datapath.host import HostDataPath
from ..datapath.ring import CapturedFrame
from ..failover.arbiter import ArbiterError
from ..failover.decision import Action
from ..failover.states import Role, State
from ..peer.heartbeat_datagram import Flag
from ..qemu.events import News, QmpEvent
from ..qemu.qmp import QmpError
from .controller import Controller
from .held_frames import HeldFrames, Hold
from .secondary_disks import SecondaryDisks
from .secondary_entry import SecondaryEntry
from .takeover import Takeover

log = logging.getLogger("colo_xdp.controller.secondary")

SWEEP_S = 5.0


class Secondary(Controller):
    """The controller on the SVM's host."""

    role = Role.SECONDARY

    def __init__(self, config: Config, datapath: HostDataPath) -> None:
        super().__init__(config, datapath)
        #: of each NIC
        self.flows = tuple(
            ConntrackMap(nic.objects.map("flows"), nic.objects.map("opening"))
            for nic in datapath.nics
        )
        self.held = HeldFrames(
            self._deliver,
            self._forward,
            lambda: self.state is State.PROMOTED,
            16 * config.compare.max_queue_size,
        )
        self.takeover = Takeover(self)
        self.entry = SecondaryEntry(self)
        self._missed = ""  # a loss of hooks that is still to be reported to the primary
        self.view.adopted(confirmed=datapath.adopted and datapath.sync_state is not SyncState.NONE)
        self.checkpoints_loaded = 0
        self.last_pause_ms = 0.0
        self.disks = SecondaryDisks(self)
        self.stepped_out = False
        self._hooks = asyncio.Lock()  # held while programs are detached or attached again
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "begin": lambda msg: self._on_begin(
                msg["n"], msg["initial"], msg["cause"] == Cause.SWITCHOVER
            ),
            "heartbeat": self._on_beat,
            "disks_whole": lambda msg: self.disks.on_whole(msg["n"]),
            "downtime_start": self._on_downtime_start,
            "claims": self._on_claims,
            "offsets": self._on_offsets,
            "ready": self._on_ready,
            "demote": lambda msg: self._demote(msg["why"]),
            "failed": lambda msg: self.entry.on_failed(msg["why"]),
        }
        self._adopt()

    def _adopt(self) -> None:
        """Start from the state in which a former controller left the data path."""
        datapath = self.dp
        if datapath.adopted:
            self.disks.adopt()
            self.view.set_shadow(datapath.shadowed > 0)
            if datapath.mode is Mode.TAKEOVER:
                self.view.went_standalone()
                self.state = State.PROMOTED
                self.reason = "promoted by a former controller"
            elif datapath.mode in (Mode.RUN, Mode.CHECKPOINT):
                if datapath.epoch > 0:
                    self.view.in_colo()
                self.state = State.DEGRADED if self.view.pair.confirmed else State.STARTING
                self.reason = "a former controller's data path was taken over"
                if datapath.mode is Mode.CHECKPOINT:
                    # It died while it held frames. Holding goes on; the primary asks anew.
                    self._begin_hold(datapath.epoch + 1)
                    self.takeover.epoch_uncertain = datapath.epoch
            elif datapath.epoch > 0:
                if datapath.sync_state is SyncState.STANDALONE:
                    self.view.went_standalone()
                self.state = State.STOPPED
                self.reason = "the data path was shut by a former controller"

    def hooks_lost(self, what: str, *, unseen: bool, still: bool) -> None:
        if self.view.pair.in_colo and not still:
            self._missed = "" if self.peer.send("missed", why=what[:200]) else what

    # ---- frames

    def _deliver(self, e: CapturedFrame) -> None:
        injectors = self.dp.nics[e.nic].injectors
        injectors["deliver"].send(e.frame, e.gso_size, e.partial, e.gso_type)

    def _forward(self, e: CapturedFrame) -> None:
        injectors = self.dp.nics[e.nic].injectors
        injectors["forward"].send(e.frame, e.gso_size, e.partial, e.gso_type)

    def on_frame(self, event: CapturedFrame) -> None:
        if event.source == abi.Source.CLIENT:
            self.held.from_client(event)
        else:
            self.held.from_svm(event)

    # ---- checkpoints

    def _begin_hold(self, n: int, *, planned: bool = False) -> None:
        limit = self.config.checkpoint.deadline / 1000 if self.view.pair.confirmed else float("inf")
        deadline = time.monotonic() + limit
        self.disks.begin(n)
        self.held.begin(n, time.monotonic_ns(), deadline, planned=planned)
        if not self.path_shut:
            self.dp.mode = Mode.CHECKPOINT

    def on_message(self, msg: dict[str, Any]) -> None:
        handler = self._handlers.get(msg["type"])
        if handler is not None:
            handler(msg)

    def _on_beat(self, msg: dict[str, Any]) -> None:
        h = self.held.hold
        if msg["role"] == Role.PRIMARY.value:  # it commits no checkpoint whose disks are not whole
            self.disks.committed(msg["epoch"])
        # A switchover's hold ends with the takeover, unless the primary went on all the same.
        over = h is not None and msg["epoch"] >= h.n and not (h.planned and msg["shut"])
        if h is not None and h.resume is not None and over:
            self._finish(h, h.resume)
        elif self.entry.was_missed(msg):
            self._demote("a former controller died before it knew that this guest is a copy")
        else:
            self.entry.on_beat(msg)
        if msg["standalone"] and not msg["shut"] and self.view.pair.confirmed:
            self.outdated("the PVM has run standalone")  # while no message of it arrived
        elif self._was_not_missed(msg):
            self.become(State.PROTECTED, "the primary answers again, and noticed no silence")

    def _on_downtime_start(self, msg: dict[str, Any]) -> None:
        since = time.monotonic_ns() - msg["us"] * 1000 - self.peer.rtt_ns // 2
        self.takeover.primary_silent(since)

    def _on_ready(self, msg: dict[str, Any]) -> None:
        if self.state is not State.PROMOTED or not self.view.guest.standalone:
            return
        if self.migrate_to:
            self.change_role("a new QEMU waits on the other host for this guest's state")
        else:
            log.error("a new secondary waits, but [qemu] reverse_uri is not set")

    def _was_not_missed(self, beat: dict[str, Any]) -> bool:
        """Return whether only this side has noticed a silence that is over.

        The primary rearms a pair by a checkpoint, but sees no reason for one here.
        """
        return (
            self.state is State.DEGRADED
            and self.view.pair.confirmed
            and self.view.pair.in_colo
            and not (
                self.takeover.under_way
                or self.view.guest.colo_exit
                or self.view.guest.gone
                or self.view.guest.demoted
            )
            and self.held.hold is None
            and self.dp.mode is Mode.RUN
            and not beat["shut"]
            and beat["state"] == State.PROTECTED.value
            and beat["epoch"] == self.dp.epoch
        )

    def on_heartbeat_flags(self, flags: Flag) -> None:
        if Flag.SVM in flags:
            return
        if Flag.SHADOW in flags:
            self._on_peer_shadow(True, self.view.peer.epoch)
        if Flag.STANDALONE in flags and Flag.SHUT not in flags and self.view.pair.confirmed:
            self.outdated("the PVM has run standalone, as its heartbeat datagrams say")
        if Flag.ASK in flags and self.state is not State.STOPPED:
            self._demote("asked by its heartbeat datagrams")

    def paired(self) -> bool:
        return self.view.pair.confirmed

    def outdated(self, why: str) -> None:
        if self.state is State.STOPPED and self.view.guest.demoted:  # before it was known why
            self.become(State.STOPPED, f"demoted for the primary: {why}")
        elif self.state not in (State.PROMOTED, State.STOPPED):
            self._demote(why)
        if not self.view.guest.standalone:  # whatever becomes of the peer
            self.view.no_copy()
            self.dp.sync_state = SyncState.NONE

    def _demote(self, why: str) -> None:
        """Shut the SVM in and report that: the primary runs standalone, or is about to."""
        if self.state is State.PROMOTED:
            return
        # The checkpoint in progress is not dropped: QEMU may load it all the same.
        self.dp.mode = Mode.DROP
        self.view.demoted()
        self.become(State.STOPPED, f"demoted for the primary: {why}")
        self.peer.send("shut", why="the secondary has shut its data path", standalone=False)

    def _on_offsets(self, msg: dict[str, Any]) -> None:
        """Store offsets of the guest that this one copies; they count once the copy transmits."""
        h, n = self.held.hold, msg["n"]
        if self.view.pair.confirmed:  # a new primary controller does not know that they arrived
            self.peer.send("offsets_ack", n=n)
            return
        if h is None:
            log.warning("unexpected offsets are ignored: no checkpoint is in progress")
            return
        try:
            self.flows[msg["nic"]].adopt(bytes.fromhex(msg["flows"]), first=msg["first"])
        except (IndexError, ValueError, OSError) as e:
            self.peer.send("failed", n=h.n, why=f"offsets of old connections: {e}")
            return
        self.peer.send("offsets_ack", n=n)

    @property
    def needs_copy(self) -> bool:
        had_one = self.entry.qemus > 0 or self.dp.adopted  # else whoever sets the host up starts it
        return had_one and self.state is State.STARTING and self.superseded()

    def on_qemu_gone(self) -> None:
        h = self.held.take()
        super().on_qemu_gone()
        self.entry.wanted = False
        self.view.not_in_colo()
        if h is not None:
            self.dp.mode = Mode.DROP
            self.peer.send("failed", n=h.n, why=self.view.guest.why or "the SVM's QEMU is gone")

    def _on_claims(self, msg: dict[str, Any]) -> None:
        """Store addresses that the PVM claims. From epoch n on they are this guest's claims."""
        running, n = self.dp.epoch, msg["n"]
        if n <= running:
            return
        try:
            own, hw = bytes.fromhex(msg["addresses"]), bytes.fromhex(msg["macs"])
            self.dp.nics[msg["nic"]].addresses.announced(n, own, hw, running=running)
        except (IndexError, ValueError, OSError) as e:  # then a takeover does not announce them
            log.warning("the addresses of the PVM cannot be stored: %s", e)

    async def _ask_arbiter(self, n: int) -> None:
        """Check for a switchover that the arbiter can permit this guest to transmit."""
        try:
            await self.arbiter.check()
        except ArbiterError as e:
            name = self.arbiter.view().name
            self.peer.send("failed", n=n, why=f"the SVM could not get the {name}: {e}")
            return
        self._on_begin(n, initial=False, planned=True, asked=True)

    def begin_entry(self, n: int) -> None:
        self._on_begin(n, initial=True, planned=False, asked=True)

    def _on_begin(self, n: int, initial: bool, planned: bool, *, asked: bool = False) -> None:
        why = ""
        if n <= self.dp.epoch:
            why = f"epoch {n} is over, this side is at {self.dp.epoch}"
        elif self.state in (State.PROMOTED, State.STOPPED):
            why = f"this side is {self.state.value}: {self.reason}"
        elif not self.qemu.qmp.connected:
            why = "QMP to the SVM is down"
        elif planned and self.qemu.trouble:  # the PVM would fall silent, and nobody take over
            why = self.qemu.trouble
        elif not initial and not self.view.pair.in_colo:
            why = "the SVM is not in COLO"
        if why:
            self.peer.send("failed", n=n, why=why)
            return
        if planned and self.arbiter.needs_grant and not asked:
            self.spawn(self._ask_arbiter(n))
            return
        if initial and not asked:
            self.spawn(self.entry.check(n))
            return
        if initial:
            self.view.entering()
        self._begin_hold(n, planned=planned)
        state = State.CHECKPOINTING if self.view.pair.confirmed else State.STARTING
        self.become(state, f"checkpoint to epoch {n}")
        self.peer.send("begin_ack", n=n)

    def on_qmp(self, event: QmpEvent) -> None:
        if self.state is State.PROMOTED:
            self.life.on_event_alone(event)
            return
        if self.takeover.under_way:
            self.takeover.saw(event)
            return
        self.disks.on_qmp(event)
        if event.name == "STOP" and self.view.pair.in_colo:
            if self.held.hold is None and self.state is not State.STARTING:
                # Somebody else asked QEMU for a checkpoint, or one that was given up comes after
                # all. Hold at once. A guest that is shut in (path_shut) has nothing to hold, but
                # what it loads decides which offsets count, should it take over in spite of that.
                log.warning("STOP of the SVM without a checkpoint of ours")
                self._begin_hold(self.dp.epoch + 1)
                self.spawn(self._stopped_by_whom(self.held.hold))
            if self.held.hold is not None:
                self.held.hold.stop_ns = event.ts_ns
        elif event.name == "RESUME" and self.held.hold is not None and self.held.hold.stopped:
            self.held.hold.stop_ns, self.held.hold.deadline = 0, 0.0  # as if none had come
            self.on_tick(time.monotonic_ns())
            if self.path_shut:  # there is nothing to give back
                self.held.take()
        elif event.name == "RESUME" and self.held.hold is not None:
            h = self.held.hold
            self.view.in_colo()
            h.resume = event
            self.last_pause_ms = h.pause_ms
            self.disks.loaded(h.n, event.ts_ns, h.pause_ms)
            if self.view.pair.confirmed and not h.planned:
                self._finish(h, event)
            self.disks.report()

    @property
    def disk_unproven(self) -> bool:
        return self.disks.unproven

    async def _stopped_by_whom(self, h: Hold | None) -> None:
        """Find out why the SVM has stopped without a `begin`, and react to that."""
        status, fate = await self.life.stands_still()
        if h is None or self.held.hold is not h or h.resume is not None or not status:
            return
        if fate is None or status == "guest-panicked":
            h.stopped = True
            why = f"the SVM was stopped (`{status}`) by no checkpoint"
            self.peer.send("request", cause=Cause.GUEST_EVENT.value, why=why)
            if status == "guest-panicked":  # QEMU can load no checkpoint in this state
                with contextlib.suppress(QmpError):
                    await self.qemu.qmp.execute("cont")
        else:
            self.life.on_news(News(fate, f"the SVM stands still (`{status}`)"))

    def guest_changed(self, why: str) -> None:
        if self.held.hold is None and self.state is State.PROTECTED:
            # else the checkpoint under way makes it a copy again
            self.peer.send("request", cause=Cause.GUEST_EVENT.value, why=why)

    def guest_halts(self, why: str) -> None:
        """Count a copy that is about to stand still as gone.

        The other guest has completed what this one waits for, so this one is no copy any more. The
        next checkpoint would end its QEMU, which allows no transition from io-error to colo.
        """
        if self.state is State.PROMOTED:
            super().guest_halts(why)
        elif self.state is not State.STARTING:
            self.view.guest_event(why)
            self.view.guest_gone()
            self.reconsider()

    @property
    def ends_the_pair(self) -> bool:
        return self.state is State.PROMOTED

    def forget_copy(self) -> None:
        self.held.take()
        self.view.not_in_colo()
        self.view.no_copy()

    def _finish(self, h: Hold, event: QmpEvent) -> None:
        """Enter the next epoch: the SVM runs the new state from its RESUME on."""
        self.drain()
        self.held.take()
        if self.dp.mode is Mode.DROP:  # demoted meanwhile: silent, with the PVM's sequence numbers
            self.dp.epoch = h.n
            return
        self.held.resumed(h, event)
        self.dp.epoch = h.n  # offsets of the former epoch are void from here on
        self.held.let_go(h)
        self.dp.sync_state = SyncState.IN_SYNC
        self.dp.mode = Mode.RUN
        self.drain()
        self.view.copy_confirmed()
        self.entry.wanted = False
        self.checkpoints_loaded += 1
        self.become(State.PROTECTED, f"the SVM runs epoch {h.n}")

    def on_tick(self, now_ns: int) -> None:
        self.entry.remind()
        h = self.held.hold
        if self.dp.mode is not Mode.CHECKPOINT or h is None:
            return
        if not h.stop_ns and time.monotonic() > h.deadline:
            # The checkpoint was asked for, but the SVM never stopped: it is still the guest that
            # it was (or see Takeover.epoch_uncertain).
            self.drain()
            self.held.take()
            self.held.let_go(h)
            self.dp.mode = Mode.RUN
            self.peer.send("failed", n=h.n, why="the SVM did not stop within the deadline")
            self.become(State.DEGRADED, f"checkpoint to epoch {h.n} was asked for and never came")

    @property
    def at_rest(self) -> bool:
        return self.held.hold is None

    @property
    def asleep(self) -> bool:
        """A hold begins with a message or an event of QEMU, and its deadline is seconds away."""
        return self.at_rest

    async def start(self) -> None:
        await super().start()
        self.spawn(self.disks.watch())
        if self.state is State.PROMOTED:  # the former controller may have died during the takeover
            await self.open_network()
            self.spawn(self.takeover.announce())
            self.spawn(self.takeover.settle_disks())

    def peer_connected(self) -> None:
        if self._missed:
            self.hooks_lost(self._missed, unseen=False, still=False)
        self.entry.peer_connected()

    async def on_replacement_qemu(self) -> None:
        """Start over with a new QEMU: nothing of the former guest counts any more."""
        self.view.new_guest()
        self.held.take()
        self.takeover = Takeover(self)
        self.disks.new_guest()
        self.dp.sync_state = SyncState.NONE
        self.arbiter.new_guest()
        self.become(State.STARTING, "a new QEMU is here")
        try:
            await self.on_qemu()
        except QmpError as e:
            self.become(State.STOPPED, f"the new QEMU is gone again: {e}")

    async def on_qemu(self) -> None:
        if self.state in (State.PROMOTED, State.STOPPED):
            return
        if not any(t.get_name() == "sweep" for t in self._tasks):
            self.spawn(self._sweep()).set_name("sweep")
        await self.qemu.disks.adopt()
        status = await self.qemu.qmp.status()
        if status == "inmigrate":
            await self.qemu.prepare(primary=False)
            if self.path_shut:
                return
            self.view.waits_for_migration()
            self.disks.new_guest()
            self.dp.sync_state = SyncState.NONE
            await self.entry.announce()
        elif self.view.pair.in_colo and await self.qemu.qmp.migration_status() == "colo":
            # The guest may have been demoted meanwhile, and the primary relies on that.
            if self.held.hold is None and self.view.pair.confirmed and not self.path_shut:
                self.become(State.PROTECTED, "the SVM is in COLO, its offsets were kept")
        elif self.held.hold is None and not self.view.pair.in_colo and not self.path_shut:
            self.become(
                State.STARTING,
                f"the SVM's QEMU is `{status}`; start it with -incoming and wait for the primary",
            )

    # ---- failover

    async def perform(self, action: Action, why: str) -> None:
        if action is Action.TAKE_OVER:
            self.entry.wanted = False
            await self.takeover.run(why)
        elif action is Action.STOP:
            self.dp.mode = Mode.DROP
            self.become(State.STOPPED, why)
            self.peer.send("shut", why=why, standalone=self.view.guest.standalone)

    async def switch_over(self, deadline: float, why: str) -> bool:
        if self.state not in (State.PROTECTED, State.CHECKPOINTING) or not self.peer.connected:
            raise ValueError(f"no switchover from state {self.state.value}: {self.reason}")
        self.peer.send("switchover", why=f"{why} on the secondary")
        while time.monotonic() < deadline:
            if self.view.guest.standalone:
                return True
            await asyncio.sleep(TICK_S)
        return False

    def switchover_steps(self) -> list[str]:
        first = "the primary: a checkpoint, then data path: drop (the PVM is silent)"
        return [first, *self._takeover_steps()]

    def failover_steps(self, *, force: bool) -> list[str]:
        f = self.config.failover
        fence = [f"fence the primary: {' '.join(f.fence)}"] if f.fence and not force else []
        return [*fence, *self._takeover_steps()]

    def _takeover_steps(self) -> list[str]:
        qmp = self.config.qemu.qmp
        return [
            *([f"QMP {qmp}: block-export-del"] if self.qemu.disks.any else []),
            f"QMP {qmp}: x-colo-lost-heartbeat",
            f"QMP {self.config.qemu.qmp_oob or qmp}: yank migration, out of band, if it hangs",
            f"QMP {qmp}: query-migrate, query-status until `running`",
            "data path: takeover (sequence offsets of live connections are kept)",
            *(
                f"{n.tap} joins {n.bridge}" if n.bridge else f"{n.tap} is routed by the host"
                for n in self.config.networks
            ),
            "announce the guest (RARP, gratuitous ARP, unsolicited NDP)",
        ]

    # ---- ageing

    async def _sweep(self) -> None:
        """Age tracked connections. Once promoted, step out when the last rewritten one is gone."""
        while True:
            await asyncio.sleep(SWEEP_S)
            epoch = self.dp.epoch
            for flows in self.flows:
                await asyncio.to_thread(flows.sweep, epoch)
            if (
                self.state is State.PROMOTED
                and not any(flows.wanted for flows in self.flows)
                and not self.stepped_out
                # else announcements are still to be made
                and all(nic.port_forwarding for nic in self.dp.nics)
                and not self.arbiter.needs_grant  # the programs enforce the end of a grant
            ):
                await self._step_out()

    async def _step_out(self) -> None:
        async with self._hooks:
            if self.state is State.PROMOTED:
                await asyncio.to_thread(self.dp.step_out)
                self.stepped_out = True
                log.info("the last rewritten connection is gone: rewriting programs are detached")

    def may_demote(self) -> None:
        if self.held.hold is not None and self.held.hold.planned:
            # The PVM may be silent already: then no guest would transmit.
            raise ValueError("a switchover to this guest is in progress: wait for its end")

    async def keep_shut(self) -> None:
        async with self._hooks:
            if self.stepped_out:
                await asyncio.to_thread(self.dp.step_in)
                self.stepped_out = False
