# SPDX-License-Identifier: GPL-2.0-or-later
"""What clients do with the guest's servers, each for some seconds.

A workload that has not ended at its deadline counts as that (Outcome.at_deadline): a guest, or a
proxy, that hangs is a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection

from colo_xdp.lab.client import Client
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import LabError, in_ns

from . import image
from .names import lookup
from .outputs import (
    Outcome,
    OutputError,
    at_once,
    of_times,
    read_ab,
    read_log,
    read_pgbench,
    read_redis,
)
from .tools import GUEST, UPLOAD, Tools

DEADLINE_S = 60.0
PRIME_TRIES = 3
BIG = "big"
MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Place:
    """Where clients run."""

    tools: Tools
    client: Client
    scale: float = 1.0  # of how long, or how often

    def times(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def seconds(self, seconds: int) -> int:
        return max(2, round(seconds * self.scale))


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the report. `agree`: the two guests give the same answers."""

    key: str
    title: str
    run: Callable[[Place], Outcome]
    unit: str = "operations/s"
    #: of the operations' rate, the figure that the row shows
    per_operation: float = 1.0
    agree: bool = True


def _one_by_one(count: int, operation: Callable[[float], bool | None]) -> Outcome:
    """Time operations one after the other.

    `operation` gets the time that is left (s) and returns whether its answer was right; None: it
    has not ended in that time.
    """
    end = time.monotonic() + DEADLINE_S
    times: list[float] = []
    wrong = 0
    for _ in range(count):
        began = time.monotonic()
        right = operation(max(0.1, end - began))
        if right is None:
            return Outcome.at_deadline(DEADLINE_S, len(times))
        times.append(time.monotonic() - began)
        wrong += not right
    return of_times(times, wrong)


def _ab(url: str, requests: int, clients: int) -> Callable[[Place], Outcome]:
    def run(at: Place) -> Outcome:
        n = max(clients, at.times(requests))
        argv = ("ab", "-q", "-e", at.tools.inside("ab.csv"), "-n", str(n), "-c", str(clients), url)
        ran = at.tools.run(*argv, deadline=DEADLINE_S)
        percentiles = at.tools.take("ab.csv")
        if ran.code != 0:  # it also gives up by itself, after 30 s without an answer
            return Outcome.at_deadline(DEADLINE_S)
        return read_ab(ran.text, percentiles)

    return run


def _https(requests: int, clients: int) -> Callable[[Place], Outcome]:
    """Fetch a page with a handshake each.

    Not by ab: it counts a connection twice, and then waits for one that it has lost, if a RST comes
    before it has closed, as one does that answers its close_notify.
    """
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE

    def fetch(end: float) -> tuple[float, bool]:
        began = time.monotonic()
        page = HTTPSConnection(GUEST, timeout=max(0.1, end - began), context=tls)
        try:
            page.request("GET", "/index.html", headers={"Connection": "close"})
            answer = page.getresponse()
            right = answer.status == 200 and answer.read() == content("index.html")
        except TimeoutError:
            raise
        except (OSError, HTTPException):
            right = False
        finally:
            page.close()
        return time.monotonic() - began, right

    def run(at: Place) -> Outcome:
        n, began = max(clients, at.times(requests)), time.monotonic()

        def client(mine: int) -> list[tuple[float, bool]]:
            fetches = range(mine, n, clients)
            return in_ns(at.tools.namespace, lambda: [fetch(began + DEADLINE_S) for _ in fetches])

        try:
            with ThreadPoolExecutor(clients) as pool:
                done = [one for each in pool.map(client, range(clients)) for one in each]
        except TimeoutError:
            return Outcome.at_deadline(DEADLINE_S)
        spent = time.monotonic() - began
        return at_once([took for took, _ in done], spent, sum(not right for _, right in done))

    return run


def _big(at: Place) -> Outcome:
    def fetch(left: float) -> bool | None:
        # Its socket has the deadline for each answer, so a trickle may take longer.
        f = at.client.http(BIG, port=image.HTTP, timeout=left)
        return f.ok and f.body == content(BIG) if f.error != "timed out" else None

    return _one_by_one(at.times(3), fetch)


def _redis(what: str, requests: int, clients: int) -> Callable[[Place], Outcome]:
    def run(at: Place) -> Outcome:
        n = str(max(clients, at.times(requests)))
        argv = ("redis-benchmark", "-h", GUEST, "-n", n, "-c", str(clients), "-t", what, "--csv")
        ran = at.tools.run(*argv, deadline=DEADLINE_S)
        return Outcome.at_deadline(DEADLINE_S) if ran.hung else read_redis(ran.text)

    return run


