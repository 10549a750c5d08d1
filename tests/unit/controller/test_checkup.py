# SPDX-License-Identifier: GPL-2.0-or-later
"""Two controllers ask each other's doctor, and each its own QEMU."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.controller import checkup
from colo_xdp.controller.checkup import Checkup
from colo_xdp.peer import messages
from colo_xdp.qemu.qmp import QmpError


class Side:
    """One controller, as far as a checkup is concerned; what it sends arrives at `other`."""

    def __init__(self) -> None:
        self.config: Any = SimpleNamespace(networks=[SimpleNamespace(tap="tap0")])
        self.qemu: Any = SimpleNamespace(qmp=None)
        self.peer: Any = SimpleNamespace(
            connected=True, version=messages.VERSION, send=self._send
        )  # fmt: skip
        self.checkup = Checkup(self)
        self.other: Side | None = None
        self.sent: list[str] = []
        self.tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coro)
        self.tasks.add(task)
        return task

    def _send(self, kind: str, **fields: Any) -> bool:
        line = messages.encode(kind, **fields)
        self.sent.append(kind)
        if self.other is not None:
            self.other.checkup.on_message(messages.decode(line))
        return self.peer.connected is True


def two() -> tuple[Side, Side]:
    a, b = Side(), Side()
    a.other, b.other = b, a
    return a, b


def run(body: Callable[[Side, Side], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(10):
            await body(*two())

    asyncio.run(go())


def test_the_other_host_answers() -> None:
    async def body(a: Side, b: Side) -> None:
        async def examine() -> str:
            return json.dumps({"host": "hostb"})

        b.checkup.examine = examine
        found = await a.checkup.command({"peer": True})
        assert found["report"] == {"host": "hostb"}
        assert found["asked"] - 0.01 <= found["at"] <= found["answered"] + 0.01
        assert a.sent == ["doctor_ask"] and b.sent == ["doctor_answer"]

    run(body)


def test_one_examination_serves_all_who_ask_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(a: Side, b: Side) -> None:
        count = 0

        async def examine() -> str:
            nonlocal count
            count += 1
            await asyncio.sleep(0.05)
            return f"[{count}]"

        b.checkup.examine = examine
        found = await asyncio.gather(*(a.checkup.command({"peer": True}) for _ in range(20)))
        assert [x["report"] for x in found] == [[1]] * 20
        assert (await a.checkup.command({"peer": True}))["report"] == [1], "it is new enough"
        monkeypatch.setattr(checkup, "REST_S", 0.0)
        assert (await a.checkup.command({"peer": True}))["report"] == [2]

    run(body)


def test_a_doctor_that_fails_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "EXAMINE_S", 0.05)
    monkeypatch.setattr(checkup, "REST_S", 0.0)

    async def body(a: Side, b: Side) -> None:
        async def fails() -> str:
            raise OSError("no such program")

        async def hangs() -> str:
            await asyncio.sleep(60)
            return ""

        for examine, why in ((None, "has no doctor"), (fails, "no such"), (hangs, "not finished")):
            b.checkup.examine = examine
            found = await a.checkup.command({"peer": True})
            assert why in found["report"]["trouble"]

    run(body)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"connected": False}, "is not connected, so nobody can be asked"),
        ({"version": messages.DOCTOR_SINCE - 1}, "install this one there"),
        ({"send": lambda kind, **fields: False}, "not connected any more"),
        ({"send": lambda kind, **fields: True}, "did not answer within 0.05 s"),
    ],
)
def test_nobody_to_ask(change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "ASK_S", 0.05)

    async def body(a: Side, b: Side) -> None:
        vars(a.peer).update(change)
        with pytest.raises(ValueError, match=why):
            await a.checkup.command({"peer": True})
        assert not a.checkup._answers, "nothing is left of it"

    run(body)


def test_answers_that_nobody_waits_for_and_that_are_none() -> None:
    async def body(a: Side, b: Side) -> None:
        a.checkup.on_message({"type": "doctor_answer", "n": 9, "at": 0, "report": "{}"})

        async def examine() -> str:
            return "nonsense"

        b.checkup.examine = examine
        with pytest.raises(ValueError, match="is no report"):
            await a.checkup.command({"peer": True})

    run(body)


def test_the_own_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(a: Side, b: Side) -> None:
        async def take(q: Any, taps: list[str]) -> Any:
            assert taps == ["tap0"]
            return SimpleNamespace(to_json=lambda: {"version": [7, 2, 22]})

        async def busy(q: Any, taps: list[str]) -> Any:
            raise QmpError("PVM: query-version: not connected")

        async def hangs(q: Any, taps: list[str]) -> Any:
            await asyncio.sleep(60)

        monkeypatch.setattr(checkup, "take", take)
        found = await a.checkup.command({})
        assert found == {"pid": os.getpid(), "survey": {"version": [7, 2, 22]}, "why": ""}
        monkeypatch.setattr(checkup, "SURVEY_S", 0.05)
        for stood_in, why in ((busy, "not connected"), (hangs, "does not answer within 0.05 s")):
            monkeypatch.setattr(checkup, "take", stood_in)
            found = await a.checkup.command({})
            assert found["survey"] is None and why in found["why"]

    run(body)
