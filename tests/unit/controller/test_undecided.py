# SPDX-License-Identifier: GPL-2.0-or-later
"""A primary whose data path began with nothing: silent until somebody decides."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, SyncState
from colo_xdp.config.file import load
from colo_xdp.controller.primary import Primary
from colo_xdp.failover.arbiter import FenceArbiter
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.states import State
from tests.unit.controller.fakes import (
    BEAT,
    EXAMPLES,
    FakeDataPath,
    beat,
    in_loop,
    secondary,
    undecided,
)


@pytest.mark.parametrize(
    ("words", "transmits", "state"),
    [
        (None, False, State.STARTING),
        (beat("starting"), True, State.STARTING),
        (beat("stopped", shut=True), True, State.STARTING),
        (beat("protected"), False, State.STARTING),
        (beat("promoted", standalone=True), False, State.STOPPED),
        (beat("solo", standalone=True, role="primary"), False, State.STOPPED),
        (beat("stopped", standalone=True, shut=True), False, State.STARTING),
    ],
)
def test_a_guest_of_which_nothing_is_known_transmits_when_allowed(
    words: dict[str, Any] | None, transmits: bool, state: State
) -> None:
    async def body() -> None:
        c, dp, sent = undecided()
        c.reconsider()
        assert (
            dp.mode is Mode.DROP
            and not c.transmits
            and "does not know what happened before" in c.reason
        )
        assert (
            sent[-1]["type"] == "heartbeat" and not sent[-1]["standalone"] and not sent[-1]["shut"]
        )
        if words is not None:
            c._peer_message(words)
        if c._busy is not None:
            await c._busy
        await asyncio.gather(*(t for t in c._tasks if t is not c.replacement._search))
        assert (c.transmits, c.state) == (transmits, state)
        assert (
            (dp.mode is Mode.BYPASS)
            == (dp.opened == 1)
            == (dp.sync_state is SyncState.STANDALONE)
            == transmits
        )
        assert dp.undecided is (state is State.STARTING and not transmits)
        copy = words is not None and words["state"] == "protected"
        c.beat()
        assert sent[-1]["shadow"] is copy, "the copy must not take over by itself"
        if c.replacement._search is not None:
            c.replacement._search.cancel()

    in_loop(body)


@pytest.mark.parametrize("alone", [False, True])
def test_a_primary_that_waits_for_the_other_host_supersedes_nobody(alone: bool) -> None:
    """A guest that has been made to stand down may be all that there is of the service: its QEMU
    is not ended for one that is silent itself."""
    c, _, _ = secondary()
    c.state, c.peer.connected = State.STOPPED, True
    c._peer_message(BEAT | beat("starting", role="primary", standalone=alone))
    assert c.superseded() is alone


def test_who_waits_for_the_other_host_waits_after_a_restart_too() -> None:
    dp = FakeDataPath(Mode.DROP, adopted=True)
    dp.undecided = True
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    assert c.state is State.STARTING and c.undecided and not c.path_shut


def test_an_operators_request_opens_a_guest_of_which_nothing_is_known() -> None:
    async def body() -> None:
        c, dp, _ = undecided()
        c.peer.connected = False
        c.config = replace(c.config, failover=replace(c.config.failover, fence=(), automatic=False))
        c.arbiter = FenceArbiter(SimpleNamespace(config=c.config))  # type: ignore[arg-type]
        r = await c.commands.run("failover", {})
        assert r["done"] and c.state is State.SOLO and c.transmits
        assert dp.mode is Mode.BYPASS and dp.opened == 1 and not dp.undecided

    in_loop(body)


def test_a_request_that_opened_a_guest_does_not_break_the_pair_that_follows() -> None:
    """It was meant for what was before: the secondary that comes next is not fenced for it."""

    async def body() -> None:
        c, _, _ = undecided()
        c.commands.order("force", 40.0)
        c._peer_message(beat("stopped", shut=True))
        assert c._busy is not None
        await c._busy
        assert c.state is State.STARTING and not c.undecided
        c.on_message(
            {"type": "ready", "epoch": 0, "disks": {}, "hardware": "", "nics": {"net0": 0}}
        )
        c.state = State.PROTECTED
        assert decide(c.facts()).action is Action.NONE

    in_loop(body)
