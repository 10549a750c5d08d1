# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that two Linux kernels do not use MPTCP with each other while there are two guests.

The sockets on either end are real ones, IPPROTO_MPTCP (RFC 8684), with the primary's data path
between them.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.net.packet import ACK, SYN, Kind, parse
from tests.netns.conftest import Net, Sniffer, Tap, inside, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC, checksum_fits
from tests.netns.stack import Stack
from tests.netns.test_primary_path import count, guest, path

__all__ = ["guest", "path"]  # fixtures

TCP_IS_MPTCP = 43  # linux/tcp.h, since 5.16
CAPABLE, DSS = 0, 2  # subtypes of option 30
TAG = struct.pack("!H", abi.TPID)


def mptcp_options(frame: bytes) -> list[int]:
    """Return the subtypes of a TCP frame's MPTCP options."""
    p, found = parse(frame), []
    options = frame[p.l4 + 20 : p.off] if p.kind is Kind.TCP else b""
    while options and options[0]:
        size = 1 if options[0] == 1 else options[1]
        if options[0] == 30:
            found.append(options[2] >> 4)
        options = options[size:]
    return found


def ports(frame: bytes) -> tuple[int, ...]:
    return struct.unpack_from("!HH", frame, parse(frame).l4)


class Guest(Stack):
    """What passed its tap: (frame, whether it went to the guest)."""

    def __init__(self, tap: Tap, v6: bool) -> None:
        self.passed: list[tuple[bytes, bool]] = []
        self.wrong_sums: list[bytes] = []
        super().__init__(tap, v6)

    def seen(self, frame: bytes, to_guest: bool) -> None:
        head, frame = frame[:10], frame[10:]
        p = parse(frame)
        if p.kind is Kind.TCP:
            self.passed.append((frame, to_guest))
            if not checksum_fits(frame, p.l4, bool(head[0] & 1)):
                self.wrong_sums.append(frame)

    def transmitted(self, port: int, to_guest: bool) -> set[int]:
        """Return the subtypes of all MPTCP options of a connection in one direction."""
        frames = [f for f, way in list(self.passed) if way == to_guest and port in ports(f)]
        assert frames
        return {x for f in frames for x in mptcp_options(f)}


