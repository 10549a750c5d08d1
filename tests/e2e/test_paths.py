# SPDX-License-Identifier: GPL-2.0-or-later
"""Test heartbeats over several links: a cut control channel, with and without a death."""

from __future__ import annotations

import time
from pathlib import Path

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import wait_for
from tests.e2e.conftest import LabMaker
from tests.e2e.test_failover import fence, live_on

KEYS = {"heartbeat_timeout": 600, "dead_after": 1500}


def test_only_the_control_channel_is_cut(make_lab: LabMaker, tmp_path: Path) -> None:
    """Nobody is fenced, the guests continue, and a checkpoint re-arms the pair afterwards.

    A primary that dies behind such a cut reports by heartbeat that its path is shut, and needs no
    fence either.
    """
    note, command = fence(tmp_path, 0)
    lab = make_lab(
        overrides={"failover": {"automatic": True, "fence": command}, "peer": KEYS},
    )
    lab.protect()
    leak = lab.capture(lab.net.secondary, "uplink", "leak", "out")
    stream = EchoStream(lab.net.client)
    wait_for("echoes", lambda: len(stream.stats.answered_at) > 20, 10)
    with lab.net.control_cut():
        for role in ("primary", "secondary"):
            s = lab.wait_state(role, "degraded", 10)
            assert "the control channel is cut, but the peer lives" in s["reason"], s["reason"]
            assert "over peer link" in s["reason"]
        # for longer than a dead host would have been given, on either side
        end = time.monotonic() + 2.5 * KEYS["dead_after"] / 1000
        while time.monotonic() < end:
            for role in ("primary", "secondary"):
                s = lab.status(role)
                assert s["state"] == "degraded" and not s["peer"]["connected"], s["reason"]
                (path,) = s["heartbeat_links"]
                assert path["silent_ms"] < KEYS["heartbeat_timeout"]
                assert path["echo_age_ms"] < KEYS["heartbeat_timeout"]
            time.sleep(0.1)
        at = time.time()
        wait_for("echoes", lambda: stream.stats.answered_after(at) > 20, 10)
    lab.wait_state("primary", "protected", 20)
    lab.wait_state("secondary", "protected", 20)
    assert "peer_gap" in lab.status("primary")["reason"]
    assert from_guest(lab.stop_capture(leak)) == 0
    with lab.net.control_cut():
        lab.wait_state("secondary", "degraded", 10)
        lab.vm["primary"].kill9()
        s = lab.wait_state("secondary", "promoted", 15)
        assert "its data path is shut" in s["reason"], s["reason"]
        assert lab.status("primary")["mode"] == "drop"
        live_on(lab, [stream], time.time())
    assert not note.exists(), "nobody was fenced"


def test_output_that_waits_behind_a_cut(make_lab: LabMaker, tmp_path: Path) -> None:
    """The secondary is asked by heartbeat to demote itself, and reports so the same way."""
    note, command = fence(tmp_path, 0)
    lab = make_lab(overrides={"failover": {"automatic": True, "fence": command}, "peer": KEYS})
    lab.protect()
    stream = EchoStream(lab.net.client)
    wait_for("echoes", lambda: len(stream.stats.answered_at) > 20, 10)
    with lab.net.control_cut():
        lab.wait_state("primary", "degraded", 10)
        # two guests never give the same answer to this: it waits until the PVM runs standalone
        assert lab.client.http("cgi-bin/uptime", timeout=20, port=8080).ok
        s = lab.wait_state("primary", "solo", 10)
        assert "its data path is shut" in s["reason"], s["reason"]
        s = lab.wait_state("secondary", "stopped", 10)
        assert s["mode"] == "drop", s["reason"]
    # its reason then names what the primary did next
    assert "asked by its heartbeat datagrams" in lab.controller_log("secondary").read_text()
    story = lab.controller_log("primary").read_text()
    assert "it is asked to demote itself over" in story
    assert not note.exists(), "nobody was fenced"
    live_on(lab, [stream], time.time())