def _sql(seconds: int, clients: int, *options: str) -> Callable[[Place], Outcome]:
    def run(at: Place) -> Outcome:
        at.tools.take("pgbench.*")
        limits = ("-T", str(at.seconds(seconds)), "-c", str(clients))
        ran = at.tools.run(*at.tools.pgbench(*limits, *options), deadline=DEADLINE_S)
        log = at.tools.take("pgbench.*")
        if ran.hung:
            return Outcome.at_deadline(DEADLINE_S, len(read_log(log)))
        return read_pgbench(ran.text, log)

    return run


def _login(at: Place) -> Outcome:
    def login(left: float) -> bool | None:
        ran = at.tools.run(*at.tools.ssh("ssh"), f"root@{GUEST}", "true", deadline=left)
        return None if ran.hung else ran.code == 0

    return _one_by_one(at.times(3), login)


def _download(at: Place) -> Outcome:
    got = at.tools.files / "got"

    def copy(left: float) -> bool | None:
        with contextlib.suppress(FileNotFoundError):
            got.unlink()
        source = f"root@{GUEST}:/www/{BIG}"
        ran = at.tools.run(*at.tools.ssh("scp"), source, at.tools.inside("got"), deadline=left)
        return None if ran.hung else got.exists() and got.read_bytes() == content(BIG)

    return _one_by_one(1, copy)


def _upload(at: Place) -> Outcome:
    def copy(left: float) -> bool | None:
        target = f"root@{GUEST}:/tmp/{UPLOAD}"
        ran = at.tools.run(*at.tools.ssh("scp"), at.tools.inside(UPLOAD), target, deadline=left)
        return None if ran.hung else ran.code == 0

    outcome = _one_by_one(1, copy)
    there = at.client.run(f"md5sum /tmp/{UPLOAD}").split(" ")[0]
    wrong = there != hashlib.md5(content(UPLOAD)).hexdigest()
    if outcome.hung or not wrong:
        return outcome
    return Outcome(outcome.rate, outcome.p50, outcome.p99, outcome.errors + 1)


def _names(at: Place) -> Outcome:
    """Have the guest ask a name server, which is what a client of it waits for."""
    return _one_by_one(at.times(8), lambda left: lookup(at.tools.namespace, left))


PAGE = f"http://{GUEST}:{image.HTTP}/index.html"
WORKLOADS = (
    Workload("http", "nginx, ab with 8 clients", _ab(PAGE, 3000, 8)),
    Workload("https", "nginx with TLS, a handshake each, 4 clients", _https(120, 4), agree=False),
    Workload("big", "nginx, 8 MiB", _big, "MiB/s", len(content(BIG)) / MIB),
    Workload("redis-1", "Redis SET, 1 client", _redis("set", 5000, 1)),
    Workload("redis-20", "Redis GET, 20 clients", _redis("get", 5000, 20)),
    Workload("select", "PostgreSQL, pgbench -S, 4 clients", _sql(6, 4, "-S")),
    Workload("tpcb-1", "PostgreSQL, TPC-B, 1 client", _sql(8, 1)),
    Workload("tpcb-4", "PostgreSQL, TPC-B, 4 clients, one hot row", _sql(10, 4), agree=False),
    Workload("login", "ssh, login", _login, "logins/s", agree=False),
    Workload("download", "scp, download 8 MiB", _download, "MiB/s", len(content(BIG)) / MIB,
             agree=False),
    Workload("upload", "scp, upload 1 MiB", _upload, "MiB/s", len(content(UPLOAD)) / MIB,
             agree=False),
    Workload("dns", "the guest's own DNS query", _names, agree=False),
)  # fmt: skip


def prime(at: Place) -> None:
    """Use each server once before the guest is copied.

    Secrets that are generated at first use are the same on both copies then, and no arm pays for
    the first run of a program. Raises LabError for a server that does not answer.
    """
    short = Place(at.tools, at.client, 0.05)
    for workload in WORKLOADS:
        for _ in range(PRIME_TRIES):  # on a busy machine, nothing may have ended in this time
            why = _tried(workload, short)
            if not why:
                break
        else:
            raise LabError(f"{workload.title}, before anything is protected: {why}")


def _tried(workload: Workload, at: Place) -> str:
    """Return why a workload failed; "": it did not."""
    try:
        outcome = workload.run(at)
    except (OutputError, OSError) as e:
        return str(e)
    return str(outcome) if outcome.hung or outcome.errors else ""
