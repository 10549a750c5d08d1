# SPDX-License-Identifier: GPL-2.0-or-later
"""Replicated disks over a stand-in for QEMU's block layer: order, errors, what is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.qemu import mirrors
from colo_xdp.qemu.block_layer import ReplicationOptions
from colo_xdp.qemu.disks import DiskError, Mirror
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.mirrors import Copying
from colo_xdp.qemu.overlays import OverlayFiles, ReplicatedDisk
from colo_xdp.qemu.qmp import QemuInfo, QmpError, QmpTimeout
from colo_xdp.qemu.replication import DiskReplication

SIZE = 64 << 20


class Block:
    """A QEMU's block layer, as far as it is asked; one object is both QMP connections."""

    def __init__(self, *disks: str) -> None:
        self.connected = True
        self.said: list[str] = []
        self.disks = {d: {"node-name": f"#block{i}", "ro": False} for i, d in enumerate(disks)}
        self.nodes: set[str] = set()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.exports: dict[str, str] = {}
        self.names: list[str] = []
        self.server = False
        self.iothread: set[str] = set()
        self.scsi, self.ioeventfd = False, True
        self.refuse: dict[str, str] = {}  # command: error
        self.silent: set[str] = set()  # commands without an answer
        self.hangs = False  # the main loop waits for the other host

    async def execute(
        self, command: str, args: Any = None, timeout: float | None = None, *, oob: bool = False
    ) -> Any:
        args = args or {}
        if not command.startswith("query") and command != "qom-get":
            self.said.append(command)
        if command in self.silent or (self.hangs and not oob):
            raise QmpTimeout(f"{command}: no answer in time")
        if command in self.refuse:
            raise QmpError(self.refuse[command])
        return getattr(self, command.replace("-", "_"))(args)

    def query_block(self, args: Any) -> Any:
        return [
            {"device": d, "qdev": f"/machine/peripheral/v{d}/virtio-backend",
             "inserted": {**i, "image": {"virtual-size": SIZE}}}
            for d, i in self.disks.items()
        ]  # fmt: skip

    def query_named_block_nodes(self, args: Any) -> Any:
        return [{"node-name": n, "image": {"actual-size": 1000}} for n in self.nodes]

    def x_debug_query_block_graph(self, args: Any) -> Any:
        names = ["colo-d0-hidden", "#block0", "colo-d1-hidden", "#block1", "#block0-file"]
        edges = [(0, 1, "backing"), (2, 3, "backing"), (1, 4, "file")]
        return {
            "nodes": [{"id": i, "name": n} for i, n in enumerate(names)],
            "edges": [{"parent": p, "child": c, "name": n} for p, c, n in edges],
        }

    def query_block_exports(self, args: Any) -> Any:
        return [{"id": e} for e in self.exports]

    def query_block_jobs(self, args: Any) -> Any:
        return list(self.jobs.values())

    def query_yank(self, args: Any) -> Any:
        targets = [n for n in self.nodes if n.endswith("-target")]
        return [{"type": "migration"}, {"type": "chardev", "id": "c"}] + [
            {"type": "block-node", "node-name": n} for n in targets
        ]

    def yank(self, args: Any) -> None:
        self.yanked = args["instances"]
        self.hangs = False

    def query_iothreads(self, args: Any) -> Any:
        return [{"id": "io0"}] * bool(self.iothread)

    def qom_get(self, args: Any) -> Any:
        if args["property"] == "ioeventfd":
            return self.ioeventfd
        if self.scsi:
            raise QmpError("Property 'scsi-hd.iothread' not found")
        return "/objects/io0" if args["path"].split("/")[3][1:] in self.iothread else ""

    def qom_set(self, args: Any) -> None:
        disk = args["path"].split("/")[3][1:]
        self.disks[disk]["node-name"] = args["value"]

    def blockdev_add(self, args: Any) -> None:
        assert args["node-name"] not in self.nodes
        self.nodes.add(args["node-name"])
        if args["driver"] == "replication":
            self.nodes |= {args["file"]["node-name"], args["file"]["backing"]["node-name"]}

    def blockdev_del(self, args: Any) -> None:
        if any(args["node-name"] == j["target"] for j in self.jobs.values()):
            raise QmpError("Block device is in use")
        self.nodes.discard(args["node-name"])

    def blockdev_mirror(self, args: Any) -> None:
        assert args["copy-mode"] == "write-blocking" and args["sync"] == "full"
        self.jobs[args["job-id"]] = {
            "device": args["job-id"], "type": "mirror", "len": SIZE, "offset": 0, "ready": False,
            "io-status": "ok", "target": args["target"], "source": args["device"],
        }  # fmt: skip

    def job_cancel(self, args: Any) -> None:
        self.jobs.pop(args["id"], None)

    def nbd_server_start(self, args: Any) -> None:
        if self.server:
            raise QmpError("nbd-server-start: GenericError: NBD server already running")
        self.server = True

    def nbd_server_stop(self, args: Any) -> None:
        if not self.server:
            raise QmpError("nbd-server-stop: GenericError: NBD server not running")
        self.server = False
        self.exports.clear()

    def block_export_del(self, args: Any) -> None:
        assert args["mode"] == "hard"
        self.exports.pop(args["id"], None)

    def block_export_add(self, args: Any) -> None:
        assert args["writable"] is True
        self.names.append(args["name"])
        self.exports[args["id"]] = args["node-name"]

    def copied(self) -> None:
        for j in self.jobs.values():
            j.update(offset=SIZE, ready=True)


