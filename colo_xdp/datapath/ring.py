# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the data path's events: frames with their capture time.

The ring buffer is read through its own mapping (Documentation/bpf/ringbuf.rst),
three times cheaper than one callback from C per record. Kernels without it get
bcc's perf buffers. Producer and consumer positions are single aligned words and
the kernel publishes a record by clearing its busy bit, so on x86 plain reads
are enough; elsewhere the reader must be the only one and the interpreter's own
locking orders the accesses.
"""

from __future__ import annotations

import ctypes as ct
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .. import abi
from .loader import Objects, import_bcc

_BUSY, _DISCARD, _LEN = 0x80000000, 0x40000000, 0x3FFFFFFF
_HEAD = abi.EVENT.size


@dataclass(slots=True)
class CapturedFrame:
    """One captured frame. `frame` has its VLAN tag back in place."""

    source: int
    ts_ns: int
    epoch: int
    frame: bytes
    gso_size: int
    partial: bool
    punt_seq: int = 0  # number among the frames of a connection that the fast path knows; 0: none
    gso_type: int = 0  # struct virtio_net_hdr's; 0: no GSO, or this kernel does not tell


def summed(frame: bytes, start: int, offset: int) -> bytes:
    """The frame with its checksum completed: of all from `start` on, put at start + offset
    (struct virtio_net_hdr). As skb_checksum_help() does it. Raises ValueError if it does not fit.
    """
    at = start + offset
    if at + 2 > len(frame):
        raise ValueError(f"a checksum at {at} of a frame of {len(frame)} bytes")
    body = frame[start:]
    total = int.from_bytes(body + bytes(len(body) & 1), "big")
    check = 0xFFFF - total % 0xFFFF  # never 0, which UDP has for none
    return frame[:at] + check.to_bytes(2, "big") + frame[at + 2 :]


def decode(raw: memoryview | bytes) -> CapturedFrame:
    """An event from the bytes of struct colo_event and its frame.

    Raises ValueError when the record is shorter than it says.
    """
    if len(raw) < _HEAD:
        raise ValueError(f"event of {len(raw)} bytes, its head alone has {_HEAD}")
    (
        ts, length, epoch, gso, tci, proto, source, flags, punt_seq, start, offset, gso_type,
    ) = abi.EVENT.unpack_from(raw)  # fmt: skip
    frame = bytes(raw[_HEAD : _HEAD + length])
    if len(frame) != length:
        raise ValueError(f"event says {length} bytes of frame and carries {len(frame)}")
    if flags & abi.EV_UNSUMMED:
        # By some header within, or behind what nobody steps over: nobody who takes the frame later
        # would know of it, and the other guest's copy may have it in full.
        frame = summed(frame, start, offset)
    if flags & abi.EV_VLAN:
        tag = proto.to_bytes(2, "little") + tci.to_bytes(2, "big")
        frame = frame[:12] + tag + frame[12:]
    partial = bool(flags & abi.EV_PARTIAL)
    return CapturedFrame(source, ts, epoch, frame, gso, partial, punt_seq, gso_type)


class Reader(Protocol):
    """What the daemon needs of an event source."""

    fds: list[int]
    capacity: int
    lost: int

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int) -> int:
        """Hand at most about `limit` events to `sink`; returns how many."""
        ...

    def close(self) -> None:
        """Give the mapping back."""
        ...


class RingReader:
    """The consumer side of a BPF ring buffer."""

    def __init__(self, objects: Objects) -> None:
        table = objects.map("events")
        page = mmap.PAGESIZE
        self.fds = [table.fd]
        self.capacity = table.info.max_entries
        self.lost = 0  # of the ring, the programs count their own failed reservations
        self._mask = self.capacity - 1
        self._c = mmap.mmap(table.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._d = mmap.mmap(
            table.fd, page + 2 * self.capacity, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._cons = ct.c_uint64.from_buffer(self._c)
        self._mv = memoryview(self._d)
        self._prod = self._mv[:8].cast("Q")
        self._data = self._mv[page:]
        self._u32 = self._data.cast("I")

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        """Events up to `limit`; the space of each is given back as soon as it is copied."""
        cons, n, mask, u32, data = self._cons.value, 0, self._mask, self._u32, self._data
        prod = self._prod[0]
        while n < limit:
            if cons >= prod:
                prod = self._prod[0]
                if cons >= prod:
                    break
            o = cons & mask
            head = u32[o >> 2]
            if head & _BUSY:
                break
            length = head & _LEN
            cons += (length + 15) & ~7
            if head & _DISCARD:
                self._cons.value = cons
                continue
            try:
                event = decode(data[o + 8 : o + 8 + length])
            finally:
                self._cons.value = cons  # also of one that is not whole: it must not come again
            sink(event)
            n += 1
        return n

    def close(self) -> None:
        for view in (self._prod, self._u32, self._data, self._mv):
            view.release()
        del self._cons
        self._d.close()
        self._c.close()


class PerfReader:
    """bcc's perf buffers, one per CPU, for kernels without a ring buffer."""

    PAGES = 1024

    def __init__(self, objects: Objects) -> None:
        self._bpf = objects.bpf
        self._queue: list[bytes] = []
        self.lost = 0
        table = self._bpf[b"events"]
        table.open_perf_buffer(self._on_event, page_cnt=self.PAGES, lost_cb=self._on_lost)
        lib = import_bcc().libbcc.lib
        self.fds = [lib.perf_reader_fd(r) for r in self._bpf.perf_buffers.values()]
        self.capacity = self.PAGES * mmap.PAGESIZE * max(len(self.fds), 1)

    def _on_event(self, _cpu: int, data: int, size: int) -> None:
        self._queue.append(ct.string_at(data, size))

    def _on_lost(self, count: int) -> None:
        self.lost += count

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        """All events that wait now; order of time across CPUs is restored within one call."""
        self._bpf.perf_buffer_consume()
        raw, self._queue = self._queue, []
        events = sorted((decode(r) for r in raw), key=lambda e: e.ts_ns)
        for e in events:
            sink(e)
        return len(events)

    def close(self) -> None:
        """bcc closes the buffers with the module."""


def open_reader(objects: Objects) -> RingReader | PerfReader:
    """The reader that fits how the programs were compiled."""
    return RingReader(objects) if objects.events == "ring" else PerfReader(objects)
