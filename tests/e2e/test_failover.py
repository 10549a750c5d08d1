# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the death of every part of a pair, with a client's connections open."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import sh, stop_process, wait_for
from colo_xdp.lab.pair import Lab
from colo_xdp.service.control_socket import ControlError
from tests.e2e.conftest import LabMaker


def streams(lab: Lab) -> list[EchoStream]:
    """Open two connections, IPv4 and IPv6, before the death."""
    made = [EchoStream(lab.net.client), EchoStream(lab.net.client, v6=True)]
    for s in made:
        wait_for("echoes", lambda s=s: len(s.stats.answered_at) > 20, 10)  # type: ignore[misc]
    return made


def live_on(lab: Lab, made: list[EchoStream], since: float) -> None:
    """Check that old connections continue without a wrong byte, and that new ones work."""
    for s in made:
        wait_for(
            "echoes afterwards",
            lambda s=s: s.stats.dead or s.stats.answered_after(since) > 30,  # type: ignore[misc]
            20,
        )
        stats = s.stop()
        assert (stats.dead, stats.wrong) == ("", 0)
    for v6 in (False, True):
        size, wrong = lab.client.download("f1m", v6=v6)
        assert size > 0 and wrong == 0
    assert lab.client.upload(100_000) == ""


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["tc-offloads", "xdp-plain"])
def test_primary_qemu_dies(make_lab: LabMaker, vnet_hdr: bool) -> None:
    lab = make_lab(vnet_hdr=vnet_hdr)
    leak = lab.capture(lab.net.secondary, "uplink", "leak", "out")
    lab.protect()
    assert lab.status("secondary")["hook"] == ("tc" if vnet_hdr else "xdp")
    for name in ("f100k", "big"):
        assert lab.client.download(name)[1] == 0
    made = streams(lab)
    before = lab.status("secondary")["flows"]
    at = lab.vm["primary"].kill9()
    s = lab.wait_state("secondary", "promoted", 15)
    over = next(h["at"] for h in s["history"] if h["state"] == "promoted")
    assert over - at < 5
    live_on(lab, made, over)
    assert lab.status("primary")["state"] == "stopped"
    assert lab.status("primary")["mode"] == "drop"
    frames = lab.stop_capture(leak)
    assert from_guest(frames, before=over) == 0
    assert from_guest(frames) > 0
    assert before["limit"] > 0


def test_a_controller_is_stopped_and_nobody_is_fenced(make_lab: LabMaker, tmp_path: Path) -> None:
    """For longer than dead_after, on either host; its guest's death is noticed all the same."""
    note, command = fence(tmp_path, 0)
    lab = make_lab(overrides={
        "failover": {"automatic": True, "fence": command},
        "peer": {"heartbeat_timeout": 500, "dead_after": 1000},
    })  # fmt: skip
    lab.protect()
    made = streams(lab)
    for role, other in (("secondary", "primary"), ("primary", "secondary")):
        stop_process(lab.controllers[role])
        s = lab.wait_state(other, "degraded", 15)
        wait_for(
            "more than twice dead_after",
            lambda o=other: (lab.status(o)["peer"]["silent_ms"] or 0) > 3000,  # type: ignore[misc]
            15,
        )
        s = lab.status(other)
        assert s["state"] == "degraded" and "stopped on purpose" in s["reason"], s["reason"]
        assert not note.exists()
        lab.start_controller(role)
        lab.wait_state("primary", "protected", 30)
        lab.wait_state("secondary", "protected", 30)
    stop_process(lab.controllers["primary"])
    lab.wait_state("secondary", "degraded", 15)
    lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 30)
    assert note.exists(), "a sign of death counts as ever"
    live_on(lab, made, time.time())
    lab.vm["secondary"].kill9()
    s = lab.wait_state("secondary", "stopped", 15)
    assert "no guest is active now" in s["reason"] and not s["active"]["transmitting"]
    assert s["mode"] == "drop"


def test_secondary_qemu_dies(make_lab: LabMaker) -> None:
    lab = make_lab()
    lab.protect()
    made = streams(lab)
    lab.vm["secondary"].kill9()
    lab.wait_state("primary", "solo", 15)
    live_on(lab, made, time.time())
    assert lab.status("primary")["mode"] == "bypass"


def fence(tmp_path: Path, status: int) -> tuple[Path, list[str]]:
    """Create a fence command that leaves a note and exits with this status."""
    note = tmp_path / "fenced"
    script = tmp_path / "fence.sh"
    script.write_text(f"#!/bin/sh\ndate >> {note}\nexit {status}\n")
    script.chmod(0o755)
    return note, [str(script)]


def test_primary_host_dies_and_the_fence_works(make_lab: LabMaker, tmp_path: Path) -> None:
    note, command = fence(tmp_path, 0)
    lab = make_lab(overrides={"failover": {"automatic": True, "fence": command}})
    lab.protect()
    made = streams(lab)
    lab.controllers["primary"].send_signal(signal.SIGKILL)
    lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 20)
    assert note.exists(), "fenced before anything was opened"
    live_on(lab, made, time.time())


