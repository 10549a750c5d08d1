# SPDX-License-Identifier: GPL-2.0-or-later
"""Test devices and hooks that come and go under a live data path, and two pairs on one host."""

from __future__ import annotations

import ctypes as ct
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode
from colo_xdp.datapath import attach, devices, netlink, syscall
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.fingerprint import Fingerprint
from colo_xdp.datapath.hooks import Look
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import GUEST_MAC, tcp
from tests.netns.test_primary_path import PAIR, config, events
from tests.netns.test_secondary_path import Host

VETH = "link add peer0 mtu 1600 type veth peer name peer0 mtu 1600 netns"


@pytest.fixture
def path(net: Net, tmp_path: Path) -> Iterator[DataPath]:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path))
    dp = DataPath(config(tmp_path, fast_path="off"))
    dp.mode = Mode.RUN
    yield dp
    dp.close()
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path))


def whole(look: Look) -> bool:
    return not (look.trouble or look.restored or look.unseen or look.missed or look.cut)


def make_tap(net: Net, *, bridge: bool = True) -> None:
    sh("ip", "-n", net.host, "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    if bridge:
        sh("ip", "-n", net.host, "link", "set", "dev", "tap0", "master", "br0")
    sh("ip", "-n", net.host, "link", "set", "tap0", "up")


def make_link(net: Net) -> None:
    sh("ip", "-n", net.host, *VETH.split(), net.other)
    for ns in (net.host, net.other):
        sh("ip", "-n", ns, "link", "set", "peer0", "up")


def compared(net: Net, dp: DataPath, guest: Tap) -> bool:
    """Check that the guest's frame comes here and nowhere else, and leaves when it is released."""
    client = Sniffer(net.client, "c0")
    guest.send(tcp(b"is anybody there"))
    got = [e for e in events(dp) if b"anybody" in e.frame]
    early = client.wait(lambda f: b"anybody" in f, 0.1)
    for e in got:
        dp.injectors["release"].send(e.frame, e.gso_size, e.partial)
    out = client.wait(lambda f: b"anybody" in f)
    client.close()
    return bool(got) and early is None and out is not None


def arrives(net: Net, dp: DataPath) -> bool:
    """Return whether what the secondary's guest sends arrives here."""
    frame = tcp(b"the other guest")
    tagged = frame[:12] + struct.pack("!HH", abi.TPID, abi.KIND_SVM << 13 | dp.epoch) + frame[12:]
    before = dp.arrived()
    with inside(net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("peer0", 0))
        s.send(tagged)
    return any(b"other guest" in e.frame for e in events(dp)) and dp.arrived() == before + 1


def test_all_is_there(path: DataPath) -> None:
    assert whole(path.look()) and whole(path.look())


def test_what_has_not_changed_is_not_read_again(
    path: DataPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs 3 ms of CPU time, and is due every few seconds for as long as a pair lives."""
    assert whole(path.look())
    looks: list[tuple[str, ...]] = []
    real = attach.look

    def look(names: Iterable[str]) -> dict[str, attach.Seen | None]:
        looks.append(tuple(names))
        return real(looks[-1])

    monkeypatch.setattr(attach, "look", look)
    assert whole(path.look()) and not looks
    for change in (
        ("tc", "qdisc", "del", "dev", "tap0", "clsact"),
        ("ip", "link", "set", "tap0", "mtu", "1400"),
        ("ip", "link", "set", "tap0", "nomaster"),
    ):
        sh(*change)
        looks.clear()
        path.look()
        assert looks, change
        path.look()
        path.look()
        looks.clear()
        assert whole(path.look()) and not looks, change
    path.mode = Mode.DROP  # decides whether the tap belongs into a bridge
    assert path.look() and looks


def test_a_kernel_that_does_not_answer_is_looked_at_in_full(
    path: DataPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whole(path.look())

    def broken(*_: object) -> bytes:
        raise OSError("no memory")

    monkeypatch.setattr(Fingerprint, "_ask", broken)
    sh("tc", "qdisc", "del", "dev", "tap0", "clsact")
    assert "pvm_out on tap0" in path.look().restored
    assert whole(path.look())


def test_a_tap_made_again_transmits_through_us(net: Net, path: DataPath) -> None:
    sh("ip", "-n", net.host, "link", "del", "tap0")
    gone = path.look()
    assert "tap0 does not exist, the guest is cut off" in gone.trouble[0]
    assert path.slot(Cfg.TAP) == 0 and not gone.restored
    make_tap(net)
    back = path.look()
    assert back.trouble == [] and back.unseen and back.missed
    assert back.restored == ["pvm_out on tap0", "pvm_in on tap0"], "what shuts comes first"
    assert path.slot(Cfg.TAP) == devices.link_info("tap0").index
    assert whole(path.look())
    guest = Tap("tap0")
    assert compared(net, path, guest)
    guest.close()


def test_a_tap_that_was_elsewhere(net: Net, path: DataPath) -> None:
    guest = Tap("tap0")
    sh("ip", "-n", net.host, "link", "set", "tap0", "netns", net.client)
    assert "does not exist" in path.look().trouble[0]
    sh("ip", "-n", net.client, "link", "set", "tap0", "netns", net.host)
    sh("ip", "-n", net.host, "link", "set", "dev", "tap0", "master", "br0")
    sh("ip", "-n", net.host, "link", "set", "tap0", "up")
    assert path.look().unseen
    assert whole(path.look()) and compared(net, path, guest)
    guest.close()


def test_a_peer_link_made_again(net: Net, path: DataPath) -> None:
    sh("ip", "-n", net.host, "link", "del", "peer0")
    gone = path.look()
    assert gone.cut and "peer0 does not exist" in gone.trouble[0]
    make_link(net)
    back = path.look()
    assert back.restored == ["svm_arrival on peer0", "promiscuous mode of peer0"]
    assert back.missed and not back.unseen
    assert not back.cut and path.slot(Cfg.PEER) == devices.link_info("peer0").index
    assert whole(path.look()) and arrives(net, path)
    sh("ip", "-n", net.other, "link", "set", "peer0", "down")
    assert path.look().trouble == [
        "[network] peer_link: peer0 has no carrier, nothing of one guest reaches the other"
    ]
    sh("ip", "-n", net.host, "link", "set", "peer0", "down")
    down = path.look()
    assert down.cut and "peer0 is down, nothing of one guest" in down.trouble[0]


def hears_all(dev: str) -> bool:
    return "PROMISC" in sh("ip", "link", "show", "dev", dev)


def test_the_peer_link_takes_frames_that_are_not_for_its_own_address(
    net: Net, path: DataPath
) -> None:
    """They are for the guest or its clients. A veth passes all frames on; a NIC does not."""
    assert hears_all("peer0")
    sh("ip", "link", "set", "peer0", "promisc", "off")
    back = path.look()
    assert back.restored == ["promiscuous mode of peer0"] and back.missed and not back.unseen
    assert hears_all("peer0") and whole(path.look())


@pytest.mark.parametrize("before", [False, True], ids=["ours", "somebody's"])
def test_cleanup_leaves_the_peer_link_as_it_was(net: Net, tmp_path: Path, before: bool) -> None:
    sh("ip", "link", "set", "peer0", "promisc", "on" if before else "off")
    for _ in range(2):  # the next controller finds it set
        DataPath(config(tmp_path, fast_path="off")).close()
    gone = cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path))
    assert hears_all("peer0") is before
    assert ("promiscuous mode of peer0" in gone) is not before


@pytest.mark.parametrize("dev", ["tap0", "peer0", f"cxr-{PAIR}"])
def test_hooks_taken_off(net: Net, path: DataPath, dev: str) -> None:
    sh("tc", "qdisc", "del", "dev", dev, "clsact")
    assert path.look().restored
    assert whole(path.look())
    guest = Tap("tap0")
    assert compared(net, path, guest) and arrives(net, path)
    guest.close()


def test_the_release_tap_made_again(net: Net, path: DataPath) -> None:
    sh("ip", "link", "del", f"cxr-{PAIR}")
    assert path.look().restored == [f"device cxr-{PAIR} (release)", f"pvm_release on cxr-{PAIR}"]
    guest = Tap("tap0")
    assert compared(net, path, guest)
    guest.close()


def test_another_tools_filter_before_ours(net: Net, path: DataPath) -> None:
    prog = path.objects.programs["pvm_release"]
    with IPRoute() as ipr:
        ipr.tc(
            "add-filter", "bpf", devices.link_info("tap0").index, handle=1, prio=attach.FIRST,
            protocol=attach.ETH_P_ALL, fd=prog.fd, name="theirs", parent=attach.INGRESS,
            classid=1, direct_action=True,
        )  # fmt: skip
    for _ in range(2):
        seen = path.look()
        assert "'theirs'" in seen.trouble[0] and "nobody compares" in seen.trouble[0]
        assert seen.exposed and not seen.unseen and not seen.restored
    sh("tc", "filter", "del", "dev", "tap0", "ingress", "prio", "1")
    assert whole(path.look())


def test_a_tcx_program_of_somebody_else(path: DataPath) -> None:
    """They run before every filter, and no priority shows it."""

    class Attr(ct.Structure):
        _fields_ = [(n, ct.c_uint32) for n in ("ifindex", "fd", "type", "flags", "a", "b")]
        _fields_ += [("revision", ct.c_uint64)]

    prog, index = path.objects.programs["pvm_release"], devices.link_info("tap0").index
    attr = Attr(ifindex=index, fd=prog.fd, type=46)  # BPF_TCX_INGRESS
    try:
        syscall._bpf(8, attr, "prog attach")
    except OSError as e:
        pytest.skip(f"no tcx on this kernel: {e}")
    seen = path.look()
    assert "1 tcx programs of somebody else run before ours" in seen.trouble[0] and seen.exposed
    attr.flags = 0
    syscall._bpf(9, attr, "prog detach")
    assert whole(path.look())


def test_netlink_tells_when_to_look(net: Net, path: DataPath) -> None:
    with netlink.changes() as s:
        with pytest.raises(BlockingIOError):
            s.recv(1)
        s.settimeout(5)
        sh("tc", "qdisc", "del", "dev", "tap0", "clsact")
        assert s.recv(65536)
    assert path.look().restored


# ---- the secondary


@pytest.fixture(params=[True, False], ids=["tc", "xdp"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    h = Host(own("cxd"), tmp_path, request.param)
    h.dp.mode = Mode.RUN
    with inside(h.net.host):
        yield h
    h.close()


def test_the_secondarys_guest_stays_shut_in(host: Host) -> None:
    sh("tc", "qdisc", "del", "dev", "tap0", "clsact")
    if host.dp.hook == "xdp":
        sh("ip", "link", "set", "dev", "tap0", "xdp", "off")
    sh("tc", "qdisc", "del", "dev", "peer0", "clsact")
    back = host.dp.look()
    assert back.restored[0] == "svm_out on tap0" and back.unseen and not back.trouble
    assert ("svm_out_xdp on tap0" in back.restored) == (host.dp.hook == "xdp")
    host.handshake()
    assert whole(host.dp.look())


def test_the_secondarys_devices_made_again(host: Host) -> None:
    if host.vnet:
        host.guest.close()
        sh("ip", "link", "del", "tap0")
        make_tap(host.net, bridge=False)
        host.guest = Tap("tap0")
    host.peer.close()
    sh("ip", "link", "del", "peer0")
    make_link(host.net)
    host.peer = Sniffer(host.net.other, "peer0")
    for name in ("cxd", "cxf"):
        sh("ip", "link", "del", f"{name}-{host.dp.config.pair}")
    assert not host.dp.look().trouble
    assert whole(host.dp.look()) and hears_all("peer0")
    host.handshake()
    assert host.dp.injectors["forward"].send(tcp(b"held"))
    assert host.peer.wait(lambda f: b"held" in f) is not None


def test_a_survivor_on_a_new_tap_is_in_the_bridge(host: Host) -> None:
    host.dp.mode = Mode.TAKEOVER
    host.dp.open_network()
    vnet = ["vnet_hdr"] if host.vnet else []
    host.guest.close()
    sh("ip", "link", "del", "tap0")
    sh("ip", "tuntap", "add", "tap0", "mode", "tap", *vnet)
    sh("ip", "link", "set", "tap0", "up")
    assert "tap0 in br0" in host.dp.look().restored
    host.guest = Tap("tap0", host.vnet)
    client = Sniffer(host.net.client, "c0")
    host.guest.send(tcp(b"I am here"))
    assert client.wait(lambda f: f[6:12] == GUEST_MAC and b"here" in f) is not None
    client.close()


def test_what_has_stepped_out_stays_out(host: Host) -> None:
    host.dp.mode = Mode.TAKEOVER
    host.dp.open_network()
    host.dp.step_out()
    assert whole(host.dp.look())
    assert "svm_out" not in sh("tc", "filter", "show", "dev", "tap0", "ingress")
    host.dp.step_in()
    assert whole(host.dp.look())
