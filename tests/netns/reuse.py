# SPDX-License-Identifier: GPL-2.0-or-later
"""Let one test's programs serve the next: compiling them takes seconds, emptying maps does not.

What a test unpins is set aside in the same BPF file system. The next test that loads the same
source with the same options, for whatever pair, finds it where a former controller would have left
it, with every map as the kernel creates it: zeros, no entry, and an empty ring.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.maps import Map
from colo_xdp.datapath.source import Options

KEPT = 8  # sets of programs that are set aside; one has up to 100 MiB of maps
_HASH, _ARRAY, _PERCPU_HASH, _PERCPU_ARRAY, _LRU_HASH, _RINGBUF = 1, 2, 5, 6, 9, 27


class Reuse:
    """Replace loader.load() and loader.remove_pins() for one session."""

    def __init__(self) -> None:
        self._load, self._remove = loader.load, loader.remove_pins
        self._idle: list[Path] = []
        self._n = 0
        for left in Path("/sys/fs/bpf").glob("colo-xdp-idle-*"):  # by a run that was killed
            if not Path(f"/proc/{left.name.split('-')[3]}").exists():
                shutil.rmtree(left)

    def patch(self, mp: pytest.MonkeyPatch) -> None:
        mp.setattr(loader, "load", self.load)
        mp.setattr(loader, "remove_pins", self.remove_pins)

    def unpatch(self, mp: pytest.MonkeyPatch) -> None:
        mp.setattr(loader, "load", self._load)
        mp.setattr(loader, "remove_pins", self._remove)

    def load(
        self, role: str, pair: str, bpffs: str, options: Options, home: str = "",
        nic: int = 0,
    ) -> loader.Objects:  # fmt: skip
        directory = loader.pin_dir(bpffs, pair, home or role, nic)
        if not os.path.exists(directory):
            self._fetch(directory, loader.plan(role, options))
        return self._load(role, pair, bpffs, options, home, nic)

    def _fetch(self, directory: str, plan: loader.Plan) -> None:
        marks = [f"{kind}_{plan.role}_{plan.tag}_" for kind in ("whole", "idle")]
        for i, aside in enumerate(self._idle):
            if any((aside / mark).exists() for mark in marks):
                del self._idle[i]
                Path(directory).parent.mkdir(exist_ok=True)
                aside.rename(directory)
                return

    def remove_pins(self, directory: str) -> list[str]:
        path = Path(directory)
        gone = sorted(map(str, path.iterdir())) if path.is_dir() else []
        several = any(Path(p).is_dir() for p in gone)
        if several or not any(Path(p).name.startswith(("whole_", "idle_")) for p in gone):
            return self._remove(directory)
        for p in gone:
            _empty(p)
        self._n += 1
        aside = path.parents[1] / f"colo-xdp-idle-{os.getpid()}-{self._n}"
        path.rename(aside)
        self._idle.append(aside)
        self._drop(KEPT)
        return gone

    def _drop(self, but: int) -> None:
        while len(self._idle) > but:
            aside = self._idle.pop(0)
            if aside.exists():  # else its file system has been unmounted
                shutil.rmtree(aside)

    def close(self) -> None:
        self._drop(0)


def _empty(path: str) -> None:
    """Reset everything pinned here to its initial state, if it is a map."""
    if Path(path).name.startswith("prog_"):
        return
    fd = syscall.obj_get(path)
    try:
        table = Map(fd)
        info = table.info
        if info.type in (_HASH, _PERCPU_HASH, _LRU_HASH):
            for key in list(table.keys()):
                table.delete(key)
        elif info.type in (_ARRAY, _PERCPU_ARRAY):
            for i in range(info.max_entries):
                table.set(i.to_bytes(4, "little"), bytes(table.size))
        elif info.type == _RINGBUF:
            syscall.ring_skip(fd)
        else:
            raise AssertionError(f"{path}: how is a map of type {info.type} emptied?")
    finally:
        os.close(fd)
