# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the peer link as a VXLAN made by the controller: created once, used, removed by cleanup."""

from __future__ import annotations

from pathlib import Path

import pytest

from colo_xdp.datapath import attach, devices
from colo_xdp.datapath.manifest import Manifest
from tests.netns.conftest import Net, Sniffer, inside, sh
from tests.netns.frames import tcp

HERE, THERE = "192.0.2.1", "192.0.2.2"


@pytest.mark.parametrize(("here", "there"), [(HERE, THERE), ("fd00:2::1", "fd00:2::2")])
def test_made_used_removed(net: Net, tmp_path: Path, here: str, there: str) -> None:
    for ns, address in ((net.host, here), (net.other, there)):
        with inside(ns):
            Path("/proc/sys/net/ipv6/conf/peer0/disable_ipv6").write_text("0")
        bits = ("/64", "nodad") if ":" in address else ("/24",)
        sh("ip", "-n", ns, "addr", "add", address + bits[0], "dev", "peer0", *bits[1:])
    wanted = {net.host: (here, there), net.other: (there, here)}
    for ns, (local, remote) in wanted.items():
        with inside(ns):
            m = Manifest(tmp_path / f"{ns}.attached")
            assert devices.make_vxlan("cxpeer", 77, local, remote, 4789, m)
            # the next controller finds it
            m = Manifest(tmp_path / f"{ns}.attached")
            assert not devices.make_vxlan("cxpeer", 77, local, remote, 4789, m)
            assert devices.link_info("cxpeer").kind == "vxlan"
            for other in ((78, remote, 4789), (77, "192.0.2.9", 4789), (77, remote, 4790)):
                with pytest.raises(devices.DeviceError, match="not the VXLAN"):
                    devices.make_vxlan("cxpeer", other[0], local, other[1], other[2], m)
    frame = tcp(b"over the hosts' network")
    sniffer = Sniffer(net.other, "cxpeer")
    with inside(net.host):
        sender = Sniffer(net.host, "cxpeer")
        sender.s.send(bytes(10) + frame)
        sender.close()
    assert sniffer.wait(lambda f: f == frame)
    sniffer.close()
    for ns in wanted:
        with inside(ns):
            assert attach.detach_all(tmp_path / f"{ns}.attached") == ["device cxpeer"]
            with pytest.raises(devices.NoSuchDevice):
                devices.link_info("cxpeer")


def test_a_foreign_device_is_left_alone(net: Net, tmp_path: Path) -> None:
    m = Manifest(tmp_path / "attached")
    with pytest.raises(devices.DeviceError, match="peer0 exists"):
        devices.make_vxlan("peer0", 77, "", THERE, 4789, m)
    assert attach.detach_all(tmp_path / "attached") == []
    assert devices.link_info("peer0").kind == "veth"
