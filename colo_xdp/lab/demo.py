# SPDX-License-Identifier: GPL-2.0-or-later
"""Run `colo-xdp demo`: a Debian VM dies twice; its connections and its disk survive.

All is real but the wires.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from .capture import from_guest
from .client import Client, EchoStream, RecordStream
from .net import NETWORKS, LabError, wait_for
from .pair import Lab

SMALL, MIDDLE, BIG = 20, 5, 2
PAGES = 5
RECORDS = 50
ECHOES = 50  # after the takeover, on each network
NICS = 2
STREAM_BEFORE_S = 1.5
PROGRESS_S, REPEAT_S = 2.0, 10.0
TEXT_LENGTH = 100


class Show:
    """Show progress to the user."""

    def __init__(self) -> None:
        self.t0 = time.monotonic()
        self.rows: list[tuple[str, str, bool]] = []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.t0:6.1f} s] {text}", flush=True)

    def row(self, name: str, value: str, ok: bool) -> None:
        self.rows.append((name, value, ok))
        self.say(f"{'ok  ' if ok else 'WRONG'} {name}: {value}")

    def table(self) -> None:
        width = max(len(r[0]) for r in self.rows)
        print("\n" + "-" * (width + 60))
        for name, value, ok in self.rows:
            print(f"{'ok   ' if ok else 'WRONG'}  {name:<{width}}  {value}")
        print("-" * (width + 60), flush=True)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(r[2] for r in self.rows)


def _progress(lab: Lab, show: Show) -> Callable[[], None]:
    """Return a function that shows what the controllers wait for, now and then."""
    looked = said = time.monotonic()
    last: dict[str, str] = {}

    def look() -> None:
        nonlocal looked, said
        now = time.monotonic()
        if now - looked < PROGRESS_S:
            return
        looked = now
        for role in ("primary", "secondary"):
            seen = lab.status(role)
            text = f"{seen['state']}: {seen['reason']}" if seen else "compiles its programs"
            if text != last.get(role):
                show.say(f"{role}: {shorten(text, TEXT_LENGTH, placeholder=' ...')}")
                last[role], said = text, now
        if now - said > REPEAT_S:
            show.say("no change yet")
            said = now

    return look


def _downloads(lab: Lab, show: Show, report: dict[str, Any]) -> None:
    before = lab.checkpoints()
    count = total = wrong = 0
    plan = ["index.html"] * SMALL + ["f100k"] * MIDDLE + ["big"] * BIG
    clients = [Client(lab.net.client, nic) for nic in range(NICS)]
    slowest = 0.0
    for i, name in enumerate(plan):
        t = time.monotonic()
        got, bad = clients[i // 2 % NICS].download(name, v6=bool(i % 2))
        slowest = max(slowest, time.monotonic() - t)
        count, total, wrong = count + 1, total + got, wrong + bad
    made = lab.checkpoints() - before
    report["downloads"] = {
        "count": count, "bytes": total, "wrong_bytes": wrong, "checkpoints": made,
    }  # fmt: skip
    show.row(
        "downloads, equal on both guests",
        f"{count} over IPv4 and IPv6 by {NICS} NICs, {total / 2**20:.1f} MiB, {wrong} wrong bytes, "
        f"{made} checkpoints, slowest {slowest:.2f} s",
        wrong == 0 and made * 5 <= count,  # a busy machine makes the SVM late now and then
    )


def _divergence(lab: Lab, show: Show, report: dict[str, Any]) -> None:
    before, wrong, errors = lab.checkpoints(), 0, []
    for _ in range(PAGES):
        good, why = lab.client.uptime_page()
        if not good:
            wrong += 1
            errors.append(why)
    made = lab.checkpoints() - before
    last = lab.status("primary")["checkpoints"]["last"]
    report["divergence"] = {"requests": PAGES, "checkpoints": made, "wrong_bytes": wrong}
    show.row(
        "a page that differs on both guests",
        f"{PAGES} requests, {wrong} inconsistent answers {errors or ''}, {made} checkpoints "
        f"(the last: pause {last['pause_ms']:.1f} ms, {last['cause']})",
        wrong == 0 and made >= PAGES,
    )


def _failover(lab: Lab, show: Show, report: dict[str, Any]) -> float:
    streams = [EchoStream(lab.net.client, nic=nic) for nic in range(NICS)]
    for s in streams:
        wait_for("answers", lambda s=s: len(s.stats.answered_at) > STREAM_BEFORE_S / 0.04, 30)  # type: ignore[misc]
    losses = int(lab.status("primary")["ring"]["lost"]) + int(
        lab.status("secondary")["ring"]["lost"]
    )
    report["ring_losses"] = losses
    show.say("kill -9 of the primary's QEMU")
    at = lab.vm["primary"].kill9()
    taken = lab.wait_state("secondary", "promoted", 30)
    seen = lab.status("primary")
    detected = next((h["at"] for h in seen["history"] if h["state"] == "stopped"), at)
    over = float(next(h["at"] for h in taken["history"] if h["state"] == "promoted"))
    with contextlib.suppress(LabError):
        wait_for(
            "echoes after the takeover",
            lambda: all(s.stats.answered_after(over) > ECHOES for s in streams), 20,
        )  # fmt: skip
    gaps = [_stream(show, over, at, nic, s) for nic, s in enumerate(streams)]
    show.row(
        "failover",
        f"detected after {(detected - at) * 1e3:.0f} ms, taken over after {(over - at) * 1e3:.0f} "
        f"ms, client's gap {max(gaps) * 1e3:.0f} ms",
        True,
    )
    got, bad = lab.client.download("big")
    show.row("a new connection afterwards", f"{got} bytes, {bad} wrong", bad == 0 and got > 0)
    report["failover"] = {
        "detect_ms": round((detected - at) * 1e3, 1),
        "takeover_ms": round((over - at) * 1e3, 1),
        "client_gap_ms": round(max(gaps) * 1e3, 1),
        "stream_bytes": sum(s.stats.received for s in streams),
        "wrong_bytes": sum(s.stats.wrong for s in streams) + bad,
        "new_connection_ok": bad == 0 and got > 0,
    }
    return over


def _stream(show: Show, over: float, at: float, nic: int, stream: EchoStream) -> float:
    """Judge a connection that the death has met; return the client's gap, s."""
    stats = stream.stop()
    after = stats.answered_after(over)
    alive = not stats.dead and after > ECHOES
    show.row(
        f"a TCP connection through the death, {NETWORKS[nic][0]}",
        f"{stats.received} bytes echoed, {stats.wrong} wrong, "
        + (f"alive, {after} echoes after it" if alive else f"DEAD {stats.dead}"),
        alive and stats.wrong == 0,
    )
    return _gap_around(stats.answered_at, at)


