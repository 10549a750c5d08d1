# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a guest with disks keeps what it has confirmed, whichever host dies."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.lab import disk
from colo_xdp.lab.client import RecordStream
from colo_xdp.lab.net import PEER_S, LabError, in_ns, sh, wait_for
from colo_xdp.lab.pair import NBD_PORT, PAIR, Lab
from tests.e2e.conftest import LabMaker
from tests.e2e.test_reprotect import other, protected


class Writer:
    """A client of each disk's records, and the check of the image that survives."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.streams = {
            name: RecordStream(lab.net.client, 2001 + i) for i, name in enumerate(lab.disks)
        }

    def moves(self, records: int = 20) -> None:
        """Wait until further records are confirmed on each disk."""
        for name, s in self.streams.items():
            want = s.last + records
            wait_for(f"records on {name}", lambda s=s, w=want: s.dead or s.last >= w, 40)  # type: ignore[misc]
            assert s.dead == ""

    def check(self, role: str) -> None:
        """End the guest's QEMU and look at its images."""
        for s in self.streams.values():
            s.stop()
            assert s.dead == ""
        self.lab.vm[role].stop()
        for name, s in self.streams.items():
            verdict = disk.check(self.lab.image(role, name), s.confirmed)
            print(f"{name}: {s.last} records, longest {s.longest_s * 1e3:.0f} ms, {verdict}")
            assert verdict.good and s.last > 20


def committed(lab: Lab, role: str) -> None:
    wait_for("overlays to be committed", lambda: not lab.status(role)["disks"]["committing"], 30)


def test_records_survive_takeovers_and_a_switchover(make_lab: LabMaker) -> None:
    lab = make_lab(disks=2)
    lab.protect()
    w = Writer(lab)
    pvm = "primary"
    for how in ("kill", "switchover", "kill"):
        svm = other(pvm)
        for _ in range(2):
            w.moves()
            lab.ask(pvm, "checkpoint")
        w.moves()
        if how == "kill":
            lab.vm[pvm].kill9()
        else:
            lab.ask(pvm, "switchover")
        lab.wait_state(svm, "promoted", 15)
        w.moves()
        committed(lab, svm)
        lab.vm[pvm].stop()
        lab.start_vm(pvm, incoming=True)
        protected(lab)
        w.moves()
        pvm = svm
    w.check(pvm)


def test_a_primary_goes_on_without_a_secondary_that_hangs(make_lab: LabMaker) -> None:
    """Each write waits for it until it is cut off."""
    lab = make_lab(disks=1)
    lab.protect()
    w = Writer(lab)
    w.moves()
    lab.ask("primary", "checkpoint")
    lab.vm["secondary"].signal(signal.SIGSTOP)
    lab.wait_state("primary", "solo", 30)
    w.moves()
    lab.vm["secondary"].kill9()
    lab.start_vm("secondary")
    protected(lab)
    w.moves()
    w.check("primary")


def test_a_mirror_that_is_lost_alone_is_a_lost_secondary(make_lab: LabMaker) -> None:
    """QEMU goes on with its checkpoints as if nothing were, over disks that are old."""
    lab = make_lab(disks=1)
    lab.protect()
    w = Writer(lab)
    w.moves()
    lab.vm["secondary"].ask("block-export-del", id="colo-d0", mode="hard")
    said = lab.wait_state("primary", "solo", 15)
    assert said["disks"]["mirrored"] is False
    log = lab.controller_log("primary").read_text()
    assert "disk d0 is no longer mirrored" in log
    w.moves()
    lab.wait_state("secondary", "stopped", 15)
    lab.vm["secondary"].stop()
    lab.start_vm("secondary")
    protected(lab)
    w.moves()
    # A stranger's handshake with the NBD server must not be in the way of the takeover.
    with in_ns(
        lab.net.primary, lambda: socket.create_connection((PEER_S, NBD_PORT), 5)
    ) as stranger:
        assert stranger.recv(8) == b"NBDMAGIC"
        lab.vm["primary"].kill9()
        lab.wait_state("secondary", "promoted", 15)
        w.moves()
    committed(lab, "secondary")
    w.check("secondary")


