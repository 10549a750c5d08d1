# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a host's root file system: Debian, and this tree by its package or by `make install`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from colo_xdp.lab import debian
from colo_xdp.lab.net import LabError

ROOT = Path(__file__).parents[2]
#: what `make install` needs, a QEMU, what makes it a bootable host that others copy files to, and
#: shells that complete
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "iproute2", "procps",
    "python3-bpfcc", "python3-venv", "linux-headers-amd64", "qemu-system-x86",
    "qemu-utils", "openssh-client", "openssh-server",
    "bash-completion", "fish", "zsh",
)  # fmt: skip
#: where `inside` puts the directory of the packages
PACKAGES_DIR = "/packages"
BUILD_S = 900.0


def _run(*cmd: str) -> str:
    r = subprocess.run(
        cmd, cwd=ROOT, capture_output=True, text=True, check=False, timeout=BUILD_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if r.returncode:
        raise LabError(f"{' '.join(cmd)}: {(r.stdout + r.stderr)[-4000:]}")
    return r.stdout


def base(directory: Path, suite: str = debian.SUITE) -> Path:
    """Build a release of Debian with PACKAGES; once, and again when the list changes."""
    name = "base" if suite == debian.SUITE else f"base-{suite}"
    return debian.bootstrap(directory / name, debian.Packages(PACKAGES, suite=suite))


def install(root: Path) -> None:
    """Install this tree into that root by `make install`."""
    _run("make", "--no-print-directory", "install", f"DESTDIR={root}")


@cache
def package() -> Path:
    """Build this tree's package, once in a process."""
    _run("make", "--no-print-directory", "deb")
    (deb,) = (ROOT / "build/deb").glob("*.deb")
    return deb


def repack(deb: Path, target: Path, version: str, change: Callable[[Path], None]) -> Path:
    """Make another version of a package, in which `change` has edited what it installs."""
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "tree"
        _run("dpkg-deb", "--raw-extract", str(deb), str(tree))
        control = tree / "DEBIAN/control"
        text, n = re.subn(r"^Version: .*$", f"Version: {version}", control.read_text(), flags=re.M)
        assert n == 1
        control.write_text(text)
        change(tree)
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(target))
    return target


def inside(root: Path, *cmd: str, packages: Path, options: tuple[str, ...] = ()) -> str:
    """Run a command in a root that is not booted; return what it says. Raises LabError.

    systemd-nspawn itself may have something to say at standard error, which is no output of it.
    """
    return _run(
        "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", "--as-pid2",
        f"--directory={root}", f"--machine=colo-xdp-{os.getpid()}", "--capability=all",
        "--resolv-conf=replace-host", "--timezone=off",
        "--system-call-filter=bpf perf_event_open",
        f"--bind-ro={packages}:{PACKAGES_DIR}", *options,
        "--setenv=DEBIAN_FRONTEND=noninteractive", "--setenv=LC_ALL=C.UTF-8", "--",
        "sh", "-c", 'exec "$@" 2>&1', "sh", *cmd,
    )  # fmt: skip


def install_package(root: Path, deb: Path, *options: str) -> str:
    """Install a package into that root with what it depends on, as docs/operator/install.md does.

    Returns what apt says. With the option --download-only a host without a way to the archive can
    install it afterwards.
    """
    # the base leaves documents out, which would hold for this package, too
    for f in (root / "etc/dpkg/dpkg.cfg.d").glob("*mmdebstrap*"):
        f.unlink()
    inside(root, "apt-get", "--quiet", "update", packages=deb.parent)
    return inside(
        root, "apt-get", "--quiet", "--yes", "--no-install-recommends", *options, "install",
        f"{PACKAGES_DIR}/{deb.name}", packages=deb.parent,
    )  # fmt: skip


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
