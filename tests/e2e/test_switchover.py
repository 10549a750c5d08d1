# SPDX-License-Identifier: GPL-2.0-or-later
"""Test failover at an operator's request: planned, on either host, and forced past a hung QEMU."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from colo_xdp.lab import vm as vms
from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.net import GUEST_IP, wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker
from tests.e2e.test_failover import live_on, streams


@pytest.mark.parametrize("asked", ["primary", "secondary"])
def test_switchover(make_lab: LabMaker, asked: str) -> None:
    lab = make_lab()
    lab.protect()
    assert lab.client.download("f100k")[1] == 0
    of_p = lab.capture(lab.net.client, "to-p", "planned-p", "in")
    of_s = lab.capture(lab.net.client, "to-s", "planned-s", "in")
    made = streams(lab)
    steps = lab.ask(asked, "switchover", dry_run=True)["steps"]
    assert any("checkpoint" in s for s in steps)
    assert lab.status("secondary")["state"] == "protected", "a dry run does nothing"
    at = time.time()
    r = lab.ask(asked, "switchover")
    assert r["done"], r
    over = time.time()
    # They are counted every 5 s; the connections are still open.
    wait_for("no offset", lambda: lab.status("secondary")["flows"]["translated"] == 0, 20)
    live_on(lab, made, over)
    gaps = [max(y - x for x, y in zip(t, t[1:], strict=False) if y > at)
            for t in (s.stats.answered_at for s in made)]  # fmt: skip
    print(f"{(over - at) * 1e3:.0f} ms, clients' gaps {[round(g * 1e3) for g in gaps]} ms")
    assert lab.status("secondary")["state"] == "promoted"
    assert lab.status("primary")["mode"] == "drop"
    wait_for("the end of the PVM's QEMU", lambda: not lab.vm["primary"].alive, 10)
    ours, theirs = lab.stop_capture(of_p), lab.stop_capture(of_s)
    last = max(t for t, f in ours if from_guest([(t, f)]))
    first = min(t for t, f in theirs if from_guest([(t, f)]))
    assert first > last, "one transmits after the other"
    arp = bytes.fromhex("0806 0001 0800 0604 0001 525400123456") + bytes(
        int(x) for x in GUEST_IP.split(".")
    )
    assert any(arp in f for _, f in theirs), "gratuitous ARP"
    assert any(f[12:14] == b"\x86\xdd" and f[54:56] == b"\x88\x00" for _, f in theirs), "NDP"


def dirty(lab: Lab) -> None:
    """Create much to copy for the next checkpoint."""
    lab.client.run("dd if=/dev/zero of=/tmp/dirty bs=1M count=24; rm /tmp/dirty")


def stop_inside_a_checkpoint(lab: Lab, *, hangs: bool) -> None:
    """Stop the primary's QEMU while it sends memory: the secondary waits for more.

    `hangs`: its main loop does, so that QMP is not answered.
    """
    for _ in range(20):
        dirty(lab)
        lab.wait_state("primary", "protected", 20)
        asked = threading.Thread(target=lambda: _quietly(lab), daemon=True)
        asked.start()
        wait_for("a checkpoint", lambda: lab.status("secondary")["state"] == "checkpointing", 5,
                 0.001)  # fmt: skip
        lab.vm["primary"].signal(signal.SIGSTOP)
        try:
            status = lab.vm["secondary"].ask("query-status", seconds=1)["status"]
        except TimeoutError:
            assert hangs
            return
        if not hangs and status == "colo":  # the SVM is stopped, and stays so
            return
        lab.vm["primary"].signal(signal.SIGCONT)
        asked.join(20)
    pytest.fail("the secondary's QEMU never waited inside a checkpoint")


def _quietly(lab: Lab) -> None:
    try:
        lab.ask("primary", "checkpoint")
    except Exception as e:
        print("checkpoint:", e)


def test_forced_past_a_hung_main_loop(make_lab: LabMaker) -> None:
    """QEMU holds its big lock while it reads a checkpoint: only an out-of-band yank frees it.

    QEMU 11 reads without the lock, and answers.
    """
    hangs = vms.qemu_version(vms.chosen_qemu()) < (11, 0, 0)
    lab = make_lab(overrides={"checkpoint": {"deadline": 60000}})
    lab.protect()
    made = streams(lab)
    stop_inside_a_checkpoint(lab, hangs=hangs)
    at = time.monotonic()
    r = lab.ask("secondary", "failover", force=True)
    assert r["done"] and r["state"] == "promoted", r
    print(f"taken over after {time.monotonic() - at:.2f} s")
    assert not hangs or "yank" in lab.controller_log("secondary").read_text()
    live_on(lab, made, time.time())
    assert lab.status("primary")["mode"] == "drop"
    lab.vm["primary"].signal(signal.SIGCONT)
    wait_for("the end of the PVM's QEMU", lambda: not lab.vm["primary"].alive, 20)
