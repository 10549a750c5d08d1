# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a Debian guest whose root is the replicated disk: nothing in it is ours but the services."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from colo_xdp.lab import debian
from colo_xdp.lab.client import RecordStream
from colo_xdp.lab.net import sh, wait_for
from tests.e2e.conftest import LabMaker

WHY = debian.missing()


def moves(records: RecordStream, count: int = 30) -> None:
    want = records.last + count
    wait_for("records", lambda: records.dead or records.last >= want, 60)
    assert records.dead == ""


def damaged(image: Path, base: Path, tmp: Path) -> list[str]:
    """Return the files of the packages that are not on an image as they were installed."""
    raw = tmp / "raw"
    sh("qemu-img", "convert", "-U", "-O", "raw", str(image), str(raw))
    sh("e2fsck", "-y", "-E", "journal_only", str(raw), check=False)
    sh("debugfs", "-R", f"rdump /usr {tmp}", str(raw), check=False)
    files = [f for f in (base / "usr").rglob("*") if f.is_file() and not f.is_symlink()]
    assert len(files) > 1000

    def same(f: Path) -> bool:
        there = tmp / f.relative_to(base)
        return there.is_file() and filecmp.cmp(f, there, shallow=False)

    return [str(f.relative_to(base)) for f in files if not same(f)]


@pytest.mark.timeout(400)  # with the image, which is built once
@pytest.mark.skipif(bool(WHY), reason=WHY)
def test_a_debian_guest_outlives_its_host_with_its_root(make_lab: LabMaker, tmp_path: Path) -> None:
    """The survivor loses its power, too: the journal has to be replayed."""
    lab = make_lab(guest="debian", disks=1)
    lab.protect()
    records = RecordStream(lab.net.client)
    moves(records)
    lab.ask("primary", "checkpoint")
    moves(records)
    lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 30)
    moves(records)
    assert "running" in lab.client.run("systemctl is-system-running")
    assert lab.client.download("f1m") == (1 << 20, 0)
    wait_for("merged overlays", lambda: not lab.status("secondary")["disks"]["committing"], 60)
    moves(records)
    records.stop()
    lab.vm["secondary"].kill9()
    found = lab.check_disk("secondary", "d0", records.confirmed)
    print(f"{records.last} records, longest {records.longest_s * 1e3:.0f} ms, {found}")
    assert found.good and not found.clean
    assert damaged(lab.image("secondary", "d0"), lab.build / "debian", tmp_path) == []
