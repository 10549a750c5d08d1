# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp doctor` on hosts with real faults: each is found, and the safe ones are mended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.config.file import load
from colo_xdp.datapath import attach, bridge, devices
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.netlink import rtnetlink
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Tap, inside, own, sh

PAIR = own("nsdr")
CONTROL, METRICS = 19890, 19891

Finding = dict[str, Any]


class Host:
    """One host of a pair that is right, until a test breaks something."""

    def __init__(self, net: Net, tmp: Path) -> None:
        self.net, self.tmp = net, tmp
        for text in (
            "link set lo up", "addr add 10.0.0.1/24 dev peer0", "link set dev tap0 nomaster",
        ):  # fmt: skip
            self.ip(text)
        sh("ip", "-n", net.other, "addr", "add", "10.0.0.2/24", "dev", "peer0")

    def ip(self, text: str) -> str:
        return sh("ip", "-n", self.net.host, *text.split())

    def config(self, role: str = "primary", local: str = "10.0.0.1") -> Path:
        path = self.tmp / "c.toml"
        path.write_text(
            f"""
            pair = "{PAIR}"
            role = "{role}"
            [network]
            tap = "tap0"
            peer_link = "peer0"
            bridge = "br0"
            [qemu]
            qmp = "{self.tmp}/qmp"
            migrate_uri = "tcp:10.0.0.2:19898"
            reverse_uri = "tcp:10.0.0.2:19899"
            [peer]
            local = "{local}:{CONTROL}"
            remote = "10.0.0.2:{CONTROL}"
            insecure = true
            [datapath]
            run_dir = "{self.tmp}/run"
            ring_pages = 256
            fast_path = "off"
            [metrics]
            listen = "127.0.0.1:{METRICS}"
            """
        )
        return path

    def doctor(self, *options: str, **config: str) -> dict[str, Any]:
        path = self.config(**config)
        cmd = [sys.executable, "-m", "colo_xdp.cli", "doctor", "--json", str(path), *options]
        r = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.net.host}", *cmd],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert r.stdout, r.stderr
        doc: dict[str, Any] = json.loads(r.stdout)
        assert r.returncode == (doc["level"] == "fail")
        return doc

    def found(self, key: str, *options: str, **config: str) -> list[Finding]:
        """Return the findings about this that are not good; each has a remedy."""
        checks = self.doctor(*options, **config)["checks"]
        out = [c for c in checks if c["key"] == key and c["level"] != "ok"]
        assert all(c["remedy"] for c in out), out
        return out


@pytest.fixture
def host(net: Net, tmp_path: Path) -> Iterator[Host]:
    yield Host(net, tmp_path)
    with inside(net.host):
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path / "run"), force=True)


def test_a_host_that_is_right_has_nothing_about_its_network(host: Host) -> None:
    checks = host.doctor()["checks"]
    about = ("tap", "isolation", "bridge", "peer link", "addresses", "other pairs", "filters",
             "in use", "XDP")  # fmt: skip
    assert [c for c in checks if c["key"] in about and c["level"] != "ok"] == []
    assert {"tap", "isolation", "bridge", "peer link", "addresses"} <= {c["key"] for c in checks}


def test_what_is_down_is_brought_up(host: Host) -> None:
    for dev in ("tap0", "peer0", "br0"):
        host.ip(f"link set {dev} down")
    checks = {(c["key"], c["fix"]) for c in host.doctor()["checks"] if c["fix"]}
    wanted = {
        ("tap", "ip link set tap0 up"), ("peer link", "ip link set peer0 up"),
        ("bridge", "ip link set br0 up"),
    }  # fmt: skip
    assert wanted <= checks
    assert ",UP" not in host.ip("-br link show tap0"), "without --fix nothing is changed"
    doc = host.doctor("--fix")
    done = {f["command"]: f for f in doc["fixed"]}
    for _, command in wanted:
        assert done[command]["done"] and done[command]["undo"].endswith(" down")
    for dev in ("tap0", "peer0", "br0"):
        assert "UP" in host.ip(f"link show {dev}").split(">")[0].split("<")[1].split(",")
    assert not [c for c in doc["checks"] if c["fix"] in {x for _, x in wanted}], "it looked again"


def test_a_tap_in_a_wrong_bridge_is_told_and_left(host: Host) -> None:
    host.ip("link add br7 type bridge")
    host.ip("link set tap0 master br7")
    (c,) = host.found("isolation", "--fix")
    assert c["level"] == "fail" and "tap0 is in br7, and [network] bridge is br0" in c["text"]
    (c,) = host.found("isolation", "--fix", role="secondary")
    assert c["level"] == "fail" and "tap0 is in a bridge (br7)" in c["text"]
    assert "master br7" in host.ip("link show tap0")


def test_a_tap_whose_guest_may_transmit_is_put_into_its_bridge(host: Host) -> None:
    """Only then: the programs are pinned, and a controller has decided it."""
    with inside(host.net.host):
        dp = DataPath(load(host.config()))
    try:
        assert host.found("bridge", "--fix") == [] and "master" not in host.ip("link show tap0")
        dp.mode = Mode.RUN
        (c,) = host.found("bridge")
        assert c["level"] == "fail" and c["fix"] == "ip link set tap0 master br0"
        assert host.found("bridge", "--fix") == []
        assert "master br0" in host.ip("link show tap0")
    finally:
        dp.close()