def test_no_fence_no_takeover_until_a_person_says_so(make_lab: LabMaker, tmp_path: Path) -> None:
    note, command = fence(tmp_path, 1)
    lab = make_lab(overrides={"failover": {"automatic": True, "fence": command}})
    leak = lab.capture(lab.net.secondary, "uplink", "leak", "out")
    lab.protect()
    made = streams(lab)
    lab.controllers["primary"].send_signal(signal.SIGKILL)
    lab.vm["primary"].kill9()
    s = lab.wait_state("secondary", "degraded", 20)
    wait_for("the failed fence", note.exists, 10)
    wait_for("the reason", lambda: "fence command failed" in lab.status("secondary")["reason"], 10)
    assert lab.status("secondary")["mode"] != "takeover", s["reason"]
    assert from_guest(lab.stop_capture(leak)) == 0
    steps = lab.ask("secondary", "failover", dry_run=True)["steps"]
    assert any("x-colo-lost-heartbeat" in x for x in steps)
    fence(tmp_path, 0)  # the operator repairs it, and requests failover
    r = lab.ask("secondary", "failover")
    assert r["done"] and r["state"] == "promoted"
    live_on(lab, made, time.time())


def test_a_copy_that_missed_something_never_transmits(make_lab: LabMaker) -> None:
    """A cut link, an operator who opens the primary, the link is back, and then the PVM dies."""
    lab = make_lab(overrides={"failover": {"arbiter": "manual"}})
    lab.protect()
    wire = lab.capture(lab.net.secondary, "uplink", "svm", "out")
    made = streams(lab)
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "down")
    lab.wait_state("primary", "degraded", 15)
    lab.ask("primary", "failover", force=True)
    lab.wait_state("primary", "solo", 10)
    live_on(lab, made, time.time())
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "up")
    lab.wait_state("secondary", "stopped", 15)  # asked, perhaps, before the primary was opened
    wait_for("why", lambda: "run standalone" in lab.status("secondary")["reason"], 5)
    lab.vm["primary"].kill9()
    wait_for("its end", lambda: lab.status("primary")["qemu"]["gone"], 15)
    with pytest.raises(ControlError, match="run standalone"):
        lab.ask("secondary", "failover", force=True)
    s = lab.status("secondary")
    assert (s["state"], s["mode"]) == ("stopped", "drop")
    assert from_guest(lab.stop_capture(wire)) == 0


def test_secondary_hangs(make_lab: LabMaker) -> None:
    """A hanging QEMU costs the pair, not the service."""
    lab = make_lab(overrides={"checkpoint": {"deadline": 2000}})
    lab.protect()
    made = streams(lab)
    lab.vm["secondary"].signal(signal.SIGSTOP)
    lab.wait_state("primary", "solo", 30)
    lab.vm["secondary"].signal(signal.SIGCONT)
    live_on(lab, made, time.time())
    assert lab.status("secondary")["mode"] == "drop"


def test_primary_dies_inside_a_checkpoint(make_lab: LabMaker) -> None:
    lab = make_lab()
    lab.protect()
    made = streams(lab)
    lab.vm["secondary"].signal(signal.SIGSTOP)  # so that the checkpoint cannot complete
    lab.client.http("cgi-bin/uptime", timeout=0.5, port=8080)
    wait_for(
        "a checkpoint", lambda: lab.status("primary")["state"] in ("checkpointing", "degraded"), 10
    )
    lab.vm["primary"].kill9()
    lab.vm["secondary"].signal(signal.SIGCONT)
    lab.wait_state("secondary", "promoted", 20)
    live_on(lab, made, time.time())


def test_a_guest_that_restarts_before_protection_keeps_its_network(make_lab: LabMaker) -> None:
    """It gets none before the other host's controller reports that its guest does not transmit."""
    lab = make_lab()
    lab.vm["secondary"].kill9()  # so that nothing is protected yet
    wire = lab.capture(lab.net.primary, "uplink", "pvm", "out")
    lab.start_controller("primary")
    s = lab.wait_state("primary", "starting", 60)
    wait_for(
        "the reason",
        lambda: "does not know what happened before" in lab.status("primary")["reason"],
        10,
    )
    assert s["mode"] == "drop" and not s["active"]["transmitting"]
    assert not lab.client.http("f100k", timeout=1).ok
    assert from_guest(lab.stop_capture(wire)) == 0
    lab.start_controller("secondary")
    wait_for("its word", lambda: lab.status("primary")["active"]["transmitting"], 60)
    # The client has asked for the address in vain, and its kernel may be about to give that up.
    wait_for("an answer", lambda: lab.client.http("f100k", timeout=3).ok, 20)
    assert lab.client.download("f100k")[1] == 0
    lab.vm["primary"].kill9()
    wait_for("its end", lambda: not lab.status("primary")["active"]["transmitting"], 10)
    lab.start_vm("primary").wait_boot()
    assert lab.client.download("f100k")[1] == 0
    lab.start_vm("secondary")
    lab.wait_state("primary", "protected")
    before = lab.checkpoints()
    assert lab.client.download("big")[1] == 0
    assert lab.checkpoints() == before
