# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions with the kernel over netlink, and notices of changes; the only importer of pyroute2."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError as NetlinkError
from pyroute2.nftables.main import NFTables


@contextlib.contextmanager
def rtnetlink() -> Iterator[Any]:
    """Open a session: devices, routes, the entries of bridges, qdiscs and filters."""
    with IPRoute() as session:
        yield session


@contextlib.contextmanager
def nftables() -> Iterator[Any]:
    """Open a session: tables of nftables, of all families."""
    with NFTables(nfgen_family=0) as session:
        yield session


def changes() -> socket.socket:
    """Return a socket that is readable when devices, qdiscs or filters here have changed.

    Its messages are of no use, since it may overflow: call look().
    """
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    s.bind((0, 1 | 8))  # RTMGRP_LINK, RTMGRP_TC
    return s


def drain(sock: socket.socket) -> None:
    """Read everything from a socket of changes(). The messages only mean that something changed."""
    with contextlib.suppress(OSError):  # nothing more to read, or it has overflowed
        while sock.recv(65536):
            pass
