# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the data path's events: frames with their capture time.

The ring buffer is read through its own mapping (Documentation/bpf/ringbuf.rst), which is three
times cheaper than one callback from C per record. Kernels without ring buffers get perf buffers
(datapath/perf.py). Producer and consumer positions are single aligned words, and the kernel
publishes a record by clearing its busy bit, so on x86 plain reads suffice. Elsewhere the reader
must be the only one, and the interpreter's own locking orders the accesses. DataPath.drain() is the
caller.
"""

from __future__ import annotations

import ctypes as ct
import mmap
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .. import abi
from .loader import Objects
from .perf import PerfBuffer, online_cpus

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
    punt_seq: int = 0  # number among the frames of an offloaded connection; 0: not one
    gso_type: int = 0  # as in struct virtio_net_hdr; 0: no GSO, or this kernel does not show it
    nic: int = 0  # number of the guest's NIC


def summed(frame: bytes, start: int, offset: int) -> bytes:
    """Return the frame with its checksum completed.

    The checksum covers everything from `start` on and is stored at start + offset (struct
    virtio_net_hdr), as skb_checksum_help() does it. Raises ValueError if it does not fit.
    """
    at = start + offset
    if at + 2 > len(frame):
        raise ValueError(f"a checksum at {at} of a frame of {len(frame)} bytes")
    body = frame[start:]
    total = int.from_bytes(body + bytes(len(body) & 1), "big")
    check = 0xFFFF - total % 0xFFFF  # never 0, which means "none" for UDP
    return frame[:at] + check.to_bytes(2, "big") + frame[at + 2 :]


def decode(raw: memoryview | bytes) -> CapturedFrame:
    """Decode struct colo_event and the frame that follows it.

    Raises ValueError if the record is shorter than it claims.
    """
    if len(raw) < _HEAD:
        raise ValueError(f"event of {len(raw)} bytes, its head alone has {_HEAD}")
    (
        ts,
        length,
        epoch,
        gso,
        tci,
        proto,
        source,
        flags,
        punt_seq,
        start,
        offset,
        gso_type,
    ) = abi.EVENT.unpack_from(raw)
    frame = bytes(raw[_HEAD : _HEAD + length])
    if len(frame) != length:
        raise ValueError(f"event says {length} bytes of frame and carries {len(frame)}")
    if flags & abi.EV_UNSUMMED:
        # The checksum belongs to an inner header, or lies behind something that no parser steps
        # over. No later reader of the frame would know about it, and the other guest's copy may
        # have it in full.
        frame = summed(frame, start, offset)
    if flags & abi.EV_VLAN:
        tag = proto.to_bytes(2, "little") + tci.to_bytes(2, "big")
        frame = frame[:12] + tag + frame[12:]
    partial = bool(flags & abi.EV_PARTIAL)
    return CapturedFrame(source, ts, epoch, frame, gso, partial, punt_seq, gso_type)


class Reader(Protocol):
    """An event source, as the daemon uses it."""

    fds: list[int]
    capacity: int

    @property
    def lost(self) -> int:
        """Return how many events did not fit."""
        ...

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int) -> int:
        """Pass at most about `limit` events to `sink`; return how many."""
        ...

    def close(self) -> None:
        """Release the mapping."""
        ...


class RingReader:
    """Consumer side of a BPF ring buffer."""

    def __init__(self, objects: Objects) -> None:
        table = objects.map("events")
        page = mmap.PAGESIZE
        self.fds = [table.fd]
        self.capacity = table.info.max_entries
        self.lost = 0  # stays 0: the programs count their own failed reservations
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
        """Pass up to `limit` events to `sink`.

        The space of each is released as soon as it is copied.
        """
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
                self._cons.value = cons  # also after a malformed one, which must not come again
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
    """Perf buffers, one per CPU, for kernels without ring buffers."""

    PAGES = 1024

    def __init__(self, objects: Objects) -> None:
        self._early: list[CapturedFrame] = []  # captured after the last round had begun
        table = objects.map("events")
        self._buffers = [PerfBuffer(cpu, table, self.PAGES) for cpu in online_cpus()]
        self.fds = [b.fd for b in self._buffers]
        self.capacity = self.PAGES * mmap.PAGESIZE * max(len(self.fds), 1)

    @property
    def lost(self) -> int:
        """Return how many events did not fit."""
        return sum(b.lost for b in self._buffers)

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        """Pass all waiting events to `sink`, in the order of their capture across CPUs.

        The buffers are read one after the other. While the last is read, a guest that has moved to
        another CPU may fill the first again: an event that is missing in this round would come
        behind its successor. A guest that sends in order begins a frame after the one before was
        captured, so what is younger than the round waits for the next one. There is a next round
        until nothing waits, or `limit` is reached: what then waits costs a tick at most.
        """
        count = 0
        while True:
            began = time.monotonic_ns()
            raw = [record for b in self._buffers for record in b.records()]
            events = sorted((*self._early, *map(decode, raw)), key=lambda e: e.ts_ns)
            n = bisect_right(events, began, key=lambda e: e.ts_ns)
            self._early, count = events[n:], count + n
            for e in events[:n]:
                sink(e)
            if not self._early or count >= limit:
                return count

    def close(self) -> None:
        """Release the buffers."""
        for b in self._buffers:
            b.close()
        self._buffers.clear()


def open_reader(objects: Objects) -> RingReader | PerfReader:
    """Return the reader that fits how the programs were compiled."""
    return RingReader(objects) if objects.events == "ring" else PerfReader(objects)
