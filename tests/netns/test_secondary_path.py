# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the secondary host's programs on real devices: offloads, isolation, takeover."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.config.file import Config, load
from colo_xdp.datapath import attach, bridge, devices, loader, syscall
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.inject import vnet_header
from colo_xdp.datapath.manifest import Manifest
from colo_xdp.datapath.prepare import DataPathError
from colo_xdp.datapath.ring import CapturedFrame, summed
from colo_xdp.datapath.source import Options
from colo_xdp.net.packet import parse
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC, csum, tcp, udp

PAIR = own("nst2")
ISN_P, ISN_S = 1_000_000, 4_294_960_000  # the SVM's numbers wrap soon
OFFSET = (ISN_S - ISN_P) % 2**32
TS_P, TS_S = 7_000, 9_500
CLIENT_ISN = 5_000


def config(tmp_path: Path, hook: str = "auto") -> Config:
    path = tmp_path / "pair.toml"
    path.write_text(
        f"""
        pair = "{PAIR}"
        role = "secondary"
        [network]
        tap = "tap0"
        peer_link = "peer0"
        bridge = "br0"
        hook = "{hook}"
        [qemu]
        qmp = "/nonexistent"
        [peer]
        local = "127.0.0.1:1"
        remote = "127.0.0.1:2"
        [datapath]
        run_dir = "{tmp_path}"
        ring_pages = 1024
        [metrics]
        listen = ""
        """
    )
    return load(path)


class Host:
    """The secondary host with a guest behind its tap, and the primary's end of the peer link."""

    def __init__(self, tag: str, tmp_path: Path, vnet: bool) -> None:
        self.net = Net(tag, vnet)
        sh("ip", "-n", self.net.host, "link", "set", "dev", "tap0", "nomaster")
        self.vnet = vnet
        with inside(self.net.host):
            cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
            self.dp = DataPath(config(tmp_path))
            self.guest = Tap("tap0", vnet)
        self.peer = Sniffer(self.net.other, "peer0")
        self.tmp = tmp_path

    def close(self) -> None:
        self.guest.close()
        self.dp.close()
        self.peer.close()
        with inside(self.net.host):
            cleanup.cleanup(PAIR, "/sys/fs/bpf", str(self.tmp), force=True)
        self.net.close()

    def mirrored(self, frame: bytes, epoch: int = 0) -> bytes:
        """Send a client's frame over the peer link; return what the guest receives of it."""
        tagged = frame[:12] + struct.pack("!HH", abi.TPID, 1 << 13 | epoch) + frame[12:]
        with inside(self.net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("peer0", 0))
            s.send(tagged)
        seen = self.guest.recv(lambda f: f[6:12] == CLIENT_MAC)
        assert seen is not None
        return seen

    def says(self, frame: bytes, gso: int = 0, partial: bool = False) -> tuple[bytes, bytes]:
        """Let the guest send; return (virtio_net_hdr, frame) at the primary's end, untagged."""
        self.guest.send(frame, vnet_header(frame, gso, partial))
        got = self.peer.wait(lambda f: GUEST_MAC in f[6:12])
        assert got is not None
        head, raw = got
        tpid, tci = struct.unpack_from("!HH", raw, 12)
        assert (tpid, tci >> 13, tci & 0xFFF) == (abi.TPID, abi.KIND_SVM, self.dp.epoch & 0xFFF)
        return head, raw[:12] + raw[16:]

    def handshake(self, v6: bool = False) -> None:
        self.mirrored(tcp(seq=CLIENT_ISN, ack=0, flags=2, reverse=True, v6=v6, options=ts(1, 0)))
        self.says(tcp(seq=ISN_S, ack=CLIENT_ISN + 1, flags=0x12, v6=v6, options=ts(TS_S, 1)))
        answer = tcp(
            seq=CLIENT_ISN + 1,
            ack=ISN_P + 1,
            flags=0x10,
            reverse=True,
            v6=v6,
            options=ts(2, TS_P),
        )
        seen = self.mirrored(answer)
        p = parse(seen)
        assert p.ack == (ISN_S + 1) % 2**32
        assert struct.unpack_from("!II", seen, p.l4 + 24)[1] == TS_S
        assert right(seen)


def ts(val: int, ecr: int) -> bytes:
    return b"\1\1\x08\x0a" + struct.pack("!II", val, ecr)


def right(frame: bytes, partial: bool = False) -> bool:
    """Return whether the TCP checksum is complete (or the pseudo header's sum)."""
    p = parse(frame)
    l4 = frame[p.l4 : p.end]
    v6 = frame[p.l3] >> 4 == 6
    addresses = frame[p.l3 + 8 : p.l3 + 40] if v6 else frame[p.l3 + 12 : p.l3 + 20]
    pseudo = csum(addresses + struct.pack("!HH", 6, len(l4)))
    if partial:
        return struct.unpack_from("!H", l4, 16)[0] == pseudo
    return csum(l4, pseudo) == 0xFFFF


