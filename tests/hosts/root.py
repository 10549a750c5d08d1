# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a host's root file system: the packages of docs/operator/install.md, and `make install`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from colo_xdp.lab import debian
from colo_xdp.lab.net import LabError

ROOT = Path(__file__).parents[2]
#: what docs/operator/install.md installs first, a QEMU, and what makes it a bootable host
PACKAGES = debian.Packages((
    "systemd", "systemd-sysv", "dbus", "iproute2", "procps",
    "python3-bpfcc", "python3-venv", "linux-headers-amd64", "qemu-system-x86",
))  # fmt: skip
BUILD_S = 900.0


def _run(*cmd: str) -> None:
    r = subprocess.run(
        cmd, cwd=ROOT, capture_output=True, text=True, check=False, timeout=BUILD_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if r.returncode:
        raise LabError(f"{' '.join(cmd)}: {(r.stdout + r.stderr)[-4000:]}")


def base(directory: Path) -> Path:
    """Build Debian 12 with PACKAGES; once, and again when the list changes."""
    return debian.bootstrap(directory / "base", PACKAGES)


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
    return debian.missing(("systemd-nspawn", "mmdebstrap", "nsenter", "ip"))
