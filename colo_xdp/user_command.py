# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of the user (`qemu.incoming`, `failover.fence`) run outside the controller's own unit.

A QEMU that the controller's unit contains would share its sandbox and its control group: it could
not make its sockets under /run, and what ends the unit could end the guest. A fence command would
find neither /root nor a writable /var. So a controller that systemd has started has them started by
systemd, each in a transient unit of its own; any other controller starts them itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: sd_booted(3)
BOOTED = Path("/run/systemd/system")
#: what systemd tells one process about itself (systemd.exec(5)); a child that believed it would
#: speak for the controller
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
    """The environment for a child: ours, without what systemd has said to this process alone."""
    return {k: v for k, v in (os.environ if env is None else env).items() if k not in PRIVATE}


def is_service(env: Mapping[str, str] | None = None) -> bool:
    """Whether this very process is what systemd has started for a unit (Type=notify).

    A process further down may have inherited NOTIFY_SOCKET; SYSTEMD_EXEC_PID (from 248 on) tells.
    """
    env = os.environ if env is None else env
    pid = env.get("SYSTEMD_EXEC_PID", "")
    return bool(env.get("NOTIFY_SOCKET")) and pid in ("", str(os.getpid())) and BOOTED.is_dir()


def _run(name: str, argv: Sequence[str], *properties: str) -> list[str]:
    env = environment()
    return [
        "systemd-run", "--quiet", "--collect", f"--unit={name}-{time.monotonic_ns() // 10**6:x}",
        *(f"--property={p}" for p in properties), *(f"--setenv={k}" for k in sorted(env)), "--",
        *(a.replace("$", "$$") for a in argv),  # systemd would put in its variables
    ]  # fmt: skip


def incoming(pair: str, argv: Sequence[str]) -> list[str]:
    """The command that starts a QEMU by `argv` and ends when `argv` has ended, with its success.

    What it leaves running is in a unit of its own. The name is new each time: the former QEMU may
    be in the former one, and it is for `argv` to end it.
    """
    if not is_service():
        return list(argv)
    # Of this type the start is over when the first process ends, and the rest is the service.
    return _run(f"colo-xdp-{pair}-incoming", argv, "Type=forking", "TimeoutStartSec=infinity")


def fence(pair: str, argv: Sequence[str], timeout_ms: int) -> list[str]:
    """The command that ends when the fence command `argv` has, with status 0 only if that has 0.

    systemd ends `argv` after `timeout_ms`, too: killing what is returned here would not.
    """
    if not is_service():
        return list(argv)
    deadline = (f"TimeoutStartSec={timeout_ms}ms", "TimeoutStopSec=2s")
    return _run(f"colo-xdp-{pair}-fence", argv, "Type=oneshot", *deadline)
