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
from colo_xdp.config.schema import Disk
from colo_xdp.controller.primary import Primary
from colo_xdp.failover.arbiter import FenceArbiter
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.facts import OwnGuest
from colo_xdp.failover.states import State
from colo_xdp.qemu.qmp import QmpError
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


class Machine:
    """QMP of a guest that has booted and knows of no pair."""

    connected = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.failing = 0

    async def migration_status(self) -> str:
        return ""

    async def execute(self, command: str, *args: Any, **k: Any) -> Any:
        self.said.append(command)
        if command == "system_reset" and self.failing:
            self.failing -= 1
            raise QmpError("busy")
        return {}


@pytest.mark.parametrize("failing", [0, 2])
def test_a_guest_that_booted_beside_the_other_one_boots_again_after_its_end(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have started with its host, while the other one was active and wrote."""
    monkeypatch.setattr("colo_xdp.controller.primary.LOOK_S", 0.001)

    async def body() -> None:
        c, dp, _ = undecided()
        machine = Machine()
        machine.failing = failing
        c.qemu.qmp = machine  # type: ignore[assignment]
        look = asyncio.ensure_future(c._look_at_guest())
        while c._own_guest is not OwnGuest.NEW:
            await asyncio.sleep(0)
        assert c.own_guest is OwnGuest.NEW and not machine.said
        c._peer_message(beat("stopped", shut=True, standalone=True))
        assert c.own_guest is OwnGuest.UNKNOWN and not c.transmits, "not before it is reset"
        await asyncio.wait_for(look, 5)
        assert machine.said == ["system_reset"] * (failing + 1)
        assert c.transmits and dp.mode is Mode.BYPASS

    in_loop(body)


def test_disks_that_the_other_guest_has_outlived_are_not_served_by_themselves() -> None:
    async def body() -> None:
        c, dp, _ = undecided()
        c.config = replace(c.config, disks=(Disk(name="d0"),))
        machine = Machine()
        c.qemu.qmp = machine  # type: ignore[assignment]
        c._own_guest = OwnGuest.NEW
        c._peer_message(beat("stopped", shut=True, standalone=True))
        c.reconsider()
        assert c.own_guest is OwnGuest.OUTDATED and not machine.said
        assert not c.transmits and dp.mode is Mode.DROP
        assert "the disks here lack what it has written" in c.reason

    in_loop(body)
