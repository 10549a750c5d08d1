# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that frames sent with an offload reach the client byte for byte as without us, or not at
all.

The uplink has no offloads here, so the kernel completes and segments each frame, and the client's
wire carries what any receiver would get.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from colo_xdp.abi import GSO_ECN, Gso, Mode
from colo_xdp.config.file import load
from colo_xdp.datapath import btf
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC, csum, tcp, udp

PAIR = own("of")
CWR = 0x80
GUEST, CLIENT = socket.inet_aton("10.9.0.2"), socket.inet_aton("10.9.0.1")
END = tcp(b"end of the case", sport=9, dport=9)
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
BODY = bytes(range(1, 241)) * 30


def header(
    *, partial: bool = True, kind: int = 0, size: int = 0, l4: int = 34, at: int = 16, head: int = 0
) -> bytes:
    """Build struct virtio_net_hdr as a guest writes it."""
    return struct.pack("<BBHHHH", int(partial), kind, head, size, l4, at)


def no_checksums(ns: str, dev: str) -> None:
    """Turn the device's offloads off, so that it sends only complete frames."""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sQ16x", dev.encode(), ctypes.addressof(value))
    with inside(ns), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, SIOCETHTOOL, request)


def within(outer: bytes, proto: int, *, udp_port: int = 0) -> bytes:
    """Build an IPv4 frame of the guest around `outer`, in UDP (without a checksum) or directly."""
    body = outer
    if udp_port:
        body = struct.pack("!HHHH", 50000, udp_port, 8 + len(outer), 0) + outer
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 9, 0x4000, 64, proto, 0) + GUEST + CLIENT
    ip = ip[:10] + struct.pack("!H", 0xFFFF & ~csum(ip)) + ip[12:]
    return CLIENT_MAC + GUEST_MAC + b"\x08\x00" + ip + body


def retagged(frame: bytes, lead: bytes) -> bytes:
    """Insert `lead` between the addresses and the ethertype."""
    return frame[:12] + lead + frame[12:]


def extended(frame: bytes, chain: list[int], last: int) -> bytes:
    """Build an IPv6 frame with eight bytes per extension header; the upper layer is `last`."""
    ext = b"".join(
        bytes([nxt, 0]) + bytes(6) for nxt in [*chain[1:], last]
    )  # of zeros: padding options, no segments left, an atomic fragment
    length = struct.pack("!H", len(frame) - 54 + len(ext))
    return frame[:18] + length + bytes([chain[0]]) + frame[21:54] + ext + frame[54:]


@dataclass(frozen=True)
class Case:
    """A frame, its virtio_net_hdr, and the expectation: does it leave, and in how many frames."""

    name: str
    frame: bytes
    head: bytes
    leaves: int = 1
    flags: tuple[int, ...] = ()  # TCP's, of each piece

    def __str__(self) -> str:
        return self.name


