# SPDX-License-Identifier: GPL-2.0-or-later
"""The reader of the event ring, on a ring in plain memory (Documentation/bpf/ringbuf.rst)."""

from __future__ import annotations

import mmap
import os
import struct
from types import SimpleNamespace

import pytest

from colo_xdp import abi
from colo_xdp.datapath.ring import CapturedFrame, RingReader

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
