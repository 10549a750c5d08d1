# SPDX-License-Identifier: GPL-2.0-or-later
"""Test which addresses a takeover announces and which frames are mirrored, on real devices."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.controller.secondary import Secondary
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.host import HostDataPath
from colo_xdp.failover.states import State
from colo_xdp.net.address_claims import MAPPED
from colo_xdp.status.builder import active_json
from colo_xdp.tools import cleanup, findings, host_checks, host_facts
from tests.netns import test_primary_path, test_secondary_path
from tests.netns.conftest import Net, Sniffer, Tap, inside, sh
from tests.netns.frames import GUEST_MAC, csum, tcp
from tests.netns.test_secondary_path import Host

OTHER_MAC = bytes.fromhex("020000000077")
VRRP_MAC = bytes.fromhex("00005e000107")
ALL, NODES = b"\xff" * 6, bytes.fromhex("333300000001")


def arp(address: str, mac: bytes = GUEST_MAC, op: int = 1) -> bytes:
    ip = socket.inet_aton(address)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, op) + mac + ip + bytes(6) + ip
    return ALL + mac + b"\x08\x06" + body


def na(address: str, flags: int, mac: bytes = GUEST_MAC) -> bytes:
    """`flags`: R 0x80, S 0x40, O 0x20."""
    ip, nodes = (socket.inet_pton(socket.AF_INET6, a) for a in (address, "ff02::1"))
    body = struct.pack("!BBHI", 136, 0, 0, flags << 24) + ip + b"\2\1" + mac
    check = 0xFFFF & ~csum(body, csum(ip + nodes + struct.pack("!II", len(body), 58)))
    body = body[:2] + struct.pack("!H", check) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255)
    return NODES + mac + b"\x86\xdd" + head + ip + nodes + body


def until(true: Callable[[], object], what: str, timeout: float = 5) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, what


# ---- the primary: what is mirrored


@pytest.fixture
def primary(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Net, DataPath, Tap]]:
    monkeypatch.setattr(test_primary_path, "PAIR", f"nsb{os.getpid() % 100000}")
    cleanup.cleanup(test_primary_path.PAIR, "/sys/fs/bpf", str(tmp_path))
    dp = DataPath(test_primary_path.config(tmp_path))
    guest = Tap("tap0")
    try:
        yield net, dp, guest
    finally:
        guest.close()
        dp.close()
        cleanup.cleanup(test_primary_path.PAIR, "/sys/fs/bpf", str(tmp_path))


def test_what_the_bridge_has_flooded_stays_here(primary: tuple[Net, DataPath, Tap]) -> None:
    net, dp, guest = primary
    peer = Sniffer(net.other, "peer0")
    dp.mode = Mode.RUN
    dp.is_at(GUEST_MAC)

    def sent(dst: bytes, mark: bytes) -> bool:
        """Return whether a client's frame is mirrored; the PVM receives it either way."""
        test_primary_path.from_client(net, dst + tcp(mark, reverse=True)[6:])
        assert guest.recv(lambda f: mark in f)
        test_primary_path.from_client(net, ALL + tcp(mark + b" last", reverse=True)[6:])
        seen = []
        for _, f in peer.frames(5):
            seen.append(mark + b" last" not in f and mark in f)
            if mark + b" last" in f:
                return any(seen)
        raise AssertionError("a broadcast frame was not mirrored")

    assert sent(GUEST_MAC, b"guest")
    assert not sent(OTHER_MAC, b"flooded")
    assert dp.counters()["pvm_in"]["pass_other_mac"][0] == 1
    # A virtual router, or a machine behind the guest: it belongs to the guest once it has sent.
    guest.send(arp("10.9.0.100", VRRP_MAC))
    until(lambda: dp.addresses.macs(None) == [VRRP_MAC], "its MAC is not known")
    fdb = ("bridge", "-n", net.host, "fdb", "del", VRRP_MAC.hex(":"), "dev", "tap0", "master")
    with contextlib.suppress(RuntimeError):  # flooded: the bridge need not have learned it
        sh(*fdb)
    assert sent(VRRP_MAC, b"virtual")
    # The router's next master transmits: it no longer belongs to the guest.
    test_primary_path.from_client(net, arp("10.9.0.100", VRRP_MAC))
    until(lambda: not dp.addresses.macs(None), "the virtual MAC has moved")
    peer.close()


