# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a checkpoint has come, by what is heard of both hosts, in whatever order."""

from __future__ import annotations

import itertools

import pytest

from colo_xdp.controller.checkpoint import Checkpoint, Step
from colo_xdp.qemu.events import QmpEvent


def event(name: str, ts: int, seen: int = 1000) -> QmpEvent:
    return QmpEvent(name, {}, ts, seen)


def test_its_steps() -> None:
    ck = Checkpoint(8, "operator", 10)
    steps = [ck.step]
    ck.heard({"type": "begin_ack", "n": 8})
    steps.append(ck.step)
    ck.trigger(0)
    ck.triggered = True
    steps.append(ck.step)
    ck.pvm_stopped(event("STOP", 20))
    steps.append(ck.step)
    ck.pvm_resumed(event("RESUME", 30))
    assert ck.step is Step.STOPPED, "the SVM has not said that it runs"
    ck.heard({"type": "resumed", "n": 8})
    steps.append(ck.step)
    ck.ended = Step.COMMITTED
    steps.append(ck.step)
    assert steps == [s for s in Step if s is not Step.FAILED]


def test_messages_of_both_hosts_count_in_any_order() -> None:
    def both(ck: Checkpoint) -> None:
        ck.pvm_stopped(event("STOP", 20))
        ck.pvm_resumed(event("RESUME", 30))

    words = (
        both,
        lambda ck: ck.heard({"type": "begin_ack", "n": 8}),
        lambda ck: ck.heard({"type": "resumed", "n": 8}),
    )
    for order in itertools.permutations(words):
        ck = Checkpoint(8, "initial", 10)
        for i, word in enumerate(order):
            assert (ck.step is Step.RESUMED) is False, i
            word(ck)
        assert ck.step is Step.RESUMED and (ck.stop_ns, ck.resume_ns) == (20, 30)


def test_what_was_before_it_is_asked_for_is_not_of_it() -> None:
    ck = Checkpoint(8, "operator", 10)
    ck.heard({"type": "begin_ack", "n": 8})
    ck.pvm_stopped(event("STOP", 20))
    ck.pvm_resumed(event("RESUME", 30))
    ck.heard({"type": "resumed", "n": 7})
    ck.trigger(0)
    ck.triggered = True
    assert ck.step is Step.TRIGGERED
    ck.pvm_resumed(event("RESUME", 40))
    assert not ck.resume_ns, "of no STOP that is known"


@pytest.mark.parametrize(("ts", "stop"), [(5, 10), (2000, 10), (500, 500)])
def test_a_stop_at_an_impossible_time_counts_as_early_as_can_be(ts: int, stop: int) -> None:
    ck = Checkpoint(8, "operator", 10)
    ck.pvm_stopped(event("STOP", ts))
    assert ck.stop_ns == stop


def test_each_message_wakes_whoever_waits() -> None:
    for msg in (
        {"type": "begin_ack", "n": 8}, {"type": "resumed", "n": 8}, {"type": "offsets_ack", "n": 0},
        {"type": "failed", "n": 8, "why": "no"},
    ):  # fmt: skip
        ck = Checkpoint(8, "operator", 10)
        ck.heard(msg)
        assert ck.changed.is_set()
    assert ck.failed == "no"
    ck = Checkpoint(8, "operator", 10)
    ck.heard({"type": "failed", "n": 7, "why": "of another one"})
    assert not ck.changed.is_set() and not ck.failed
