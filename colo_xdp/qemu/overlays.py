# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the overlays of the secondary's disks are: their files, and the room for them.

Overlays of several disks may share a file system, and a full one ends the secondary's QEMU. So what
all of them may take is compared with what is free.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .disks import Nodes

#: file systems without reliable locks, or that may hang: not for overlays
NETWORK_FS = (
    "nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "fuse.glusterfs", "gfs2", "ocfs2",
    "lustre",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReplicatedDisk:
    """One disk; `overlay_limit` in bytes."""

    name: str
    overlays: str
    overlay_limit: int


OverlayPaths = Callable[[ReplicatedDisk], tuple[Path, Path]]


@dataclass(frozen=True, slots=True)
class Room:
    """A file system with overlays: what is free, what they take, what they may take yet. Bytes."""

    where: str  # the directory of the first of its disks
    disks: tuple[str, ...]
    free: int
    taken: int
    wanted: int

    @property
    def trouble(self) -> str:
        """Why this is not enough, or an empty string."""
        if self.free >= self.wanted:
            return ""
        names = (
            f"disk {self.disks[0]}" if len(self.disks) == 1 else f"disks {', '.join(self.disks)}"
        )
        return (
            f"{names}: {self.where} has {self.free >> 20} MiB free, and the overlays there, two of "
            f"each disk, may take {self.wanted >> 20} MiB more (overlay_limit)"
        )

    @property
    def running_out(self) -> bool:
        """Whether a checkpoint is due, as the overlays take more than what is left for them."""
        return bool(self.trouble) and self.taken > self.free


def directory_trouble(name: str, where: str) -> str:
    """Return why overlays of disk `name` cannot be in a directory, or an empty string."""
    try:
        if not Path(where).is_dir():
            return f"disk {name}: {where} is no directory (overlays)"
        kind = file_system(Path(where))
        if kind in NETWORK_FS:
            return f"disk {name}: {where} is on a network ({kind}): use a local one"
        os.statvfs(where)
    except OSError as e:
        return f"disk {name}: {where}: {e.strerror or e} (overlays)"
    return ""


def overlay_paths(pair: str, disk: ReplicatedDisk) -> tuple[Path, Path]:
    """Return the files of a disk's overlays: the active and the hidden disk."""
    stem, where = f"{pair}-{Nodes.of(disk.name).stem}", Path(disk.overlays)
    return where / f"{stem}-active.qcow2", where / f"{stem}-hidden.qcow2"


def rooms(disks: Iterable[ReplicatedDisk], paths: OverlayPaths) -> list[Room]:
    """Return the file systems in which the overlays of these disks are or will be.

    `paths` tells the two files of a disk, which may exist. Raises OSError.
    """
    found: dict[int, Room] = {}
    for disk in disks:
        key = os.stat(disk.overlays).st_dev
        sizes = [_allocated(p) for p in paths(disk)]
        wanted = sum(max(0, disk.overlay_limit - s) for s in sizes)
        room = found.get(key)
        if room is None:
            st = os.statvfs(disk.overlays)
            room = Room(disk.overlays, (), st.f_bavail * st.f_frsize, 0, 0)
        found[key] = replace(
            room, disks=(*room.disks, disk.name), taken=room.taken + sum(sizes),
            wanted=room.wanted + wanted,
        )  # fmt: skip
    return list(found.values())


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def file_system(path: Path) -> str:
    """Return the type of the file system of a path (proc(5), mountinfo), or an empty string."""
    real, best = os.path.realpath(path), ("", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            mount = left.split()[4]
            below = real == mount or real.startswith(mount.rstrip("/") + "/")
            if below and len(mount) >= len(best[0]):
                best = mount, right.split()[0]
    return best[1]