def test_a_guest_whose_card_nobody_knows(primary: tuple[Net, DataPath, Tap]) -> None:
    """Everything is mirrored until the guest has sent, so that no frame for it is missed."""
    net, dp, guest = primary
    peer = Sniffer(net.other, "peer0")
    dp.mode = Mode.RUN
    dp.watch_guest()
    for mark, dst in ((b"first", GUEST_MAC), (b"flooded", OTHER_MAC)):
        test_primary_path.from_client(net, dst + tcp(mark, reverse=True)[6:])
        assert peer.wait(lambda f, m=mark: m in f)  # type: ignore[misc]
    guest.send(tcp(b"here I am"))
    until(lambda: dp.addresses.macs(None) == [GUEST_MAC], "its MAC is not known")
    dp.watch_guest()
    assert dp.slot(abi.Cfg.GUEST_MAC) == abi.MAC_KNOWN
    test_primary_path.from_client(net, OTHER_MAC + tcp(b"elsewhere", reverse=True)[6:])
    assert guest.recv(lambda f: b"elsewhere" in f)
    assert dp.counters()["pvm_in"]["pass_other_mac"][0] == 1
    peer.close()


# ---- the secondary: what is announced


class FakeQmp:
    """Stand in for the QMP of a QEMU that reports which card is attached to the tap."""

    name, connected = "SVM", True

    async def guest_macs(self, tap: str) -> list[str]:
        return [GUEST_MAC.hex(":")]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(test_secondary_path, "PAIR", f"nsa{os.getpid() % 100000}")
    h = Host(f"cxa{os.getpid() % 100000}", tmp_path, True)
    h.dp.mode, h.dp.epoch = Mode.RUN, 5
    try:
        yield h
    finally:
        h.close()


def controller(h: Host) -> Secondary:
    config = test_secondary_path.config(h.tmp)
    c = Secondary(config, HostDataPath(config, (h.dp,)))
    c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
    c.state, c.reason = State.PROMOTED, "the test says so"
    return c


def mirror(h: Host, frame: bytes) -> None:
    with inside(h.net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("peer0", 0))
        s.send(frame[:12] + struct.pack("!HH", abi.TPID, 1 << 13 | 5) + frame[12:])


def counted(h: Host, prog: str) -> int:
    return sum(n for n, _ in h.dp.counters()[prog].values())


def says(h: Host, *frames: bytes) -> None:
    before = counted(h, "svm_out")
    for f in frames:
        h.guest.send(f)
    until(lambda: counted(h, "svm_out") >= before + len(frames), "the guest's frames did not come")


def hears(h: Host, frame: bytes) -> None:
    before = counted(h, "svm_in")
    mirror(h, frame)
    until(lambda: counted(h, "svm_in") > before, "the mirrored frame did not come")


def take_over(h: Host) -> set[tuple[str, str]]:
    """Return (address, MAC, R flag if set) of each announcement a client sees; RARP: ("", MAC)."""
    client = Sniffer(h.net.client, "c0")
    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
        h.dp.look_at_port()
        asyncio.run(controller(h).takeover.announce())
    found = set()
    for _, f in client.frames(0.2):
        mac, kind = f[6:12].hex(":"), f[12:14]
        if kind == b"\x80\x35":
            found.add(("", f[22:28].hex(":")))
        elif kind == b"\x08\x06":
            assert f[22:28] == f[6:12]
            found.add((socket.inet_ntoa(f[28:32]), mac))
        elif kind == b"\x86\xdd" and f[54] == 136:
            target = str(ipaddress.ip_address(f[62:78]))
            found.add((target, f"{mac} R{f[58] >> 7}"))
    client.close()
    return found


def test_what_a_stranger_says_is_not_the_guests(host: Host) -> None:
    """A SYN for the gateway that reached the guest's tap, and the guest as a router for it."""
    h, me = host, GUEST_MAC.hex(":")
    syn = tcp(seq=9, ack=0, flags=2, reverse=True)
    h.mirrored(GUEST_MAC + syn[6:])  # to 10.9.0.2: makes a connection, and no address
    says(
        h,
        tcp(seq=1, ack=10, flags=0x12),
        arp("10.9.0.254", OTHER_MAC)[:6] + GUEST_MAC + arp("10.9.0.254", OTHER_MAC)[12:],
    )
    assert take_over(h) == {("", me)}, "nothing but the MAC is certain"


def test_the_guests_own_addresses_with_its_own_macs(host: Host) -> None:
    h, me, virtual = host, GUEST_MAC.hex(":"), VRRP_MAC.hex(":")
    says(h, arp("10.9.0.2"), arp("10.9.0.100", VRRP_MAC), na("fe80::2", 0xA0), na("fd09::2", 0x20))
    assert take_over(h) == {
        ("", me),
        ("", virtual),
        ("10.9.0.2", me),
        ("10.9.0.100", virtual),
        ("fe80::2", f"{me} R1"),  # a router stays one
        ("fd09::2", f"{me} R0"),
    }


