# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a real pair under load; in each round something dies, hangs or is cut, and is repaired.

    python -m tests.e2e.chaos --rounds 20 --seed 1

It is judged from outside: every byte that the clients receive, which guest transmits, captured on
the wires of both hosts, and what the guest has confirmed to have written, on the image that has
survived at the end. Writes build/chaos-report.json. Exit status 0: nothing was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colo_xdp.lab import disk
from colo_xdp.lab.client import EchoStream, LineStream, RecordStream, wrong_bytes
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import LabError, sh, wait_for
from colo_xdp.lab.pair import NBD_PORT, Lab

from .evidence import Evidence, Wrong

BUILD = Path(__file__).parents[2] / "build"
HOSTS = ("primary", "secondary")  # by their role in the files; which one runs which guest changes
STREAMS = 8  # connections kept open; once there are so many, one is renewed per round
HEARTBEAT_TIMEOUT_MS = 1000
DEAD_AFTER_MS = 4000
QMP_TIMEOUT_MS = 1000
CHECKPOINT_MS = 2000
WRITE_MS = 800  # shorter than compare_timeout: a checkpoint would wait for the write, too
SLACK_MS = 100
REPAIR_S = 180  # until a pair is protected again; two sets of programs are compiled meanwhile
STALLED_S = 4.0  # at the end of a round, when the pair is protected again
DISTURBED = 0.3  # share of the repairs during which something else dies

OVERRIDES: dict[str, dict[str, Any]] = {
    "compare": {"compare_timeout": 1000},
    "checkpoint": {"deadline": CHECKPOINT_MS},
    "qemu": {"qmp_timeout": QMP_TIMEOUT_MS},
    "nbd": {"write_timeout": WRITE_MS, "speed": 32},
    "peer": {"heartbeat_timeout": HEARTBEAT_TIMEOUT_MS, "dead_after": DEAD_AFTER_MS},
}


def other(host: str) -> str:
    return "secondary" if host == "primary" else "primary"


def differs_at(got: bytes, want: bytes) -> int:
    """Return the position of the first wrong byte."""
    pairs = enumerate(zip(got, want, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(got), len(want)))


class Downloads:
    """Open new connections all the time; a failed one counts only if no host died during it."""

    def __init__(self, lab: Lab) -> None:
        self.count = self.wrong = self.failed = 0
        self.errors: list[str] = []
        self.found: list[Wrong] = []
        self._lab, self._stop = lab, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        n = 0
        while not self._stop.wait(0.05):
            n += 1
            name = ("index.html", "f100k", "f1m")[n % 3]
            f = self._lab.client.http(name, v6=bool(n % 2))
            self.count += 1
            want = content(name)
            # What a failed one has received must be right all the same.
            wrong = wrong_bytes(f.body, want if f.ok else want[: len(f.body)])
            self.wrong += wrong
            if not f.ok:
                self.failed += 1
                self.errors.append(f"{name}: {f.error}")
            if wrong:
                at = differs_at(f.body, want)
                self.errors.append(
                    f"{name}: {len(f.body)} bytes at {time.time():.3f} after {f.seconds:.3f} s,"
                    f" wrong from {at}: {f.body[at : at + 32].hex()}"
                )
                self.found.append(
                    Wrong(name, time.time(), 80, f.port, f.body[at:], want[at:], f.head + at)
                )
                (self._lab.work / f"wrong-{n}").write_bytes(f.body)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(40)


