# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of the secondary's host: whether they are of the checkpoint that the SVM runs, and
whether its overlays have room.

A checkpoint is reported to the primary once both the SVM's RESUME and the primary's `disks_whole`
are there (controller/disk_proof.py). An overlay is emptied by a checkpoint, so this asks for
one before it is too large.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from ..compare.causes import Cause
from ..datapath.host import HostDataPath
from ..failover.states import State
from ..peer.channel import Peer
from ..qemu.events import QmpEvent
from ..qemu.qmp import QmpError
from ..qemu.supervisor import QemuSupervisor
from .disk_proof import DiskProof
from .pair_view import PairView
from .takeover import Takeover

log = logging.getLogger("colo_xdp.controller.secondary")

OVERLAY_S = 1.0  # between two looks at the size of the overlays
SHORT_S = 0.2  # while there is less room than they may take


class Copied(Protocol):
    """The controller of the SVM, as far as its disks concern it."""

    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    takeover: Takeover
    state: State

    def reconsider(self) -> None:
        """Decide anew."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...


class SecondaryDisks:
    """What the secondary knows of its disks."""

    def __init__(self, controller: Copied) -> None:
        self._c = controller
        self.proof = DiskProof()
        self.overlays: dict[str, int] = {}  # size of the larger one of each disk, bytes
        self.room_trouble = ""  # why there may be too little room for them
        self.proof_ms = 0.0  # how long the last checkpoint waited for `disks_whole`
        self._loaded_ns = 0  # RESUME of the state that the SVM runs
        self._unsaid: tuple[int, int] | None = None  # `resumed` that waits for `disks_whole`: n, us

    # ---- what the primary confirms

    def adopt(self) -> None:
        """Start from what a former controller has left in the data path."""
        self.proof = DiskProof(self._c.dp.epoch, self._c.dp.disks_whole)

    def new_guest(self) -> None:
        """Forget what was said of the former guest."""
        self.proof = DiskProof()

    def begin(self, n: int) -> None:
        """Note that a checkpoint to epoch n begins."""
        self.proof.begin(n)
        if self._c.dp.disks_whole >= n:
            self._c.dp.disks_whole = n - 1

    def loaded(self, n: int, resume_ns: int, pause_ms: float) -> None:
        """Note that the SVM runs the state of checkpoint n; report() follows."""
        self._loaded_ns = resume_ns
        self._unsaid = n, int(pause_ms * 1000)
        self.proof.loaded(n)

    def report(self) -> None:
        """Report the checkpoint that was loaded, unless its disks are not vouched for yet."""
        if self._unsaid is None:
            return
        if self.proof.said(self._unsaid[0]) or not self._c.qemu.disks.any:
            self.proof_ms = 0.0
            self._say_resumed()

    def on_whole(self, n: int) -> None:
        """Take the primary's confirmation that the disks here are those of checkpoint n."""
        self.are_whole(n)
        if self._unsaid is not None and self._unsaid[0] == n:
            self.proof_ms = max(0.0, (time.monotonic_ns() - self._loaded_ns) / 1e6)
            self._say_resumed()

    def committed(self, n: int) -> None:
        """Note that the primary has committed checkpoint n: the SVM runs it, with whole disks.

        The controller that has told the primary so may have been another one.
        """
        self.proof.loaded(n)
        self.are_whole(n)

    def are_whole(self, n: int) -> None:
        """Note that the disks here are those of checkpoint n."""
        self.proof.whole(n)
        if self._c.qemu.disks.any and n > self._c.dp.disks_whole:
            self._c.dp.disks_whole = n

    def _say_resumed(self) -> None:
        if self._unsaid is not None:
            (n, pause_us), self._unsaid = self._unsaid, None
            self._c.peer.send("resumed", n=n, pause_us=pause_us)

    @property
    def unproven(self) -> bool:
        """Whether the disks here may not be of the state that the SVM runs."""
        c = self._c
        if not c.qemu.disks.any or c.state is State.PROMOTED:
            return False
        # A later checkpoint, seen here or committed there, ends what a dead controller left open.
        seen = self.proof.runs > c.dp.epoch
        return self.proof.missing or (c.takeover.epoch_uncertain == c.dp.epoch and not seen)

    # ---- the overlays

    def on_qmp(self, event: QmpEvent) -> None:
        """Count a copy whose disk fails as lost: its guest has seen what the PVM did not see.

        One that is stopped by the error is reported by its STOP.
        """
        failed = event.name == "BLOCK_IO_ERROR" and event.data.get("operation") == "write"
        c = self._c
        if not failed or not c.qemu.disks.any or event.data.get("action") == "stop":
            return
        if c.state in (State.PROTECTED, State.CHECKPOINTING, State.DEGRADED):
            name = event.data.get("device") or event.data.get("node-name")
            c.view.guest_event(f"a write of the SVM to disk {name} failed")
            c.view.guest_gone()
            c.reconsider()

    async def watch(self) -> None:
        """Ask for a checkpoint, which empties the overlays, before one of them is too large or
        their file system is full."""
        c = self._c
        while c.qemu.disks.any:
            await asyncio.sleep(SHORT_S if self.room_trouble else OVERLAY_S)
            if c.state is not State.PROTECTED:
                continue
            with contextlib.suppress(QmpError):
                self.overlays = await c.qemu.disks.replica.overlay_sizes()
                if why := self._too_large() or self._running_out():
                    c.peer.send("request", cause=Cause.OVERLAY_FULL.value, why=why)

    def _too_large(self) -> str:
        for disk in self._c.qemu.disks.options.disks:
            size = self.overlays[disk.name]
            if size > disk.overlay_limit:
                return f"the overlay of disk {disk.name} has {size >> 20} MiB"
        return ""

    def _running_out(self) -> str:
        """Return why the file system of overlays is about to be full; report one that is small.

        QEMU would stop the SVM at a write without room, and abort at the next checkpoint.
        """
        rooms = self._c.qemu.disks.replica.files.rooms()
        before, self.room_trouble = (
            self.room_trouble,
            "; ".join(r.trouble for r in rooms if r.trouble),
        )
        if bool(before) is not bool(self.room_trouble):
            log.warning("%s", self.room_trouble or "there is room for the overlays again")
        for r in rooms:
            if r.running_out:
                return (
                    f"{r.where} has {r.free >> 20} MiB free, its overlays have {r.taken >> 20} MiB"
                )
        return ""