def fill(lab: Lab, mib: int) -> None:
    """Let the guest write a file beside the records."""
    where = f"of=/mnt/vda/fill bs=1M count={mib} conv=fsync"
    lab.client.run(f"dd if=/dev/urandom {where} && rm /mnt/vda/fill")


def test_overlays_are_emptied_before_they_are_too_large(make_lab: LabMaker) -> None:
    lab = make_lab(disks=1, overlay_limit=12)
    lab.protect()
    w = Writer(lab)
    w.moves()
    before = lab.status("primary")["checkpoints"]["by_cause"]["overlay_full"]
    fill(lab, 24)
    wait_for(
        "a checkpoint for the overlays",
        lambda: lab.status("primary")["checkpoints"]["by_cause"]["overlay_full"] > before,
        20,
    )
    wait_for(
        "small overlays", lambda: lab.status("secondary")["disks"]["overlays"]["d0"] < 12 << 20, 20
    )
    protected(lab)
    w.moves()
    w.check("primary")


def test_what_cannot_be_replicated_is_refused_by_name(make_lab: LabMaker) -> None:
    """Before anything is changed, and the guest runs on; what is mended is used by itself."""
    lab = make_lab(disks=1)
    disk.make_blank(lab.image("secondary", "d0").with_suffix(".small"), disk.SIZE_MIB - 1)
    small = lab.image("secondary", "d0").with_suffix(".small")
    right = lab.image("secondary", "d0").read_bytes()
    lab.vm["secondary"].stop()
    lab.image("secondary", "d0").write_bytes(small.read_bytes())
    lab.start_vm("secondary")
    for role in ("secondary", "primary"):
        lab.start_controller(role)
    why = f"disk d0 has {disk.SIZE_MIB << 20} bytes here, {disk.SIZE_MIB - 1 << 20} there"
    wait_for("a refusal", lambda: why in lab.status("primary").get("reason", ""), 60)
    w = Writer(lab)
    w.moves()
    lab.vm["secondary"].stop()
    lab.image("secondary", "d0").unlink()
    os.link(lab.image("primary", "d0"), lab.image("secondary", "d0"))  # one file on both hosts
    lab.start_vm("secondary")
    wait_for("a refusal", lambda: "lock" in lab.status("secondary").get("reason", ""), 60)
    assert "disk d0 cannot be exported" in lab.status("secondary")["reason"]
    w.moves()
    lab.vm["secondary"].stop()
    lab.image("secondary", "d0").unlink()
    lab.image("secondary", "d0").write_bytes(right)
    lab.start_vm("secondary")
    protected(lab)
    w.moves()
    w.check("primary")


def test_a_silent_nbd_connection_costs_its_deadline(make_lab: LabMaker) -> None:
    """Its packets are dropped, and everything else between the hosts lives."""
    lab = make_lab(disks=1, overrides={"nbd": {"write_timeout": 1000}})
    lab.protect()
    w = Writer(lab)
    w.moves()
    lab.ask("primary", "checkpoint")
    w.moves()
    (s,) = w.streams.values()
    s.longest_s = 0.0
    with lab.net.port_cut(NBD_PORT):
        lab.wait_state("primary", "solo", 15)
        w.moves()
        log = lab.controller_log("primary").read_text()
        assert (
            "disk d0 is no longer mirrored: a write to disk d0 has waited for the secondary" in log
        )
        assert lab.status("secondary")["state"] == "stopped"
        print(f"the longest record took {s.longest_s * 1e3:.0f} ms")
        assert s.longest_s < 2
    lab.vm["secondary"].stop()
    lab.start_vm("secondary")
    protected(lab)
    w.moves()
    w.check("primary")


