# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure how long a released frame waits once both guests have sent it.

One frame at a time: the early guest's, then a reading of the clock, then the late guest's; the
kernel timestamps what reaches the client. The lower bound is plain forwarding, from the clock to
the client's timestamp of the PVM's frame. The late frame's write() is in both. In the slow path
this process is the controller too, awake and idle when the event comes.

The histogram that the product keeps (colo_xdp_wait_seconds, the fast path's included) is read from
a real pair in arms.py; it includes the other guest's time.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path

from tests.netns.conftest import inside

from . import held
from .report import Part, Spread

SO_TIMESTAMPNS = 35
PERCENTILES = ((50, "p50"), (99, "p99"), (99.9, "p99.9"))


def _sniffer(ns: str) -> socket.socket:
    with inside(ns):
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    s.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    s.bind(("c0", 0))
    s.settimeout(2)
    return s


def _arrival(s: socket.socket) -> int:
    """Return the CLOCK_REALTIME ns of the next frame."""
    try:
        _, anc, _, _ = s.recvmsg(100, 128)
    except TimeoutError as e:
        raise RuntimeError("a frame did not come out within 2 s") from e
    for level, kind, data in anc:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            sec, ns = struct.unpack("qq", data)
            return int(sec * 10**9 + ns)
    raise RuntimeError("the kernel stamps no frames")


def _round(a: held.Arm, sniffer: socket.socket, svm_late: bool, count: int) -> list[int]:
    """ns of each frame."""
    case = held.Case("latency", 1448, frames=count)
    pairs = held.plan(case)
    pvm = [d for side, d in pairs if side == 0]
    svm = [d for side, d in pairs if side == 1]
    slow = a.begin(case)
    for fd in a.fds:
        os.set_blocking(fd, True)
    floor = a.name == "floor"
    out = []
    for p, s in zip(pvm, svm, strict=True):
        early, late = ((0, p), (1, s)) if svm_late and not floor else ((1, s), (0, p))
        os.write(a.fds[early[0]], early[1])
        if slow is not None:
            slow()
        began = time.time_ns()
        os.write(a.fds[late[0]], late[1])
        if slow is not None:
            slow()
        out.append(_arrival(sniffer) - began)
    return out


def percentile(values: list[int], p: float) -> float:
    """Return the value below which p percent are."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))])


def run(part: Part, quick: bool, _build: Path) -> None:
    """Measure lower bound, fast path and slow path, with the SVM late and with the PVM late."""
    count, rounds = (500, 3) if quick else (4000, 5)
    with ExitStack() as stack:
        arms = [stack.enter_context(held.arm(n)) for n in held.ARMS]
        sniffers = {}
        for a in arms:
            sniffers[a.name] = s = _sniffer(a.net.client)
            stack.callback(s.close)
        for svm_late in (True, False):
            who = "S late" if svm_late else "P late"
            seen: dict[str, list[list[int]]] = {a.name: [] for a in arms}
            try:
                for _ in range(rounds):
                    for a in arms:
                        seen[a.name].append(_round(a, sniffers[a.name], svm_late, count))
            except (RuntimeError, OSError) as e:
                part.error(f"latency, {who}", str(e))
                continue
            for p, text in PERCENTILES:
                at = {n: [percentile(r, p) / 1e3 for r in v] for n, v in seen.items()}
                part.add(f"MTU, {who}: {text}", "us on the wall",
                         {n: Spread.of(v) for n, v in at.items()}, base="floor")  # fmt: skip
                part.add(
                    f"MTU, {who}: {text} added", "us on the wall",
                    {
                        n: Spread.of(x - y for x, y in zip(v, at["floor"], strict=True))
                        for n, v in at.items() if n != "floor"
                    },
                )  # fmt: skip
