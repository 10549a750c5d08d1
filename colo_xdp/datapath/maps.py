# SPDX-License-Identifier: GPL-2.0-or-later
"""Access to a map's entries by raw bytes, through bpf(2).

The event loop and the threads beside it use the same maps, and a look-up is on the way of frames.
So each Map has its buffers once, and a lock for them, which costs less than new buffers each time.
"""

from __future__ import annotations

import ctypes as ct
import errno
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from . import syscall

PER_CPU = frozenset((5, 6, 10, 21))  # BPF_MAP_TYPE_PERCPU_HASH and so on


@cache
def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


class Map:
    """Access to one map by raw bytes; values as in the kernel, a per-CPU map's one for each CPU."""

    def __init__(self, fd: int) -> None:
        """Use the descriptor, which must stay open as long as this object is used."""
        self.fd = fd
        self.info = info = syscall.map_info(fd)
        #: bytes of a value as user space sees it
        self.size = info.value_size
        if info.type in PER_CPU:
            self.size = (info.value_size + 7) // 8 * 8 * possible_cpus()
        self._lock = threading.Lock()
        self._key = ct.create_string_buffer(max(1, info.key_size))
        self._next = ct.create_string_buffer(max(1, info.key_size))
        self._value: ct.Array[ct.c_char] | None = None
        self._at = syscall.MapAttr(fd, key=ct.addressof(self._key))
        self._after = syscall.MapAttr(fd, value=ct.addressof(self._next))

    def _put_key(self, key: bytes) -> ct.Array[ct.c_char]:
        """Fill in the key; return the buffer for the value, made at its first use."""
        if len(key) != self.info.key_size:
            raise ValueError(f"a key of {len(key)} bytes where {self.info.key_size} are needed")
        self._key.raw = key
        if self._value is None:
            self._value = ct.create_string_buffer(self.size)
            self._at.value = ct.addressof(self._value)
        return self._value

    def set(self, key: bytes, value: bytes, *, new: bool = False) -> None:
        """Insert or replace an entry.

        Raises OSError: E2BIG if the map is full, EEXIST if `new` is set and the entry exists.
        """
        if len(value) != self.size:
            raise ValueError(f"a value of {len(value)} bytes where {self.size} are needed")
        with self._lock:
            self._put_key(key).raw = value
            e = syscall.map_update(self._at, new)
        if e:
            raise syscall.error(e, "map update")

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None."""
        with self._lock:
            value = self._put_key(key)
            e = syscall.map_lookup(self._at)
            if not e:
                return value.raw
        if e != errno.ENOENT:
            raise syscall.error(e, "map lookup")
        return None

    def delete(self, key: bytes) -> bool:
        """Remove an entry; return False if it was not there."""
        with self._lock:
            self._put_key(key)
            e = syscall.map_delete(self._at)
        if e not in (0, errno.ENOENT):
            raise syscall.error(e, "map delete")
        return not e

    def keys(self, limit: int | None = None) -> Iterator[bytes]:
        """Yield all keys, but at most `limit` (default: the map's size), as it may change."""
        key: bytes | None = None
        for _ in range(limit or self.info.max_entries):
            with self._lock:
                if key is None:
                    self._after.key = 0
                else:
                    self._key.raw = key
                    self._after.key = self._at.key
                e = syscall.map_next(self._after)
                key = self._next.raw
            if e == errno.ENOENT:
                return
            if e:
                raise syscall.error(e, "map next key")
            yield key

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield all pairs, except those that vanish meanwhile."""
        for k in self.keys():
            v = self.get(k)
            if v is not None:
                yield k, v
