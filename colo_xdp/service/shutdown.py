# SPDX-License-Identifier: GPL-2.0-or-later
"""Tell a host that shuts down from a unit that is stopped: systemd knows which of the two it is."""

from __future__ import annotations

import subprocess

#: states of the manager in which it ends all units (systemctl(1), is-system-running): poweroff,
#: reboot, halt, kexec and soft-reboot are `stopping`, rescue and emergency `maintenance`
ENDING = ("stopping", "maintenance")
ANSWER_S = 5.0


def host_ends() -> bool:
    """Return whether systemd ends all services of this host now.

    It says so from the moment on at which the jobs are queued, and needs no D-Bus for it.
    """
    try:
        r = subprocess.run(
            ["systemctl", "is-system-running"], capture_output=True, text=True, check=False,
            timeout=ANSWER_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return r.stdout.strip() in ENDING
