# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what the controllers of a protected pair take while nothing happens.

The laboratory's pair with real QEMUs enters COLO, and no client uses it. CPU time is that of all
threads, in percent of one core; memory is PSS, of which shared pages count in part. A run with a
checkpoint, or at whose end a host is not protected, is no rest: it is made again.

The base are two processes of asyncio that run beside the pair and do the least with which two hosts
can watch each other: each sends a line over TCP and a datagram as large as ours, as often as ours,
and reads the other's. There is no TLS, no signature and no guest. What a wake-up costs depends on
what else the machine does, so a figure counts beside this one only.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from colo_xdp.lab.pair import Lab
from colo_xdp.peer.heartbeat_datagram import SIZE

from . import stats
from .report import Part, Spread

TAG = "cxbr"
RUN_S, RUNS = 30.0, 5
QUICK_S, QUICK_RUNS = 5.0, 3
SETTLE_S = 5.0
TRIES = 2  # for each run that counts
GOAL_PERCENT = 1.0
BEAT_S = 0.1  # [peer] heartbeat_interval, by default
LINE = b"x" * 239 + b"\n"  # as long as a heartbeat on the control channel
ROLES = ("primary", "secondary")
FLOOR, QEMU = "asyncio, heartbeats only", "QEMU of the {}"


# ---- the base


async def beat(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, udp: socket.socket
) -> None:
    """Send and read heartbeats until the other end is gone."""
    loop = asyncio.get_running_loop()

    def send() -> None:
        writer.write(LINE)
        udp.send(LINE[:SIZE])
        loop.call_later(BEAT_S, send)

    def read() -> None:
        udp.recv(SIZE)

    loop.add_reader(udp.fileno(), read)
    send()
    while await reader.readline():
        pass


def floor(tcp_fd: int, udp_fd: int) -> None:
    """Be one of the two processes, at one end of two connections."""

    async def body() -> None:
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=tcp_fd))
        with socket.socket(fileno=udp_fd) as udp:
            udp.setblocking(False)
            await beat(reader, writer, udp)

    asyncio.run(body())


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=5)
        other, _ = listener.accept()
    return one, other


def _udp_pair() -> tuple[socket.socket, socket.socket]:
    one, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (one, other):
        sock.bind(("127.0.0.1", 0))
    one.connect(other.getsockname())
    other.connect(one.getsockname())
    return one, other


def start_floor(stack: ExitStack) -> list[int]:
    """Start both; return their process ids."""
    pids = []
    for tcp, udp in zip(_tcp_pair(), _udp_pair(), strict=True):
        with tcp, udp:
            fds = (tcp.fileno(), udp.fileno())
            cmd = [sys.executable, "-m", "tests.bench.rest", *map(str, fds)]
            pids.append(stack.enter_context(stats.child(cmd, pass_fds=fds)).pid)
    return pids


# ---- what is measured


def pss_mib(rollup: str) -> float:
    """Return the PSS of /proc/PID/smaps_rollup in MiB. Raises ValueError if there is none."""
    for line in rollup.splitlines():
        name, _, rest = line.partition(":")
        value = rest.split()
        if name == "Pss" and value[1:] == ["kB"]:
            return int(value[0]) / 1024
    raise ValueError(f"no Pss in {rollup[:80]!r}")


@dataclass(frozen=True)
class Run:
    """One run: percent of a core of each arm, MiB of each controller."""

    cpu: dict[str, float]
    pss: dict[str, float]


def percent(before_ns: int, after_ns: int, seconds: float) -> float:
    """Return CPU time as a percentage of one core."""
    return (after_ns - before_ns) / seconds / 1e7


def once(pids: dict[str, list[int]], seconds: float) -> Run:
    """Measure for a while. An arm with several processes counts with their mean."""

    def cpu() -> dict[str, float]:
        return {a: sum(map(stats.process_ns, p)) / len(p) for a, p in pids.items()}

    before, began = cpu(), time.monotonic()
    time.sleep(seconds)  # what is measured is rest
    after, took = cpu(), time.monotonic() - began
    rollups = {r: Path(f"/proc/{pids[r][0]}/smaps_rollup").read_text() for r in ROLES}
    return Run(
        {a: percent(int(before[a]), int(after[a]), took) for a in pids},
        {r: pss_mib(text) for r, text in rollups.items()},
    )


def at_rest(lab: Lab, seconds: float, pids: dict[str, list[int]]) -> Run | None:
    """Return a run, or None if the pair did not rest."""
    before = lab.checkpoints()
    run = once(pids, seconds)
    good = all(lab.status(role).get("state") == "protected" for role in ROLES)
    return run if good and lab.checkpoints() == before else None


def add(part: Part, runs: Iterable[Run]) -> None:
    """Turn runs into rows and goals."""
    runs = list(runs)
    arms = list(runs[0].cpu) if runs else []
    if runs:
        cpu = {a: Spread.of(r.cpu[a] for r in runs) for a in arms}
        part.add("CPU at rest", "% of a core", cpu, base=FLOOR)
        part.add("memory at rest", "MiB PSS", {r: Spread.of(x.pss[r] for x in runs) for r in ROLES})
    for role in ROLES:
        value = Spread.of(r.cpu[role] for r in runs).median if runs else None
        part.goal(f"CPU of the {role} at rest, % of a core", value, GOAL_PERCENT, at_least=False)


def run(part: Part, quick: bool, build: Path) -> None:
    """Measure a pair of the laboratory."""
    seconds, wanted = (QUICK_S, QUICK_RUNS) if quick else (RUN_S, RUNS)
    runs: list[Run] = []
    with Lab(build, tag=TAG, disks=1) as lab, ExitStack() as stack:
        lab.protect()
        pids = {FLOOR: start_floor(stack)}
        pids |= {role: [lab.controllers[role].pid] for role in ROLES}
        pids |= {QEMU.format(role): [lab.vm[role].pid] for role in ROLES}
        time.sleep(SETTLE_S)
        for _ in range(TRIES * wanted):
            if len(runs) < wanted and (found := at_rest(lab, seconds, pids)) is not None:
                runs.append(found)
    if len(runs) < wanted:
        part.error("rest", f"the pair rested in {len(runs)} runs of {wanted} only")
    add(part, runs)


if __name__ == "__main__":
    floor(int(sys.argv[1]), int(sys.argv[2]))
