# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that is about to leave the pair in order: the other one serves the clients before.

Which half of the pair is here decides how. The primary's guest is moved by a switchover; the
secondary's copy is demoted, so that the primary goes on alone at once and does not learn of it by a
checkpoint that never ends. No new copy is started here afterwards: the host goes away.
deploy/systemd/colo-xdp-handover@.service asks for it when the host shuts down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ..clock import TICK_S
from ..config.file import Config
from ..failover.states import Role, State
from ..peer.channel import Peer
from .pair_view import PairView
from .replacement import Replacement

log = logging.getLogger("colo_xdp")

#: for a pair that is about to be protected: a checkpoint after a restart of a controller
PROTECT_S = 10.0
#: for the other controller, which may be restarting, or cut off: to connect, to say that it serves
#: alone, or to hear of it by heartbeat datagrams
ANSWER_S = 3.0
WHOLE = (State.PROTECTED, State.CHECKPOINTING)
WITHOUT_COPY = (State.SOLO.value, State.STARTING.value, State.STOPPED.value)

Demote = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Leaving(Protocol):
    """The controller whose host is about to go."""

    config: Config
    role: Role
    view: PairView
    peer: Peer
    state: State
    reason: str
    replacement: Replacement

    def switchover_steps(self) -> list[str]:
        """Return what a switchover would do now, step by step."""
        ...

    async def switch_over(self, deadline: float, why: str) -> bool:
        """Make the SVM the live guest by a checkpoint; whether it is, by `deadline` (monotonic, s).

        Raises ValueError when it cannot begin.
        """
        ...


class Handover:
    """Carries out the command `handover` on one controller."""

    def __init__(self, controller: Leaving, demote: Demote) -> None:
        self._c, self._demote = controller, demote

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """Leave the clients to the other host. `shutdown`: this host shuts down.

        Raises ValueError where nobody can take over.
        """
        c = self._c
        steps = self._steps()
        if args.get("dry_run"):
            return {"steps": steps, "done": False, "state": c.state.value}
        why = f"the {c.role.value}'s host shuts down" if args.get("shutdown") else ""
        # before this guest is over, which is when another one is looked for
        c.replacement.off = True
        try:
            done, reason = await self._hand_over(why or "asked by the operator")
        except ValueError as e:
            log.error("no handover: %s", e)
            raise
        finally:
            c.replacement.off = c.state is State.STOPPED
        if not done:
            log.error("no handover: not in time: %s: %s", c.state.value, reason)
        return {"steps": steps, "done": done, "state": c.state.value, "reason": reason}

    def _steps(self) -> list[str]:
        if self._c.role is Role.PRIMARY:
            return self._c.switchover_steps()
        return [
            "data path: drop (the SVM is no copy any more)",
            "the primary: release what is held, x-colo-lost-heartbeat, data path: bypass",
        ]

    async def _hand_over(self, why: str) -> tuple[bool, str]:
        """Return whether it is done, and the reason of the state that this has led to."""
        c = self._c
        if c.state is State.STOPPED:
            return True, c.reason
        if c.role is Role.PRIMARY:
            await self._until_whole()
            ms = c.config.checkpoint.deadline + 2 * c.config.qemu.qmp_timeout
            return await c.switch_over(time.monotonic() + ms / 1000, why), c.reason
        if c.state is State.PROMOTED:
            raise ValueError(f"the guest here serves alone, and has no copy: {c.reason}")
        reason = (await self._demote({"why": why}))["reason"]
        end = time.monotonic() + ANSWER_S
        while not (c.peer.connected and c.view.peer.state in WITHOUT_COPY):
            if time.monotonic() > end:
                said = c.view.peer.state if c.peer.connected else "not connected"
                return False, f"{reason}; the primary is {said}, and may not know it"
            await asyncio.sleep(TICK_S)
        return True, str(reason)

    async def _until_whole(self) -> None:
        """Wait for a pair that is about to be protected (again): a controller was restarted."""
        c, began = self._c, time.monotonic()
        while c.state in (State.STARTING, State.DEGRADED):
            if time.monotonic() - began > (PROTECT_S if c.peer.connected else ANSWER_S):
                return
            await asyncio.sleep(TICK_S)
