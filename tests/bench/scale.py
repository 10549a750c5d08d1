# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure ns per packet and memory against the number of connections in the fast path's table.

Frames of connections drawn at random from all of them, one of the PVM and one of the SVM each: cold
entries, as with many clients that each send little. Time is measured as in held.py (CPU ns per
frame of the PVM, without Python's calls), and by the kernel's clock on the two programs. Memory is
what the kernel charges to the map, and by how much the machine's slabs have grown; the rings for
waiting bytes (fast_path_memory) are a pool of fixed size and not included.
"""

from __future__ import annotations

import random
import socket
import struct
from pathlib import Path

from colo_xdp import abi
from colo_xdp.net.packet import parse
from colo_xdp.offload.kernel_format import OffloadRequest, OffloadResult, conn_key
from tests.netns.frames import csum, tcp

from . import held
from .programs import tagged
from .report import Part, Spread
from .stats import fdinfo, ran, run_stats

SAMPLE = 4000
PAYLOAD = 1448
_GUEST = socket.inet_aton("10.9.0.2")


def frame(number: int, svm: bool) -> bytes:
    """Return the first segment of connection `number`, each from a client of its own."""
    data = bytearray(_TEMPLATE)
    client = struct.pack("!I", 0x0B000000 + number)
    data[30:34] = client
    data[24:26] = b"\0\0"
    data[24:26] = struct.pack("!H", 0xFFFF & ~csum(bytes(data[14:34])))
    pseudo = csum(_GUEST + client + struct.pack("!HH", 6, len(data) - 34))
    data[50:52] = struct.pack("!H", pseudo)
    shift = 4 if svm else 0
    head = struct.pack("<BBHHHH", 1, 0, 0, 0, 34 + shift, 16)
    return head + (tagged(bytes(data), abi.KIND_SVM, 1) if svm else bytes(data))


_TEMPLATE = tcp(bytes(PAYLOAD), seq=1000, dport=held.PORT, partial=True)


def _key(number: int) -> bytes:
    """Return the FlowKey of an IPv4 connection without VLANs."""
    return _GUEST + struct.pack("!IHH", 0x0B000000 + number, 80, held.PORT)


def _evict() -> None:
    """Evict the table from the caches."""
    bytes(bytearray(128 << 20))


def _fill(a: held.Arm, first: int, upto: int) -> None:
    assert a.dp is not None and a.dp.fast is not None
    if _key(5) != parse(frame(5, False)[10:]).key:
        raise RuntimeError("not the key that the product has for these frames")
    request = OffloadRequest(held.words(), b"")
    for i in range(first, upto):
        _give(a, i, request)


def _give(a: held.Arm, i: int, request: OffloadRequest) -> None:
    assert a.dp is not None and a.dp.fast is not None
    key = _key(i)
    if not (a.dp.fast.offer(key) and a.dp.fast.offload(key, request, 0) is OffloadResult.ACCEPTED):
        raise RuntimeError(f"connection {i} was not taken")


def _slab_kib() -> int:
    """Return what the kernel has allocated in small pieces and cannot reclaim."""
    text = Path("/proc/meminfo").read_text()
    return int(next(x for x in text.splitlines() if x.startswith("SUnreclaim")).split()[1])


def _round(a: held.Arm, conns: int, rnd: random.Random) -> tuple[float, float]:
    """Return (CPU ns per frame of the PVM in all, ns of both programs), connections at random."""
    assert a.dp is not None and a.dp.fast is not None
    chosen = (
        rnd.sample(range(conns), SAMPLE) if conns >= SAMPLE
        else [i for _ in range(-(-SAMPLE // conns)) for i in range(conns)][:SAMPLE]
    )  # fmt: skip
    request = OffloadRequest(held.words(), b"")
    writes: list[held.Write] = []
    again: dict[int, int] = {}
    for i in chosen:
        n = again[i] = again.get(i, -1) + 1
        for side in (0, 1):
            data = frame(i, bool(side))
            if n:  # the next segment of a connection that has had one in this round
                at = 10 + 34 + 4 + (4 if side else 0)
                data = data[:at] + struct.pack("!I", 1000 + n * PAYLOAD) + data[at + 4 :]
            writes.append((side, data))
    for i in set(chosen):
        key = _key(i)
        a.dp.fast.reclaim(key)
        a.dp.objects.map("conns").delete(conn_key(key))
        _give(a, i, request)
    programs = [a.dp.objects.programs[p].fd for p in ("pvm_out", "svm_arrival")]
    spent = held.handed(a.dp)
    base = held.calls(writes)[0]
    _evict()
    with run_stats():
        before = sum(ran(fd)[0] for fd in programs)
        held.write_all(writes[: len(writes) // 2], a.fds)
        inside = (sum(ran(fd)[0] for fd in programs) - before) / (SAMPLE / 2)
    cpu, _ = held.write_all(writes[len(writes) // 2 :], a.fds)
    if held.handed(a.dp) != spent:
        raise RuntimeError(f"the fast path handed over: {held.handed(a.dp)}")
    return (cpu - base / 2) / (SAMPLE / 2), inside


def run(part: Part, quick: bool, _build: Path) -> None:
    """Measure 1 to 1,000,000 connections (quick: 10,000)."""
    steps = [1, 100, 10_000] if quick else [1, 100, 10_000, 100_000, 300_000, 1_000_000]
    rnd = random.Random(1)
    with held.arm("fast path") as a:
        assert a.dp is not None
        conns = a.dp.objects.map("conns")
        empty, before = fdinfo(conns.fd)["memlock"], _slab_kib()
        have = 0
        for step in steps:
            try:
                _fill(a, have, step)
                have = step
                memory, more = fdinfo(conns.fd)["memlock"], _slab_kib() - before
                runs = [_round(a, step, rnd) for _ in range(3 if quick else 5)]
            except (RuntimeError, OSError) as e:
                part.error(f"{step:,} connections", str(e))
                break
            part.add(f"{step:,} connections", "ns per frame", {
                "whole path": Spread.of(x for x, _ in runs),
                "pvm_out and svm_arrival": Spread.of(y for _, y in runs),
            })  # fmt: skip
            if step >= 10_000:
                part.add(f"{step:,} connections: memory", "bytes each", {
                    "charged to the map": Spread.of([(memory - empty) / step]),
                    "more in the machine's slabs": Spread.of([more * 1024 / step]),
                })  # fmt: skip
    times = [
        r.arms["pvm_out and svm_arrival"].median for r in part.rows if r.unit == "ns per frame"
    ]
    if len(times) > 1:
        part.add(
            "most connections to one, ns", "ratio", {"programs": Spread.of([times[-1] / times[0]])}
        )
