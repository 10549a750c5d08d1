# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the user's commands (`qemu.incoming`, `failover.fence`) outside the controller's own unit.

A QEMU inside the controller's unit would share its sandbox and its control group: it could not
create its sockets under /run, and ending the unit could end the guest. A fence command would find
neither /root nor a writable /var. A controller started by systemd therefore lets systemd start the
commands, each in a transient unit of its own; any other controller starts them itself.
The same holds for the commands that make and remove overlays of disks, whose directory the
controller's unit may not write to. qemu/supervisor.py, qemu/overlays.py and failover/arbiter.py
are the callers; service/examine.py runs this host's doctor for the other host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: sd_booted(3)
BOOTED = Path("/run/systemd/system")
#: set by systemd for one process only (systemd.exec(5)); a child that used these variables would
#: act in the controller's name
PRIVATE = frozenset(
    (
        "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "SYSTEMD_EXEC_PID",
        "MAINPID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE", "JOURNAL_STREAM",
        "RUNTIME_DIRECTORY", "CACHE_DIRECTORY", "STATE_DIRECTORY", "LOGS_DIRECTORY",
        "CONFIGURATION_DIRECTORY", "CREDENTIALS_DIRECTORY", "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
    )
)  # fmt: skip


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child: ours without what systemd set for this process alone."""
    return {k: v for k, v in (os.environ if env is None else env).items() if k not in PRIVATE}


def is_service(env: Mapping[str, str] | None = None) -> bool:
    """Return whether systemd started this very process for a unit (Type=notify).

    A descendant may have inherited NOTIFY_SOCKET; SYSTEMD_EXEC_PID (systemd 248 and newer) tells
    them apart.
    """
    env = os.environ if env is None else env
    pid = env.get("SYSTEMD_EXEC_PID", "")
    return bool(env.get("NOTIFY_SOCKET")) and pid in ("", str(os.getpid())) and BOOTED.is_dir()


def _run(name: str, argv: Sequence[str], *properties: str) -> list[str]:
    env = environment()
    return [
        "systemd-run", "--quiet", "--collect", f"--unit={name}-{time.monotonic_ns() // 10**6:x}",
        *(f"--property={p}" for p in properties), *(f"--setenv={k}" for k in sorted(env)), "--",
        *(a.replace("$", "$$") for a in argv),  # systemd would substitute its variables
    ]  # fmt: skip


def handover_unit(pair: str) -> str:
    """Return the unit that hands the guest over when the host shuts down."""
    return f"colo-xdp-handover@{pair}.service"


def incoming(pair: str, argv: Sequence[str]) -> list[str]:
    """Return the command that starts a QEMU by `argv`; it ends with `argv` and has its exit status.

    What `argv` leaves running is in a unit of its own. The unit's name is new each time: the former
    QEMU may still be in the former unit, and it is up to `argv` to end it.
    """
    if not is_service():
        return list(argv)
    # With this type the start ends when the first process exits; what remains is the service.
    # At shutdown systemd ends units in the reverse order: the guest is handed over first.
    order = f"Before={handover_unit(pair)}"
    return _run(
        f"colo-xdp-{pair}-incoming", argv, "Type=forking", "TimeoutStartSec=infinity", order
    )


def fence(pair: str, argv: Sequence[str], timeout_ms: int) -> list[str]:
    """Return the command that runs the fence; it exits with status 0 only if `argv` does.

    systemd, too, ends `argv` after `timeout_ms`: killing the returned command would not end it.
    """
    if not is_service():
        return list(argv)
    deadline = (f"TimeoutStartSec={timeout_ms}ms", "TimeoutStopSec=2s")
    return _run(f"colo-xdp-{pair}-fence", argv, "Type=oneshot", *deadline)


def examine(pair: str, argv: Sequence[str], timeout_ms: int) -> list[str]:
    """Return the command that runs `argv` with little of the machine; its output is `argv`'s.

    In the controller's sandbox doctor would judge the sandbox in place of the host.
    """
    if not is_service():
        return ["nice", "-n", "19", *argv]
    limits = ("Nice=10", f"RuntimeMaxSec={timeout_ms}ms")
    name, *more = _run(f"colo-xdp-{pair}-doctor", argv, *limits)
    return [name, "--pipe", "--wait", *more]


def overlays(pair: str, argv: Sequence[str], timeout_ms: int, owner: tuple[int, int]) -> list[str]:
    """Return the command that runs `argv` as this user and group, and has its success or failure.

    Outside a service the caller changes the user itself.
    """
    if not is_service():
        return list(argv)
    who = (f"User={owner[0]}", f"Group={owner[1]}", "UMask=0077")
    return _run(
        f"colo-xdp-{pair}-overlays", argv, "Type=oneshot", f"TimeoutStartSec={timeout_ms}ms", *who
    )
