# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate the mark's file (service/mark_file.py): what was written survives a loss of power."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colo_xdp.failover.mark import Mark, Standing, decode

from .process import OfProcess

if TYPE_CHECKING:
    from .host import Side

PAIR = "web1"


class SimMarkFile(OfProcess):
    """A controller's thread that writes the file, `Scene.mark_ms` after it was asked to."""

    def __init__(self, side: Side) -> None:
        self._side, self._process = side, side.process
        self.boot = str(side.powered)
        self._asked = 0

    def found(self) -> Mark | None:
        data = self._side.mark
        return None if data is None else decode(data, PAIR)

    def want(self, standing: Standing) -> None:
        """Write or remove it. What has not come that far ends with the process or the power."""
        side, self._asked = self._side, self._asked + 1
        none, at = standing is Standing.NONE, side.world.ns() / 1e9
        data = None if none else Mark(PAIR, standing, self.boot, at).encode()
        asked, boot = self._asked, side.powered

        def written() -> None:
            if not self.dead and not side.off and (asked, boot) == (self._asked, side.powered):
                side.world.note("%s mark: %s", side.name, standing.value)
                side.mark = data

        # no timer where it takes no time: it would shift the other schedules
        if side.world.scene.mark_ms:
            side.world.later(side.world.scene.mark_ms, written)
        else:
            written()
