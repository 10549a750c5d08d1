# SPDX-License-Identifier: GPL-2.0-or-later
"""Doctor and the route of the migration channel: quickack, or the command that sets it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.config.file import Config, load
from colo_xdp.datapath import route
from colo_xdp.tools import doctor
from tests.netns.conftest import Net, inside, sh

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"


def configured(role: str, **uris: str) -> Config:
    c = load(EXAMPLES / f"{role}.toml")
    peer = replace(c.peer, local="10.0.0.1:9846", remote="10.0.0.2:9846")
    return replace(c, qemu=replace(c.qemu, **uris), peer=peer)


def found(c: Config) -> doctor.Check:
    (check,) = doctor._migration_route(doctor.Patient(c))
    return check


@pytest.mark.parametrize(
    ("address", "net_of", "shape"),
    [("10.0.0.2", "10.0.0.1/24", "{}"), ("fd00:2::2", "fd00:2::1/64", "[{}]")],
)
def test_the_command_is_right(net: Net, address: str, net_of: str, shape: str) -> None:
    c = configured("primary", migrate_uri=f"tcp:{shape.format(address)}:9998")
    with inside(net.host):
        Path("/proc/sys/net/ipv6/conf/peer0/disable_ipv6").write_text("0")
        assert list(doctor._migration_route(doctor.Patient(c))) == [], "no route yet"
        nodad = ("nodad",) if ":" in address else ()
        sh("ip", "addr", "add", net_of, "dev", "peer0", *nodad)
        sh("ip", "link", "set", "peer0", "up")
        check = found(c)
        assert check.level == doctor.WARN and "peer0" in check.text and "quickack" in check.text
        command = check.remedy.split(",")[0]
        own = net_of.split("/")[0]
        assert command == f"ip route replace {address} dev peer0 src {own} quickack 1"
        sh(*command.split())
        assert found(c).level == doctor.OK
        end = time.monotonic() + 5  # IPv6 enters its own address a moment after the device is up
        while route.route_to(own) is not None:
            assert time.monotonic() < end, "this host itself"
            time.sleep(0.02)


def test_a_gateway_is_part_of_it(net: Net) -> None:
    c = configured("secondary", reverse_uri="tcp:198.51.100.7:9998")
    with inside(net.host):
        sh("ip", "addr", "add", "10.0.0.1/24", "dev", "peer0")
        sh("ip", "link", "set", "peer0", "up")
        sh("ip", "route", "add", "default", "via", "10.0.0.9")
        command = found(c).remedy.split(",")[0]
        assert command.startswith("ip route replace 198.51.100.7 via 10.0.0.9 dev peer0 src")
        sh(*command.split())
        assert found(c).level == doctor.OK


@pytest.mark.parametrize(
    ("role", "uris", "peer"),
    [
        ("primary", {"migrate_uri": "unix:/m"}, ""),
        ("primary", {"migrate_uri": "tcp:127.0.0.1:4444"}, ""),
        ("primary", {"migrate_uri": "tcp:b.example:4444"}, ""),
        (
            "secondary",
            {"reverse_uri": "tcp:10.0.0.7:1", "migrate_uri": "tcp:10.0.0.2:1"},
            "10.0.0.7",
        ),
        ("secondary", {"reverse_uri": "", "migrate_uri": "tcp:10.0.0.2:1"}, "10.0.0.2"),
        ("secondary", {"reverse_uri": "", "migrate_uri": "unix:/m"}, ""),
    ],
)
def test_where_the_other_qemu_is(role: str, uris: dict[str, str], peer: str) -> None:
    assert doctor.migration_peer(configured(role, **uris)) == peer
