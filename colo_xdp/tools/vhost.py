# SPDX-License-Identifier: GPL-2.0-or-later
"""Find out whether vhost-net moves a guest's frames, and how.

QEMU reports vhost in `x-query-virtio-status` only while the guest's driver runs, and not before
7.2. But for each queue with vhost=on it holds /dev/vhost-net open from its start on.
docs/design/queues.md has what vhost changes.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

DEVICE = "/dev/vhost-net"
ZERO_COPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listener(path: str) -> int:
    """Return the process that listens at a unix socket. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        raw = s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid


def opened(pid: int, device: str = DEVICE) -> int:
    """Return how often a process has a device open. Raises OSError."""
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(fd) == device
        except FileNotFoundError:  # closed meanwhile
            continue
    return count


def zero_copy(path: Path = ZERO_COPY) -> bool:
    """Return whether vhost-net sends from the guest's own memory, which the guest can change."""
    try:
        return path.read_text().strip() not in ("0", "N")
    except OSError:  # not loaded
        return False
