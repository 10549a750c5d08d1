# SPDX-License-Identifier: GPL-2.0-or-later
"""Demotion: certain silence, whatever else was in progress."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.failover.states import State
from colo_xdp.status.builder import active_json
from tests.unit.controller.fakes import FakeDataPath, Sent, primary, secondary


def test_demotion_and_coming_back() -> None:
    """Asked to be silent it is; it transmits again only if the primary died before it did."""

    async def body(alone: bool) -> State:
        c, dp, sent = secondary()
        c.state = State.PROTECTED
        done: list[str] = []

        async def perform(action: Any, why: str) -> None:
            done.append(action.value)

        c.perform = perform  # type: ignore[method-assign]
        c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
        c._peer_message({"type": "demote", "why": "hang"})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and sent.kinds() == ["shut"]
        c._peer_message({"type": "shut", "why": "dead", "standalone": alone})
        await asyncio.sleep(0)
        assert done == ([] if alone else ["take_over"])
        return c.state

    assert asyncio.run(body(True)) is State.STOPPED
    assert asyncio.run(body(False)) is State.DEGRADED


def test_a_guest_is_demoted_on_request() -> None:
    """Silent when the command returns, whoever it is; the peer is told, and may go on."""

    async def body(c: Primary | Secondary, dp: FakeDataPath, sent: Sent) -> None:
        dp.order = "failover"
        r = await c.commands.run("demote", {"why": "moved by the cluster"})
        assert dp.mode is Mode.DROP and c.path_shut and not active_json(c)["transmitting"]
        assert r["state"] == "stopped" and "moved by the cluster" in r["reason"]
        assert sent.kinds() == ["shut"] and dp.order == ""
        await c.commands.run("demote", {})  # again: nothing more is said
        assert sent.kinds() == ["shut"] and "moved by the cluster" in c.reason

    p, pd, ps = primary()
    p.state = State.PROTECTED
    asyncio.run(body(p, pd, ps))
    s, sd, ss = secondary()
    s.state = State.PROTECTED
    asyncio.run(body(s, sd, ss))


def test_a_guest_whose_programs_have_stepped_out_is_demoted() -> None:
    """After a takeover nothing may be left at the tap that obeys the mode."""

    async def body() -> None:
        c, dp, sent = secondary(Mode.TAKEOVER)
        c.stepped_out = c.view.guest.standalone = True
        c.state = State.PROMOTED
        await c.commands.run("demote", {})
        assert dp.mode is Mode.DROP and not c.stepped_out and dp.stepped_in == 1
        assert sent[0]["standalone"]

    asyncio.run(body())


@pytest.mark.parametrize("status", ["colo", "inmigrate", "running"])
def test_qmp_that_comes_back_does_not_undo_a_demotion(status: str) -> None:
    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.view.pair.confirmed, c.view.pair.in_colo = (
            State.DEGRADED,
            True,
            status != "running",
        )
        answers = asyncio.Event()

        async def ask(*args: Any, **more: Any) -> str:
            await answers.wait()
            return status

        c.qemu.qmp = SimpleNamespace(  # type: ignore[assignment]
            status=ask, migration_status=ask, prepare=ask, connected=True
        )
        back = c.spawn(c.on_qemu())
        await asyncio.sleep(0.01)
        c._peer_message({"type": "demote", "why": "the PVM goes on alone"})
        answers.set()
        await back
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and sent.kinds() == ["shut"]

    asyncio.run(body())
