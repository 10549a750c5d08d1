# SPDX-License-Identifier: GPL-2.0-or-later
"""Test ICMP "packet too big" with a real Linux TCP stack as the guest.

The guest accepts the error although it quotes numbers that the guest never used: mirrored, after a
takeover, and as the next pair's PVM.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.net.packet import parse
from tests.bpf import craft
from tests.netns.conftest import Sniffer, inside, own, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC
from tests.netns.stack import Stack, until
from tests.netns.test_secondary_path import Host, config

ISN_C, FARTHER = 700_000, 500_000  # distance of the guest's ISN from the PVM's
SMALL = 1400
SYN, ACK = craft.SYN, craft.ACK


class Server(Stack):
    """The guest, with a listening socket."""

    def __init__(self, host: Host, v6: bool) -> None:
        super().__init__(host.guest, v6, (1, 3, 5, 9))
        self.host = host
        with inside(self.ns):
            family = socket.AF_INET6 if v6 else socket.AF_INET
            self.server = socket.create_server((self.address, 80), family=family)

    def mtu_to(self, far: str) -> bool:
        return f"mtu {SMALL}" in sh("ip", "-n", self.ns, "route", "get", far)

    def close(self) -> None:
        self.server.close()
        super().close()


class Client:
    """A client built from frames, and its connection with the guest."""

    def __init__(self, stack: Server, n: int) -> None:
        self.stack, self.address = stack, f"{stack.net}{n}"
        h = stack.host
        self.mirror(self.tcp(ISN_C, 0, SYN, b"\2\4\5\xb4\4\2" + struct.pack("!BBII", 8, 10, 1, 0)))
        got = h.peer.wait(lambda f: self.mine(f[:12] + f[16:]))
        assert got is not None
        syn_ack = got[1][:12] + got[1][16:]
        p = parse(syn_ack)
        at = syn_ack.index(b"\x08\x0a", p.l4 + 20)
        (ts,) = struct.unpack_from("!I", syn_ack, at + 2)
        self.isn, self.ts = (p.seq - FARTHER) % 2**32, (ts - 300) % 2**32
        told = craft.tcp_segment(
            stack.address, self.address, 80, 40000, self.isn, ISN_C + 1, SYN | ACK, b"",
            b"\2\4\5\xb4\4\2" + struct.pack("!BBII", 8, 10, self.ts, 1),
        )  # fmt: skip
        self.mirror(self.frame(stack.address, self.address, told), abi.KIND_SYN)
        # It acknowledges no data; a lost first ack would have the same effect.
        self.mirror(self.ack(0))
        self.socket, _ = stack.server.accept()

    def frame(self, src: str, dst: str, body: bytes) -> bytes:
        return GUEST_MAC + CLIENT_MAC + craft.ip(src, dst, 6, body)[12:]

    def tcp(self, seq: int, ack: int, flags: int, options: bytes) -> bytes:
        ends = (self.address, self.stack.address)
        return self.frame(*ends, craft.tcp_segment(*ends, 40000, 80, seq, ack, flags, b"", options))

    def ack(self, n: int) -> bytes:
        options = craft.timestamps(2, self.ts)
        return self.tcp(ISN_C + 1, self.isn + 1 + n, ACK, options)

    def mirror(self, frame: bytes, kind: int = abi.KIND_MIRROR) -> None:
        h = self.stack.host
        tagged = frame[:12] + struct.pack("!HH", abi.TPID, kind << 13) + frame[12:]
        with inside(h.net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("peer0", 0))
            s.send(tagged)

    def on_the_network(self, frame: bytes) -> None:
        with (
            inside(self.stack.host.net.client),
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s,
        ):
            s.bind(("c0", 0))
            s.send(frame)

    def mine(self, frame: bytes) -> bool:
        p = parse(frame)
        to = craft.addresses(self.address, self.address)[: 16 if self.stack.v6 else 4]
        return frame[6:12] == GUEST_MAC and to in frame[p.l3 : p.l4] and p.proto == 6

    def too_big(self, frame: bytes, gso: int) -> bytes:
        """Build a router's answer to the first packet of this frame."""
        p = parse(frame)
        payload = frame[p.off : p.off + (gso or 1 << 16)]
        src, dst = self.stack.address, self.address
        sent = craft.ip(src, dst, 6, frame[p.l4 : p.off] + payload)[14:]
        assert len(sent) > SMALL
        quote = sent[: 1280 - 48] if self.stack.v6 else sent[:28]
        body = struct.pack("!BBHI", *((2, 0) if self.stack.v6 else (3, 4)), 0, SMALL) + quote
        router = f"{self.stack.net}9"
        check = craft.l4_sum(router, src, 58, body) if self.stack.v6 else craft.ones_sum(body)
        body = body[:2] + struct.pack("!H", 0xFFFF & ~check) + body[4:]
        return GUEST_MAC + CLIENT_MAC + craft.ip(router, src, 58 if self.stack.v6 else 1, body)[12:]

    def goes_on(
        self,
        tell: Callable[[bytes], None],
        sent: Callable[[Callable[[bytes], bool]], tuple[bytes, int]],
    ) -> None:
        """Check that the guest sends, learns the limit, sends less, and all is acknowledged."""
        stack = self.stack
        before = stack.counter("TcpExt", "OutOfWindowIcmps")
        assert not stack.mtu_to(self.address)
        data = 4000
        self.socket.send(bytes(data))
        frame, gso = sent(lambda f: self.mine(f) and parse(f).off < parse(f).end)
        assert parse(frame).seq == (self.isn + 1) % 2**32, "the client's numbers"
        tell(self.too_big(frame, gso))
        until(lambda: stack.mtu_to(self.address), "the guest has not heard the router")
        assert stack.counter("TcpExt", "OutOfWindowIcmps") == before

        def fits(f: bytes) -> bool:
            p = parse(f)
            return self.mine(f) and p.seq == (self.isn + 1) % 2**32 and p.off < p.end

        while True:
            frame, gso = sent(fits)
            p = parse(frame)
            if (gso + p.off if gso else p.end) - p.l3 <= SMALL:
                break
        tell(self.ack(data))

        def left() -> int:
            raw = fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0\0\0\0")
            return int(struct.unpack("i", raw)[0])

        until(lambda: left() == 0, "what the client has acked")


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    host = Host(own("cxpm"), tmp_path, vnet=True)
    made = None
    try:
        host.dp.mode, host.dp.epoch = Mode.RUN, 5
        made = Server(host, request.param)
        yield made
    finally:
        if made is not None:
            made.close()
        host.close()


