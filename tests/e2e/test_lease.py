# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a real pair whose arbiter is a lease in a real etcd, in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.net import sh, wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker
from tests.e2e.test_failover import live_on, streams

WITNESS, ADDRESS = "cxe2ew", "10.98.0.9"
URL = f"http://{ADDRESS}:2379"
OVERRIDES = {
    "peer": {"heartbeat_timeout": 500, "dead_after": 1500},
    "failover": {"automatic": True, "arbiter": "lease", "etcd": [URL], "lease_ttl": 3000},
}


@pytest.fixture
def lab(make_lab: LabMaker, tmp_path: Path) -> Iterator[Lab]:
    """Provide the pair, protected, with links from both hosts to the store."""
    if not shutil.which("etcd") and not os.environ.get("CI"):
        pytest.skip("etcd is not installed (package etcd-server)")
    sh("ip", "netns", "del", WITNESS, check=False)
    lab = make_lab(overrides=OVERRIDES)
    sh("ip", "netns", "add", WITNESS)
    try:
        sh("ip", "-n", WITNESS, "link", "set", "lo", "up")
        sh("ip", "-n", WITNESS, "addr", "add", f"{ADDRESS}/32", "dev", "lo")
        for n, role in enumerate(("primary", "secondary"), 1):
            ns, dev = lab.ns(role), f"host{n}"
            for line in (
                f"-n {ns} link add wit0 type veth peer name {dev} netns {WITNESS}",
                f"-n {ns} addr add 10.98.{n}.2/30 dev wit0",
                f"-n {WITNESS} addr add 10.98.{n}.1/30 dev {dev}",
                f"-n {ns} link set wit0 up",
                f"-n {WITNESS} link set {dev} up",
                f"-n {ns} route add {ADDRESS} via 10.98.{n}.1",
            ):
                sh("ip", *line.split())
        lab.procs.start(
            ["etcd", "--data-dir", str(tmp_path / "etcd"), "--unsafe-no-fsync", "--name", "e1",
             "--listen-client-urls", URL, "--advertise-client-urls", URL],
            tmp_path / "etcd.log", WITNESS,
        )  # fmt: skip
        lab.protect()
        yield lab
    finally:
        lab.down()
        sh("ip", "netns", "del", WITNESS, check=False)


def test_a_hung_controller_is_silenced_by_its_kernel(lab: Lab) -> None:
    """SIGSTOP: its QEMU runs and sends on. The SVM transmits only when the PVM no longer can."""
    wire = lab.capture(lab.net.primary, "uplink", "pvm", "out")
    made = streams(lab)
    hung = lab.controllers["primary"]
    hung.send_signal(signal.SIGSTOP)
    s = lab.wait_state("secondary", "promoted", 30)
    over = next(h["at"] for h in s["history"] if h["state"] == "promoted")
    assert "the lease is held" in s["reason"]
    live_on(lab, made, over)
    hung.send_signal(signal.SIGCONT)
    lab.wait_state("primary", "stopped", 10)
    assert lab.status("primary")["mode"] == "drop"
    assert lab.client.download("f100k")[1] == 0
    frames = lab.stop_capture(wire)
    assert from_guest(frames, before=over) > 0
    assert from_guest(frames) == from_guest(frames, before=over)  # none after the takeover
    assert lab.status("primary")["programs"]["pvm_out"]["drop_lease_expired"][0] > 0


def test_a_cut_between_the_hosts_leaves_one(lab: Lab) -> None:
    """Both live and reach the store: the holder continues standalone, the other is demoted."""
    made = streams(lab)
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "down")
    lab.wait_state("primary", "solo", 30)
    live_on(lab, made, time.time())
    wait_for("the secondary's word", lambda: "lease" in lab.status("secondary")["reason"], 15)
    assert lab.status("secondary")["state"] == "degraded"
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "up")
    lab.wait_state("secondary", "stopped", 15)
    assert lab.status("secondary")["mode"] == "drop"
    assert lab.client.download("f100k")[1] == 0


def test_the_lease_goes_on_with_the_pair(lab: Lab) -> None:
    """After a cut, a new secondary and a change of roles, each guest may transmit in its turn."""
    made = streams(lab)
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "down")
    lab.wait_state("primary", "solo", 30)
    wait_for("the secondary's word", lambda: "lease" in lab.status("secondary")["reason"], 15)
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "up")
    lab.wait_state("secondary", "stopped", 15)
    pvm, svm = "primary", "secondary"
    lab.vm[svm].kill9()
    lab.start_vm(svm, incoming=True)
    for _ in range(2):
        for role in (pvm, svm):
            lab.wait_state(role, "protected", 60)
        made += streams(lab)
        may = {role: lab.status(role)["active"] for role in (pvm, svm)}
        assert (
            may[pvm]["transmitting"]
            and may[pvm]["remaining_s"] > 0
            and not may[svm]["transmitting"]
        ), may
        over = time.time()
        lab.vm[pvm].kill9()
        reason = lab.wait_state(svm, "promoted", 20)["reason"]
        assert "the lease is held" in reason
        live_on(lab, made, over)
        made = []
        pvm, svm = svm, pvm
        lab.start_vm(svm, incoming=True)