def _second_death(lab: Lab, show: Show, records: RecordStream) -> None:
    """Give the survivor a new secondary, and let that one survive as well."""
    lab.start_vm("primary", incoming=True)
    t, look = time.monotonic(), _progress(lab, show)
    for role in ("secondary", "primary"):
        # Both controllers change their roles, one after the other.
        lab.wait_state(role, "protected", lab.patience_s * 2, look)
    show.row(
        "protected again, on the former primary host",
        f"after {time.monotonic() - t:.1f} s, with a full copy of the disk",
        True,
    )
    _more_records(records)
    show.say("kill -9 of the other QEMU")
    lab.vm["secondary"].kill9()
    lab.wait_state("primary", "promoted", 30)
    _more_records(records)


def _more_records(records: RecordStream) -> None:
    want = records.last + RECORDS
    with contextlib.suppress(LabError):
        wait_for("records", lambda: records.dead or records.last >= want, 30)


def _disk(lab: Lab, show: Show, report: dict[str, Any], records: RecordStream) -> None:
    """Look for each record on the image of the host that is left, from outside."""
    name = lab.disks[0]
    wait_for("merged overlays", lambda: not lab.status("primary")["disks"]["committing"], 30)
    records.stop()
    show.say("the guest shuts itself down")
    lab.power_off("primary")
    found = lab.check_disk("primary", name, records.confirmed)
    report["disk"] = {
        "records": records.last,
        "lost": len(found.lost) + len(found.wrong_blocks),
        "fsck_errors": len(found.fsck_errors),
        "max_fsync_stall_ms": round(records.longest_s * 1e3, 1),
    }
    show.row(
        "records written with fsync, through both deaths",
        f"{records.last} confirmed on one connection, {report['disk']['lost']} lost, longest wait "
        f"{records.longest_s * 1e3:.0f} ms {records.dead}".rstrip(),
        not (found.lost or found.wrong_blocks or records.dead) and records.last > 3 * RECORDS,
    )
    show.row(
        "the root file system after its shutdown",
        f"{'clean' if found.clean else 'not unmounted'}, e2fsck -fn finds "
        f"{report['disk']['fsck_errors']} errors",
        found.clean and not found.fsck_errors,
    )


