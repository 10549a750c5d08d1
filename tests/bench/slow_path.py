# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what the engine costs per frame of the PVM, by stage, in one process.

    python -m tests.bench.slow_path   prints a table and writes build/slow-path-bench.json

Both guests' events are in a ring buffer of the kernel's layout. They are read as the controller
reads them, compared, and released by writing to a real tap in a namespace of its own. The reference
in the same run is the least that Python can do: the same reads and writes around a dictionary from
sequence number to frame and one `==` (no order, no acks, no timeouts, no windows, no
retransmissions).
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from colo_xdp import abi
from colo_xdp.compare.limits import Limits
from colo_xdp.compare.policy import Policy
from colo_xdp.controller.pvm_output import PvmOutput
from colo_xdp.datapath.devices import make_tap
from colo_xdp.datapath.inject import Injector
from colo_xdp.datapath.ring import CapturedFrame, RingReader
from colo_xdp.engine.engine import Engine
from colo_xdp.lab.net import in_ns
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse
from colo_xdp.status.document import WAIT_BUCKETS
from colo_xdp.tools.corpus import craft

from .report import Part, Spread

REPORT = Path("build/slow-path-bench.json")
REPEATS = 5
STAGES = ("drain", "parse", "compare", "release")
BATCH = 32  # frames of one guest before the other's, as they come from a NIC queue
PAGE = os.sysconf("SC_PAGE_SIZE")
NAMESPACE = "colo-bench-u"
FLOOD = 20_000


class Ring:
    """A BPF ring buffer in plain memory (kernel/bpf/ringbuf.c): consumer page, producer page, data
    twice.

    It is filled again and again with little, as a controller that keeps up finds it.
    """

    SIZE = 8 << 20
    ROUND = 256  # events

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * self.SIZE)
        table = SimpleNamespace(fd=self.fd, info=SimpleNamespace(max_entries=self.SIZE))
        self._reader = RingReader(SimpleNamespace(map=lambda name: table))  # type: ignore[arg-type]
        self._at = 0

    def drain(self, events: list[bytes], sink: Callable[[CapturedFrame], None]) -> int:
        """Fill the ring and read it; return CPU ns of the latter."""
        data = b"".join(struct.pack("=II", len(e), 0) + e + bytes(-len(e) % 8) for e in events)
        place = self._at % self.SIZE
        wraps = max(0, place + len(data) - self.SIZE)
        os.pwrite(self.fd, data, 2 * PAGE + place)
        os.pwrite(self.fd, data[: len(data) - wraps], 2 * PAGE + self.SIZE + place)
        if wraps:
            os.pwrite(self.fd, data[len(data) - wraps :], 2 * PAGE)
        self._at += len(data)
        os.pwrite(self.fd, struct.pack("=Q", self._at), PAGE)
        began = time.process_time_ns()
        while self._reader.drain(sink, 4 * BATCH):
            pass
        return time.process_time_ns() - began

    def close(self) -> None:
        self._reader.close()
        os.close(self.fd)


def event(source: abi.Source, frame: bytes, gso: int = 0) -> bytes:
    """Build struct colo_event and its frame."""
    flags = abi.EV_PARTIAL if gso else 0
    now = time.monotonic_ns()
    return abi.EVENT.pack(now, len(frame), 0, gso, 0, 0, int(source), flags, 0, 0, 0, 0) + frame


def frame(conn: int, index: int, size: int) -> bytes:
    """Build the index-th segment of a connection, `size` bytes of payload."""
    src = f"src=10.0.0.1 dst=10.1.{conn >> 8 & 255}.{conn & 255} dport={4000 + (conn >> 16)}"
    s = craft.spec(f"tcp A seq={1000 + index * size} {src}")
    s["body"] = _BODY[:size]
    return craft.build(s)


_BODY = random.Random(1).randbytes(65_000)


