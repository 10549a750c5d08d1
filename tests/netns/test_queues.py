# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a tap with several queues: what a guest sends in order leaves in order, from any of them.

The stand-in for the guest writes each frame to another queue, from another thread on another CPU,
after the write before has returned. So does a Linux guest: it moves a flow to another queue only
when nothing of it is under way in the old one (docs/design/queues.md). What happens to a flow that
is in two queues at once is tested too: never a wrong byte.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath import devices
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.tools import cleanup
from tests.bench import held
from tests.netns import test_secondary_path as secondary
from tests.netns.conftest import Net, Tap, inside, own, sh
from tests.netns.frames import tcp, udp
from tests.netns.offload_lab import run
from tests.netns.test_primary_path import PAIR, config

QUEUES = 4
FLOWS = 8
BASE = 40_000  # port of the first flow


class Guest:
    """A guest with a thread and a CPU for each of its queues; send() waits for the write."""

    def __init__(self, queues: int = QUEUES) -> None:
        self.taps = [Tap("tap0", multi_queue=True) for _ in range(queues)]
        self._work: list[SimpleQueue[bytes]] = [SimpleQueue() for _ in range(queues)]
        self._done: SimpleQueue[None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, args=(i,)) for i in range(queues)]
        for t in self._threads:
            t.start()

    def _serve(self, i: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[i % len(cpus)]})
        os.set_blocking(self.taps[i].fd, True)
        while raw := self._work[i].get():
            os.write(self.taps[i].fd, raw)
            self._done.put(None)

    def send(self, queue: int, raw: bytes) -> None:
        """Write a frame with its virtio_net_hdr to a queue, and wait until it has been taken."""
        self._work[queue].put(raw)
        self._done.get(timeout=10)

    def close(self) -> None:
        for i, t in enumerate(self._threads):
            self._work[i].put(b"")
            t.join(5)
        for tap in self.taps:
            tap.close()


@pytest.fixture
def net() -> Iterator[Net]:
    n = Net(own("cx"), multi_queue=True)
    try:
        with inside(n.host):
            yield n
    finally:
        n.close()


@contextmanager
def data_path(tmp_path: Path, **options: object) -> Iterator[DataPath]:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path, **options))
    dp.epoch, dp.mode = 1, Mode.RUN
    try:
        yield dp
    finally:
        dp.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


@pytest.fixture
def guest(net: Net) -> Iterator[Guest]:
    g = Guest()
    yield g
    g.close()


def numbered(flow: int, number: int) -> bytes:
    return udp(struct.pack("!I", number) + bytes(200), dport=BASE + flow)


def test_the_kernel_reports_the_queues(net: Net, guest: Guest) -> None:
    assert devices.link_info("tap0").multi_queue
    assert devices.link_info("tap0").queues == QUEUES
    assert not devices.link_info("uplink").queues


@pytest.mark.parametrize("events", ["ring", "perf"])
def test_events_come_in_the_order_of_the_writes(
    net: Net, guest: Guest, tmp_path: Path, events: str
) -> None:
    """Through one ring, or one buffer for each CPU, that is read while the guest writes."""
    rnd, count = random.Random(1), 6000
    sent = [0] * FLOWS
    got: list[list[int]] = [[] for _ in range(FLOWS)]
    stamps: list[int] = []

    def on(e: CapturedFrame) -> None:
        port, number = struct.unpack_from("!H", e.frame, 36)[0], e.frame[42:46]
        if BASE <= port < BASE + FLOWS:
            got[port - BASE].append(int.from_bytes(number, "big"))
            stamps.append(e.ts_ns)

    def write() -> None:
        for _ in range(count):
            flow = rnd.randrange(FLOWS)
            guest.send(rnd.randrange(QUEUES), bytes(10) + numbered(flow, sent[flow]))
            sent[flow] += 1

    with data_path(tmp_path, events=events) as dp:
        assert dp.objects.events == events
        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            dp.beat()
            dp.drain(on)
        writer.join()
        while dp.drain(on):
            pass
        assert dp.reader.lost == 0
    assert sum(sent) == count
    assert sorted(map(sorted, got)) == sorted(list(range(n)) for n in sent), "lost"
    assert got == [list(range(n)) for n in sent]
    assert stamps == sorted(stamps), "they tell the order in which the guest sent"


class Wire:
    """What a device transmits, in the order of transmission."""

    def __init__(self, device: str) -> None:
        self.s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.s.bind((device, 0))
        self.s.settimeout(0.3)

    def frames(self) -> Iterator[bytes]:
        while True:
            try:
                frame, address = self.s.recvfrom(70_000)
            except TimeoutError:
                return
            if address[2] == socket.PACKET_OUTGOING:
                yield frame

    def close(self) -> None:
        self.s.close()


@contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on one CPU, as an interrupt of the peer link's card would."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("uplink", ["past the bridge", "through the bridge"])
@pytest.mark.parametrize("late", ["PVM", "SVM"])
def test_the_fast_path_keeps_the_order_of_a_flow_that_moves(
    tmp_path: Path, late: str, uplink: str
) -> None:
    """The peer link is a tap here, so that one write has ended in full before the next begins.

    Through a veth the SVM's frame may be handled on another CPU meanwhile, and the two CPUs
    exchange what they release (docs/design/queues.md).
    """
    rnd, count, size = random.Random(2), 4000, 400
    at = [0] * FLOWS
    with (
        held.bench_net(own("cx"), multi_queue=True) as (net, _first, peer),
        inside(net.host),
        data_path(tmp_path, fast_path_memory=16) as dp,
        pinned(),
    ):
        if uplink == "past the bridge":
            held.hear_client(dp, net)
        held.offload_all(dp, held.Case("", size, conns=FLOWS))
        guest, wire = Guest(), Wire("uplink")
        for _ in range(count):
            flow = rnd.randrange(FLOWS)
            data = rnd.randbytes(size)
            frame = tcp(data, seq=1000 + at[flow], dport=held.PORT + flow)
            tagged = frame[:12] + struct.pack("!HH", abi.TPID, abi.KIND_SVM << 13 | 1)
            at[flow] += size
            if late == "PVM":
                peer.send(tagged + frame[12:])
            guest.send(rnd.randrange(QUEUES), bytes(10) + frame)
            if late == "SVM":
                peer.send(tagged + frame[12:])
            dp.beat()
        left: list[list[int]] = [[] for _ in range(FLOWS)]
        for frame in wire.frames():
            port, seq = struct.unpack_from("!HI", frame, 36)
            if held.PORT <= port < held.PORT + FLOWS:
                left[port - held.PORT].append(seq - 1000)
        wire.close()
        guest.close()
        assert held.handed(dp) == {}, "the kernel has decided all"
    assert left == [list(range(0, n, size)) for n in at]


def test_the_svms_output_keeps_its_order(net: Net, tmp_path: Path) -> None:
    """On its way to the peer link, where the tap's program redirects it."""
    rnd, count = random.Random(3), 4000
    sh("ip", "-n", net.host, "link", "set", "dev", "tap0", "nomaster")
    cleanup.cleanup(secondary.PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(secondary.config(tmp_path))
    guest = Guest()
    wire = Wire("peer0")
    sent = [0] * FLOWS
    try:
        dp.epoch, dp.mode = 1, Mode.RUN
        for _ in range(count):
            flow = rnd.randrange(FLOWS)
            guest.send(rnd.randrange(QUEUES), bytes(10) + numbered(flow, sent[flow]))
            sent[flow] += 1
        left: list[list[int]] = [[] for _ in range(FLOWS)]
        for frame in wire.frames():
            port, number = struct.unpack_from("!H", frame, 36)[0], frame[42:46]
            if BASE <= port < BASE + FLOWS:
                left[port - BASE].append(int.from_bytes(number, "big"))
    finally:
        wire.close()
        guest.close()
        dp.close()
        cleanup.cleanup(secondary.PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    assert left == [list(range(n)) for n in sent]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("every", [0.0, 0.5], ids=["no checkpoint", "checkpoints"])
def test_a_flow_in_two_queues_at_once_is_reordered_and_whole(
    net: Net, tmp_path: Path, every: float
) -> None:
    """Each segment overtakes others: retransmitted or held, never a wrong byte."""
    conns, length = 4, 3 << 20
    with data_path(tmp_path, fast_path_memory=16) as dp:
        proxy, _, have, wrong = run(
            net, dp, conns=conns, length=length, seed=7, seconds=60, checkpoint_every=every,
            queues=QUEUES,
        )  # fmt: skip
        handed = held.handed(dp)
    said = {k: v for k, v in proxy.engine.counters.items() if v}
    assert not wrong, (wrong, said, handed)
    assert have == [length] * conns, (have, said, handed)
    assert handed.get("punt_out_of_order"), f"nothing was reordered: {handed}"


@pytest.mark.timeout(60)
def test_datagrams_in_two_queues_at_once(net: Net, tmp_path: Path) -> None:
    with data_path(tmp_path, fast_path_memory=16) as dp:
        proxy, got, each, wrong = run(
            net, dp, conns=4, length=0, seed=8, seconds=5, queues=QUEUES
        )  # fmt: skip
    said = {k: v for k, v in proxy.engine.counters.items() if v}
    assert not wrong, (wrong, said)
    assert got > 0.9 * sum(proxy.shared.pos[0][:]), (each, said)
