# SPDX-License-Identifier: GPL-2.0-or-later
"""Set pairs up with `colo-xdp init` and `join` on two hosts that have their own network only.

Each test continues with what the previous one has left. One guest is started, and no pair:
test_documents.py does that with what is made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.lab import vm as vms
from colo_xdp.lab.net import LabError, wait_for

from .bare import Bare, etc
from .conftest import BUILD
from .pair import CONTROLLER, PAIR, ROLES

MADE = "/exchange/made"
BUNDLES = {"a": f"{MADE}/web1-primary.bundle", "b": f"{MADE}/web1-secondary.bundle"}
HOSTS = ("--hosts", "hosta/hostb", "--addresses", "192.0.2.1/192.0.2.2", "--bundle", MADE)


class Unjoined(Bare):
    """Two hosts, and one command that makes the bundles of web1."""

    def init(self) -> str:
        """Make the bundles of web1 on host a."""
        cpu = "max" if self.accel == "tcg" else "host"
        return self.a.run(
            "colo-xdp", "init", "--pair", PAIR, *HOSTS, "--peer-link", "eth1", "--bridge", "br0",
            "--migration-network", "20-eth2.network", "--mac", vms.MACS[0],
            "--memory", "128", "--accel", self.accel, "--cpu", cpu,
            "--fence-primary", "/usr/local/sbin/off hosta",
            "--fence-secondary", "/usr/local/sbin/off hostb",
        )  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[Unjoined]:
    p = Unjoined(BUILD)
    try:
        p.up()
        yield p
    finally:
        p.down()


def commands(said: str) -> list[str]:
    """Return what `join` tells to run."""
    return [line.strip() for line in said.partition("now run:\n")[2].splitlines()]


@pytest.fixture(scope="module")
def joined(pair: Unjoined) -> dict[str, list[str]]:
    """Make bundles on host a and install them on both; return what is to be run then."""
    pair.init()
    return {h.name: commands(h.run("colo-xdp", "join", BUNDLES[h.name])) for h in pair.hosts}


def test_networkd_makes_what_the_pair_needs(pair: Unjoined, joined: dict[str, list[str]]) -> None:
    for h in pair.hosts:
        first, doctor, start = joined[h.name]
        h.run("sh", "-ec", first)
        other = f"192.0.2.{3 - h.number}"
        # systemd-networkd sets the device up anew: for a moment there is no route at all
        wait_for("the route", lambda h=h, other=other: "quickack 1" in h.run(
            "ip", "route", "get", other, check=False), 20)  # type: ignore[misc]  # fmt: skip
        assert " dev eth2 src 192.0.2." in h.run("ip", "route", "get", other)
        link = h.run("ip", "-details", "link", "show", "tap-web1")
        assert "vnet_hdr on" in link and "persist on" in link and " master " not in link
        assert ",UP" in link, "it is up although nobody has opened it"
        state = h.run("networkctl", "status", "eth1", "tap-web1", "eth2", "--no-pager")
        for name in ("30-colo-xdp.web1.eth1.network", "30-colo-xdp.web1.tap-web1.network",
                     "20-eth2.network"):  # fmt: skip
            assert name in state, state
        assert ",UP" in h.run("ip", "link", "show", "eth1")
        assert doctor.startswith("colo-xdp doctor --before-start /etc/colo-xdp/web1.toml")
        assert start.startswith("systemctl enable --now colo-xdp@web1 colo-qemu")


def test_systemd_and_doctor_accept_the_files(pair: Unjoined, joined: dict[str, list[str]]) -> None:
    for h in pair.hosts:
        units = [f"colo-qemu@{PAIR}.service", f"colo-qemu-incoming@{PAIR}.service", CONTROLLER]
        assert h.run("systemd-analyze", "verify", "--man=no", *units) == ""
        h.run("colo-xdp", "config", "check", "/etc/colo-xdp/web1.toml")
        found = h.run("sh", "-c", joined[h.name][1], check=False).splitlines()
        wrong = [x for x in found if x.startswith("FAIL")]
        # what it has to say is about this machine
        assert all(x.startswith("FAIL  kernel headers") for x in wrong), found
        (qemu,) = (x for x in found if x.startswith("warn  QEMU: it does not run yet"))
        start = "colo-qemu" if h is pair.a else "colo-qemu-incoming"
        assert found[found.index(qemu) + 1].endswith(f"systemctl enable --now {start}@{PAIR}")
        units = [x for x in found if "unit:" in x]
        assert len(units) == 1 and units[0].startswith("ok    unit: /"), units


def test_what_is_there_stays(pair: Unjoined, joined: dict[str, list[str]]) -> None:
    a = pair.a
    before = etc(a)
    assert "are the same" in a.run("colo-xdp", "join", BUNDLES["a"])
    with pytest.raises(LabError, match="for hostb, the secondary host of web1"):
        a.run("colo-xdp", "join", BUNDLES["b"])
    with pytest.raises(LabError, match="there already; --replace keeps them"):
        pair.init()
    assert etc(a) == before


def test_a_second_pair_touches_nothing_of_the_first(
    pair: Unjoined, joined: dict[str, list[str]]
) -> None:
    init = [
        "colo-xdp", "init", "--pair", "web2", *HOSTS, "--bridge", "br0", "--memory", "64",
        "--accel", pair.accel, "--cpu", "max" if pair.accel == "tcg" else "host",
        "--qemu-user", "daemon",
    ]  # fmt: skip
    for h in pair.hosts:
        if h is pair.a:
            h.run(*init, "--peer-link", "eth1", "--base-port", "9840", check=False)
            assert "web2" not in h.run("ls", MADE), "its ports would have been those of web1"
            h.run(*init, "--vxlan", "192.0.2.1/192.0.2.2", "--base-port", "9990")
        before = etc(h)
        h.run("colo-xdp", "join", f"{MADE}/web2-{ROLES[h.name]}.bundle")
        after = etc(h)
        assert {k: after[k] for k in before} == before
        assert {k for k in after if k not in before} and all(
            "web2" in k for k in after if k not in before
        )
        h.run("networkctl", "reload")
        wait_for("its tap", lambda h=h: "tap-web2" in h.run("ip", "-brief", "link"), 20)  # type: ignore[misc]
        assert "quickack 1" in h.run("ip", "route", "get", f"192.0.2.{3 - h.number}")
        assert "ok  " in h.run("sh", "-c", "colo-xdp doctor /etc/colo-xdp/web2.toml || true")


def test_a_pair_whose_qemu_is_no_root_and_whose_peer_link_is_a_vxlan(
    pair: Unjoined, joined: dict[str, list[str]]
) -> None:
    """Its controller reaches the monitor of another user, and makes the device."""
    a = pair.a
    a.run("systemctl", "daemon-reload")
    a.run("systemctl", "start", "colo-xdp@web2", "colo-qemu@web2", timeout=120)
    try:
        link = a.run("ip", "-details", "link", "show", "cx-web2")
        assert "vxlan id" in link and "remote 192.0.2.2" in link and ",UP" in link, link
        wait_for("its monitor", lambda: a.status("web2", "primary")["qemu"]["connected"], 60)
        pid = a.show("colo-qemu@web2", "MainPID")["MainPID"]
        said = Path(f"/proc/{a.pid1}/root/proc/{pid}/status").read_text()
        assert "CapBnd:\t0000000000000000\n" in said and "NoNewPrivs:\t1\n" in said
        assert a.run("ps", "-o", "user=", "-p", pid).strip() == "daemon"
        assert "LOWER_UP" in a.run("ip", "link", "show", "tap-web2"), "it has opened its tap"
    finally:
        a.run("systemctl", "stop", "colo-qemu@web2", "colo-xdp@web2")
    a.run("colo-xdp", "cleanup", "/etc/colo-xdp/web2.toml")
    assert "cx-web2" not in a.run("ip", "-brief", "link")
