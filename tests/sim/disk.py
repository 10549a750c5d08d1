# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate QEMU's block layer: one disk, its mirror, its overlays, and the NBD connection between.

The product's own DiskReplication drives it over QMP. What a disk contains is the set of the numbers
that a guest has written. A write that is mirrored ends when it has arrived on the other host; one
that a dead host has sent may still arrive. What is not modelled: caches of the hosts, which only
matter if both lose power.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colo_xdp.qemu.disks import Mirror
from colo_xdp.qemu.qmp import QmpError

if TYPE_CHECKING:
    from .host import Side
    from .world import World

NAME, SIZE = "d0", 1 << 20
STEM = f"colo-{NAME}"


class Connection:
    """An NBD connection of a mirror to the QEMU that served when it began."""

    def __init__(self, target: SimBlock) -> None:
        self.target = target


class SimBlock:
    """The block layer of one QEMU over its host's image."""

    def __init__(self, side: Side, alive: Callable[[], bool]) -> None:
        self.side, self.alive = side, alive
        self.node = "#block0"  # under the guest's device
        self.nodes: set[str] = set()
        self.job: dict[str, Any] | None = None
        self.server, self.exports = False, set[str]()
        self.connection: Connection | None = None
        self.flying: set[int] = set()  # writes that wait for the other host
        self._done: set[int] = set()  # whose end the guest has not seen
        self.ended = 0  # writes that have ended on both
        self.snapshot: set[int] | None = None  # the image as of the checkpoint: the hidden disk
        self.active: set[int] | None = None
        self.left = False  # replication has ended: the guest goes on alone

    @property
    def world(self) -> World:
        return self.side.world

    # -- the guest

    def view(self) -> set[int]:
        """Return what the guest would read, without writes that have not ended."""
        if self.active is not None and self.snapshot is not None:
            return (self.snapshot | self.active) - self._done
        return self.side.image - self.flying - self._done

    def write(self, n: int) -> bool:
        """Write number n; return whether it has ended. The guest asks until it has."""
        if n in self._done:
            self._done.discard(n)
            return True
        if n in self.flying:
            return False
        if self.active is not None:
            self.active.add(n)
            return True
        self.side.image.add(n)
        if self.connection is None or self.job is None or not self.job["ready"]:
            return True
        self.flying.add(n)
        c = self.connection
        self.world.later(self.world.rnd_disk.uniform(0.05, 3), lambda: self._arrive(n, c))
        return False

    def _arrive(self, n: int, c: Connection) -> None:
        """Let a write reach the other host, where it lands, waits or fails."""
        target, world = c.target, self.world
        if self.connection is not c and self.alive():
            return  # cut off
        silent = world.disk_cut or target.side.qemu.hung or target.side.off
        if silent and target.alive():
            world.later(5, lambda: self._arrive(n, c))  # TCP sends it again
            return
        if not target.server or not target.alive():
            if not target.side.off and self.connection is c:
                self.fail("Connection reset by peer")
            return  # a host that is off says nothing: the write waits for ever
        if target.left:
            from .world import Violation

            raise Violation(f"I11: {n} lands in the image of a guest that goes on alone")
        target.side.image.add(n)
        if n in self.flying:
            self.flying.discard(n)
            self._done.add(n)
            self.ended += 1

    def fail(self, why: str) -> None:
        """End the mirror with an error; the guest's writes end as they would without it."""
        self._done |= self.flying
        self.flying.clear()
        self.connection = None
        if self.job is not None and self.alive():
            job, self.job = self.job["device"], None
            self.side.qemu.event("BLOCK_JOB_ERROR", device=job, operation="write", action="report")
            self.side.qemu.event("BLOCK_JOB_COMPLETED", device=job, error=why)

    # -- COLO

    def load(self, origin: SimBlock) -> None:
        """Load a checkpoint: QEMU empties the overlays, whatever the image is.

        The device's state is part of it, with the writes whose end the guest has not seen.
        """
        self._done = set(origin._done)
        if f"{STEM}-active" in self.nodes:
            self.snapshot, self.active = set(self.side.image), set()

    def leave(self) -> None:
        """End replication by x-colo-lost-heartbeat: the overlays are merged into the image."""
        if self.active is None or self.snapshot is None:
            return
        self.side.image = self.snapshot | self.active
        self.snapshot = self.active = None
        self.left = True
        gone = {f"{STEM}-active", f"{STEM}-hidden"}
        self.world.later(
            self.world.rnd_disk.choice((1, 50, 600)), lambda: self.nodes.difference_update(gone)
        )

    def mirrors(self) -> list[Mirror]:
        """Return the mirror job with what is on its way."""
        if self.job is None:
            return []
        on_its_way = len(self.flying) if self.job["ready"] else 1
        done = self.ended
        return [Mirror(self.job["device"], done, done + on_its_way, self.job["ready"], "")]

    # -- QMP

    def command(self, name: str, args: dict[str, Any]) -> Any:
        """Execute one command. Raises QmpError."""
        return getattr(self, name.replace("-", "_"))(args)

    def query_block(self, args: Any) -> Any:
        inserted = {"node-name": self.node, "ro": False, "image": {"virtual-size": SIZE}}
        return [{"device": NAME, "qdev": f"/machine/peripheral/v{NAME}", "inserted": inserted}]

    def query_named_block_nodes(self, args: Any) -> Any:
        return [{"node-name": n, "image": {"actual-size": 1}} for n in sorted(self.nodes)]

    def x_debug_query_block_graph(self, args: Any) -> Any:
        nodes = [{"id": 1, "name": f"{STEM}-hidden"}, {"id": 2, "name": "#block0"}]
        return {"nodes": nodes, "edges": [{"parent": 1, "child": 2, "name": "backing"}]}

    def query_block_exports(self, args: Any) -> Any:
        return [{"id": e} for e in sorted(self.exports)]

    def query_block_jobs(self, args: Any) -> Any:
        return [self.job] if self.job is not None else []

    def query_yank(self, args: Any) -> Any:
        nodes = [{"type": "block-node", "node-name": f"{STEM}-target"}] * (
            f"{STEM}-target" in self.nodes
        )
        return [{"type": "migration"}, *nodes]

    def yank(self, args: Any) -> None:
        if any(i["type"] == "block-node" for i in args["instances"]):
            self.fail("yanked")

    def query_iothreads(self, args: Any) -> Any:
        return []

    def qom_get(self, args: Any) -> str:
        return ""

    def qom_set(self, args: Any) -> None:
        self.node = args["value"]

    def blockdev_add(self, args: Any) -> None:
        if args["node-name"] in self.nodes:
            raise QmpError("duplicate node name")
        self.nodes.add(args["node-name"])
        if args["driver"] == "replication":
            self.nodes |= {f"{STEM}-active", f"{STEM}-hidden"}
        else:
            target = self.side.other.qemu.block
            if not target.server or not target.alive():
                self.nodes.discard(args["node-name"])
                raise QmpError("Connection refused")
            self.connection = Connection(target)

    def blockdev_del(self, args: Any) -> None:
        if self.job is not None:
            raise QmpError("in use")
        self.nodes.discard(args["node-name"])

    def blockdev_mirror(self, args: Any) -> None:
        self.job = {"device": args["job-id"], "len": 9, "offset": 0, "ready": False}
        c = self.connection
        assert c is not None
        ms = self.world.rnd_disk.choice((3, 40, 300))
        self.world.later(self.world.rnd_disk.uniform(1, ms), lambda: self._copied(c))

    def _copied(self, c: Connection) -> None:
        target, world = c.target, self.world
        if self.connection is not c or self.job is None or not self.alive():
            return
        if world.disk_cut or target.side.off or target.side.qemu.hung:
            world.later(5, lambda: self._copied(c))
        elif not target.server or not target.alive():
            self.fail("Connection reset by peer")
        else:
            target.side.image = set(self.side.image)
            self.job.update(offset=9, ready=True)
            self.side.qemu.event("BLOCK_JOB_READY", device=self.job["device"])

    def job_cancel(self, args: Any) -> None:
        if self.job is None:
            raise QmpError("Job not found")
        self.fail("cancelled")

    def nbd_server_start(self, args: Any) -> None:
        if self.server:
            raise QmpError("NBD server already running")
        self.server = True

    def nbd_server_stop(self, args: Any) -> None:
        if not self.server:
            raise QmpError("NBD server not running")
        self.server = False
        self.exports.clear()

    def block_export_del(self, args: Any) -> None:
        self.exports.discard(args["id"])
        self.server = bool(self.exports)  # of one without exports nobody gets anything

    def block_export_add(self, args: Any) -> None:
        self.exports.add(args["id"])