def make(
    tmp_path: Path, *names: str, version: tuple[int, int, int] = (7, 2, 0)
) -> tuple[DiskReplication, Block]:
    block = Block(*names)
    disks = tuple(ReplicatedDisk(n, str(tmp_path), 1 << 20) for n in names)
    options = ReplicationOptions("p", disks, "127.0.0.1:10809", "127.0.0.1:10810")
    qemu = SimpleNamespace(qmp=block, way_past=block, info=QemuInfo(version, False, "running"))
    d = DiskReplication(options, qemu)  # type: ignore[arg-type]

    async def answers(timeout: float = 1, answer_s: float = 1) -> None:
        if not block.server:
            raise DiskError("no answer")

    d.mirrors.probe = answers  # type: ignore[method-assign]
    return d, block


@pytest.fixture(autouse=True)
def no_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Any, *args: Any) -> None: ...

    monkeypatch.setattr(OverlayFiles, "_as_owner", nothing)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 10))


def event(name: str, **data: Any) -> QmpEvent:
    return QmpEvent(name, data, 1, 1)


def test_a_qemu_without_replicated_disks_is_asked_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path)
        block.silent = {"query-block", "query-block-jobs", "query-yank", "query-block-exports"}
        assert (
            await d.replica.serve() == {}
            and await d.mirrors.copied()
            and await d.mirrors.whole() == ""
        )
        await d.mirrors.cut()
        await d.replica.stop_serving()
        assert not await d.block.committing() and not block.said

    run(body())


def test_the_secondary_is_set_up_once(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", "d1")
        assert await d.replica.serve() == {"d0": SIZE, "d1": SIZE}
        assert block.exports == {"colo-d0": "#block0", "colo-d1": "#block1"}, "the images"
        assert block.disks["d0"]["node-name"] == "colo-d0" and d.replica.serving
        said = list(block.said)
        assert block.names == ["p.d0", "p.d1"], "the pair is part of the name"
        assert await d.replica.serve() == {"d0": SIZE, "d1": SIZE}, "as `ready` is sent again"
        assert block.said == [*said, "nbd-server-start"]
        other, _ = make(tmp_path, "d0", "d1")  # the next controller of this host
        other.block.qemu = d.block.qemu
        assert await other.replica.serve() == {"d0": SIZE, "d1": SIZE}
        await d.replica.stop_serving()
        await d.replica.stop_serving()
        assert not block.exports and not d.replica.serving
        assert "nbd-server-stop" not in block.said, "it hangs while a client is in its handshake"

    run(body())


def test_two_who_set_it_up_at_a_time(tmp_path: Path) -> None:
    """A peer connects while a new QEMU is looked at: each has a reason to send `ready`."""

    async def body() -> None:
        d, block = make(tmp_path, "d0")
        d.replica.files.make = slow = SlowOverlays()  # type: ignore[method-assign,assignment]
        assert await asyncio.gather(d.replica.serve(), d.replica.serve()) == [{"d0": SIZE}] * 2
        assert slow.made == 1 and block.exports == {"colo-d0": "#block0"}

    run(body())


class SlowOverlays:
    made = 0

    async def __call__(self, disk: ReplicatedDisk, size: int) -> tuple[Path, Path]:
        self.made += 1
        await asyncio.sleep(0.01)
        return Path("/active"), Path("/hidden")


@pytest.mark.parametrize("died", ["qom-set", "nbd-server-start", "block-export-add"])
def test_a_controller_that_dies_on_the_way_is_continued(tmp_path: Path, died: str) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", "d1")
        real = block.execute

        async def execute(command: str, *args: Any, **kw: Any) -> Any:
            if command == died:
                raise asyncio.CancelledError
            return await real(command, *args, **kw)

        block.execute = execute  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await d.replica.serve()
        block.execute = real  # type: ignore[method-assign]
        other, _ = make(tmp_path, "d0", "d1")
        other.block.qemu = d.block.qemu
        assert await other.replica.serve() == {"d0": SIZE, "d1": SIZE}
        assert block.exports == {"colo-d0": "#block0", "colo-d1": "#block1"}
        assert {i["node-name"] for i in block.disks.values()} == {"colo-d0", "colo-d1"}

    run(body())


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("absent", "no disk d1"),
        ("iothread", "in an iothread"),
        ("scsi", "may be, in an iothread"),
        ("read-only", "read-only"),
        ("blockdev-add", "gets no overlays: .*of another size"),
        ("qom-set", "gets no overlays: busy"),
        ("nbd-server-start", "NBD server at 127.0.0.1:10809: Address in use"),
        ("block-export-add", "cannot be exported: lock"),
    ],
)
def test_what_the_secondary_cannot_do_is_named(tmp_path: Path, what: str, says: str) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", "d1")
        if what == "absent":
            del block.disks["d1"]
        elif what in ("iothread", "scsi"):
            block.iothread, block.scsi = {"d1"}, what == "scsi"
        elif what == "read-only":
            block.disks["d0"]["ro"] = True
        else:
            block.refuse[what] = {
                "blockdev-add": "of another size", "qom-set": "busy",
                "nbd-server-start": "Address in use", "block-export-add": "lock",
            }[what]  # fmt: skip
        with pytest.raises(DiskError, match=says):
            await d.replica.serve()
        if what == "qom-set":
            assert "colo-d0" not in block.nodes, "it can be tried again"

    run(body())


