# SPDX-License-Identifier: GPL-2.0-or-later
"""Provide namespaces for one test: created by it, removed after it, also when it fails."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.reuse import Reuse

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


def own(name: str) -> str:
    """Return a name of a pair or a namespace that no other test run uses."""
    return f"{name}{os.getpid() % 100000}"


def sh(*cmd: str) -> str:
    r = subprocess.run(cmd, capture_output=True, text=True, check=False)
    if r.returncode:
        raise RuntimeError(f"{' '.join(cmd)}: {r.stdout}{r.stderr}")
    return r.stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = "needs root for network namespaces" if os.geteuid() else ""
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.netns)
        if why and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=why))


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Run this thread in the namespace."""
    old = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    new = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if _libc.setns(new, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        yield
    finally:
        _libc.setns(old, CLONE_NEWNET)
        os.close(old)
        os.close(new)


class Tap:
    """Stand in for a guest: the far end of a tap, with or without a 10-byte virtio_net_hdr.

    `multi_queue`: one queue of a tap that has several.
    """

    def __init__(self, name: str, vnet: bool = True, multi_queue: bool = False) -> None:
        self.vnet = vnet
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = 0x0002 | 0x1000 | 0x4000 * vnet | 0x0100 * multi_queue
        fcntl.ioctl(self.fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
        if vnet:
            fcntl.ioctl(self.fd, 0x400454D8, struct.pack("i", 10))
            fcntl.ioctl(self.fd, 0x400454D0, 1 | 2 | 4)  # TUN_F_CSUM, TSO4, TSO6
        self._settle(name)

    @staticmethod
    def _settle(name: str) -> None:
        """Wait until the kernel has noted the carrier of a tap that is up: until then it drops."""
        end = time.monotonic() + 5
        while True:
            (link,) = json.loads(sh("ip", "-j", "link", "show", name))
            if "UP" not in link["flags"] or link["operstate"] == "UP":
                return
            assert time.monotonic() < end, f"{name} has no carrier: {link}"
            time.sleep(0.01)

    def send(self, frame: bytes, head: bytes = bytes(10)) -> None:
        os.write(self.fd, (head if self.vnet else b"") + frame)

    def read(self) -> bytes:
        """Return the next waiting frame with its virtio_net_hdr; empty if there is none."""
        try:
            return os.read(self.fd, 70000)
        except BlockingIOError:
            return b""

    def recv(self, match: Callable[[bytes], bool], timeout: float = 2.0) -> bytes | None:
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.fd], [], [], left)[0]:
                return None
            raw = os.read(self.fd, 70000)
            frame = raw[10:] if self.vnet else raw
            if match(frame):
                return frame
        return None

    def close(self) -> None:
        os.close(self.fd)


class Sniffer:
    """AF_PACKET on a device, offload state included (PACKET_VNET_HDR, PACKET_AUXDATA)."""

    def __init__(self, ns: str, dev: str) -> None:
        with inside(ns):
            self.s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.s.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
        self.s.setsockopt(263, 8, 1)  # PACKET_AUXDATA: the VLAN tag is there
        self.s.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
        self.s.bind((dev, 0))

    def frames(self, timeout: float) -> Iterator[tuple[bytes, bytes]]:
        """Yield (virtio_net_hdr, frame with its tag in place) until the time is up."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            self.s.settimeout(left)
            try:
                raw, anc, _, addr = self.s.recvmsg(70000, 256)
            except TimeoutError:
                return
            if addr[2] == socket.PACKET_OUTGOING:
                continue
            frame = raw[10:]
            for level, kind, data in anc:
                if level == 263 and kind == 8:
                    status, _l, _s, _m, _n, tci, tpid = struct.unpack("IIIHHHH", data[:20])
                    if status & 0x10:  # TP_STATUS_VLAN_VALID
                        proto = tpid if status & 0x40 else 0x8100
                        frame = frame[:12] + struct.pack("!HH", proto, tci) + frame[12:]
            yield raw[:10], frame

    def wait(
        self, match: Callable[[bytes], bool], timeout: float = 2.0
    ) -> tuple[bytes, bytes] | None:
        for head, frame in self.frames(timeout):
            if match(frame):
                return head, frame
        return None

    def close(self) -> None:
        self.s.close()


class Net:
    """Host namespace: bridge br0 with tap0 and the client's veth; peer0 leads to `other`."""

    def __init__(self, tag: str, vnet: bool = True, multi_queue: bool = False) -> None:
        self.host, self.client, self.other = (f"{tag}{x}" for x in "hco")
        self.close()
        for ns in (self.host, self.client, self.other):
            sh("ip", "netns", "add", ns)
            with inside(ns):
                for scope in ("all", "default"):
                    Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
        for text in (
            f"link add uplink type veth peer name c0 netns {self.client}",
            f"link add peer0 type veth peer name peer0 netns {self.other}",
            "link add br0 type bridge",
            "tuntap add tap0 mode tap" + " vnet_hdr" * vnet + " multi_queue" * multi_queue,
            "link set dev uplink master br0",
            "link set dev tap0 master br0",
            "link set peer0 mtu 1600",
        ):
            sh("ip", "-n", self.host, *text.split())
        for dev in ("uplink", "peer0", "br0", "tap0"):
            sh("ip", "-n", self.host, "link", "set", "dev", dev, "up")
        sh("ip", "-n", self.client, "link", "set", "c0", "up")
        sh("ip", "-n", self.other, "link", "set", "peer0", "mtu", "1600", "up")
        self._settle()

    def _settle(self) -> None:
        """Wait for the veths: until the kernel has noted their carrier, they drop all frames.

        It does so at most once a second, and loading programs may take less.
        """
        end = time.monotonic() + 5
        for ns in (self.host, self.client, self.other):
            while any(d["operstate"] != "UP" for d in self._veths(ns)):
                assert time.monotonic() < end, f"no carrier in {ns}"
                time.sleep(0.02)

    @staticmethod
    def _veths(ns: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(
            sh("ip", "-n", ns, "-j", "link", "show", "type", "veth")
        )
        return found

    def close(self) -> None:
        for ns in (self.host, self.client, self.other):
            with contextlib.suppress(RuntimeError):
                sh("ip", "netns", "del", ns)


@pytest.fixture(scope="session", autouse=True)
def _reuse() -> Iterator[Reuse]:
    reuse = Reuse()
    with pytest.MonkeyPatch.context() as mp:
        reuse.patch(mp)
        yield reuse
    reuse.close()


@pytest.fixture
def no_reuse(_reuse: Reuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load and unpin as a controller does."""
    _reuse.unpatch(monkeypatch)


@pytest.fixture
def net() -> Iterator[Net]:
    n = Net(own("cx"))
    try:
        with inside(n.host):
            yield n
    finally:
        n.close()
