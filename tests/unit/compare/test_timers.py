# SPDX-License-Identifier: GPL-2.0-or-later
"""Each flow is looked at when it asked to be, once."""

from __future__ import annotations

import random

import pytest

from colo_xdp.compare.limits import NEVER
from colo_xdp.compare.timers import SOON_NS, Clock, Timers


class Flow:
    when = 0


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_as_a_table_of_times(clock: Clock) -> None:
    for seed in range(50):
        rnd = random.Random(seed)
        timers: Timers[Flow] = Timers(clock)
        flows = [Flow() for _ in range(5)]
        model: dict[Flow, int] = {}
        for now in range(1, 200):
            clock.now = now
            if rnd.random() < 0.5:
                flow, at = rnd.choice(flows), now + rnd.randrange(40)
                timers.arm(flow, at)
                model[flow] = min(at, model.get(flow, at))
            assert {f: f.when for f in flows if f.when} == model
            assert set(model) <= set(timers.flows())
            gone = list(timers.due(now))
            assert gone == sorted(gone, key=lambda f: model[f])
            assert set(gone) == {f for f, at in model.items() if at <= now}
            for flow in gone:
                del model[flow]
        timers.clear()
        assert not timers.flows() and not any(f.when for f in flows)


def test_one_that_is_armed_for_now_meanwhile_is_due(clock: Clock) -> None:
    timers: Timers[Flow] = Timers(clock)
    first, second = Flow(), Flow()
    timers.arm(first, 10)
    seen = []
    for flow in timers.due(10):
        seen.append(flow)
        if flow is first:
            timers.arm(second, 1)
            timers.arm(first, 11)
    assert seen == [first, second] and first.when == 11


def test_only_a_short_timer_wakes_anybody(clock: Clock) -> None:
    timers: Timers[Flow] = Timers(clock)
    short, long = Flow(), Flow()
    timers.arm(long, SOON_NS)
    assert timers.next_ns == NEVER
    timers.arm(short, 1000)
    assert timers.next_ns == 1000
    assert list(timers.due(1000)) == [short]
    assert timers.next_ns == SOON_NS, "it is near now"
    timers.clear()
    assert timers.next_ns == NEVER


def test_a_flow_that_lost_its_timer_can_have_another(clock: Clock) -> None:
    """Else nobody asks for what it holds, for ever."""
    timers: Timers[Flow] = Timers(clock)
    flow = Flow()
    timers.arm(flow, 10)
    timers.clear()
    timers.arm(flow, 20)
    assert list(timers.due(20)) == [flow]


def test_the_first_timer_of_something_that_waits() -> None:
    clock = Clock()
    timers: Timers[Flow] = Timers(clock)
    busy, idle, other = Flow(), Flow(), Flow()
    for flow, at in ((idle, 10), (other, 20), (busy, 30)):
        timers.arm(flow, at)
    assert timers.next_waiting_ns(lambda flow: flow is busy) == 30
    assert idle.when == other.when == 0 and busy.when == 30, "nobody needs the others'"
    timers.arm(busy, 25)
    assert timers.next_waiting_ns(lambda flow: True) == 25
    assert list(timers.due(30)) == [busy]
    assert timers.next_waiting_ns(lambda flow: True) == NEVER
