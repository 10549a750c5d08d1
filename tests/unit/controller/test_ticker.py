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
