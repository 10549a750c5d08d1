# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the primary host's programs on real devices: what leaves, what does not, what is punted."""

from __future__ import annotations

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
from colo_xdp.datapath import attach, devices
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.inject import vnet_header
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.net.flow_key import unmirrored_key
from colo_xdp.net.packet import Kind, parse
from colo_xdp.tools import cleanup
from tests.netns.conftest import Net, Sniffer, Tap, inside, own, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC, tcp, udp

PAIR = own("nst")


def config(tmp_path: Path, **datapath: object) -> Config:
    extra = "\n".join(f"{k} = {v!r}".replace("'", '"') for k, v in datapath.items())
    path = tmp_path / "pair.toml"
    path.write_text(
        f"""
        pair = "{PAIR}"
        role = "primary"
        [network]
        tap = "tap0"
        peer_link = "peer0"
        [qemu]
        qmp = "/nonexistent"
        migrate_uri = "unix:/nonexistent"
        [peer]
        local = "127.0.0.1:1"
        remote = "127.0.0.1:2"
        [datapath]
        run_dir = "{tmp_path}"
        ring_pages = 1024
        {extra}
        [metrics]
        listen = ""
        """
    )
    return load(path)


@pytest.fixture
def path(net: Net, tmp_path: Path) -> Iterator[DataPath]:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path))
    yield dp
    dp.close()
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


@pytest.fixture
def guest(net: Net) -> Iterator[Tap]:
    tap = Tap("tap0")
    yield tap
    tap.close()


def events(dp: DataPath, n: int = 1, timeout: float = 2.0) -> list[CapturedFrame]:
    got: list[CapturedFrame] = []
    end = time.monotonic() + timeout
    while len(got) < n and (left := end - time.monotonic()) > 0:
        select.select(dp.reader.fds, [], [], min(left, 0.05))
        dp.drain(got.append)
    return got


def ours(frame: bytes) -> bool:
    return frame[6:12] == GUEST_MAC and frame[12:14] != b"\x08\x06"


def count(dp: DataPath, prog: str, reason: str) -> int:
    return dp.counters()[prog][reason][0]


def from_client(net: Net, frame: bytes) -> None:
    with inside(net.client), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("c0", 0))
        s.send(frame)


def from_other(net: Net, frame: bytes) -> None:
    with inside(net.other), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("peer0", 0))
        s.send(frame)


def tag(kind: int, epoch: int, frame: bytes) -> bytes:
    return frame[:12] + struct.pack("!HH", abi.TPID, kind << 13 | epoch & 4095) + frame[12:]


def test_bypass_passes_and_mirrors_nothing(net: Net, path: DataPath, guest: Tap) -> None:
    path.mode = Mode.BYPASS
    seen, peer = Sniffer(net.client, "c0"), Sniffer(net.other, "peer0")
    guest.send(tcp(b"hello"))
    assert seen.wait(ours)
    from_client(net, tcp(b"to guest", reverse=True))
    assert guest.recv(lambda f: f[6:12] == CLIENT_MAC)
    assert peer.wait(lambda f: f[6:12] == CLIENT_MAC, timeout=0.2) is None
    assert count(path, "pvm_out", "pass") >= 1


def test_output_is_held_and_released_as_it_was(net: Net, path: DataPath, guest: Tap) -> None:
    """Small, 64 KiB GSO with partial checksum, v4 and v6, VLAN-tagged: nothing leaves by itself.

    What is released arrives with its offload state.
    """
    path.mode = Mode.RUN
    seen = Sniffer(net.client, "c0")
    cases = [
        (tcp(b"full checksum"), 0, False),
        (tcp(b"x" * 1448, partial=True), 0, True),
        (tcp(bytes(range(256)) * 234, partial=True), 1448, True),
        (tcp(bytes(range(256)) * 234, partial=True, v6=True), 1428, True),
        (udp(b"datagram"), 0, False),
        (udp(b"datagram", partial=True), 0, True),
        (tcp(b"tagged", vlan=7), 0, False),
        (tcp(b"y" * 4000, vlan=7, partial=True), 1448, True),
    ]
    for frame, gso, partial in cases:
        guest.send(frame, vnet_header(frame, gso, partial))
    got = [e for e in events(path, len(cases)) if ours(e.frame)]
    assert [(e.frame, e.gso_size, e.partial) for e in got] == cases
    assert seen.wait(ours, timeout=0.2) is None
    assert all(e.source == abi.Source.PVM for e in got)
    assert [e.ts_ns for e in got] == sorted(e.ts_ns for e in got)
    for e in got:
        assert path.injectors["release"].send(e.frame, e.gso_size, e.partial, e.gso_type)
    for frame, gso, partial in cases:
        out = seen.wait(ours)
        assert out is not None
        head, arrived = out
        flags, _typ, _hl, size, _s, _o = struct.unpack("<BBHHHH", head)
        assert arrived == frame
        assert (size, flags & 1) == (gso, int(partial))
    # Learned on the guest's port, so that the switch sends the guest's frames there.
    fdb = sh("bridge", "-n", net.host, "fdb", "show", "dev", "tap0")
    assert GUEST_MAC.hex(":") in fdb
    assert count(path, "pvm_out", "punt") == len(cases)
    assert count(path, "pvm_out", "pass_released") == len(cases)
    assert not path.injectors["release"].failed


