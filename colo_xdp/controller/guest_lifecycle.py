# SPDX-License-Identifier: GPL-2.0-or-later
"""What a controller makes of its guest's own end, its resets, and of a QEMU that stands still.

A PVM that shuts itself down ends the pair: the SVM is about to do the same, and would otherwise
take over for a guest that wants to be off. An SVM that does so alone is lost like one whose QEMU
died. Whatever else makes a guest another one than its copy is undone, or carried to the copy, by a
checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import abstractmethod
from typing import Any

from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..failover.decision import State
from ..qemu.disks import refusal
from ..qemu.event import QmpEvent
from ..qemu.guest_event import STANDS_STILL, Fate, News
from ..qemu.qmp import QmpError
from .controller import Controller

log = logging.getLogger("colo_xdp")

OFF_S = 0.3  # how long a guest that is off may wait for the word that its copy is silent
GRACE_S = 5.0  # until a copy of a guest that is off is ended, if it does not end itself


class GuestLifecycle(Controller):
    """A host that looks at what its guest does to itself."""

    # ---- of the two sides

    @abstractmethod
    def on_changed(self, why: str) -> None:
        """This guest is another one than its copy."""

    def release_last(self) -> int:
        """The guest is off, and nobody goes on: frames that were held leave; how many."""
        return 0

    def forget_copy(self) -> None:
        """One of the guests has ended itself: neither counts as the other's copy any more."""

    # ---- events

    def on_news(self, news: News) -> None:
        log.warning("%s", news.why)
        if self.state is State.STOPPED:
            return
        if news.fate is Fate.ENDED:
            self.view.guest_event(news.why)
        elif news.fate is Fate.HALTED:
            self.on_halt(news.why)
        elif news.fate is Fate.CHANGED:
            self.on_changed(news.why)
        else:
            self.view.guest_event(news.why)
            if self.state is State.STARTING:
                self.become(State.STARTING, f"{news.why}: nothing was protected yet")
            elif self.alone or (news.fate is Fate.OFF and self.ends_the_pair):
                self._end(news.why)
            else:
                self.view.guest_gone()
                self._decide()

    @property
    def alone(self) -> bool:
        """There is no other guest that could go on."""
        return self.state in (State.SOLO, State.PROMOTED)

    @property
    @abstractmethod
    def ends_the_pair(self) -> bool:
        """This guest is the one that clients know: with it the service ends."""

    def on_halt(self, why: str) -> None:
        """It is going to stand still, with its memory whole."""
        self.view.guest_halted(f"{why}: repair that, then `cont` in QEMU")
        if self.state is not State.STARTING:
            self.become(self.state, self.view.guest.halted)

    def on_resumed(self) -> None:
        """RESUME of the guest."""
        if self.view.guest.halted:
            self.view.guest_halted("")
            if self.state is not State.STARTING:
                self.become(self.state, "the guest runs again")

    def on_event_alone(self, event: QmpEvent) -> None:
        """STOP or RESUME of a guest without a copy: it stays as somebody wants it, and is said."""
        if event.name == "STOP":
            self.spawn(self._send_stopped())
        elif event.name == "RESUME":
            self.on_resumed()

    async def _send_stopped(self) -> None:
        status, fate = await self.stands_still()
        if status and self.alone and not self.view.guest.halted:
            if fate is None:
                self.view.guest_halted(
                    f"QEMU has stopped the guest (`{status}`): `cont` lets it run"
                )
                self.become(self.state, self.view.guest.halted)
            else:
                self.on_news(News(fate, f"the guest stands still (`{status}`)"))

    async def stands_still(self) -> tuple[str, Fate | None]:
        """Why QEMU has stopped the guest with no checkpoint of ours: its run state, and what that
        means if it was not a person. Empty when it runs again, or says nothing."""
        with contextlib.suppress(QmpError):
            status = await self.qemu.qmp.status()
            if status not in ("running", "colo", "finish-migrate", "inmigrate"):
                return status, STANDS_STILL.get(status)
        return "", None

    async def unfit(self) -> str:
        """What keeps this guest from being one of a pair, or an empty string."""
        try:
            blocks = await self.qemu.qmp.execute("query-block")
        except QmpError as e:
            return str(e)
        why = refusal(blocks, self.config.external_disks)
        return f"COLO is not entered: {why}" if why else ""

    # ---- the end

    def _end(self, why: str) -> None:
        if self.view.guest.over:
            return
        self.view.guest_over(why)
        before = self._busy
        self._busy = self.spawn(self._shut_down(why, before))

    async def _shut_down(self, why: str, before: asyncio.Task[Any] | None) -> None:
        """The service has ended by its own will: shut the path, and tell the other host, so that
        nobody takes over. What the guest said last leaves when the other guest is silent for
        certain: nobody contradicts it any more."""
        if before is not None and not before.done():
            await asyncio.wait({before}, timeout=GRACE_S)
        if self.state is State.STOPPED and self.dp.mode is Mode.DROP:
            return
        held = ""
        if self.dp.mode in (Mode.RUN, Mode.CHECKPOINT) and not self.silent():
            self.view.peer_open()
            self.dp.mode = Mode.CHECKPOINT
            self.peer.send("guest_off", why=why)
            end = time.monotonic() + OFF_S
            while time.monotonic() < end and self.peer.connected and not self.view.peer.shut:
                await asyncio.sleep(TICK_S / 5)
            if self.view.peer.shut:
                held = f"; {self.release_last()} held frames released"
        else:
            self.peer.send("guest_off", why=why)
        if self.state is State.STOPPED and self.dp.mode is Mode.DROP:
            return
        self.forget_copy()  # an entry under way would let out what is left of the guest at its end
        self.dp.mode, self.dp.sync_state = Mode.DROP, SyncState.NONE
        self.become(State.STOPPED, f"{why}: the pair is over{held}")
        self._beat()

    def pair_over(self, why: str) -> None:
        """The other guest has ended itself."""
        if self.view.guest.over:  # it has heard the same of this one, and is silent
            self.view.peer_shut()
            return
        if self.state in (State.STOPPED, State.PROMOTED, State.STARTING, State.SOLO):
            return
        self.view.guest_over(why)
        self.dp.mode, self.dp.sync_state = Mode.DROP, SyncState.NONE
        self.forget_copy()
        self.become(State.STOPPED, f"{why}: the pair is over")
        self.peer.send("shut", why="the copy of a guest that is off is silent", alone=False)
        self.spawn(self._end_copy())

    async def _end_copy(self) -> None:
        """It hears the same and ends itself; if not, its QEMU is of no use to anybody."""
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            await asyncio.sleep(TICK_S * 10)
            if not self.qemu.qmp.connected or self.state is not State.STOPPED:
                return
        with contextlib.suppress(QmpError):
            if await self.qemu.qmp.status() != "inmigrate":
                log.info("this guest did not end itself with the other one: quit")
                await self.qemu.qmp.quit()
