# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the egress past the bridge: learned as the bridge learns, unused where it is wrong."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyroute2.nftables.main import NFTables

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath import bridge, devices, netlink, rule_changes
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.net.packet import parse
from colo_xdp.offload.kernel_format import OffloadRequest, OffloadResult
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Sniffer, Tap, inside, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC, tcp
from tests.netns.test_primary_path import PAIR, config


@pytest.fixture
def path(net: Net, tmp_path: Path) -> Iterator[DataPath]:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path, fast_path_memory=16))
    dp.epoch, dp.mode = 1, Mode.RUN
    yield dp
    dp.close()
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


class Pair:
    """A connection in the fast path whose SVM is always late, so each frame needs an egress."""

    def __init__(self, net: Net, dp: DataPath) -> None:
        self.dp, self.at = dp, 1000
        self.tap, self.sniffer = Tap("tap0"), Sniffer(net.client, "c0")
        with inside(net.other):
            self.peer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.peer.bind(("peer0", 0))
        with inside(net.client):
            self.client = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.client.bind(("c0", 0))
        words = abi.OFFLOAD.pack(
            1, 1000, 5000, 5000, 5000, 4096, 4096, 4096, 1448, 1000, 1000, *[0] * 5, b"", b""
        )
        assert dp.fast is not None
        key = parse(tcp(b"")).key
        assert (
            dp.fast.offer(key)
            and dp.fast.offload(key, OffloadRequest(words, b""), 0) is OffloadResult.ACCEPTED
        )

    def close(self) -> None:
        self.tap.close()
        self.sniffer.close()
        self.peer.close()
        self.client.close()

    def client_sends(self) -> None:
        """Send a frame to the guest through the bridge."""
        self.client.send(GUEST_MAC + CLIENT_MAC + b"\x88\xb5" + bytes(46))
        assert self.tap.recv(lambda f: f[12:14] == b"\x88\xb5") is not None

    def direct(self) -> bool:
        """Return whether the next frame bypasses the bridge; it must leave in either case."""
        before = self.dp.counters()["pvm_out"]["pass_released"][0]
        data = b"%06d" % self.at
        frame = tcp(data, seq=self.at)
        self.at += len(data)
        self.dp.beat()
        self.tap.send(frame)
        tci = abi.KIND_SVM << abi.KIND_SHIFT | 1
        self.peer.send(frame[:12] + struct.pack("!HH", abi.TPID, tci) + frame[12:])
        assert self.sniffer.wait(lambda f: f[-len(data) :] == data) is not None
        return self.dp.counters()["pvm_out"]["pass_released"][0] == before


@pytest.fixture
def pair(net: Net, path: DataPath) -> Iterator[Pair]:
    p = Pair(net, path)
    path.watch_bridge()
    yield p
    p.close()


def test_a_client_that_was_heard_is_answered_past_the_bridge(pair: Pair) -> None:
    assert not pair.direct(), "nothing was heard of it yet"
    pair.client_sends()
    assert pair.direct()


