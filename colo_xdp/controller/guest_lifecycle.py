# SPDX-License-Identifier: GPL-2.0-or-later
"""What a controller does about its guest's own end, its resets, and a QEMU that stands still.

A PVM that shuts itself down ends the pair: the SVM is about to do the same and would otherwise
take over for a guest that wants to be off. An SVM that shuts down alone is lost like one whose
QEMU died. A checkpoint undoes or copies whatever else makes a guest differ from its copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..config.file import Config
from ..datapath.host import HostDataPath
from ..failover.states import Role, State
from ..peer.channel import Peer
from ..qemu import nic
from ..qemu.disks import refusal
from ..qemu.events import STANDS_STILL, Fate, News, QmpEvent
from ..qemu.qmp import QmpError
from ..qemu.supervisor import QemuSupervisor
from .pair_view import PairView

log = logging.getLogger("colo_xdp")

ENDED = "the other guest has ended itself"  # as heartbeats say it, without a reason
OFF_S = 0.3  # how long a guest that is off may wait until its copy confirms that it is silent
GRACE_S = 5.0  # until a copy of a guest that is off is ended, if it does not end itself

Action = Callable[[asyncio.Task[Any] | None], Coroutine[Any, Any, None]]


class GuestOwner(Protocol):
    """A controller, as far as its guest's life concerns it; the two roles differ in the rest."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    state: State
    role: Role

    @property
    def ends_the_pair(self) -> bool:
        """Whether this guest is the one that clients know: the service ends with it."""
        ...

    def guest_changed(self, why: str) -> None:
        """Note that this guest no longer equals its copy."""

    def guest_halts(self, why: str) -> None:
        """Note that the guest is about to stand still, with its memory intact."""

    def release_last(self) -> int:
        """Release what is held of a guest that is off and has no successor; how many frames."""
        ...

    def forget_copy(self) -> None:
        """Stop counting either guest as the other's copy: one of them has ended itself."""

    def become(self, state: State, why: str) -> None:
        """Change the state."""

    def reconsider(self) -> None:
        """Decide anew."""

    def silent(self) -> bool:
        """Whether the data path keeps everything of this host's guest from the network."""
        ...

    def beat(self) -> None:
        """Send a heartbeat now."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...

    def act_last(self, action: Action) -> None:
        """Run an action after the one in progress, in place of all further decisions."""


class GuestLifecycle:
    """Follows what a guest does to itself."""

    def __init__(self, owner: GuestOwner) -> None:
        self._c = owner

    # ---- events

    def on_news(self, news: News) -> None:
        """React to what QEMU reports of its guest's life (qemu/events.py)."""
        c = self._c
        log.warning("%s", news.why)
        if c.state is State.STOPPED:
            return
        if news.fate is Fate.ENDED:
            c.view.guest_event(news.why)
        elif news.fate is Fate.HALTED:
            c.guest_halts(news.why)
        elif news.fate is Fate.CHANGED:
            c.guest_changed(news.why)
        else:
            c.view.guest_event(news.why)
            if c.state is State.STARTING:
                c.become(State.STARTING, f"{news.why}: nothing was protected yet")
            elif self.alone or (news.fate is Fate.OFF and c.ends_the_pair):
                self._end(news.why)
            else:
                c.view.guest_gone()
                c.reconsider()

    @property
    def alone(self) -> bool:
        """Whether there is no other guest that could go on."""
        return self._c.state in (State.SOLO, State.PROMOTED)

    def halted(self, why: str) -> None:
        """Show that the guest stands still and what ends that."""
        c = self._c
        c.view.guest_halted(f"{why}: repair that, then `cont` in QEMU")
        if c.state is not State.STARTING:
            c.become(c.state, c.view.guest.halted)

    def resumed(self) -> bool:
        """Note the guest's RESUME. Returns whether it had stood still of its own."""
        c = self._c
        if not c.view.guest.halted:
            return False
        c.view.guest_halted("")
        if c.state is not State.STARTING:
            c.become(c.state, "the guest runs again")
        return True

    def on_event_alone(self, event: QmpEvent) -> None:
        """React to a STOP or RESUME of a guest without a copy, which no checkpoint stops."""
        if event.name == "STOP":
            self._c.spawn(self._on_stop_alone())
        elif event.name == "RESUME":
            self.resumed()

    async def _on_stop_alone(self) -> None:
        c = self._c
        status, fate = await self.stands_still()
        if status and self.alone and not c.view.guest.halted:
            if fate is None:
                c.view.guest_halted(f"QEMU has stopped the guest (`{status}`): `cont` lets it run")
                c.become(c.state, c.view.guest.halted)
            else:
                self.on_news(News(fate, f"the guest stands still (`{status}`)"))

    async def stands_still(self) -> tuple[str, Fate | None]:
        """Ask why QEMU has stopped the guest outside a checkpoint.

        Returns its run state, and what that means unless a person did it; an empty string when
        the guest runs again or QEMU does not answer.
        """
        with contextlib.suppress(QmpError):
            status = await self._c.qemu.qmp.status()
            if status not in ("running", "colo", "finish-migrate", "inmigrate"):
                return status, STANDS_STILL.get(status)
        return "", None

    async def unfit(self) -> str:
        """Return what keeps this guest from being one of a pair, or an empty string."""
        try:
            why = await self.uncovered()
            primary = self._c.role is Role.PRIMARY
            why = why or await self._c.qemu.migration_trouble(primary=primary)
        except QmpError as e:
            return str(e)
        return f"COLO is not entered: {why}" if why else ""

    async def uncovered(self) -> str:
        """Return which writable disks nobody keeps equal, or which network cards nobody compares.

        An empty string: none. Raises QmpError.
        """
        blocks = await self._c.qemu.qmp.execute("query-block")
        why = refusal(blocks, [d.name for d in self._c.config.disks])
        return why or nic.refusal(await self._c.qemu.qmp.cards(), self._c.qemu.options.taps)

    # ---- the end

    def _end(self, why: str) -> None:
        if self._c.view.guest.over:
            return
        self._c.view.guest_over(why)
        self._c.act_last(lambda before: self._shut_down(why, before))

    async def _shut_down(self, why: str, before: asyncio.Task[Any] | None) -> None:
        """Shut the path and report it to the other host, so that nobody takes over.

        The service has ended by its own will. The guest's last frames leave once the other guest
        is certain to be silent: then nobody contradicts them any more.
        """
        c = self._c
        if before is not None and not before.done():
            await asyncio.wait({before}, timeout=GRACE_S)
        if c.state is State.STOPPED and c.dp.mode is Mode.DROP:
            return
        held = ""
        if c.dp.mode in (Mode.RUN, Mode.CHECKPOINT) and not c.silent():
            c.view.peer_open()
            c.dp.mode = Mode.CHECKPOINT
            c.peer.send("guest_off", why=why)
            end = time.monotonic() + OFF_S
            while time.monotonic() < end and c.peer.connected and not c.view.peer.shut:
                await asyncio.sleep(TICK_S / 5)
            if c.view.peer.shut:
                held = f"; {c.release_last()} held frames released"
        else:
            c.peer.send("guest_off", why=why)
        if c.state is State.STOPPED and c.dp.mode is Mode.DROP:
            return
        c.forget_copy()  # an entry in progress would release the rest of the guest at its end
        c.dp.mode, c.dp.sync_state = Mode.DROP, SyncState.NONE
        c.become(State.STOPPED, f"{why}: the pair is over{held}")
        c.beat()

    def pair_over(self, why: str) -> None:
        """End the pair: the other guest has ended itself, and this one must not take over."""
        c = self._c
        if c.view.guest.over:  # the other host was told the same of this one, and is silent
            c.view.peer_shut()
            if c.view.guest.over == ENDED != why and c.state is State.STOPPED:
                c.view.guest_over(why)  # a heartbeat overtook the message with the reason
                c.become(State.STOPPED, f"{why}: the pair is over")
            return
        if c.state in (State.STOPPED, State.PROMOTED, State.STARTING, State.SOLO):
            return
        c.view.guest_over(why)
        c.dp.mode, c.dp.sync_state = Mode.DROP, SyncState.NONE
        c.forget_copy()
        c.become(State.STOPPED, f"{why}: the pair is over")
        c.peer.send("shut", why="the copy of a guest that is off is silent", standalone=False)
        c.spawn(self._end_copy())

    async def _end_copy(self) -> None:
        """Quit the copy's QEMU unless the copy ends itself, as it was told to like its original."""
        c = self._c
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            await asyncio.sleep(TICK_S * 10)
            if not c.qemu.qmp.connected or c.state is not State.STOPPED:
                return
        with contextlib.suppress(QmpError):
            if await c.qemu.qmp.status() != "inmigrate":
                log.info("this guest did not end itself with the other one: quit")
                await c.qemu.quit()
