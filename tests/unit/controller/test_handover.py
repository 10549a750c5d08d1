# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that leaves the pair in order: who serves the clients then, and what does not start."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.controller import handover
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.story import Kind
from colo_xdp.failover.states import State
from tests.unit.controller.fakes import in_loop, primary, secondary

SHUTDOWN = {"shutdown": True}


def switched(c: Primary, result: bool | str) -> list[str]:
    """Let a switchover end like that; return the reasons with which it was asked for."""
    asked: list[str] = []

    async def switch_over(deadline: float, why: str) -> bool:
        assert 0 < deadline - time.monotonic() < 60, "the command waits as long as its unit"
        asked.append(why)
        if isinstance(result, str):
            raise ValueError(result)
        if result:
            c.become(State.STOPPED, f"handed over to the secondary: {why}")
        return result

    c.switch_over = switch_over  # type: ignore[method-assign]
    return asked


def test_the_primarys_guest_is_moved_and_no_copy_starts_on_a_host_that_goes() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.state = State.PROTECTED
        asked = switched(c, True)
        r = await c.commands.run("handover", SHUTDOWN)
        assert asked == ["the primary's host shuts down"]
        assert r["done"] and "host shuts down" in r["reason"] and c.replacement.off
        again = await c.commands.run("handover", SHUTDOWN)
        assert again["done"] and len(asked) == 1 and c.replacement.off

    in_loop(body)


@pytest.mark.parametrize("result", [False, "no switchover: the SVM could not get the lease"])
def test_a_handover_that_fails_changes_nothing(
    result: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest is killed with its host, and a host that stays gets its next copy."""

    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.PROTECTED
        switched(c, result)
        if result:
            with pytest.raises(ValueError, match="could not get the lease"):
                await c.commands.run("handover", SHUTDOWN)
        else:
            assert not (await c.commands.run("handover", SHUTDOWN))["done"]
        assert not c.replacement.off and dp.mode is Mode.RUN and c.state is State.PROTECTED
        assert "no handover: " in caplog.text

    in_loop(body)


@pytest.mark.parametrize("state", [State.SOLO, State.DEGRADED])
@pytest.mark.parametrize("connected", [False, True])
def test_a_guest_without_a_copy_is_not_silenced(
    state: State, connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PROTECT_S" if connected else "ANSWER_S", 0.05)

    async def body() -> None:
        c, dp, sent = primary(Mode.BYPASS)
        c.state, c.peer.connected = state, connected
        with pytest.raises(ValueError, match=f"no switchover from state {state.value}"):
            await c.commands.run("handover", SHUTDOWN)
        assert dp.mode is Mode.BYPASS and not sent

    in_loop(body)
    s, sdp, ssent = secondary(Mode.TAKEOVER)
    assert s.state is State.PROMOTED
    with pytest.raises(ValueError, match="serves alone"):
        asyncio.run(s.commands.run("handover", SHUTDOWN))
    assert sdp.mode is Mode.TAKEOVER and not ssent and not s.replacement.off


@pytest.mark.parametrize("connected", [False, True])
def test_a_pair_that_is_about_to_be_protected_is_waited_for(connected: bool) -> None:
    """Such as after an upgrade, which restarts the controller and is followed by a reboot."""

    async def body() -> None:
        c, _, _ = primary()
        c.state, c.peer.connected = State.DEGRADED, connected
        asked = switched(c, True)
        leaving = asyncio.ensure_future(c.commands.run("handover", SHUTDOWN))
        await asyncio.sleep(0.02)
        assert not asked and not leaving.done()
        c.state = State.PROTECTED
        assert (await leaving)["done"] and asked

    in_loop(body)


def test_the_secondarys_copy_is_demoted_and_the_primary_is_heard() -> None:
    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.peer.connected, c.view.peer.state = State.PROTECTED, True, "protected"
        events: list[str] = []
        c.story.keep = lambda e: events.append(e["kind"])
        leaving = asyncio.ensure_future(c.commands.run("handover", SHUTDOWN))
        while c.state is not State.STOPPED:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert dp.mode is Mode.DROP and not leaving.done(), "the primary is not alone yet"
        (said,) = sent
        assert said["type"] == "shut" and "the secondary's host shuts down" in said["why"]
        c.view.peer.state = "solo"
        c.outdated("the PVM has run standalone")  # as its next heartbeat says
        r = await leaving
        assert r["done"] and "host shuts down" in r["reason"] and c.replacement.off
        assert events[:2] == [Kind.SHUTDOWN, Kind.STATE]

    in_loop(body)


@pytest.mark.parametrize("connected", [False, True])
def test_a_primary_that_says_nothing_does_not_stop_the_shutdown(
    connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "ANSWER_S", 0.05)

    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.peer.connected, c.view.peer.state = State.PROTECTED, connected, "degraded"
        r = await asyncio.wait_for(c.commands.run("handover", SHUTDOWN), 5)
        assert not r["done"] and "may not know it" in r["reason"]
        assert dp.mode is Mode.DROP and c.replacement.off

    in_loop(body)


def test_a_switchover_to_this_guest_is_not_cut_off() -> None:
    """Both hosts shut down, this one later: its guest is the one that clients know by then."""

    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.view.pair.confirmed = State.CHECKPOINTING, True
        c._begin_hold(8, planned=True)
        with pytest.raises(ValueError, match="a switchover to this guest"):
            await c.commands.run("handover", SHUTDOWN)
        assert dp.mode is Mode.CHECKPOINT and not c.replacement.off

    in_loop(body)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_dry_run_only_says_what_would_be_done(role: str) -> None:
    async def body() -> None:
        c, dp, sent = primary() if role == "primary" else secondary()
        c.state = State.PROTECTED
        r: dict[str, Any] = await c.commands.run("handover", {"dry_run": True, **SHUTDOWN})
        assert r["steps"] and not r["done"] and dp.mode is Mode.RUN and not sent
        assert not c.replacement.off

    in_loop(body)