def until(what: Callable[[], bool], seconds: float = 3.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not within its deadline"
        time.sleep(0.02)


def test_a_client_that_is_silent_is_answered_through_the_bridge(pair: Pair) -> None:
    pair.client_sends()
    assert pair.direct()
    until(lambda: not pair.direct())


def test_nothing_leaves_past_the_bridge_without_a_controller(pair: Pair) -> None:
    pair.client_sends()
    assert pair.direct()
    beat, pair.dp.beat = pair.dp.beat, lambda: None  # type: ignore[method-assign]
    pair.dp.set_slot(abi.Cfg.LOSS_NS, 1)
    pair.client_sends()
    assert not pair.direct()
    pair.dp.set_slot(abi.Cfg.LOSS_NS, 10**9)
    beat()
    assert pair.direct()


@pytest.mark.parametrize("what", ["iptables", "nftables", "left", "other bridge"])
def test_a_bridge_that_filters_is_not_passed_by(net: Net, pair: Pair, what: str) -> None:
    pair.client_sends()
    assert pair.direct()
    if what in ("iptables", "nftables"):  # family ip with the sysctl's default, or bridge
        sh("ip", "link", "set", "br0", "type", "bridge", "nf_call_iptables", "1")
        with NFTables(nfgen_family=2 if what == "iptables" else 7) as nft:
            nft.table("add", name="filter")
    elif what == "left":
        sh("ip", "link", "set", "uplink", "nomaster")
        sh("ip", "link", "set", "uplink", "master", "br0")
        pair.dp._ports = frozenset()  # as a check in between would have found
        pair.dp.watch_bridge()
        assert not pair.direct(), "what was learned before counts no more"
        return
    else:
        sh("ip", "link", "set", "tap0", "nomaster")
        pair.dp.watch_bridge()
        assert not list(pair.dp.objects.map("clients").keys())
        return
    pair.dp.watch_bridge()
    pair.client_sends()
    assert not pair.direct()


CLIENT = CLIENT_MAC.hex(":")


@pytest.mark.parametrize(
    "rule",
    [
        "bridge link set dev uplink learning off",
        "bridge link set dev uplink locked on",
        "bridge link set dev uplink isolated on",
        "bridge link set dev uplink neigh_suppress on",
        "bridge link set dev tap0 locked on learning on",
        "bridge link set dev tap0 isolated on",
        "ip link set br0 type bridge ageing_time 0",
        f"bridge fdb replace {CLIENT} dev other0 master static",
        f"bridge fdb replace {CLIENT} dev other0 master static sticky",
        f"bridge fdb replace {CLIENT} dev other0 master extern_learn",
        f"bridge fdb replace {CLIENT} dev other0 master permanent",
        f"bridge fdb replace {CLIENT} dev br0 self",
    ],
)
def test_what_a_person_has_set_for_a_port_or_an_address_is_kept(
    net: Net, pair: Pair, rule: str
) -> None:
    sh(*["ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1"])
    sh(*["ip", "link", "set", "other0", "master", "br0", "up"])
    pair.dp.watch_bridge()
    pair.client_sends()
    assert pair.direct()
    sh(*rule.split())
    pair.dp._fdb_set = 0.0  # the next check of the addresses is due
    pair.dp.watch_bridge()
    ports = {int.from_bytes(k, sys.byteorder) for k, _ in pair.dp.objects.map("ports").items()}
    assert socket.if_nametoindex("uplink") not in ports
    assert not list(pair.dp.objects.map("clients").keys()), "what was heard counts no more"


def test_an_address_by_hand_at_the_clients_own_port_is_in_no_ones_way(net: Net, pair: Pair) -> None:
    sh("bridge", "fdb", "replace", CLIENT, "dev", "uplink", "master", "static")
    pair.dp._fdb_set = 0.0
    pair.dp.watch_bridge()
    pair.client_sends()
    assert pair.direct()


def test_ebtables_are_not_passed_by(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a kernel that has them as modules; this one need not."""
    pair.client_sends()
    assert pair.direct()
    module = tmp_path / "ebtable_filter"
    monkeypatch.setattr(bridge, "EBTABLES", (module,))
    pair.dp.watch_bridge()
    pair.client_sends()
    assert pair.direct()
    module.mkdir()
    pair.dp.watch_bridge()
    pair.client_sends()
    assert not pair.direct()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Provide a list that grows with each look at the ports."""
    found: list[str] = []
    plain_ports = bridge.plain_ports

    def counted(tap: str) -> frozenset[int]:
        found.append(tap)
        return plain_ports(tap)

    monkeypatch.setattr(bridge, "plain_ports", counted)
    return found


@pytest.mark.parametrize(
    "change",
    [
        "ip link add other0 type veth peer name other1",
        "ip link set uplink nomaster",
        "bridge link set dev uplink learning off",
        "ip link set br0 type bridge ageing_time 50000",
        "table bridge colo",
        "table ip colo",
        "the time",
    ],
)
def test_the_ports_are_looked_at_when_something_changes_and_else_hardly_ever(
    pair: Pair, looks: list[str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        pair.dp.watch_bridge()
        pair.client_sends()
    assert not looks
    if change == "the time":
        later = time.monotonic() + rule_changes.LOOK_S
        monkeypatch.setattr(time, "monotonic", lambda: later)
    elif change.startswith("table"):
        _, family, name = change.split()
        with NFTables(nfgen_family={"bridge": 7, "ip": 2}[family]) as nft:
            nft.table("add", name=name)
    else:
        sh(*change.split())
    for _ in range(5):
        pair.dp.watch_bridge()
    assert len(looks) == 1


def test_what_cannot_be_watched_is_looked_at_each_time(
    pair: Pair, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: rule_changes.RuleChanges) -> bool:
        raise OSError(errno.EMFILE, "too many files")

    monkeypatch.setattr(rule_changes.RuleChanges, "_events", full)
    for _ in range(3):
        pair.dp.watch_bridge()
    assert len(looks) == 3


class Tables:
    """A kernel that answers the query for nftables' tables with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, nfgen_family: int) -> Tables:
        return self

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_tables(self) -> list[object]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        (netlink.NetlinkError(errno.EINVAL), True),  # of nfnetlink: it has no such subsystem
        (OSError(errno.EPROTONOSUPPORT, "no nfnetlink"), True),
        (netlink.NetlinkError(errno.EPERM), False),
        (netlink.NetlinkError(errno.EINTR), False),
        (OSError(errno.ENOBUFS, "no memory"), False),
        (OSError(errno.EMFILE, "too many files"), False),
    ],
)
def test_rules_that_cannot_be_read_are_taken_for_rules(
    net: Net, error: Exception, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bridge.plain_ports("tap0")
    monkeypatch.setattr(netlink, "NFTables", Tables(error))
    assert bool(bridge.plain_ports("tap0")) == plain


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("plain_ports", netlink.NetlinkError(errno.EBUSY)),
        ("plain_ports", OSError(errno.ENOBUFS, "no memory")),
        ("refresh_fdb", devices.NoSuchDevice("network device tap0 does not exist")),
    ],
)
def test_a_bridge_that_cannot_be_looked_at_is_not_passed_by(
    pair: Pair, where: str, error: Exception,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(_: str) -> frozenset[int]:
        raise error

    pair.client_sends()
    assert pair.direct()
    with monkeypatch.context() as mp:
        mp.setattr(bridge, where, fails)
        for _ in range(3):
            pair.dp._fdb_set = 0.0
            pair.dp._rule_changes.again()
            pair.dp.watch_bridge()
        pair.client_sends()
        assert not pair.direct()
    assert len([r for r in caplog.records if "bridge of tap0" in r.message]) == 1
    pair.dp.watch_bridge()
    pair.client_sends()
    assert pair.direct(), "and again as soon as it can be"


def test_a_client_that_comes_by_another_way_is_not_taken_for_a_neighbour(
    net: Net, pair: Pair
) -> None:
    """Its frames come from the host's own stack and therefore have no port of the bridge."""
    pair.client_sends()
    assert pair.direct()
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # in the host's namespace
    s.bind(("br0", 0))
    s.send(GUEST_MAC + CLIENT_MAC + b"\x88\xb5" + bytes(46))
    s.close()
    assert pair.tap.recv(lambda f: f[12:14] == b"\x88\xb5") is not None
    assert not pair.direct()


def test_the_bridge_does_not_forget_the_guest(net: Net, pair: Pair) -> None:
    def age() -> float:
        out = subprocess.run(
            ["bridge", "-s", "fdb", "show", "dev", "tap0"], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
        line = next(x for x in out.splitlines() if GUEST_MAC.hex(":") in x and "used" in x)
        return float(line.split("used ")[1].split("/")[1].split()[0])

    pair.tap.send(CLIENT_MAC + GUEST_MAC + b"\x88\xb5" + bytes(46))  # in no connection
    pair.dp.mode = Mode.BYPASS
    pair.tap.send(CLIENT_MAC + GUEST_MAC + b"\x88\xb5" + bytes(46))
    until(lambda: age() >= 1)
    bridge.refresh_fdb("tap0")
    assert age() < 1
