# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs to hold, compare and release, on real devices.

Stand-in guests: this process writes the PVM's frames to a tap and the SVM's to the peer link,
everything that the kernel does with them it does on the CPU that writes. The floor is the same
with no program of ours: the PVM's frames are forwarded, the SVM's dropped, which any COLO proxy
has to pay. What Python needs to call write() is measured with /dev/null and taken off everywhere.
"""

from __future__ import annotations

import os
import select
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from colo_xdp import abi, attach, cleanup, loader
from colo_xdp.abi import Mode
from colo_xdp.compare import Engine, Limits, Policy, Record
from colo_xdp.config import load
from colo_xdp.datapath import DataPath
from colo_xdp.fastpath import Gift
from colo_xdp.packet import parse
from tests.netns.conftest import Net, Tap, inside, sh
from tests.netns.frames import CLIENT_MAC, tcp

PAIR = "bench"
MASK = 0xFFFFFFFF
BATCH = 32  # frames between two looks of tier U at its events


@dataclass(frozen=True)
class Case:
    """What the two guests send."""

    name: str
    payload: int
    svm_payload: int = 0  # 0: the same
    conns: int = 1
    lag: int = 1  # frames that the SVM is behind
    frames: int = 12_000


CASES = (
    Case("MTU", 1448),
    Case("MTU, S behind by 40", 1448, lag=40),
    Case("MTU, 64 connections", 1448, conns=64, lag=64),
    Case("MTU, 10,000 connections", 1448, conns=10_000, lag=64),
    Case("MTU against 1000 bytes", 1448, svm_payload=1000),
    Case("64 KB", 64_000, frames=1500),
    Case("64 KB, S behind by 6", 64_000, lag=6, frames=1500),
    Case("64 KB against 40 KB", 64_000, svm_payload=40_000, frames=1500),
)


def _frame(port: int, at: int, n: int, tagged: bool) -> bytes:
    """virtio_net_hdr and frame; `tagged`: as the secondary's controller sends it."""
    frame = tcp(bytes(n), seq=(1000 + at) & MASK, dport=port, partial=True)
    shift = 4 if tagged else 0
    gso = (1, 34 + 32 + shift, 1448) if n > 1448 else (0, 0, 0)
    if tagged:
        tci = abi.KIND_SVM << abi.KIND_SHIFT | 1
        frame = frame[:12] + struct.pack("!HH", abi.TPID, tci) + frame[12:]
    return struct.pack("<BBHHHH", 1, gso[0], gso[1], gso[2], 34 + shift, 16) + frame


Write = tuple[int, bytes]  # 0: PVM, 1: SVM; what


