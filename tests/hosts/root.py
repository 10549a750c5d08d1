# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a host's root file system: the packages of docs/operator/install.md, and `make install`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from colo_xdp.lab.net import LabError

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
#: what docs/operator/install.md installs first, a QEMU, and what makes it a bootable host
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "iproute2", "procps",
    "python3-bpfcc", "python3-venv", "linux-headers-amd64", "qemu-system-x86",
)  # fmt: skip
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
BUILD_S = 900.0


def _run(*cmd: str) -> None:
    r = subprocess.run(
        cmd, cwd=ROOT, capture_output=True, text=True, check=False, timeout=BUILD_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if r.returncode:
        raise LabError(f"{' '.join(cmd)}: {(r.stdout + r.stderr)[-4000:]}")


def base(directory: Path) -> Path:
    """Build Debian 12 with PACKAGES; once, and again when the list changes.

    Raises LabError with mmdebstrap's output.
    """
    root, stamp = directory / "base", directory / "base.stamp"
    want = hashlib.sha256(repr((SUITE, PACKAGES, LEFT_OUT)).encode()).hexdigest()
    if root.is_dir() and stamp.exists() and stamp.read_text() == want:
        return root
    stamp.unlink(missing_ok=True)
    part = directory / "base.part"
    for old in (root, part):
        shutil.rmtree(old, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    _run(
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        '--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
        *(f"--dpkgopt=path-exclude={p}" for p in LEFT_OUT),
        SUITE, str(part),
    )  # fmt: skip
    part.rename(root)
    stamp.write_text(want)
    return root


def install(root: Path) -> None:
    """Install this tree into that root, as docs/operator/install.md describes."""
    _run("make", "--no-print-directory", "install", f"DESTDIR={root}")


def overlay(base_: Path, directory: Path) -> Path:
    """Provide a root on top of the base; changes of a former one are gone."""
    for sub in ("upper", "work", "root"):
        shutil.rmtree(directory / sub, ignore_errors=True)
        (directory / sub).mkdir(parents=True)
    where = directory / "root"
    layers = f"lowerdir={base_},upperdir={directory / 'upper'},workdir={directory / 'work'}"
    _run("mount", "-t", "overlay", "overlay", "-o", layers, str(where))
    return where


def missing() -> str:
    """Return why hosts cannot be booted here; "" if they can."""
    if os.geteuid():
        return "needs root"
    absent = [c for c in ("systemd-nspawn", "mmdebstrap", "nsenter", "ip") if not shutil.which(c)]
    return f"not installed: {', '.join(absent)}" if absent else ""
