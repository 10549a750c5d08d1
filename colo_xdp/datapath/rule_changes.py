# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether it is worth looking again which bridge ports are plain (bridge.plain_ports()).

A look costs 8 ms of CPU time, and is due each second. What it reads changes once in a while, and
the kernel reports nearly all of it: devices and ports, bridges and their attributes (rtnetlink),
tables of nftables (nfnetlink). What it does not report is in a few files, which are cheap to read.
A look all the same every LOOK_S is for what nobody thought of.

The messages themselves are of no use, since a socket may overflow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time

from . import bridge, netlink

LOOK_S = 30.0
_NETFILTER = 12  # NETLINK_NETFILTER
_GROUP_NFTABLES = 1 << 6  # NFNLGRP_NFTABLES
_GROUP_NEIGHBOURS = 1 << 2  # RTMGRP_NEIGH: addresses of bridges, too
_NONE = frozenset((errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT))


def _listen(family: int, group: int) -> socket.socket:
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family)
    try:
        s.bind((0, group))
    except OSError:
        s.close()
        raise
    return s


def _files() -> tuple[object, ...]:
    """Return what has no events: modules of ebtables, sysctls, tables of iptables."""
    out: list[object] = [os.path.exists(path) for path in bridge.EBTABLES]
    for path in bridge.RULE_FILES:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            out.append(None)
            continue
        try:
            out.append(os.read(fd, 1 << 16))
        finally:
            os.close(fd)
    return tuple(out)


def _said(sock: socket.socket) -> bool:
    """Return whether there was anything to read; reads it all. An overflow is something, too."""
    said = False
    while True:
        try:
            sock.recv(65536)
        except BlockingIOError:
            return said
        except OSError as e:
            if e.errno != errno.ENOBUFS:
                raise
        said = True


class RuleChanges:
    """For one NIC. Made, and asked, in the network namespace of its tap."""

    def __init__(self) -> None:
        self._links: socket.socket | None = None
        self._rules: socket.socket | None = None
        self._neighbours: socket.socket | None = None
        self._seen: tuple[object, ...] = ()
        self._due = 0.0  # when to look all the same (CLOCK_MONOTONIC)

    def any(self) -> bool:
        """Return whether to look now; the changes up to now count as seen."""
        try:
            changed = self._events()
            files = _files()
        except OSError:  # no memory, no descriptors: what is not known may have changed
            self.again()
            return True
        now = time.monotonic()
        if changed or files != self._seen or now >= self._due:
            self._seen, self._due = files, now + LOOK_S
            return True
        return False

    def _events(self) -> bool:
        changed = False
        if self._links is None:
            self._links, changed = netlink.changes(), True
        if self._rules is None:
            try:
                self._rules, changed = _listen(_NETFILTER, _GROUP_NFTABLES), True
            except OSError as e:
                if e.errno not in _NONE:
                    raise
                # A kernel without it has no such rules, and may get it later.
        changed |= _said(self._links)
        return (self._rules is not None and _said(self._rules)) or changed

    def addresses(self) -> bool:
        """Return whether a bridge has learnt or got an address since the last call.

        A neighbour of the host counts, too. Raises OSError.
        """
        if self._neighbours is None:
            self._neighbours = _listen(socket.NETLINK_ROUTE, _GROUP_NEIGHBOURS)
            return True
        return _said(self._neighbours)

    def again(self) -> None:
        """Have any() return True next time: the look has failed."""
        self._due = 0.0

    def close(self) -> None:
        """Close the sockets."""
        for sock in (self._links, self._rules, self._neighbours):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.close()
        self._links = self._rules = self._neighbours = None
