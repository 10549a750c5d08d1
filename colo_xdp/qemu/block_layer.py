# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's block layer, as far as both hosts ask the same of it to keep disks equal.

The secondary's side is in qemu/replica.py, the primary's in qemu/mirrors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .disks import PREFIX, DiskError, Nodes, find
from .overlays import ReplicatedDisk
from .qmp import QemuInfo, Qmp, QmpError, QmpTimeout


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


class BlockLayer:
    """The block layer of one QEMU, and the names of what is made there for each disk."""

    def __init__(self, options: ReplicationOptions, qemu: Connected) -> None:
        self.options, self.qemu = options, qemu
        self.nodes = {d.name: Nodes.of(d.name) for d in options.disks}

    @property
    def any(self) -> bool:
        """Whether there is a disk to replicate."""
        return bool(self.options.disks)

    async def ask(
        self, command: str, args: dict[str, Any] | None = None, timeout: float | None = None
    ) -> Any:
        """Execute one QMP command. Raises QmpError."""
        return await self.qemu.qmp.execute(command, args, timeout)

    def export_name(self, disk: str) -> str:
        """Return the name of a disk's export: the pair is part of it, as ports are mistaken."""
        return f"{self.options.pair}.{disk}"[:255]

    async def node_table(self) -> dict[str, Mapping[str, Any]]:
        """Return what `query-named-block-nodes` says, by the name of the node. Raises QmpError."""
        nodes = await self.ask("query-named-block-nodes", {"flat": True})
        return {str(n["node-name"]): n for n in nodes}

    async def committing(self) -> bool:
        """Return whether overlays of a former secondary still belong to a disk. Raises QmpError."""
        there = await self.node_table() if self.any else {}
        return any(n.active in there or n.hidden in there for n in self.nodes.values())

    async def refuse_iothreads(self, blocks: Any) -> None:
        """Raise DiskError for a disk in an I/O thread where QEMU aborts with that.

        Before QEMU 11 (tried: 7.2) the secondary's QEMU aborts when the primary's NBD connection
        ends (blockdev-nbd.c), that is whenever the primary dies. The roles change, so this holds
        for both hosts.
        """
        info = self.qemu.info
        if info is None or info.version >= (11, 0, 0) or not await self.ask("query-iothreads"):
            return
        for name in self.nodes:
            entry = find(blocks, name)
            path = str((entry or {}).get("qdev") or "")
            try:
                thread = await self.ask("qom-get", {"path": path, "property": "iothread"})
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
        q = self.qemu.way_past
        there = await q.execute("query-yank", None, timeout, oob=True)
        instances = [
            i
            for i in there
            if (migration and i.get("type") == "migration")
            or str(i.get("node-name", "")).startswith(PREFIX)
        ]
        if instances:
            await q.execute("yank", {"instances": instances}, timeout, oob=True)