def test_mirror_carries_kind_and_epoch(net: Net, path: DataPath, guest: Tap) -> None:
    path.epoch = 4097 + 5
    path.mode = Mode.RUN
    peer = Sniffer(net.other, "peer0")
    for frame in (tcp(b"req", reverse=True), tcp(b"tagged", reverse=True, vlan=9)):
        from_client(net, frame)
        assert guest.recv(lambda f, want=frame: f == want), "the PVM sees the frame unchanged"
        got = peer.wait(lambda f: CLIENT_MAC in f[6:12])
        assert got is not None
        assert got[1] == tag(abi.KIND_MIRROR, 6, frame)
    assert count(path, "pvm_in", "pass_mirrored") >= 2


def test_drop_secondary_keeps_a_flow_from_the_svm_and_no_other(
    net: Net, path: DataPath, guest: Tap
) -> None:
    path.mode = Mode.RUN
    peer = Sniffer(net.other, "peer0")
    dns = udp(b"answer")
    asked = dns[6:12] + dns[:6] + dns[12:26] + dns[30:34] + dns[26:30] + dns[36:38] + dns[34:36]
    flows = [
        (tcp(b"a"), tcp(b"a", reverse=True)),
        (tcp(b"b", v6=True), tcp(b"b", reverse=True, v6=True)),
        (tcp(b"c", vlan=9), tcp(b"c", reverse=True, vlan=9)),
        (dns, asked + dns[38:]),
    ]
    for out, _ in flows:
        p = parse(out)
        key = unmirrored_key(p.key, p.kind is Kind.TCP)
        assert key is not None
        path.unmirror(key)
    last = tcp(b"last", reverse=True, vlan=8)
    for frame in (*(back for _, back in flows), last):
        from_client(net, frame)
        assert guest.recv(lambda f, want=frame: f == want), "the PVM gets all of them"
    got = peer.wait(lambda f: CLIENT_MAC in f[6:12])
    assert got is not None and got[1].endswith(last[16:])  # the first one of ours that is there
    assert count(path, "pvm_in", "pass_unmirrored") == len(flows)
    path.unmirror(None)
    for _, frame in flows:
        from_client(net, frame)
        assert peer.wait(lambda f, want=frame: f.endswith(want[16:])) is not None


def test_svm_output_is_captured_with_its_epoch_and_reaches_nobody(
    net: Net, path: DataPath, guest: Tap
) -> None:
    path.mode = Mode.RUN
    seen = Sniffer(net.client, "c0")
    up = Sniffer(net.host, "br0")
    frame = tcp(b"svm says")
    from_other(net, tag(abi.KIND_SVM, 77, frame))
    from_other(net, tag(abi.KIND_SVM, 78, tcp(b"svm tagged", vlan=5)))
    from_other(net, tag(abi.KIND_MIRROR, 77, tcp(b"wrong way")))
    from_other(net, tcp(b"untagged"))
    got = events(path, 2)
    assert [(e.source, e.epoch, e.frame) for e in got] == [
        (abi.Source.SVM, 77, frame),
        (abi.Source.SVM, 78, tcp(b"svm tagged", vlan=5)),
    ]
    assert seen.wait(ours, timeout=0.2) is None
    assert up.wait(ours, timeout=0.1) is None
    assert count(path, "svm_arrival", "drop_isolated") == 1
    assert count(path, "svm_arrival", "pass_foreign") >= 1


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.DROP])
def test_a_primary_without_a_copy_takes_nothing_from_the_peer_link(
    net: Net, path: DataPath, guest: Tap, mode: Mode
) -> None:
    """Also one that was promoted: neither the guest nor its clients get what somebody injects."""
    path.mode = mode
    seen = Sniffer(net.client, "c0")
    from_other(net, tag(abi.KIND_SVM, 0, tcp(b"not its own")))
    from_other(net, tag(abi.KIND_MIRROR, 0, tcp(b"no client", reverse=True)))
    from_other(net, tag(abi.KIND_SYN, 0, tcp(flags=2)))
    assert guest.recv(lambda f: b"no client" in f, 0.3) is None
    assert seen.wait(ours, timeout=0.1) is None
    assert events(path, 1, timeout=0.1) == []
    assert count(path, "svm_arrival", "drop_mode") == 1
    assert count(path, "svm_arrival", "drop_isolated") == 2


