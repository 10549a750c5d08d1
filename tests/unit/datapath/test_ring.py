# SPDX-License-Identifier: GPL-2.0-or-later
"""The reader of the event ring, on a ring in plain memory (Documentation/bpf/ringbuf.rst)."""

from __future__ import annotations

import mmap
import os
import struct
import time
from types import SimpleNamespace

import pytest

from colo_xdp import abi
from colo_xdp.datapath.ring import CapturedFrame, PerfReader, RingReader

SIZE = mmap.PAGESIZE


def record(frame: bytes, says: int) -> bytes:
    """An event whose head says that so many bytes of frame follow."""
    event = abi.EVENT.pack(1, says, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0) + frame
    return struct.pack("=II", len(event), 0) + event + bytes(-len(event) % 8)


def test_a_record_that_is_not_whole_comes_once() -> None:
    fd = os.memfd_create("ring")
    try:
        os.ftruncate(fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        table = SimpleNamespace(fd=fd, info=SimpleNamespace(max_entries=SIZE))
        reader = RingReader(SimpleNamespace(map=lambda name: table))  # type: ignore[arg-type]
        data = record(b"short", 60) + record(b"whole", 5)
        os.pwrite(fd, data, 2 * mmap.PAGESIZE)
        os.pwrite(fd, struct.pack("=Q", len(data)), mmap.PAGESIZE)
        got: list[CapturedFrame] = []
        with pytest.raises(ValueError, match="says 60 bytes"):
            reader.drain(got.append)
        assert reader.drain(got.append) == 1 and [e.frame for e in got] == [b"whole"]
        reader.close()
    finally:
        os.close(fd)


def perf_event(ts: int, frame: bytes) -> bytes:
    return abi.EVENT.pack(ts, len(frame), 7, 0, 0, 0, 0, 0, 0, 0, 0, 0) + frame


def test_a_guest_that_moves_to_another_cpu_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor that one CPU's buffer has while the other's has been read already waits."""
    clock = iter((100, 200, 300))
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(clock))
    rounds = iter(
        (
            [perf_event(90, b"first"), perf_event(120, b"third"), perf_event(95, b"second")],
            [perf_event(115, b"meanwhile"), perf_event(250, b"later")],
            [],
        )
    )
    reader = PerfReader.__new__(PerfReader)
    reader._early, reader._buffers = [], [SimpleNamespace(records=lambda: next(rounds))]
    got: list[bytes] = []
    assert reader.drain(lambda e: got.append(e.frame)) == 5
    assert got == [b"first", b"second", b"meanwhile", b"third", b"later"]


def test_events_never_keep_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def clock() -> int:
        nonlocal now
        now += 10
        return now

    monkeypatch.setattr(time, "monotonic_ns", clock)
    reader = PerfReader.__new__(PerfReader)
    more = SimpleNamespace(records=lambda: [perf_event(now + 5, b"more")])
    reader._early, reader._buffers = [], [more]
    got: list[CapturedFrame] = []
    assert reader.drain(got.append, 20) == 20 == len(got)
    reader.drain(got.append, 20)
    assert [e.ts_ns for e in got] == list(range(15, 10 * len(got) + 15, 10)), "none is lost"
