# SPDX-License-Identifier: GPL-2.0-or-later
"""What the controllers of both hosts have in common: the loop around the decision.

primary.py and secondary.py add what each side does at a checkpoint and at a
failover. Nothing here blocks without a deadline; what the guests' packets need
happens in `on_event`, called from the event ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine
from typing import Any

from . import attach
from .abi import Mode
from .beacon import Flag, Word
from .config import Config, ConfigError, load
from .datapath import DataPath
from .failover import Action, Decision, Facts, Heard, Role, State, decide
from .limits import NEVER
from .paths import Paths
from .peer import Peer
from .qmp import QemuInfo, Qmp, QmpError, QmpTimeout, refusal
from .qmp_event import QmpEvent
from .ring import Event
from .speaker import Speaker, Store, boot_ns
from .tls import Tls
from .wire import VERSION

log = logging.getLogger("colo_xdp")


def make_store(config: Config) -> Store:
    """The lease's store. Its library is imported only where it is used."""
    from .lease import Etcd, EtcdStore

    f = config.failover
    etcd = Etcd(f.etcd, f.etcd_ca, f.etcd_cert, f.etcd_key)
    return EtcdStore(etcd, config.pair, f.lease_ttl / 10_000)


TICK_S = 0.01
IDLE_S = 0.05  # between two ticks when nothing is due before
QMP_RETRY_S = 0.2
DEATH_S = 2.0  # how long a lost QMP connection may wait for the tap's carrier to tell why
WATCH_S = 0.5
HUNG_S = 1.0  # QEMU answers x-colo-lost-heartbeat in 0.1 s; after this its main loop hangs
IN_COLO = ("colo", "active")  # states of the migration that x-colo-lost-heartbeat ends
FAILOVER_S = 30.0  # for one that a person asks for, and the fence on top
ORDER_S = 60.0  # for one that a former controller was asked for
STAND_DOWN_S = 30.0  # for a decision that is being carried out
INCOMING_S = 10.0  # deadline of the command that starts a QEMU, and the time between two tries
RING_BATCH = 512