def test_drop_shuts_everything(net: Net, path: DataPath, guest: Tap) -> None:
    path.mode = Mode.DROP
    seen = Sniffer(net.client, "c0")
    guest.send(tcp(b"dead men tell no tales"))
    from_other(net, tag(abi.KIND_SVM, 0, tcp(b"late")))
    assert seen.wait(ours, timeout=0.2) is None
    assert events(path, 1, timeout=0.1) == []
    assert count(path, "pvm_out", "drop_mode") == 1
    assert count(path, "svm_arrival", "drop_mode") == 1


def test_full_ring_is_counted_and_nothing_passes(net: Net, path: DataPath, guest: Tap) -> None:
    path.mode = Mode.RUN
    seen = Sniffer(net.client, "c0")
    before = path.lost_events()
    big = tcp(b"z" * 60000, partial=True)
    n = path.reader.capacity // len(big) + 20
    for _ in range(n):
        guest.send(big, vnet_header(big, 1448, True))
    lost = path.lost_events() - before
    assert lost > 0
    assert count(path, "pvm_out", "drop_ring_full") == lost
    assert len(events(path, n - lost)) == n - lost
    assert seen.wait(ours, timeout=0.1) is None


@pytest.mark.parametrize("policy", ["hold", "release"])
def test_without_a_controller_the_policy_decides(
    net: Net, tmp_path: Path, guest: Tap, policy: str
) -> None:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path, on_controller_loss=policy, controller_loss=300))
    try:
        dp.mode = Mode.RUN
        seen = Sniffer(net.client, "c0")
        dp.beat()
        guest.send(tcp(b"while it lives"))
        assert len(events(dp, 1)) == 1
        end = time.monotonic() + 0.4
        while time.monotonic() < end:  # the controller is silent for longer than controller_loss
            select.select([], [], [], 0.05)
        guest.send(tcp(b"after it"))
        arrived = seen.wait(ours, timeout=0.5)
        reason = "pass_controller_lost" if policy == "release" else "drop_controller_lost"
        assert (arrived is not None) == (policy == "release")
        assert count(dp, "pvm_out", reason) == 1
        dp.beat()
        guest.send(tcp(b"it is back"))
        assert len(events(dp, 1)) == 1
    finally:
        dp.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


def test_next_controller_adopts(net: Net, tmp_path: Path, guest: Tap) -> None:
    """Mode, epoch and counters persist; at no moment does a frame meet no program."""
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    first = DataPath(config(tmp_path))
    first.mode, first.epoch = Mode.RUN, 41
    seen = Sniffer(net.client, "c0")
    guest.send(tcp(b"one"))
    first.close()
    guest.send(tcp(b"between"))
    second = DataPath(config(tmp_path))
    try:
        assert second.adopted and second.mode is Mode.RUN and second.epoch == 41
        assert second.objects.warm, "nothing was compiled"
        guest.send(tcp(b"two"))
        assert [e.frame[-3:] for e in events(second, 3)] == [b"one", b"een", b"two"]
        assert seen.wait(ours, timeout=0.2) is None
        assert count(second, "pvm_out", "punt") == 3
    finally:
        second.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


def test_perf_buffers_do_the_same(net: Net, tmp_path: Path, guest: Tap) -> None:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path, events="perf"))
    try:
        dp.mode = Mode.RUN
        cases = [(tcp(b"a" * 100), 0, False), (tcp(b"b" * 60000, partial=True), 1448, True)]
        for frame, gso, partial in cases:
            guest.send(frame, vnet_header(frame, gso, partial))
        got = events(dp, 2)
        assert [(e.frame, e.gso_size, e.partial) for e in got] == cases
        big = tcp(b"c" * 65450, partial=True)
        guest.send(big, vnet_header(big, 1448, True))
        assert events(dp, 1, timeout=0.1) == []
        assert count(dp, "pvm_out", "drop_too_large") == 1, "counted, never corrupted"
    finally:
        dp.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


def foreign(monkeypatch: pytest.MonkeyPatch, dp: DataPath, dev: str, direction: str) -> None:
    """Attach a filter that is not ours, as another tool would."""
    with monkeypatch.context() as m:
        m.setattr(attach, "LABEL", "somebody")
        attach.attach_tc(dev, direction, dp.objects.programs["pvm_release"], "else", None)