class Lab:
    """A client that is a Linux kernel, too, and a controller that releases everything."""

    def __init__(self, net: Net, dp: DataPath, tap: Tap, v6: bool, offloads: bool) -> None:
        self.net, self.dp, self.v6 = net, dp, v6
        self.family = socket.AF_INET6 if v6 else socket.AF_INET
        self.guest = Guest(tap, v6)
        self.address = f"{self.guest.net}1"
        ip = ("ip", "-n", net.client)
        if v6:
            with inside(net.client):
                Path("/proc/sys/net/ipv6/conf/c0/disable_ipv6").write_text("0")
        sh(*ip, "link", "set", "c0", "address", CLIENT_MAC.hex(":"))
        sh(*ip, "addr", "add", f"{self.address}/{64 if v6 else 24}", "dev", "c0",
           *(["nodad"] if v6 else []))  # fmt: skip
        sh(*ip, "neigh", "add", self.guest.address, "lladdr", GUEST_MAC.hex(":"), "dev", "c0")
        if not offloads:
            sh("ip", "netns", "exec", net.client, "ethtool", "-K", "c0", "tx", "off")
        self.network = Sniffer(net.host, "uplink")  # what the client sends
        self.beyond = Sniffer(net.client, "c0")  # what the guest sends, at the client
        self.mirror = Sniffer(net.other, "peer0")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._release, daemon=True)
        self.thread.start()

    def _release(self) -> None:
        def let_go(e: CapturedFrame) -> None:
            self.dp.injectors["release"].send(e.frame, e.gso_size, e.partial, e.gso_type)

        while not self.stop.is_set():
            self.dp.beat()
            select.select(self.dp.reader.fds, [], [], 0.05)
            self.dp.drain(let_go)

    def ends(self, of_guest: bool) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return (namespace, address) of the end that opens and of the end that listens."""
        ends = ((self.net.client, self.address), (self.guest.ns, self.guest.address))
        return ends[::-1] if of_guest else ends

    @contextlib.contextmanager
    def connection(self, of_guest: bool, port: int) -> Iterator[tuple[socket.socket, ...]]:
        """Open a connection, from the guest or the client, with MPTCP sockets on either side."""
        (near, _), (far, address) = self.ends(of_guest)
        with contextlib.ExitStack() as all_:
            made = []
            for ns in (far, near):
                with inside(ns):
                    s = socket.socket(self.family, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
                made.append(all_.enter_context(s))
                s.settimeout(20)
            made[0].bind((address, port))
            made[0].listen()
            made[1].connect((address, port))
            accepted = all_.enter_context(made[0].accept()[0])
            accepted.settimeout(20)
            yield made[1], accepted

    def close(self) -> None:
        self.stop.set()
        self.thread.join(5)
        self.guest.close()
        for s in (self.network, self.beyond, self.mirror):
            s.close()


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def v6(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[True, False], ids=["offloads", "plain"])
def lab(
    net: Net, path: DataPath, guest: Tap, v6: bool, request: pytest.FixtureRequest
) -> Iterator[Lab]:
    made = Lab(net, path, guest, v6, request.param)
    yield made
    made.close()


def use_mptcp(ends: tuple[socket.socket, ...]) -> list[bool]:
    return [bool(s.getsockopt(socket.IPPROTO_TCP, TCP_IS_MPTCP)) for s in ends]


def carries(one: socket.socket, other: socket.socket) -> None:
    """Send 200 KB in one direction, and as much back."""
    for a, b in ((one, other), (other, one)):
        data, got = random.Random(5).randbytes(200_000), bytearray()
        sender = threading.Thread(target=a.sendall, args=(data,), daemon=True)
        sender.start()
        while len(got) < len(data) and (piece := b.recv(65536)):
            got += piece
        sender.join(10)
        assert bytes(got) == data


def opens(sniffer: Sniffer, port: int, flags: int) -> bytes:
    """Return the first frame of a connection with these SYN and ACK flags."""

    def fits(frame: bytes) -> bool:
        p = parse(frame)
        return p.kind is Kind.TCP and port in ports(frame) and p.flags & (SYN | ACK) == flags

    got = sniffer.wait(fits)
    assert got is not None
    return got[1]


@pytest.mark.parametrize("of_guest", [False, True], ids=["client", "guest"])
def test_two_kernels_fall_back_to_plain_tcp(lab: Lab, of_guest: bool) -> None:
    g, dp = lab.guest, lab.dp
    dp.mode = Mode.BYPASS
    alone, protected = 80, 81
    with lab.connection(of_guest, alone) as ends:
        assert use_mptcp(ends) == [True, True], "else this test says nothing"
        assert count(dp, "pvm_in", "note_mptcp_removed") == 0
        # It continues under protection: both guests have its keys.
        dp.mode = Mode.RUN
        carries(*ends)
        assert use_mptcp(ends) == [True, True]
        assert DSS in g.transmitted(alone, True) and DSS in g.transmitted(alone, False)

    with lab.connection(of_guest, protected) as ends:
        carries(*ends)
        assert use_mptcp(ends) == [False, False]
    offered = opens(lab.beyond if of_guest else lab.network, protected, SYN)
    assert mptcp_options(offered) == [CAPABLE]
    if of_guest:
        assert mptcp_options(opens(lab.network, protected, SYN | ACK)) == [CAPABLE]
        first = next(f for f, _ in g.passed if protected in ports(f))
        assert offered == first, "what the guest says is left as it was"
    assert g.transmitted(protected, True) == set()
    assert g.transmitted(protected, False) == ({CAPABLE} if of_guest else set())
    assert count(dp, "pvm_in", "note_mptcp_removed") > 0

    def mirrored() -> list[bytes]:
        tagged = lab.mirror.frames(0.3)
        return [f[:12] + f[16:] for _, f in tagged if f[12:14] == TAG and f[6:12] == CLIENT_MAC]

    copies = [f for f in mirrored() if protected in ports(f)]
    assert len(copies) > 10 and not any(mptcp_options(f) for f in copies)
    assert not g.wrong_sums
    assert g.counter("Tcp", "InCsumErrors") == 0