def cases() -> list[Case]:
    one, one6 = tcp(b"payload!", partial=True), tcp(b"payload!", partial=True, v6=True)
    many = {v6: tcp(BODY[:4000], partial=True, v6=v6, flags=0x10 | CWR) for v6 in (False, True)}
    datagram = {v6: udp(BODY[:4000], partial=True, v6=v6) for v6 in (False, True)}
    inner = tcp(b"inner of a tunnel", partial=True)
    vxlan = within(struct.pack("!II", 0x08000000, 7 << 8) + inner, 17, udp_port=4789)
    gre = within(b"\0\0\x08\0" + inner[14:], 47)
    pppoe = one[:12] + struct.pack("!HBBHHH", 0x8864, 0x11, 0, 1, len(one) - 12, 0x21) + one[14:]
    echo = struct.pack("!BBHHH", 129, 0, 0, 7, 1) + b"an odd number"
    ping = udp(b"", v6=True)[:54] + echo
    ping = ping[:18] + struct.pack("!HB", len(echo), 58) + ping[21:]
    pseudo = csum(ping[22:54] + struct.pack("!HH", 58, len(echo)))
    ping = ping[:56] + struct.pack("!H", pseudo) + ping[58:]
    tag = struct.pack("!HH", 0x8100, 6)
    out = [
        Case("tcp", one, header()),
        Case("tcp6", one6, header(l4=54)),
        Case("udp", udp(b"datagram", partial=True), header(at=6)),
        Case("full", tcp(b"full"), header(partial=False)),
        Case("cwr-ecn", many[False], header(kind=1 | GSO_ECN, size=1448, head=66), 3,
             (0x90, 0x10, 0x10)),
        Case("cwr-no-ecn", many[False], header(kind=1, size=1448, head=66), 3, (0x90, 0x10, 0x10)),
        Case("cwr6", many[True], header(kind=4 | GSO_ECN, size=1428, head=86, l4=54), 3,
             (0x90, 0x10, 0x10)),
        Case("ufo", datagram[False], header(kind=Gso.UDP, size=1480, head=42, at=6), 3),
        Case("ufo6", datagram[True], header(kind=Gso.UDP, size=1448, head=62, l4=54, at=6), 3),
        Case("uso", datagram[False], header(kind=Gso.UDP_L4, size=1472, head=42, at=6), 3),
        Case("uso6", datagram[True], header(kind=Gso.UDP_L4, size=1400, head=62, l4=54, at=6), 3),
        Case("tag", retagged(one, tag), header(l4=38)),
        Case("three-tags", retagged(one, struct.pack("!HH", 0x88A8, 5) + tag * 2), header(l4=46)),
        Case("tag-9100", retagged(one, struct.pack("!HH", 0x9100, 5) + tag), header(l4=42)),
        Case("pppoe", pppoe, header(l4=42)),
        Case("six-extensions", extended(one6, [60] * 6, 6), header(l4=54 + 48)),
        Case("extensions", extended(one6, [0, 43, 60], 6), header(l4=54 + 24)),
        Case("atomic-fragment", extended(one6, [44], 6), header(l4=62)),
        Case("icmp6", ping, header(l4=54, at=2)),
        Case("gre-inner", gre, header(l4=34 + 4 + 20)),
        Case("vxlan-inner", vxlan, header(l4=42 + 8 + 34)),
        # Nobody can segment by such headers; what has no tunnel's vnet header is TCP to the kernel.
        Case("pppoe-tso", many[False][:12] + pppoe[12:22] + many[False][14:],
             header(kind=1, size=1448, head=74, l4=42), 0),
    ]  # fmt: skip
    return out


