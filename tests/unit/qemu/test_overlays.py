# SPDX-License-Identifier: GPL-2.0-or-later
"""Where overlays may be, and the room for them: disks that share a file system share it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from colo_xdp.qemu.overlays import (
    ReplicatedDisk,
    directory_trouble,
    file_system,
    overlay_paths,
    rooms,
)

MIB = 1 << 20


def test_where_overlays_may_be(tmp_path: Path) -> None:
    assert directory_trouble("d0", str(tmp_path)) == ""
    assert "no directory" in directory_trouble("d0", str(tmp_path / "x"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert directory_trouble("d0", str(tmp_path / "loop"))
    assert file_system(Path("/proc/self")) == "proc"


def test_disks_of_one_file_system_share_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    disks = [
        ReplicatedDisk("d0", str(tmp_path), MIB),
        ReplicatedDisk("d1", str(tmp_path / "other"), 2 * MIB),
    ]
    free = 6 * MIB
    monkeypatch.setattr(os, "statvfs", lambda p: SimpleNamespace(f_bavail=free, f_frsize=1))

    def look() -> tuple[str, bool]:
        (room,) = rooms(disks, lambda d: overlay_paths("p", d))
        assert room.disks == ("d0", "d1")
        return room.trouble, room.running_out

    assert look() == ("", False)
    free -= 1
    why, out = look()
    assert "disks d0, d1" in why and "5 MiB free" in why and "6 MiB more" in why
    assert not out, "a checkpoint would not help: the overlays are empty"
    active, _ = overlay_paths("p", disks[0])
    active.write_bytes(bytes(4 * MIB))
    assert look() == ("", False), "what that one may take is taken"
    free = 3 * MIB
    assert look()[1], "they have taken more than what is left"


def test_each_file_system_counts_by_itself(tmp_path: Path) -> None:
    disks = [ReplicatedDisk("d0", str(tmp_path), MIB), ReplicatedDisk("d1", "/proc", MIB)]
    assert [r.disks for r in rooms(disks, lambda d: overlay_paths("p", d))] == [("d0",), ("d1",)]
    with pytest.raises(OSError):
        rooms([ReplicatedDisk("d2", str(tmp_path / "x"), 1)], lambda d: overlay_paths("p", d))
