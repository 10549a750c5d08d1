# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of the overlays of the secondary's disks: made, removed, and the room for them.

Overlays of several disks may share a file system, and a full one ends the secondary's QEMU. So what
all of them may take is compared with what is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import user_command
from .disks import DiskError, Nodes

log = logging.getLogger("colo_xdp.qemu.overlays")

CREATE_S = 10.0  # qemu-img

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


class OverlayFiles:
    """The overlays' files of all disks of one guest."""

    def __init__(self, pair: str, disks: tuple[ReplicatedDisk, ...]) -> None:
        self._pair, self._disks = pair, disks

    def rooms(self) -> list[Room]:
        """Return the file systems of the overlays, and what is left there."""
        try:
            return rooms(self._disks, self._paths)
        except OSError as e:
            log.warning("overlays: %s", e)
            return []

    def _paths(self, disk: ReplicatedDisk) -> tuple[Path, Path]:
        return overlay_paths(self._pair, disk)

    async def make(self, disk: ReplicatedDisk, size: int) -> tuple[Path, Path]:
        """Make empty overlays of `size` bytes; return the active and the hidden disk.

        They belong to the owner of their directory, as whom QEMU may run. Raises DiskError.
        """
        paths = self._paths(disk)
        create = "qemu-img create -q -f qcow2"  # QEMU writes no file while it waits for a migration
        await self._as_owner(
            disk,
            'command -v qemu-img > /dev/null || exit 127; '
            f'{create} "$1" "$3" && exec {create} "$2" "$3"',
            *map(str, paths), str(size),
        )  # fmt: skip
        return paths

    async def remove_all(self) -> None:
        """Remove the files of overlays that QEMU has committed and closed; failure is no harm."""
        for disk in self._disks:
            with contextlib.suppress(DiskError):
                await self.remove(disk)

    async def remove(self, disk: ReplicatedDisk) -> None:
        """Remove the files of a disk's overlays. Raises DiskError."""
        await self._as_owner(disk, 'rm -f -- "$1" "$2"', *map(str, self._paths(disk)))

    async def _as_owner(self, disk: ReplicatedDisk, script: str, *args: str) -> None:
        """Run a shell command as the owner of the overlays' directory. Raises DiskError."""
        try:
            st = os.stat(disk.overlays)
            owner = st.st_uid, st.st_gid
            argv = ["/bin/sh", "-c", script, "sh", *args]
            command = user_command.overlays(self._pair, argv, int(CREATE_S * 1000), owner)
            change = command == argv and os.geteuid() == 0
            process = await asyncio.create_subprocess_exec(
                *command, env=user_command.environment(), stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, umask=0o077,
                user=owner[0] if change else None, group=owner[1] if change else None,
                extra_groups=() if change else None,
            )  # fmt: skip
            try:
                async with asyncio.timeout(CREATE_S + 1):
                    text, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                raise
        except (OSError, TimeoutError) as e:
            what = "the command does not end" if isinstance(e, TimeoutError) else str(e)
            raise DiskError(f"disk {disk.name}: overlays in {disk.overlays}: {what}") from e
        if process.returncode == 127:
            raise DiskError("qemu-img is missing (Debian: qemu-utils)")
        if process.returncode:
            said = " ".join(text.decode(errors="replace").split()) or "the journal may have why"
            raise DiskError(
                f"disk {disk.name}: overlays in {disk.overlays} cannot be made as their owner "
                f"(uid {owner[0]}): {said}"
            )


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
