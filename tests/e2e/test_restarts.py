# SPDX-License-Identifier: GPL-2.0-or-later
"""Test controllers under a supervisor like systemd: killed at any moment, hung, changing roles."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import EchoStream, LineStream
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import BUILD
from tests.e2e.supervisor import Supervisor

KILLS = 6


@pytest.fixture
def supervised() -> Iterator[tuple[Lab, dict[str, Supervisor]]]:
    lab = Lab(BUILD, tag="cxe2e")
    script = lab.work / "incoming.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    # stands for "start QEMU": the test itself does it, so that it can end it again
    script.write_text(f'#!/bin/sh\ntouch "{script.parent}/wanted-$(ip netns identify $$)"\n')
    script.chmod(0o755)
    lab.overrides = {"qemu": {"incoming": [str(script)]}}
    guards: dict[str, Supervisor] = {}
    try:
        lab.up()
        guards = {r: Supervisor(lab, r, 2.0) for r in ("secondary", "primary")}
        for role in guards:
            lab.wait_state(role, "protected")
        yield lab, guards
    finally:
        for g in guards.values():
            g.stop()
        lab.down()


def protected(lab: Lab) -> None:
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 40)


def answered(s: EchoStream, since: float) -> None:
    wait_for("echoes", lambda: s.stats.dead or s.stats.answered_after(since) > 10, 20)


def gap(s: EchoStream, since: float) -> float:
    """Return the longest time between two answers that ends after this."""
    t = list(s.stats.answered_at)
    return max((b - a for a, b in zip(t, t[1:], strict=False) if b > since), default=0.0)


def test_killed_at_any_moment_under_load(supervised: tuple[Lab, dict[str, Supervisor]]) -> None:
    """Nothing is lost or wrong, and no frame of the SVM gets out.

    The data path never pauses for longer than the next controller needs to take it over.
    """
    lab, guards = supervised
    rng = random.Random(5)
    leak = lab.capture(lab.net.client, "to-s", "restarts", "in")
    streams = [EchoStream(lab.net.client, v6=v6) for v6 in (False, True)]
    lines = LineStream(lab.net.client)
    stop = threading.Event()
    wrong: list[str] = []

    def load() -> None:
        while not stop.is_set():
            size, bad = lab.client.download("f1m")
            if bad or not size:
                wrong.append(f"download: {size} bytes, {bad} wrong")
            good, why = lab.client.uptime_page()  # checkpoints all the time
            if not good:
                wrong.append(why)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    for n in range(KILLS):
        role = ("primary", "secondary")[n % 2]
        time.sleep(rng.uniform(0.2, 1.5))  # at any point of what is going on
        at = time.time()
        away = guards[role].kill()
        protected(lab)
        for s in streams:
            answered(s, at + away)
        worst = max(gap(s, at) for s in streams)
        print(f"{role}: ready again after {away:.2f} s, clients' gap {worst * 1e3:.0f} ms")
    stop.set()
    thread.join(60)
    assert not wrong, wrong
    for s in streams:
        stats = s.stop()
        assert (stats.dead, stats.wrong) == ("", 0)
    lines.stop()
    assert (lines.dead, lines.wrong) == ("", 0)
    assert from_guest(lab.stop_capture(leak)) == 0
    assert lab.status("primary")["checkpoints"]["by_cause"]["controller_restart"] == 1


def test_a_controller_that_hangs_is_replaced(
    supervised: tuple[Lab, dict[str, Supervisor]],
) -> None:
    lab, guards = supervised
    stream = EchoStream(lab.net.client)
    for role in ("primary", "secondary"):
        starts = guards[role].starts
        lab.controllers[role].send_signal(signal.SIGSTOP)
        wait_for("the watchdog", lambda r=role, n=starts: guards[r].starts > n, 15)  # type: ignore[misc]
        assert guards[role].aborted == 1
        protected(lab)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)


def test_drill(supervised: tuple[Lab, dict[str, Supervisor]]) -> None:
    """Roles change and the pair is protected again, with the operator's commands alone.

    The controllers keep their processes.
    """
    lab, guards = supervised
    stream = EchoStream(lab.net.client)
    for pvm in ("primary", "secondary"):
        wanted = lab.work / f"wanted-{lab.ns(pvm)}"
        wanted.unlink(missing_ok=True)
        cmd = [sys.executable, "-m", "colo_xdp.cli", "drill", str(lab.config_path(pvm))]
        r = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for("the command that starts a QEMU", wanted.exists, 20)
        wait_for("the end of the old QEMU", lambda v=lab.vm[pvm]: not v.alive, 10)  # type: ignore[misc]
        lab.start_vm(pvm, incoming=True)
        out, _ = r.communicate(timeout=90)
        print(out)
        assert r.returncode == 0, out
        assert "received nothing from the guest for" in out and "roles changed" in out
        protected(lab)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)
    assert [g.starts for g in guards.values()] == [1, 1]
