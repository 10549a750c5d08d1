# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a guest with disks keeps what it has confirmed, whichever host dies."""

from __future__ import annotations

import os
import signal
import socket

from colo_xdp.lab import disk
from colo_xdp.lab.client import RecordStream
from colo_xdp.lab.net import PEER_S, in_ns, wait_for
from colo_xdp.lab.pair import NBD_PORT, Lab
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
            assert verdict.good and s.last > 50


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
