# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate the process of a controller: a kill -9 ends all of it at once.

Each boot of a controller makes one. What the controller opens (QMP, the channel, the store, the
maps) asks it whether it still lives, and what the controller does runs as a task of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Future[Any]]


class Killed(ValueError):
    """The process has ended before its answer: whoever asked has lost the connection."""


class Process:
    """One run of a controller."""

    def __init__(self) -> None:
        self.alive = True
        #: in the order of their beginning, so that a scene is replayed exactly
        self._tasks: dict[asyncio.Future[Any], None] = {}

    def _owns(self, task: asyncio.Future[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda t: self._tasks.pop(t, None))

    async def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Run something that the controller was asked from outside. Raises Killed."""
        task = asyncio.ensure_future(coro)
        self._owns(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self.alive:
                raise
            raise Killed("killed meanwhile") from None

    def spawning(self, spawn: Spawn) -> Spawn:
        """Return the controller's spawn(), whose tasks end with the process.

        The callbacks of tasks that a kill cancels are still called. They begin nothing any more.
        """

        def begin(coro: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
            if not self.alive:
                coro.close()
                never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                never.cancel()
                return never
            task = spawn(coro)
            self._owns(task)
            return task

        return begin

    def kill(self) -> None:
        """End it: what it holds is gone, and none of its tasks goes on."""
        self.alive = False
        for task in list(self._tasks):
            task.cancel()


class OfProcess:
    """What a controller has opened: dead with its process."""

    _process: Process

    @property
    def dead(self) -> bool:
        return not self._process.alive
