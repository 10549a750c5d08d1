# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the fast path on real devices: only what both guests sent leaves, on any CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.datapath import loader
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.source import Options, Refused
from colo_xdp.offload.kernel_format import conn_key, flow_key
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net
from tests.netns.offload_lab import run
from tests.netns.test_primary_path import PAIR, config

STRESS = int(os.environ.get("STRESS", "1"))  # runs this many times longer


@pytest.fixture
def path(net: Net, tmp_path: Path) -> Iterator[DataPath]:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path, fast_path_memory=16))
    yield dp
    dp.close()
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


@pytest.mark.timeout(60 * STRESS + 60)
@pytest.mark.parametrize(("conns", "length", "every"), [(1, 48 << 20, 0.0), (8, 8 << 20, 0.5)])
def test_two_guests_at_once(
    net: Net, path: DataPath, conns: int, length: int, every: float
) -> None:
    length *= STRESS
    proxy, frames, have, wrong = run(
        net,
        path,
        conns=conns,
        length=length,
        seed=conns,
        seconds=40 * STRESS,
        checkpoint_every=every,
    )
    counters = path.counters()
    kernel = sum(
        n for row in counters.values() for r, (n, _) in row.items() if r.startswith("offload_")
    )
    said = {k: v for k, v in proxy.engine.counters.items() if v}
    assert not wrong, (wrong, said)
    everything = {p: {r: n for r, (n, _) in row.items() if n} for p, row in counters.items()}
    assert have == [length] * conns, f"{have} {frames} {said} {everything}"
    handed = {r: n for r, (n, _) in counters["offload"].items() if n}
    assert kernel > 500, f"{said} {handed}"


@pytest.mark.timeout(60 * STRESS + 60)
@pytest.mark.parametrize(("flows", "every"), [(1, 0.0), (6, 0.5)])
def test_two_guests_send_datagrams(net: Net, path: DataPath, flows: int, every: float) -> None:
    """None of one guest only, none twice, none changed; few are lost, and most are the kernel's."""
    proxy, got, each, wrong = run(
        net, path, conns=flows, length=0, seed=flows, seconds=4 * STRESS, checkpoint_every=every
    )
    counters = path.counters()
    handed = {r: n for r, (n, _) in counters["offload"].items() if n}
    said = {k: v for k, v in proxy.engine.counters.items() if v}
    kernel = sum(
        counters[p][r][0] for p in ("pvm_out", "svm_arrival")
        for r in ("offload_passed", "offload_released")
    )  # fmt: skip
    assert not wrong, (wrong, said, handed)
    sent = proxy.shared.pos[0][:]
    assert got > 0.9 * sum(sent), (each, sent, said, handed)
    assert kernel > 0.5 * got, (kernel, got, said, handed)


def test_connections_long_unused_are_forgotten(net: Net, path: DataPath) -> None:
    """The table is walked with rests in between: a million buckets take 3 ms, even if empty."""
    fast = path.fast
    assert fast is not None
    idle = fast._idle_ns
    ends = bytes((10, 9, 0, 2, 10, 9, 0, 1, 0, 80))
    keys = [ends + port.to_bytes(2, "big") for port in range(40000, 40020)]
    assert all(fast.offer(k) for k in keys)
    now = time.monotonic_ns()
    fast.sweep(now, 100)
    assert fast.forgotten == 0
    walks = 0
    table = fast._conns.keys

    def walk() -> Iterator[bytes]:
        nonlocal walks
        walks += 1
        return table()

    fast._conns.keys = walk  # type: ignore[method-assign, assignment]
    fast.sweep(now + 5_000_000_000, 100)
    assert walks == 0, "the walk before has just ended"
    for k in keys:
        raw = bytearray(fast._conns.get(conn_key(k)) or b"")
        raw[24] = 1  # client_ack: the client has sent something
        fast._conns.set(conn_key(k), bytes(raw))
    fast.sweep(now + 2 * idle, 7)
    for _ in range(2):
        fast.sweep(now + 2 * idle, 100)
    assert (walks, fast.forgotten) == (1, len(keys))


def test_connections_that_are_over_are_forgotten_sooner(net: Net, path: DataPath) -> None:
    """So are handshakes whose client never answers, as in a SYN flood."""
    fast = path.fast
    assert fast is not None
    idle, now = fast._idle_ns, time.monotonic_ns()
    ends = bytes((10, 9, 0, 2, 10, 9, 0, 1, 0, 80))
    open_, over, flood = (ends + port.to_bytes(2, "big") for port in (40000, 40001, 40002))
    datagrams = bytes((ord("U"), 4, 0)) + ends + bytes((156, 64))
    for key, client_ack, fin in ((open_, 1, 0), (over, 1, 1), (flood, 0, 0), (datagrams, 0, 0)):
        words = [0] * 27
        words[2], words[3], words[23], words[25], words[6] = now, client_ack, fin, 7, 7
        fast._conns.set(conn_key(key), abi.CONN.pack(*words, b"", b""))
    for wait in (1, 2):
        fast.sweep(now + idle // 5 + wait, 100)
    left = set(map(flow_key, fast._conns.keys()))
    assert left == {open_, datagrams} and fast.forgotten == 2


def test_a_kernel_that_refuses_the_fast_path_gets_the_slow_one(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = loader.load

    def load(
        role: str, pair: str, bpffs: str, options: Options, home: str = "", nic: int = 0
    ) -> object:
        if options.fast:
            raise Refused("pvm_out: too large\nmore words of the verifier")
        return real(role, pair, bpffs, options, home, nic)

    monkeypatch.setattr(loader, "load", load)
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path))
    try:
        assert dp.fast is None and set(dp.objects.programs) >= {"pvm_in", "pvm_out"}
        assert "compared in user space: pvm_out: too large" in caplog.text
    finally:
        dp.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
