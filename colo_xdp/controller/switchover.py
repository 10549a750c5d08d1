# SPDX-License-Identifier: GPL-2.0-or-later
"""The planned change of roles, on the primary: a checkpoint that ends with a silent PVM."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from ..abi import Mode
from ..clock import TICK_S
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.host import HostDataPath
from ..failover.arbiter import Arbiter
from ..failover.states import State
from ..peer.channel import Peer
from .checkpoint import Checkpoint, CheckpointRequest
from .pair_view import PairView

log = logging.getLogger("colo_xdp.controller.primary")

STEPS = (
    "hold every frame of both guests",
    "QMP {qmp}: migrate-set-parameters x-checkpoint-delay (a checkpoint)",
    "release what the PVM sent before its STOP",
    "data path: drop (the PVM is silent)",
    "the secondary: x-colo-lost-heartbeat, data path: takeover, announcements",
    "QMP {qmp}: quit",
)


class Yielding(Protocol):
    """The controller whose guest is to fall silent in favour of its copy."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    arbiter: Arbiter
    state: State
    reason: str

    def become(self, state: State, why: str) -> None:
        """Change the state."""


class Queue(Protocol):
    """Where checkpoints are asked for."""

    failures: int

    def order(self, want: CheckpointRequest, *, instead: bool = False) -> None:
        """Ask for a checkpoint now; `instead` of the one that is wanted already."""


class Switchover:
    """Hands the clients over to the SVM by a checkpoint."""

    def __init__(self, controller: Yielding, queue: Queue) -> None:
        self._c, self._queue = controller, queue
        self._refused = ""
        self._until = 0.0  # it begins no later (monotonic, s)

    def plan(self, why: str) -> None:
        """Ask for the checkpoint. Raises ValueError when it cannot begin."""
        c = self._c
        if c.state not in (State.PROTECTED, State.CHECKPOINTING):
            raise ValueError(f"no switchover from state {c.state.value}: {c.reason}")
        if c.view.shadow:
            raise ValueError("no switchover from shadow mode: leave it first")
        a = c.arbiter.view()
        if a.needs_grant and not a.granted:
            what = c.arbiter.trouble or f"another host holds the {a.name}"
            raise ValueError(f"no switchover, the SVM could not get the {a.name}: {what}")
        if c.view.guest.halted:
            raise ValueError(f"no switchover: {c.view.guest.halted}")
        self._refused = ""
        # as long as the command waits, which then reports that it is not done
        ms = c.config.checkpoint.deadline + 2 * c.config.qemu.qmp_timeout
        self._until = time.monotonic() + ms / 1000
        self._queue.order(CheckpointRequest(Cause.SWITCHOVER.value, why), instead=True)

    async def run(self, deadline: float, why: str) -> bool:
        """Plan one and wait for its end, until `deadline` (monotonic, s). Whether it is done.

        Raises ValueError when it cannot begin, or was refused.
        """
        failures = self._queue.failures
        self.plan(why)
        while time.monotonic() < deadline and self._queue.failures == failures:
            if self._refused:
                raise ValueError(f"no switchover: {self._refused}")
            if self._c.state is State.STOPPED and self._c.view.peer.state == State.PROMOTED.value:
                return True
            await asyncio.sleep(TICK_S)
        return False

    def in_time(self) -> bool:
        """Whether it may still begin; refused otherwise."""
        if time.monotonic() > self._until:
            self.refuse("it could not begin in time")
        return not self._refused

    def refuse(self, why: str) -> None:
        """Tell whoever waits for it that it does not take place."""
        self._refused = why
        log.error("no switchover: %s", why)

    def fall_silent(self, ck: Checkpoint, why: str, *, released: bool) -> None:
        """End it here, whoever dies next.

        Nothing that is newer than the state which the SVM has loaded has left or will leave: the
        guests are equal, and this one is silent from now on.
        """
        c = self._c
        c.dp.mode = Mode.DROP
        c.become(State.STOPPED, f"handed over to the secondary: {why}")
        now = time.monotonic_ns()
        last = now if released else ck.stop_ns  # what was held left with the commit
        c.peer.send("downtime_start", us=max(0, now - last) // 1000)
        c.peer.send("shut", why=f"switchover, {why}", standalone=c.view.guest.standalone)
