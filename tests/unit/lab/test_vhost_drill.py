# SPDX-License-Identifier: GPL-2.0-or-later
"""How the vhost drill judges, and that it refuses a machine without vhost."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import app
from colo_xdp.lab import vhost_drill
from colo_xdp.lab.capture import GUEST_MAC
from colo_xdp.lab.vhost_drill import (
    CHECKPOINTS,
    NOT_REACHED,
    Seen,
    Stops,
    counter,
    judge,
    late,
    missing,
    report,
    within,
)

GOOD = Seen(
    opened=(4, 4),
    moves=True,
    silent=(51, 51),
    frames=(1500, 1500),
    unsegmented=(36_000, 0),
    order=(0, 3000, 12),
    stopped={"PVM": (CHECKPOINTS, 0, 900), "SVM": (CHECKPOINTS, 0, 800)},
    checkpoints=CHECKPOINTS,
    leaked=0,
    after=(True, 300),
)


def failed(seen: Seen, **options: Any) -> list[str]:
    return [v.name for v in judge(seen, 4, **options) if not v.passed]


def test_what_is_expected_passes() -> None:
    assert failed(GOOD) == []
    assert len(judge(GOOD, 4)) == 11
    assert report(judge(GOOD, 4), lambda text: None) == vhost_drill.PASSED


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"opened": (4, 0)}, "both QEMUs use vhost"),
        ({"opened": (0, 0)}, "both QEMUs use vhost"),
        ({"moves": False}, "both QEMUs use vhost"),
        ({"silent": (51, 50)}, "a guest that may not transmit is silent (MODE_DROP)"),
        ({"silent": (0, 0)}, "a guest that may not transmit is silent (MODE_DROP)"),
        ({"frames": (1500, 1436)}, "our program sees each frame of the guest"),
        ({"frames": (0, 0)}, "our program sees each frame of the guest"),
        ({"unsegmented": (1500, 0)}, "offloads are carried"),
        ({"unsegmented": (36_000, 1)}, "offloads are carried"),
        ({"order": (1, 3000, 0)}, "frames of a connection come in order"),
        ({"order": (0, 0, 0)}, "frames of a connection come in order"),
        ({"checkpoints": 3}, "checkpoints carry what vhost has written"),
        ({"leaked": 1}, "no frame of the SVM leaves before the takeover"),
        ({"error": "protect: LabError: no state protected"}, "the drill came to its end"),
    ],
)
def test_each_fault_fails_by_its_name(change: dict[str, Any], name: str) -> None:
    assert failed(replace(GOOD, **change)) == [name]


@pytest.mark.parametrize("who", ["PVM", "SVM"])
@pytest.mark.parametrize(
    "found", [(CHECKPOINTS, 1, 900), (CHECKPOINTS, 0, 0), (CHECKPOINTS, 0, -1), (2, 0, 900)]
)
def test_a_guest_that_sends_while_it_is_stopped(who: str, found: tuple[int, int, int]) -> None:
    """Or a witness that has seen nothing, or not all."""
    seen = replace(GOOD, stopped=GOOD.stopped | {who: found})
    assert failed(seen) == [f"a stopped {who} sends nothing"]


def test_a_wrong_byte_is_no_success_of_anything() -> None:
    assert len(failed(replace(GOOD, wrong=["3 bytes of big, of 8388608"]))) == 2
    assert len(failed(replace(GOOD, after=(False, 300)))) == 1
    assert len(failed(replace(GOOD, after=(True, 0)))) == 1, "the capture has seen nothing"


def test_a_qemu_that_does_not_say_is_believed_by_what_it_has_open() -> None:
    assert failed(replace(GOOD, moves=None)) == []


def test_zero_copy_fails() -> None:
    assert failed(GOOD, zero_copy=True) == ["no frame is sent from the guest's own memory"]


def test_what_was_not_reached_fails() -> None:
    found = judge(Seen(error="start: LabError: QEMU ended"), 1)
    assert [v.text for v in found if not v.passed][:-1] == [NOT_REACHED] * 10
    lines: list[str] = []
    assert report(found, lines.append) == vhost_drill.FAILED
    assert lines[0] == f"FAIL  both QEMUs use vhost: {NOT_REACHED}"
    assert lines[-1].startswith("11 of 12 ")


def test_the_control_asks_nothing_of_vhost() -> None:
    assert failed(replace(GOOD, opened=(0, 0), moves=None), control=True, zero_copy=True) == []


def segment(seq: int, ack: int = 1, size: int = 100) -> bytes:
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + size, ack, 0, 64, 6, 0, b"abcd", b"efgh")
    tcp = struct.pack("!HHIIBBHHH", 80, 40_000, seq, ack, 0x50, 0x10, ack, ack, 0)
    return bytes(6) + GUEST_MAC + b"\x08\x00" + ip + tcp + bytes(size)


def test_frames_within_a_stop() -> None:
    spans = [(10.0, 11.0), (20.0, 21.0)]
    arp = bytes(6) + GUEST_MAC + b"\x08\x06" + bytes(28)
    frames = [
        (9.9, segment(1)), (10.5, segment(100)), (11.5, segment(200)), (20.1, arp),
        (20.2, bytes(12) + b"\x08\x06" + bytes(28)),  # of another machine
        (21.0, segment(300)),
    ]  # fmt: skip
    assert within(frames, spans) == 2
    assert within(frames, []) == 0
    again = [(9.0, segment(1, ack=5)), (10.5, segment(1, ack=4)), (10.6, segment(7, ack=4))]
    assert within(again, spans) == 2
    assert within(again, spans, again=True) == 1, "one had been held, and was released"


def test_late_segments_fill_a_gap() -> None:
    def of(*seqs: int, size: int = 100) -> list[tuple[float, bytes]]:
        return [(float(i), segment(seq % 2**32, size=size)) for i, seq in enumerate(seqs)]

    assert late(of(1, 101, 201)) == (0, 3)
    assert late(of(1, 101, 1, 101, 201)) == (0, 5), "retransmissions, or released again"
    assert late(of(1, 201, 101, 301)) == (1, 4)
    assert late(of(1, 301, 101, 201, 401)) == (2, 5)
    assert late(of(-150, -50, 50, -50)) == (0, 4), "the numbers wrap around"
    assert late(of(-150, 50, -50, 150)) == (1, 4)
    assert late(of(1, 201, size=0)) == (0, 0), "acks"
    foreign = (9.0, bytes(12) + segment(101)[12:])
    assert late([*of(1, 201), foreign]) == (0, 2)


def test_stops_are_qemus_own_times() -> None:
    stops = Stops.__new__(Stops)
    stops.spans, stops._since = [], None

    def event(name: str, seconds: int, us: int) -> dict[str, Any]:
        return {"event": name, "timestamp": {"seconds": seconds, "microseconds": us}}

    for e in (
        {"return": {}}, event("RESUME", 1, 0), event("STOP", 2, 500_000),
        event("RESET", 2, 600_000), event("RESUME", 3, 0), event("STOP", 4, 0),
    ):  # fmt: skip
        stops.event(e)
    assert stops.spans == [(2.5, 3.0)]


def test_counters_by_name() -> None:
    text = "TcpExt: A TCPOFOQueue\nTcpExt: 1 7\nTcp: InSegs OutSegs\nTcp: 9 8\n"
    assert counter(text, "TcpExt", "TCPOFOQueue") == 7
    assert counter(text, "Tcp", "InSegs") == 9


def test_a_machine_without_vhost_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    device = str(tmp_path / "vhost-net")
    assert missing(device=device).startswith(f"cannot run here: {device} missing")
    assert missing(control=True, device=device) == ""
    Path(device).touch()
    assert missing(device=device) == ""
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert "not root" in missing(device=device)
    monkeypatch.setattr(vhost_drill, "missing", lambda control: "cannot run here: none")
    r = CliRunner().invoke(app, ["vhost-drill", "--dir", str(tmp_path)])
    assert (r.exit_code, r.output) == (2, "cannot run here: none\n")
