# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of a controller."""

from __future__ import annotations

import asyncio
import time

from colo_xdp.compare.limits import NEVER
from colo_xdp.controller.ticker import IDLE_S, TICK_S, Ticker


def test_a_tick_that_takes_long_makes_the_next_one_late() -> None:
    """Nothing was listened to meanwhile: whoever counts silence has to know."""
    lates: list[float] = []
    busy = 0.2

    def tick(late: float) -> float | None:
        lates.append(late)
        if len(lates) == 3:
            return None
        end = time.monotonic() + (busy if len(lates) == 1 else 0)
        while time.monotonic() < end:
            pass
        return 1.0

    asyncio.run(Ticker(tick, lambda: NEVER).run())
    assert lates[0] == 0 and busy <= lates[1] and 0 <= lates[2] < lates[1]


def test_the_next_tick_comes_when_it_is_due_and_not_at_once() -> None:
    async def body() -> None:
        due = 0
        t = Ticker(lambda late: None, lambda: due)
        for due, most, want in (  # noqa: B007
            (NEVER, 1.0, IDLE_S),
            (NEVER, 0.03, 0.03),
            (0, 1.0, TICK_S),  # overdue
            (NEVER, 0.0, TICK_S),
        ):
            before = time.monotonic_ns()
            rest = asyncio.ensure_future(t.rest(most))
            await asyncio.sleep(0)
            now = time.monotonic_ns()
            assert before + want * 1e9 <= t.at_ns <= now + want * 1e9
            await rest
            assert time.monotonic_ns() >= t.at_ns

    asyncio.run(asyncio.wait_for(body(), 10))


def test_what_is_overdue_is_not_put_off_by_those_who_look() -> None:
    """Frames that come all the time look all the time: heartbeats would end."""

    async def body() -> None:
        t = Ticker(lambda late: None, lambda: 0 if hurry else NEVER)
        hurry = False
        rest = asyncio.ensure_future(t.rest(1.0))
        await asyncio.sleep(0)
        hurry, first, looks = True, t.at_ns, 0
        t.look()
        at = t.at_ns
        assert at < first
        end = time.monotonic() + 5
        while not rest.done() and time.monotonic() < end:
            t.look()
            looks += 1
            assert t.at_ns == at
            await asyncio.sleep(0)
        assert rest.done() and looks > 1

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_glance_at_rest_is_no_tick_and_news_ends_the_rest() -> None:
    async def body() -> None:
        resting = True
        t = Ticker(lambda late: None, lambda: NEVER, 0.02, at_rest=lambda: resting, rest_s=0.3)
        began = time.monotonic_ns()
        await t.rest(0.1)
        now = time.monotonic_ns()
        stood_still = now >= t.at_ns + TICK_S * 1e9  # on a busy machine
        waited = now >= began + (0.1 - TICK_S) * 1e9  # a glance so late is the tick
        assert waited or stood_still, "the heartbeat is what it waited for"
        resting = False
        rest = asyncio.ensure_future(t.rest(10.0))
        await asyncio.sleep(0)
        first = t.at_ns
        await rest
        assert t.at_ns == first, "the first glance is a tick"

    asyncio.run(asyncio.wait_for(body(), 10))


def test_who_sleeps_is_woken_by_what_comes() -> None:
    """Not by a glance: a batch of frames asks, and the tick is as soon as if nobody had slept."""

    async def body() -> None:
        asleep = True
        t = Ticker(lambda late: None, lambda: NEVER, 0.05, asleep=lambda: asleep, rest_s=0.3)
        rest = asyncio.ensure_future(t.rest(1.0))
        await asyncio.sleep(0)
        first, now = t.at_ns, time.monotonic_ns()
        assert first > now + 0.2 * 1e9
        t.look()
        assert t.at_ns == first, "nothing has come up"
        asleep = False
        t.look()
        assert t.at_ns <= time.monotonic_ns() + 0.05 * 1e9
        await rest

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_loop_that_stood_still_ticks_late_and_does_not_go_on_resting() -> None:
    """Else the time for which nobody listened would count as the peer's silence."""

    async def body() -> None:
        t = Ticker(lambda late: None, lambda: NEVER, 0.05, at_rest=lambda: True, rest_s=1.0)
        rest = asyncio.ensure_future(t.rest(1.0))
        await asyncio.sleep(0)
        due = t.at_ns
        while time.monotonic_ns() < due + 3 * TICK_S * 1e9:
            pass
        await rest
        assert t.at_ns == due, "so it is known how late the tick is"

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_tick_can_be_had_at_once() -> None:
    async def body() -> None:
        t = Ticker(lambda late: None, lambda: NEVER, 5.0, rest_s=5.0)
        assert not t.now(), "nobody rests"
        rest = asyncio.ensure_future(t.rest(5.0))
        await asyncio.sleep(0)
        assert t.now() and not t.now()
        await rest

    asyncio.run(asyncio.wait_for(body(), 4))