class Controller(ABC):
    """One host's controller."""

    role: Role

    def __init__(self, config: Config, datapath: DataPath) -> None:
        self.config, self.dp = config, datapath
        self.state = State.STARTING
        self.reason = "starting"
        self.since = time.time()
        self.history: deque[dict[str, Any]] = deque(maxlen=64)
        self.paused = self.shadow = False
        self.operator = self.forced = False
        self._order_until = 0.0  # a person's word is not carried out later than this (monotonic, s)
        self.fence_result: bool | None = None
        self._fence_failed_ns = 0
        self._fenced_ns = 0  # when the fence command last ended (boot_ns)
        self._born_ns = time.monotonic_ns()
        self.colo_exit = False
        self.vm_gone = False
        self.vm_hangs = False  # it is gone for all that it answers
        self.peer_vm_gone = False
        self.peer_why = ""  # what it said with that
        self._guest_ns = boot_ns()  # since when the other guest is the one that it is
        self.asks = False  # by beacon: the secondary is to shut its guest in
        self._lag_ns = 0  # how long this loop stood still since the last heartbeat
        self._peer_slow_ns = 0  # when the peer last said the like
        self.peer_state = self.peer_role = ""
        #: of the last planned failover: gap_ms (the network heard nothing of the guest), took_ms
        self.last_failover: dict[str, float] | None = None
        self.role_changed = False  # the next controller of this host is the other guest's
        self._successor: asyncio.Task[None] | None = None
        self.peer_epoch = 0
        self.checkpoint_overdue = False
        self.stood_down = False  # shut in because the primary asked
        #: clients may know bytes of this guest that the other one has never heard of (abi.Bond)
        self.spoke_alone = False
        self.qemu_info: QemuInfo | None = None
        self.qemu_status = ""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._busy: asyncio.Task[Any] | None = None  # the one action in progress
        self._tick_at_ns = 0  # when the next tick is to come
        self._resting: asyncio.Future[None] | None = None  # until then
        self._finished = asyncio.Event()
        self._last_decision: tuple[Action, str] | None = None
        self.failures: list[str] = []
        p = config.peer
        tls = Tls(p.cert, p.key, p.ca, p.peer_cert, p.identity) if p.cert else None
        self.peer = Peer(
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
        self.paths = Paths(config, self._beacon)
        self.qmp = self._new_qmp()
        f = config.failover
        self.speaker: Speaker | None = None
        if f.arbiter == "lease":
            self.speaker = Speaker(
                make_store(config),
                node=config.role,
                address=p.local,
                boot=self.peer.boot,
                ttl_ms=f.lease_ttl,
                margin_ms=f.lease_margin,
                speaking=datapath.adopted and not self.silent(),
                allow=datapath.speak_until,
                changed=self._lease_changed,
            )
        self.oob: Qmp | None = None  # the second socket, if one is configured
        if datapath.adopted and datapath.order:
            # Whoever was asked has died on the way. Every step of it can be done twice.
            self._order("force" if datapath.order == "force" else "failover", ORDER_S)

    # ---- to be filled by the two sides

    @abstractmethod
    def on_event(self, event: Event) -> None:
        """A captured frame."""

    def on_batch(self) -> None:
        """All frames that were waiting have been handed to on_event."""

    def on_qmp(self, event: QmpEvent) -> None:
        """STOP, RESUME and the like."""

    def on_message(self, msg: dict[str, Any]) -> None:
        """A peer message that the base does not handle itself."""

    def on_beacon(self, flags: Flag) -> None:
        """A beacon, while the control channel is down and its flags are as good as a heartbeat."""

    @property
    def waiting(self) -> bool:
        """Output waits for a checkpoint that needs the peer's controller."""
        return False

    def on_tick(self, now_ns: int) -> None:
        """Every IDLE_S at least, and TICK_S after tick_ns() at most."""

    def tick_ns(self) -> int:
        """When on_tick() has something to do that cannot wait for IDLE_S."""
        return NEVER

    def on_lease(self) -> None:
        """The lease is got or lost, or the store says something new."""

    async def on_qemu(self) -> None:
        """QMP is (again) connected."""

    async def perform(self, action: Action, why: str) -> None:
        """Carry out GO_SOLO, TAKE_OVER, STOP or REARM."""

    # ---- state

    def become(self, state: State, why: str) -> None:
        """Change the state, and tell the story."""
        if state is self.state and why == self.reason:
            return
        if state is not self.state:
            self.since = time.time()
        flips = (State.PROTECTED, State.CHECKPOINTING)
        if state is not self.state and not (state in flips and self.state in flips):
            self.history.append({"at": self.since, "state": state.value, "reason": why})
        self.state, self.reason = state, why
        if state is State.STOPPED:
            self.await_successor()
        log.info("%s %s: %s: %s", self.config.pair, self.role.value, state.value, why)

    def shown_state(self) -> State:
        """The state for people and for the decision: two are views of `protected`."""
        if self.state is not State.PROTECTED:
            return self.state
        return State.PAUSED if self.paused else State.SHADOW if self.shadow else self.state

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A background task whose failure is logged and ends the controller."""
        task = asyncio.ensure_future(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        e = task.exception()
        log.error("internal error: %r", e, exc_info=e)
        self.failures.append(repr(e))
        self._finished.set()

    # ---- QEMU

    def _new_qmp(self) -> Qmp:
        name = "PVM" if self.role is Role.PRIMARY else "SVM"
        return Qmp(
            self.config.qemu.qmp,
            name,
            self.config.qemu.qmp_timeout / 1000,
            self._qmp_event,
            self._qmp_closed,
        )

    def _qmp_event(self, event: QmpEvent) -> None:
        log.debug("%s %s %s", self.qmp.name, event.name, event.data)
        if event.name == "COLO_EXIT":
            self.colo_exit = True
        self.on_qmp(event)

    def _qmp_closed(self, why: str) -> None:
        log.warning("%s", why)
        if self.state is State.STOPPED:
            return  # await_successor() looks for the next one
        self.spawn(self._after_qmp_loss()).add_done_callback(lambda _t: self._decide())

    async def _after_qmp_loss(self) -> None:
        """QMP is gone: dead QEMU (its tap has no carrier) or only a lost socket (connect again)."""
        end = time.monotonic() + DEATH_S
        while time.monotonic() < end:
            if not await asyncio.to_thread(self.dp.tap_alive):
                if self.state is State.STARTING:  # nothing depends on it yet: wait for the next one
                    self.qmp = self._new_qmp()
                    await self._connect_qemu()
                else:
                    self.vm_gone = True
                return
            with contextlib.suppress(QmpError):
                self.qmp = self._new_qmp()
                self.qemu_info = await self.qmp.connect()
                await self._connect_oob()
                log.info("QMP is back")
                await self.on_qemu()
                return
            await asyncio.sleep(TICK_S)
        self.vm_gone = True  # neither QMP nor a word from the kernel: shut the path, then say so

    async def _connect_qemu(self) -> None:
        said = ""
        while True:
            try:
                self.qemu_info = await self.qmp.connect()
            except QmpError as e:
                if self.state is not State.STARTING and not await asyncio.to_thread(
                    self.dp.tap_alive
                ):
                    self.vm_gone = True  # it died while nobody looked
                    self._decide()
                    return
                if str(e) != said:
                    said = str(e)
                    log.info("%s; waiting for it", e)
                await asyncio.sleep(QMP_RETRY_S)
                continue
            await self._connect_oob()
            why = refusal(self.qemu_info)
            if why:
                self.become(State.STOPPED, why)
                return
            while self.qmp.connected:  # else it has died meanwhile: _after_qmp_loss() goes on
                try:
                    await self.on_qemu()
                    return
                except QmpError as e:
                    log.warning("%s", e)
                    await asyncio.sleep(QMP_RETRY_S)
            return

    async def _connect_oob(self) -> None:
        path = self.config.qemu.qmp_oob
        if not path:
            return
        if self.oob is not None:
            await self.oob.close()
        name, seconds = f"{self.qmp.name} (oob)", self.config.qemu.qmp_timeout / 1000
        self.oob = Qmp(path, name, seconds, lambda e: None, lambda why: None)
        try:
            await self.oob.open()  # now: a QEMU that hangs accepts nobody
        except QmpError as e:
            self.oob = None
            log.warning("[qemu] qmp_oob: %s", e)

    async def leave_colo(self) -> None:
        """x-colo-lost-heartbeat. A main loop that waits for the dead peer is freed by yank first.

        Raises QmpError when QEMU answers neither way.
        """
        try:
            await self.qmp.lost_heartbeat(HUNG_S)
        except QmpTimeout as e:
            log.warning("%s: cutting its migration channel (yank)", e)
            await (self.oob or self.qmp).yank()
            # The first one may have been carried out since.
            if await self.qmp.migration_status() in IN_COLO:
                await self.qmp.lost_heartbeat()

    async def hangs(self) -> bool:
        """Whether this host's QEMU, which has let a deadline pass, hangs of its own.

        It may wait for the other one: then it goes on when its migration channel is cut.
        """
        log.warning("%s does not answer: cutting its migration channel (yank)", self.qmp.name)
        try:
            await (self.oob or self.qmp).yank(HUNG_S)
        except QmpTimeout:
            return True
        except QmpError as e:
            log.info("%s", e)  # but it answers
        try:
            await self.qmp.status()
        except QmpTimeout:
            return True
        except QmpError:
            pass
        return False

    async def _watch_qemu(self) -> None:
        """A QEMU that hangs gives no sign of its own."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.state is not State.PROTECTED or not self.qmp.connected:
                continue
            try:
                await self.qmp.status()
            except QmpTimeout:
                # While a checkpoint runs it may well be busy; that has a deadline of its own.
                if self.state is State.PROTECTED and await self.hangs():
                    self.vm_gone = self.vm_hangs = True
                    self._decide()
            except QmpError:
                continue

    # ---- peer

    def _peer_up(self) -> None:
        log.info("peer connected")
        self.asks = False
        self.paths.core.rekey(
            self.peer.beacon_key, same_peer=self.peer.peer_boot == self._beacon_boot
        )
        if self.peer.peer_boot != self._beacon_boot:
            self._beacon_boot, self._heard_t = self.peer.peer_boot, 0
        # It lives, whatever the fence command has said: it has to be fenced another time.
        self._fence_is_void("it connects")
        self._beat()
        self.peer_connected()

    _beacon_boot = ""

    def _fence_is_void(self, why: str) -> None:
        if self.fence_result and self.state is State.DEGRADED:
            log.warning("the fence command had succeeded, but the peer lives: %s", why)
        self.fence_result = None

    def peer_connected(self) -> None:
        """The channel is up."""

    def _peer_down(self, why: str) -> None:
        log.warning("peer connection lost: %s", why)

    def _peer_message(self, msg: dict[str, Any]) -> None:
        kind = msg["type"]
        if kind == "beat":
            self.peer_state, self.peer_epoch = msg["state"], msg["epoch"]
            self.peer_role = msg["role"]
            if self.role is Role.SECONDARY:
                word = msg["shadow"] and msg["role"] == Role.PRIMARY.value
                self._shadow_word(word, msg["epoch"])
            if msg["shut"]:
                self._peer_shut(msg["alone"])
            if msg["echo"]:
                self.peer.rtt_ns = max(0, boot_ns() - msg["echo"])
                if msg["promise"] and self.speaker is not None:
                    self.speaker.promised(msg["echo"])
            self._peer_t = self._heard_t = msg["t"]
        elif kind == "gone":
            self.peer_why = f'"{msg["why"][:200]}"'
            self._peer_shut(msg["alone"])
        elif kind == "ready" or (kind == "begin" and msg["initial"]):
            self._guest_ns, self.peer_why = boot_ns(), ""
        elif kind == "reprotect":
            self.incoming_wanted = True
        self.on_message(msg)
        self._decide()

    _peer_t = _heard_t = 0  # t of the newest heartbeat: not answered yet; whatever carried it

    def _beacon(self, word: Word) -> None:
        """What a beacon says counts only where the control channel cannot say it, if it is newer
        than all that was heard, recent, and of the guest that there is. A promise has its time in
        itself."""
        limit = self.config.peer.heartbeat_timeout
        if Flag.PROMISE in word.flags and self.speaker is not None and word.after:
            self.speaker.promised(word.after)
        if word.lag_ms > limit / 2:
            self._peer_slow_ns = time.monotonic_ns()
        since = max(self._guest_ns, boot_ns() - limit * 1_000_000)
        if self.fence_result and word.after > self._fenced_ns:
            self._fence_is_void("it has heard what was sent since")
        if self.peer.connected or word.after <= since or word.t <= self._heard_t:
            return
        self._heard_t = word.t
        self.peer_epoch = word.epoch
        if Flag.SHUT in word.flags:
            if not self.peer_vm_gone:
                self.peer_why = "its QEMU hangs" if Flag.HANGS in word.flags else ""
                log.warning("the peer's beacons say that its data path is shut")
            self._peer_shut(Flag.ALONE in word.flags)
        self.on_beacon(word.flags)
        self._decide()

    def _beacon_flags(self) -> Flag:
        flags = Flag(0) if self.vm_gone else Flag.VM
        for flag, on in (
            (Flag.SHUT, self.path_shut), (Flag.ALONE, self.spoke_alone), (Flag.ASK, self.asks),
            (Flag.SHADOW, self.role is Role.PRIMARY and self.shadow),
            (Flag.SVM, self.role is Role.SECONDARY), (Flag.HANGS, self.vm_hangs),
        ):  # fmt: skip
            if on:
                flags |= flag
        return flags

    @property
    def path_shut(self) -> bool:
        """Nothing leaves, or will without a new guest: what `shut` means."""
        return self.state is State.STOPPED and self.dp.mode is Mode.DROP

    def _shadow_word(self, on: bool, epoch: int) -> None:
        """Only a later checkpoint ends a shadow: a new primary controller may not know of it."""
        if on:
            news = not self.shadow
            self.shadow, self.dp.shadowed = True, epoch + 1
            if news:
                self._beat()  # the primary waits for this word
        elif self.shadow and epoch >= self.dp.shadowed:
            self.shadow, self.dp.shadowed = False, 0

    def _peer_shut(self, was_alone: bool) -> None:
        """The peer's data path drops everything: certain silence, its guest alive or not."""
        if self.speaker is not None:
            self.speaker.freed(self.peer.peer_boot)
        if was_alone and not self.spoke_alone and self.paired():
            self.outdated("the other guest spoke alone and is gone: this one lacks what it said")
            return
        self.peer_vm_gone = True
        if self.stood_down and not was_alone and not self.vm_gone:
            # It asked us to stand down and then died itself, without having spoken alone: what
            # this side had when it was asked is still all that any client knows.
            self.stood_down = False
            self.become(State.DEGRADED, "the peer is gone and has never spoken alone")

    @abstractmethod
    def paired(self) -> bool:
        """Whether this host's guest counts as a copy of the other one, or the other of it."""

    @abstractmethod
    def outdated(self, why: str) -> None:
        """The other guest has spoken alone: this one must never speak."""

    def _beat(self) -> None:
        promise = self.speaker is not None and self.silent() and self.speaker.promise()
        self.peer.send(
            "beat",
            t=boot_ns(),
            echo=self._peer_t,
            state=self.shown_state().value,
            epoch=self.dp.epoch,
            vm=not self.vm_gone,
            shut=self.path_shut,
            alone=self.spoke_alone,
            shadow=self.shadow,  # the primary's word; of the secondary: it has heard it
            promise=promise,
            role=self.role.value,
        )
        self._peer_t = 0
        lag, self._lag_ns = self._lag_ns, 0
        flags = self._beacon_flags() | (Flag.PROMISE if promise else Flag(0))
        self.paths.send(flags, lag // 1_000_000, self.dp.epoch)

    def silent(self) -> bool:
        """This host's guest does not reach the network."""
        speaks = Mode.TAKEOVER if self.role is Role.SECONDARY else None
        return self.dp.mode is Mode.DROP or (speaks is not None and self.dp.mode is not speaks)

    # ---- the decision

    def facts(self) -> Facts:
        """What is known now."""
        f, now = self.config.failover, time.monotonic_ns()
        wait = self.config.peer.dead_after
        if self.fence_result is False and now - self._fence_failed_ns > wait * 1_000_000:
            self.fence_result = None  # nobody is awake to do it: try again
        if self.operator and time.monotonic() > self._order_until:
            if self.state not in (State.SOLO, State.TAKEN_OVER, State.STOPPED):
                log.error("the failover that was asked for did not come about: ask for it again")
            self.operator = self.forced = False
        s, core, boot = self.speaker, self.paths.core, boot_ns()
        limit = self.config.peer.heartbeat_timeout
        return Facts(
            role=self.role,
            state=self.shown_state(),
            own_vm_alive=not self.vm_gone,
            own_qmp=self.qmp.connected,
            peer_connected=self.peer.connected,
            # a controller that has just started has heard nothing, and knows nothing of it
            peer_silent_ms=min(self.peer.silent_ms(), (now - self._born_ns) / 1e6),
            heartbeat_timeout_ms=limit,
            dead_after_ms=wait * (1 + (self.role is Role.SECONDARY)),
            peer_vm_gone=self.peer_vm_gone,
            colo_exit=self.colo_exit,
            automatic=f.automatic and not self.paused,
            fence_configured=bool(f.fence) and f.arbiter == "fence" and not self.forced,
            fence_result=self.fence_result,
            operator=self.operator,
            checkpoint_overdue=self.checkpoint_overdue,
            shadow=self.shadow,
            lease=s is not None,
            lease_held=s is not None and s.held,
            may_speak=s is None or s.may_speak,
            other_alone=s is not None and s.other_alone,
            recorded=s is not None and s.recorded,
            committed=s is not None and s.committed,
            own_vm_hangs=self.vm_hangs,
            peer_why=self.peer_why,
            paths=tuple(
                Heard(p.name, core.silent_ms(i, boot), core.unheard_ms(i, boot))
                for i, p in enumerate(core.paths)
            ),
            peer_slow=now - self._peer_slow_ns < 3 * limit * 1_000_000,
            ending=self.peer.ending,
            waiting=self.waiting,
        )

    def _decide(self) -> None:
        if self._busy is not None and not self._busy.done():
            return
        d: Decision = decide(self.facts())
        if self.speaker is not None:
            self._ask_for_lease(self.speaker, d.action)
        if d.action is Action.NONE:
            return
        if d.action in (Action.DEGRADE, Action.ACQUIRE):
            if self.state in (State.PROTECTED, State.DEGRADED, State.CHECKPOINTING):
                self.become(State.DEGRADED, d.why)
            return
        log.info("decision: %s: %s", d.action.value, d.why)
        self._busy = self.spawn(self._act(d))

    def _lease_changed(self) -> None:
        self.on_lease()
        self._decide()

    def _ask_for_lease(self, s: Speaker, action: Action) -> None:
        """A primary whose path is not shut holds the lease; a secondary, when it is to speak."""
        alone = action in (Action.ACQUIRE, Action.GO_SOLO, Action.TAKE_OVER)
        if self.role is Role.PRIMARY:
            s.want = self.dp.mode is not Mode.DROP
        else:
            s.want = alone or self.state is State.TAKEN_OVER
        if action is Action.ACQUIRE and s.held:
            s.alone()

    async def _act(self, d: Decision) -> None:
        if self.state in (State.SOLO, State.TAKEN_OVER, State.STOPPED):
            return  # decided in the meantime, by a message or the end of a checkpoint
        if d.action is Action.FENCE:
            self.become(State.DEGRADED, d.why)
            self.fence_result = await self._fence()
            self._fence_failed_ns, self._fenced_ns = time.monotonic_ns(), boot_ns()
        else:
            await self.perform(d.action, d.why)

    async def _fence(self) -> bool:
        """Run the fence command; only exit status 0 within its deadline is success."""
        f = self.config.failover
        try:
            proc = await asyncio.create_subprocess_exec(*f.fence)
        except OSError as e:
            log.error("fence %s: %s", f.fence[0], e)
            return False
        try:
            async with asyncio.timeout(f.fence_timeout / 1000):
                status = await proc.wait()
        except TimeoutError:
            proc.kill()
            await proc.wait()
            log.error("fence: no end after %d ms", f.fence_timeout)
            return False
        log.info("fence: exit status %d", status)
        return status == 0

    @property
    def migrate_to(self) -> str:
        """Where the other host's QEMU waits, when this host runs the PVM."""
        q = self.config.qemu
        return q.migrate_uri if self.config.role == "primary" else q.reverse_uri

    # ---- the guest after this one

    incoming_wanted = False

    def superseded(self) -> bool:
        """Whether this host's guest is worthless, since the other one is certain to speak alone."""
        speaks = (State.SOLO.value, State.STARTING.value)
        return self.peer.connected and (
            self.peer_state == State.TAKEN_OVER.value
            or (self.peer_role == Role.PRIMARY.value and self.peer_state in speaks)
        )

    @abstractmethod
    async def succeed(self) -> None:
        """This host's QEMU is a new one that waits for the other guest's state."""

    def await_successor(self) -> None:
        """From now on look for a QEMU that waits (-incoming) in place of the one that is over."""
        if self._successor is None or self._successor.done():
            self._successor = self.spawn(self._await_successor())

    async def _await_successor(self) -> None:
        started = 0.0
        while self.state is State.STOPPED and not self.role_changed:
            await asyncio.sleep(QMP_RETRY_S)
            if not self.superseded():
                continue
            if not self.qmp.connected:
                with contextlib.suppress(QmpError):
                    self.qmp = self._new_qmp()
                    self.qemu_info = await self.qmp.connect()
                    await self._connect_oob()
            status = ""
            with contextlib.suppress(QmpError):
                status = await self.qmp.status()
            if status == "inmigrate":
                await self.succeed()
                continue
            with contextlib.suppress(QmpError):
                if status:
                    await self.qmp.quit()
            wanted, self.incoming_wanted = self.incoming_wanted, False
            now = time.monotonic()
            if self.config.qemu.incoming and (wanted or now - started > INCOMING_S):
                started = now
                await self._start_incoming()

    async def _start_incoming(self) -> None:
        argv = self.config.qemu.incoming
        log.info("starting this host's QEMU anew: %s", " ".join(argv))
        try:
            proc = await asyncio.create_subprocess_exec(*argv)
            async with asyncio.timeout(INCOMING_S):
                status = await proc.wait()
        except (OSError, TimeoutError) as e:
            log.error("[qemu] incoming: %s", str(e) or f"no end within {INCOMING_S:g} s")
            return
        if status:
            log.error("[qemu] incoming: exit status %d", status)

    def change_role(self, why: str) -> None:
        """End this controller; the next one on this host is that of the other guest."""
        log.info("%s: %s: the roles change", self.config.pair, why)
        self.dp.change_role()
        self.role_changed = True
        self._finished.set()

    def _command_reprotect(self) -> dict[str, Any]:
        if self.state is State.STOPPED:
            if not self.superseded():
                raise ValueError(f"the other guest is not known to speak: {self.reason}")
            self.incoming_wanted = True
            self.await_successor()
            here = True
        elif self.state in (State.SOLO, State.TAKEN_OVER) or (
            self.role is Role.PRIMARY and self.state is State.STARTING
        ):
            if not self.peer.send("reprotect", why="asked by the operator"):
                raise ValueError("the other host's controller does not answer: start it first")
            here = False
        else:
            raise ValueError(f"nothing to do from state {self.state.value}: {self.reason}")
        return {"here": here, "state": self.state.value, "command": list(self.config.qemu.incoming)}

    # ---- the loop

    async def start(self) -> None:
        """Open the channel, begin to look for QEMU, read the ring."""
        await self.peer.start()
        self.paths.start()
        loop = asyncio.get_running_loop()
        for fd in self.dp.reader.fds:
            loop.add_reader(fd, self._drain)
        if self.speaker is not None:
            self.spawn(self.speaker.run())
        if self.state is State.STOPPED:
            self.await_successor()
        else:
            self.spawn(self._connect_qemu())
        self.spawn(self._ticker())
        self.spawn(self._watch_qemu())

    def _drain(self) -> None:
        if self.dp.drain(self.on_event, RING_BATCH):
            self.on_batch()
            if self.tick_ns() < self._tick_at_ns - TICK_S * 1e9:
                self._hurry()

    async def _ticker(self) -> None:
        interval = self.config.peer.heartbeat_interval / 1000
        next_beat = 0.0
        expected = time.monotonic()
        while not self._finished.is_set():
            now = time.monotonic()
            self._stood_still(now - expected, interval)
            self.dp.beat()
            if now >= next_beat:
                next_beat = now + interval
                self._beat()
                limit = self.config.peer.heartbeat_timeout
                if self.peer.connected and self.peer.silent_ms() > limit:
                    self.peer.drop(f"silent for {limit} ms")
                self._decide()
            # A wake-up can be missed only at the cost of one tick.
            self._drain()
            self.on_tick(time.monotonic_ns())
            await self._rest(next_beat - now)
            expected = self._tick_at_ns / 1e9

    async def _rest(self, most_s: float) -> None:
        """Until the next tick. What an idle controller costs is its wake-ups (0.3 ms each)."""
        due_s = (self.tick_ns() - time.monotonic_ns()) / 1e9
        resting = self._resting = asyncio.get_running_loop().create_future()
        self._wake_in(max(TICK_S, min(IDLE_S, most_s, due_s)))
        try:
            await resting
        finally:
            self._resting = None
            self._alarm.cancel()

    def _wake_in(self, seconds: float) -> None:
        self._tick_at_ns = time.monotonic_ns() + int(seconds * 1e9)
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._wake_up)

    def _wake_up(self) -> None:
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    def _hurry(self) -> None:
        """Something has come that cannot wait until the next tick."""
        if self._resting is not None and not self._resting.done():
            self._alarm.cancel()
            self._wake_in(TICK_S)

    def _stood_still(self, late: float, interval: float) -> None:
        """This loop is late (s). While it did not listen nobody was silent."""
        if late <= 0:
            return
        ns = int(late * 1e9)
        self._lag_ns = max(self._lag_ns, ns)
        if late > interval:
            self.peer.excuse(ns)
            self.paths.core.excuse(ns)
        if late > self.config.peer.heartbeat_timeout / 2000:
            log.warning("this controller stood still for %.0f ms", ns / 1e6)

    async def stop(self, why: str) -> None:
        """End this controller; the guests and the data path go on."""
        self.peer.send("bye", why=why)
        loop = asyncio.get_running_loop()
        for fd in self.dp.reader.fds:
            loop.remove_reader(fd)
        for t in list(self._tasks):
            t.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.peer.close()
        self.paths.close()
        await self.qmp.close()
        if self.speaker is not None:
            await self.speaker.close()
        if self.oob is not None:
            await self.oob.close()

    async def finished(self) -> None:
        """Until an internal error ends the controller."""
        await self._finished.wait()

    # ---- commands of the control socket

    async def command(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command of the CLI.

        Raises ValueError for what is unknown or impossible now.
        """
        if name == "status":
            return self.status()
        if name == "mode":
            return self._command_mode(args)
        if name == "failover":
            return await self._command_failover(args)
        if name == "stand-down":
            return await self._command_stand_down(args)
        if name == "checkpoint":
            return await self.command_checkpoint(args)
        if name == "reprotect":
            return self._command_reprotect()
        if name == "reload":
            return self.reload()
        if name in ("explain", "capture"):
            return self.tell(name, args)
        raise ValueError(f"unknown command {name!r}")

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("checkpoints are asked for on the primary host")

    def reload(self) -> dict[str, Any]:
        """Read the file again and take over what can change while running: the rules.

        Raises ValueError: the file is wrong, or something else in it has changed.
        """
        if self.config.path is None:
            raise ValueError("this configuration came from no file")
        try:
            new = load(self.config.path)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        changed = self.config.differences(new)
        if changed:
            raise ValueError(f"needs a restart of the controller: {', '.join(changed)} changed")
        self.config = new
        self.new_policy()
        log.info("policy reloaded: %d rules", len(new.rules))
        return {"rules": len(new.rules)}

    def new_policy(self) -> None:
        """The rules have changed."""

    def tell(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """What only the primary knows."""
        raise ValueError(f"{name}: ask the primary host, which compares")

    def set_shadow(self, on: bool) -> None:
        """Hold nothing, or hold again."""
        if on:
            raise ValueError("shadow mode is set on the primary host, which holds the frames")

    def _command_mode(self, args: dict[str, Any]) -> dict[str, Any]:
        mode = args.get("mode")
        if mode is not None:
            if mode not in ("protected", "paused", "shadow"):
                raise ValueError(f"mode {mode!r}: protected, paused or shadow")
            self.set_shadow(mode == "shadow")
            self.paused = mode == "paused"
            log.info("mode set to %s by the operator", mode)
        return {"mode": self.shown_state().value}

    @abstractmethod
    def failover_steps(self, *, planned: bool, force: bool) -> list[str]:
        """What a failover would do now, step by step."""

    @abstractmethod
    async def hand_over(self, deadline: float) -> bool:
        """Planned: a checkpoint, then the SVM goes on and the PVM is silent. Whether it is done.

        Raises ValueError when it cannot begin.
        """

    def _order(self, what: str, seconds: float) -> None:
        """A person's word: what was true of the other host then may not be so for ever."""
        self.operator, self.forced = True, what == "force"
        self._order_until = time.monotonic() + seconds

    async def _command_failover(self, args: dict[str, Any]) -> dict[str, Any]:
        planned, force = args.get("planned", False), args.get("force", False)
        if planned is True and force is True:
            raise ValueError("planned or force: a peer that is dead takes part in no plan")
        steps = self.failover_steps(planned=bool(planned), force=bool(force))
        if args.get("dry_run"):
            return {"steps": steps, "done": False, "state": self.state.value}
        if planned:
            c, q = self.config.checkpoint, self.config.qemu
            end = time.monotonic() + (c.deadline + 2 * q.qmp_timeout) / 1000
            done = await self.hand_over(end)
            return {
                "steps": steps, "done": done, "state": self.state.value, "reason": self.reason,
            }  # fmt: skip
        if self.state in (State.SOLO, State.TAKEN_OVER):
            return {"steps": [], "done": True, "state": self.state.value, "reason": self.reason}
        if self.state in (State.STARTING, State.STOPPED):
            raise ValueError(f"no failover from state {self.state.value}: {self.reason}")
        self.fence_result = None
        self.dp.order = "force" if force else "failover"
        self._order(self.dp.order, FAILOVER_S + self.config.failover.fence_timeout / 1000)
        deadline = self._order_until
        try:
            while time.monotonic() < deadline:
                self._decide()
                if self.state in (State.SOLO, State.TAKEN_OVER, State.STOPPED):
                    break
                if self.fence_result is False and not self.forced:
                    self.operator = False
                    raise ValueError(
                        "the fence command failed: the peer may be alive, nothing is opened"
                    )
                await asyncio.sleep(TICK_S)
        finally:
            self.dp.order = ""
        done = self.state in (State.SOLO, State.TAKEN_OVER)
        return {"steps": steps, "done": done, "state": self.state.value, "reason": self.reason}

    async def _command_stand_down(self, args: dict[str, Any]) -> dict[str, Any]:
        """This host's guest is silent for certain when this returns; the other one may go on."""
        why = str(args.get("why", "asked by the operator"))[:200]
        if self._busy is not None and not self._busy.done():
            # It may be a takeover, which opens the data path at its end.
            await asyncio.wait({self._busy}, timeout=STAND_DOWN_S)
            if not self._busy.done():
                raise ValueError(f"a decision is still being carried out: {self.reason}")
        self.operator = self.forced = False
        self.dp.order = ""
        if not self.path_shut:
            await self.perform(Action.STOP, f"stood down: {why}")
        await self.keep_shut()
        return {"state": self.state.value, "reason": self.reason, "peer": self.peer_state}

    async def keep_shut(self) -> None:
        """The mode says that nothing leaves: see to it that a program is there that obeys."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """The documented status (status.py)."""

    def link_up(self, name: str) -> bool:
        """Whether a device is up (for status)."""
        with contextlib.suppress(attach.NoSuchDevice):
            return attach.link_info(name).up
        return False