def _gap_around(times: list[float], at: float) -> float:
    """Return the longest silence that ends after `at`, s."""
    return max((y - x for x, y in zip(times, times[1:], strict=False) if y > at), default=0.0)


@contextlib.contextmanager
def _lab(directory: Path, show: Show, keep: bool) -> Iterator[Lab]:
    lab = Lab(directory, tag="cxdemo", guest="debian", nics=NICS, disks=1, say=show.say)
    try:
        lab.up()
        yield lab
    finally:
        if keep:
            show.say(f"kept: {lab.work}; `colo-xdp demo` again removes it")
        else:
            lab.down()
            show.say("namespaces, processes and pins removed")


def main(report_path: str = "build/demo-report.json", keep: bool = False) -> int:
    """Run the demonstration; return 0 if everything was right."""
    if os.geteuid():
        print("the demo builds network namespaces and loads BPF programs: run it as root",
              file=sys.stderr)  # fmt: skip
        return 1
    show = Show()
    path = Path(report_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"ok": False}
    steps: tuple[Callable[[Lab, Show, dict[str, Any]], None], ...] = (_downloads, _divergence)
    try:
        with _lab(path.parent, show, keep) as lab:
            report |= {"qemu": lab.qemu_version, "accel": lab.accel, "nics": NICS}
            # What comes out of the secondary host, captured at both ends of its wires. (The PVM's
            # own broadcasts go into them, because the switch floods them.)
            wires = [
                lab.capture(ns, f"{dev}{nic or ''}", f"leaks-{dev}{nic or ''}", way)
                for nic in range(NICS)
                for ns, dev, way in (
                    (lab.net.secondary, "uplink", "out"), (lab.net.client, "to-s", "in"),
                )
            ]  # fmt: skip
            show.say("two controllers, from two TOML files")
            took = lab.protect(_progress(lab, show))
            show.row("entering COLO", f"protected after {took:.1f} s", True)
            for step in steps:
                step(lab, show, report)
            records = RecordStream(lab.net.client)
            _more_records(records)
            over = _failover(lab, show, report)
            captures = [lab.stop_capture(c) for c in wires]
            leaked = sum(from_guest(f, before=over) for f in captures)
            after = [from_guest(f) - from_guest(f, before=over) for f in captures]
            report["svm_frames_leaked"] = leaked
            show.row(
                "frames of the SVM on the network before the takeover",
                f"{leaked} ({sum(after)} seen there after it, so the captures work)",
                leaked == 0 and all(after),
            )
            losses = report["ring_losses"]
            show.row("events lost", str(losses), losses == 0)
            _more_records(records)
            _second_death(lab, show, records)
            _disk(lab, show, report, records)
    except (LabError, OSError, KeyError, StopIteration) as e:
        show.row("the demo itself", f"{type(e).__name__}: {e}", False)
    report["ok"] = show.ok
    path.write_text(json.dumps(report, indent=2) + "\n")
    show.table()
    print(f"report: {path}")
    return 0 if show.ok else 1