@pytest.fixture(params=[True, False], ids=["tc", "xdp"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    h = Host(own("cxs2"), tmp_path, request.param)
    try:
        yield h
    finally:
        h.close()


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_translation_keeps_checksums_and_offloads(host: Host, v6: bool) -> None:
    assert host.dp.hook == ("tc" if host.vnet else "xdp")
    host.dp.mode = Mode.RUN
    host.handshake(v6)
    mss = 1428 if v6 else 1448
    cases = [(b"x" * 100, 0, False)]
    if host.vnet:
        cases += [(b"y" * mss, 0, True), (bytes(range(256)) * 230, mss, True)]
    seq = ISN_S + 1
    for body, gso, partial in cases:
        frame = tcp(
            body, seq=seq % 2**32, ack=CLIENT_ISN + 1, v6=v6, partial=partial,
            options=ts(TS_S + 5, 2),
        )  # fmt: skip
        head, out = host.says(frame, gso, partial)
        p = parse(out)
        assert p.seq == (seq - OFFSET) % 2**32 and out[p.off : p.end] == body
        assert struct.unpack_from("!II", out, p.l4 + 24) == (TS_P + 5, 2)
        flags, _, _, size, _, _ = struct.unpack("<BBHHHH", head)
        assert (size, flags & 1) == (gso, int(partial))
        assert right(out, partial)
        seq += len(body)
    acked = tcp(seq=CLIENT_ISN + 1, ack=(seq - OFFSET) % 2**32, reverse=True, v6=v6,
                options=ts(3, TS_P + 5))  # fmt: skip
    seen = host.mirrored(acked)
    assert parse(seen).ack == seq % 2**32 and right(seen)


def test_nothing_of_the_svm_gets_out_and_nothing_else_gets_in(host: Host) -> None:
    up = Sniffer(host.net.host, "tap0")
    for mode in (Mode.DROP, Mode.RUN, Mode.CHECKPOINT):
        host.dp.mode = mode
        host.guest.send(tcp(b"out"))
        with inside(host.net.host), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind(("tap0", 0))
            with contextlib.suppress(OSError):  # ENOBUFS: our program has dropped it
                s.send(tcp(b"from the host itself", reverse=True))
        assert host.guest.recv(lambda f: b"from the host" in f, timeout=0.1) is None
    c = host.dp.counters()
    assert c["svm_out"]["drop_mode"][0] >= 1 and c["svm_out"]["pass"][0] == 0
    assert c["svm_net"]["drop_isolated"][0] >= 3
    bridge = sh("bridge", "-n", host.net.host, "fdb", "show", "br", "br0")
    assert GUEST_MAC.hex(":") not in bridge
    up.close()


def test_a_checkpoint_holds_both_directions_and_voids_offsets(host: Host) -> None:
    host.dp.mode = Mode.RUN
    host.handshake()
    host.dp.mode = Mode.CHECKPOINT
    host.guest.send(tcp(b"held", seq=(ISN_S + 1) % 2**32))
    tagged = tcp(b"client", seq=CLIENT_ISN + 1, ack=ISN_P + 1, reverse=True)
    with inside(host.net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("peer0", 0))
        s.send(tagged[:12] + struct.pack("!HH", abi.TPID, 1 << 13) + tagged[12:])
    got: list[CapturedFrame] = []
    end = time.monotonic() + 2
    while len(got) < 2 and time.monotonic() < end:
        select.select(host.dp.reader.fds, [], [], 0.05)
        host.dp.drain(got.append)
    assert {e.source for e in got} == {abi.Source.SVM, abi.Source.CLIENT}
    host.dp.epoch = 1
    client = next(e for e in got if e.source == abi.Source.CLIENT)
    host.dp.injectors["deliver"].send(
        client.frame, client.gso_size, client.partial, client.gso_type
    )
    seen = host.guest.recv(lambda f: b"client" in f)
    assert seen is not None and parse(seen).ack == ISN_P + 1, "the SVM is the PVM's copy now"
    svm = next(e for e in got if e.source == abi.Source.SVM)
    host.dp.injectors["forward"].send(svm.frame, svm.gso_size, svm.partial, svm.gso_type)
    out = host.peer.wait(lambda f: b"held" in f)
    assert out is not None
    assert struct.unpack_from("!HH", out[1], 12) == (abi.TPID, 2 << 13 | 1)
    assert parse(out[1][:12] + out[1][16:]).seq == (ISN_S + 1) % 2**32


def test_takeover_keeps_offsets_and_opens_the_network(host: Host) -> None:
    host.dp.mode = Mode.RUN
    host.handshake()
    host.dp.mode = Mode.TAKEOVER
    with inside(host.net.host):
        host.dp.open_network()
    client = Sniffer(host.net.client, "c0")
    frame = tcp(b"alive", seq=(ISN_S + 1) % 2**32, ack=CLIENT_ISN + 1, options=ts(TS_S, 2))
    host.guest.send(frame)
    out = client.wait(lambda f: b"alive" in f)
    assert out is not None and parse(out[1]).seq == ISN_P + 1 and right(out[1])
    with inside(host.net.client), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("c0", 0))
        s.send(tcp(b"back", seq=CLIENT_ISN + 1, ack=ISN_P + 6, reverse=True, options=ts(4, TS_P)))
    seen = host.guest.recv(lambda f: b"back" in f)
    assert seen is not None and parse(seen).ack == (ISN_S + 6) % 2**32 and right(seen)
    client.close()


@pytest.mark.parametrize("stepped_out", [False, True])
def test_a_promoted_guest_takes_no_clients_frame_from_the_peer_link(
    host: Host, stepped_out: bool
) -> None:
    """But for a while from a primary that has handed over, and again as a copy."""
    host.dp.mirrored_until = time.monotonic_ns() + 10**11
    host.dp.mode = Mode.TAKEOVER
    with inside(host.net.host):
        host.dp.open_network()
        if stepped_out:
            host.dp.step_out()
    frame = tcp(b"injected", reverse=True)
    assert host.mirrored(frame) == frame
    host.dp.mirrored_until = 0
    tagged = frame[:12] + struct.pack("!HH", abi.TPID, abi.KIND_MIRROR << 13) + frame[12:]
    with inside(host.net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("peer0", 0))
        s.send(tagged)
    assert host.guest.recv(lambda f: f[6:12] == CLIENT_MAC, 0.3) is None
    assert host.dp.counters()["svm_in"]["drop_promoted"][0] == 1
    with inside(host.net.client), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("c0", 0))
        s.send(tcp(b"a client", reverse=True))
    assert host.guest.recv(lambda f: b"a client" in f) is not None, "from its own network"
    host.dp.mode = Mode.RUN
    assert host.mirrored(frame) == frame


