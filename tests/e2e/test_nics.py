# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with two NICs on two networks: one checkpoint for both, and nothing leaks from either."""

from __future__ import annotations

import time

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import Client, EchoStream
from colo_xdp.lab.net import sh, wait_for
from tests.e2e.conftest import LabMaker

SAN = 1


def echoes(streams: list[EchoStream], since: float | None = None) -> None:
    """Wait until each stream has answers that are younger than `since` (default: now)."""
    at = time.time() if since is None else since
    for s in streams:
        wait_for("echoes", lambda s=s: s.stats.dead or s.stats.answered_after(at) > 5, 20)
        assert not s.stats.dead, s.stats.dead


def test_both_networks_live_through_both_deaths(make_lab: LabMaker) -> None:
    lab = make_lab(nics=2)
    leaks = [
        lab.capture(lab.net.secondary, dev, f"leak-{dev}", "out") for dev in ("uplink", "uplink1")
    ]
    lab.protect()
    for nic in (0, SAN):  # so that only our programs keep the SVM from the network
        sh("ip", "-n", lab.net.secondary, "link", "set", f"tap{nic}", "master", f"br{nic}")
    clients = [Client(lab.net.client, nic) for nic in (0, SAN)]
    before = lab.checkpoints()
    for client in clients:
        for name in ("index.html", "f100k", "big"):
            for v6 in (False, True):
                got, wrong = client.download(name, v6=v6)
                assert got and not wrong, (client.nic, name, v6)
        assert client.upload(1 << 20) == ""
        assert client.udp_echo(20) == (20, 0)
    seen = lab.status("primary")["nics"]
    assert [n["name"] for n in seen] == ["lan", "san"]
    assert all(n["flows"] > 0 and not n["trouble"] and n["arrived"] > 0 for n in seen), seen
    assert [n["mac"] for n in seen] == ["52:54:00:12:34:56", "52:54:00:12:34:57"]
    assert lab.checkpoints() - before <= 2, "guests that agree need none"
    # A difference on the second network is found and named there.
    good, why = clients[SAN].uptime_page()
    assert good, why
    found = [d for d in lab.status("primary")["divergences"] if d["nic"] == "san"]
    assert found and found[-1]["flow"].startswith("san: ")

    streams = [EchoStream(lab.net.client, nic=nic) for nic in (0, SAN)]
    for s in streams:
        wait_for("answers", lambda s=s: len(s.stats.answered_at) > 20, 20)
    lab.vm["primary"].kill9()
    taken = lab.wait_state("secondary", "promoted", 30)
    over = next(h["at"] for h in taken["history"] if h["state"] == "promoted")
    echoes(streams, over)
    for c in leaks:
        frames = lab.stop_capture(c)
        assert from_guest(frames, before=over) == 0
        assert from_guest(frames) > 0, "the capture sees nothing"

    lab.start_vm("primary", incoming=True)
    for role in ("secondary", "primary"):
        lab.wait_state(role, "protected")
    echoes(streams)
    lab.vm["secondary"].kill9()
    lab.wait_state("primary", "promoted", 30)
    echoes(streams)
    for nic, s in enumerate(streams):
        stats = s.stop()
        assert not stats.wrong and not stats.dead, (nic, stats)
    for client in clients:
        got, wrong = client.download("big")
        assert got and not wrong


def test_controllers_that_die_follow_the_first_nic(make_lab: LabMaker) -> None:
    lab = make_lab(nics=2)
    lab.protect()
    streams = [EchoStream(lab.net.client, nic=nic) for nic in (0, SAN)]
    for role in ("primary", "secondary"):
        lab.controllers[role].kill()
        lab.controllers[role].wait()
        lab.start_controller(role)
        for r in ("primary", "secondary"):
            lab.wait_state(r, "protected")
    echoes(streams)
    lab.controllers["primary"].kill()
    lab.vm["primary"].kill9()
    lab.start_controller("primary")
    lab.wait_state("secondary", "promoted", 30)
    echoes(streams)
    for s in streams:
        stats = s.stop()
        assert not stats.wrong and not stats.dead, stats


def test_a_nic_without_a_network_is_refused_by_name(make_lab: LabMaker) -> None:
    """What it sends would leave both hosts. Nothing is changed, and the guest runs on."""
    lab = make_lab(nics=2)
    for role in ("primary", "secondary"):
        path = lab.config_path(role)
        text = path.read_text()
        at = text.rindex("[[network]]")
        path.write_text(text[:at].replace("[[network]]", "[network]"))
        lab.start_controller(role)
    wait_for(
        "the refusal",
        lambda: "52:54:00:12:34:57 at tap1" in lab.status("secondary").get("reason", ""),
        60,
    )
    reason = lab.status("secondary")["reason"]
    assert "at no tap of the configuration" in reason
    assert lab.status("primary")["state"] in ("starting", "solo")
    assert Client(lab.net.client).download("index.html")[1] == 0


def test_a_peer_link_of_one_nic_that_is_cut_is_named(make_lab: LabMaker) -> None:
    lab = make_lab(nics=2)
    lab.protect()
    sh("ip", "-n", lab.net.secondary, "link", "set", "peer1", "down")
    s = lab.wait_state("secondary", "degraded", 20)
    assert "peer1" in s["reason"], s["reason"]
    assert [bool(n["trouble"]) for n in s["nics"]] == [False, True]
    lab.wait_state("primary", "degraded", 20)
    # Clients of both networks are served: by checkpoints on the one that is cut, and only there.
    before = lab.checkpoints()
    for _ in range(5):
        got, wrong = Client(lab.net.client).download("f100k")
        assert got and not wrong
    assert lab.checkpoints() - before <= 1
    got, wrong = Client(lab.net.client, SAN).download("index.html")
    assert got and not wrong
    assert lab.checkpoints() - before >= 1
    sh("ip", "-n", lab.net.secondary, "link", "set", "peer1", "up")
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 30)
