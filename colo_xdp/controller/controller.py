# SPDX-License-Identifier: GPL-2.0-or-later
"""One host's controller: its state, its parts, and the loop around the decision.

The two roles (controller/primary.py, controller/secondary.py) add what each side does at a
checkpoint and at a failover; everything else is a part of its own, which the controller owns and
whose Protocol says what it needs of its owner. Nothing here blocks without a deadline; what the
guests' packets need happens in `on_frame`, called from the event ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from ..abi import Mode, SyncState
from ..config.file import Config
from ..datapath import devices, netlink
from ..datapath.host import HostDataPath
from ..failover import states
from ..failover.arbiter import ARBITERS, Arbiter
from ..failover.arbiter import Host as ArbiterHost
from ..failover.decision import Action, Decision, decide
from ..failover.facts import Ending, Facts, LinkView, OtherGuest
from ..failover.lease import boot_ns
from ..failover.mark import Mark, Standing, found_why
from ..failover.states import Role, State, sends_nothing
from ..peer.channel import Peer
from ..peer.heartbeat_links import HeartbeatLinks
from ..peer.messages import VERSION
from ..peer.tls import Tls
from ..qemu.block_layer import ReplicationOptions
from ..qemu.events import QmpEvent, news
from ..qemu.migration import MigrationOptions
from ..qemu.overlays import ReplicatedDisk
from ..qemu.supervisor import QemuOptions, QemuSupervisor, Stakes
from .checkup import Checkup
from .commands import OperatorCommands
from .device_watch import DeviceWatch
from .guest_lifecycle import ENDED, GuestLifecycle
from .guest_lifecycle import Action as LastAction
from .heartbeats import Heartbeats
from .pair_view import PairView, Surroundings
from .replacement import Replacement
from .role import RoleSteps
from .story import Kind, Story
from .ticker import IDLE_S, REST_S, Ticker

log = logging.getLogger("colo_xdp")


RING_BATCH = 512
#: At rest a decision is made with every so many heartbeats, and at once when there is any news.
REDECIDE = 5
#: part of heartbeat_interval by which a heartbeat may be early to answer the peer's
ANSWER_SHARE = 0.25
FOR_EVER_NS = (1 << 63) - 1
LEFT = "a guest ran standalone here before, so the disks of this host may be the newest"
GUEST_S = 5.0  # between two looks at what is known of the guest's addresses, and at its port


def _replication(config: Config) -> ReplicationOptions:
    """Return what the configuration says of disks, in bytes."""
    return ReplicationOptions(
        config.pair,
        tuple(
            ReplicatedDisk(d.name, d.overlays, d.overlay_limit << 20)
            for d in config.replicated_disks
        ),
        config.nbd.local,
        config.nbd.remote,
        config.nbd.speed << 20,
        config.nbd.write_timeout / 1000,
    )


class Controller(RoleSteps):
    """One host's guest, what is known of the pair, and what is done about it."""

    role: Role

    def __init__(self, config: Config, datapath: HostDataPath) -> None:
        self.config, self.dp = config, datapath
        self.state = State.STARTING
        self.reason = "starting"
        self.since = time.time()
        self.history: deque[dict[str, Any]] = deque(maxlen=64)
        self.story = Story(self.role)
        #: all that is known of the pair
        self.view = PairView(self.role, time.monotonic_ns(), boot_ns())
        self.role_changed = False  # the next controller of this host is the other guest's
        self.replacement = Replacement(self)
        self.life = GuestLifecycle(self)
        self.failures: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._finished = asyncio.Event()
        q = config.qemu
        self.qemu = QemuSupervisor(
            QemuOptions(
                pair=config.pair,
                name="PVM" if self.role is Role.PRIMARY else "SVM",
                qmp=q.qmp,
                qmp_oob=q.qmp_oob,
                timeout_s=q.qmp_timeout / 1000,
                taps={net.tap: net.guest_mac for net in config.networks},
                incoming=q.incoming,
                replication=_replication(config),
                migration=MigrationOptions(**config.migration_options(self.role.value)),
            ),
            self,
            tap_alive=datapath.tap_alive,
            is_at=lambda nic, *macs: datapath.nics[nic].is_at(*macs),
        )
        self._busy: asyncio.Task[Any] | None = None  # the one action in progress
        self.asks = False  # by heartbeat datagram: the secondary is to demote its guest
        #: of the last switchover: gap_ms (the network heard nothing of the guest), took_ms
        self.last_failover: dict[str, float] | None = None
        p = config.peer
        tls = Tls(p.cert, p.key, p.ca, p.peer_cert, p.identity) if p.cert else None
        # Types are spelled out where mypy 2.0 cannot infer them, in an import cycle.
        self.peer: Peer = Peer(
            pair=config.pair,
            role=config.role,
            local=p.local,
            remote=p.remote,
            tls=tls,
            on_up=self._peer_up,
            on_down=self._peer_down,
            on_message=self._peer_message,
            versions=(p.min_version, VERSION),
        )
        self.heartbeats = Heartbeats(self)
        self.heartbeat_links: HeartbeatLinks = HeartbeatLinks(config, self.heartbeats.on_heartbeat)
        self.devices = DeviceWatch(self)
        # The programs must not take a controller that idles for a dead one.
        loss_s = config.datapath.controller_loss / 4000
        self.ticker = Ticker(
            self._tick, self.tick_ns, min(IDLE_S, loss_s),
            at_rest=self._at_rest, asleep=lambda: self.asleep, rest_s=min(REST_S, loss_s),
        )  # fmt: skip
        self._next_beat = 0.0
        self._news = True  # something has happened since a decision had nothing to do
        self._undecided_beats = 0  # heartbeats since the last decision
        self.arbiter: Arbiter = ARBITERS[config.failover.arbiter].make(
            ArbiterHost(
                config=config,
                boot=self.peer.boot,
                transmitting=datapath.adopted and not self.silent(),
                adopted=datapath.adopted,
                allow=datapath.lease_expiry,
                changed=self._arbiter_changed,
            )
        )
        self.checkup = Checkup(self)
        self.commands = OperatorCommands(self)

    # ---- what is known

    @property
    def uncompared(self) -> bool:
        """Whether clients may know what the SVM never sent: in shadow mode, or nobody knows."""
        return self.view.shadow or (self.undecided and self.view.peer.guest is OtherGuest.COPY)

    @property
    def left_standalone(self) -> bool:
        """Whether to say that a guest ran standalone here before this host's boot, and is gone.

        A host that starts as the primary has nobody to tell it to: it uses that itself. With a
        lease the store knows more.
        """
        waits = self.role is Role.SECONDARY and self.state is State.STARTING
        return waits and self.view.left_standalone and not self.arbiter.needs_grant

    def use_mark(
        self, mark: Mark | None, keep: Callable[[Standing], None], path: str, boot: str
    ) -> None:
        """Begin with what the mark says (failover/mark.py), and keep it up to date by `keep`.

        `boot`: the kernel's id of this boot.
        """
        found = mark.standing if mark is not None else Standing.NONE
        if mark is not None and mark.trouble and self.view.guest.standalone:
            found = Standing.NONE  # so that the file is written anew
        equal = self.dp.adopted and self.dp.sync_state is SyncState.IN_SYNC
        self.view.mark_found(found, keep, equal=equal)
        if mark is not None and self.view.left_standalone and (why := found_why(mark, path, boot)):
            log.warning("%s", why)
            self.story.tell(Kind.MARK, why)

    def mark_trouble(self, why: str) -> None:
        """Tell what keeps the mark from being kept."""
        self.story.tell(Kind.MARK, why)

    def guest_halts(self, why: str) -> None:
        """Note that the guest is about to stand still, with its memory intact."""
        self.life.halted(why)

    def on_qemu_gone(self) -> None:
        """Wait for another QEMU: nothing depended yet on the one that is gone."""
        why = self.view.guest.why or "the QEMU of this host is gone"
        self.become(State.STARTING, f"{why}: waiting for another one")

    # ---- state

    def become(self, state: State, why: str) -> None:
        """Change the state, and record why."""
        if state is self.state and why == self.reason:
            return
        if state is not self.state:
            self._check_transition(state, why)
            self.since = time.time()
        flips = (State.PROTECTED, State.CHECKPOINTING)
        if state is not self.state and not (state in flips and self.state in flips):
            self.history.append({"at": self.since, "state": state.value, "reason": why})
        self.state, self.reason, self._news = state, why, True
        if state is State.STOPPED:
            self.replacement.begin()
        self.story.became(state, why)
        log.info("%s %s: %s: %s", self.config.pair, self.role.value, state.value, why)

    def _check_transition(self, state: State, why: str) -> None:
        """Report an illegal transition; raise IllegalTransition in tests."""
        if states.legal(self.role, self.state, state):
            return
        text = f"internal error: state {self.state.value} to {state.value}: {why}"
        log.error("%s", text)
        self.failures.append(text)
        if states.STRICT:
            raise states.IllegalTransition(text)

    def shown_state(self) -> State:
        """Return the state for people and for the decision: two are views of `protected`."""
        if self.state is not State.PROTECTED:
            return self.state
        return (
            State.PAUSED if self.view.paused else State.SHADOW if self.view.shadow else self.state
        )

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure is logged and ends the controller."""
        self._news = True
        task = asyncio.ensure_future(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._news = True
        if not task.cancelled() and (e := task.exception()) is not None:
            self._fail(e)

    def _fail(self, e: BaseException) -> None:
        """End this controller because of an internal error."""
        log.error("internal error: %r", e, exc_info=e)
        if repr(e) not in self.failures:
            self.failures.append(repr(e))
        self._finished.set()

    # ---- QEMU (qemu/supervisor.py)

    @property
    def stakes(self) -> Stakes:
        """What depends on this host's QEMU now."""
        if self.state is State.STARTING:
            return Stakes.NOTHING_YET
        if self.state is State.STOPPED:
            return Stakes.OVER  # controller/replacement.py looks for the next one
        return Stakes.WATCHED if self.state is State.PROTECTED else Stakes.GUEST

    def on_qmp_event(self, event: QmpEvent) -> None:
        """Handle an event from QEMU."""
        self._news = True
        if event.name == "COLO_EXIT":
            self.view.colo_lost()
        self.on_qmp(event)
        what = news(event, self.qemu.qmp.name)
        if what is not None:
            self.life.on_news(what)

    def on_qemu_found(self, *, there: bool) -> None:
        """Take note of whether a QEMU was found."""
        self._news = True
        self.view.qemu_found(there=there)
        if there:
            self.view.guest_event("")

    def on_qemu_refused(self, why: str) -> None:
        """Stop: this release cannot work with this QEMU."""
        self.become(State.STOPPED, why)

    def on_qemu_trouble(self, trouble: str) -> None:
        """Tell that QEMU answers with errors only; empty: that it does no more."""
        what = trouble or "QEMU does not answer with errors any more"
        (log.warning if trouble else log.info)("%s", what)
        self._news = True
        self.history.append({"at": time.time(), "state": self.shown_state().value, "reason": what})
        self.story.tell(Kind.QEMU, what)

    def on_guest_gone(self, *, hung: bool = False) -> None:
        """Note that the guest's QEMU is dead, or `hung` for good."""
        self._news = True
        self.view.guest_gone(hung=hung)

    @property
    def trouble(self) -> str:
        """Why this host cannot do its part in the pair, whatever the state; empty: it can."""
        return "; ".join(filter(None, (self.devices.trouble, self.qemu.trouble)))

    def own_state(self) -> State:
        """Return the state as far as it depends on this host: never `protected` over a data path
        that is not there, or with a QEMU that carries out no command."""
        state = self.shown_state()
        good = (State.PROTECTED, State.CHECKPOINTING, State.PAUSED, State.SHADOW)
        return State.DEGRADED if state in good and self.trouble else state

    def announced_state(self) -> tuple[State, str]:
        """Return state and reason, for people."""
        state, trouble = self.own_state(), self.trouble
        if trouble:
            whole = state is not self.shown_state()
            return state, trouble if whole else f"{self.reason}; {trouble}"
        if (
            state is State.PROTECTED
            and self.peer.connected
            and self.view.peer.state == State.DEGRADED
        ):
            return State.DEGRADED, "the other host's controller says `degraded`: its status has why"
        if self.left_standalone:
            return state, f"{self.reason}; {LEFT}"
        return state, self.reason

    # ---- peer

    def beat(self) -> None:
        """Send a heartbeat now."""
        self.heartbeats.beat()
        self.devices.listen()

    def _peer_up(self) -> None:
        log.info("peer connected")
        self.story.tell(Kind.PEER, "connected")
        self._news = True
        self.asks = False
        self.dp.peer_stopped = 0
        same_peer = self.peer.peer_boot == self.view.peer.boot
        self.view.connected(self.peer.peer_boot)
        self.heartbeat_links.core.rekey(self.peer.heartbeat_key, same_peer=same_peer)
        # It lives, whatever the fence command has said: it has to be fenced another time.
        self.peer_lives("it connects")
        self.devices.connected()
        self.beat()
        self.peer_connected()

    def peer_lives(self, why: str) -> None:
        """Void the result of the fence command: the peer lives, and has to be fenced again."""
        if self.view.pair.fence.result and self.state is State.DEGRADED:
            log.warning("the fence command had succeeded, but the peer lives: %s", why)
        self.view.fence_is_void()

    def _peer_down(self, why: str) -> None:
        log.warning("peer connection lost: %s", why)
        self.story.tell(Kind.PEER, f"connection lost: {why}")
        self._news = True
        self.heartbeat_links.watch(True)

    def _peer_message(self, msg: dict[str, Any]) -> None:
        kind = msg["type"]
        settled, unremarkable = False, False
        if kind in ("doctor_ask", "doctor_answer"):
            self.checkup.on_message(msg)
            return
        if kind == "heartbeat":
            unremarkable = not self.view.heartbeat(msg)
            settled = unremarkable and self.state is State.PROTECTED
            self.heartbeat_links.read()
            if self.role is Role.SECONDARY:
                shadow = msg["shadow"] and msg["role"] == Role.PRIMARY.value
                self._on_peer_shadow(shadow, msg["epoch"])
            if msg.get("over"):
                self.life.pair_over(ENDED)
            elif msg["shut"] and msg["state"] != State.STARTING.value:
                # What a host that is starting says is about a guest before its boot: it has a mark.
                # That may be there by mistake, so it ends no pair that lives. It is for a host that
                # knows nothing itself (PairView.heartbeat).
                self.peer_shut(msg["standalone"])
            if (rtt_ns := self.heartbeats.echoed(msg["echo"])) is not None:
                self.peer.rtt_ns = rtt_ns
            if msg["echo"] and msg["promise"]:
                self.arbiter.promised(msg["echo"])
            self.view.heartbeat_read(msg["t"])
            settled = self._answer() or settled
        elif kind == "shut":
            self.view.peer_gave_reason(f'"{msg["why"][:200]}"')
            self.peer_shut(msg["standalone"])
        elif kind == "guest_off":
            self.life.pair_over(msg["why"][:200])
        elif kind == "ready" or (kind == "begin" and msg["initial"]):
            self.view.peer_guest_is_new(boot_ns())
        elif kind == "reprotect":
            self.replacement.wanted = True
        elif kind == "bye" and msg["planned"]:
            until = boot_ns() + msg["back"] * 1_000_000 if msg["back"] else FOR_EVER_NS
            self.dp.peer_stopped = min(until, FOR_EVER_NS)
            log.info("the peer's controller stops on purpose: %s", msg["why"])
        self._news |= not unremarkable
        self.on_message(msg)
        if not settled:  # else the next tick decides, as it does every heartbeat_interval
            self.reconsider()

    def _answer(self) -> bool:
        """Send a heartbeat now that is due soon, or that the peer waits for: one wake-up of each
        host serves for both.

        Returns whether a tick comes at once."""
        share = self.config.peer.heartbeat_interval / 1000 * ANSWER_SHARE
        soon = self._next_beat - time.monotonic() < share
        if not (soon or self.heartbeats.to_answer(share)) or not self.ticker.now():
            return False
        self._next_beat = 0.0
        return True

    @property
    def path_shut(self) -> bool:
        """Whether nothing leaves, or will without a new guest: what `shut` means."""
        return self.state is State.STOPPED and self.dp.mode is Mode.DROP

    def _on_peer_shadow(self, on: bool, epoch: int) -> None:
        """Follow the primary's shadow mode.

        Only a later checkpoint ends it: a new primary controller may not know of it."""
        if on:
            news = not self.view.shadow
            self.view.set_shadow(True)
            self.dp.shadowed = epoch + 1
            if news:
                self.beat()  # the primary waits for this confirmation
        elif self.view.shadow and epoch >= self.dp.shadowed:
            self.view.set_shadow(False)
            self.dp.shadowed = 0

    def peer_shut(self, was_standalone: bool) -> None:
        """Note that the peer's path drops everything: certain silence, its guest alive or not."""
        self.arbiter.peer_shut(self.peer.peer_boot)
        if was_standalone and not self.view.guest.standalone and self.paired():
            self.outdated("the other guest ran standalone and is gone: this one lacks what it sent")
            return
        self.view.peer_shut(ended=was_standalone)
        if self.view.guest.demoted and not was_standalone and not self.view.guest.gone:
            # It asked for this guest's demotion and then died, without having run standalone: what
            # this side had when it was asked is still all that any client knows.
            self.view.promise_ends()
            self.become(State.DEGRADED, "the peer is gone and has never run standalone")

    @property
    def transmits(self) -> bool:
        """Whether the network receives this host's guest: the one answer for status, metrics, the
        health paths and the cluster's agent."""
        permitted = self.arbiter.view().may_transmit
        forwarding = self.dp.port_forwarding
        return self.view.heard(self.dp.mode, forwarding=forwarding, permitted=permitted)

    def silent(self) -> bool:
        """Return whether the data path keeps everything of this host's guest from the network."""
        return sends_nothing(self.role, self.dp.mode)

    async def _watch_guest(self) -> None:
        while True:
            await asyncio.to_thread(self.dp.watch_guest)
            await asyncio.sleep(GUEST_S)

    # ---- the decision

    def facts(self) -> Facts:
        """Return what is known now."""
        core, boot = self.heartbeat_links.core, boot_ns()
        return self.view.facts(
            Surroundings(
                now_ns=time.monotonic_ns(),
                state=self.shown_state(),
                own_qmp=self.qemu.qmp.connected,
                undecided=self.undecided,
                own_guest=self.own_guest,
                waiting=self.waiting,
                peer_connected=self.peer.connected,
                peer_silent_ms=self.peer.silent_ms(),
                ending=Ending.STOPPED if self.dp.peer_stopped > boot else self.peer.ending,
                links=tuple(
                    LinkView(p.name, core.silent_ms(i, boot), core.echo_age_ms(i, boot))
                    for i, p in enumerate(core.links)
                ),
                heartbeat_timeout_ms=self.config.peer.heartbeat_timeout,
                dead_after_ms=self.config.peer.dead_after,
                automatic=self.config.failover.automatic,
                arbiter=self.arbiter.view(),
                disk_unproven=self.disk_unproven and not self.view.forced,
            )
        )

    def act_last(self, action: LastAction) -> None:
        """Run an action after the one in progress, in place of all further decisions."""
        self._busy = self.spawn(action(self._busy))

    @property
    def acting(self) -> asyncio.Task[Any] | None:
        """The one action in progress."""
        return self._busy if self._busy is not None and not self._busy.done() else None

    def reconsider(self) -> None:
        """Decide anew, as after each event, and act on it."""
        if self.acting is not None:
            return
        self._undecided_beats = 0
        d: Decision = decide(self.facts())
        self._update_arbiter(d.action)
        self._news = d.action is not Action.NONE
        if d.action is Action.NONE:
            return
        if d.action is Action.WAIT:
            self.become(self.state, d.why)
            return
        if d.action in (Action.DEGRADE, Action.ACQUIRE):
            if self.state in (State.PROTECTED, State.DEGRADED, State.CHECKPOINTING):
                self.become(State.DEGRADED, d.why)
            return
        log.info("decision: %s: %s", d.action.value, d.why)
        if d.action not in (Action.REARM, Action.ASK_SHUT):  # each may be repeated many times
            self.story.tell(Kind.STEP, d.why, action=d.action.value)
        self._busy = self.spawn(self._act(d))

    def _nothing_new(self) -> bool:
        """Return whether a decision would be the last one, to do nothing: the peer is heard, and
        nothing has happened."""
        self._undecided_beats += 1
        return (
            not self._news
            and self._undecided_beats < REDECIDE
            and self.state is State.PROTECTED
            and self._heard
        )

    @property
    def _heard(self) -> bool:
        """Whether the control channel works, so that nothing else has to tell of the peer."""
        limit = self.config.peer.heartbeat_timeout / 2
        return self.peer.connected and self.peer.silent_ms() < limit

    def _arbiter_changed(self) -> None:
        self.on_arbiter()
        self.reconsider()

    def _update_arbiter(self, action: Action) -> None:
        """Tell the arbiter what this guest wants: a primary's to transmit while its path is not
        shut, a secondary's when it is to go on alone."""
        alone = action in (Action.ACQUIRE, Action.GO_SOLO, Action.TAKE_OVER)
        if self.role is Role.PRIMARY:
            wants = self.dp.mode is not Mode.DROP
        else:
            wants = alone or self.state is State.PROMOTED
        self.arbiter.follow(action, wants=wants)

    async def _act(self, d: Decision) -> None:
        alone = self.state in (State.SOLO, State.PROMOTED) and d.action is not Action.STOP
        if alone or self.state is State.STOPPED:
            return  # decided in the meantime, by a message or the end of a checkpoint
        if d.action is Action.FENCE:
            self.become(self.state if self.undecided else State.DEGRADED, d.why)
            success = await self.arbiter.fence()
            self.story.tell(Kind.FENCED, d.why, ok=success)
            self.view.fenced(success, time.monotonic_ns(), boot_ns())
        else:
            await self.perform(d.action, d.why)

    @property
    def migrate_to(self) -> str:
        """The URI where the other host's QEMU waits, when this host runs the PVM."""
        q = self.config.qemu
        return q.migrate_uri if self.config.role == "primary" else q.reverse_uri

    def superseded(self) -> bool:
        """Return whether this guest is worthless, since the other one certainly serves alone."""
        transmits = [State.SOLO.value]
        # else it waits for a decision, and is silent itself
        if self.view.peer.guest is OtherGuest.TRANSMITTING:
            transmits.append(State.STARTING.value)
        return self.peer.connected and (
            self.view.peer.state == State.PROMOTED.value
            or (self.view.peer.role == Role.PRIMARY.value and self.view.peer.state in transmits)
        )

    # ---- the guest after this one

    def change_role(self, why: str) -> None:
        """End this controller; the next one on this host has the other role."""
        log.info("%s: %s: the roles change", self.config.pair, why)
        self.story.tell(Kind.ROLE, why)
        self.dp.change_role()
        self.role_changed = True
        self._finished.set()

    # ---- the loop

    async def start(self) -> None:
        """Open the channel, begin to look for QEMU, read the ring."""
        await self.peer.start()
        self.heartbeat_links.start()
        loop = asyncio.get_running_loop()
        for fd in self.dp.fds:
            loop.add_reader(fd, self._readable)
        self.spawn(self.arbiter.run())
        if self.state is State.STOPPED:
            self.replacement.begin()
        else:
            self.spawn(self.qemu.connect())
        self.spawn(self.devices.run())
        self.spawn(self.ticker.run())
        self.spawn(self.qemu.watch())
        self.spawn(self._watch_guest())

    def drain(self) -> None:
        """Hand on what is in the event ring.

        An error ends the controller: the frame is gone, and an event loop would only log it.
        """
        try:
            if self.dp.drain(self.on_frame, RING_BATCH):
                self.on_batch()
                self.ticker.look()
        except Exception as e:
            self._fail(e)
            raise

    def _readable(self) -> None:
        """Drain the ring, as it can be read."""
        try:
            self.drain()
        except Exception:
            for fd in self.dp.fds:
                asyncio.get_running_loop().remove_reader(fd)

    def _at_rest(self) -> bool:
        """Return whether a tick would find nothing to do."""
        if self._finished.is_set():
            return False
        with contextlib.suppress(Exception):  # drain() has reported it
            self.drain()  # as each tick does
            return self.at_rest
        return False

    def _tick(self, late: float) -> float | None:
        if self._finished.is_set():
            return None
        now, interval = time.monotonic(), self.config.peer.heartbeat_interval / 1000
        self.heartbeats.stood_still(late, interval)
        self.dp.beat()
        if now >= self._next_beat:
            self._next_beat = now + interval
            self.heartbeat_links.watch(not self._heard)
            self.heartbeats.beat(due=True)
            self.devices.listen()
            limit = self.config.peer.heartbeat_timeout
            if self.peer.connected and self.peer.silent_ms() > limit:
                self.peer.drop(f"silent for {limit} ms")
            if not self._nothing_new():
                self.reconsider()
        # A wake-up can be missed only at the cost of one tick.
        self.drain()
        self.on_tick(time.monotonic_ns())
        return self._next_beat - now

    async def open_network(self) -> None:
        """Let the tap join the bridge; a failure is reported, and tried again at the next start."""
        try:
            try:
                await asyncio.to_thread(self.dp.open_network)
            finally:
                await asyncio.to_thread(self.dp.look_at_port)
        except (devices.NoSuchDevice, netlink.NetlinkError, OSError) as e:
            log.error("the guest's tap cannot join the bridge: %s", e)
            self.failures.append(f"open network: {e}")

    async def stop(self, why: str, *, planned: bool = True, back_ms: int = 0) -> None:
        """End this controller; the guests and the data path go on.

        `planned`: nobody is to take it for a death; `back_ms`: when the next one is expected, if
        that is known.
        """
        self.peer.send("bye", why=why, planned=planned, back=back_ms)
        loop = asyncio.get_running_loop()
        for fd in self.dp.fds:
            loop.remove_reader(fd)
        for t in list(self._tasks):
            t.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.peer.close()
        self.heartbeat_links.close()
        await self.qemu.close()
        await self.arbiter.close()

    async def finished(self) -> None:
        """Wait until an internal error, or a change of roles, ends the controller."""
        await self._finished.wait()

    def link_up(self, name: str) -> bool:
        """Return whether a device is up (for status)."""
        with contextlib.suppress(devices.NoSuchDevice):
            return devices.link_info(name).up
        return False
