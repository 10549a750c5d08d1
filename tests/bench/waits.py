# SPDX-License-Identifier: GPL-2.0-or-later
"""Real guests that disagree by waiting: what a client pays with a fixed and an adaptive wait.

Two services of the lab guest make its two copies disagree without a byte that differs:

- `lock`: two clients want one lock at the same moment, and each copy may grant it to another one.
  Each has answered a client that the other has not, and both wait for their client.
- `late`: each copy decides by its own clock whether it answers at once or after LATE_S, so the SVM
  often has no answer when the PVM has one.

The third row of each arm are guests that agree, once on an idle machine and once with BURNERS
processes that burn CPU at the lowest priority: checkpoints there are needless.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colo_xdp.compare.causes import WAITS
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import LabError, in_ns, wait_for
from colo_xdp.lab.pair import Lab

from .report import Part, Spread

TAG = "cxbn"
LATE_S, LATE_PORT, LOCK_PORT = 6, 90, 91
BURNERS = 4
ARMS: dict[str, dict[str, Any]] = {"fixed": {"wait": "fixed"}, "adaptive": {"wait": "adaptive"}}
KINDS = {
    "agree": "guests that agree",
    "lock": "two clients, one lock",
    "late": "an SVM that answers late",
    "busy": f"guests that agree beside {BURNERS} burners",
}
CLOCK = 't=$(cat /proc/timer_list /dev/null | grep -m 1 "^now at" | tr -dc 0-9)'
LATE = f"""read n
{CLOCK}
[ $((${{t:-1}} / 1000 % 4)) != 0 ] || sleep {LATE_S}
echo answer $n
"""
LOCK = """read n
until mkdir /tmp/held 2> /dev/null; do usleep 2000; done
echo got $n
read end
rmdir /tmp/held
echo bye $n
"""


@dataclass
class Seen:
    """Latencies in s, and checkpoints by cause, of one service in one arm."""

    times: list[float] = field(default_factory=list)
    wrong: int = 0
    checkpoints: dict[str, int] = field(default_factory=dict)
    waited: int = 0  # checkpoints because something had waited, whatever became of it
    needless: int = 0  # of these, whose counterpart was seen to come
    released: int = 0

    def at(self, q: float) -> float:
        """Return a quantile of the latencies."""
        times = sorted(self.times)
        return times[min(len(times) - 1, int(q * len(times)))] if times else float("nan")


def install(lab: Lab, name: str, script: str, port: int) -> None:
    """Start a service in both guests, by a command that both get."""
    for line in ("#!/bin/sh", *script.splitlines()):
        quoted = line.replace("'", "'\\''")
        lab.client.run(f"echo '{quoted}' >> /tmp/{name}")
    lab.client.run(f"chmod +x /tmp/{name}; nc -ll -p {port} -e /tmp/{name} <&- >&- 2>&- &")
    listens = f":{port:04X} "
    wait_for(
        f"a service on port {port}",
        lambda: listens in lab.client.run("cat /proc/net/tcp /proc/net/tcp6"),
        10,
    )
    lab.ask("primary", "checkpoint")  # the SVM has it, too


def _exchange(port: int, number: int, seen: Seen, *, lock: bool) -> None:
    t = time.monotonic()
    try:
        with socket.create_connection(("10.9.0.2", port), 30) as s:
            s.settimeout(LATE_S - 1 if not lock else 30)
            s.sendall(b"%d\n" % number)
            f = s.makefile("rb")
            first = f.readline()
            if lock:
                s.sendall(b"end\n")
                seen.wrong += first != b"got %d\n" % number or f.readline() != b"bye %d\n" % number
            else:
                seen.wrong += first != b"answer %d\n" % number
    except TimeoutError:
        if not lock:
            return  # the PVM itself was late
        seen.wrong += 1
    seen.times.append(time.monotonic() - t)


def pair_of_clients(n: int, seen: Seen) -> None:
    """Have two clients want the lock at the same moment."""
    threads = [
        threading.Thread(target=_exchange, args=(LOCK_PORT, 2 * n + i, seen), kwargs={"lock": True})
        for i in range(2)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def one_client(n: int, seen: Seen) -> None:
    """Ask the service that is late in one guest or the other; not noted if the PVM was."""
    _exchange(LATE_PORT, n, seen, lock=False)


def _work(lab: Lab, n: int, seen: Seen) -> None:
    for _ in range(n):
        for name in ("index.html", "f100k"):
            f = lab.client.http(name)
            seen.times.append(f.seconds)
            seen.wrong += not f.ok or f.body != content(name)
    answered, wrong = lab.client.udp_echo(n)
    seen.wrong += wrong + n - answered


def released(status: dict[str, Any]) -> int:
    """Return how many frames both paths have released after a comparison."""
    by_kernel = (("pvm_out", "offload_passed"), ("svm_arrival", "offload_released"))
    return int(status["engine"]["released"]) + sum(
        int(status["programs"][prog][reason][0]) for prog, reason in by_kernel
    )


def _counted(lab: Lab, seen: Seen, what: Callable[[], None]) -> None:
    def status() -> dict[str, Any]:
        return lab.status("primary")

    before = status()
    what()
    wait_for("the pair to settle", lambda: status()["state"] == "protected", 20)
    after = status()
    for cause, n in after["checkpoints"]["by_cause"].items():
        made = n - before["checkpoints"]["by_cause"].get(cause, 0)
        if made:
            seen.checkpoints[cause] = seen.checkpoints.get(cause, 0) + made
            seen.waited += made * (cause in WAITS)
    seen.needless += after["patience"]["needless"] - before["patience"]["needless"]
    seen.released += released(after) - released(before)


@contextmanager
def burners(n: int) -> Any:
    """Burn CPU at the lowest priority."""
    code = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\nwhile True: pass"
    some = [subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", code]) for _ in range(n)]
    try:
        yield
    finally:
        for p in some:
            p.kill()
        for p in some:
            p.wait()


def once(arm: str, directory: Path, rounds: int, seen: dict[str, Seen]) -> None:
    """Run one life of one arm."""
    lab = Lab(directory, tag=TAG, overrides={"compare": ARMS[arm]})
    try:
        lab.up()
        lab.protect()
        install(lab, "lock", LOCK, LOCK_PORT)
        install(lab, "late", LATE, LATE_PORT)

        def all_of(what: Callable[[int], None]) -> Callable[[], None]:
            def run() -> None:
                for n in range(rounds):
                    what(n)

            return run

        kinds: dict[str, Callable[[], None]] = {
            "agree": lambda: _work(lab, 4 * rounds, seen["agree"]),
            "lock": all_of(lambda n: pair_of_clients(n, seen["lock"])),
            "late": all_of(lambda n: one_client(n, seen["late"])),
        }
        for kind, what in kinds.items():
            inside = what if kind == "agree" else lambda what=what: in_ns(lab.net.client, what)  # type: ignore[misc]
            _counted(lab, seen[kind], inside)
        with burners(BURNERS):
            _counted(lab, seen["busy"], lambda: _work(lab, 4 * rounds, seen["busy"]))
    finally:
        lab.down()


def run(part: Part, quick: bool, build: Path) -> None:
    """Run both arms in turns."""
    lives, rounds = (1, 8) if quick else (3, 30)
    seen = {arm: {k: Seen() for k in KINDS} for arm in ARMS}
    errors: dict[str, str] = {}
    for turn in range(lives):
        for arm in ARMS if turn % 2 == 0 else tuple(ARMS)[::-1]:
            try:
                once(arm, build, rounds, seen[arm])
            except (LabError, OSError, RuntimeError, ValueError) as e:
                errors[arm] = f"{type(e).__name__}: {e}"
    for arm, why in errors.items():
        part.error(f"waiting guests, {arm}", why)
    for kind, title in KINDS.items():
        good = {arm: kinds[kind] for arm, kinds in seen.items() if kinds[kind].times}
        for q in (0.5, 0.99):
            times = {a: Spread.of([s.at(q) * 1e3]) for a, s in good.items()}
            part.add(f"{title}: p{q * 100:g}", "ms", times, base="fixed")
        counts: tuple[tuple[str, Callable[[Seen], float]], ...] = (
            ("checkpoints", lambda s: sum(s.checkpoints.values())),
            ("of these, for what had waited", lambda s: s.waited),
            ("of these, seen to be needless", lambda s: s.needless),
            ("answers failed or wrong", lambda s: s.wrong),
        )
        for name, count in counts:
            values = {a: Spread.of([float(count(s))]) for a, s in good.items()}
            part.add(f"{title}: {name}", "count", values)
    for kind, most in (("agree", 1e-3), ("busy", 1e-2)):
        s = seen["adaptive"][kind]
        value = s.waited / s.released if s.released else None
        part.goal(
            f"{KINDS[kind]}: checkpoints for what had waited per released frame",
            value,
            most,
            at_least=False,
        )
