# SPDX-License-Identifier: GPL-2.0-or-later
"""One host of a pair, whatever its peer says: its state, its tasks, the guest after this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine
from typing import Any

from ..config.file import Config
from ..datapath.datapath import DataPath
from ..failover import states
from ..failover.decision import Role, State
from ..failover.lease import boot_ns
from ..qemu.event import QmpEvent
from ..qemu.guest_event import News, news
from ..qemu.qmp import QmpError
from ..qemu.supervisor import INCOMING_S, QMP_RETRY_S, QemuOptions, QemuSupervisor, Stakes
from .pair_view import PairView

log = logging.getLogger("colo_xdp")


class Host(ABC):
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
        self.failures: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._finished = asyncio.Event()
        q, net = config.qemu, config.network
        self.qemu = QemuSupervisor(
            QemuOptions(
                pair=config.pair,
                name="PVM" if self.role is Role.PRIMARY else "SVM",
                qmp=q.qmp,
                qmp_oob=q.qmp_oob,
                timeout_s=q.qmp_timeout / 1000,
                tap=net.tap,
                guest_mac=net.guest_mac,
                incoming=q.incoming,
            ),
            self,
            tap_alive=datapath.tap_alive,
            is_at=datapath.is_at,
        )

    @abstractmethod
    def _decide(self) -> None:
        """Something has changed: decide anew."""

    def reconsider(self) -> None:
        """Decide anew, as after each event."""
        self._decide()

    def on_qmp(self, event: QmpEvent) -> None:
        """STOP, RESUME and the like."""

    def on_news(self, news: News) -> None:
        """QEMU says something of its guest's life (qemu/guest_event.py)."""

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

    # ---- QEMU (qemu/supervisor.py)

    @property
    def stakes(self) -> Stakes:
        """What depends on this host's QEMU now."""
        if self.state is State.STARTING:
            return Stakes.NOTHING_YET
        if self.state is State.STOPPED:
            return Stakes.OVER  # await_successor() looks for the next one
        return Stakes.WATCHED if self.state is State.PROTECTED else Stakes.GUEST

    def on_qmp_event(self, event: QmpEvent) -> None:
        """QEMU says something."""
        if event.name == "COLO_EXIT":
            self.view.colo_lost()
        self.on_qmp(event)
        said = news(event, self.qemu.qmp.name)
        if said is not None:
            self.on_news(said)

    def on_qemu_found(self, *, there: bool) -> None:
        """Somebody has looked for one."""
        self.view.qemu_found(there=there)
        if there:
            self.view.guest_event("")

    def on_qemu_refused(self, why: str) -> None:
        """It is none that this release can work with."""
        self.become(State.STOPPED, why)

    def on_guest_gone(self, *, hung: bool = False) -> None:
        """Its QEMU is dead, or `hung` for good."""
        self.view.guest_gone(hung=hung)

    @property
    def needs_copy(self) -> bool:
        """Whether the other guest serves the clients and this host lacks a QEMU for its copy."""
        return False

    # ---- the guest after this one

    @abstractmethod
    def superseded(self) -> bool:
        """Whether this host's guest is worthless, since the other one is certain to speak alone."""

    @abstractmethod
    async def on_replacement_qemu(self) -> None:
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
            if not self.qemu.qmp.connected:
                with contextlib.suppress(QmpError):
                    await self.qemu.reconnect()
            status = ""
            with contextlib.suppress(QmpError):
                status = await self.qemu.qmp.status()
            if status == "inmigrate":
                await self.on_replacement_qemu()
                continue
            with contextlib.suppress(QmpError):
                if status:
                    await self.qemu.qmp.quit()
            wanted, self.incoming_wanted = self.incoming_wanted, False
            now = time.monotonic()
            if self.config.qemu.incoming and (wanted or now - started > INCOMING_S):
                started = now
                await self.qemu.start_incoming()

    def change_role(self, why: str) -> None:
        """End this controller; the next one on this host is that of the other guest."""
        log.info("%s: %s: the roles change", self.config.pair, why)
        self.dp.change_role()
        self.role_changed = True
        self._finished.set()
