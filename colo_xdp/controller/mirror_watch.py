# SPDX-License-Identifier: GPL-2.0-or-later
"""Notice on the primary that the secondary's disks have fallen silent, whatever else answers there.

A write that is mirrored ends when it is on both images. If the connection, the other QEMU or the
storage below it falls silent nobody is told, and the guest's writes wait for ever. QEMU tells how
many bytes are on their way, so a look now and then shows that none of them arrives. Then their
connection is cut, which ends the mirror with an error, and the rest is what follows a lost mirror.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from ..config.file import Config
from ..failover.states import State
from ..peer.channel import Peer
from ..qemu.qmp import QmpError
from ..qemu.supervisor import QemuSupervisor

log = logging.getLogger("colo_xdp.controller.primary")

#: A look is a QMP command, which QEMU answers in its main loop: rare, and still several within the
#: time after which a silent secondary is given up
LOOK_S = 0.25
LOOKS = 8


class Mirroring(Protocol):
    """The controller of the guest whose disks are mirrored."""

    config: Config
    peer: Peer
    qemu: QemuSupervisor
    state: State


class MirrorWatch:
    """Gives a silent secondary up, so that the guest's writes go on."""

    def __init__(self, controller: Mirroring) -> None:
        self._c = controller
        self._quiet_since: float | None = None  # the control channel; None: the peer is heard
        self._until = 0.0  # nothing is given up before that, after a silence
        self._stopping: float | None = None  # since when QEMU has not answered in a checkpoint

    async def run(self) -> None:
        """Look until cancelled."""
        c = self._c
        while c.qemu.disks.any:
            await asyncio.sleep(min(LOOK_S, c.config.nbd.write_timeout / 1000 / LOOKS))
            await self.look()

    async def look(self) -> None:
        """Look once."""
        c = self._c
        mirrors = c.qemu.disks.mirrors
        if not mirrors.mirroring or mirrors.lost or not c.qemu.qmp.connected:
            return
        if not self._heard():
            return
        began = time.monotonic()
        try:
            await mirrors.look()
            self._stopping = None
        except QmpError:  # if it hangs, what was seen before counts
            self._stopping = self._stopping or began
        why = mirrors.silent() or self._never_stops()
        if time.monotonic() < self._until or not why:
            return
        try:
            await mirrors.give_up(why)
        except QmpError as e:
            log.warning("%s; this QEMU may hang by itself: %s", why, e)

    def _never_stops(self) -> str:
        """Return that QEMU waits for writes while it stops the guest for a checkpoint, if so.

        It answers nothing then (bdrv_drain_all() in vm_stop()), so a write that fell silent in the
        last moment before has not been seen.
        """
        if self._c.state is not State.CHECKPOINTING or self._stopping is None:
            self._stopping = None
            return ""
        waited_s = time.monotonic() - self._stopping
        if waited_s < self._c.config.nbd.write_timeout / 1000:
            return ""
        return (
            f"QEMU has not answered for {waited_s:.1f} s in a checkpoint: it waits for a write "
            "that does not end on the secondary's disks"
        )

    def _heard(self) -> bool:
        """Return whether the other host is heard; if nothing of it is, others decide about it.

        A cut link is no loss of the disks, and a lost mirror would be taken for a second sign of
        death beside the silence. After it TCP may need as long again to send what was lost.
        """
        c, now = self._c, time.monotonic()
        limit_ms = min(c.config.peer.heartbeat_timeout, c.config.nbd.write_timeout) / 2
        if not c.peer.connected or c.peer.silent_ms() > limit_ms:
            if self._quiet_since is None:
                self._quiet_since = now - limit_ms / 1000
            return False
        if self._quiet_since is not None:
            self._until = now + (now - self._quiet_since)
            self._quiet_since = None
        return True
