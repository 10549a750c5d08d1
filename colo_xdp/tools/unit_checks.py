# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge the controller's unit: program, sandbox, drop-ins, start at boot. Pure.

The unit in force is judged, with its drop-ins: what an administrator has changed counts.
tools/unit_facts.py asks systemd.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .findings import FAIL, OK, WARN, Check

if TYPE_CHECKING:
    from .unit_facts import UnitFacts

CAPABILITIES = ("cap_net_admin", "cap_net_raw", "cap_bpf", "cap_perfmon")
HIDDEN = ("/root/", "/home/", "/run/user/")  # by ProtectHome=yes
RELOAD = "systemctl daemon-reload && systemctl restart"


def families(*, link_heartbeats: bool) -> list[str]:
    """Return the socket families that a controller needs."""
    needed = ["AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"]
    return needed + ["AF_PACKET"] * link_heartbeats


def judge(
    u: UnitFacts, path: str, release: str, needed: list[str], *, before_start: bool = False
) -> Iterator[Check]:
    """Judge the unit. `path`: of this configuration file; `needed`: families().

    `before_start`: it is not to be enabled yet.
    """
    if not u.booted:
        yield Check("unit", OK, "no systemd here, so nothing to look at")
        return
    v = u.values
    if v is None:
        yield Check("unit", WARN, f"systemd does not answer about {u.name}",
                    f"systemctl status {u.name}")  # fmt: skip
        return
    if v.get("LoadState") != "loaded":
        state = v.get("LoadState", "not-found")
        absent = state == "not-found"
        remedy = "make install" if absent else f"systemctl cat {u.name}"
        yield Check("unit", WARN if absent else FAIL, f"{u.name} is {state}", remedy)
        return
    found = [
        *_program(u, path, release), *_sandbox(u, needed), *_life(u, before_start), *_end(u)
    ]  # fmt: skip
    yield from found
    drop_ins = v.get("DropInPaths", "").split()
    also = f", with {' '.join(drop_ins)}" if drop_ins else ""
    if not any(c.level for c in found):
        yield Check("unit", OK, f"{v.get('FragmentPath', u.name)}{also}")
    elif drop_ins:
        yield Check("unit", OK, f"drop-ins in force: {' '.join(drop_ins)}")


def _may_run(values: Mapping[str, str], target: str) -> bool:
    """Return whether a program is where the unit executes any."""
    allowed = values.get("ExecPaths", "").replace("-/", "/").split()
    forbidden = values.get("NoExecPaths", "").split()
    return "/" not in forbidden or any(target.startswith(f"{path}/") for path in allowed)


def _program(u: UnitFacts, path: str, release: str) -> Iterator[Check]:
    values = u.values or {}
    if not u.target:
        yield Check(
            "unit", FAIL, f"{u.name} starts {u.program or 'nothing'}, which is not there or cannot "
            "be run (203/EXEC)", "make install",
        )  # fmt: skip
        return
    if u.target.startswith(HIDDEN) and values.get("ProtectHome") in ("yes", "tmpfs"):
        yield Check(
            "unit", FAIL, f"{u.program} is {u.target}, which {u.name} cannot see (ProtectHome)",
            "make install, which puts it below /usr/lib/colo-xdp",
        )  # fmt: skip
    elif not _may_run(values, u.target):
        yield Check(
            "unit", FAIL, f"{u.program} is {u.target}, and {u.name} executes nothing there "
            f"(ExecPaths={values['ExecPaths']})", "make install, or a drop-in with its ExecPaths=",
        )  # fmt: skip
    elif u.release not in ("", release):
        yield Check("unit", WARN, f"{u.name} starts release {u.release}, this is {release}",
                    "make install, or call the one that the unit starts")  # fmt: skip
    try:
        files = [x for x in shlex.split(u.argv) if x.endswith(".toml")]
    except ValueError:
        files = []
    if files and path and path not in files:
        yield Check("unit", WARN, f"{u.name} reads {' '.join(files)}, this is {path}",
                    f"doctor {files[0]}, or put the file there")  # fmt: skip


def _sandbox(u: UnitFacts, needed: list[str]) -> Iterator[Check]:
    values = u.values or {}
    why = f"systemctl edit {u.name}: take it out of the drop-in, then {RELOAD} {u.name}"
    allowed = values.get("RestrictAddressFamilies", "").split()
    if allowed and not allowed[0].startswith("~"):
        lost = [f for f in needed if f not in allowed]
        if lost:
            yield Check(
                "unit", FAIL, f"RestrictAddressFamilies lacks {' '.join(lost)}"
                + (": no heartbeats over the peer link" * ("AF_PACKET" in lost)), why,
            )  # fmt: skip
    elif allowed and (lost := [f for f in needed if f in (allowed[0][1:], *allowed[1:])]):
        yield Check("unit", FAIL, f"RestrictAddressFamilies forbids {' '.join(lost)}", why)
    caps = values.get("CapabilityBoundingSet", "").lower().split()
    if caps and (lost := [c.upper() for c in CAPABILITIES if c not in caps]):
        yield Check("unit", FAIL, f"CapabilityBoundingSet lacks {' '.join(lost)}", why)
    if values.get("KillMode", "process") != "process":
        yield Check(
            "unit", WARN, f"KillMode={values['KillMode']}: a restart ends what runs in the unit "
            "besides the controller", why,
        )  # fmt: skip
    if values.get("Restart", "always") != "always":
        yield Check("unit", WARN, f"Restart={values['Restart']}: a controller that ends stays away",
                    why)  # fmt: skip


def _life(u: UnitFacts, before_start: bool) -> Iterator[Check]:
    values, starts = u.values or {}, ("enabled", "enabled-runtime", "static", "generated")
    if values.get("ActiveState") == "failed":
        yield Check("unit", FAIL, f"{u.name} has failed", f"journalctl -u {u.name}, then "
                    f"systemctl restart {u.name}")  # fmt: skip
    if values.get("NeedDaemonReload") == "yes":
        yield Check("unit", WARN, f"the files of {u.name} have changed since systemd read them",
                    f"{RELOAD} {u.name}")  # fmt: skip
    if not before_start and values.get("UnitFileState") not in starts:
        yield Check("unit", WARN, f"{u.name} does not start at boot", f"systemctl enable {u.name}")


def _end(u: UnitFacts) -> Iterator[Check]:
    """Judge what happens when the host shuts down."""
    s = u.shutdown
    if s is None or (u.values or {}).get("ActiveState") != "active":
        return
    if not s.active:
        yield Check(
            "unit", WARN, f"{s.handover} is not active: when this host shuts down its guest is "
            "killed, and not handed over before", f"systemctl start {s.handover}",
        )  # fmt: skip
    elif not s.in_order:
        yield Check(
            "unit", WARN, f"QEMU runs in {s.qemu}, which systemd may stop before {s.handover}: "
            "then the guest is killed when this host shuts down",
            f"Before={s.handover} in that unit, or one of the units of docs/operator/install.md",
        )  # fmt: skip


def start_of_guest(u: UnitFacts, role: str) -> str:
    """Return the command that starts this host's QEMU."""
    fitting = [g for g in u.guests if g.incoming == (role == "secondary")]
    if not fitting:
        more = " with -incoming" if role == "secondary" else ""
        return f"start it{more}: docs/operator/install.md, step 5"
    return f"systemctl enable --now {fitting[0].name}"
