# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of a controller: it ticks when something is due, and now and then.

An idle controller's cost is its wake-ups, 0.3 ms each. So there are few of them, and a part that
has something urgent to do reports when (`due_ns`, look()). A controller at rest does not even tick
every `idle_s`: it wakes up for a glance, which costs a fifth of a tick.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..clock import TICK_S

IDLE_S = 0.05  # the longest time between two ticks, unless the controller asks for less
REST_S = 0.1  # the same of a controller at rest


class Ticker:
    """Calls tick(late); `late` is how far the tick is behind its time (s).

    tick() returns the longest time that may pass until the next one (s), or None to end.
    `due_ns` returns when a tick will have something to do (CLOCK_MONOTONIC); while nothing is due,
    there is a tick every `idle_s`. `at_rest` is asked then: if it returns True that tick is left
    out, and there is one every `rest_s`. `asleep` is asked before: if it returns True that wake-up
    is left out, too, since nothing can come up that is not reported.
    """

    def __init__(
        self,
        tick: Callable[[float], float | None],
        due_ns: Callable[[], int],
        idle_s: float = IDLE_S,
        *,
        at_rest: Callable[[], bool] = lambda: False,
        asleep: Callable[[], bool] = lambda: False,
        rest_s: float = REST_S,
    ) -> None:
        self._tick, self._due_ns, self._idle_s = tick, due_ns, idle_s
        self._at_rest, self._asleep, self._rest_s = at_rest, asleep, rest_s
        self.at_ns = 0  # when the next tick is due, or the next glance
        self._end_ns = 0  # when the next tick is due at the latest
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
        rest = self._rest = asyncio.get_running_loop().create_future()
        self._end_ns = time.monotonic_ns() + int(min(most_s, self._rest_s) * 1e9)
        self._sleep()
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
        rest, now = self._rest, time.monotonic_ns()
        if rest is None or rest.done():
            return
        soonest = now + int(TICK_S * 1e9)
        if max(soonest, self._due_ns()) < self.at_ns:
            wake_s = TICK_S
        elif now + int(self._idle_s * 1e9) < self.at_ns and not self._asleep():
            wake_s = self._idle_s
        else:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._wake_in(wake_s)

    def now(self) -> bool:
        """Tick at once, since the loop is awake anyway; return whether that will happen."""
        resting = self._rest is not None and not self._rest.done()
        if self._rest is not None and resting:
            self._rest.set_result(None)
        return resting

    def _sleep(self) -> None:
        now = time.monotonic_ns()
        due_s = (min(self._due_ns(), self._end_ns) - now) / 1e9
        idle_s = self._rest_s if self._asleep() else self._idle_s
        self._wake_in(max(TICK_S, min(idle_s, due_s)))

    def _wake_in(self, seconds: float) -> None:
        self.at_ns = time.monotonic_ns() + int(seconds * 1e9)
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._wake_up)

    def _wake_up(self) -> None:
        if self._rest is None or self._rest.done():
            return
        now, tick_ns = time.monotonic_ns(), int(TICK_S * 1e9)
        # Whoever counts silence has to know of a loop that stood still: a late glance is a tick.
        glance = now < self.at_ns + tick_ns and now + tick_ns < self._end_ns
        if glance and self._at_rest() and self._due_ns() > now:
            self._sleep()
        else:
            self._rest.set_result(None)