def test_an_address_that_has_moved_is_not_taken_back(host: Host) -> None:
    h, me = host, GUEST_MAC.hex(":")
    says(h, arp("10.9.0.2"), arp("10.9.0.100"), arp("10.9.0.101", VRRP_MAC), na("fd09::9", 0x20))
    for gone in (
        arp("10.9.0.100", OTHER_MAC),
        arp("10.9.0.101", VRRP_MAC),
        na("fd09::9", 0x20, OTHER_MAC),
    ):
        hears(h, gone)
    assert take_over(h) == {("", me), ("10.9.0.2", me)}
    assert h.dp.counters()["addresses"]["note_address_moved"][0] == 3
    assert h.dp.counters()["addresses"]["note_mac_moved"][0] == 1


def test_what_a_state_said_that_is_gone_does_not_count(host: Host) -> None:
    """The SVM had missed its master's advertisements; the PVM, whose copy it now is, had not."""
    h, me = host, GUEST_MAC.hex(":")
    says(h, arp("10.9.0.100"), arp("10.9.0.2"))
    told = abi.ADDRESS.pack(MAPPED + socket.inet_aton("10.9.0.3"), 0) + GUEST_MAC + b"\0"
    with inside(h.net.host):
        c = controller(h)
        c.on_message({"type": "claims", "n": 6, "nic": 0, "addresses": told.hex(), "macs": ""})
    h.dp.epoch = 6
    says(h, arp("10.9.0.2"))
    assert take_over(h) == {("", me), ("10.9.0.2", me), ("10.9.0.3", me)}


def test_the_next_controller_knows_them(host: Host) -> None:
    h, me = host, GUEST_MAC.hex(":")
    says(h, arp("10.9.0.2"))
    h.dp.close()
    with inside(h.net.host):
        h.dp = DataPath(test_secondary_path.config(h.tmp))
    assert take_over(h) == {("", me), ("10.9.0.2", me)}
    with inside(h.net.host):
        h.dp.step_out()
        assert h.dp.addresses.own(GUEST_MAC, None) == [], "nobody would see it move"


# ---- a bridge with STP


def test_announced_again_when_the_bridge_forwards(host: Host) -> None:
    h = host
    bridge = ("ip", "-n", h.net.host, "link", "set", "br0", "type", "bridge")
    sh(*bridge, "stp_state", "1", "forward_delay", "200", "hello_time", "100", "max_age", "600")
    says(h, arp("10.9.0.2"))
    (found,) = examined(h)
    assert found.level == findings.FAIL
    assert "STP on: after a takeover the guest is cut off for 4 s" in found.text
    client = Sniffer(h.net.client, "c0")
    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
        h.dp.look_at_port()
        c = controller(h)
        assert [f.level for f in examined(h)] == [findings.FAIL, findings.FAIL], (
            "and it listens now"
        )
        assert h.dp.port_state == "listening" and not h.dp.port_forwarding
        assert active_json(c)["transmitting"] is False

        async def body() -> set[str]:
            task, reasons = asyncio.create_task(c.takeover.announce()), set()
            while not task.done():
                reasons.add(c.reason)
                await asyncio.sleep(0.05)
            await task
            return reasons

        reasons = asyncio.run(asyncio.wait_for(body(), 30))
        assert any("tap0 is listening in br0" in r for r in reasons)
        assert c.reason == "the test says so" and active_json(c)["transmitting"] is True
    assert client.wait(lambda f: f[12:14] == b"\x08\x06" and f[22:32] == arp("10.9.0.2")[22:32])
    sh(*bridge, "stp_state", "0")
    assert [f.level for f in examined(h)] == [findings.OK]
    client.close()


def test_a_guest_whose_tap_is_down_or_gone_is_not_active(host: Host) -> None:
    """Where nothing of it leaves, status, metrics and /primary say so."""
    h = host

    def active() -> bool:
        with inside(h.net.host):
            h.dp.look()
        return bool(active_json(c)["transmitting"])

    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
        c = controller(h)
        assert active()
        sh("ip", "link", "set", "tap0", "down")
        assert "tap0 is down, the guest is cut off" in h.dp.look().trouble[0]
        assert not active()
        sh("ip", "link", "set", "tap0", "up")
        assert active()
        sh("ip", "link", "del", "tap0")
        assert not active()


def examined(h: Host) -> list[findings.Check]:
    with inside(h.net.host):
        facts = host_facts.gather(test_secondary_path.config(h.tmp))[0]
        net = replace(test_secondary_path.config(h.tmp).network, bridge="br0")
        facts = replace(facts, bridge=host_facts.bridge_facts("br0"))
        at = host_facts.Standing("secondary", allowed=bool(facts.master))
        return [c for c in host_checks.nic(net, facts, at) if c.key == "bridge"]
