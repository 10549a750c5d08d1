# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep the disks of two guests equal, by QEMU's own block layer over QMP.

On the secondary the guest's device gets a `replication` node over two overlays over its image, and
the image is exported over NBD: the SVM's writes go to the active disk, what the PVM overwrites is
kept in the hidden disk, and QEMU empties both when a checkpoint is loaded (block/replication.c). On
the primary a mirror with copy-mode=write-blocking copies the disk to that export and then stays:
from its end of the copy on, a write of the guest ends when it is on both images. It needs nothing
of the primary's command line, and no stop of the guest.

QEMU neither compares the images nor ties the mirror to its checkpoints. The mirrors have to be
whole at the STOP of the PVM: only then the image of the secondary is the disk of that checkpoint.

A request to a host that is silent never ends, and then any command that drains makes QEMU hang.
Hence cut() first ends the connections out of band. docs/design/disks.md has the reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import user_command
from . import nbd
from .disks import PREFIX, DiskError, Mirror, Nodes, Waits, find
from .event import QmpEvent
from .overlays import ReplicatedDisk, Room, directory_trouble, overlay_paths, rooms
from .qmp import QemuInfo, Qmp, QmpError, QmpTimeout

log = logging.getLogger("colo_xdp.qemu.replication")

PROBE_S = 2.0  # a connection that hangs within QEMU would stop the guest
CREATE_S = 10.0  # qemu-img
CUT_S = 3.0
CLOSE_S = 2.0
GIVE_UP_S = 0.5
COPY_S = 15.0  # without progress, a first copy has failed: storage that is being filled is slow
ENDS = ("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


@dataclass(frozen=True, slots=True)
class ReplicationOptions:
    """What the configuration says of the disks; `speed` of the first copy: bytes/s, 0: no limit."""

    pair: str
    disks: tuple[ReplicatedDisk, ...] = ()
    local: str = ""
    remote: str = ""
    speed: int = 0
    write_s: float = 2.0  # how long a write may wait for the secondary


class Connected(Protocol):
    """The QEMU whose disks these are (qemu/supervisor.py)."""

    qmp: Qmp
    info: QemuInfo | None

    @property
    def way_past(self) -> Qmp:
        """The connection for out-of-band commands."""
        ...


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


class DiskReplication:
    """The replicated disks of one QEMU. Without any, nothing is asked of QEMU."""

    def __init__(self, options: ReplicationOptions, qemu: Connected) -> None:
        self.options, self._qemu = options, qemu
        self.nodes = {d.name: Nodes.of(d.name) for d in options.disks}
        self._jobs = {n.job: name for name, n in self.nodes.items()}
        self.mirroring = False  # there are mirrors, made here or by a former controller
        self.copying: Copying | None = None  # a first copy is in progress
        self.lost = ""  # why a disk is no longer mirrored
        self._cutting = False
        self._waits = Waits()
        self._why = ""  # why the mirrors' connections were cut
        self._early = False  # STOP comes after the last write of each disk
        self._asked: object = None  # the QMP connection on which all mirrors were whole
        self.serving = False
        self._setting_up = asyncio.Lock()

    @property
    def any(self) -> bool:
        """Whether there is a disk to replicate."""
        return bool(self.options.disks)

    async def _ask(self, command: str, args: dict[str, Any] | None = None) -> Any:
        return await self._qemu.qmp.execute(command, args)

    def _export_name(self, disk: str) -> str:
        """Return the name of a disk's export: the pair is part of it, as ports are mistaken."""
        return f"{self.options.pair}.{disk}"[:255]

    async def _node_table(self) -> dict[str, Mapping[str, Any]]:
        nodes = await self._ask("query-named-block-nodes", {"flat": True})
        return {str(n["node-name"]): n for n in nodes}

    # ---- either side

    async def refuse_iothreads(self, blocks: Any) -> None:
        """Raise DiskError for a disk in an I/O thread where QEMU aborts with that.

        Before QEMU 11 (tried: 7.2) the secondary's QEMU aborts when the primary's NBD connection
        ends (blockdev-nbd.c), that is whenever the primary dies. The roles change, so this holds
        for both hosts.
        """
        info = self._qemu.info
        if info is None or info.version >= (11, 0, 0) or not await self._ask("query-iothreads"):
            return
        for name in self.nodes:
            entry = find(blocks, name)
            path = str((entry or {}).get("qdev") or "")
            try:
                thread = await self._ask("qom-get", {"path": path, "property": "iothread"})
            except QmpTimeout:
                raise
            except QmpError:  # its controller may be in one (virtio-scsi)
                thread = "cannot be told"
            if thread:
                raise DiskError(
                    f"disk {name} is, or may be, in an iothread: before QEMU 11 the secondary's "
                    "QEMU aborts with that when the primary dies"
                )

    async def yank(self, timeout: float | None = None, *, migration: bool = True) -> None:
        """Cut QEMU's connections to the other QEMU out of band; not `migration`: those of the
        disks only. Raises QmpError."""
        q = self._qemu.way_past
        there = await q.execute("query-yank", None, timeout, oob=True)
        instances = [
            i
            for i in there
            if (migration and i.get("type") == "migration")
            or str(i.get("node-name", "")).startswith(PREFIX)
        ]
        if instances:
            await q.execute("yank", {"instances": instances}, timeout, oob=True)

    # ---- the secondary

    async def serve(self) -> dict[str, int]:
        """Put overlays under the guest's disks and export their images, unless that is done.

        The QEMU waits for a migration. Returns the sizes in bytes, by name. Raises DiskError, or
        QmpError.
        """
        if not self.any:
            return {}
        async with self._setting_up:  # a peer may connect while it is done for a new QEMU
            return await self._serve()

    async def _serve(self) -> dict[str, int]:
        blocks = await self._ask("query-block")
        absent = [name for name in self.nodes if find(blocks, name) is None]
        if absent:
            raise DiskError(f"the guest here has no disk {', '.join(absent)}")
        await self.refuse_iothreads(blocks)
        there = await self._node_table()
        new = [d for d in self.options.disks if self.nodes[d.name].replication not in there]
        await self._need_room(new)
        images: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for disk in self.options.disks:
            n, entry = self.nodes[disk.name], find(blocks, disk.name)
            assert entry is not None
            sizes[disk.name] = int(entry["inserted"]["image"]["virtual-size"])
            if n.replication not in there:
                images[disk.name] = str(entry["inserted"]["node-name"])
                await self._add_overlays(disk, entry, sizes[disk.name])
            elif entry["inserted"]["node-name"] != n.replication:
                await self._put_under_device(disk, entry)  # a former controller died before that
        await self._export(images)
        self.serving = True
        return sizes

    async def _need_room(self, new: list[ReplicatedDisk]) -> None:
        """Raise DiskError if there is no room for the overlays of these disks beside the others."""
        for disk in new:
            if why := directory_trouble(disk.name, disk.overlays):
                raise DiskError(why)
            await self._remove(disk)  # those of a former QEMU take room
        if not new:
            return
        for room in self.rooms():
            if room.trouble and set(room.disks).intersection(d.name for d in new):
                raise DiskError(room.trouble)

    def rooms(self) -> list[Room]:
        """Return the file systems of the overlays, and what is left there."""
        try:
            return rooms(self.options.disks, self._paths)
        except OSError as e:
            log.warning("overlays: %s", e)
            return []

    async def _add_overlays(
        self, disk: ReplicatedDisk, entry: Mapping[str, Any], size: int
    ) -> None:
        if entry["inserted"].get("ro") is True:
            raise DiskError(f"disk {disk.name} is read-only: it needs no [[disk]]")
        if not entry.get("qdev"):
            raise DiskError(f"disk {disk.name} belongs to no device of the guest")
        try:
            await self._build(disk, entry, size)
        except QmpTimeout:
            raise
        except QmpError as e:
            raise DiskError(f"disk {disk.name} gets no overlays: {e}") from e
        log.info("disk %s: overlays in %s", disk.name, disk.overlays)

    async def _build(self, disk: ReplicatedDisk, entry: Mapping[str, Any], size: int) -> None:
        inserted, n = entry["inserted"], self.nodes[disk.name]
        active, hidden = await self.make_overlays(disk, size)
        backing = {
            "driver": "qcow2", "node-name": n.hidden, "backing": str(inserted["node-name"]),
            "file": {"driver": "file", "filename": str(hidden)},
        }  # fmt: skip
        await self._ask(
            "blockdev-add",
            {
                "driver": "replication", "node-name": n.replication, "mode": "secondary",
                "top-id": n.replication,
                "file": {
                    "driver": "qcow2", "node-name": n.active, "backing": backing,
                    "file": {"driver": "file", "filename": str(active)},
                },
            },
        )  # fmt: skip
        try:
            await self._put_under_device(disk, entry)
        except QmpError:
            with contextlib.suppress(QmpError):
                await self._ask("blockdev-del", {"node-name": n.replication})
            raise

    async def _put_under_device(self, disk: ReplicatedDisk, entry: Mapping[str, Any]) -> None:
        node = self.nodes[disk.name].replication
        await self._ask("qom-set", {"path": entry["qdev"], "property": "drive", "value": node})

    async def _image_below(self, n: Nodes) -> str:
        """Return the image below overlays that a former controller has made, or an empty string.

        It died before it exported the image, and no other command tells which node that is.
        """
        graph = await self._ask("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        return next(
            (str(names[e["child"]]) for e in graph["edges"]
             if names[e["parent"]] == n.hidden and e["name"] == "backing"),
            "",
        )  # fmt: skip

    def _paths(self, disk: ReplicatedDisk) -> tuple[Path, Path]:
        return overlay_paths(self.options.pair, disk)

    async def make_overlays(self, disk: ReplicatedDisk, size: int) -> tuple[Path, Path]:
        """Make empty overlays of `size` bytes; return the active and the hidden disk.

        They belong to the owner of their directory, as whom QEMU may run. Raises DiskError.
        """
        paths = self._paths(disk)
        create = "qemu-img create -q -f qcow2"  # QEMU writes no file while it waits for a migration
        await self._as_owner(
            disk,
            'command -v qemu-img > /dev/null || exit 127; '
            f'{create} "$1" "$3" && exec {create} "$2" "$3"',
            *map(str, paths), str(size),
        )  # fmt: skip
        return paths

    async def remove_overlays(self) -> None:
        """Remove the files of overlays that QEMU has committed and closed; failure is no harm."""
        for disk in self.options.disks:
            with contextlib.suppress(DiskError):
                await self._remove(disk)

    async def _remove(self, disk: ReplicatedDisk) -> None:
        await self._as_owner(disk, 'rm -f -- "$1" "$2"', *map(str, self._paths(disk)))

    async def _as_owner(self, disk: ReplicatedDisk, script: str, *args: str) -> None:
        """Run a shell command as the owner of the overlays' directory. Raises DiskError."""
        try:
            st = os.stat(disk.overlays)
            owner = st.st_uid, st.st_gid
            argv = ["/bin/sh", "-c", script, "sh", *args]
            command = user_command.overlays(self.options.pair, argv, int(CREATE_S * 1000), owner)
            change = command == argv and os.geteuid() == 0
            process = await asyncio.create_subprocess_exec(
                *command, env=user_command.environment(), stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, umask=0o077,
                user=owner[0] if change else None, group=owner[1] if change else None,
                extra_groups=() if change else None,
            )  # fmt: skip
            try:
                async with asyncio.timeout(CREATE_S + 1):
                    text, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                raise
        except (OSError, TimeoutError) as e:
            what = "the command does not end" if isinstance(e, TimeoutError) else str(e)
            raise DiskError(f"disk {disk.name}: overlays in {disk.overlays}: {what}") from e
        if process.returncode == 127:
            raise DiskError("qemu-img is missing (Debian: qemu-utils)")
        if process.returncode:
            said = " ".join(text.decode(errors="replace").split()) or "the journal may have why"
            raise DiskError(
                f"disk {disk.name}: overlays in {disk.overlays} cannot be made as their owner "
                f"(uid {owner[0]}): {said}"
            )

    async def _export(self, images: Mapping[str, str]) -> None:
        host, _, port = self.options.local.rpartition(":")
        address = {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}
        exports = {str(e["id"]) for e in await self._ask("query-block-exports")}
        try:
            await self._ask("nbd-server-start", {"addr": address})
        except QmpTimeout:
            raise
        except QmpError as e:
            if "already running" not in str(e):
                raise DiskError(f"NBD server at {self.options.local}: {e}") from e
        for name, n in self.nodes.items():
            if n.stem in exports:
                continue
            image = images.get(name) or await self._image_below(n)
            if not image:
                raise DiskError(f"disk {name}: the image below its overlays is not found")
            try:
                await self._ask(
                    "block-export-add",
                    {"type": "nbd", "id": n.stem, "node-name": image,
                     "name": self._export_name(name), "writable": True},
                )  # fmt: skip
            except QmpTimeout:
                raise
            except QmpError as e:
                raise DiskError(f"disk {name} cannot be exported: {e}") from e

    async def stop_serving(self, timeout: float = CLOSE_S) -> None:
        """Close the images to the other host for good; done before this guest is promoted.

        A primary that still lives would write into them. Not by nbd-server-stop: QEMU's main loop
        (tried: 7.2) hangs in that while any client is in its handshake, a port scanner for example.
        Without an export such a client can write nothing. Raises QmpError.
        """
        if not self.any:
            return
        end = time.monotonic() + timeout
        while left := await self._exports(timeout):
            for export in left:
                with contextlib.suppress(QmpError):  # it may be on its way out
                    args = {"id": export, "mode": "hard"}
                    await self._qemu.qmp.execute("block-export-del", args, timeout)
            if time.monotonic() > end:
                raise QmpError(f"the exports {', '.join(left)} are still there")
            await asyncio.sleep(0.005)
        self.serving = False

    async def _exports(self, timeout: float | None = None) -> list[str]:
        exports = await self._qemu.qmp.execute("query-block-exports", None, timeout)
        ours = {n.stem for n in self.nodes.values()}
        return [str(e["id"]) for e in exports if e["id"] in ours]

    async def committing(self) -> bool:
        """Return whether overlays of a former secondary still belong to a disk. Raises QmpError."""
        there = await self._node_table() if self.any else {}
        return any(n.active in there or n.hidden in there for n in self.nodes.values())

    async def overlay_sizes(self) -> dict[str, int]:
        """Return the size of the larger overlay of each disk, bytes. Raises QmpError."""
        there = await self._node_table() if self.any else {}
        sizes = {}
        for name, n in self.nodes.items():
            both = (there.get(n.active), there.get(n.hidden))
            sizes[name] = max(int(o["image"].get("actual-size", 0)) if o else 0 for o in both)
        return sizes

    # ---- the primary

    async def adopt(self) -> None:
        """Find out what a former controller has left in this QEMU. Raises QmpError."""
        if self.any:
            there = await self._node_table()
            self.mirroring = any(n.target in there for n in self.nodes.values())
            self.lost, self._early = "", False
            self._forget_waits()
            exports = {e["id"] for e in await self._ask("query-block-exports")}
            self.serving = any(n.stem in exports for n in self.nodes.values())

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
        host, _, port = self.options.remote.rpartition(":")
        try:
            async with asyncio.timeout(timeout):
                for name in self.nodes:
                    where, export = host.strip("[]"), self._export_name(name)
                    await nbd.read(where, int(port), export, random.random(), answer_s)
        except (OSError, TimeoutError, EOFError, nbd.NbdError) as e:
            what = "no answer in time" if isinstance(e, TimeoutError) else str(e)
            server = f"the NBD server of the secondary ({self.options.remote})"
            raise DiskError(f"{server}: {what}") from e

    async def start(self, theirs: Mapping[str, Any]) -> None:
        """Begin to copy the disks to the secondary, whose sizes are `theirs` (bytes, by name).

        Raises DiskError, or QmpError; then nothing is left of it.
        """
        blocks = await self._ask("query-block")
        await self.refuse_iothreads(blocks)
        entries = {name: find(blocks, name) for name in self.nodes}
        self._check_sizes(entries, theirs)
        if await self.committing():
            raise DiskError("the overlays of this guest's disks are still being committed")
        await self.probe()
        self._early = await self._stop_is_late(entries)
        self.lost, self.mirroring, self.copying = "", True, Copying()
        self._forget_waits()
        host, _, port = self.options.remote.rpartition(":")
        server = {"type": "inet", "host": host.strip("[]"), "port": port}
        try:
            for name, n in self.nodes.items():
                entry = entries[name]
                assert entry is not None
                target = {
                    "driver": "nbd", "node-name": n.target, "server": server,
                    "export": self._export_name(name),
                }  # fmt: skip
                await self._ask("blockdev-add", target)
                await self._ask(
                    "blockdev-mirror",
                    {
                        "job-id": n.job, "device": str(entry["inserted"]["node-name"]),
                        "target": n.target, "sync": "full", "copy-mode": "write-blocking",
                        "on-target-error": "report", "speed": self.options.speed,
                    },
                )  # fmt: skip
                log.info("disk %s: copying to %s", name, self.options.remote)
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
                if await self._ask("qom-get", where) is not True:
                    return False
            except QmpTimeout:
                raise
            except QmpError:
                return False
        return True

    def _check_sizes(
        self, entries: Mapping[str, Mapping[str, Any] | None], theirs: Mapping[str, Any]
    ) -> None:
        extra = sorted(set(theirs) - set(self.nodes))
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
        jobs = [Mirror.read(j) for j in await self._ask("query-block-jobs")]
        return [j for j in jobs if j.job in self._jobs]

    async def look(self) -> None:
        """See which mirrors wait for the secondary. Raises QmpError.

        QEMU's main loop may wait for it, too, so its answer is not waited for longer than that.
        """
        asked = time.monotonic()
        left_s = max(0.01, self._limit_s - self._waits.longest(asked)[1])
        jobs = await self._qemu.qmp.execute("query-block-jobs", None, left_s)
        mirrors = [Mirror.read(j) for j in jobs]
        self._waits.saw([m for m in mirrors if m.job in self._jobs], asked)

    def _forget_waits(self) -> None:
        self._waits.forget()
        self._why = ""

    @property
    def _limit_s(self) -> float:
        least = 0.0 if self.copying is None else COPY_S
        return max(least, self.options.write_s)

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
        await self.yank(GIVE_UP_S, migration=False)

    async def copied(self) -> bool:
        """Return whether each disk is copied, so that its writes go to both images from now on.

        Raises DiskError when a mirror has failed, or QmpError.
        """
        if not self.any:
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
        if not self.any:
            return ""
        qmp = self._qemu.qmp
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
        qmp = self._qemu.qmp
        return self._early and self._asked is qmp and qmp.connected and not self.lost

    @property
    def ended_whole(self) -> bool:
        """Whether the mirrors were whole until QEMU died, on the connection that asked before.

        All that it has reported was read before the end of that connection. A secondary that has
        the whole state of a checkpoint has it from after the drain.
        """
        qmp = self._qemu.qmp
        return self._asked is qmp and not qmp.connected and not self.lost

    def _not_whole(self, mirrors: list[Mirror], *, ready: bool) -> str:
        if self.lost:
            return self.lost
        found = {self._jobs[m.job]: m for m in mirrors}
        for name in self.nodes:
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
            await self.yank()
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
                await self._ask("job-cancel", {"id": job})
        there = await self._node_table()
        targets = [n.target for n in self.nodes.values() if n.target in there]
        if not jobs:
            for target in targets:
                with contextlib.suppress(QmpError):  # in use for a moment longer
                    await self._ask("blockdev-del", {"node-name": target})
            targets = [t for t in targets if t in await self._node_table()]
        return jobs + targets