@dataclass
class Tally:
    """Data of the report. Gaps in ms, one per round: the worst of all connections."""

    rounds: int = 0
    kills: int = 0
    failovers: int = 0
    wrong_bytes: int = 0
    lost_connections: int = 0
    split_brain: int = 0
    gaps: list[float] = field(default_factory=list)
    records: int = 0  # that the guest has confirmed to have written
    lost_writes: int = 0  # those of them that are not on the disk at the end
    fsck_errors: int = 0
    fsync_stall: float = 0.0  # the longest time from a record to its confirmation, ms
    fenced: int = 0  # hosts whose controller took longer than dead_after to come back
    over: int = 0  # rounds whose gap exceeded the detection deadline of the fault
    pauses: list[float] = field(default_factory=list)  # while a new secondary was synchronized
    by_action: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stalls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of fsync
    problems: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        g = sorted(self.gaps)
        p99 = g[min(len(g) - 1, int(len(g) * 0.99))] if g else 0.0
        return {
            "rounds": self.rounds,
            "kills": self.kills,
            "failovers": self.failovers,
            "wrong_bytes": self.wrong_bytes,
            "lost_connections": self.lost_connections,
            "split_brain": self.split_brain,
            "max_gap_ms": round(max(g, default=0.0)),
            "p99_gap_ms": round(p99),
            "records": self.records,
            "lost_writes": self.lost_writes,
            "fsck_errors": self.fsck_errors,
            "max_fsync_stall_ms": round(self.fsync_stall),
            "fenced": self.fenced,
            "beyond_deadline": self.over,
            "reprotect_pause_max_ms": round(max(self.pauses, default=0.0)),
            "by_action": {
                k: {
                    "rounds": len(v),
                    "max_gap_ms": round(max(v)),
                    "deadline_ms": DEADLINE_MS[k],
                    "max_fsync_stall_ms": round(max(self.stalls[k], default=0.0)),
                }
                for k, v in sorted(self.by_action.items())
            },
            "problems": self.problems,
        }


#: fault -> time by which it is noticed at the latest, ms
DEADLINE_MS: dict[str, int] = {
    "kill_pvm": HEARTBEAT_TIMEOUT_MS,
    "kill_svm": HEARTBEAT_TIMEOUT_MS,
    "kill_pvm_in_checkpoint": HEARTBEAT_TIMEOUT_MS,
    "kill_pvm_host": HEARTBEAT_TIMEOUT_MS,
    # a primary's QEMU notices nothing before a checkpoint, so there is only silence
    "kill_svm_host": DEAD_AFTER_MS,
    # polled every half second; one QMP deadline, and one for the way past its main loop
    "hang_pvm": 500 + QMP_TIMEOUT_MS + 1000,
    "hang_svm": 500 + QMP_TIMEOUT_MS + 1000 + CHECKPOINT_MS,
    "kill_pvm_controller": 2000,  # until the next controller is ready
    "kill_svm_controller": 2000,
    "cut_link": 2000 + HEARTBEAT_TIMEOUT_MS,
    "cut_control": 2000 + HEARTBEAT_TIMEOUT_MS,
    "switchover": HEARTBEAT_TIMEOUT_MS,
    "demote_pvm": HEARTBEAT_TIMEOUT_MS,
    "demote_svm": HEARTBEAT_TIMEOUT_MS,
    "cut_disk": HEARTBEAT_TIMEOUT_MS,  # the primary's connection to an image, alone
    "silence_disk": WRITE_MS + 200,  # the same, but its packets are dropped
    "slow_disk": 2000,
    "fill_overlays": HEARTBEAT_TIMEOUT_MS + CHECKPOINT_MS,
    "kill_pvm_in_switchover": HEARTBEAT_TIMEOUT_MS,
    "kill_pvm_and_controller": HEARTBEAT_TIMEOUT_MS,  # while QEMU merges the overlays
}
#: those that need a disk
DISK_FAULTS = {
    "cut_disk", "silence_disk", "slow_disk", "fill_overlays", "kill_pvm_and_controller",
}  # fmt: skip
ALONE = {
    "kill_pvm", "kill_svm", "kill_pvm_in_checkpoint", "kill_pvm_host", "kill_svm_host",
    "hang_pvm", "hang_svm", "switchover", "demote_pvm", "demote_svm", "cut_disk", "silence_disk",
    "fill_overlays", "kill_pvm_in_switchover", "kill_pvm_and_controller",
}  # fmt: skip
#: the secondary is lost, so the same guest goes on
STAYS = {
    "kill_svm", "kill_svm_host", "hang_svm", "demote_svm", "cut_disk", "silence_disk",
    "fill_overlays",
}  # fmt: skip


#: its own controller notices at once
AT_ONCE = {
    "kill_pvm", "kill_svm", "kill_pvm_in_checkpoint", "switchover", "demote_pvm", "demote_svm",
    "cut_disk", "kill_pvm_in_switchover", "kill_pvm_and_controller",
}  # fmt: skip


