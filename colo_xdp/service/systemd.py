# SPDX-License-Identifier: GPL-2.0-or-later
"""Implement sd_notify(3): readiness, status line and watchdog, over systemd's datagram socket."""

from __future__ import annotations

import logging
import math
import os
import socket

log = logging.getLogger("colo_xdp.service.systemd")


class Notifier:
    """Send notifications to systemd; does nothing where there is no systemd.

    `longest_s`: a process that hangs for longer must be ended, even if the unit allows more time.
    """

    def __init__(self, longest_s: float = math.inf) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._sock: socket.socket | None = None
        if path:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._sock.setblocking(False)
        usec = os.environ.get("WATCHDOG_USEC", "")
        #: interval at which systemd wants signs of life, s; 0: no watchdog
        self.watchdog_s = min(int(usec) / 1e6, longest_s) / 2 if usec.isdigit() else 0.0

    def patience(self, seconds: float | None) -> None:
        """Set another watchdog timeout, or (None) the usual one again (WATCHDOG_USEC)."""
        if self.watchdog_s:
            usec = int((self.watchdog_s * 2 if seconds is None else seconds) * 1e6)
            self.send(WATCHDOG="1", WATCHDOG_USEC=str(usec))

    def send(self, **fields: str) -> None:
        """Send fields such as READY="1", STATUS="...", WATCHDOG="1", EXTEND_TIMEOUT_USEC="..."."""
        if self._sock is None:
            return
        text = "\n".join(f"{k}={v}" for k, v in fields.items())
        try:
            self._sock.sendto(text.encode(), self._address)
        except OSError as e:
            log.debug("sd_notify: %s", e)
