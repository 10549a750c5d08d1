# SPDX-License-Identifier: GPL-2.0-or-later
"""Provide an asyncio loop with virtual time: it jumps to the next timer when nothing is ready."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

START_NS = 1_000_000_000_000


class Stuck(AssertionError):
    """Nothing can happen any more, but something still waits."""


class _Selector(selectors.SelectSelector):
    """Poll nothing: waiting is what advances the time."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("no timer is set")
        if timeout > 0:
            self.loop.now_ns += int(timeout * 1e9) + 1
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A deterministic loop: one thread, no I/O, no clock but `now_ns`."""

    def __init__(self) -> None:
        self.now_ns = START_NS
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_ns / 1e9

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as e:
            done.set_exception(e)
        return done


class FakeTime:
    """Replace the module `time` in the controllers' modules."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now_ns / 1e9

    def monotonic_ns(self) -> int:
        return self._loop.now_ns

    CLOCK_BOOTTIME = 7

    def clock_gettime_ns(self, clock: int) -> int:
        return self._loop.now_ns

    def time(self) -> float:
        return 1e9 + self._loop.now_ns / 1e9
