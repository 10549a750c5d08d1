# SPDX-License-Identifier: GPL-2.0-or-later
"""What the secondary has in hand: who gets it, and what is void."""

from __future__ import annotations

import pytest

from colo_xdp.abi import Source
from colo_xdp.controller.held_frames import HeldFrames
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.qemu.events import QmpEvent


class Wires:
    """Where frames go; `transmits`: the guest does for itself."""

    def __init__(self, limit: int = 3) -> None:
        self.to_svm: list[bytes] = []
        self.out: list[bytes] = []
        self.transmits = False
        self.held = HeldFrames(
            lambda e: self.to_svm.append(e.frame),
            lambda e: self.out.append(e.frame),
            lambda: self.transmits,
            limit,
        )

    def client(self, ts: int) -> None:
        self.held.from_client(CapturedFrame(Source.CLIENT, ts, 7, b"c%d" % ts, 0, False))

    def svm(self, ts: int) -> None:
        self.held.from_svm(CapturedFrame(Source.SVM, ts, 7, b"s%d" % ts, 0, False))


def resume(ts: int, seen: int | None = None) -> QmpEvent:
    return QmpEvent("RESUME", {}, ts, ts if seen is None else seen)


def test_nothing_is_held_without_a_checkpoint() -> None:
    w = Wires()
    w.client(1)
    w.svm(2)
    assert (w.to_svm, w.out, w.held.count) == ([b"c1"], [b"s2"], 0)


def test_what_was_sent_before_the_resume_is_void_and_clients_frames_wait_for_it() -> None:
    w = Wires()
    w.held.begin(8, 10, 100.0, planned=False)
    for ts in (11, 20):
        w.svm(ts)
    w.client(12)
    assert (w.to_svm, w.out, w.held.count) == ([], [], 3)
    h = w.held.take()
    assert h is not None and w.held.count == 0
    w.held.resumed(h, resume(15))
    w.held.let_go(h)
    assert (w.to_svm, w.out, w.held.stale) == ([b"c12"], [b"s20"], 1)


@pytest.mark.parametrize("ts", [5, 70])
def test_a_resume_with_an_impossible_time_voids_more_not_less(ts: int) -> None:
    w = Wires()
    w.held.begin(8, 10, 100.0, planned=False)
    h = w.held.take()
    assert h is not None
    w.held.resumed(h, resume(ts, seen=60))
    assert w.held.resume_ns == 60


def test_a_checkpoint_that_is_asked_for_again_keeps_what_is_held() -> None:
    w = Wires()
    w.held.begin(8, 10, 100.0, planned=True)
    w.client(11)
    assert w.held.hold is not None
    w.held.hold.stop_ns, w.held.hold.resume, w.held.hold.stopped = 12, resume(13), True
    assert w.held.hold.pause_ms == 1e-6
    w.held.begin(9, 50, 200.0, planned=False)
    h = w.held.hold
    assert (h.n, h.began_ns, h.deadline, h.planned) == (9, 10, 200.0, False)
    assert (h.stop_ns, h.resume, h.stopped, h.pause_ms) == (0, None, False, 0.0)
    assert w.held.count == 1


def test_the_oldest_are_given_up_when_there_are_too_many() -> None:
    w = Wires(limit=2)
    w.held.begin(8, 0, 100.0, planned=False)
    for ts in (1, 2, 3):
        w.client(ts)
    assert w.held.count == 2 and w.held.overflow == 1
    h = w.held.take()
    assert h is not None
    w.held.let_go(h)
    assert w.to_svm == [b"c2", b"c3"]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_guest_that_goes_on_alone_says_what_it_said_as_the_new_state_only(resumed: bool) -> None:
    w = Wires()
    w.held.begin(8, 0, 100.0, planned=True)
    w.client(1)
    w.svm(2)
    h = w.held.take()
    assert h is not None
    h.resume = resume(2) if resumed else None
    w.transmits = True
    w.held.let_go_standalone(h)
    w.svm(3)  # captured while it was no more than a copy
    assert (w.to_svm, w.out) == ([b"c1"], [b"s2"] if resumed else [])
    assert w.held.stale == 1
