# SPDX-License-Identifier: GPL-2.0-or-later
"""Disk images of the lab's guests: made, and checked from outside the guest.

The guest's recordd writes a record and a block for each number that a client sends. Here each of
them is looked for in the image that has survived, with the file system's own tools.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .net import LabError, sh

SIZE_MIB = 64
BLOCKS, BLOCK, RECORD = 512, 4096, 16  # of recordd.c


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def make_filesystem(path: Path, size_mib: int = SIZE_MIB) -> None:
    """Make a qcow2 image with an empty ext4 file system. Raises LabError."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".raw") as raw:
        raw.truncate(size_mib << 20)
        sh("mke2fs", "-q", "-F", "-t", "ext4", raw.name)
        path.unlink(missing_ok=True)
        sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw.name, str(path))


def make_blank(path: Path, size_mib: int = SIZE_MIB) -> None:
    """Make an empty qcow2 image. Raises LabError."""
    path.unlink(missing_ok=True)
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{size_mib}M")


@dataclass
class Verdict:
    """What an image that has survived contains."""

    clean: bool = False  # unmounted: there was no journal to be replayed
    fsck_errors: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # acknowledged, and not there
    wrong_blocks: list[int] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.fsck_errors or self.lost or self.wrong_blocks)


def check(image: Path, acknowledged: Iterable[int], directory: str = "") -> Verdict:
    """Check an image that no QEMU uses: its file system, each record, each block.

    The journal is replayed on a copy first, as a mount would do, unless the guest has unmounted it.
    `directory`: where the records are on it, "" for the top.
    """
    verdict = Verdict()
    with tempfile.TemporaryDirectory(dir=image.parent) as tmp:
        raw = Path(tmp) / "raw"
        sh("qemu-img", "convert", "-U", "-O", "raw", str(image), str(raw))
        verdict.clean = "needs_recovery" not in sh("dumpe2fs", "-h", str(raw))
        if not verdict.clean:
            sh("e2fsck", "-y", "-E", "journal_only", str(raw), check=False)
        fsck = subprocess.run(
            ["e2fsck", "-fn", str(raw)], capture_output=True, text=True, check=False
        )
        if fsck.returncode:
            verdict.fsck_errors = fsck.stdout.splitlines()[-8:]
        files = {}
        for name in ("log", "data"):
            out = Path(tmp) / name
            sh("debugfs", "-R", f"dump {directory}/{name} {out}", str(raw), check=False)
            if not out.exists():
                raise LabError(f"{image}: no file {directory}/{name}")
            files[name] = out.read_bytes()
    newest: dict[int, int] = {}
    for n in sorted(acknowledged):
        if files["log"][n * RECORD : (n + 1) * RECORD] != b"%015d\n" % n:
            verdict.lost.append(n)
        newest[_mix(n) % BLOCKS] = n
    for block, n in newest.items():
        words = files["data"][block * BLOCK : (block + 1) * BLOCK]
        value = struct.unpack("<1024I", words.ljust(BLOCK, b"\0"))
        # A later number may have been written that nobody was told of any more.
        right = value[0] >= n and _mix(value[0]) % BLOCKS == block
        if not right or any(v != _mix((value[0] * 1024 + i) & 0xFFFFFFFF)
                            for i, v in enumerate(value) if i):  # fmt: skip
            verdict.wrong_blocks.append(block)
    return verdict
