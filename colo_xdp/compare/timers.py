# SPDX-License-Identifier: GPL-2.0-or-later
"""When each flow is to be looked at next. All times are CLOCK_MONOTONIC ns."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

from .limits import NEVER

#: a timer shorter than this goes off when it should, a longer one up to a tenth of it late
SOON_NS = 500_000_000


class Clock:
    """The time of the batch, and the epoch. The engine sets them, its parts read them."""

    __slots__ = ("epoch", "now")

    def __init__(self) -> None:
        self.now = self.epoch = 0


class Timed(Protocol):
    """What can have a timer. `when`: when it goes off, 0 for never; only Timers set it."""

    when: int


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """At most one timer for each flow; whoever holds or buffers anything has one.

    A heap with one live entry per flow, lazy: an entry is a lower bound, the flow itself knows
    better. So a timeout costs nothing per frame and no scan.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, T]] = []
        self._serial = count()
        self._soon_ns = NEVER

    def arm(self, flow: T, at_ns: int) -> None:
        """Look at the flow at at_ns or before."""
        if not flow.when or at_ns < flow.when:
            flow.when = at_ns
            heappush(self._heap, (at_ns, next(self._serial), flow))
            if at_ns < self._soon_ns and at_ns - self._clock.now < SOON_NS:
                self._soon_ns = at_ns

    def due(self, now_ns: int) -> Iterator[T]:
        """The flows whose time has come, first those that wait for longest. Each is without a timer
        then; one that is armed meanwhile, for now or before, is among them."""
        heap = self._heap
        while heap and heap[0][0] <= now_ns:
            when, _, flow = heappop(heap)
            if when != flow.when:
                continue  # an earlier one was set
            flow.when = 0
            yield flow
        if self._soon_ns <= now_ns:
            near = heap and heap[0][0] - now_ns < SOON_NS
            self._soon_ns = heap[0][0] if near else NEVER

    @property
    def next_ns(self) -> int:
        """The first of them that was armed to go off within SOON_NS; NEVER: there is none."""
        return self._soon_ns

    def flows(self) -> list[T]:
        """Each flow that has a timer, and some that had one."""
        return list({id(flow): flow for _, _, flow in self._heap}.values())

    def clear(self) -> None:
        """Nobody has a timer any more."""
        for _, _, flow in self._heap:
            flow.when = 0
        self._heap.clear()
        self._soon_ns = NEVER