def test_a_waiting_qemu_that_was_told_to_go_on_is_to_be_started_anew(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.refuse["qom-set"] = "GenericError: Block node is read-only"  # QEMU 7.2
        with pytest.raises(DiskError, match="read-only: .*`cont`.*start it anew.*--paused"):
            await d.replica.serve()

    run(body())


def test_iothreads_are_fine_from_qemu_11_on(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", version=(11, 0, 0))
        block.iothread = {"d0"}
        await d.replica.serve()

    run(body())


def test_the_primary_copies_and_then_every_write_is_on_both(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", "d1")
        block.server = True
        await d.mirrors.start({"d0": SIZE, "d1": SIZE})
        assert not await d.mirrors.copied() and "0 % of 128 MiB" in str(d.mirrors.copying)
        assert "not copied yet" in await d.mirrors.whole()
        block.jobs["colo-d0-mirror"].update(ready=True, offset=SIZE)
        assert not await d.mirrors.copied() and "50 %" in str(d.mirrors.copying)
        block.copied()
        assert (
            await d.mirrors.copied() and d.mirrors.copying is None and await d.mirrors.whole() == ""
        )
        block.jobs["colo-d1-mirror"]["actively-synced"] = False  # QEMU 8.2 and newer
        assert "d1" in await d.mirrors.whole()
        block.jobs["colo-d1-mirror"]["actively-synced"] = True
        assert await d.mirrors.whole() == ""
        await d.mirrors.cut()
        assert not block.jobs and not block.nodes and not d.mirrors.mirroring

    run(body())


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"d0": SIZE - 512}, f"has {SIZE} bytes here, {SIZE - 512} there"),
        ({"d0": SIZE + 512}, "bytes here"),
        ({}, "does not replicate disk d0"),
        ({"d0": SIZE, "d9": 1}, "replicates a disk d9"),
    ],
)
def test_disks_that_differ_are_refused_before_anything_changes(
    tmp_path: Path, theirs: dict[str, int], says: str
) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        with pytest.raises(DiskError, match=says):
            await d.mirrors.start(theirs)
        assert not block.said

    run(body())


