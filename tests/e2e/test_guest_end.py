# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what a guest does to itself, and what an operator does to one QEMU of a pair."""

from __future__ import annotations

import time
from typing import Any

import pytest

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker

BOOT_S = 150  # both at the same time, under TCG


def states(lab: Lab, role: str) -> list[str]:
    return [h["state"] for h in lab.status(role)["history"]]


def serves(lab: Lab) -> bool:
    return lab.client.http("index.html", timeout=2).ok


def made_for(lab: Lab, cause: str) -> int:
    return int(lab.status("primary")["checkpoints"]["by_cause"][cause])


def test_a_guest_that_powers_itself_off_ends_the_pair(make_lab: LabMaker) -> None:
    lab = make_lab()
    wire = lab.capture(lab.net.secondary, "uplink", "svm", "out")
    lab.protect()
    assert serves(lab)
    lab.client.run("poweroff -f >/dev/null 2>&1 &")
    for role in ("primary", "secondary"):
        s = lab.wait_state(role, "stopped", 15)
        assert "shut itself down" in s["reason"] and s["mode"] == "drop"
        assert not s["active"]["transmitting"]
        wait_for(f"the end of the {role}'s QEMU", lambda r=role: not lab.vm[r].alive, 15)  # type: ignore[misc]
    assert "promoted" not in states(lab, "secondary")
    assert from_guest(lab.stop_capture(wire)) == 0


@pytest.mark.parametrize("how", ["by itself", "system_reset"])
def test_a_reset_is_a_checkpoint(make_lab: LabMaker, how: str) -> None:
    lab = make_lab()
    lab.protect()
    assert serves(lab) and made_for(lab, "guest_event") == 0
    at = time.time()
    if how == "by itself":
        lab.client.run("reboot -f >/dev/null 2>&1 &")
    else:
        lab.vm["primary"].ask("system_reset")
    wait_for("a checkpoint", lambda: made_for(lab, "guest_event") > 0, 10)
    wait_for("the guest's services", lambda: serves(lab), BOOT_S)
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 10)
        assert not {"solo", "promoted"} & set(states(lab, role))
    assert lab.vm["secondary"].alive
    print(f"served again after {time.time() - at:.1f} s, {lab.checkpoints()} checkpoints")
    # and the copy is a real one: it continues
    stream = EchoStream(lab.net.client)
    wait_for("echoes", lambda: len(stream.stats.answered_at) > 20, 10)
    died = lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 15)
    wait_for("echoes afterwards", lambda: stream.stats.answered_after(died) > 30, 20)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_guest_that_somebody_stops_runs_on_with_a_checkpoint(
    make_lab: LabMaker, role: str
) -> None:
    lab = make_lab()
    lab.protect()
    lab.vm[role].ask("stop")
    wait_for("a checkpoint", lambda: made_for(lab, "guest_event") > 0, 2)
    wait_for("the guest to run", lambda: lab.vm[role].ask("query-status")["status"] == "running", 2)
    assert serves(lab)
    for side in ("primary", "secondary"):
        lab.wait_state(side, "protected", 5)
    assert "stopped" in lab.status("primary")["checkpoints"]["last"]["detail"]


@pytest.mark.parametrize(
    ("wait", "page"),
    [
        ("adaptive", {"path": "index.html"}),
        ("fixed", {"path": "index.html"}),
        # its first output waits for the next checkpoint already, or acks what left with the last
        ("adaptive", {"path": "cgi-bin/run?sleep%203", "port": 8080}),
    ],
    ids=["adaptive", "fixed", "a service slower than patience"],
)
def test_a_copy_that_answers_nothing_is_given_up(
    make_lab: LabMaker, wait: str, page: dict[str, Any]
) -> None:
    """Each checkpoint makes it a copy again, and it falls silent again: clients pay for each."""
    lab = make_lab(overrides={"compare": {"wait": wait}})
    lab.protect()
    assert serves(lab)
    # As seen from outside, like a kernel that panics whenever it runs. The card's own link would
    # come back with the state of a checkpoint.
    lab.vm["secondary"].ask("set_link", name="n0", up=False)
    began = time.monotonic()

    def alone() -> dict[str, Any]:
        lab.client.http(**page, timeout=5)
        said = lab.status("primary")
        return said if said["state"] == "solo" else {}

    solo = wait_for("the PVM to go on alone", alone, 60)
    print(f"{wait}: given up after {time.monotonic() - began:.1f} s")
    assert "the SVM has sent nothing over 3 checkpoints" in solo["reason"]
    lab.wait_state("secondary", "stopped", 10)
    at = time.monotonic()
    assert serves(lab) and time.monotonic() - at < 1  # nothing waits any more
    lab.vm["secondary"].stop()
    lab.start_vm("secondary")
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 60)
    assert serves(lab)
