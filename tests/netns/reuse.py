# SPDX-License-Identifier: GPL-2.0-or-later
"""One test's programs serve the next: compiling and verifying takes seconds, emptying maps none.

What a test unpins is put aside below the same BPF file system. The next one that loads the same
source with the same options finds it where a former controller would have left it, with every map
as the kernel makes it: zeros, no entry, and an empty ring.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest

from colo_xdp import _bpf, loader

KEPT = 6  # sets of programs that are put aside; one has up to 100 MiB of maps
_HASH, _ARRAY, _PERCPU_HASH, _PERCPU_ARRAY, _LRU_HASH, _RINGBUF = 1, 2, 5, 6, 9, 27


class Reuse:
    """In place of loader.load() and loader.remove_pins() for one session."""

    def __init__(self) -> None:
        self._load, self._remove = loader.load, loader.remove_pins
        self._idle: OrderedDict[str, Path] = OrderedDict()  # by the directory they were pinned in
        self._n = 0

    def patch(self, mp: pytest.MonkeyPatch) -> None:
        mp.setattr(loader, "load", self.load)
        mp.setattr(loader, "remove_pins", self.remove_pins)

    def load(
        self, role: str, pair: str, bpffs: str, options: loader.Options, home: str = ""
    ) -> loader.Objects:
        directory = loader.pin_dir(bpffs, pair, home or role)
        aside = self._idle.get(directory)
        if aside is not None and not os.path.exists(directory):
            source = loader._source(role, directory, options, loader.events(options))
            if loader._pins(str(aside), source):
                del self._idle[directory]
                Path(directory).parent.mkdir(exist_ok=True)
                aside.rename(directory)
        return self._load(role, pair, bpffs, options, home)

    def remove_pins(self, directory: str) -> list[str]:
        path = Path(directory)
        gone = sorted(map(str, path.iterdir())) if path.is_dir() else []
        if not any(Path(p).name.startswith("whole_") for p in gone):
            return self._remove(directory)
        for p in gone:
            _empty(p)
        self._drop(directory)
        self._n += 1
        aside = path.parents[1] / f"colo-xdp-idle-{os.getpid()}-{self._n}"
        path.rename(aside)
        self._idle[directory] = aside
        while len(self._idle) > KEPT:
            self._drop(next(iter(self._idle)))
        return gone

    def _drop(self, directory: str) -> None:
        aside = self._idle.pop(directory, None)
        if aside is not None and aside.exists():  # else its file system has been unmounted
            shutil.rmtree(aside)

    def close(self) -> None:
        for directory in list(self._idle):
            self._drop(directory)


def _empty(path: str) -> None:
    """What is pinned here becomes as it was made, if it is a map."""
    if Path(path).name.startswith("prog_"):
        return
    fd = _bpf.obj_get(path)
    try:
        table = loader.Map(fd)
        info = table.info
        if info.type in (_HASH, _PERCPU_HASH, _LRU_HASH):
            for key in list(table.keys()):
                table.delete(key)
        elif info.type in (_ARRAY, _PERCPU_ARRAY):
            each = (info.value_size + 7) // 8 * 8
            zeros = bytes(each * (loader.possible_cpus() if info.type == _PERCPU_ARRAY else 1))
            for i in range(info.max_entries):
                table.set(i.to_bytes(4, "little"), zeros)
        elif info.type == _RINGBUF:
            _skip_all(fd)
        else:
            raise AssertionError(f"{path}: how is a map of type {info.type} emptied?")
    finally:
        os.close(fd)


def _skip_all(fd: int) -> None:
    """The consumer's position becomes the producer's (kernel/bpf/ringbuf.c)."""
    page = mmap.PAGESIZE
    with mmap.mmap(fd, page) as mine, mmap.mmap(fd, page, prot=mmap.PROT_READ, offset=page) as its:
        consumer = ctypes.c_uint64.from_buffer(mine)
        consumer.value = int.from_bytes(its[:8], "little")
        del consumer
