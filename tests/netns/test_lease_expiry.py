# SPDX-License-Identifier: GPL-2.0-or-later
"""Test which guest may transmit, on real devices: tap outside the bridge, fresh start, cleanup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode, SyncState
from colo_xdp.config.file import Config, load
from colo_xdp.datapath import devices
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.prepare import DeviceMissing
from colo_xdp.failover.lease import boot_ns
from colo_xdp.tools import cleanup
from colo_xdp.tools.doctor import Patient, _devices
from colo_xdp.tools.findings import WARN
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import GUEST_MAC, tcp

PAIR = own("nsp")
LEASE = """
        [failover]
        arbiter = "lease"
        etcd = ["http://127.0.0.1:1"]
"""


def config(tmp_path: Path, bridge: str = "br0", more: str = "") -> Config:
    path = tmp_path / "pair.toml"
    path.write_text(
        f"""
        pair = "{PAIR}"
        role = "primary"
        [network]
        tap = "tap0"
        peer_link = "peer0"
        bridge = "{bridge}"
        [qemu]
        qmp = "/nonexistent"
        migrate_uri = "unix:/nonexistent"
        [peer]
        local = "127.0.0.1:1"
        remote = "127.0.0.1:2"
        [datapath]
        run_dir = "{tmp_path}"
        ring_pages = 1024
        fast_path = "off"
        [metrics]
        listen = ""
        {more}
        """
    )
    return load(path)


class Host:
    """A primary's host whose guest sends; `heard`: whether the clients' network receives it."""

    def __init__(self, net: Net, tmp: Path) -> None:
        self.net, self.tmp = net, tmp
        sh("ip", "link", "set", "dev", "tap0", "nomaster")
        self.guest: Tap | None = Tap("tap0")
        self.client = Sniffer(net.client, "c0")
        self.dp: DataPath | None = None

    def start(self, more: str = "", bridge: str = "br0") -> DataPath:
        self.dp = DataPath(config(self.tmp, bridge, more))
        return self.dp

    def stop(self) -> None:
        if self.dp is not None:
            self.dp.close()
            self.dp = None

    def clean(self, *, force: bool = False) -> list[str]:
        return cleanup.cleanup(PAIR, "/sys/fs/bpf", str(self.tmp), force=force)

    @property
    def heard(self) -> bool:
        assert self.guest is not None
        self.guest.send(tcp(b"hello", seq=1000))
        return self.client.wait(lambda f: f[6:12] == GUEST_MAC, 0.5) is not None

    @property
    def in_bridge(self) -> bool:
        return devices.link_info("tap0").master != 0

    def end_guest(self) -> None:
        if self.guest is not None:
            self.guest.close()
            self.guest = None


@pytest.fixture
def host(net: Net, tmp_path: Path) -> Iterator[Host]:
    h = Host(net, tmp_path)
    h.clean(force=True)
    yield h
    h.stop()
    h.end_guest()
    h.client.close()
    h.clean(force=True)


def test_a_start_with_nothing_is_silent_until_it_is_decided(host: Host) -> None:
    dp = host.start()
    assert (dp.mode, dp.undecided, dp.sync_state) == (Mode.DROP, True, SyncState.NONE)
    assert not host.heard and not host.in_bridge
    sh("ip", "link", "set", "dev", "tap0", "master", "br0")  # by hand, as some people do
    assert not host.heard
    sh("ip", "link", "set", "dev", "tap0", "nomaster")
    host.stop()
    dp = host.start()
    assert dp.adopted and dp.undecided, "the next controller knows no more"
    dp.mode, dp.undecided = Mode.BYPASS, False
    dp.open_network()
    assert host.in_bridge and host.heard
    host.stop()
    dp = host.start()
    assert not dp.undecided and dp.mode is Mode.BYPASS and host.heard
    dp.close_network()
    assert not host.in_bridge


def test_a_tap_that_comes_back_is_put_where_its_guest_may_transmit(host: Host) -> None:
    """A tap that was deleted and recreated, or was in another namespace, is in no bridge."""
    dp = host.start()
    assert not dp.look().restored and not host.in_bridge, "nobody has said that it may"
    dp.mode, dp.undecided = Mode.BYPASS, False
    dp.open_network()
    sh("ip", "link", "set", "dev", "tap0", "nomaster")
    assert "tap0 in br0" in dp.look().restored and host.in_bridge and host.heard
    dp.mode = Mode.DROP
    dp.close_network()
    assert not dp.look().restored and not host.in_bridge


def test_a_guest_that_waits_for_a_controller_waits_for_no_device_besides(host: Host) -> None:
    """The next controller continues without an uplink, as the last one did when it was lost."""
    dp = host.start()
    host.stop()
    net = replace(dp.config.network, uplink="up9", bridge="br9")
    dp = host.dp = DataPath(replace(dp.config, network=net))
    assert dp.slot(Cfg.UPLINK) == abi.UPLINK_BRIDGE
    dp.mode, dp.undecided = Mode.BYPASS, False
    assert any("br9 does not exist" in text for text in dp.look().trouble)
    host.stop()
    host.clean(force=True)
    with pytest.raises(DeviceMissing, match="up9"):
        DataPath(replace(dp.config, network=net))


def test_a_lease_decides_in_the_kernel(host: Host) -> None:
    dp = host.start(LEASE)
    dp.open_network()
    assert (dp.mode, dp.undecided) == (Mode.BYPASS, False) and not host.heard
    dp.lease_expiry(boot_ns() + 3600 * 10**9)
    assert host.heard
    dp.lease_expiry(boot_ns())
    assert not host.heard


def test_a_port_that_is_not_ours_stays(host: Host) -> None:
    dp = host.start(bridge="")
    sh("ip", "link", "set", "dev", "tap0", "master", "br0")
    dp.open_network()
    dp.close_network()
    assert host.in_bridge
    host.stop()
    host.end_guest()
    host.clean()
    assert host.in_bridge


SHUT = "kept off the network"


@pytest.mark.parametrize(
    ("mode", "lease_s", "why"),
    [
        (Mode.BYPASS, None, ""),
        (Mode.BYPASS, 3600, ""),
        (Mode.BYPASS, -1, "has no lease"),
        (Mode.RUN, None, "compared with a copy"),
        (Mode.RUN, -1, "compared with a copy"),
        (Mode.CHECKPOINT, None, "compared with a copy"),
        (Mode.DROP, None, SHUT),
    ],
)
def test_cleanup_lets_nobody_transmit_who_must_not(
    host: Host, mode: Mode, lease_s: int | None, why: str
) -> None:
    dp = host.start(LEASE if lease_s is not None else "")
    if lease_s is not None:
        dp.lease_expiry(boot_ns() + lease_s * 10**9)
    dp.mode = mode
    dp.open_network()
    host.stop()
    if not why:
        host.clean()
        assert host.in_bridge and host.heard
        return
    with pytest.raises(cleanup.GuestWouldTransmit, match=why):
        host.clean()
    assert not host.heard, "nothing was taken off"
    assert "tap0 from br0" in host.clean(force=True)
    assert not host.in_bridge and not host.heard


def test_cleanup_after_the_guest_leaves_no_way_for_the_next_one(host: Host) -> None:
    dp = host.start()
    dp.mode = Mode.DROP
    dp.open_network()
    host.stop()
    host.end_guest()
    assert "tap0 from br0" in host.clean()
    host.guest = Tap("tap0")
    assert not host.heard


def test_doctor_warns_of_a_tap_that_is_in_a_bridge_too_early(host: Host) -> None:
    def found() -> list[str]:
        return [c.text for c in _devices(Patient(config(host.tmp))) if c.level >= WARN]

    assert not [t for t in found() if "bridge" in t]
    sh("ip", "link", "set", "dev", "tap0", "master", "br0")
    assert [t for t in found() if "no controller has allowed" in t]
    dp = host.start()
    assert [t for t in found() if "no controller has allowed" in t]
    dp.mode = Mode.RUN
    assert not [t for t in found() if "bridge" in t]


def test_a_frame_of_another_host_is_not_ours(host: Host) -> None:
    """The pins name the device; a device with the same number elsewhere is not ours."""
    dp = host.start()
    dp.mode = Mode.RUN
    index = devices.link_info("tap0").index
    assert devices.tap_in_use(index)
    host.stop()
    with inside(host.net.client):
        assert not devices.tap_in_use(index)
