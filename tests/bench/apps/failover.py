# SPDX-License-Identifier: GPL-2.0-or-later
"""Kill the PVM in the middle of a client's transactions, and count what the client notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab

from .outputs import aborted, read_log
from .tools import Tools

CLIENTS, SECONDS, DEADLINE_S = 2, 15, 90.0
BEFORE = 150  # answers on another connection, 20 ms apart: pgbench is in its midst then
PROMOTED_S = 60.0


@dataclass(frozen=True, slots=True)
class Failover:
    """What clients saw of the death of the PVM. s, and counts."""

    gap: float  # the longest time without the end of a transaction
    echo_gap: float  # the same of the connection that sends a line every 20 ms
    errors: int  # clients that gave up, connections that broke, wrong answers
    transactions: int


def longest_gap(ends: list[float], since: float) -> float:
    """Return the longest time between two events in a row, of which one is after `since`."""
    pairs = zip(ends, ends[1:], strict=False)
    return max((b - a for a, b in pairs if b > since), default=float("inf"))


def fail_over(lab: Lab, tools: Tools) -> Failover:
    """Kill the PVM while clients use its database. Raises LabError if nobody takes over."""
    tools.take("pgbench.*")
    echo = EchoStream(lab.net.client)
    with ThreadPoolExecutor(1) as pool:
        options = ("-T", str(SECONDS), "-c", str(CLIENTS))
        running = pool.submit(tools.run, *tools.pgbench(*options), deadline=DEADLINE_S)
        wait_for("echoes", lambda: len(echo.stats.answered_at) >= BEFORE, 60)
        killed = lab.vm["primary"].kill9()
        lab.wait_state("secondary", "promoted", PROMOTED_S)
        ran = running.result()
    stats = echo.stop()
    ended = [t.ended for t in read_log(tools.take("pgbench.*"))]
    # A client that waits for ever has seen an error, too.
    errors = CLIENTS if ran.hung else aborted(ran.text)
    errors += bool(stats.dead) + bool(stats.wrong)
    return Failover(
        longest_gap(ended, killed), longest_gap(stats.answered_at, killed), errors, len(ended)
    )