def test_a_full_file_system_of_overlays_costs_the_copy_only(make_lab: LabMaker) -> None:
    lab = make_lab(disks=2, overlay_limit=8)
    where = lab.work / "secondary.overlays"
    sh("mount", "-t", "tmpfs", "-o", "size=30m", "overlays", str(where))
    try:
        for role in ("secondary", "primary"):
            lab.start_controller(role)
        why = "disks d0, d1: .* has (29|30) MiB free, .* may take 32 MiB more"
        wait_for("a refusal", lambda: re.search(why, lab.status("primary").get("reason", "")), 60)
        sh("mount", "-o", "remount,size=40m", str(where))
        for role in ("primary", "secondary"):
            lab.wait_state(role, "protected")
        w = Writer(lab)
        w.moves()
        assert lab.status("secondary")["disks"]["room_trouble"] == ""
        (where / "other").write_bytes(bytes(32 << 20))
        wait_for(
            "a warning", lambda: "d0, d1" in lab.status("secondary")["disks"]["room_trouble"], 20
        )
        before = lab.status("primary")["checkpoints"]["by_cause"]["overlay_full"]
        wait_for(
            "checkpoints that empty the overlays",
            lambda: lab.status("primary")["checkpoints"]["by_cause"]["overlay_full"] > before + 1,
            40,
        )
        assert lab.status("primary")["state"] in ("protected", "checkpointing")

        def full() -> bool:
            with (where / "other").open("ab", buffering=0) as f, contextlib.suppress(OSError):
                while True:
                    f.write(bytes(1 << 16))
            return bool(lab.status("primary").get("state") == "solo")

        wait_for("the loss of the copy", full, 40)
        (where / "other").unlink()
        w.moves()
        lab.vm["secondary"].stop()
        lab.start_vm("secondary")
        protected(lab)
        w.moves()
        w.check("primary")
    finally:
        lab.down()
        sh("umount", "-l", str(where))


