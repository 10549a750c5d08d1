# SPDX-License-Identifier: GPL-2.0-or-later
"""Ask systemd for the units of a pair: the controller's as it is in force, and the guest's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..user_command import BOOTED, handover_unit
from . import sockets

ANSWER_S = 5.0
PROPERTIES = (
    "LoadState", "ActiveState", "UnitFileState", "FragmentPath", "DropInPaths", "NeedDaemonReload",
    "ExecStart", "ProtectHome", "RestrictAddressFamilies", "CapabilityBoundingSet", "KillMode",
    "Restart", "NoExecPaths", "ExecPaths",
)  # fmt: skip
_EXEC = re.compile(r"path=(\S+) ; argv\[\]=(.*?) ;")


@dataclass(frozen=True, slots=True)
class GuestUnit:
    """A unit that could run the guest's QEMU. `incoming`: it waits for the other host's guest."""

    name: str
    active: bool
    incoming: bool


@dataclass(frozen=True, slots=True)
class ShutdownFacts:
    """What happens here when the host shuts down. `active`: the unit waits that hands over then.

    `qemu`: the unit in which QEMU runs now; "": none. `in_order`: systemd stops that one later.
    """

    handover: str
    active: bool
    qemu: str = ""
    in_order: bool = True


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """The controller's unit. `values`: PROPERTIES, as systemd prints them; empty: no answer.

    `target`: its program, without symbolic links; "": there is none, or it cannot be run.
    `release`: what that program says of itself; "": it is the one that runs now, or says nothing.
    """

    booted: bool
    name: str = ""
    values: Mapping[str, str] | None = None
    program: str = ""
    argv: str = ""
    target: str = ""
    release: str = ""
    guests: tuple[GuestUnit, ...] = ()
    shutdown: ShutdownFacts | None = None


def parse(text: str) -> list[dict[str, str]]:
    """Read what `systemctl show` prints: lines of KEY=VALUE, an empty line between two units."""
    out = []
    for block in text.split("\n\n"):
        pairs = (line.partition("=") for line in block.splitlines() if "=" in line)
        out.append({key: value for key, _, value in pairs})
    return [x for x in out if x]


def program_of(exec_start: str) -> tuple[str, str]:
    """Return path and arguments of an ExecStart=, as `systemctl show` prints it."""
    m = _EXEC.search(exec_start)
    return (m[1], m[2]) if m else ("", "")


def _run(argv: Sequence[str]) -> str:
    try:
        r = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=ANSWER_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return r.stdout if r.returncode == 0 else ""


def _guests(pair: str) -> tuple[GuestUnit, ...]:
    names = [
        f"{x}@{pair}.service" for x in ("colo-qemu", "colo-qemu-incoming", "vm", "vm-incoming")
    ]
    shown = parse(_run(["systemctl", "show", "--property=Id,LoadState,ActiveState", *names]))
    return tuple(
        GuestUnit(
            x["Id"].removesuffix(".service"),
            x.get("ActiveState") in ("active", "activating", "reloading"),
            "-incoming@" in x["Id"],
        )
        for x in shown
        if x.get("LoadState") == "loaded" and "Id" in x
    )


def _release(target: str) -> str:
    """Return the version of another installation; "" for the one that runs now."""
    if not target or Path(target).parent == Path(os.path.realpath(sys.argv[0])).parent:
        return ""
    return _run([target, "version"]).strip()


def _unit_of(pid: int) -> str:
    """Return the unit of a process, which systemd names a control group after; "": none."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    parts = [p for line in groups.splitlines() for p in line.split("/")]
    return next((p for p in reversed(parts) if p.endswith((".service", ".scope"))), "")


def _shutdown(pair: str, qmp: str) -> ShutdownFacts | None:
    """Return in which order systemd would stop what runs now; None: it does not answer."""
    handover, pid = handover_unit(pair), sockets.listener(qmp) if qmp else 0
    qemu = _unit_of(pid) if pid else ""
    names = [handover, *([qemu] if qemu else [])]
    shown = {
        x["Id"]: x
        for x in parse(
            _run(["systemctl", "show", "--property=Id,ActiveState,Before,After", *names])
        )
        if "Id" in x
    }
    if handover not in shown:
        return None
    first = shown[handover]
    # Who is to start before another is stopped after it; a target in between does as well.
    later = {handover, *first.get("After", "").split()} & {handover, "multi-user.target"}
    in_order = bool(later & set(shown.get(qemu, {}).get("Before", "").split()))
    active = first.get("ActiveState") == "active"
    return ShutdownFacts(handover, active, qemu, in_order or not qemu)


def gather(pair: str, qmp: str = "") -> UnitFacts:
    """Return what systemd knows of the units of a pair, whose QEMU has this socket."""
    if not BOOTED.is_dir():
        return UnitFacts(False)
    name = f"colo-xdp@{pair}.service"
    shown = parse(_run(["systemctl", "show", f"--property={','.join(PROPERTIES)}", name]))
    if not shown:
        return UnitFacts(True, name)
    program, argv = program_of(shown[0].get("ExecStart", ""))
    target = os.path.realpath(program) if program and os.access(program, os.X_OK) else ""
    return UnitFacts(
        True, name, shown[0], program, argv, target, _release(target), _guests(pair),
        _shutdown(pair, qmp),
    )  # fmt: skip