def test_a_server_that_does_not_answer_is_found_before_qemu_waits_for_it(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        with pytest.raises(DiskError, match="no answer"):
            await d.mirrors.start({"d0": SIZE})
        assert not block.said

    run(body())


def test_overlays_that_are_still_committed_keep_the_next_copy_waiting(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server, block.nodes = True, {"colo-d0", "colo-d0-active", "colo-d0-hidden"}
        with pytest.raises(DiskError, match="still being committed"):
            await d.mirrors.start({"d0": SIZE})
        block.nodes = {"colo-d0"}  # what a takeover leaves
        await d.mirrors.start({"d0": SIZE})

    run(body())


def test_a_copy_that_begins_in_part_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0", "d1")
        block.server = True
        block.refuse["blockdev-mirror"] = "no permission"
        with pytest.raises(DiskError, match="d0 cannot be copied.*no permission"):
            await d.mirrors.start({"d0": SIZE, "d1": SIZE})
        assert not block.nodes and not d.mirrors.mirroring

    run(body())


@pytest.mark.parametrize(
    "how",
    [
        ("BLOCK_JOB_ERROR", {"device": "colo-d0-mirror", "operation": "write"}),
        ("BLOCK_JOB_COMPLETED", {"device": "colo-d0-mirror", "error": "No space left on device"}),
        ("BLOCK_JOB_COMPLETED", {"device": "colo-d0-mirror"}),
        ("BLOCK_JOB_CANCELLED", {"device": "colo-d0-mirror"}),
    ],
)
def test_a_mirror_that_ends_is_lost_for_good(tmp_path: Path, how: tuple[str, Any]) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        block.copied()
        assert not d.mirrors.on_event(event("BLOCK_JOB_COMPLETED", device="backup0")), "not ours"
        why = d.mirrors.on_event(event(how[0], **how[1]))
        assert "disk d0" in why and await d.mirrors.whole() == why, (
            "though the job may be there still"
        )
        assert not d.mirrors.on_event(event(how[0], **how[1])), "said once"
        with pytest.raises(DiskError, match="d0"):
            await d.mirrors.copied()
        await d.mirrors.cut()
        await d.mirrors.start({"d0": SIZE})
        assert d.mirrors.lost == ""

    run(body())


def test_what_was_whole_is_so_until_qemu_reports_something(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        assert not d.mirrors.still_whole, "nobody has asked"
        assert await d.mirrors.whole() and not d.mirrors.still_whole
        block.copied()
        assert not await d.mirrors.whole() and d.mirrors.still_whole
        d.block.qemu.qmp, kept = Block("d0"), block  # type: ignore[assignment]
        assert not d.mirrors.still_whole, "another connection: an event may have been missed"
        d.block.qemu.qmp = kept  # type: ignore[assignment]
        block.connected = False
        assert not d.mirrors.still_whole
        assert d.mirrors.ended_whole, "QEMU died, and had reported no error"
        block.connected = True
        assert d.mirrors.still_whole and not d.mirrors.ended_whole
        d.mirrors.on_event(event("BLOCK_JOB_ERROR", device="colo-d0-mirror"))
        assert not d.mirrors.still_whole
        block.connected = False
        assert not d.mirrors.ended_whole

    run(body())


@pytest.mark.parametrize("job", [{"error": "x"}, {"io-status": "failed"}, {"paused": True}])
def test_a_mirror_in_trouble_is_not_whole(tmp_path: Path, job: dict[str, Any]) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        block.copied()
        block.jobs["colo-d0-mirror"].update(job)
        assert "d0" in await d.mirrors.whole()
        block.jobs.clear()
        assert await d.mirrors.whole() == "disk d0 is not mirrored"

    run(body())


def test_a_qemu_that_hangs_on_a_write_is_freed_first(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        block.hangs = True
        await d.mirrors.cut()
        kinds = {(i["type"], i.get("node-name")) for i in block.yanked}
        assert kinds == {("migration", None), ("block-node", "colo-d0-target")}, "not the chardev"
        assert not block.jobs and not block.nodes
        assert d.mirrors.on_event(event("BLOCK_JOB_ERROR", device="colo-d0-mirror"))

    run(body())


def test_mirrors_that_do_not_end_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        block.refuse["job-cancel"] = "no"
        with pytest.raises(QmpError, match="colo-d0-mirror, colo-d0-target still there"):
            await d.mirrors.cut()
        assert d.mirrors.mirroring

    monkeypatch.setattr(mirrors, "CUT_S", 0.1)
    run(body())


def test_the_next_controller_finds_the_mirrors(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server = True
        await d.mirrors.start({"d0": SIZE})
        block.copied()
        other, _ = make(tmp_path, "d0")
        other.block.qemu = d.block.qemu
        await other.adopt()
        assert other.mirrors.mirroring and await other.mirrors.whole() == ""
        await other.mirrors.cut()
        assert not block.nodes

    run(body())


@pytest.mark.parametrize("device", ["scsi", "no ioeventfd"])
def test_a_stop_that_comes_before_the_last_write_tells_nothing(tmp_path: Path, device: str) -> None:
    """QEMU drains the disks of most devices after the event."""

    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.server, block.ioeventfd = True, device == "scsi"
        real = block.query_block

        def query_block(args: Any) -> Any:
            found = real(args)
            if device == "scsi":
                found[0]["qdev"] = "/machine/peripheral/vd0"
            return found

        block.query_block = query_block  # type: ignore[method-assign]
        await d.mirrors.start({"d0": SIZE})
        block.copied()
        assert not await d.mirrors.whole() and not d.mirrors.still_whole

    run(body())


def test_a_drive_without_a_medium_is_no_disk(tmp_path: Path) -> None:
    async def body() -> None:
        d, block = make(tmp_path, "d0")
        block.query_block = lambda args: [{"device": "d0", "qdev": "x"}]  # type: ignore[method-assign]
        with pytest.raises(DiskError, match="no disk d0"):
            await d.replica.serve()

    run(body())


def test_progress_as_text() -> None:
    c = Copying()
    assert "0 %" in str(c)
    c.began -= 10
    c.update([Mirror("j", 50 << 20, 100 << 20, False, "")])
    assert "50 % of 100 MiB, 5 MiB/s, 10 s left" in str(c)


def protected(tmp_path: Path) -> tuple[DiskReplication, Block]:
    d, block = make(tmp_path, "d0", "d1")
    block.server = True

    async def body() -> None:
        await d.mirrors.start({"d0": SIZE, "d1": SIZE})
        block.copied()
        assert await d.mirrors.copied()

    run(body())
    return d, block


class At:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_writes_that_none_ends_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d, block = protected(tmp_path)
    clock = At()
    monkeypatch.setattr(mirrors, "time", clock)
    job = block.jobs["colo-d1-mirror"]

    async def body() -> None:
        for _ in range(50):  # one after the other
            job["len"] += 4096
            await d.mirrors.look()
            clock.now += 0.1
            job["offset"] = job["len"]
            assert d.mirrors.silent() == ""
        job["len"] += 4096
        await d.mirrors.look()
        clock.now += 1.9
        await d.mirrors.look()
        assert d.mirrors.silent() == ""
        block.hangs = True  # a checkpoint drains the disks
        with pytest.raises(QmpTimeout):
            await d.mirrors.look()
        clock.now += 0.2
        assert "disk d1" in d.mirrors.silent() and "2.1 s" in d.mirrors.silent()
        await d.mirrors.give_up(d.mirrors.silent())
        assert {i["type"] for i in block.yanked} == {"block-node"}, "the migration goes on"
        assert d.mirrors.lost == ""
        why = d.mirrors.on_event(
            event("BLOCK_JOB_ERROR", device="colo-d0-mirror", operation="write")
        )
        assert "d0 is no longer mirrored: a write to disk d1" in why
        assert await d.mirrors.whole() == why and d.mirrors.silent() == "", "once"

    run(body())


def test_a_first_copy_may_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d, block = make(tmp_path, "d0")
    block.server = True
    clock = At()
    monkeypatch.setattr(mirrors, "time", clock)

    async def body() -> None:
        await d.mirrors.start({"d0": SIZE})
        await d.mirrors.look()
        clock.now += 10
        assert d.mirrors.silent() == ""
        clock.now += 6
        await d.mirrors.give_up(d.mirrors.silent())
        assert d.mirrors.on_event(event("BLOCK_JOB_ERROR", device="colo-d0-mirror"))
        with pytest.raises(DiskError, match="has waited for the secondary"):
            await d.mirrors.copied()
        await d.mirrors.cut()
        await d.mirrors.start({"d0": SIZE})
        assert d.mirrors.silent() == "", "another mirror"

    run(body())


def test_a_qemu_that_serves_has_no_writes_that_wait(tmp_path: Path) -> None:
    d, _ = make(tmp_path, "d0")
    assert d.mirrors.silent() == ""


def test_no_overlay_is_made_without_room_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, block = make(tmp_path, "d0", "d1")
    st = os.statvfs(tmp_path)
    small = SimpleNamespace(f_bavail=3, f_frsize=1 << 20)  # each of both would fit
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with pytest.raises(DiskError, match="disks d0, d1: .* has 3 MiB free, .* 4 MiB more"):
        run(_serve(d))
    assert block.said == []
    monkeypatch.setattr(os, "statvfs", lambda path: st)
    run(_serve(d))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    run(_serve(d))  # a new controller refuses nothing that is there


async def _serve(d: DiskReplication) -> None:
    await d.replica.serve()
