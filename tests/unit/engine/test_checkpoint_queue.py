# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits while a checkpoint is under way."""

from __future__ import annotations

import pytest

from colo_xdp.compare.held_queue import Held
from colo_xdp.compare.ledger import Ledger
from colo_xdp.compare.limits import CHECKPOINT_QUEUE
from colo_xdp.engine.checkpoint_queue import CheckpointQueue
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse
from tests.unit import frames as f

ROOM = 4


@pytest.fixture
def queue() -> CheckpointQueue:
    return CheckpointQueue(Ledger(ROOM, 1 << 20), ROOM)


def held(ts: int, since: int) -> Held:
    """Captured at `ts`, waiting since `since`."""
    rec = Frame(f.udp(b"%d" % ts), ts)
    return rec, parse(rec.frame), since


def test_what_flows_held_comes_before_what_came_later(queue: CheckpointQueue) -> None:
    new = held(9, 9)
    assert queue.offer(*new)
    flows = [held(5, 5), held(7, 7), held(3, 3), held(4, 9)]
    queue.collect(flows)
    assert list(queue.held) == [flows[2], flows[0], flows[1], flows[3], new]


def test_stop_parts_the_queue(queue: CheckpointQueue) -> None:
    frames = [held(ts, i) for i, ts in enumerate((3, 9, 5, 6))]
    queue.held.extend(frames)
    assert queue.take_until(5) == [frames[0], frames[2]]
    assert list(queue.held) == [frames[1], frames[3]]
    assert queue.take_until(9) == [frames[1], frames[3]] and not queue.held


def test_it_holds_some_times_what_flows_may(queue: CheckpointQueue) -> None:
    taken = [queue.offer(*held(i, i)) for i in range(CHECKPOINT_QUEUE * ROOM + 3)]
    assert taken == [True] * CHECKPOINT_QUEUE * ROOM + [False] * 3


def test_flows_that_hold_nothing_take_no_room_from_others(queue: CheckpointQueue) -> None:
    frames = [Frame(b"%d" % i, i) for i in range(2 * ROOM)]
    assert all(queue.buffer(rec, 7, True) for rec in frames[:ROOM])
    assert not queue.buffer(frames[0], 7, True)
    assert all(queue.buffer(rec, 7, False) for rec in frames[ROOM:])
    assert not queue.buffer(frames[0], 7, False)
    assert queue.take_svm() == [(rec, 7) for rec in frames[ROOM:] + frames[:ROOM]]
    assert not queue.take_svm()


def test_a_checkpoint_that_failed_leaves_nothing_of_the_svm(queue: CheckpointQueue) -> None:
    rec = Frame(b"", 0)
    queue.buffer(rec, 1, False)
    queue.buffer(rec, 2, True)
    queue.lost = 3
    assert queue.forget_svm() == 2
    assert not queue.take_svm() and not queue.lost