class Lab:
    """A primary host whose uplink has no offloads."""

    def __init__(self, tmp: Path, extra: str = "") -> None:
        self.net = Net(PAIR)
        path = tmp / "pair.toml"
        path.write_text(
            f'pair = "{PAIR}"\nrole = "primary"\n'
            '[network]\ntap = "tap0"\npeer_link = "peer0"\n'
            '[qemu]\nqmp = "/nonexistent"\nmigrate_uri = "unix:/nonexistent"\n'
            '[peer]\nlocal = "127.0.0.1:1"\nremote = "127.0.0.1:2"\n'
            f'[datapath]\nrun_dir = "{tmp}"\nring_pages = 1024\nfast_path_memory = 16\n{extra}\n'
            '[metrics]\nlisten = ""\n'
        )
        self.tmp = tmp
        no_checksums(self.net.host, "uplink")
        sh("ip", "-n", self.net.client, "link", "set", "c0", "address", CLIENT_MAC.hex(":"))
        with inside(self.net.host):
            self.dp = DataPath(load(path))
            self.guest = Tap("tap0")
        self.client = Sniffer(self.net.client, "c0")
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        release = self.dp.injectors["release"]
        engine = Engine(
            Limits(), Policy(),
            lambda r: release.send(r.frame, r.gso_size, r.partial, r.gso_type),
            request_checkpoint=lambda *_: None, on_wait=lambda _: None,
        )  # fmt: skip
        engine.epoch = self.dp.epoch = 1
        return engine

    def events(self, last: bytes) -> list[CapturedFrame]:
        """Return what was captured, up to the event of this frame."""
        got: list[CapturedFrame] = []
        end = time.monotonic() + 5
        while time.monotonic() < end and not any(e.frame == last for e in got):
            select.select(self.dp.reader.fds, [], [], 0.05)
            self.dp.drain(got.append)
        return got

    def through(
        self, case: Case, counterparts: list[bytes] | None = None, end: bytes = bytes(10)
    ) -> None:
        """Let both guests send the frame.

        `counterparts`: how the SVM's copy arrives; `end`: the last frame's virtio_net_hdr.
        """
        self.dp.beat()
        self.guest.send(case.frame, case.head)
        self.guest.send(END, end)
        now = time.monotonic_ns()
        for e in self.events(END):
            rec = Frame(e.frame, e.ts_ns, e.gso_size, e.partial, gso_type=e.gso_type)
            copies = [Frame(e.frame, e.ts_ns, e.gso_size, e.partial, gso_type=e.gso_type)]
            if counterparts is not None and e.frame != END:
                copies = [Frame(f, e.ts_ns) for f in counterparts]
            for copy in copies:
                self.engine.from_svm(copy, 1, now)
            self.engine.from_pvm(rec, now)
        self.engine.flush(now)

    def arrives(self) -> list[bytes]:
        """Return what the client's wire has carried of this case."""
        out = []
        for head, frame in self.client.frames(5):
            if frame[6:12] == GUEST_MAC:
                assert not head[0] & 1 and not head[1], "the wire carries no offloads"
                if frame == END:
                    return out
                out.append(frame)
        raise AssertionError("the case has no end")

    def forget(self) -> None:
        """Discard what the client's wire has carried until now."""
        self.client.close()
        self.client = Sniffer(self.net.client, "c0")

    def counted(self, prog: str, reason: str) -> int:
        return self.dp.counters()[prog][reason][0]

    def close(self) -> None:
        self.guest.close()
        self.client.close()
        with inside(self.net.host):
            self.dp.close()
            cleanup.cleanup(PAIR, "/sys/fs/bpf", str(self.tmp))
        self.net.close()


