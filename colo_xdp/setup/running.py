# SPDX-License-Identifier: GPL-2.0-or-later
"""Look at a guest that runs here: a QEMU by its process, or a domain of libvirt by its name."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from . import libvirt_domain, qemu_arguments
from .guest import Guest
from .transaction import InstallError

VIRSH_S = 15.0
QMP_S = 3.0


def bridge_of(tap: str) -> str:
    """Return the bridge in which a device is, or an empty string."""
    try:
        return os.path.basename(os.readlink(f"/sys/class/net/{tap}/master")) if tap else ""
    except OSError:
        return ""


def _with_bridges(g: Guest) -> Guest:
    nics, left = [], list(g.left)
    for nic in g.nics:
        bridge = nic.bridge or bridge_of(nic.tap)
        if bridge and not nic.bridge:
            left.append(f"{g.origin}: {nic.tap} is in {bridge} now; a pair's tap is in no bridge "
                        "at boot, the controller puts it there")  # fmt: skip
        nics.append(replace(nic, bridge=bridge))
    return replace(g, nics=tuple(nics), left=tuple(left))


def _absolute(argv: list[str], cwd: str) -> list[str]:
    """Make the program's own path and those of files in options absolute, where they exist."""

    def path(m: re.Match[str]) -> str:
        there = os.path.join(cwd, m[2])
        return m[1] + (there if os.path.exists(there) else m[2])

    return [re.sub(r"(\bfile=|\bfilename=|\bpath=)([^/,{][^,]*)", path, word) for word in argv]


def from_qemu(pid: int, pair: str) -> Guest:
    """Return the guest of a QEMU that runs here.

    Raises InstallError.
    """
    proc = Path(f"/proc/{pid}")
    try:
        argv = (proc / "cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
        cwd = os.readlink(proc / "cwd")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise InstallError(f"--from-qemu {pid}: {why}") from e
    if "qemu" not in os.path.basename(argv[0]) and "kvm" not in os.path.basename(argv[0]):
        raise InstallError(f"--from-qemu {pid}: that is {argv[0] or 'no program'}, and no QEMU")
    with contextlib.suppress(OSError):
        if "/" in argv[0]:
            argv[0] = os.readlink(proc / "exe").removesuffix(" (deleted)")
    try:
        g = qemu_arguments.guest(f"QEMU {pid}", _absolute(argv, cwd), pair)
    except qemu_arguments.ArgumentsError as e:
        raise InstallError(f"--from-qemu {pid}: {e}") from e
    return _with_bridges(_with_monitor(g))


def _with_monitor(g: Guest) -> Guest:
    """Ask the running QEMU about its disks, if one of its monitors is free."""
    from ..qemu.qmp import QmpError
    from ..qemu.survey import probe

    why = "it has no QMP socket"
    for path in g.qmp:
        try:
            return qemu_arguments.with_disks(g, probe(path, QMP_S).blocks)
        except (QmpError, OSError) as e:
            why = f"{path}: {e}"
    text = f"{g.origin}: only its command line was read ({why}): disks plugged in later are unknown"
    return replace(g, left=(*g.left, text))


def from_libvirt(name: str) -> Guest:
    """Return the guest of a domain of libvirt.

    Raises InstallError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+:@-]*", name):
        raise InstallError(f"--from-libvirt {name!r}: expected the name of a domain")
    try:
        r = subprocess.run(
            ["virsh", "--connect", "qemu:///system", "dumpxml", "--inactive", name],
            capture_output=True, text=True, check=False, timeout=VIRSH_S,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError as e:
        raise InstallError(f"--from-libvirt {name}: there is no virsh here") from e
    except (OSError, subprocess.TimeoutExpired) as e:
        raise InstallError(f"--from-libvirt {name}: virsh: {e}") from e
    if r.returncode:
        why = r.stderr.strip().splitlines()[:1] or [f"exit status {r.returncode}"]
        raise InstallError(f"--from-libvirt {name}: virsh: {why[0]}")
    try:
        g = libvirt_domain.guest(name, r.stdout)
    except libvirt_domain.DomainError as e:
        raise InstallError(f"--from-libvirt {name}: {e}") from e
    return _with_bridges(g)
