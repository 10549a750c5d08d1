# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the data path of a guest with two NICs on real devices: what is of one, what is of both."""

from __future__ import annotations

import os
import random
import select
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.abi import Cfg, Mode, SyncState
from colo_xdp.config.file import Config, as_toml, load
from colo_xdp.config.network import Network
from colo_xdp.datapath import devices, loader
from colo_xdp.datapath.host import HostDataPath
from colo_xdp.datapath.pair_slots import OF_THE_PAIR
from colo_xdp.datapath.prepare import DataPathError, DeviceMissing
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.tools import cleanup
from tests.netns import test_primary_path
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import GUEST_MAC, tcp

PAIR = own("nsq")


def config(tmp: Path, *names: str) -> Config:
    """Return a primary's configuration whose NIC i is at tap<i>."""
    one = test_primary_path.config(tmp, fast_path="off")
    nics = [Network(name=n, tap=f"tap{i}", peer_link=f"peer{i}") for i, n in enumerate(names)]
    path = tmp / "two.toml"
    path.write_text(as_toml(replace(one, pair=PAIR, network=nics[0], further=tuple(nics[1:]))))
    return load(path)


@pytest.fixture
def two(net: Net, tmp_path: Path) -> Iterator[Net]:
    """Provide a host with a second tap and a second peer link."""
    for text in (
        "tuntap add tap1 mode tap vnet_hdr",
        "link set tap1 up",
        f"link add peer1 mtu 1600 type veth peer name peer1 netns {net.other}",
        "link set peer1 up",
    ):
        sh("ip", "-n", net.host, *text.split())
    sh("ip", "-n", net.other, "link", "set", "peer1", "mtu", "1600", "up")
    yield net
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


@pytest.fixture
def host(two: Net, tmp_path: Path) -> Iterator[HostDataPath]:
    dp = HostDataPath.load(config(tmp_path, "lan", "san"))
    yield dp
    if dp.nics[0].reader is not None:
        stop(dp)


def stop(dp: HostDataPath) -> None:
    """End a controller's use of the data path, once."""
    dp.close()
    dp.nics[0].reader = None  # type: ignore[assignment]


def events(dp: HostDataPath, n: int) -> list[CapturedFrame]:
    got: list[CapturedFrame] = []
    end = time.monotonic() + 2
    while len(got) < n and (left := end - time.monotonic()) > 0:
        select.select(dp.fds, [], [], min(left, 0.05))
        dp.drain(got.append)
    return got


def test_a_frame_belongs_to_the_nic_where_it_was_seen(two: Net, host: HostDataPath) -> None:
    guests = [Tap("tap0"), Tap("tap1")]
    links = [Sniffer(two.other, f"peer{i}") for i in range(2)]
    try:
        host.mode, host.epoch = Mode.RUN, 3
        for i, guest in enumerate(guests):
            guest.send(tcp(b"of NIC %d" % i))
        got = sorted(events(host, 2), key=lambda e: e.nic)
        assert [(e.nic, b"of NIC %d" % e.nic in e.frame, e.epoch) for e in got] == [
            (0, True, 3),
            (1, True, 3),
        ]
        # What is released goes out at the NIC of its injector, and nowhere else.
        host.nics[1].injectors["release"].send(got[1].frame)
        with inside(two.host):
            assert host.nics[1].counters()["pvm_out"]["pass_released"][0] == 1
        assert host.nics[0].counters()["pvm_out"]["pass_released"][0] == 0
        assert host.counters()["pvm_out"]["pass_released"][0] == 1
        # A client's frame is mirrored over the link of its own NIC.
        host.nics[1].is_at(GUEST_MAC)
        with inside(two.host):
            out = Sniffer(two.host, "tap1")
            out.s.send(bytes(10) + tcp(b"to the guest", reverse=True))
            out.close()
        assert links[1].wait(lambda f: b"to the guest" in f)
        assert links[0].wait(lambda f: b"to the guest" in f, 0.2) is None
    finally:
        for thing in (*guests, *links):
            thing.close()


def test_what_is_said_of_the_pair_is_said_to_each_nic(host: HostDataPath) -> None:
    host.mode, host.epoch, host.sync_state = Mode.CHECKPOINT, 9, SyncState.IN_SYNC
    host.shadowed, host.order, host.disks_whole = 4, "force", 8
    host.lease_expiry(77)
    for nic in host.nics:
        assert (nic.mode, nic.epoch, nic.sync_state) == (Mode.CHECKPOINT, 9, SyncState.IN_SYNC)
        assert (nic.shadowed, nic.order, nic.disks_whole) == (4, "force", 8)
        assert nic.slot(Cfg.LEASE_EXPIRY_NS) == 77
    assert host.nics[0].slot(Cfg.TAP) != host.nics[1].slot(Cfg.TAP)


