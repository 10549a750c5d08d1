# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a reply waits for nothing but us: from the later guest's frame to its release.

Both guests' frames and the released ones are captured on the primary, by the kernel's own clock:
the PVM's at its tap, the SVM's on the peer link, the released ones at the uplink. The guests cut
the same stream into other segments, so what counts is when a guest had sent all bytes of a released
frame. A frame that a checkpoint has released has no counterpart, and does not count.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from colo_xdp.lab.capture import Capture
from colo_xdp.lab.net import LabError
from colo_xdp.lab.pair import Lab

from .workloads import WORKLOADS, Place

#: what is captured: many small answers
MEASURED = ("http", "select")
SHARE = 0.5  # of a workload's usual length
VLAN, IPV4, TCP = (0x8100, 0x88A8), 0x0800, 6
WRAP = 1 << 32

Frames = Iterable[tuple[float, bytes]]
Flow = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a TCP stream in one frame."""

    at: float
    flow: Flow
    seq: int
    size: int


def data(frames: Frames, source: bytes) -> Iterator[Data]:
    """Read the frames with data of a TCP stream that an IPv4 address has sent; from their heads."""
    for at, frame in frames:
        offset = 12
        (kind,) = struct.unpack_from(">H", frame, offset)
        while kind in VLAN:
            offset += 4
            (kind,) = struct.unpack_from(">H", frame, offset)
        ip = frame[offset + 2 :]
        if kind != IPV4 or len(ip) < 40 or ip[9] != TCP or ip[12:16] != source:
            continue
        head = (ip[0] & 15) * 4
        tcp = ip[head:]
        if len(tcp) < 20:
            continue
        (total,) = struct.unpack_from(">H", ip, 2)
        (seq,) = struct.unpack_from(">I", tcp, 4)
        size = total - head - (tcp[12] >> 4) * 4
        if size > 0:
            yield Data(at, (ip[16:20], tcp[:4]), seq, size)


@dataclass
class _Sent:
    """How far one guest was in a stream, and when."""

    ends: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, end: int, at: float) -> None:
        if not self.ends or end > self.ends[-1]:
            self.ends.append(end)
            self.times.append(at)

    def when(self, end: int) -> float | None:
        """Return when everything up to there had been sent; None: never."""
        i = bisect_left(self.ends, end)
        return self.times[i] if i < len(self.times) else None


def lateness(pvm: Iterable[Data], svm: Iterable[Data], released: Iterable[Data]) -> list[float]:
    """Return how long after the later guest's frame each one was released, s."""
    first: dict[Flow, int] = {}

    def end(d: Data) -> int:
        # A stream is far shorter than half of the sequence space.
        zero = first.setdefault(d.flow, d.seq)
        return (d.seq - zero + WRAP // 2) % WRAP - WRAP // 2 + d.size

    def progress(some: Iterable[Data]) -> dict[Flow, _Sent]:
        sent: dict[Flow, _Sent] = {}
        for d in some:
            sent.setdefault(d.flow, _Sent()).add(end(d), d.at)
        return sent

    both = progress(pvm), progress(svm)
    out, seen = [], _Seen()
    for d in released:
        last = end(d)
        if not seen.new(d.flow, last):
            continue  # a repetition
        times = [sent[d.flow].when(last) if d.flow in sent else None for sent in both]
        known = [t for t in times if t is not None]
        if len(known) == 2 and max(known) <= d.at:
            out.append(d.at - max(known))
    return out


class _Seen:
    """How far each stream has been released."""

    def __init__(self) -> None:
        self._to: dict[Flow, int] = {}

    def new(self, flow: Flow, end: int) -> bool:
        """Return whether this is further than before."""
        if end <= self._to.get(flow, 0):
            return False
        self._to[flow] = end
        return True


def measure(lab: Lab, at: Place) -> list[float]:
    """Return the lateness of each frame of two workloads (lateness()), s. Raises LabError."""
    host = lab.net.primary
    captures: list[Capture] = [
        lab.capture(host, "tap0", "frames-pvm", "in"),
        lab.capture(host, "peer0", "frames-svm", "in"),
        lab.capture(host, "uplink", "frames-released", "out"),
    ]
    short = Place(at.tools, at.client, at.scale * SHARE)
    for workload in WORKLOADS:
        if workload.key in MEASURED:
            workload.run(short)
    frames = [lab.stop_capture(c) for c in captures]
    if any(c.dropped for c in captures):
        raise LabError("tcpdump was too slow to be a witness of when frames were released")
    guest = bytes((10, 9, 0, 2))
    found = lateness(*(list(data(some, guest)) for some in frames))
    if not found:
        raise LabError("no released frame has been captured beside both guests' frames")
    return found
