# SPDX-License-Identifier: GPL-2.0-or-later
"""Test downloads through a router with a smaller MTU: while protected, at a takeover, and after it.

All ends are Linux kernels: both guests, the router and the client. Between them are the programs of
both hosts and the engine. The guests have numbers of their own, so a router's error means something
to the secondary guest only if its quote is translated.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.abi import Mode, Source
from colo_xdp.datapath.conntrack_map import ConntrackMap
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.net.packet import ACK, SYN, Kind, parse
from colo_xdp.tools import cleanup
from tests.netns import test_primary_path, test_secondary_path
from tests.netns.conftest import Tap, inside, own, sh
from tests.netns.frames import GUEST_MAC
from tests.netns.stack import Stack, until

LATER_S = 0.02  # by which the SVM gets a SYN later: its ISN is some 300,000 further
BODY = random.Random(5).randbytes(1_500_000)
PORT = 80


class Guest(Stack):
    """A guest that answers each connection's first byte with the same bytes."""

    def __init__(self, tap: Tap, v6: bool, gateway_mac: bytes, tag: str, later: float) -> None:
        self.later = later
        super().__init__(tap, v6, (9,), gateway_mac, tag)
        ip = ("ip", "-n", self.ns)
        sh(*ip, "route", "add", "default", "via", f"{self.net}9")
        with inside(self.ns):
            family = socket.AF_INET6 if v6 else socket.AF_INET
            self.server = socket.create_server((self.address, PORT), family=family)
        threading.Thread(target=self._serve, daemon=True).start()

    def seen(self, frame: bytes, to_guest: bool) -> None:
        if to_guest and self.later:
            p = parse(frame[10:])
            if p.kind is Kind.TCP and p.flags & (SYN | ACK) == SYN:
                time.sleep(self.later)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                s, _ = self.server.accept()
                threading.Thread(target=self._answer, args=(s,), daemon=True).start()

    def _answer(self, s: socket.socket) -> None:
        with contextlib.suppress(OSError), s:
            if s.recv(1):
                s.sendall(BODY)

    def forget(self) -> None:
        """Forget all path MTUs."""
        sh("ip", "-6" if self.v6 else "-4", "-n", self.ns, "route", "flush", "cache")

    @property
    def ignored(self) -> int:
        """The number of ICMP errors that the guest took for forged."""
        return self.counter("TcpExt", "OutOfWindowIcmps")

    def close(self) -> None:
        self.server.close()
        super().close()


