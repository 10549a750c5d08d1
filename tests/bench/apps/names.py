# SPDX-License-Identifier: GPL-2.0-or-later
"""A name server on the client's side, and a client that has the guest ask it.

Each copy of the guest draws a port and an id of its own for its question.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator

from colo_xdp.lab.client import guest_address
from colo_xdp.lab.net import CLIENT_IP, in_ns

from .image import RESOLVE

PORT = 53
A, IN = 1, 1
_serial = itertools.count(1)


def address_of(name: str) -> str:
    """Return what a name leads to here: nothing is looked up."""
    n = int("".join(c for c in name if c.isdigit()) or 0)
    return f"192.0.2.{n % 250 + 1}"


def answer(query: bytes) -> bytes:
    """Answer a question for an address (RFC 1035); one for anything else has no answer."""
    ident, flags, count = struct.unpack_from(">HHH", query)
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    kind, _ = struct.unpack_from(">HH", query, at + 1)
    question = query[12 : at + 5]
    found = kind == A and count == 1
    # a response, authoritative, with recursion if it was wanted
    head = struct.pack(">HHHHHH", ident, 0x8480 | (flags & 0x0100), 1, int(found), 0, 0)
    if not found:
        return head + question
    packed = socket.inet_aton(address_of(".".join(labels)))
    return head + question + struct.pack(">HHHIH", 0xC00C, A, IN, 0, 4) + packed


@contextlib.contextmanager
def server(namespace: str) -> Iterator[None]:
    """Answer the guest's questions in the client's namespace."""

    def bound() -> socket.socket:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((CLIENT_IP, PORT))
        return s

    s = in_ns(namespace, bound)
    s.settimeout(0.2)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError, IndexError, struct.error):
                query, whence = s.recvfrom(2048)
                s.sendto(answer(query), whence)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        s.close()


def lookup(namespace: str, timeout: float) -> bool | None:
    """Have the guest look up a new name; return whether it got the right address, None: in time."""
    name = f"host{next(_serial)}.example"

    def ask() -> bool | None:
        try:
            with socket.create_connection((guest_address(), RESOLVE), timeout) as s:
                s.settimeout(timeout)
                s.sendall(f"{name}\n".encode())
                with s.makefile("rb") as f:
                    return f.readline().decode().strip() == address_of(name)
        except TimeoutError:
            return None
        except OSError:
            return False

    return in_ns(namespace, ask)