def traffic(connections: int, frames: int, size: int) -> list[bytes]:
    """Return events of both guests in batches; the connections take turns."""
    gso = 1448 if size > 1460 else 0
    sent = [frame(i % connections, i // connections, size) for i in range(frames)]
    out: list[bytes] = []
    for at in range(0, frames, BATCH):
        for source in (abi.Source.PVM, abi.Source.SVM):
            out += [event(source, f, gso) for f in sent[at : at + BATCH]]
    return out


def reference(release: Callable[[Frame], None]) -> Callable[[CapturedFrame], None]:
    """Match by sequence number, compare, release."""
    waiting: dict[tuple[bytes, int], tuple[bytes, int, CapturedFrame]] = {}
    numbers = struct.Struct("!I")

    def on(e: CapturedFrame) -> None:
        f = e.frame
        (seq,) = numbers.unpack_from(f, 38)
        key, off = (f[26:38], seq), 34 + (f[46] >> 4) * 4
        other = waiting.pop(key, None)
        if other is None:
            waiting[key] = (f, off, e)
        elif f[off:] == other[0][other[1] :]:
            p = e if e.source == abi.Source.PVM else other[2]
            release(Frame(p.frame, 0, p.gso_size, p.partial))

    return on


def engine(release: Callable[[Frame], None], limits: Limits | None = None) -> tuple[Any, Any]:
    """Return a handler of events as in controller/primary.py, and its engine."""

    def never(d: Any) -> None:
        raise AssertionError(d)

    waits: Any = SimpleNamespace(waits=[0] * (len(WAIT_BUCKETS) + 1), wait_sum=0.0)
    e = Engine(
        limits or Limits(max_flows=200_000), Policy(), release, request_checkpoint=never,
        on_wait=partial(PvmOutput._on_wait, waits),
    )  # fmt: skip
    now = time.monotonic_ns

    def on(ev: CapturedFrame) -> None:
        rec = Frame(ev.frame, ev.ts_ns, ev.gso_size, ev.partial)
        if ev.source == abi.Source.PVM:
            e.from_pvm(rec, now())
        else:
            e.from_svm(rec, ev.epoch, now())

    return on, e


def _time(ring: Ring, events: list[bytes], sink: Callable[[CapturedFrame], None]) -> float:
    gc.collect()
    gc.disable()
    step = Ring.ROUND if len(events[0]) < 5000 else 16
    try:
        return sum(ring.drain(events[i : i + step], sink) for i in range(0, len(events), step))
    finally:
        gc.enable()


def stages(
    send: Callable[[Frame], None], connections: int, frames: int, size: int
) -> dict[str, Any]:
    """Return CPU ns per frame of the PVM (its event and the SVM's), medians.

    The connections are open when it begins.
    """
    warm = -(-connections // BATCH) * BATCH
    events = traffic(connections, frames + warm, size)
    first, events = events[: 2 * warm], events[2 * warm :]
    ring = Ring()
    kinds: dict[str, Callable[[], Callable[[CapturedFrame], None]]] = {
        "drain": lambda: lambda e: None,
        "parse": lambda: lambda e: parse(e.frame) and None,
        "compare": lambda: engine(lambda rec: None)[0],
        "release": lambda: engine(send)[0],
        "reference": lambda: reference(send),
    }
    took: dict[str, list[float]] = {k: [] for k in kinds}
    try:
        for _ in range(REPEATS):  # in turns, so that what disturbs the machine disturbs all of them
            for name, make in kinds.items():
                sink = make()
                if first:
                    _time(ring, first, sink)
                took[name].append(_time(ring, events, sink) / frames)
    finally:
        ring.close()
    median = {k: statistics.median(v) for k, v in took.items()}
    return {
        "connections": connections, "size": size, "frames": frames,
        "ns": {
            "drain": median["drain"],
            "parse": median["parse"] - median["drain"],
            "compare": median["compare"] - median["parse"],
            "release": median["release"] - median["compare"],
            "all": median["release"],
        },
        "reference_ns": median["reference"],
        "ratio": statistics.median(
            a / b for a, b in zip(took["release"], took["reference"], strict=True)
        ),
        "runs": took,
    }  # fmt: skip


def memory(connections: int) -> dict[str, Any]:
    """Return the resident bytes of this many connections with some bytes of history each.

    It runs in its own process.
    """
    code = f"from tests.bench import slow_path; slow_path.memory_child({connections})"
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    found: dict[str, Any] = json.loads(r.stdout)
    return found


def memory_child(connections: int) -> None:
    """Print what memory() returns."""
    out: list[Frame] = []
    on, e = engine(out.append)
    before = _resident()
    for conn in range(connections):
        for source in (abi.Source.PVM, abi.Source.SVM):
            on(CapturedFrame(source, 0, 0, frame(conn, 0, 600), 0, False))
        out.clear()
    grown = _resident() - before
    assert len(e._flows.tcp) == connections and not e.held_packets
    print(json.dumps({"connections": connections, "bytes": grown, "each": grown // connections}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def flood() -> dict[str, Any]:
    """Run one honest connection among new ones of either guest without a counterpart, with little
    room.

    Each requested checkpoint is taken at once. Return what the honest connection gets, and the
    cost.
    """
    released: list[bytes] = []
    asked: list[str] = []
    limits = Limits(max_queue_size=512, max_flows=1000, compare_timeout_ns=1 << 62)
    e = Engine(
        limits, Policy(), lambda rec: released.append(rec.frame),
        request_checkpoint=lambda d: asked.append(d.cause), on_wait=lambda ns: None,
    )  # fmt: skip
    each = FLOOD // 200
    honest = [frame(0, i, 1448) for i in range(200)]
    others = [frame(1 + i, 0, 10) for i in range(FLOOD)]
    made = 0
    began = time.process_time_ns()
    for i, other in enumerate(others):
        now = time.monotonic_ns()
        if i % each == 0:
            e.from_pvm(Frame(honest[i // each], now), now)
        if i & 1:
            e.from_svm(Frame(other, now), e.epoch & 0xFFF, now)
        else:
            e.from_pvm(Frame(other, now), now)
        if i % each == each // 2:
            e.from_svm(Frame(honest[i // each], now), e.epoch & 0xFFF, now)
        if len(asked) > made:
            made = len(asked)
            e.begin_checkpoint()
            e.commit_checkpoint(now, e.epoch + 1, now)
    took = time.process_time_ns() - began
    place = {f: i for i, f in enumerate(honest)}
    got = [place[f] for f in released if f in place]
    return {
        "flood": FLOOD, "in_order": got == sorted(set(got)), "lost": len(honest) - len(got),
        "checkpoints": made, "ns_per_frame": took / FLOOD, "flows": len(e._flows.tcp),
    }  # fmt: skip


@contextmanager
def tap() -> Iterator[Callable[[Frame], None]]:
    """Release by writing to a tap in a namespace of its own, whose stack drops it."""
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True, timeout=10)
    try:
        fd = in_ns(NAMESPACE, lambda: make_tap("release0"))
        injector = Injector(fd)
        try:
            yield lambda rec: (injector.send(rec.frame, rec.gso_size, rec.partial), None)[1]
            assert not injector.failed, injector.failed
        finally:
            injector.close()
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True, timeout=10)


def measure(quick: bool = False) -> dict[str, Any]:
    """Measure everything."""
    n = 2000 if quick else 20_000
    with tap() as send:
        rows = [
            stages(send, 1, n, 1448),
            stages(send, 64, n, 1448),
            stages(send, 1, n // 10, 64_000),
        ]
        scale = [
            stages(send, c, max(n, 2 * c), 64) for c in ((1, 2000) if quick else (1, 1000, 100_000))
        ]
    return {
        "stages": rows, "scale": scale, "flood": flood(),
        "memory": memory(5000 if quick else 100_000),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def run(part: Part, quick: bool, _build: Path) -> None:
    """Run as a part of `make bench`."""
    found = measure(quick)
    for row in [*found["stages"], *found["scale"]]:
        took = row["runs"]
        arms = {"least": Spread.of(took["reference"]), "drain": Spread.of(took["drain"])}
        for before, stage in zip(STAGES, STAGES[1:], strict=False):
            both = zip(took[stage], took[before], strict=True)
            arms[stage] = Spread.of(x - y for x, y in both)
        arms["all"] = Spread.of(took["release"])
        conns = f"{row['connections']:,} conn., {row['size']:,} bytes"
        part.add(conns, "ns per frame", arms, base="least")
    m = found["memory"]
    part.add(f"memory of {m['connections']:,} connections", "bytes each",
             {"engine": Spread.of([float(m["each"])])})  # fmt: skip


def main() -> None:
    """Print and write."""
    r = measure()
    print(f"{'connections':>11} {'payload':>8} {'drain':>7} {'parse':>7} {'compare':>8} "
          f"{'release':>8} {'all ns':>8} {'least':>8} {'ratio':>6}")  # fmt: skip
    for row in [*r["stages"], *r["scale"]]:
        ns = row["ns"]
        print(
            f"{row['connections']:>11} {row['size']:>8} {ns['drain']:>7.0f} {ns['parse']:>7.0f} "
            f"{ns['compare']:>8.0f} {ns['release']:>8.0f} {ns['all']:>8.0f} "
            f"{row['reference_ns']:>8.0f} {row['ratio']:>6.2f}"
        )
    m, f = r["memory"], r["flood"]
    print(f"{m['connections']} connections: {m['bytes'] >> 20} MiB, {m['each']} bytes each")
    print(
        f"flood of {f['flood']} frames: {f['checkpoints']} checkpoints, {f['ns_per_frame']:.0f} ns "
        f"each; the honest connection: {f['lost']} of 200 frames to be sent again"
    )
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(r, indent=2))


if __name__ == "__main__":
    main()