def limit_ms(action: str) -> int:
    """Return the longest gap to be expected, ms.

    Clients retransmit after 0.2, 0.4, 0.8 s ... (RFC 6298 5.5), so they notice the end of a silence
    late, when it has lasted up to twice as long.
    """
    d = DEADLINE_MS[action]
    return (d if action in AT_ONCE else 2 * d) + SLACK_MS


class Chaos:
    """One lab, many rounds."""

    def __init__(
        self, lab: ChaosLab, seed: int, say: Callable[[str], None], only: Collection[str] = ()
    ) -> None:
        self.lab, self.rng, self.say = lab, random.Random(seed), say
        self.tally = Tally()
        self.pvm = "primary"  # the host that runs it
        self.streams: list[EchoStream] = []
        self.actions: list[str] = []
        self.downloads: Downloads | None = None
        self.lines: LineStream | None = None
        self.records: list[RecordStream] = []
        self.kinds = sorted(only or DEADLINE_MS)
        self._stalled = False
        self._until_repair = contextlib.ExitStack()  # ends faults that last until then
        self.explained = False
        self.evidence: Evidence | None = None
        self._judged = time.time()  # everything before has been checked
        self._errors = 0

    @property
    def svm(self) -> str:
        return other(self.pvm)

    # -- load

    def _open(self) -> None:
        n, nics = len(self.streams), self.lab.net.nics
        v6 = bool(n // nics % 2)
        self.streams.append(EchoStream(self.lab.net.client, v6=v6, nic=n % nics))

    def _retire(self, s: EchoStream) -> None:
        self.streams.remove(s)
        stats = s.stop()
        self.tally.wrong_bytes += stats.wrong
        if stats.wrong:
            self.tally.problems.append(f"an echo stream: {stats.wrong} wrong bytes")

    def _check_streams(self, what: str) -> None:
        for s in list(self.streams):
            if s.stats.dead:
                self.tally.lost_connections += 1
                self.tally.problems.append(f"{what}: a connection was lost: {s.stats.dead}")
                self._retire(s)

    def _moving(self, since: float) -> None:
        """Wait until every connection has received answers since then."""
        for s in list(self.streams):
            with contextlib.suppress(LabError):
                wait_for(
 "answers", lambda s=s: s.stats.dead or s.stats.answered_after(since) > 5, 30)  # type: ignore[misc]  # fmt: skip
                continue
            self.tally.lost_connections += 1
            self.tally.problems.append("a connection has stalled for 30 s")
            self._retire(s)

    def _gap(self, begin: float, end: float) -> float:
        """Return the longest silence of any connection that ends in this time, ms."""
        worst = 0.0
        for s in self.streams:
            t = [x for x in list(s.stats.answered_at) if x > begin - 5]
            for a, b in zip(t, t[1:], strict=False):
                if begin < b and a < end:
                    worst = max(worst, b - max(a, begin - 0.02))
        return worst * 1000

    # -- faults

    def _kill(self, host: str) -> None:
        self.tally.kills += 1
        self.lab.vm[host].kill9()

    def _kill_controller(self, host: str) -> None:
        self.tally.kills += 1
        p = self.lab.controllers[host]
        p.send_signal(signal.SIGKILL)
        p.wait(5)

    def do(self, action: str) -> None:
        lab, pvm, svm = self.lab, self.pvm, self.svm
        if action == "kill_pvm":
            self._kill(pvm)
        elif action == "kill_svm":
            self._kill(svm)
        elif action == "kill_pvm_in_checkpoint":
            asked = threading.Thread(target=self._checkpoint, daemon=True)
            asked.start()
            time.sleep(self.rng.uniform(0, 0.02))  # at any point of it
            self._kill(pvm)
            asked.join(20)
        elif action in ("kill_pvm_host", "kill_svm_host"):
            host = pvm if action == "kill_pvm_host" else svm
            self._kill_controller(host)
            self._kill(host)
        elif action in ("hang_pvm", "hang_svm"):
            self.tally.kills += 1
            lab.vm[pvm if action == "hang_pvm" else svm].signal(signal.SIGSTOP)
        elif action in ("kill_pvm_controller", "kill_svm_controller"):
            host = pvm if action == "kill_pvm_controller" else svm
            self._kill_controller(host)
            lab.start_controller(host)
        elif action == "cut_link":
            for state in ("down", "up"):
                sh("ip", "-n", lab.net.primary, "link", "set", "peer0", state)
                if state == "down":
                    time.sleep(self.rng.uniform(0.2, 2.0))
        elif action == "cut_control":
            with lab.net.control_cut():
                time.sleep(self.rng.uniform(0.2, 2.0))
        elif action == "switchover":
            r = lab.ask(self.rng.choice(HOSTS), "switchover")
            if not r["done"]:
                raise LabError(f"switchover: {r}")
        elif action == "cut_disk":
            name = self.rng.choice(self.lab.disks)
            lab.vm[svm].ask("block-export-del", id=f"colo-{name}", mode="hard")
        elif action in ("demote_pvm", "demote_svm"):
            lab.ask(pvm if action == "demote_pvm" else svm, "demote")
        elif action == "silence_disk":
            self._until_repair.enter_context(lab.net.port_cut(NBD_PORT))
        elif action == "slow_disk":
            with lab.net.port_slow(NBD_PORT, self.rng.choice(("1mbit", "5mbit"))):
                time.sleep(self.rng.uniform(0.5, 3.0))
        elif action == "fill_overlays":
            self._fill_overlays(svm)
        elif action == "kill_pvm_in_switchover":
            asked = threading.Thread(target=self._switchover, daemon=True)
            asked.start()
            time.sleep(self.rng.uniform(0, 0.05))
            self._kill(pvm)
            asked.join(20)
        elif action == "kill_pvm_and_controller":
            self._kill(pvm)
            lab.wait_state(svm, "promoted", 40)
            time.sleep(self.rng.uniform(0, 0.3))
            self._kill_controller(svm)
            lab.start_controller(svm)

    def _switchover(self) -> None:
        with contextlib.suppress(Exception):
            self.lab.ask(self.pvm, "switchover")

    def _fill_overlays(self, svm: str) -> None:
        """Take all room beside the overlays, until the copy is lost: checkpoints free some."""
        path = self.lab.overlays(svm) / "filler"
        self._until_repair.callback(path.unlink, missing_ok=True)

        def lost() -> bool:
            with path.open("ab", buffering=0) as f, contextlib.suppress(OSError):
                while True:
                    f.write(bytes(1 << 16))
            return self.lab.status(self.pvm).get("state") in ("solo", "promoted")

        wait_for("a copy without room to be lost", lost, 40)

    def _checkpoint(self) -> None:
        with contextlib.suppress(Exception):
            self.lab.ask(self.pvm, "checkpoint")

    def _survivor(self) -> str:
        """Return the host whose guest runs standalone."""

        def alone() -> str:
            for host in HOSTS:
                with contextlib.suppress(LabError):
                    if self.lab.status(host).get("state") in ("solo", "promoted"):
                        return host
            return ""

        return wait_for("survivor", alone, 40)

    # -- repair

    def repair(self, survivor: str) -> None:
        lab, dead = self.lab, other(survivor)
        self._until_repair.close()
        vm = lab.vm[dead]
        if vm.alive:
            vm.kill9()
        p = lab.controllers[dead]
        if p.poll() is not None:
            lab.start_controller(dead)
        lab.start_vm(dead, incoming=True)
        self.pvm = survivor
        if self.rng.random() < DISTURBED:  # at any point of the change of roles or the first copy
            what = self.rng.choice(("QEMU", "QEMU in the copy of its disk", *HOSTS))
            if what.endswith("disk") and lab.disks:
                with contextlib.suppress(LabError):
                    wait_for("copy", lambda: self._copying(survivor), 40)
                what = "QEMU"
                time.sleep(self.rng.uniform(0, 1))
            else:
                time.sleep(self.rng.uniform(0, 4))
            self.say(f"     repair disturbed: kill -9 of {what}")
            if what.startswith("QEMU"):
                self._kill(dead)
                lab.start_vm(dead, incoming=True)
            else:
                self._kill_controller(what)
                lab.start_controller(what)
        if again := self._unless_fenced():
            self.repair(again)

    def _copying(self, survivor: str) -> bool:
        disks = self.lab.status(survivor).get("disks", {})  # none while its controller is replaced
        return bool(disks.get("copying"))

    def _protected(self) -> None:
        """Wait until both report it and hear each other: a cut may have ended unnoticed."""

        def fine() -> bool:
            seen = [self.lab.status(host) for host in HOSTS]
            return all(
                s.get("state") == "protected"
                and s["peer"]["connected"]
                and (s["peer"]["silent_ms"] or 0) < HEARTBEAT_TIMEOUT_MS / 2
                for s in seen
            )

        for host in HOSTS:
            self.lab.wait_state(host, "protected", REPAIR_S, meanwhile=self._restart_copy)
        wait_for("a pair that hears each other", fine, REPAIR_S)

    def _restart_copy(self) -> None:
        """Start a copy's QEMU again, as its unit would: it exits when an entry breaks off."""
        vm = self.lab.vm[other(self.pvm)]
        if not vm.alive:
            self.say("     the copy's QEMU has ended with the entry: started again")
            self.lab.start_vm(other(self.pvm), incoming=True)

    def _unless_fenced(self) -> str:
        """Wait until the pair is protected again, or one host runs standalone and has fenced the
        other.

        It does so with a host whose controller is not back within dead_after.
        """
        fences = self.lab.fences()
        try:
            self._protected()
        except LabError:
            if self.lab.fences() == fences:
                raise
            self.tally.fenced += 1
            return self._survivor()
        return ""

    # -- a round

    def round(self, n: int) -> None:
        lab, t = self.lab, self.tally
        if not self.actions:
            self.actions = [a for a in self.kinds if lab.disks or a not in DISK_FAULTS]
            self.rng.shuffle(self.actions)
        action = self.actions.pop()
        evidence = self.evidence = Evidence(lab)
        problems = len(t.problems)
        self._moving(time.time())
        begin = time.time()
        for s in self.records:
            s.longest_s = 0.0
        before = self.pvm
        self.do(action)
        takeovers, survivor = 0, ""
        if action in ALONE:
            survivor = self._survivor()
            t.failovers += 1
            takeovers = survivor != before
            wanted = before if action in STAYS else other(before)
            if survivor != wanted:
                t.problems.append(f"round {n} {action}: the wrong guest goes on")
        else:
            survivor = self._unless_fenced()
            takeovers = bool(survivor) and survivor != before
        self._moving(time.time())
        end = time.time()
        gap = self._gap(begin, end)
        stall = self._fsync_stall(action)
        if survivor:
            self.repair(survivor)
            self._moving(time.time())
            t.pauses.append(self._gap(end, time.time()))
        self._check_streams(f"round {n} {action}")
        t.split_brain += self._transmitters(n, action, evidence, takeovers)
        self._judge(n, action, evidence, problems)
        self.evidence = None
        t.rounds += 1
        t.gaps.append(gap)
        t.by_action[action].append(gap)
        over = gap > limit_ms(action)
        t.over += over
        self.say(
            f"{n:4} {action:<24} gap {gap:6.0f} ms{' BEYOND' * over}, fsync {stall:6.0f} ms, "
            f"PVM on {self.pvm}"
        )
        if len(self.streams) >= STREAMS:
            self._retire(self.rng.choice(self.streams[1:]))  # the first one stays throughout
        self._open()

    def _fsync_stall(self, action: str) -> float:
        """Return the longest wait for a record since the fault, ms; wait until records are again
        confirmed."""
        for s in self.records:
            last = s.last
            with contextlib.suppress(LabError):  # _look_at_disks() has the reason
                wait_for("a record", lambda s=s, n=last: s.dead or s.last > n, 30)  # type: ignore[misc]
        stall = max((s.longest_s * 1000 for s in self.records), default=0.0)
        self.tally.fsync_stall = max(self.tally.fsync_stall, stall)
        self.tally.stalls[action].append(stall)
        return stall

    def _transmitters(self, n: int, action: str, evidence: Evidence, takeovers: int) -> int:
        """Return how often the transmitting host on the wire changed more than the guest did."""
        seen, lost = evidence.stop()
        self.tally.problems += [f"round {n}: {x}" for x in lost]
        changes = sum(a[1] != b[1] for a, b in zip(seen, seen[1:], strict=False))
        if changes > takeovers:
            self.tally.problems.append(
                f"round {n} {action}: {changes} changes of who transmits, {takeovers} of the guest"
            )
        return max(0, changes - takeovers)

    def _judge(self, n: int, action: str, evidence: Evidence, problems: int) -> None:
        """Explain what was wrong and keep its captures; discard those of a clean round."""
        since, self._judged = self._judged, time.time()
        wrong = self._wrong(since)
        for w in wrong:
            story = evidence.explain(w)
            self.tally.problems += [f"round {n} {action}: {x}" for x in story[:4]]
            for x in story:
                self.say(f"     {x}")
        self.explained = bool(wrong)
        self._look_at_lines(n, action)
        errors = len(self.downloads.errors) if self.downloads else 0
        if wrong or len(self.tally.problems) > problems or errors > self._errors:
            self._errors = errors
            evidence.keep(self.lab.dir / f"chaos-evidence-{n}")
        else:
            evidence.forget()

    def _look_at_lines(self, n: int, action: str) -> None:
        """Report a line stream that stands still, in the round in which it began to.

        The client gives it up only TIMEOUT_S later, when the captures of that round are gone.
        """
        times = self.lines.times if self.lines is not None else []
        stalled = bool(times) and time.time() - times[-1] > STALLED_S
        if stalled and not self._stalled:
            since = time.strftime("%H:%M:%S", time.localtime(times[-1]))
            self.tally.problems.append(
                f"round {n} {action}: the line stream stands still since {since}"
            )
        self._stalled = stalled

    def _wrong(self, since: float) -> list[Wrong]:
        """Return the wrong bytes that clients received since then; the first of each client."""
        found = list(self.downloads.found) if self.downloads else []
        for s in self.streams:
            if (odd := s.stats.odd) is not None:
                at = differs_at(odd[1], odd[2])
                found.append(Wrong("echo", odd[0], 7, s.port, odd[1][at:], odd[2][at:]))
        if self.lines is not None and (odd := self.lines.odd_line) is not None:
            at = differs_at(odd[1], odd[2])
            found.append(Wrong("line", odd[0], 1234, self.lines.port, odd[1][at:], odd[2][at:]))
        return [w for w in found if w.at >= since]

    def _look_at_disks(self) -> None:
        """End the guest that is left and look for each record that was confirmed."""
        t = self.tally
        for s in self.records:
            s.stop()
            t.records += s.last
            t.fsync_stall = max(t.fsync_stall, s.longest_s * 1000)
            if s.dead:
                t.lost_connections += 1
                t.problems.append(f"a record stream was lost: {s.dead}")
        if not self.records:
            return
        self.lab.vm[self.pvm].stop()
        for name, s in zip(self.lab.disks, self.records, strict=True):
            found = disk.check(self.lab.image(self.pvm, name), s.confirmed)
            t.lost_writes += len(found.lost) + len(found.wrong_blocks)
            t.fsck_errors += bool(found.fsck_errors)
            if not found.good:
                t.problems.append(f"disk {name} of {s.last} records: {found}"[:2000])

    def run(self, rounds: int, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        lines, downloads = LineStream(self.lab.net.client), Downloads(self.lab)
        self.lines, self.downloads = lines, downloads
        self.records = [
            RecordStream(self.lab.net.client, 2001 + i) for i in range(len(self.lab.disks))
        ]
        try:
            for _ in range(3):
                self._open()
            for n in range(1, rounds + 1):
                if time.monotonic() > end:
                    self.say(f"{seconds:g} s are over")
                    break
                self.round(n)
                if self.explained:
                    break
        except LabError as e:
            n = self.tally.rounds + 1
            self.tally.problems.append(f"round {n}: {e}")
            if self.evidence is not None:
                self.evidence.stop()
                self._judge(n, "broken off", self.evidence, -1)
        finally:
            self._until_repair.close()
            downloads.stop()
            lines.stop()
            self._look_at_disks()
            for s in list(self.streams):
                self._retire(s)
        t = self.tally
        t.wrong_bytes += downloads.wrong + lines.wrong
        if lines.odd:
            t.problems.append(f"the line stream: {lines.odd}")
        if lines.dead:
            t.lost_connections += 1
            t.problems.append(f"the line stream was lost: {lines.dead}")
        t.lost_connections += downloads.failed
        t.problems += downloads.errors[:5]
        return t.report() | {"downloads": downloads.count, "lines": lines.lines}


def fence(lab: Lab) -> list[str]:
    """Fence for real: kill whatever still runs of the other host."""
    lab.work.mkdir(parents=True, exist_ok=True)
    script = lab.work / "fence.sh"
    script.write_text(
        "#!/bin/sh\n"
        'case "$(ip netns identify $$)" in\n'
        f"{lab.net.primary}) other=secondary;; {lab.net.secondary}) other=primary;; *) exit 1;;\n"
        "esac\n"
        f"echo $other >> {lab.work}/fences\n"
        f"for pid in $(cat {lab.work}/$other.pids); do kill -9 $pid 2>/dev/null; done\n"
        "exit 0\n"
    )
    script.chmod(0o755)
    return [str(script)]


class ChaosLab(Lab):
    """Record for the fence which processes belong to which host."""

    def overlays(self, role: str) -> Path:
        """Return where a host keeps its overlays: a file system of its own, which can be full."""
        return self.work / f"{role}.overlays"

    def up(self) -> None:
        super().up()
        size = (2 * self.overlay_limit * len(self.disks) + 32) << 20
        for role in HOSTS if self.disks else ():
            sh("mount", "-t", "tmpfs", "-o", f"size={size}", "overlays", str(self.overlays(role)))

    def down(self) -> None:
        super().down()
        for role in HOSTS:
            sh("umount", "-l", str(self.overlays(role)), check=False)

    def fences(self) -> int:
        """Return how often a host was fenced."""
        path = self.work / "fences"
        return len(path.read_text().split()) if path.exists() else 0

    def _note(self, role: str) -> None:
        pids = [str(self.vm[role].pid)] if role in self.vm else []
        if role in self.controllers:
            pids.append(str(self.controllers[role].pid))
        (self.work / f"{role}.pids").write_text(" ".join(pids))

    def start_vm(self, role: str, *, incoming: bool | None = None) -> Any:
        v = super().start_vm(role, incoming=incoming)
        self._note(role)
        return v

    def start_controller(self, role: str, env: dict[str, str] | None = None) -> Any:
        p = super().start_controller(role, {"COLO_XDP_LOG": "DEBUG", **(env or {})})
        self._note(role)
        return p


def run(
    rounds: int,
    seed: int,
    *,
    seconds: float = 1e9,
    disks: int = 1,
    nics: int = 1,
    say: Callable[[str], None] = print,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """Build a pair, run the rounds, write the report."""
    lab = ChaosLab(BUILD, tag="cxch", overrides=dict(OVERRIDES), disks=disks, nics=nics)
    lab.overrides["failover"] = {"automatic": True, "fence": fence(lab)}
    with lab:
        lab.protect()
        report = Chaos(lab, seed, say, only).run(rounds, seconds)
    (BUILD / "chaos-report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def clean(report: dict[str, Any]) -> bool:
    """Return whether nothing was wrong."""
    bad = ("wrong_bytes", "lost_connections", "split_brain", "lost_writes", "fsck_errors")
    return not any(report[k] for k in bad) and not report["problems"]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--disks", type=int, default=1, help="of the guest, 0 to 2")
    p.add_argument("--nics", type=int, default=1, help="of the guest, 1 or 2")
    p.add_argument("--seconds", type=float, default=1e9, help="begin no round after this time")
    p.add_argument("--only", nargs="*", default=[], choices=sorted(DEADLINE_MS), metavar="FAULT")
    a = p.parse_args()
    report = run(
        a.rounds, a.seed, seconds=a.seconds, disks=a.disks, nics=a.nics, only=a.only,
        say=lambda s: print(s, flush=True),
    )  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0 if clean(report) else 1


if __name__ == "__main__":
    sys.exit(main())
