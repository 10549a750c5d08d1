# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how released frames are found again in the captures of both guests."""

from __future__ import annotations

import struct

import pytest

from tests.bench.apps.lateness import Data, data, lateness

GUEST, CLIENT = bytes((10, 9, 0, 2)), bytes((10, 9, 0, 1))
FLOW = (CLIENT, struct.pack(">HH", 80, 4000))


def frame(seq: int, size: int, *, source: bytes = GUEST, tag: bytes = b"") -> bytes:
    tcp = struct.pack(">HHIIBBHHH", 80, 4000, seq, 0, 8 << 4, 0x18, 100, 0, 0) + bytes(12)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + 32 + size, 1, 0, 64, 6, 0) + source + CLIENT
    return bytes(12) + tag + b"\x08\x00" + ip + tcp  # only the head of the frame is captured


def test_data_is_read_from_the_heads_of_frames() -> None:
    tagged = frame(7, 60_000, tag=b"\x88\xa8\x20\x01")
    frames = [
        (1.0, frame(5, 0)),  # an ack
        (2.0, tagged),
        (3.0, frame(5, 9, source=CLIENT)),
        (4.0, bytes(12) + b"\x08\x06" + bytes(28)),
    ]
    assert list(data(frames, GUEST)) == [Data(2.0, FLOW, 7, 60_000)]


def sent(*parts: tuple[float, int, int]) -> list[Data]:
    return [Data(at, FLOW, seq % (1 << 32), size) for at, seq, size in parts]


def test_what_counts_is_the_later_guest_s_last_byte() -> None:
    start = (1 << 32) - 150  # the numbers wrap
    pvm = sent((1.0, start, 100), (1.1, start + 100, 100), (3.0, start + 200, 50))
    svm = sent((2.0, start, 150), (2.5, start + 150, 50), (2.6, start + 200, 50))
    released = sent(
        (2.001, start, 100),  # waited for the SVM
        (2.503, start + 100, 100),  # for its second segment
        (2.9, start + 100, 100),  # a repetition
        (3.004, start + 200, 50),  # waited for the PVM
    )
    assert lateness(pvm, svm, released) == pytest.approx([0.001, 0.003, 0.004])


def test_what_a_checkpoint_has_released_does_not_count() -> None:
    pvm = sent((1.0, 0, 100), (2.0, 100, 100))
    assert lateness(pvm, sent((5.0, 0, 100)), sent((1.5, 0, 100), (2.1, 100, 100))) == []
    assert lateness(pvm, [], sent((1.5, 0, 100))) == []
