# SPDX-License-Identifier: GPL-2.0-or-later
"""The witness of chaos names the frame that brought a wrong byte, and the guest that sent it."""

from __future__ import annotations

import struct
from datetime import datetime

from colo_xdp.lab.capture import GUEST_MAC
from tests.e2e.evidence import Wrong, explain, frames, modes

AT = datetime(2026, 11, 28, 12, 0, 0).timestamp()
WANT, BAD = b"the right bytes of the page", b"the wrOng bytes of the page"
ISN_P, ISN_S = 1000, 777_000


def frame(seq: int, flags: int, data: bytes, *, epoch: int = -1, v6: bool = False) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", 80, 4000, seq, 55, 5 << 4, flags, 100, 0, 0) + data
    if v6:
        ip = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + bytes(32)
    else:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + bytes(8)
    tag = struct.pack("!HH", 0x88A8, 2 << 13 | epoch) if epoch >= 0 else b""
    return bytes(6) + GUEST_MAC + tag + (b"\x86\xdd" if v6 else b"\x08\x00") + ip + tcp


def pcap(*timed: tuple[float, bytes]) -> bytes:
    out = bytearray(24)
    for at, f in timed:
        s = int(AT + at)
        out += struct.pack("<IIII", s, round((AT + at - s) * 1e9), len(f), len(f)) + f
    return bytes(out)


def story(position: int | None, *, v6: bool = False) -> list[str]:
    at = WANT.index(b"i", 5)
    synack = frame(ISN_P, 0x12, b"", v6=v6)
    captures = [
        ("client primary", pcap((0.0, synack), (0.2, frame(ISN_P + 1, 0x18, BAD, v6=v6)))),
        ("client secondary", pcap()),
        ("tap primary", pcap((0.1, frame(ISN_P + 1, 0x18, BAD, v6=v6)))),
        ("tap secondary", pcap((0.1, frame(ISN_S + 1, 0x18, WANT, v6=v6)))),
        ("peer primary", pcap((0.15, frame(ISN_P + 1, 0x18, WANT, epoch=7, v6=v6)))),
    ]
    log = (
        "2026-11-28 11:59:59,100 DEBUG colo_xdp.datapath.datapath: data path: RUN, epoch 7\n"
        "2026-11-28 12:00:00,150 DEBUG colo_xdp.datapath.datapath: data path: BYPASS, epoch 8\n"
        "2026-11-28 12:00:09,000 DEBUG colo_xdp.datapath.datapath: data path: RUN, epoch 9\n"
    )
    w = Wrong("page", AT + 0.25, 80, 4000, BAD[at:], WANT[at:], position)
    return explain(captures, {"primary": log}, w)


def test_by_place_in_the_stream() -> None:
    for v6 in (False, True):
        told = story(WANT.index(b"i", 5), v6=v6)
        assert "from the primary host's guest" in told[1] and f"seq {ISN_P + 1}" in told[1]
        assert told[2] == "primary: BYPASS, epoch 8"
        where = [line.split(" seq")[0].split(" ", 1)[1].strip() for line in told[3:]]
        assert where == ["tap primary", "tap secondary", "peer primary", "client primary"]
        assert "WRONG" in told[3] and "right" in told[4]
        assert "epoch tag 7: right" in told[5] and "WRONG" in told[6]


def test_by_content_when_the_handshake_was_not_captured() -> None:
    assert "from the primary host's guest" in story(None)[1]


def test_a_connection_that_no_capture_has() -> None:
    w = Wrong("page", AT, 80, 4001, BAD, WANT, 3)
    assert "no capture" in explain([("client primary", pcap((0.0, frame(1, 2, b""))))], {}, w)[1]


def test_a_capture_that_was_cut_is_read_to_its_last_whole_frame() -> None:
    raw = pcap((0.0, frame(1, 2, b"")), (0.5, frame(2, 2, b"")))
    assert len(list(frames(raw[:-3]))) == 1 and len(list(frames(raw))) == 2


def test_modes_are_read_from_the_log() -> None:
    log = "2026-11-28 12:00:01,250 DEBUG colo_xdp.datapath.datapath: data path: DROP, epoch 3\n"
    assert modes(log) == [(AT + 1.25, "DROP, epoch 3")]