class Lab:
    """Hosts p and s, the router r between their network and the client c."""

    def __init__(self, tmp: Path, v6: bool) -> None:
        self.v6, self.tmp = v6, tmp
        self.ns = {n: own(f"cxw{n}") for n in "psrc"}
        self.stop = threading.Event()
        self.asked: list[str] = []
        with contextlib.ExitStack() as made:
            self._network(made)
            self._hosts(made)
            self.undo = made.pop_all()

    def ip(self, n: str, text: str) -> str:
        return sh("ip", "-n", self.ns[n], *text.split())

    def _network(self, made: contextlib.ExitStack) -> None:
        for ns in self.ns.values():
            with contextlib.suppress(RuntimeError):
                sh("ip", "netns", "del", ns)
            sh("ip", "netns", "add", ns)
            made.callback(sh, "ip", "netns", "del", ns)
            with inside(ns):
                for scope in ("all", "default"):
                    Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        for n in "psr":
            self.ip(n, "link add br0 type bridge")
            self.ip(n, "link set br0 up")
        wires = [("r", f"to{n}", n, "up0") for n in "ps"] + [("r", "far", "c", "eth0")]
        for one, dev, other, far in wires:
            self.ip(one, f"link add {dev} type veth peer name {far} netns {self.ns[other]}")
            for n, d in ((one, dev), (other, far)):
                self.ip(n, f"link set {d} up")
                off = ("tso", "off", "gso", "off", "gro", "off", "tx", "off")
                sh("ip", "netns", "exec", self.ns[n], "ethtool", "-K", d, *off)
        self.ip("p", f"link add peer0 mtu 1600 type veth peer name peer0 netns {self.ns['s']}")
        for n in "ps":
            self.ip("r", f"link set to{n} master br0")
            self.ip(n, "link set up0 master br0")
            self.ip(n, "link set peer0 mtu 1600 up")
            self.ip(n, "tuntap add tap0 mode tap vnet_hdr")
            self.ip(n, "link set tap0 up")
        self.ip("p", "link set tap0 master br0")
        near, far, bits = ("fd09::", "fd0a::", 64) if self.v6 else ("10.9.0.", "10.10.0.", 24)
        more = " nodad" if self.v6 else ""
        for n, dev, address in (("r", "br0", f"{near}9"), ("r", "far", f"{far}9"),
                                ("c", "eth0", f"{far}1")):  # fmt: skip
            with inside(self.ns[n]):
                Path(f"/proc/sys/net/ipv6/conf/{dev}/disable_ipv6").write_text("0")
            self.ip(n, f"addr add {address}/{bits} dev {dev}{more}")
        with inside(self.ns["r"]):
            for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path(f"/proc/sys/net/{path}").write_text("1")
        self.ip("c", f"route add default via {far}9")
        self.client, self.guest_address = f"{far}1", f"{near}2"
        self.ip("r", f"neigh add {near}2 lladdr {GUEST_MAC.hex(':')} dev br0")
        found = self.ip("r", "link show br0").split("link/ether ")[1].split()[0]
        self.gateway_mac = bytes.fromhex(found.replace(":", ""))

    def _hosts(self, made: contextlib.ExitStack) -> None:
        self.dp, self.guests = {}, {}
        for n, make in (("p", test_primary_path), ("s", test_secondary_path)):
            tmp = self.tmp / n
            tmp.mkdir()
            with inside(self.ns[n]):
                cleanup.cleanup(make.PAIR, "/sys/fs/bpf", str(tmp), force=True)
                if n == "p":
                    c = test_primary_path.config(tmp, fast_path_memory=16)
                else:
                    c = test_secondary_path.config(tmp)
                dp = self.dp[n] = DataPath(c)
                made.callback(dp.close, detach=True)
                tap = Tap("tap0")
            made.callback(tap.close)
            later = LATER_S if n == "s" else 0
            guest = self.guests[n] = Guest(tap, self.v6, self.gateway_mac, n, later)
            made.callback(guest.close)
        p, s = self.dp["p"], self.dp["s"]
        with inside(self.ns["p"]):
            p.watch_bridge()
        self.engine = Engine(
            Limits(), Policy(),
            lambda r: p.injectors["release"].send(r.frame, r.gso_size, r.partial, r.gso_type),
            request_checkpoint=lambda d: self.asked.append(str(d.cause)), on_wait=lambda ns: None,
            fast=p.fast,
        )  # fmt: skip
        self.engine.epoch = p.epoch = s.epoch = 5
        p.mode = s.mode = Mode.RUN
        self.thread = threading.Thread(target=self._compare, daemon=True)
        self.thread.start()
        made.callback(self.end)

    def _compare(self) -> None:
        p, s, e = self.dp["p"], self.dp["s"], self.engine

        def on(c: CapturedFrame) -> None:
            frame = Frame(
                c.frame, c.ts_ns, c.gso_size, c.partial, punt_seq=c.punt_seq, gso_type=c.gso_type
            )
            if c.source == Source.PVM:
                e.from_pvm(frame, time.monotonic_ns())
            else:
                e.from_svm(frame, c.epoch, time.monotonic_ns())

        while not self.stop.is_set():
            p.beat()
            s.beat()
            p.drain(on, 512)
            e.flush(time.monotonic_ns())
            e.tick(time.monotonic_ns())
            self.stop.wait(0.0005)

    def end(self) -> None:
        """End the primary, as its controller does when its QEMU is gone."""
        self.stop.set()
        self.thread.join(5)
        self.dp["p"].mode = Mode.DROP

    def take_over(self) -> None:
        self.end()
        self.dp["s"].mode = Mode.TAKEOVER
        with inside(self.ns["s"]):
            self.dp["s"].open_network()

    def narrow(self, mtu: int) -> None:
        self.ip("r", f"link set far mtu {mtu}")

    def connect(self) -> socket.socket:
        with inside(self.ns["c"]):
            s = socket.socket(socket.AF_INET6 if self.v6 else socket.AF_INET)
        s.settimeout(15)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        s.connect((self.guest_address, PORT))
        return s

    def receive(self, s: socket.socket, n: int) -> bytes:
        got = bytearray()
        try:
            while len(got) < n and (piece := s.recv(min(65536, n - len(got)))):
                got += piece
        except TimeoutError:
            counts = {k: v for k, v in self.engine.counters.items() if v}
            pytest.fail(f"nothing after {len(got)} bytes; requested: {self.asked}; {counts}")
        return bytes(got)

    def learnt(self, n: str) -> int:
        """The guest's path MTU to the client; 0: the link's own."""
        words = sh("ip", "-n", self.guests[n].ns, "route", "get", self.client).split()
        return int(words[words.index("mtu") + 1]) if "mtu" in words else 0

    def too_big(self) -> int:
        """How many packets the router has refused."""
        with inside(self.ns["r"]):
            if self.v6:
                text = Path("/proc/thread-self/net/snmp6").read_text()
                return int(dict(map(str.split, text.splitlines()))["Ip6InTooBigErrors"])
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (x.split() for x in lines if x.startswith("Ip:"))
        return int(values[names.index("FragFails")])

    def translated(self) -> int:
        """How many connections have other numbers at the SVM."""
        flows = self.dp["s"].flows()
        assert flows is not None
        table = ConntrackMap(*flows)
        table.sweep(self.dp["s"].epoch)
        return table.translated

    def close(self) -> None:
        self.undo.close()


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    made = Lab(tmp_path, request.param)
    yield made
    made.close()


def test_downloads_past_a_router_with_a_smaller_mtu(lab: Lab) -> None:
    pvm, svm = lab.guests["p"], lab.guests["s"]

    # The first one while protected: both guests hear of it.
    lab.narrow(1400)
    with lab.connect() as s:
        s.sendall(b"?")
        assert lab.receive(s, len(BODY)) == BODY
    assert lab.translated() == 1, "else this test says nothing"
    assert lab.learnt("p") == lab.learnt("s") == 1400
    refused = lab.too_big()
    assert refused > 0

    # The next, in which the SVM has forgotten it: nothing leaves that is longer than the PVM's.
    with lab.connect() as s:
        svm.forget()
        s.sendall(b"?")
        assert lab.receive(s, len(BODY)) == BODY
    assert lab.too_big() == refused and lab.learnt("s") == 0
    assert not lab.asked

    # The guests offer the MSS that they know of, so both have to know the same.
    pvm.forget()
    # One in its middle when the SVM takes over, and the path becomes narrower still.
    with lab.connect() as s:
        s.sendall(b"?")
        begun = lab.receive(s, 200_000)
        lab.take_over()
        lab.narrow(1300)
        assert begun + lab.receive(s, len(BODY) - len(begun)) == BODY
    until(lambda: lab.learnt("s") == 1300, "the guest has not heard the router")

    # And one that has begun afterwards.
    refused = lab.too_big()
    with lab.connect() as s:
        s.sendall(b"?")
        assert lab.receive(s, len(BODY)) == BODY
    assert lab.too_big() == refused
    assert pvm.ignored == svm.ignored == 0
