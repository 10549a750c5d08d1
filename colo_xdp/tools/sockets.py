# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the processes that have a socket, as /proc shows them: nothing is connected to."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
TCP_LISTEN = "0A"


def _hex(address: str, port: int) -> str:
    """Return an address as /proc/net/tcp writes it: words in the order of the host's bytes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{w:08X}" for w in words) + f":{port:04X}"


def _inodes(address: str, port: int, kind: int) -> Iterator[str]:
    """Return the inodes of the sockets that have an address, or all addresses, of this port."""
    proto = "tcp" if kind == socket.SOCK_STREAM else "udp"
    wanted = {_hex(a, port) for a in (address.partition("%")[0], "0.0.0.0", "::")}
    for name in (proto, f"{proto}6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "thread-self/net" / name).read_text().splitlines()[1:]:
                cells = line.split()
                listens = proto == "udp" or cells[3] == TCP_LISTEN
                if listens and cells[1] in wanted:
                    yield cells[9]


def _holder(inodes: set[str]) -> int:
    """Return a process that has one of these sockets open; 0: none that we may look at."""
    names = {f"socket:[{i}]" for i in inodes}
    for fd in PROC.glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(fd) in names:
                return int(fd.parts[-3])
    return 0


def named(pid: int) -> str:
    """Return a process by name and number; "" for 0."""
    if not pid:
        return ""
    with contextlib.suppress(OSError):
        return f"{(PROC / str(pid) / 'comm').read_text().strip()} (process {pid})"
    return f"process {pid}"


def user_of(address: str, port: int, kind: int) -> str:
    """Return who uses an address of this host, for a sentence; "": not known."""
    inodes = set(_inodes(address, port, kind))
    return named(_holder(inodes)) if inodes else ""


def listener(path: str) -> int:
    """Return the process that listens at a unix socket of this namespace; 0: nobody, or not known.

    A QEMU whose monitor a controller has is not disturbed by it.
    """
    found = set()
    with contextlib.suppress(OSError):
        for line in (PROC / "thread-self/net/unix").read_text().splitlines()[1:]:
            cells = line.split()
            # num refs protocol flags type state inode path; 00010000: __SO_ACCEPTCON
            if len(cells) == 8 and cells[7] == path and cells[3] == "00010000":
                found.add(cells[6])
    return _holder(found) if found else 0