def test_a_bridge_with_stp_or_none_is_told_and_left(host: Host) -> None:
    host.ip("link set br0 type bridge stp_state 1 forward_delay 1500")
    (c,) = host.found("bridge", "--fix")
    assert c["level"] == "fail" and "cut off for 30 s" in c["text"] and c["fix"] is None
    with inside(host.net.host):
        assert bridge.spanning_tree("br0")[0] == 1, "only a person knows whether there is a loop"
    host.ip("link del br0")
    (c,) = host.found("bridge")
    assert "br0 does not exist" in c["text"] and "ip link add br0 type bridge" in c["remedy"]


def test_a_tap_that_qemu_has_made_itself(host: Host) -> None:
    host.ip("link del tap0")
    (c,) = host.found("tap")
    assert "tap0 does not exist" in c["text"] and "ip tuntap add dev tap0" in c["remedy"]
    with inside(host.net.host):
        made = Tap("tap0")
    try:
        found = host.found("tap")
        assert "made by QEMU itself" in found[0]["text"] and found[0]["level"] == "fail"
    finally:
        made.close()


def test_filters_of_another_pair_and_of_another_tool(host: Host) -> None:
    with inside(host.net.host):
        dp = DataPath(load(host.config()))
        prog = dp.objects.programs["pvm_release"]
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(host.tmp / "run"), force=True)
        try:
            attach.attach_tc("peer0", "ingress", prog, "web9", None)
            with rtnetlink() as ipr:
                index = devices.link_info("tap0").index
                ipr.tc("add", "clsact", index)
                ipr.tc(
                    "add-filter", "bpf", index, handle=1, prio=attach.FIRST, name="theirs",
                    protocol=attach.ETH_P_ALL, fd=prog.fd, parent=attach.INGRESS, classid=1,
                    direct_action=True,
                )  # fmt: skip
        finally:
            dp.close()
    doc = host.doctor("--fix")
    said = {c["key"]: c for c in doc["checks"] if c["level"] == "fail"}
    assert "comes first" in said["filters"]["text"] and "theirs" in said["filters"]["text"]
    assert "tc filter show dev tap0" in said["filters"]["remedy"]
    assert "peer0 ingress: pair web9 has its program" in said["other pairs"]["text"]
    with inside(host.net.host):
        assert "theirs" in sh("tc", "filter", "show", "dev", "tap0", "ingress")
        assert "colo-xdp:web9:" in sh("tc", "filter", "show", "dev", "peer0", "ingress")


def test_a_port_that_is_taken_and_by_whom(host: Host) -> None:
    listen = (
        "import socket, sys; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    cmd = ["nsenter", f"--net=/run/netns/{host.net.host}", sys.executable, "-c", listen]
    for address, port, key, role in (
        ("127.0.0.1", METRICS, "[metrics] listen", "primary"),
        ("10.0.0.1", CONTROL, "[peer] local", "secondary"),
    ):
        with subprocess.Popen(
            [*cmd, address, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as p:
            assert p.stdout is not None and p.stdin is not None
            p.stdout.readline()
            (c,) = host.found("in use", role=role)
            assert c["level"] == "fail" and f"{key} {address}:{port}: in use by " in c["text"]
            assert f"(process {p.pid})" in c["text"]
            p.stdin.close()
    assert host.found("in use", role="secondary") == []


def test_an_address_of_another_host(host: Host) -> None:
    (c,) = host.found("addresses", local="10.0.0.77")
    assert (
        c["level"] == "fail" and "[peer] local: 10.0.0.77 is no address of this host" in c["text"]
    )


def test_the_way_to_the_other_host(host: Host) -> None:
    """Nobody listens, somebody does, and what a firewall that drops looks like."""
    (c,) = host.found("other host")
    assert c["level"] == "warn" and "the host answers, no controller listens" in c["text"]
    assert host.found("other host", role="secondary") == [], "a primary does not listen"
    listen = (
        f"import socket; s = socket.create_server(('', {CONTROL})); print('ready', flush=True); "
        "input()"
    )
    cmd = ["nsenter", f"--net=/run/netns/{host.net.other}", sys.executable, "-c", listen]
    with subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        assert p.stdout is not None
        p.stdout.readline()
        assert host.found("other host") == []
        p.communicate(b"\n")
    sh("ip", "-n", host.net.other, "addr", "del", "10.0.0.2/24", "dev", "peer0")
    host.ip("neigh replace 10.0.0.2 lladdr 02:00:00:00:00:09 dev peer0")  # it swallows everything
    (c,) = host.found("other host")
    assert c["level"] == "fail" and "no answer within 3 s" in c["text"]
    assert "firewall" in c["remedy"]


def test_the_route_of_the_migration_gets_quickack(host: Host) -> None:
    (c,) = host.found("migration")
    assert c["fix"] == "ip route replace 10.0.0.2 dev peer0 src 10.0.0.1 quickack 1"
    doc = host.doctor("--fix")
    assert {f["command"]: f["undo"] for f in doc["fixed"]}[c["fix"]] == "ip route del 10.0.0.2"
    assert "quickack 1" in host.ip("route get 10.0.0.2") and (host.tmp / "run").is_dir()
    host.ip("route del 10.0.0.2")
    assert host.ip("route show 10.0.0.0/24"), "what was there before is there still"
    host.ip("route add 10.0.0.2 dev peer0 mtu 1400")
    (c,) = host.found("migration")
    assert c["fix"] is None, "a route that somebody has made would be lost"


def test_before_the_first_start_a_missing_qemu_is_no_failure(host: Host) -> None:
    (c,) = host.found("QEMU")
    assert c["level"] == "fail" and "does not run yet" in c["text"]
    (c,) = host.found("QEMU", "--before-start")
    assert c["level"] == "warn"
    doc = host.doctor("--before-start", "--peer")
    assert doc["peer"] is None and "no controller runs here" in doc["both"][0]["text"]
