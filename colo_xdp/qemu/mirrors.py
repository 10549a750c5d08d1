# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of the primary's guest: mirrored to the images that the secondary exports.

A mirror with copy-mode=write-blocking copies a disk and then stays: from its end of the copy on, a
write of the guest ends when it is on both images. It needs nothing of the primary's command line,
and no stop of the guest.

QEMU does not tie the mirrors to its checkpoints. They have to be whole at the STOP of the PVM: only
then the image of the secondary is the disk of that checkpoint.

A request to a host that is silent never ends, and then any command that drains makes QEMU hang.
Hence cut() first ends the connections out of band.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import nbd
from .block_layer import BlockLayer
from .disks import DiskError, Mirror, Waits, find
from .events import QmpEvent
from .qmp import QmpError, QmpTimeout

log = logging.getLogger("colo_xdp.qemu.mirrors")

PROBE_S = 2.0  # a connection that hangs within QEMU would stop the guest
CUT_S = 3.0
GIVE_UP_S = 0.5
COPY_S = 15.0  # without progress, a first copy has failed: storage that is being filled is slow
ENDS = ("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


@dataclass(slots=True)
class Copying:
    """The progress of the mirrors of all disks. Bytes, bytes/s, s."""

    done: int = 0
    total: int = 0
    rate: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def update(self, mirrors: list[Mirror]) -> None:
        """Take the newest figures."""
        self.done = sum(m.done for m in mirrors)
        self.total = sum(m.total for m in mirrors)
        self.rate = self.done / max(0.001, time.monotonic() - self.began)

    @property
    def left_s(self) -> float | None:
        """How long it takes on, at the rate so far; None: unknown."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        percent = 100 * self.done // self.total if self.total else 0
        left = "" if self.left_s is None else f", {self.left_s:.0f} s left"
        return (
            f"copying disks: {percent} % of {self.total / (1 << 20):.0f} MiB, "
            f"{self.rate / (1 << 20):.0f} MiB/s{left}"
        )


class Mirrors:
    """The mirrors of all disks of a QEMU whose guest is, or becomes, the PVM."""

    def __init__(self, block: BlockLayer) -> None:
        self._block = block
        self._jobs = {n.job: name for name, n in block.nodes.items()}
        self.mirroring = False  # there are mirrors, made here or by a former controller
        self.copying: Copying | None = None  # a first copy is in progress
        self.lost = ""  # why a disk is no longer mirrored
        self._cutting = False
        self._waits = Waits()
        self._why = ""  # why the mirrors' connections were cut
        self._early = False  # STOP comes after the last write of each disk
        self._asked: object = None  # the QMP connection on which all mirrors were whole

    async def adopt(self) -> None:
        """Find out what a former controller has left in this QEMU. Raises QmpError."""
        there = await self._block.node_table()
        self.mirroring = any(n.target in there for n in self._block.nodes.values())
        self.lost, self._early = "", False
        self._forget_waits()

    def on_event(self, event: QmpEvent) -> str:
        """Take an event from QEMU; return why a disk is no longer mirrored, if it says that."""
        if event.name not in ENDS or self._cutting:
            return ""
        name = self._jobs.get(str(event.data.get("device") or event.data.get("id") or ""))
        if name is None or self.lost:
            return ""
        why = self._why or event.data.get("error") or event.data.get("operation")
        self.lost = f"disk {name} is no longer mirrored: {why or 'the mirror has ended'}"
        return self.lost

    async def probe(self, timeout: float = PROBE_S, answer_s: float = PROBE_S) -> None:
        """Make sure that the other QEMU's images, and their storage, answer. Raises DiskError.

        `answer_s`: deadline of the server alone, which may hang.
        """
        host, _, port = self._block.options.remote.rpartition(":")
        try:
            async with asyncio.timeout(timeout):
                for name in self._block.nodes:
                    where, export = host.strip("[]"), self._block.export_name(name)
                    await nbd.read(where, int(port), export, random.random(), answer_s)
        except (OSError, TimeoutError, EOFError, nbd.NbdError) as e:
            what = "no answer in time" if isinstance(e, TimeoutError) else str(e)
            server = f"the NBD server of the secondary ({self._block.options.remote})"
            raise DiskError(f"{server}: {what}") from e

    async def start(self, theirs: Mapping[str, Any]) -> None:
        """Begin to copy the disks to the secondary, whose sizes are `theirs` (bytes, by name).

        Raises DiskError, or QmpError; then nothing is left of it.
        """
        blocks = await self._block.ask("query-block")
        await self._block.refuse_iothreads(blocks)
        entries = {name: find(blocks, name) for name in self._block.nodes}
        self._check_sizes(entries, theirs)
        if await self._block.committing():
            raise DiskError("the overlays of this guest's disks are still being committed")
        await self.probe()
        self._early = await self._stop_is_late(entries)
        self.lost, self.mirroring, self.copying = "", True, Copying()
        self._forget_waits()
        host, _, port = self._block.options.remote.rpartition(":")
        server = {"type": "inet", "host": host.strip("[]"), "port": port}
        try:
            for name, n in self._block.nodes.items():
                entry = entries[name]
                assert entry is not None
                target = {
                    "driver": "nbd", "node-name": n.target, "server": server,
                    "export": self._block.export_name(name),
                }  # fmt: skip
                await self._block.ask("blockdev-add", target)
                await self._block.ask(
                    "blockdev-mirror",
                    {
                        "job-id": n.job, "device": str(entry["inserted"]["node-name"]),
                        "target": n.target, "sync": "full", "copy-mode": "write-blocking",
                        "on-target-error": "report", "speed": self._block.options.speed,
                    },
                )  # fmt: skip
                log.info("disk %s: copying to %s", name, self._block.options.remote)
        except QmpError as e:
            with contextlib.suppress(QmpError):
                await self.cut()
            raise DiskError(f"disk {name} cannot be copied to the secondary: {e}") from e

    async def _stop_is_late(self, entries: Mapping[str, Mapping[str, Any] | None]) -> bool:
        """Return whether QEMU sends STOP only after the last write of each disk (still_whole)."""
        for entry in entries.values():
            qdev = str((entry or {}).get("qdev") or "")
            if not qdev.endswith("/virtio-backend"):
                return False
            where = {"path": qdev.removesuffix("/virtio-backend"), "property": "ioeventfd"}
            try:
                if await self._block.ask("qom-get", where) is not True:
                    return False
            except QmpTimeout:
                raise
            except QmpError:
                return False
        return True

    def _check_sizes(
        self, entries: Mapping[str, Mapping[str, Any] | None], theirs: Mapping[str, Any]
    ) -> None:
        extra = sorted(set(theirs) - set(self._block.nodes))
        if extra:
            raise DiskError(f"the secondary replicates a disk {extra[0]} that this host does not")
        for name, entry in entries.items():
            if entry is None:
                raise DiskError(f"the guest here has no disk {name}")
            size = int(entry["inserted"]["image"]["virtual-size"])
            if name not in theirs:
                raise DiskError(f"the secondary does not replicate disk {name}")
            if theirs[name] != size:
                raise DiskError(f"disk {name} has {size} bytes here, {theirs[name]} there")

    async def _mirrors(self) -> list[Mirror]:
        jobs = [Mirror.read(j) for j in await self._block.ask("query-block-jobs")]
        return [j for j in jobs if j.job in self._jobs]

    async def look(self) -> None:
        """See which mirrors wait for the secondary. Raises QmpError.

        QEMU's main loop may wait for it, too, so its answer is not waited for longer than that.
        """
        asked = time.monotonic()
        left_s = max(0.01, self._limit_s - self._waits.longest(asked)[1])
        jobs = await self._block.ask("query-block-jobs", None, left_s)
        mirrors = [Mirror.read(j) for j in jobs]
        self._waits.saw([m for m in mirrors if m.job in self._jobs], asked)

    def _forget_waits(self) -> None:
        self._waits.forget()
        self._why = ""

    @property
    def _limit_s(self) -> float:
        least = 0.0 if self.copying is None else COPY_S
        return max(least, self._block.options.write_s)

    def silent(self) -> str:
        """Return that the writes to a disk have waited for the secondary for too long, if so."""
        if self.lost or self._cutting or not self.mirroring:
            return ""
        job, waited_s = self._waits.longest(time.monotonic())
        if waited_s < self._limit_s:
            return ""
        return (
            f"a write to disk {self._jobs[job]} has waited for the secondary for {waited_s:.1f} s "
            "(its image's storage, its QEMU, or the NBD connection)"
        )

    async def give_up(self, why: str) -> None:
        """End the wait of the guest's writes: the mirrors' connections are cut, and nothing else.

        The writes that wait end the mirrors with an error, whose event reports `why`. A QEMU that
        hangs by itself does nothing of that. Raises QmpError.
        """
        self._why = why
        await self._block.yank(GIVE_UP_S, migration=False)

    async def copied(self) -> bool:
        """Return whether each disk is copied, so that its writes go to both images from now on.

        Raises DiskError when a mirror has failed, or QmpError.
        """
        if not self._block.any:
            return True
        try:
            mirrors = await self._mirrors()
        except QmpTimeout:
            return False  # a slow answer is no reason to begin anew
        if why := self._not_whole(mirrors, ready=False):
            raise DiskError(why)
        if self.copying is not None:
            self.copying.update(mirrors)
        if not all(m.ready for m in mirrors):
            return False
        self.copying = None
        return True

    async def whole(self) -> str:
        """Return an empty string if the secondary's images have all that the guest has written.

        Else: why not. Raises QmpError.
        """
        if not self._block.any:
            return ""
        qmp = self._block.qemu.qmp
        why = self._not_whole(await self._mirrors(), ready=True)
        self._asked = None if why else qmp
        return why

    @property
    def still_whole(self) -> bool:
        """Whether a STOP alone tells that the mirrors are whole, as whole() said before it.

        QEMU reports a failed write by BLOCK_JOB_ERROR at once (block_job_error_action()), and QMP
        keeps the order: what failed before the STOP has been read before it. That covers all writes
        of the guest if its devices have ended theirs by then, as virtio-blk with ioeventfd does
        (virtio_blk_data_plane_stop()). For others QEMU drains after the event (do_vm_stop()).
        """
        qmp = self._block.qemu.qmp
        return self._early and self._asked is qmp and qmp.connected and not self.lost

    @property
    def ended_whole(self) -> bool:
        """Whether the mirrors were whole until QEMU died, on the connection that asked before.

        All that it has reported was read before the end of that connection. A secondary that has
        the whole state of a checkpoint has it from after the drain.
        """
        qmp = self._block.qemu.qmp
        return self._asked is qmp and not qmp.connected and not self.lost

    def _not_whole(self, mirrors: list[Mirror], *, ready: bool) -> str:
        if self.lost:
            return self.lost
        found = {self._jobs[m.job]: m for m in mirrors}
        for name in self._block.nodes:
            m = found.get(name)
            if m is None:
                return f"disk {name} is not mirrored"
            if m.trouble:
                return f"disk {name} is not mirrored: {m.trouble}"
            if ready and not m.ready:
                return f"disk {name} is not copied yet"
        return ""

    async def cut(self) -> None:
        """End the mirrors and their connections, whatever state the other host is in.

        Nothing that waits for it may be sent to QEMU before. Raises QmpError.
        """
        if not self.mirroring:
            return
        self._cutting = True
        try:
            await self._block.yank()
            end = time.monotonic() + CUT_S
            while left := await self._cut_once():
                if time.monotonic() > end:
                    raise QmpError(f"the mirrors do not end: {', '.join(left)} still there")
                await asyncio.sleep(0.02)
            self.mirroring, self.copying = False, None
        finally:
            self._cutting = False

    async def _cut_once(self) -> list[str]:
        """Try once; return what is left."""
        jobs = [m.job for m in await self._mirrors()]
        for job in jobs:
            with contextlib.suppress(QmpError):  # it may just have ended
                await self._block.ask("job-cancel", {"id": job})
        there = await self._block.node_table()
        targets = [n.target for n in self._block.nodes.values() if n.target in there]
        if not jobs:
            for target in targets:
                with contextlib.suppress(QmpError):  # in use for a moment longer
                    await self._block.ask("blockdev-del", {"node-name": target})
            targets = [t for t in targets if t in await self._block.node_table()]
        return jobs + targets
