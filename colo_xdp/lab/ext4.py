# SPDX-License-Identifier: GPL-2.0-or-later
"""Make an ext4 image of a directory that is the same, byte for byte, wherever it is made.

`mke2fs -d` would put files in the order in which the host's file system lists them, with the times
at which they came to the host. debugfs does what it is told, in the order in which it is told.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .net import LabError, sh

#: of every file, s: the release of Debian 12
TIME = 1686355200
#: as good as any other
UUID = "c0109d0a-0000-4000-8000-000000000001"
BUILD_S = 300.0


def _quoted(path: str) -> str:
    if '"' in path or "\n" in path:
        raise LabError(f"debugfs cannot be told of a file {path!r}")
    return f'"{path}"'


def _create(path: Path, st: os.stat_result) -> str:
    name = _quoted(path.name)
    if stat.S_ISDIR(st.st_mode):
        return f"mkdir {name}"
    if stat.S_ISLNK(st.st_mode):
        return f"symlink {name} {_quoted(os.readlink(path))}"
    if stat.S_ISREG(st.st_mode):
        return f"write {_quoted(str(path))} {name}"
    if stat.S_ISCHR(st.st_mode):
        return f"mknod {name} c {os.major(st.st_rdev)} {os.minor(st.st_rdev)}"
    raise LabError(f"{path} is of a kind that no image gets here")


def commands(root: Path, inside: str = "/") -> Iterator[str]:
    """Return what debugfs is told, to write the directory into an empty file system."""
    yield f"cd {_quoted(inside)}"
    directories = []
    for path in sorted(root.iterdir()):
        st = path.lstat()
        yield _create(path, st)
        fields = {"mode": f"0{st.st_mode:o}", "uid": st.st_uid, "gid": st.st_gid}
        fields |= dict.fromkeys(("atime", "mtime", "ctime", "crtime"), f"@{TIME}")
        for field, value in fields.items():
            yield f"sif {_quoted(path.name)} {field} {value}"
        if stat.S_ISDIR(st.st_mode):
            directories.append(path)
    for path in directories:
        yield from commands(path, f"{inside.rstrip('/')}/{path.name}")


def make_image(root: Path, image: Path, size_mib: int) -> None:
    """Make a qcow2 image with the contents of a directory, on ext4. Raises LabError."""
    env = {**os.environ, "E2FSPROGS_FAKE_TIME": str(TIME)}
    with tempfile.TemporaryDirectory(dir=image.parent) as tmp:
        raw, script = Path(tmp) / "raw", Path(tmp) / "script"
        with raw.open("wb") as f:
            f.truncate(size_mib << 20)
        script.write_text("\n".join(commands(root.absolute())) + "\n")
        for cmd in (
            ["mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", f"hash_seed={UUID}", str(raw)],
            ["debugfs", "-w", "-f", str(script), str(raw)],
        ):
            r = subprocess.run(
                cmd, capture_output=True, text=True, check=False, env=env, timeout=BUILD_S
            )
            # debugfs ends with 0 in any case; its version is the one line that is no error
            said = [x for x in r.stderr.splitlines() if not x.startswith("debugfs 1.")]
            if r.returncode or said:
                raise LabError(f"{cmd[0]}: {' '.join(said[-5:])}")
        sh("e2fsck", "-fn", str(raw))
        sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