def test_what_has_stepped_out_steps_in_again(host: Host) -> None:
    """A guest that is demoted when no program is left at its tap."""
    host.dp.mode = Mode.TAKEOVER
    with inside(host.net.host):
        host.dp.open_network()
        host.dp.step_out()
    client = Sniffer(host.net.client, "c0")
    before = host.dp.counters()["svm_out"]
    host.guest.send(tcp(b"alone"))
    assert client.wait(lambda f: b"alone" in f) is not None
    assert host.dp.counters()["svm_out"] == before, "no program was there"
    host.dp.mode = Mode.DROP
    with inside(host.net.host):
        host.dp.step_in()
        host.dp.step_in()
    fenced = host.dp.counters()["svm_out"]["drop_mode"][0]
    host.guest.send(tcp(b"silent"))
    deadline = time.monotonic() + 5
    while host.dp.counters()["svm_out"]["drop_mode"][0] == fenced and time.monotonic() < deadline:
        time.sleep(0.01)
    assert host.dp.counters()["svm_out"]["drop_mode"][0] == fenced + 1
    assert client.wait(lambda f: b"silent" in f, 0.2) is None
    client.close()


def pass_all(name: str) -> Path:
    """Pin an XDP program of somebody else that passes everything."""
    path = Path(f"/sys/fs/bpf/{own(name)}")
    path.unlink(missing_ok=True)
    code = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    fd = syscall.prog_load(6, code, "GPL", name)
    try:
        syscall.obj_pin(fd, str(path))
    finally:
        os.close(fd)
    return path


