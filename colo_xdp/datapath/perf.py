# SPDX-License-Identifier: GPL-2.0-or-later
"""Perf buffers, one per CPU: how frames reach user space on kernels without ring buffers (5.8).

Source: perf_event_open(2) and struct perf_event_mmap_page in include/uapi/linux/perf_event.h. The
kernel advances data_head; the reader copies what is before it and advances data_tail. As with the
ring buffer (datapath/ring.py) both are single aligned words.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import mmap
import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from .maps import Map

_NR = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
_libc = ct.CDLL(None, use_errno=True)

#: struct perf_event_attr as of its first version
_ATTR = struct.Struct("=IIQQQQQIIQ")
_SOFTWARE, _BPF_OUTPUT, _SAMPLE_RAW = 1, 10, 1 << 10
_ENABLE, _CLOEXEC = 0x2400, 8
_HEAD, _TAIL = 1024, 1032  # offsets of data_head and data_tail
_RECORD = struct.Struct("=IHH")
_LOST, _SAMPLE = 2, 9
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")


def online_cpus() -> list[int]:
    """Return the numbers of the CPUs that run."""
    text = Path("/sys/devices/system/cpu/online").read_text().strip()
    out: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found:
            out += range(int(found[1]), int(found[2] or found[1]) + 1)
    return out


def _open(cpu: int) -> int:
    """Open a buffer for what programs on one CPU submit; wakes its reader for each record."""
    attr = ct.create_string_buffer(
        _ATTR.pack(_SOFTWARE, _ATTR.size, _BPF_OUTPUT, 1, _SAMPLE_RAW, 0, 0, 1, 0, 0), _ATTR.size
    )
    nr = _NR.get(platform.machine(), -1)
    everyone, no_group = ct.c_long(-1), ct.c_long(-1)
    fd = _libc.syscall(ct.c_long(nr), attr, everyone, ct.c_long(cpu), no_group, ct.c_long(_CLOEXEC))
    if fd < 0:
        raise OSError(ct.get_errno(), f"perf_event_open: {os.strerror(ct.get_errno())}")
    return int(fd)


class PerfBuffer:
    """The buffer of one CPU. `lost`: records that did not fit."""

    def __init__(self, cpu: int, table: Map, pages: int) -> None:
        """Open it as the entry of that CPU in the map; `pages`: a power of two."""
        page = mmap.PAGESIZE
        self.lost = 0
        self.fd = _open(cpu)
        try:
            self._map = mmap.mmap(self.fd, (1 + pages) * page)
            table.set(_U32.pack(cpu), _U32.pack(self.fd))
            fcntl.ioctl(self.fd, _ENABLE)
        except OSError:
            os.close(self.fd)
            raise
        self._size, self._data = pages * page, page
        self._words = memoryview(self._map)[_HEAD : _HEAD + 16].cast("Q")

    def _copy(self, at: int, size: int) -> bytes:
        """Return bytes of the data, which wraps."""
        at %= self._size
        first = min(size, self._size - at)
        begin = self._data + at
        out = self._map[begin : begin + first]
        return out + self._map[self._data : self._data + size - first] if size > first else out

    def records(self) -> Iterator[bytes]:
        """Yield what programs have submitted; the room of each is released when it is copied."""
        head, tail = self._words[0], self._words[1]
        while tail < head:
            kind, _, size = _RECORD.unpack(self._copy(tail, _RECORD.size))
            body = self._copy(tail + _RECORD.size, size - _RECORD.size)
            tail += size
            self._words[1] = tail
            if kind == _SAMPLE:
                yield body[_U32.size : _U32.size + _U32.unpack_from(body)[0]]
            elif kind == _LOST:
                self.lost += _U64.unpack_from(body, _U64.size)[0]

    def close(self) -> None:
        """Release it; what programs submit meanwhile is lost and counted by them."""
        self._words.release()
        self._map.close()
        os.close(self.fd)
