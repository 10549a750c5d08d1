# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of the secondary's guest: overlays over its images, which are exported to the primary.

The guest's device gets a `replication` node over two overlays over its image, and the image is
exported over NBD: the SVM's writes go to the active disk, what the PVM overwrites is kept in the
hidden disk, and QEMU empties both when a checkpoint is loaded (block/replication.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from .block_layer import BlockLayer
from .disks import DiskError, Nodes, find
from .overlays import OverlayFiles, ReplicatedDisk, directory_trouble
from .qmp import QmpError, QmpTimeout

log = logging.getLogger("colo_xdp.qemu.replica")

CLOSE_S = 2.0
#: what QEMU says of a device whose image is open already. It opens images at the end of a
#: migration, or when it is told to go on while it waits for one: qmp_cont() activates all of them.
OPEN_ALREADY = "Block node is read-only"
START_ANEW = (
    ": its image is open already, as after a `cont` while this QEMU waited; start it anew, without "
    "one (libvirt: `virsh create --paused`)"
)


class Replica:
    """The replicated disks of a QEMU whose guest is, or becomes, the SVM."""

    def __init__(self, block: BlockLayer) -> None:
        self._block = block
        self.files = OverlayFiles(block.options.pair, block.options.disks)
        self.serving = False
        self._setting_up = asyncio.Lock()

    async def adopt(self) -> None:
        """Find out what a former controller has left in this QEMU. Raises QmpError."""
        self.serving = bool(await self._exports())

    async def serve(self) -> dict[str, int]:
        """Put overlays under the guest's disks and export their images, unless that is done.

        The QEMU waits for a migration. Returns the sizes in bytes, by name. Raises DiskError, or
        QmpError.
        """
        if not self._block.any:
            return {}
        async with self._setting_up:  # a peer may connect while it is done for a new QEMU
            return await self._serve()

    async def _serve(self) -> dict[str, int]:
        blocks = await self._block.ask("query-block")
        absent = [name for name in self._block.nodes if find(blocks, name) is None]
        if absent:
            raise DiskError(f"the guest here has no disk {', '.join(absent)}")
        await self._block.refuse_iothreads(blocks)
        there = await self._block.node_table()
        new = [
            d
            for d in self._block.options.disks
            if self._block.nodes[d.name].replication not in there
        ]
        await self._need_room(new)
        images: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for disk in self._block.options.disks:
            n, entry = self._block.nodes[disk.name], find(blocks, disk.name)
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
            await self.files.remove(disk)  # those of a former QEMU take room
        if not new:
            return
        for room in self.files.rooms():
            if room.trouble and set(room.disks).intersection(d.name for d in new):
                raise DiskError(room.trouble)

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
            remedy = START_ANEW if OPEN_ALREADY in str(e) else ""
            raise DiskError(f"disk {disk.name} gets no overlays: {e}{remedy}") from e
        log.info("disk %s: overlays in %s", disk.name, disk.overlays)

    async def _build(self, disk: ReplicatedDisk, entry: Mapping[str, Any], size: int) -> None:
        inserted, n = entry["inserted"], self._block.nodes[disk.name]
        active, hidden = await self.files.make(disk, size)
        backing = {
            "driver": "qcow2", "node-name": n.hidden, "backing": str(inserted["node-name"]),
            "file": {"driver": "file", "filename": str(hidden)},
        }  # fmt: skip
        await self._block.ask(
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
                await self._block.ask("blockdev-del", {"node-name": n.replication})
            raise

    async def _put_under_device(self, disk: ReplicatedDisk, entry: Mapping[str, Any]) -> None:
        node = self._block.nodes[disk.name].replication
        await self._block.ask(
            "qom-set", {"path": entry["qdev"], "property": "drive", "value": node}
        )

    async def _image_below(self, n: Nodes) -> str:
        """Return the image below overlays that a former controller has made, or an empty string.

        It died before it exported the image, and no other command tells which node that is.
        """
        graph = await self._block.ask("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        return next(
            (str(names[e["child"]]) for e in graph["edges"]
             if names[e["parent"]] == n.hidden and e["name"] == "backing"),
            "",
        )  # fmt: skip

    async def _export(self, images: Mapping[str, str]) -> None:
        host, _, port = self._block.options.local.rpartition(":")
        address = {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}
        exports = {str(e["id"]) for e in await self._block.ask("query-block-exports")}
        try:
            await self._block.ask("nbd-server-start", {"addr": address})
        except QmpTimeout:
            raise
        except QmpError as e:
            if "already running" not in str(e):
                raise DiskError(f"NBD server at {self._block.options.local}: {e}") from e
        for name, n in self._block.nodes.items():
            if n.stem in exports:
                continue
            image = images.get(name) or await self._image_below(n)
            if not image:
                raise DiskError(f"disk {name}: the image below its overlays is not found")
            try:
                await self._block.ask(
                    "block-export-add",
                    {"type": "nbd", "id": n.stem, "node-name": image,
                     "name": self._block.export_name(name), "writable": True},
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
        if not self._block.any:
            return
        end = time.monotonic() + timeout
        while left := await self._exports(timeout):
            for export in left:
                with contextlib.suppress(QmpError):  # it may be on its way out
                    args = {"id": export, "mode": "hard"}
                    await self._block.ask("block-export-del", args, timeout)
            if time.monotonic() > end:
                raise QmpError(f"the exports {', '.join(left)} are still there")
            await asyncio.sleep(0.005)
        self.serving = False

    async def _exports(self, timeout: float | None = None) -> list[str]:
        exports = await self._block.ask("query-block-exports", None, timeout)
        ours = {n.stem for n in self._block.nodes.values()}
        return [str(e["id"]) for e in exports if e["id"] in ours]

    async def overlay_sizes(self) -> dict[str, int]:
        """Return the size of the larger overlay of each disk, bytes. Raises QmpError."""
        there = await self._block.node_table() if self._block.any else {}
        sizes = {}
        for name, n in self._block.nodes.items():
            both = (there.get(n.active), there.get(n.hidden))
            sizes[name] = max(int(o["image"].get("actual-size", 0)) if o else 0 for o in both)
        return sizes
