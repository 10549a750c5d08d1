# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel says of devices and their filters, as bytes: equal if nothing has changed.

A look (attach.look()) costs 3 ms of CPU time, nearly all of it to decode netlink messages, and is
due every few seconds. This asks the kernel the same and decodes nothing, in a tenth of the time. A
value that changes by itself would only cause a look.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable

from . import syscall
from .attach import EGRESS, INGRESS

TIMEOUT_S = 1.0
_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_TC = struct.Struct("=BxxxiIII")  # struct tcmsg
_U32_ATTR = struct.Struct("=HHI")
_GETLINK, _GETTFILTER = 18, 46
_REQUEST, _DUMP = 1, 0x300
_ERROR, _DONE = 2, 3
_IFNAME, _EXT_MASK = 3, 29
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS


def _link_request(name: str) -> bytes:
    data = name.encode() + b"\0"
    attr = struct.pack("=HH", 4 + len(data), _IFNAME) + data
    attr += bytes(-len(attr) % 4) + _U32_ATTR.pack(8, _EXT_MASK, _SKIP_STATS)
    body = _LINK.pack(0, 0, 0, 0, 0) + attr
    return _HEAD.pack(_HEAD.size + len(body), _GETLINK, _REQUEST, 0, 0) + body


def _filters_request(index: int, parent: int) -> bytes:
    body = _TC.pack(0, index, 0, parent, 0)
    return _HEAD.pack(_HEAD.size + len(body), _GETTFILTER, _REQUEST | _DUMP, 0, 0) + body


class Fingerprint:
    """For one network namespace: that in which take() is called first."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    def take(self, names: Iterable[str]) -> bytes:
        """Return what the kernel says of these devices. Raises OSError."""
        try:
            return b"".join(part for name in names for part in self._device(name))
        except OSError:
            self.close()  # an answer may still be on its way
            raise

    def _device(self, name: str) -> list[bytes]:
        link = self._ask(_link_request(name))
        (_, kind, *_), at = _HEAD.unpack_from(link), _HEAD.size
        if kind == _ERROR:
            return [link]
        index = _LINK.unpack_from(link, at)[2]
        out = [link]
        for direction, parent in (("ingress", INGRESS), ("egress", EGRESS)):
            out.append(self._ask(_filters_request(index, parent)))
            out.append(bytes([min(255, syscall.tcx_programs(index, direction))]))
        return out

    def _ask(self, request: bytes) -> bytes:
        """Send a request; return the answer, of a dump up to its end."""
        if self._sock is None:
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self._sock.settimeout(TIMEOUT_S)
            self._sock.bind((0, 0))
        self._sock.send(request)
        dump = _HEAD.unpack_from(request)[2] & _DUMP
        out = b""
        while True:
            data = self._sock.recv(1 << 16)
            out += data
            if not dump or self._ends(data):
                return out

    @staticmethod
    def _ends(data: bytes) -> bool:
        """Return whether a datagram has the last message of a dump, or reports an error."""
        at = 0
        while at + _HEAD.size <= len(data):
            length, kind, *_ = _HEAD.unpack_from(data, at)
            if kind in (_ERROR, _DONE):
                return True
            at += max(_HEAD.size, (length + 3) & ~3)
        return False

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.close()
        self._sock = None