class Died(Exception):
    """The controller dies here."""


def test_a_controller_that_dies_between_two_nics(
    host: HostDataPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written last, the next controller finds both NICs in one state: the first's."""
    rnd = random.Random(1)
    other = host.nics[1]
    dp = host
    for _ in range(4):
        steps = [
            (Cfg.MODE, rnd.choice([Mode.DROP, Mode.RUN, Mode.CHECKPOINT])),
            (Cfg.EPOCH, rnd.randrange(20, 99)),
            (Cfg.SYNC_STATE, rnd.choice(list(SyncState))),
            (Cfg.DISKS_WHOLE, rnd.randrange(9)),
            (Cfg.UNDECIDED, rnd.randrange(2)),
        ]
        rnd.shuffle(steps)
        last = rnd.randrange(len(steps))
        other = dp.nics[1]

        def dies(slot: Cfg, value: int) -> None:
            raise Died

        for i, (slot, value) in enumerate(steps[: last + 1]):
            if i == last:
                monkeypatch.setattr(other, "set_slot", dies)
                with pytest.raises(Died):
                    dp.set_slot(slot, value)
                monkeypatch.undo()
            else:
                dp.set_slot(slot, value)
        want = {slot: dp.nics[0].slot(slot) for slot in (*OF_THE_PAIR, Cfg.EPOCH)}
        stop(dp)
        dp = HostDataPath.load(config(tmp_path, "lan", "san"))
        assert dp.adopted
        for nic in dp.nics:
            assert {slot: nic.slot(slot) for slot in want} == want
    dp.close()


@pytest.mark.parametrize("names", [("san", "lan"), ("lan",), ("lan", "dmz")])
def test_the_nics_of_a_pinned_data_path_cannot_change(
    host: HostDataPath, tmp_path: Path, names: tuple[str, ...]
) -> None:
    stop(host)
    with pytest.raises(DataPathError, match=r"has the NICs lan \(tap0\), san \(tap1\)"):
        HostDataPath.load(config(tmp_path, *names))
    again = HostDataPath.load(config(tmp_path, "lan", "san"))
    assert again.adopted, "the refusal has changed nothing"
    again.close()


def test_an_interrupted_cleanup_leaves_nothing_that_counts(
    host: HostDataPath, tmp_path: Path
) -> None:
    """The first NIC's pins go last; if they are gone by hand, those of the others are void."""
    host.mode, host.epoch = Mode.RUN, 12
    stop(host)
    first = Path(loader.pin_dir("/sys/fs/bpf", PAIR, "primary"))
    for path in first.iterdir():
        if not path.is_dir():
            os.unlink(path)
    again = HostDataPath.load(config(tmp_path, "lan", "san"))
    assert not again.adopted and again.mode is Mode.DROP and again.undecided
    assert [nic.epoch for nic in again.nics] == [0, 0]
    again.close()


def test_cleanup_removes_every_nic(host: HostDataPath, two: Net, tmp_path: Path) -> None:
    stop(host)
    gone = cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    assert any("tap0" in line for line in gone) and any("tap1" in line for line in gone)
    assert not Path(loader.pin_dir("/sys/fs/bpf", PAIR, "primary")).exists()
    with inside(two.host):
        assert "colo" not in sh("tc", "filter", "show", "dev", "tap1", "ingress")


def test_what_fails_for_one_nic_is_done_for_the_other(two: Net, tmp_path: Path) -> None:
    for i in range(2):
        sh("ip", "-n", two.host, "link", "add", f"br2{i}", "type", "bridge")
    sh("ip", "-n", two.host, "link", "set", "tap0", "nomaster")
    c = config(tmp_path, "lan", "san")
    c = replace(
        c,
        network=replace(c.network, bridge="br20"),
        further=(replace(c.further[0], bridge="br21"),),
    )
    dp = HostDataPath.load(c)
    try:
        sh("ip", "-n", two.host, "link", "del", "br20")
        with pytest.raises(devices.NoSuchDevice, match="br20"):
            dp.open_network()
        assert devices.link_info("tap1").master == devices.link_info("br21").index
    finally:
        dp.close()


def test_nothing_is_loaded_while_a_device_of_any_nic_is_missing(two: Net, tmp_path: Path) -> None:
    sh("ip", "-n", two.host, "link", "del", "tap1")
    with pytest.raises(DeviceMissing, match="tap1"):
        HostDataPath.load(config(tmp_path, "lan", "san"))
    assert not Path(loader.pin_dir("/sys/fs/bpf", PAIR, "primary")).exists()