def test_xdp_is_replaced_and_taken_off_without_a_capability_to_open_it_by_number(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit has no CAP_SYS_ADMIN: what is attached is found among the pins."""

    def refused(prog_id: int) -> int:
        raise PermissionError(f"bpf prog {prog_id}")

    pins = Path(loader.pin_dir("/sys/fs/bpf", PAIR, "secondary"))
    with inside(host.net.host), monkeypatch.context() as m:
        m.setattr(syscall, "prog_fd_by_id", refused)
        first = devices.link_info("tap0").xdp_prog_id
        if host.vnet:
            assert first == 0
            return
        assert attach.is_ours(first, str(pins)) and not attach.is_ours(first)
        host.dp.close()
        # another release: its pins are not those of the one before
        for path in pins.glob("*_secondary_*"):
            path.unlink()
        host.dp = DataPath(config(tmp_path))
        second = devices.link_info("tap0").xdp_prog_id
        assert second not in (0, first) and not host.dp.look().trouble
        assert not (pins / "prog_xdp_new").exists()
        # a process that died between attaching and renaming
        (pins / "prog_xdp").rename(pins / "prog_xdp_new")
        assert attach.is_ours(second, str(pins))
        host.dp.step_out()
        assert devices.link_info("tap0").xdp_prog_id == 0
        host.dp.step_in()
        assert devices.link_info("tap0").xdp_prog_id == second


def test_refusals_name_the_device_and_the_reason(host: Host, tmp_path: Path) -> None:
    host.dp.close()
    host.guest.close()
    with inside(host.net.host):
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
        if host.vnet:
            with pytest.raises(DataPathError, match=r"hook = \"xdp\": tap tap0 has vnet_hdr"):
                DataPath(config(tmp_path, "xdp"))
        else:
            opts = Options(rewrite_at_xdp=True)
            other = loader.load("secondary", "else", "/sys/fs/bpf", opts)
            prog = other.programs["svm_out_xdp"]
            manifest = Manifest(tmp_path / "else")
            foreign = pass_all("foreign")
            sh("ip", "link", "set", "dev", "tap0", "xdpdrv", "pinned", str(foreign))
            there = devices.link_info("tap0").xdp_prog_id
            with pytest.raises(devices.DeviceError, match="is not ours"):
                attach.attach_xdp("tap0", prog, manifest)
            assert devices.link_info("tap0").xdp_prog_id == there and not attach.is_ours(there)
            assert not attach.detach_xdp("tap0")
            sh("ip", "link", "set", "dev", "tap0", "xdpdrv", "off")
            foreign.unlink()
            attach.attach_xdp("tap0", prog, manifest)
            assert devices.link_info("tap0").xdp_prog_id == prog.id
            assert devices.link_info("tap0").xdp_mode == "drv"
            attach.detach_all(tmp_path / "else")
            assert devices.link_info("tap0").xdp_prog_id == 0
            other.close()
            loader.remove_pins(loader.pin_dir("/sys/fs/bpf", "else", "secondary"))
        bridge.set_master("tap0", "br0")
        with pytest.raises(DataPathError, match="tap0 is in a bridge"):
            DataPath(config(tmp_path))
        sh("ip", "-n", host.net.host, "link", "del", "tap0")
        with pytest.raises(DataPathError, match="tap0 does not exist"):
            DataPath(config(tmp_path))
    host.guest = Tap("lo0", True)  # something to close
    host.dp = _Closed()  # type: ignore[assignment]


class _Closed:
    def close(self) -> None:
        pass


@pytest.mark.parametrize("host", [True], indirect=True, ids=["tc"])
def test_what_waited_for_a_checkpoint_goes_on_as_the_guest_handed_it_over(host: Host) -> None:
    """UFO as UFO and USO as USO; a checksum within a tunnel is complete; in both directions."""
    ufo = udp(bytes(range(250)) * 16, partial=True)
    inner = udp(b"within", partial=True)
    tunnel = udp(struct.pack("!II", 0x08000000, 7 << 8) + inner, dport=4789)
    whole = summed(tunnel, 50 + 34, 6)
    cases = [
        (ufo, struct.pack("<BBHHHH", 1, abi.Gso.UDP, 42, 1480, 34, 6), ufo),
        (ufo, struct.pack("<BBHHHH", 1, abi.Gso.UDP_L4, 42, 1400, 34, 6), ufo),
        (tunnel, struct.pack("<BBHHHH", 1, 0, 0, 0, 50 + 34, 6), whole),
    ]
    last = tcp(b"the end")

    def over_the_link() -> list[tuple[int, bytes]]:
        """Return (gso_size, frame) up to the last one; the link fragments UFO frames."""
        out = []
        for head, raw in host.peer.frames(5):
            if raw[6:12] == GUEST_MAC:
                if raw.endswith(last[14:]):
                    return out
                out.append((struct.unpack_from("<H", head, 4)[0], raw[16:]))
        raise AssertionError("the end has not come")

    for frame, head, after in cases:
        host.dp.mode = Mode.RUN
        host.guest.send(frame, head)
        host.guest.send(last)
        through = over_the_link()
        host.dp.mode = Mode.CHECKPOINT
        host.guest.send(frame, head)
        host.guest.send(last)
        got: list[CapturedFrame] = []
        end = time.monotonic() + 5
        while len(got) < 2 and time.monotonic() < end:
            select.select(host.dp.reader.fds, [], [], 0.05)
            host.dp.drain(got.append)
        assert got[0].frame == after
        assert (got[0].gso_type, got[0].partial) == (head[1], after is frame)
        for e in got:
            assert host.dp.injectors["forward"].send(e.frame, e.gso_size, e.partial, e.gso_type)
        held = over_the_link()
        assert held == (through if after is frame else [(0, whole[12:])])
    assert not host.dp.injectors["forward"].failed
