# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller's part in `doctor`: what only it can ask, on this host and of the other one.

It has QEMU's monitor, which serves one client, and the control channel, over which the other host's
controller is asked for what its own doctor finds. That one runs `colo-xdp doctor` as a process of
its own (service/examine.py), one at a time, so a peer that keeps asking costs little. Nothing is
changed by any of this, and nothing of it is waited for by the pair.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from ..config.file import Config
from ..peer.channel import Peer
from ..peer.messages import DOCTOR_SINCE
from ..qemu.qmp import QmpError
from ..qemu.supervisor import QemuSupervisor
from ..qemu.survey import take

log = logging.getLogger("colo_xdp")

SURVEY_S = 10.0
EXAMINE_S = 30.0  # until this host's doctor is given up
ASK_S = EXAMINE_S + 10.0
REST_S = 5.0  # an answer that is not older serves the next question, too

Examine = Callable[[], Awaitable[str]]


class Examined(Protocol):
    """The part of a controller that is needed here."""

    config: Config
    qemu: QemuSupervisor
    peer: Peer

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task."""
        ...


class Checkup:
    """Asks this host's QEMU, asks the other host, and answers it."""

    def __init__(self, controller: Examined) -> None:
        self._c = controller
        #: runs this host's doctor and returns its report as JSON; the service sets it
        self.examine: Examine | None = None
        self._asked = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._examination: asyncio.Task[str] | None = None
        self._began = 0.0

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return what the command line asks for. Raises ValueError."""
        return await (self._ask() if args.get("peer") else self._survey())

    async def _survey(self) -> dict[str, Any]:
        """Return a survey of this host's QEMU, or why there is none."""
        c = self._c
        taps = [net.tap for net in c.config.networks]
        found: dict[str, Any] = {"pid": os.getpid(), "survey": None, "why": ""}
        try:
            async with asyncio.timeout(SURVEY_S):
                found["survey"] = (await take(c.qemu.qmp, taps)).to_json()
        except (QmpError, KeyError, TypeError) as e:
            found["why"] = str(e)
        except TimeoutError:
            found["why"] = f"QEMU does not answer within {SURVEY_S:g} s"
        return found

    async def _ask(self) -> dict[str, Any]:
        """Return the report of the other host. Raises ValueError."""
        peer = self._c.peer
        if not peer.connected:
            raise ValueError("the other host's controller is not connected, so nobody can be asked")
        if peer.version < DOCTOR_SINCE:
            raise ValueError("the other host's release does not answer: install this one there")
        self._asked += 1
        n, answer = self._asked, asyncio.get_running_loop().create_future()
        self._answers[n] = answer
        began = time.time()
        try:
            if not peer.send("doctor_ask", n=n):
                raise ValueError("the other host's controller is not connected any more")
            async with asyncio.timeout(ASK_S):
                msg = await answer
        except TimeoutError:
            raise ValueError(f"the other host did not answer within {ASK_S:g} s") from None
        finally:
            del self._answers[n]
        try:
            report = json.loads(msg["report"])
        except (ValueError, RecursionError) as e:
            raise ValueError(f"the other host's answer is no report: {e}") from e
        return {"report": report, "at": msg["at"] / 1000, "asked": began, "answered": time.time()}

    def on_message(self, msg: dict[str, Any]) -> None:
        """Handle what comes from the other host."""
        if msg["type"] == "doctor_ask":
            self._c.spawn(self._answer(msg["n"]))
            return
        answer = self._answers.get(msg["n"])
        if answer is not None and not answer.done():
            answer.set_result(msg)

    async def _answer(self, n: int) -> None:
        """Examine this host, or wait for the examination that goes on, and tell the result."""
        now = time.monotonic()
        task = self._examination
        if task is None or (task.done() and now - self._began > REST_S):
            self._began = now
            task = self._examination = asyncio.ensure_future(self._examined())
        report = await asyncio.shield(task)
        self._c.peer.send("doctor_answer", n=n, at=time.time_ns() // 1_000_000, report=report)

    async def _examined(self) -> str:
        try:
            if self.examine is None:
                raise ValueError("this controller has no doctor")
            async with asyncio.timeout(EXAMINE_S):
                return await self.examine()
        except TimeoutError:
            why = f"doctor was not finished within {EXAMINE_S:g} s"
        except (OSError, ValueError) as e:
            why = str(e)
        log.warning("asked for this host's doctor: %s", why)
        return json.dumps({"trouble": why[:1000]})