def plan(case: Case) -> list[Write]:
    """Both guests' frames, in the order in which they are written."""
    per_conn = max(1, case.frames // case.conns)
    pvm: list[Write] = []
    svm: list[Write] = []
    size = case.svm_payload or case.payload
    for turn in range(per_conn):
        for c in range(case.conns):
            pvm.append((0, _frame(10_000 + c, turn * case.payload, case.payload, False)))
    total = per_conn * case.payload
    for at in range(0, total, size):
        for c in range(case.conns):
            svm.append((1, _frame(10_000 + c, at, min(size, total - at), True)))
    out: list[Write] = []
    rate = len(svm) / len(pvm)
    sent = 0
    for i, w in enumerate(pvm):
        out.append(w)
        due = min(len(svm), int((i + 1 - case.lag) * rate))
        out += svm[sent : max(sent, due)]
        sent = max(sent, due)
    return out + svm[sent:]


def _ns(writes: list[Write], fds: tuple[int, int], each: Callable[[], None] | None) -> int:
    """CPU ns of all writes, and of each(), which is called after BATCH of them."""
    write = os.write
    for fd in fds:
        os.set_blocking(fd, True)
    began = time.process_time_ns()
    if each is None:
        for side, data in writes:
            write(fds[side], data)
    else:
        for i in range(0, len(writes), BATCH):
            for side, data in writes[i : i + BATCH]:
                write(fds[side], data)
            each()
    return time.process_time_ns() - began


@contextmanager
def bench_net() -> Iterator[tuple[Net, Tap, Tap]]:
    """tap0 in a bridge with the client, and a tap that stands in for the peer link."""
    net = Net("cxb")
    try:
        sh("ip", "-n", net.host, "link", "del", "peer0")
        sh("ip", "-n", net.host, "tuntap", "add", "peer0", "mode", "tap", "vnet_hdr")
        with inside(net.host):
            guest, peer = Tap("tap0"), Tap("peer0")
        sh("ip", "-n", net.host, "link", "set", "dev", "peer0", "mtu", "1600", "up")
        mac = CLIENT_MAC.hex(":")
        fdb = f"fdb add {mac} dev uplink master static".split()
        subprocess.run(["bridge", "-n", net.host, *fdb], check=True)
        yield net, guest, peer
        guest.close()
        peer.close()
    finally:
        net.close()


_SINK = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
int sink(struct __sk_buff *skb) { return TC_ACT_SHOT; }
"""


def sink() -> SimpleNamespace:
    """A program that drops all."""
    bpf = loader.compile_text(_SINK)
    f = bpf.load_func(b"sink", 3)
    return SimpleNamespace(fd=f.fd, name="sink", bpf=bpf)


def config_text(run_dir: str, fast: str, memory: int, uplink: str) -> str:
    """As short as the daemon takes it."""
    return f"""
        pair = "{PAIR}"
        role = "primary"
        [network]
        tap = "tap0"
        peer_link = "peer0"
        uplink = "{uplink}"
        [qemu]
        qmp = "/nonexistent"
        migrate_uri = "unix:/nonexistent"
        [peer]
        local = "127.0.0.1:1"
        remote = "127.0.0.1:2"
        [compare]
        max_queue_size = 65536
        [datapath]
        run_dir = "{run_dir}"
        fast_path = "{fast}"
        fast_path_memory = {memory}
        [metrics]
        listen = ""
        """


@contextmanager
def data_path(net: Net, fast: str, memory: int = 256, uplink: str = "auto") -> Iterator[DataPath]:
    """Ours, on the devices of the namespace, with no controller."""
    work = tempfile.mkdtemp(prefix="colo-bench.")
    path = Path(work) / "pair.toml"
    path.write_text(config_text(work, fast, memory, uplink))
    with inside(net.host):
        cleanup.cleanup(PAIR, "/sys/fs/bpf", work)
        dp = DataPath(load(path))
        dp.epoch, dp.mode = 1, Mode.RUN
        try:
            yield dp
        finally:
            dp.close()
            cleanup.cleanup(PAIR, "/sys/fs/bpf", work)


def give_all(dp: DataPath, conns: int) -> None:
    """All connections of a case to tier K, at the numbers where they begin."""
    assert dp.fast is not None
    for c in range(conns):
        key = parse(tcp(b"", dport=10_000 + c)).key
        words = abi.GIVE.pack(
            1, 1000, 5000, 5000, 5000, 4096, 4096, 4096, 1448, 1000, 1000, 0, 0, 0, 0, b"", b""
        )
        if not (dp.fast.offer(key) and dp.fast.give(key, Gift(words, b""), 0)):
            raise RuntimeError("a connection was not taken")


def hear_client(dp: DataPath, net: Net) -> None:
    """As its acks would tell all the time: the client is at the uplink."""
    with inside(net.host):
        dp.watch_bridge()
        port = attach.link_info("uplink").index
    key = struct.unpack("=I", CLIENT_MAC[:4])[0] << 16 | struct.unpack("=H", CLIENT_MAC[4:])[0]
    ever = time.monotonic_ns() + 10**12
    dp.objects.map("clients").set(struct.pack("=Q", key), abi.CLIENT.pack(ever, port, 0))
    dp._write(abi.Cfg.LOSS_NS, 0)  # there is no controller


class TierU:
    """Engine and data path as the primary's controller runs them."""

    def __init__(self, dp: DataPath) -> None:
        self.dp = dp
        self.asked: list[str] = []
        self.engine = Engine(
            Limits(max_queue_size=65536), Policy(), self._release,
            request_checkpoint=lambda d: self.asked.append(str(d.cause)), on_wait=lambda ns: None,
            fast=dp.fast,
        )  # fmt: skip
        self.engine.epoch = 1

    def _release(self, rec: Record) -> None:
        self.dp.injectors["release"].send(rec.frame, rec.gso_size, rec.partial)

    def wait(self, seconds: float) -> None:
        """Until there may be something to do."""
        select.select(self.dp.reader.fds, [], [], seconds)

    def __call__(self) -> None:
        now = time.monotonic_ns()
        engine = self.engine

        def on(e) -> None:  # type: ignore[no-untyped-def]
            rec = Record(e.frame, e.ts_ns, e.gso_size, e.partial, captured=e.captured)
            if e.source == abi.Source.PVM:
                engine.from_pvm(rec, now)
            else:
                engine.from_svm(rec, e.epoch, now)

        self.dp.drain(on)
        self.dp.beat()
        engine.flush(now)
        engine.tick(now)


def received(net: Net) -> int:
    """Bytes that the client got."""
    path = "/sys/class/net/c0/statistics/rx_bytes"
    return int(sh("ip", "netns", "exec", net.client, "cat", path))


def measure(case: Case, arms: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """ns of CPU per frame of the PVM, Python's calls taken off: median and spread, by arm."""
    writes = plan(case)
    frames = sum(1 for side, _ in writes if side == 0)
    null = os.open("/dev/null", os.O_WRONLY)
    out: dict[str, list[float]] = {a: [] for a in arms}
    expected = sum(len(d) - 10 for side, d in writes if side == 0)
    for _ in range(repeats):
        calls = min(_ns(writes, (null, null), None) for _ in range(3))
        for arm in arms:
            with bench_net() as (net, guest, peer):
                fds = (guest.fd, peer.fd)
                before = received(net)
                if arm == "floor":
                    with inside(net.host):
                        attach.attach_tc("peer0", "ingress", sink(), PAIR, None)
                    ns = _ns(writes, fds, None)
                elif arm != "U":
                    with data_path(
                        net, "on", uplink="bridge" if arm == "K bridge" else "auto"
                    ) as dp:
                        give_all(dp, case.conns)
                        hear_client(dp, net)
                        ns = _ns(writes, fds, None)
                        handed = {r: n for r, (n, _) in dp.counters()["fast"].items() if n}
                        if handed:
                            raise RuntimeError(f"{case.name}: tier K handed over: {handed}")
                else:
                    with data_path(net, "off") as dp:
                        tier = TierU(dp)
                        ns = _ns(writes, fds, tier)
                        if tier.asked:
                            raise RuntimeError(f"{case.name}: tier U asked: {tier.asked[:3]}")
                got = received(net) - before
                if got < 0.98 * expected:
                    raise RuntimeError(f"{case.name}, {arm}: {got} bytes of {expected} arrived")
            out[arm].append((ns - calls) / frames)
    os.close(null)
    return {a: {"ns": statistics.median(v), "low": min(v), "high": max(v)} for a, v in out.items()}


if __name__ == "__main__":
    for c in CASES:
        got = measure(c, ("floor", "K", "K bridge", "U"), 3)
        floor = got["floor"]["ns"]
        print(
            f"{c.name:28s}",
            *(f"{a} {v['ns']:8.0f} ({floor / v['ns']:.2f})" for a, v in got.items()),
            flush=True,
        )
