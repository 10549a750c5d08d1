# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of a controller: it ticks when something is due, and now and then.

An idle controller's cost is its wake-ups, 0.3 ms each. So there are few of them, and a part that
has something urgent to do reports when (`due_ns`, look()).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..clock import TICK_S

IDLE_S = 0.05  # the longest time between two ticks, unless the controller asks for less


class Ticker:
    """Calls tick(late); `late` is how far the tick is behind its time (s).

    tick() returns the longest time that may pass until the next one (s), or None to end.
    `due_ns` returns when a tick will have something to do (CLOCK_MONOTONIC); while nothing is due,
    there is a tick every `idle_s`.
    """

    def __init__(
        self,
        tick: Callable[[float], float | None],
        due_ns: Callable[[], int],
        idle_s: float = IDLE_S,
    ) -> None:
        self._tick, self._due_ns, self._idle_s = tick, due_ns, idle_s
        self.at_ns = 0  # when the next tick is due
        self._rest: asyncio.Future[None] | None = None  # done at the next tick
        self._alarm: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Tick until tick() returns None. The time that a tick takes makes the next one late."""
        late, began = 0.0, time.monotonic_ns()
        while (most := self._tick(late)) is not None:
            worked = time.monotonic_ns() - began
            await self.rest(most)
            began = time.monotonic_ns()
            late = (worked + began - self.at_ns) / 1e9

    async def rest(self, most_s: float) -> None:
        """Wait until the next tick."""
        due_s = (self._due_ns() - time.monotonic_ns()) / 1e9
        rest = self._rest = asyncio.get_running_loop().create_future()
        self._wake_in(max(TICK_S, min(self._idle_s, most_s, due_s)))
        try:
            await rest
        finally:
            self._rest = None
            if self._alarm is not None:
                self._alarm.cancel()

    def look(self) -> None:
        """Bring the next tick forward if something has become due.

        A tick is only ever brought forward. If it could be put off, an overdue one would wait for
        as long as frames come.
        """
        rest, soonest = self._rest, time.monotonic_ns() + int(TICK_S * 1e9)
        if rest is None or rest.done() or max(soonest, self._due_ns()) >= self.at_ns:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._wake_in(TICK_S)

    def _wake_in(self, seconds: float) -> None:
        self.at_ns = time.monotonic_ns() + int(seconds * 1e9)
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._wake_up)

    def _wake_up(self) -> None:
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)
