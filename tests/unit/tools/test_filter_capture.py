# SPDX-License-Identifier: GPL-2.0-or-later
"""Capturing from a filter's socket: what is written, and how it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.colo_proxy.packet_stream import StreamPacket, encode
from colo_xdp.tools.corpus import craft
from colo_xdp.tools.filter_capture import FilterCaptured, FilterCaptureError, capture
from colo_xdp.tools.pcap import read
from colo_xdp.tools.replay import ReplayOptions, replay

FRAMES = [bytes([n]) * (60 + n) for n in range(50)]


def stream(frames: list[bytes], header: int = 12) -> bytes:
    return b"".join(encode(StreamPacket(bytes(header) + f, header), vnet_hdr=True) for f in frames)


class Filter:
    """A chardev that sends some bytes to whoever connects, and closes unless it is told to stay."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.stays = path, b"", False
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            s, _ = self.listener.accept()
        except OSError:
            return
        with s:
            s.sendall(self.data)
            if self.stays:
                self.over.wait(10)

    def close(self) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Filter]:
    f = Filter(tmp_path / "m")
    yield f
    f.close()


def run(
    qemu: Filter, *, seconds: float = 10, max_bytes: int = 1 << 20, vnet_hdr: bool = True
) -> FilterCaptured:
    file = qemu.path.with_name("f.pcapng")
    return capture(
        qemu.path, file, guest="svm", vnet_hdr=vnet_hdr, seconds=seconds, max_bytes=max_bytes
    )


def written(qemu: Filter) -> list[bytes]:
    return [r.data for r in read(qemu.path.with_name("f.pcapng"))]


def test_frames_are_written_without_their_virtio_net_headers(qemu: Filter) -> None:
    qemu.data = stream(FRAMES)
    done = run(qemu)
    assert (done.frames, done.octets) == (len(FRAMES), sum(map(len, FRAMES)))
    assert done.ended == "QEMU has closed the socket"
    assert written(qemu) == FRAMES


def test_it_ends_in_time(qemu: Filter) -> None:
    qemu.data, qemu.stays = stream(FRAMES), True
    assert run(qemu, seconds=0.2).ended == "time is over"
    assert written(qemu) == FRAMES


def test_it_ends_at_the_files_limit(qemu: Filter) -> None:
    qemu.data, qemu.stays = stream(FRAMES), True
    done = run(qemu, max_bytes=200)
    assert done.ended == "the file's limit is reached"
    assert written(qemu) == FRAMES[:3] and done.frames == 3


def test_what_came_before_a_broken_packet_is_kept(qemu: Filter) -> None:
    qemu.data = stream(FRAMES[:2]) + b"\xff" * 8
    assert "a packet of 4294967295 bytes" in run(qemu).ended
    assert written(qemu) == FRAMES[:2]


def test_an_end_within_a_packet_is_named(qemu: Filter) -> None:
    qemu.data = stream(FRAMES[:2])[:-1]
    assert "ended" in run(qemu).ended
    assert written(qemu) == FRAMES[:1]


def test_the_wrong_vnet_hdr_leaves_no_file(qemu: Filter) -> None:
    qemu.data = b"".join(encode(StreamPacket(f), vnet_hdr=False) for f in FRAMES[9:])
    with pytest.raises(FilterCaptureError, match="no frame came .*virtio-net header"):
        run(qemu)
    assert not list(qemu.path.parent.glob("*pcap*"))


def test_nothing_to_read(qemu: Filter, tmp_path: Path) -> None:
    with pytest.raises(FilterCaptureError, match="no frame came .QEMU has closed the socket"):
        run(qemu)
    with pytest.raises(FilterCaptureError, match="No such file"):
        capture(tmp_path / "no", tmp_path / "f", guest="pvm", vnet_hdr=True, seconds=1, max_bytes=1)


def test_two_captures_of_output_alone_can_be_replayed(tmp_path: Path) -> None:
    """Nothing but what the guests sent, one of them with another answer at the end."""
    both: list[list[tuple[int, bytes]]] = []
    for guest, last in (("pvm", "one"), ("svm", "two")):
        f = Filter(tmp_path / guest)
        f.data = stream([craft.build(craft.spec(f"udp '{x}'")) for x in ("a", "b", "c", last)])
        file = tmp_path / f"{guest}.pcapng"
        try:
            capture(f.path, file, guest=guest, vnet_hdr=True, seconds=5, max_bytes=1 << 20)
        finally:
            f.close()
        both.append([(r.ts_ns, r.data) for r in read(file)])
    report = replay(both[0], both[1], ReplayOptions(), b"").report()
    assert [d["cause"] for d in report["differences"]] == ["datagram_differs"]
