# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a real pair whose peer link is deleted and recreated, or pulled under traffic."""

from __future__ import annotations

import time

from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import GUEST_IP, sh, wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker

CUT_S = 6.0  # with a checkpoint for each of its round trips, of which there are about ten
FAST_S = 1.5  # a request on a busy machine; compare_timeout is 3 s


def requests(lab: Lab, n: int) -> float:
    """Send requests on connections of their own; return the slowest one's time, s."""
    slowest = 0.0
    for _ in range(n):
        began = time.monotonic()
        size, wrong = lab.client.download("f100k")
        slowest = max(slowest, time.monotonic() - began)
        assert size > 0 and wrong == 0
    return slowest


def test_a_peer_link_that_was_made_again_serves_again(make_lab: LabMaker) -> None:
    """Under its name and with its addresses; the control channel uses it too."""
    lab = make_lab()
    lab.protect()
    stream = EchoStream(lab.net.client)
    wait_for("echoes", lambda: len(stream.stats.answered_at) > 20, 10)
    old = {r: lab.status(r)["data_path"]["restored"] for r in ("primary", "secondary")}
    sh("ip", "-n", lab.net.primary, "link", "del", "peer0")
    for role in ("primary", "secondary"):
        s = lab.wait_state(role, "degraded", 10)
        wait_for("the reason", lambda r=role: "peer0 does not exist" in lab.status(r)["reason"], 10)  # type: ignore[misc]
        assert "peer0" in s["reason"] or "peer" in s["reason"]
    lab.net.peer_link()
    for role in ("primary", "secondary"):
        s = lab.wait_state(role, "protected", 20)
        assert s["data_path"]["trouble"] == "" and s["data_path"]["restored"] > old[role]
        wait_for(
            "datagrams", lambda r=role: lab.status(r)["heartbeat_links"][0]["silent_ms"] < 500, 5
        )  # type: ignore[misc]
    requests(lab, 2)  # frames lost meanwhile may cost one more checkpoint
    before = lab.checkpoints()
    assert requests(lab, 10) < FAST_S
    assert lab.checkpoints() - before <= 2
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)


def test_a_pulled_peer_link_costs_checkpoints_and_not_timeouts(make_lab: LabMaker) -> None:
    """The control channel uses another link and survives."""
    lab = make_lab()
    base = GUEST_IP.rpartition(".")[0]
    for role, n in (("primary", 101), ("secondary", 102)):
        sh("ip", "-n", lab.ns(role), "addr", "add", f"{base}.{n}/24", "dev", "br0")
    for role in ("primary", "secondary"):
        path = lab.config_path(role)
        text = path.read_text()
        for here, there in (("10.99.0.1", f"{base}.101"), ("10.99.0.2", f"{base}.102")):
            text = text.replace(here, there)
        path.write_text(text)
    lab.protect()
    requests(lab, 3)
    sh("ip", "-n", lab.net.secondary, "link", "set", "peer0", "down")
    for role in ("primary", "secondary"):
        wait_for("the reason", lambda r=role: "peer0" in lab.status(r)["reason"], 10)  # type: ignore[misc]
        s = lab.status(role)
        assert s["state"] == "degraded" and s["peer"]["connected"], s["reason"]
    before = lab.status("primary")["checkpoints"]["by_cause"]
    assert requests(lab, 4) < CUT_S
    now = lab.status("primary")
    assert now["checkpoints"]["by_cause"]["peer_link"] > before["peer_link"]
    assert now["checkpoints"]["by_cause"]["compare_timeout"] == before["compare_timeout"]
    assert now["state"] == "degraded", "whatever a checkpoint says of the guests"
    sh("ip", "-n", lab.net.secondary, "link", "set", "peer0", "up")
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 20)
    requests(lab, 2)
    n = lab.checkpoints()
    assert requests(lab, 5) < FAST_S
    assert lab.checkpoints() - n <= 2
