# SPDX-License-Identifier: GPL-2.0-or-later
"""Capture packets with tcpdump: a witness independent of our own counters."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

from .net import Processes, stop_process, wait_for

GUEST_MAC = bytes.fromhex("525400123456")
GUEST_MACS = (GUEST_MAC, bytes.fromhex("525400123457"))  # of its NICs


class Capture:
    """Capture everything that crosses a device, from creation to stop()."""

    def __init__(
        self,
        procs: Processes,
        ns: str,
        dev: str,
        path: Path,
        direction: str = "inout",
        *,
        whole: bool = False,
    ) -> None:
        self.path = path
        # after stop(): frames that tcpdump lost because it was too slow; then it is no witness
        self.dropped = 0
        self._log = path.with_suffix(".log")
        self._log.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        cmd = ["tcpdump", "-i", dev, "-w", str(path), "-U", "--immediate-mode", "-B", "32768"]
        cmd += ["--time-stamp-precision=nano", "-s", "0" if whole else "128", "-Q", direction]
        self._p: subprocess.Popen[bytes] | None = procs.start(cmd, self._log, ns)
        wait_for("listening tcpdump", lambda: b"listening on" in self._log.read_bytes(), 10)

    def stop(self) -> list[tuple[float, bytes]]:
        """Stop and return (time, first 128 bytes) of each frame; all bytes if `whole`."""
        stop_process(self._p)
        self._p = None
        m = re.search(r"(\d+) packets? dropped by kernel", self._log.read_text())
        self.dropped = int(m[1]) if m else 0
        raw = self.path.read_bytes()
        out, at = [], 24
        while at + 16 <= len(raw):
            s, ns, have, _len = struct.unpack_from("<IIII", raw, at)
            out.append((s + ns / 1e9, raw[at + 16 : at + 16 + have]))
            at += 16 + have
        return out


def from_guest(frames: list[tuple[float, bytes]], before: float | None = None) -> int:
    """Count the frames with a source address of the guest's (that are older than `before`)."""
    return sum(f[6:12] in GUEST_MACS and (before is None or t < before) for t, f in frames)
