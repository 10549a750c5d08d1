# SPDX-License-Identifier: GPL-2.0-or-later
"""Timers of the engine's flows. All times are CLOCK_MONOTONIC ns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

from .limits import NEVER

#: a timer shorter than this fires on time, a longer one up to a tenth of it late
SOON_NS = 500_000_000


class Clock:
    """Time of the batch, and the epoch. The engine sets them, its parts read them."""

    __slots__ = ("epoch", "now")

    def __init__(self) -> None:
        self.now = self.epoch = 0


class Timed(Protocol):
    """Something that can have a timer. `when`: when it fires, 0 for never; only Timers sets it."""

    when: int


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """One timer at most per flow; every flow that holds or buffers anything has one.

    A lazy heap with one live entry per flow: an entry is a lower bound, and the flow itself knows
    the exact time. So a timeout costs nothing per frame and needs no scan.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, T]] = []
        self._serial = count()
        self._soon_ns = NEVER

    def arm(self, flow: T, at_ns: int) -> None:
        """Have the flow examined at at_ns or earlier."""
        if not flow.when or at_ns < flow.when:
            flow.when = at_ns
            heappush(self._heap, (at_ns, next(self._serial), flow))
            if at_ns < self._soon_ns and at_ns - self._clock.now < SOON_NS:
                self._soon_ns = at_ns

    def due(self, now_ns: int) -> Iterator[T]:
        """Yield the flows whose timer has fired, longest overdue first.

        The timer of each is cleared. A flow that is armed meanwhile, for now or earlier, is yielded
        too.
        """
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
    def armed(self) -> bool:
        """Whether any flow may have a timer: False is certain."""
        return bool(self._heap)

    @property
    def next_ns(self) -> int:
        """Return the first of the timers set for less than SOON_NS; NEVER if there is none."""
        return self._soon_ns

    def next_waiting_ns(self, waits: Callable[[T], bool]) -> int:
        """Return the first of all timers that belongs to a flow for which something waits.

        The timers of others before it are cancelled, since nobody needs them: with a short patience
        each frame that is held for a moment sets one. NEVER if there is none.
        """
        heap = self._heap
        while heap:
            when, _, flow = heap[0]
            if when == flow.when:
                if waits(flow):
                    return when
                flow.when = 0
            heappop(heap)
        return NEVER

    def flows(self) -> list[T]:
        """Return each flow that has a timer, and some that had one."""
        return list({id(flow): flow for _, _, flow in self._heap}.values())

    def clear(self) -> None:
        """Cancel all timers."""
        for _, _, flow in self._heap:
            flow.when = 0
        self._heap.clear()
        self._soon_ns = NEVER