def gso_of(head: bytes) -> int:
    return int(struct.unpack("<BBHHHH", head)[3])


def test_a_router_is_heard_on_every_way(stack: Server) -> None:
    h = stack.host
    clients = [Client(stack, n) for n in (1, 3, 5)]

    def over_the_peer_link(match: Callable[[bytes], bool]) -> tuple[bytes, int]:
        got = h.peer.wait(lambda f: match(f[:12] + f[16:]), 5)
        assert got is not None
        return got[1][:12] + got[1][16:], gso_of(got[0])

    clients[0].goes_on(clients[0].mirror, over_the_peer_link)

    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
    network = Sniffer(h.net.client, "c0")

    def to_the_network(match: Callable[[bytes], bool]) -> tuple[bytes, int]:
        got = network.wait(match, 5)
        assert got is not None
        return got[1], gso_of(got[0])

    clients[1].goes_on(clients[1].on_the_network, to_the_network)

    h.dp.change_role()
    h.dp.close()
    with inside(h.net.host):
        h.dp = DataPath(config(h.tmp))
        h.dp.mode = Mode.RUN
    waiting: list[CapturedFrame] = []

    def to_the_comparison(match: Callable[[bytes], bool]) -> tuple[bytes, int]:
        def more() -> bool:
            h.dp.beat()
            h.dp.drain(waiting.append)
            return bool(waiting)

        while True:
            until(more, "nothing was captured")
            e = waiting.pop(0)
            if match(e.frame):
                return e.frame, e.gso_size

    clients[2].goes_on(clients[2].on_the_network, to_the_comparison)
    network.close()
    assert h.dp.counters()["promoted_in"]["pass_rewritten"][0] > 1