def test_a_disk_that_comes_while_protected_ends_the_protection(
    make_lab: LabMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refuses a device, but not another medium, and nobody keeps its copies equal."""
    medium = tmp_path / "medium.raw"
    medium.write_bytes(bytes(1 << 20))
    drive = f"file={medium},format=raw,if=none,id=m0,readonly=on"
    removable = ["-device", "virtio-scsi-pci,id=sc0", "-drive", drive]
    removable += ["-device", "scsi-hd,drive=m0,id=vm0,bus=sc0.0,removable=on"]
    plain = Lab._drive
    monkeypatch.setattr(Lab, "_drive", lambda lab, role, d: [*plain(lab, role, d), *removable])
    lab = make_lab(disks=1)
    lab.protect()
    w = Writer(lab)
    w.moves()
    pvm = lab.vm["primary"]
    new = {role: lab.work / f"{role}.new.raw" for role in ("primary", "secondary")}
    for image in new.values():
        image.write_bytes(bytes(1 << 20))
    pvm.ask("blockdev-add", driver="file", filename=str(new["primary"]), **{"node-name": "new"})
    with pytest.raises(LabError, match="not allowed while migrating"):
        pvm.ask("device_add", driver="virtio-blk-pci", drive="new", id="vnew", addr="0x10")
    pvm.ask("blockdev-del", **{"node-name": "new"})
    assert lab.status("primary")["state"] in ("protected", "checkpointing")
    for role in ("secondary", "primary"):
        lab.vm[role].ask(
            "blockdev-change-medium", id="vm0", filename=str(new[role]),
            **{"format": "raw", "read-only-mode": "read-write"},
        )  # fmt: skip
    lab.wait_state("primary", "solo", 40)
    log = lab.controller_log("primary").read_text()
    assert re.search("disk (m0|vm0|#block[0-9]+) .*new.raw, is writable", log)
    w.moves()
    lab.vm["secondary"].stop()
    lab.start_vm("secondary")
    wait_for(
        "a refusal", lambda: "new.raw, is writable" in lab.status("primary").get("reason", ""), 60
    )
    w.moves()
    w.check("primary")


@contextlib.contextmanager
def own_file_system(lab: Lab, role: str, size_mib: int = 200) -> Iterator[Path]:
    """Put a host's images on a file system of their own, which `fsfreeze` can let hang."""
    where, store = lab.work / f"{role}.images", lab.work / f"{role}.store"
    where.mkdir(exist_ok=True)
    with store.open("wb") as f:
        f.truncate(size_mib << 20)
    sh("mke2fs", "-q", "-F", "-t", "ext4", str(store))
    sh("mount", "-o", "loop", str(store), str(where))
    lab.vm[role].stop()
    for name in lab.disks:
        image = lab.image(role, name)
        shutil.copyfile(image, where / image.name)
        image.unlink()
        image.symlink_to(where / image.name)
    lab.start_vm(role)
    try:
        yield where
    finally:
        sh("fsfreeze", "-u", str(where), check=False)
        lab.down()
        sh("umount", "-l", str(where), check=False)


def test_storage_of_the_secondary_that_hangs_costs_its_deadline(make_lab: LabMaker) -> None:
    """Its QEMU and the connection live; only the file system of its image takes no more writes."""
    lab = make_lab(disks=1, overrides={"nbd": {"write_timeout": 1000}})
    with own_file_system(lab, "secondary") as where:
        lab.protect()
        w = Writer(lab)
        w.moves()
        lab.ask("primary", "checkpoint")
        w.moves()
        (s,) = w.streams.values()
        s.longest_s = 0.0
        sh("fsfreeze", "-f", str(where))
        lab.wait_state("primary", "solo", 15)
        w.moves()
        print(f"the longest record took {s.longest_s * 1e3:.0f} ms")
        assert s.longest_s < 3
        sh("fsfreeze", "-u", str(where))
        lab.vm["secondary"].stop()
        lab.start_vm("secondary")
        protected(lab)
        w.moves()
        w.check("primary")


def merge_by_hand(image: Path, overlays: Path) -> str:
    """Return the commands of docs/operator/disks.md, for these files."""
    text = (Path(__file__).parents[2] / "docs/operator/disks.md").read_text()
    _, _, after = text.partition("### A survivor that dies before it has merged")
    block = re.search(r"(?:^    .*\n)+", after, re.M)
    assert block
    commands = block[0]
    for old, new in (("/var/lib/vm/web1.qcow2", image), ("/var/lib/colo-xdp/overlays", overlays)):
        assert old in commands
        commands = commands.replace(old, str(new))
    return commands.replace("web1-", f"{PAIR}-")


def test_the_merge_by_hand_brings_back_what_only_the_overlays_have(tmp_path: Path) -> None:
    """An image of which a part is merged, and blocks of all kinds.

    The hidden disk has what the image had at the last checkpoint, the active disk what the SVM has
    written since. The image may have writes of a PVM that nobody was told of.
    """
    stem = f"{PAIR}-colo-d0"
    image, active, hidden = (
        tmp_path / x for x in ("image", f"{stem}-active.qcow2", f"{stem}-hidden.qcow2")
    )
    for path in (image, active, hidden):
        sh("qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M")
    written = {image: "01234567", hidden: "  2345  ", active: "   34 6 "}  # a MiB each
    merged = "3"
    for n, (path, blocks) in enumerate(written.items(), 1):
        for at, block in enumerate(blocks):
            if block != " ":
                value = 3 if path is image and block in merged else n
                sh("qemu-io", "-f", "qcow2", "-c", f"write -q -P {value} {at}M 1M", str(path))
    sh("sh", "-ec", merge_by_hand(image, tmp_path))
    for at, want in enumerate((1, 1, 2, 3, 3, 2, 3, 1)):
        said = sh("qemu-io", "-f", "qcow2", "-c", f"read -P {want} {at}M 1M", str(image))
        assert "verification failed" not in said, f"block {at}"
    assert not active.exists() and not hidden.exists()


def test_what_a_dead_survivor_leaves_is_merged_by_hand(make_lab: LabMaker) -> None:
    """What docs/operator/disks.md says works on the files that a real SVM has written."""
    lab = make_lab(disks=1)
    lab.protect()
    w = Writer(lab)
    w.moves()
    lab.ask("primary", "checkpoint")
    w.moves(60)
    for role in ("secondary", "primary"):  # so that it has merged nothing
        lab.vm[role].kill9()
    (s,) = w.streams.values()
    s.stop()
    overlays, image = lab.work / "secondary.overlays", lab.image("secondary", "d0")
    assert len(list(overlays.iterdir())) == 2
    sh("sh", "-ec", merge_by_hand(image, overlays))
    assert disk.check(image, s.confirmed).good and s.last >= 80