def test_cleanup_leaves_no_trace_and_nothing_of_others(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path))
    foreign(monkeypatch, dp, "peer0", "egress")
    dp.close()
    gone = cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    assert any("pvm_out" in line for line in gone)
    assert "clsact" not in sh("tc", "qdisc", "show", "dev", "tap0")
    assert "somebody:else" in sh("tc", "filter", "show", "dev", "peer0", "egress")
    assert sh("tc", "filter", "show", "dev", "peer0", "ingress").strip() == ""
    assert not Path(f"/sys/fs/bpf/colo-xdp/{PAIR}-primary").exists()
    assert cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path)) == []


def test_a_filter_of_somebody_else_is_reported(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    dp = DataPath(config(tmp_path))
    try:
        attach.detach_tc("tap0", "ingress", attach.label(PAIR, "pvm_out"))
        foreign(monkeypatch, dp, "tap0", "ingress")
        dp.close()
        with pytest.raises(devices.DeviceError, match="somebody else.*somebody:else"):
            DataPath(config(tmp_path))
        assert "somebody:else" in sh("tc", "filter", "show", "dev", "tap0", "ingress")
    finally:
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


def test_a_syn_of_the_pvm_is_told_to_the_secondary(net: Net, path: DataPath, guest: Tap) -> None:
    """When it is sent and as it leaves; what is held and what leaves is as the guest sent it."""
    peer, seen = Sniffer(net.other, "peer0"), Sniffer(net.client, "c0")
    path.epoch = 9
    for flags, vlan, mode in ((0x12, 0, Mode.RUN), (0x02, 7, Mode.CHECKPOINT)):
        path.mode = mode
        frame = tcp(b"", flags=flags, vlan=vlan, options=b"\2\4\5\xb4")
        copy = tag(abi.KIND_SYN, 9, frame)
        guest.send(frame)
        got = peer.wait(lambda f, copy=copy: f == copy)  # type: ignore[misc]
        assert got is not None
        (event,) = (e for e in events(path, 1) if ours(e.frame))
        assert event.frame == frame
        assert path.injectors["release"].send(event.frame, event.gso_size, event.partial)
        assert peer.wait(lambda f, copy=copy: f == copy) is not None  # type: ignore[misc]
        out = seen.wait(ours)
        assert out is not None and out[1] == frame
    path.mode = Mode.RUN
    for flags in (0x10, 0x14, 0x04, 0x06):
        guest.send(tcp(b"", flags=flags))
    path.mode = Mode.BYPASS
    guest.send(tcp(b"", flags=0x12))
    assert peer.wait(lambda f: ours(f[:12] + f[16:]), 0.2) is None
    peer.close()
    seen.close()


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("lead", [b"", b"\1", b"\1\1", b"\2\4\5\xb4\1\3\3\7\4\2"])
def test_no_client_offers_mptcp(
    net: Net, path: DataPath, guest: Tap, lead: bytes, v6: bool
) -> None:
    """MP_CAPABLE becomes NOPs, at even and odd offsets, for the guest and for its mirror."""
    path.mode = Mode.RUN
    peer = Sniffer(net.other, "peer0")
    capable = (b"\x1e\x04\x01\x81", b"\x1e\x0c\x01\x81" + bytes(range(200, 208)))
    for option, flags in ((capable[0], 0x02), (capable[1], 0x12), (capable[1], 0x02)):
        head = lead + option
        end = b"\1" * (-len(head) % 4)
        kept = tcp(flags=flags, reverse=True, v6=v6, options=head + end)
        plain = tcp(flags=flags, reverse=True, v6=v6, options=lead + b"\1" * len(option) + end)
        before = count(path, "pvm_in", "note_mptcp_removed")
        from_client(net, kept)
        assert guest.recv(lambda f, want=plain: f == want) is not None  # type: ignore[misc]
        want = tag(abi.KIND_MIRROR, path.epoch, plain)
        assert peer.wait(lambda f, want=want: f == want) is not None  # type: ignore[misc]
        assert count(path, "pvm_in", "note_mptcp_removed") == before + 1
    join = b"\x1e\x0c\x10\x01" + bytes(8)
    for option, flags, mode in (
        (join, 0x02, Mode.RUN),  # to the guest, which may or may not have the token
        (capable[0], 0x10, Mode.RUN),
        (capable[0], 0x02, Mode.BYPASS),  # what a guest agrees to alone, its copy has too
    ):
        path.mode = mode
        head = lead + option
        options = head + b"\1" * (-len(head) % 4)
        kept = tcp(flags=flags, reverse=True, v6=v6, options=options)
        from_client(net, kept)
        assert guest.recv(lambda f, want=kept: f == want) is not None  # type: ignore[misc]
    assert count(path, "pvm_in", "note_mptcp_removed") == 3
    peer.close()
