# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep the disks of two guests equal, by QEMU's own block layer over QMP.

Roles change, so each host has both sides: as the secondary its images lie under overlays and are
exported (qemu/replica.py), as the primary its disks are mirrored to the other host's images
(qemu/mirrors.py). QEMU does not compare the images. docs/design/disks.md has the reasons.
"""

from __future__ import annotations

from .block_layer import BlockLayer, Connected, ReplicationOptions
from .mirrors import Mirrors
from .replica import Replica


class DiskReplication:
    """The replicated disks of one QEMU. Without any, nothing is asked of QEMU."""

    def __init__(self, options: ReplicationOptions, qemu: Connected) -> None:
        self.options = options
        self.block = BlockLayer(options, qemu)
        self.mirrors = Mirrors(self.block)
        self.replica = Replica(self.block)

    @property
    def any(self) -> bool:
        """Whether there is a disk to replicate."""
        return self.block.any

    async def adopt(self) -> None:
        """Find out what a former controller has left in this QEMU. Raises QmpError."""
        if self.any:
            await self.mirrors.adopt()
            await self.replica.adopt()
