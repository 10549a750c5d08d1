# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the data path of a controller that lives is there and brings anything.

Three questions, asked as long as the controller lives:

- Are the devices and our programs there (datapath/hooks.py)? Looked at when netlink says that
  something has changed, and each LOOK_S.
- Does the peer link bring anything? Heartbeats go over it too: while the control channel lives and
  they do not arrive, nor a frame of the data path, the link is out.
- Does the secondary's guest say anything? Checkpoints in a row for output that found no twin,
  without one frame of it, mean that its output does not arrive, whatever the devices look like.

The answer is a sentence (`trouble`), by which `protected` becomes `degraded` for everybody who
asks. It is no state of the decision: both guests live, both controllers say so, and nobody may
speak alone for it. What waits meanwhile leaves by checkpoints (`cut`), one after the other, and not
by compare_timeout each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING

from ..compare.causes import Cause
from ..datapath import attach
from ..datapath.hooks import Look
from ..failover.decision import Role
from ..failover.lease import boot_ns
from ..peer.heartbeat_links import LINK

if TYPE_CHECKING:
    from .controller import Controller

log = logging.getLogger("colo_xdp")

LOOK_S = 5.0  # netlink tells of changes; this is for what it may not have told
REST_S = 0.05  # between two looks: changes come in bursts
SILENT_CHECKPOINTS = 3
PACE_S = 0.02  # between two checkpoints while nothing arrives, at least


class DeviceWatch:
    """What one controller knows of its data path."""

    def __init__(self, controller: Controller) -> None:
        self._c = controller
        self.look = Look()
        self.restored = 0  # programs and devices put back
        self.link = ""  # what is wrong with what the peer link brings
        self.silent_checkpoints = 0
        self._trouble = ""
        self._arrived = self._first = -1
        self._arrived_ns = 0  # when a frame of the data path last came (boot_ns)
        self._up_ns = 0  # since when the control channel is there (boot_ns)
        self._changed = asyncio.Event()

    # ---- answers

    @property
    def trouble(self) -> str:
        """Why the data path is not whole; empty: it is."""
        text = list(self.look.trouble)
        if not self.look.cut:
            text += [self.link] if self.link else []
            if not self.link and self.svm_silent:
                text.append(
                    "the secondary's output does not arrive over "
                    f"{self._c.config.network.peer_link}: {SILENT_CHECKPOINTS} checkpoints in a "
                    "row or more for output that waited, and not one frame of its guest"
                )
        return "; ".join(text)

    @property
    def cut(self) -> bool:
        """Nothing of the other guest arrives: waiting for it is of no use."""
        return self.look.cut or bool(self.link) or self.svm_silent

    @property
    def svm_silent(self) -> bool:
        """Its output is missed, checkpoint after checkpoint."""
        return self.silent_checkpoints >= SILENT_CHECKPOINTS

    # ---- hooks

    async def run(self) -> None:
        """Look, for ever."""
        loop = asyncio.get_running_loop()
        sock = self._c.dp.changes()
        if sock is not None:
            loop.add_reader(sock.fileno(), self._changes, sock)
        try:
            while True:
                self._changed.clear()
                began = time.monotonic()
                self._found(await asyncio.to_thread(self._c.dp.look))
                # The first change is looked at at once, a host that is never at rest costs little.
                await asyncio.sleep(max(REST_S, 10 * (time.monotonic() - began)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._changed.wait()
        finally:
            if sock is not None:
                loop.remove_reader(sock.fileno())
                sock.close()

    def _changes(self, sock: socket.socket) -> None:
        attach.drain(sock)
        self._changed.set()

    def _found(self, look: Look) -> None:
        was, self.look = self.look, look
        for what in look.restored:
            log.warning("put back: %s", what)
        self.restored += len(look.restored)
        if look.unseen or look.exposed or look.missed or was.exposed:
            what = ", ".join(look.restored) or "; ".join(look.trouble) or "; ".join(was.trouble)
            self._c.hooks_lost(
                what, unseen=look.unseen or look.exposed or was.exposed, still=look.exposed
            )
        self.report()

    # ---- the peer link

    def connected(self) -> None:
        """The control channel is there: beacons have a key from now on."""
        self._up_ns = boot_ns()

    def listen(self) -> None:
        """With each heartbeat: is the link silent?"""
        self.link = self._link()
        if self.silent_checkpoints:
            self._count(boot_ns())
        self.report()

    def _link(self) -> str:
        c, core = self._c, self._c.paths.core
        names = [p.name for p in core.paths]
        if not c.peer.connected or not c.peer.heartbeat_key or LINK not in names:
            return ""
        i, now, limit = names.index(LINK), boot_ns(), c.config.peer.heartbeat_timeout
        silent, up_ms = core.silent_ms(i, now), (now - self._up_ns) / 1e6
        quiet = self._quiet_ms(now) if silent > limit / 2 else 0.0
        if up_ms <= limit:
            return ""
        if silent == float("inf") and self._arrived != self._first:
            return ""  # heartbeats do not get through, frames do: a path less, and nothing more
        link = c.config.network.peer_link
        if silent > limit and quiet > limit / 2:
            return (
                f"nothing arrives over {link}: no heartbeat and no frame of the other host for "
                f"{limit} ms, while its controller answers"
            )
        echo_age = core.echo_age_ms(i, now)
        if silent <= limit < echo_age < float("inf"):
            return f"the other host hears nothing over {link}, while its controller answers"
        return ""

    def _quiet_ms(self, now: int) -> float:
        """Since a frame of the data path came, or since it is looked for."""
        self._count(now)
        return (now - self._arrived_ns) / 1e6

    def _count(self, now: int) -> bool:
        """Whether frames of the data path have come since the last time: then it is not silent."""
        n = self._c.dp.arrived()
        if self._first < 0:
            self._first = self._arrived = n
            self._arrived_ns = now
        if n == self._arrived:
            return False
        self._arrived, self._arrived_ns, self.silent_checkpoints = n, now, 0
        return True

    # ---- the secondary's guest

    def checkpointed(self, cause: str) -> None:
        """A checkpoint is complete."""
        if not self._count(boot_ns()) and cause in (Cause.COMPARE_TIMEOUT, Cause.PEER_LINK):
            self.silent_checkpoints += 1
        elif cause == Cause.INITIAL:  # another guest
            self.silent_checkpoints = 0
        self.report()

    # ---- the story

    def report(self) -> None:
        """To the log and the history, when the sentence is another one."""
        trouble = self.trouble
        if trouble == self._trouble:
            return
        self._trouble = trouble
        c = self._c
        what = trouble or "the data path is whole again"
        (log.warning if trouble else log.info)("%s", what)
        c.history.append({"at": time.time(), "state": c.shown_state().value, "reason": what})
        if c.role is Role.PRIMARY and not trouble:
            c.data_path_back()
