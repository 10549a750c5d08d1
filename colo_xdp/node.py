# SPDX-License-Identifier: GPL-2.0-or-later
"""One host of a pair, whatever its peer says: its state, its tasks, its QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine
from typing import Any

from . import outside, states
from .config import Config
from .datapath import DataPath
from .failover import Role, State
from .guest_event import News, news
from .nic import NicError
from .pair_view import PairView
from .qmp import QemuInfo, Qmp, QmpError, QmpTimeout, refusal
from .qmp_event import QmpEvent
from .speaker import boot_ns
from .ticker import TICK_S

log = logging.getLogger("colo_xdp")

QMP_RETRY_S = 0.2
DEATH_S = 2.0  # how long a lost QMP connection may wait for the tap's carrier to tell why
WATCH_S = 0.5
HUNG_S = 1.0  # QEMU answers x-colo-lost-heartbeat in 0.1 s; after this its main loop hangs
IN_COLO = ("colo", "active")  # states of the migration that x-colo-lost-heartbeat ends
INCOMING_S = 10.0  # deadline of the command that starts a QEMU, and the time between two tries


class Node(ABC):
    """This host's guest and what is known of it."""

    role: Role

    def __init__(self, config: Config, datapath: DataPath) -> None:
        self.config, self.dp = config, datapath
        self.state = State.STARTING
        self.reason = "starting"
        self.since = time.time()
        self.history: deque[dict[str, Any]] = deque(maxlen=64)
        #: all that is known of the pair
        self.view = PairView(self.role, time.monotonic_ns(), boot_ns())
        self.role_changed = False  # the next controller of this host is the other guest's
        self.incoming_wanted = False
        self._successor: asyncio.Task[None] | None = None
        self._starting: asyncio.subprocess.Process | None = None  # the command qemu.incoming
        self.qemu_info: QemuInfo | None = None
        self.first_mac = ""  # of the guest, as QEMU or the configuration has told
        self.failures: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._finished = asyncio.Event()
        self.qmp = self._new_qmp()
        self.oob: Qmp | None = None  # the second socket, if one is configured

    @abstractmethod
    def _decide(self) -> None:
        """Something has changed: decide anew."""

    def on_qmp(self, event: QmpEvent) -> None:
        """STOP, RESUME and the like."""

    def on_news(self, news: News) -> None:
        """QEMU says something of its guest's life (guest_event.py)."""

    async def on_qemu(self) -> None:
        """QMP is (again) connected."""

    def on_qemu_gone(self) -> None:
        """The QEMU that nothing depended on yet is gone; the next one is waited for."""
        why = self.view.guest.why or "the QEMU of this host is gone"
        self.become(State.STARTING, f"{why}: waiting for another one")

    # ---- state

    def become(self, state: State, why: str) -> None:
        """Change the state, and tell the story."""
        if state is self.state and why == self.reason:
            return
        if state is not self.state:
            self._check_transition(state, why)
            self.since = time.time()
        flips = (State.PROTECTED, State.CHECKPOINTING)
        if state is not self.state and not (state in flips and self.state in flips):
            self.history.append({"at": self.since, "state": state.value, "reason": why})
        self.state, self.reason = state, why
        if state is State.STOPPED:
            self.await_successor()
        log.info("%s %s: %s: %s", self.config.pair, self.role.value, state.value, why)

    def _check_transition(self, state: State, why: str) -> None:
        """Raises IllegalTransition in tests; elsewhere it is counted, and carried out."""
        if states.legal(self.role, self.state, state):
            return
        text = f"internal error: state {self.state.value} to {state.value}: {why}"
        log.error("%s", text)
        self.failures.append(text)
        if states.STRICT:
            raise states.IllegalTransition(text)

    def shown_state(self) -> State:
        """The state for people and for the decision: two are views of `protected`."""
        if self.state is not State.PROTECTED:
            return self.state
        return (
            State.PAUSED if self.view.paused else State.SHADOW if self.view.shadow else self.state
        )

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
            self.view.colo_lost()
        elif event.name == "NIC_RX_FILTER_CHANGED":
            self.spawn(self.learn_macs())
        self.on_qmp(event)
        said = news(event, self.qmp.name)
        if said is not None:
            self.on_news(said)

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
                    self.on_qemu_gone()
                    self.qmp = self._new_qmp()
                    await self._connect_qemu()
                else:
                    self.view.guest_gone()
                return
            with contextlib.suppress(QmpError):
                self.qmp = self._new_qmp()
                self.qemu_info = await self.qmp.connect()
                await self._connect_oob()
                await self.learn_macs()
                log.info("QMP is back")
                await self.on_qemu()
                return
            await asyncio.sleep(TICK_S)
        self.view.guest_gone()  # neither QMP nor a word from the kernel: shut the path, then say so

    async def _connect_qemu(self) -> None:
        said = ""
        while True:
            try:
                self.qemu_info = await self.qmp.connect()
                self.view.qemu_found(there=True)
            except QmpError as e:
                self.view.qemu_found(there=await asyncio.to_thread(self.dp.tap_alive))
                if self.state is not State.STARTING and self.view.guest.absent:
                    self.view.guest_gone()  # it died while nobody looked
                    self._decide()
                    return
                if str(e) != said:
                    said = str(e)
                    log.info("%s; waiting for it", e)
                await asyncio.sleep(QMP_RETRY_S)
                continue
            self.view.guest_said("")
            await self._connect_oob()
            await self.learn_macs()
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

    async def learn_macs(self) -> str:
        """Tell the data path which frames are for the guest; returns its first MAC address, as it
        was last told, "" if nobody can say it."""
        macs = [self.config.network.guest_mac]
        if not macs[0]:
            try:
                macs = await self.qmp.guest_macs(self.config.network.tap)
            except (QmpError, NicError) as e:
                log.warning("%s", e)
                return self.first_mac
        self.first_mac = macs[0]
        try:
            self.dp.is_at(*(bytes.fromhex(m.replace(":", "")) for m in macs))
        except OSError as e:  # no room: everything is mirrored then, and the first one is known
            log.warning("not all MAC addresses of the guest are known: %s", e)
        return self.first_mac

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
                    self.view.guest_gone(hung=True)
                    self._decide()
            except QmpError:
                continue

    # ---- the guest after this one

    @abstractmethod
    def superseded(self) -> bool:
        """Whether this host's guest is worthless, since the other one is certain to speak alone."""

    @abstractmethod
    async def succeed(self) -> None:
        """This host's QEMU is a new one that waits for the other guest's state."""

    async def leave_network(self) -> None:
        """This host's guest is worthless: its tap leaves the bridge."""

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
            await self.leave_network()
            if not self.qmp.connected:
                with contextlib.suppress(QmpError):
                    self.qmp = self._new_qmp()
                    self.qemu_info = await self.qmp.connect()
                    await self._connect_oob()
                    await self.learn_macs()
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
        if self._starting is not None and self._starting.returncode is None:
            log.error("[qemu] incoming: the command still runs, process %d", self._starting.pid)
            return
        log.info("starting this host's QEMU anew: %s", " ".join(argv))
        try:
            self._starting = await asyncio.create_subprocess_exec(
                *outside.incoming(self.config.pair, argv), env=outside.environment()
            )
            async with asyncio.timeout(INCOMING_S):
                status = await self._starting.wait()
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
