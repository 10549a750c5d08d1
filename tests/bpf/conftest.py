# SPDX-License-Identifier: GPL-2.0-or-later
"""Load programs once per session into their own BPF file system, for BPF_PROG_TEST_RUN."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.conntrack import rewriter
from colo_xdp.conntrack.tcp_state import transition_table
from colo_xdp.datapath import compiler, loader, source, syscall
from colo_xdp.datapath.source import Options

TC_OK, TC_SHOT, TC_REDIRECT, XDP_PASS, TC_UNSPEC = 0, 2, 7, 2, 0xFFFFFFFF


def _why_not() -> str:
    if os.geteuid():
        return "needs root to load BPF programs"
    try:
        compiler.import_bcc()
    except source.LoadError as e:
        return str(e)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [i for i in items if here in i.path.parents]
    # In CI a missing privilege must be seen: the tests run and fail.
    why = "" if not mine or os.environ.get("CI") else _why_not()
    for item in mine:
        item.add_marker(pytest.mark.bpf)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


@dataclass(frozen=True)
class Ran:
    """Result of one frame in one program."""

    verdict: int
    frame: bytes
    reasons: dict[str, int]


class Kernel:
    """The secondary's programs and maps."""

    def __init__(self, objects: loader.Objects) -> None:
        self.objects = objects
        self.config = objects.map("config")
        self.flow_map = objects.map("flows")
        self.opening_map = objects.map("opening")
        self.counters = objects.map("counters")
        table = objects.map("transitions")
        for i, word in enumerate(transition_table()):
            table.set(struct.pack("=I", i), struct.pack("=I", word))
        self.set(abi.Cfg.TAP, 1)
        self.set(abi.Cfg.PEER, 1)
        self.reset()

    def set(self, slot: abi.Cfg, value: int) -> None:
        self.config.set(struct.pack("=I", slot), struct.pack("=Q", value))

    def reset(self, mode: abi.Mode = abi.Mode.RUN, epoch: int = 7) -> None:
        self.set(abi.Cfg.MODE, mode)
        self.set(abi.Cfg.EPOCH, epoch)
        for table in (self.flow_map, self.opening_map):
            for key in list(table.keys()):
                table.delete(key)

    def counts(self, prog: abi.Prog) -> dict[str, int]:
        out = {}
        for reason in abi.Reason:
            if reason is abi.Reason.MAX:
                continue
            key = struct.pack("=I", prog * abi.Reason.MAX + reason)
            raw = self.counters.get(key) or b""
            out[reason.name] = sum(p for p, _ in abi.COUNT.iter_unpack(raw))
        return out

    def bare(self, prog: str, frame: bytes, mark: int = 0) -> tuple[int, bytes]:
        """Return verdict and frame; the quick way."""
        ctx = struct.pack("=III", 0, 0, mark) if mark else b""
        r = syscall.test_run(self.objects.programs[prog].fd, frame, ctx=ctx, data_out=4200)
        return r.retval, r.data

    def run(self, prog: str, frame: bytes, mark: int = 0) -> Ran:
        which = abi.Prog[prog.upper()]
        before = self.counts(which)
        verdict, out = self.bare(prog, frame, mark)
        after = self.counts(which)
        return Ran(verdict, out, {k: n - before[k] for k, n in after.items() if n != before[k]})

    def keep_for_good(self, key: bytes) -> None:
        """Add an offset that checkpoints do not end."""
        words = list(abi.FLOW.unpack(self.flow_map.get(key) or b""))
        words[1] = abi.EPOCH_BASE
        self.flow_map.set(key, abi.FLOW.pack(*words))

    def flow(self, key: bytes, *, opening: bool = False) -> rewriter.TrackedConnection | None:
        raw = (self.opening_map if opening else self.flow_map).get(key)
        return decode_flow(raw) if raw else None

    def tables(
        self,
    ) -> tuple[dict[bytes, rewriter.TrackedConnection], dict[bytes, rewriter.TrackedConnection]]:
        """Return the connections, and those being opened."""
        both = (self.flow_map, self.opening_map)
        return tuple({k: decode_flow(raw) for k, raw in m.items()} for m in both)  # type: ignore[return-value]

    def ns(self, prog: str, frame: bytes, repeat: int = 100_000) -> int:
        fd = self.objects.programs[prog].fd
        return min(syscall.test_run(fd, frame, repeat=repeat, data_out=0).ns for _ in range(5))


def decode_flow(raw: bytes) -> rewriter.TrackedConnection:
    return rewriter.TrackedConnection(*abi.FLOW.unpack(raw)[1:])  # without seen_ns


@pytest.fixture(scope="session")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bpffs")
    syscall.mount_bpffs(str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _kernel(bpffs: Path, name: str, **options: object) -> Iterator[Kernel]:
    o = Options(flow_table=1024, ring_pages=64, **options)  # type: ignore[arg-type]
    objects = loader.load("secondary", name, str(bpffs), o)
    try:
        yield Kernel(objects)
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


@pytest.fixture(scope="session")
def _tc_kernel(bpffs: Path) -> Iterator[Kernel]:
    yield from _kernel(bpffs, "tc")


@pytest.fixture(scope="session")
def _xdp_kernel(bpffs: Path) -> Iterator[Kernel]:
    yield from _kernel(bpffs, "xdp", rewrite_at_xdp=True)


@pytest.fixture(scope="session")
def _guest_kernel(bpffs: Path) -> Iterator[Kernel]:
    o = Options(flow_table=1024, ring_pages=64)
    objects = loader.load("promoted", "guest", str(bpffs), o)
    try:
        yield Kernel(objects)
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


@pytest.fixture
def guest(_guest_kernel: Kernel) -> Kernel:
    """Provide the programs of a PVM with numbers of its own, which are those of epoch 7."""
    _guest_kernel.reset(abi.Mode.RUN, 9)
    _guest_kernel.set(abi.Cfg.PROMOTED_EPOCH, 7)
    return _guest_kernel


@pytest.fixture
def tc(_tc_kernel: Kernel) -> Kernel:
    """Provide translation at tc; mode RUN, epoch 7, no connection known."""
    _tc_kernel.reset()
    return _tc_kernel


@pytest.fixture
def xdp(_xdp_kernel: Kernel) -> Kernel:
    """Provide translation of the SVM's output at XDP (compiled with COLO_REWRITE_AT_XDP)."""
    _xdp_kernel.reset()
    return _xdp_kernel
