# SPDX-License-Identifier: GPL-2.0-or-later
"""Do what systemd does for deploy/systemd/colo-xdp@.service, as far as our controllers can see.

Type=notify, Restart=always, RestartSec=100ms and WatchdogSec, which systemd passes to the process
in NOTIFY_SOCKET and WATCHDOG_USEC (sd_notify(3), sd_watchdog_enabled(3)).
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time

from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab

RESTART_S = 0.1


class Supervisor:
    """Keep one controller running until stop()."""

    def __init__(self, lab: Lab, role: str, watchdog_s: float) -> None:
        self.lab, self.role, self.watchdog_s = lab, role, watchdog_s
        self.starts = self.aborted = 0
        self.ready_after: list[float] = []  # seconds from the start to READY=1
        self._path = lab.work / f"{role}.notify"
        self._path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self._path))
        self._sock.settimeout(0.05)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        env = {"NOTIFY_SOCKET": str(self._path), "WATCHDOG_USEC": str(int(self.watchdog_s * 1e6))}
        while not self._stop.is_set():
            p = self.lab.start_controller(self.role, env)
            self.starts += 1
            began, heard, ready, limit = time.monotonic(), 0.0, False, self.watchdog_s
            while p.poll() is None and not self._stop.is_set():
                text = ""
                with contextlib.suppress(TimeoutError):
                    text = self._sock.recv(4096).decode()
                now = time.monotonic()
                if "READY=1" in text and not ready:
                    ready, heard = True, now
                    self.ready_after.append(now - began)
                if "WATCHDOG=1" in text:
                    heard = now
                if m := re.search(r"WATCHDOG_USEC=(\d+)", text):
                    limit = int(m[1]) / 1e6
                if ready and now - heard > limit:
                    self.aborted += 1
                    p.send_signal(signal.SIGABRT)
                    p.send_signal(signal.SIGKILL)
                    p.wait()
            self._stop.wait(RESTART_S)

    def kill(self) -> float:
        """Kill -9 and wait until the next one is ready; return the time it took, s."""
        n, at = len(self.ready_after), time.monotonic()
        self.lab.controllers[self.role].send_signal(signal.SIGKILL)
        wait_for("the next controller", lambda: len(self.ready_after) > n, 30)
        return time.monotonic() - at

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self._sock.close()