@pytest.fixture(scope="module", params=["btf", "no-btf"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as m:
        if request.param == "no-btf":
            m.setattr(btf, "why_not", lambda: "as if there were none")
        lab = Lab(tmp_path_factory.mktemp("offloads"))
    try:
        assert lab.dp.objects.btf == (request.param == "btf")
        yield lab
    finally:
        lab.close()


#: without BTF it is unknown how UDP is segmented, and where a checksum is that is not TCP's or
#: UDP's
BLIND = {
    "ufo", "ufo6", "uso", "uso6", "three-tags", "pppoe", "six-extensions", "icmp6", "gre-inner",
    "vxlan-inner",
}  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=str)
def test_it_leaves_as_without_us_or_not_at_all(lab: Lab, case: Case) -> None:
    lab.dp.mode = Mode.BYPASS
    lab.guest.send(case.frame, case.head)
    lab.guest.send(END)
    plain = lab.arrives()
    lab.dp.mode = Mode.RUN
    lab.engine = lab.new_engine()
    refused = lab.counted("pvm_out", "drop_gso_unsupported")
    lab.through(case)
    got = lab.arrives()
    assert not lab.dp.injectors["release"].failed
    assert not lab.engine.counters["checkpoint_requests"]
    if (
        case.name == "ufo6" and got
    ):  # the last sender's kernel chooses its fragments' identification
        assert len({f[58:62] for f in got}) == 1
        plain, got = ([f[:58] + f[62:] for f in each] for each in (plain, got))
    if case.leaves and (lab.dp.objects.btf or case.name not in BLIND):
        assert [f.hex() for f in got] == [f.hex() for f in plain]
        assert len(got) == case.leaves
        assert lab.counted("pvm_out", "drop_gso_unsupported") == refused
    else:
        assert got == []
        assert lab.counted("pvm_out", "drop_gso_unsupported") == refused + 1
    if case.flags and got:
        assert tuple(f[47 if f[12:14] == b"\x08\x00" else 67] for f in got) == case.flags


def test_a_datagram_of_4000_bytes_is_one_to_a_socket(lab: Lab) -> None:
    """UFO as an ordinary receiver sees it: through us as without us, or not at all."""
    ufo = next(c for c in cases() if c.name == "ufo")
    with contextlib.suppress(RuntimeError):  # it is there already
        sh("ip", "-n", lab.net.client, "addr", "add", "10.9.0.1/24", "dev", "c0")
    with inside(lab.net.client):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind(("10.9.0.1", 40000))
    s.settimeout(2)
    try:
        lab.dp.mode = Mode.BYPASS
        lab.guest.send(ufo.frame, ufo.head)
        assert s.recv(65535) == BODY[:4000]
        lab.dp.mode = Mode.RUN
        lab.engine = lab.new_engine()
        lab.through(ufo)
        if lab.dp.objects.btf:
            assert s.recv(65535) == BODY[:4000]
        else:
            lab.through(Case("small", udp(b"next"), header(partial=False)))
            assert s.recv(65535) == b"next", "nothing of it has come"
    finally:
        s.close()
        lab.forget()


def test_the_svms_copy_may_come_as_its_link_made_it(lab: Lab) -> None:
    """A device without offloads completes the checksum of an inner header, and fragments."""
    for case in cases():
        if case.name not in ("ufo", "vxlan-inner", "gre-inner", "pppoe", "icmp6"):
            continue
        lab.dp.mode = Mode.BYPASS
        lab.guest.send(case.frame, case.head)
        lab.guest.send(END)
        plain = lab.arrives()
        lab.dp.mode = Mode.RUN
        lab.engine = lab.new_engine()
        lab.through(case, counterparts=plain)
        assert lab.arrives() == (plain if lab.dp.objects.btf else []), case
        assert not lab.engine.counters["checkpoint_requests"], case


def tunnelled() -> Case:
    """Build TCP to be segmented within a VXLAN (Linux 6.17: virtio_net_hdr_v1_hash_tunnel)."""
    inner = tcp(BODY[:4000], partial=True)
    frame = within(struct.pack("!II", 0x08000000, 7 << 8) + inner, 17, udp_port=4789)
    at = 34 + 8 + 8  # where the inner frame begins
    head = struct.pack(
        "<BBHHHHHIHHHH", 1, Gso.TCPV4 | 0x20, at + 66, 1000, at + 34, 16, 0, 0, 0, 0, 34, at + 14
    )
    return Case("tunnel-tso", frame, head, 4)


def test_what_is_segmented_within_a_tunnel_is_refused(lab: Lab) -> None:
    """By its headers it would be UDP of several datagrams. Without us it is four VXLAN frames."""
    case = tunnelled()
    try:
        fcntl.ioctl(lab.guest.fd, 0x400454D8, struct.pack("i", 24))  # TUNSETVNETHDRSZ
        fcntl.ioctl(lab.guest.fd, 0x400454D0, 7 | 0x80)  # TUN_F_UDP_TUNNEL_GSO
    except OSError as e:
        pytest.skip(f"this kernel's taps take no tunnels: {e}")
    try:
        lab.dp.mode = Mode.BYPASS
        lab.guest.send(case.frame, case.head)
        lab.guest.send(END, bytes(24))
        plain = lab.arrives()
        assert len(plain) == case.leaves and all(
            f[23] == 17 and f[36:38] == b"\x12\xb5" for f in plain
        )
        lab.dp.mode = Mode.RUN
        lab.engine = lab.new_engine()
        refused = lab.counted("pvm_out", "drop_gso_unsupported")
        lab.through(case, end=bytes(24))
        assert lab.arrives() == []
        assert lab.counted("pvm_out", "drop_gso_unsupported") == refused + 1
    finally:
        fcntl.ioctl(lab.guest.fd, 0x400454D8, struct.pack("i", 10))
