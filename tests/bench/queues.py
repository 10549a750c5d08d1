# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what leaves per second of a guest whose tap has several queues, against one queue.

A queue is served by one thread (QEMU's, or a vhost worker), so here by one process, which writes
the frames of some connections to its queue and the SVM's copies of them to the peer link. `moving`:
one process writes each connection's frames to all queues in turn. The rate is of the wall clock
from the first write to the last.

With fewer CPUs than queues, or on a busy machine, four processes forward less than one does without
any program of ours too. So the goal compares what more queues do to the fast path with what they do
to the floor, turn by turn.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from colo_xdp.datapath import attach
from colo_xdp.datapath.datapath import DataPath
from tests.netns.conftest import Net, Tap, inside

from . import held
from .held import PVM, Case, Write
from .report import Part, Spread

QUEUES = 4
GOAL = 0.9  # more queues must not cost more than a tenth
_FORK = mp.get_context("fork")


@dataclass
class Arm:
    """One way to forward, with taps for each queue of the guest."""

    name: str
    net: Net
    queues: list[Tap]
    peer: Tap
    client: socket.socket
    dp: DataPath | None
    moving: bool = False

    def plans(self, case: Case, writes: list[Write]) -> list[list[tuple[int, bytes]]]:
        """Return for each process what it writes, and to which descriptor."""
        count = len(self.queues)
        if self.moving or count == 1:
            return [list(self._descriptors(held.with_acks(case, writes), 0))]
        return [
            list(self._descriptors(
                held.with_acks(case, [w for w in writes if _port(w) % count == q]), q
            ))
            for q in range(count)
        ]  # fmt: skip

    def _descriptors(self, writes: list[Write], queue: int) -> Iterator[tuple[int, bytes]]:
        turn = 0
        for side, data in writes:
            turn += side == PVM
            q = turn % len(self.queues) if self.moving else queue
            yield (self.queues[q].fd, self.peer.fd, self.client.fileno())[side], data


def _port(w: Write) -> int:
    """Return the client's port of a guest's frame."""
    side, data = w
    port: int = struct.unpack_from("!H", data, 10 + 34 + 4 * side + 2)[0]
    return port


@contextmanager
def arm(name: str, tag: str, queues: int) -> Iterator[Arm]:
    """Build one; `name` begins with `floor` (no program of ours) or `fast path`."""
    with held.bench_net(tag, queues > 1) as (net, guest, peer), ExitStack() as stack:
        taps = [guest]
        with inside(net.host):
            taps += [Tap("tap0", multi_queue=True) for _ in range(queues - 1)]
        for tap in taps[1:]:
            stack.callback(tap.close)
        for tap in (*taps, peer):
            os.set_blocking(tap.fd, True)
        dp = None
        if name.startswith("floor"):
            with inside(net.host):
                attach.attach_tc("peer0", "ingress", held.sink(), held.PAIR, None)  # type: ignore[arg-type]
        else:
            dp = stack.enter_context(held.data_path(net, "on", pair=f"{held.PAIR}{tag[-1]}"))
            held.hear_client(dp, net)
        with inside(net.client):
            client = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            client.bind(("c0", 0))
        yield Arm(name, net, taps, peer, client, dp, "moving" in name)


def once(
    a: Arm, case: Case, plans: list[list[tuple[int, bytes]]], size: int
) -> tuple[float, float]:
    """Return the Gbit/s that reached the client, and the guests' CPU ns per frame of the PVM."""
    if a.dp is not None:
        held.offload_all(a.dp, case)
    before, handed = held.received(a.net), held.handed(a.dp) if a.dp else {}
    ready, go = _FORK.Barrier(len(plans) + 1), _FORK.Barrier(len(plans) + 1)
    clocks = _FORK.Array("q", 3 * len(plans), lock=False)  # begin, end, CPU of each process

    def write_all(i: int, plan: list[tuple[int, bytes]]) -> None:
        write = os.write
        ready.wait(60)
        go.wait(60)
        began, busy = time.monotonic_ns(), time.process_time_ns()
        for fd, data in plan:
            write(fd, data)
        clocks[3 * i : 3 * i + 3] = [
            began, time.monotonic_ns(), time.process_time_ns() - busy,
        ]  # fmt: skip

    processes = [
        _FORK.Process(target=write_all, args=(i, p), daemon=True) for i, p in enumerate(plans)
    ]
    for p in processes:
        p.start()
    try:
        ready.wait(60)
        go.wait(60)
        for p in processes:
            p.join(60)
    finally:
        for p in processes:
            p.kill()
    ns = max(clocks[1::3]) - min(clocks[0::3])
    got = held.received(a.net) - before
    if a.dp is not None and held.handed(a.dp) != handed:
        raise RuntimeError(f"{a.name}: the fast path handed over: {held.handed(a.dp)}")
    if got < 0.98 * size:
        raise RuntimeError(f"{a.name}: {got} bytes of {size} arrived")
    return 8 * got / ns, sum(clocks[2::3]) / case.frames


def run(part: Part, quick: bool, _build: Path) -> None:
    """Run all arms in turns, with MTU frames and with 64 KB ones."""
    repeats = 3 if quick else 5
    scale = 8 if quick else 1
    with ExitStack() as stack:
        arms = [
            stack.enter_context(arm(name, f"cxb{i}", queues))
            for i, (name, queues) in enumerate((
                ("floor, 1 queue", 1), (f"floor, {QUEUES} queues", QUEUES),
                ("fast path, 1 queue", 1), (f"fast path, {QUEUES} queues", QUEUES),
                (f"fast path, {QUEUES} queues, moving", QUEUES),
            ))
        ]  # fmt: skip
        for case in (
            Case("MTU, 64 conn.", 1448, conns=64, frames=24_000 // scale),
            Case("64 KB, 64 conn.", 64_000, conns=64, frames=2_048 // scale),
        ):
            runs: dict[str, list[tuple[float, float]]] = {a.name: [] for a in arms}
            writes = held.plan(case)
            size = sum(len(d) - 10 for side, d in writes if side == PVM)
            plans = {a.name: a.plans(case, writes) for a in arms}
            try:
                for turn in range(repeats):
                    for a in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                        runs[a.name].append(once(a, case, plans[a.name], size))
            except (RuntimeError, OSError) as e:
                part.error(case.name, str(e))
                runs = {}
            if runs:
                _rows(part, case, runs)
            _goals(part, case, runs)


def _rows(part: Part, case: Case, runs: dict[str, list[tuple[float, float]]]) -> None:
    rate, cpu = ({a: Spread.of(x[i] for x in v) for a, v in runs.items()} for i in (0, 1))
    base = "fast path, 1 queue"
    part.add(case.name, "Gbit/s", rate, base=base, higher_is_better=True)
    part.add(f"{case.name}: CPU of the guests", "ns per frame", cpu, base=base)


def _goals(part: Part, case: Case, runs: dict[str, list[tuple[float, float]]]) -> None:
    """Set the goals, of the ratios of each turn."""
    rate = {a: [x[0] for x in v] for a, v in runs.items()}

    def per(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(rate.get(a, []), rate.get(b, []), strict=True)]

    several = f"{QUEUES} queues"
    ours, floor = (
        per(f"fast path, {several}", "fast path, 1 queue"),
        per(f"floor, {several}", "floor, 1 queue"),
    )
    moving = per(f"fast path, {several}, moving", "fast path, 1 queue")
    both = [x / y for x, y in zip(ours, floor, strict=True)]
    for text, found in (
        (f"{several} to one, fast path to floor, {case.name}", both),
        (f"{several} to one, connections moving, {case.name}", moving),
    ):
        part.goal(text, statistics.median(found) if found else None, GOAL)
