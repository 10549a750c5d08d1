# SPDX-License-Identifier: GPL-2.0-or-later
"""The planned change of roles, on both hosts."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, Source
from colo_xdp.controller.checkpoint_coordinator import (
    CheckpointFailed,
    CheckpointRequest,
)
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.arbiter import LeaseArbiter
from colo_xdp.failover.states import State
from tests.netns.frames import tcp
from tests.unit.controller.fakes import BEAT, FakeQmp, Leased, event, in_loop, primary, secondary


def test_a_planned_failover_holds_until_this_side_transmits() -> None:
    """What both said after the last checkpoint is neither lost nor translated."""

    async def body() -> None:
        c, dp, sent = secondary()
        c.state = State.PROTECTED
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        c.on_message({"type": "begin", "n": 8, "cause": "switchover", "initial": False})
        t = time.monotonic_ns()
        c.on_qmp(event("STOP", t + 15, t + 60))
        c.on_qmp(event("RESUME", t + 30, t + 60))
        for at, source, text in (
            (t + 20, Source.SVM, b"old guest"),
            (t + 40, Source.SVM, b"new guest"),
            (t + 50, Source.CLIENT, b"client"),
        ):
            c.on_frame(CapturedFrame(source, at, 7, tcp(text), 0, False))
        assert sent.kinds() == ["begin_ack", "resumed"]
        assert dp.mode is Mode.CHECKPOINT and dp.epoch == 7
        c.on_message({"type": "downtime_start", "us": 3000})
        c._peer_message(BEAT | {"state": "stopped", "epoch": 8, "shut": True})
        assert c._busy is not None
        await c._busy
        while "downtime" not in sent.kinds():
            await asyncio.sleep(0.001)
        assert 3 <= sent[-1]["gap_us"] / 1000 < 5000
        assert c.state is State.PROMOTED and dp.mode is Mode.TAKEOVER and dp.epoch == 8
        assert b"client" in dp.injectors["deliver"].frames[0]
        forwarded = b"".join(dp.injectors["forward"].frames)
        assert b"new guest" in forwarded and b"old guest" not in forwarded

    in_loop(body)


def test_a_planned_failover_that_the_primary_gave_up_ends_as_a_checkpoint() -> None:
    c, dp, _ = secondary()
    c.state = State.PROTECTED
    c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
    c.on_message({"type": "begin", "n": 8, "cause": "switchover", "initial": False})
    t = time.monotonic_ns()
    c.on_qmp(event("STOP", t + 15, t + 60))
    c.on_qmp(event("RESUME", t + 30, t + 60))
    c.on_message(BEAT | {"state": "protected", "epoch": 8, "shut": False})
    assert c.state is State.PROTECTED and dp.mode is Mode.RUN and dp.epoch == 8


@pytest.mark.parametrize("late", [False, True])
def test_a_switchover_that_had_to_wait_is_not_made_up_for(late: bool) -> None:
    """Its command has answered that it is not done: the guest does not move at night by itself."""

    async def body() -> None:
        c, _, _ = primary()
        c.state = State.PROTECTED
        c.peer.connected = False
        made: list[str] = []

        async def checkpoint(want: CheckpointRequest) -> None:
            made.append(want.cause)
            c.state = State.STOPPED

        async def entered() -> None:
            pass

        c.checkpoints.make, c.entry.until_entered = checkpoint, entered  # type: ignore[method-assign]
        guard = asyncio.ensure_future(c.checkpoints._serve())
        c.on_message({"type": "switchover", "why": "asked by the operator on the secondary"})
        await asyncio.sleep(0)
        if late:
            c.checkpoints.switchover._until = time.monotonic() - 1
        c.peer.connected = True
        c.checkpoints._wake.set()
        await asyncio.wait({guard}, timeout=5)
        assert made == ["operator" if late else "switchover"]

    in_loop(body)


def test_a_switchover_needs_a_whole_pair() -> None:
    c, _, _ = secondary()
    c.state = State.DEGRADED
    with pytest.raises(ValueError, match="no switchover from state degraded"):
        asyncio.run(c.commands.run("switchover", {}))
    steps = asyncio.run(c.commands.run("switchover", {"dry_run": True}))["steps"]
    assert "a checkpoint" in steps[0] and any("yank" in s for s in steps)


def test_no_plan_while_the_lease_cannot_change_hands() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.state = State.PROTECTED
        c.arbiter = LeaseArbiter(Leased(False, "etcd is away"))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="etcd is away"):
            await c.switch_over(time.monotonic() + 1, "asked")
        assert c.checkpoints.wanted is None
        s, dp, sent = secondary()
        s.state, s.qemu.qmp = State.PROTECTED, SimpleNamespace(connected=True)  # type: ignore[assignment]
        begin = {"type": "begin", "n": 8, "cause": "switchover", "initial": False}
        for trouble, answer, mode in (
            ("away", "failed", Mode.RUN),
            ("", "begin_ack", Mode.CHECKPOINT),
        ):
            s.arbiter = LeaseArbiter(Leased(False, trouble))  # type: ignore[arg-type]
            s.on_message(begin)
            await asyncio.gather(*s._tasks)
            assert sent[-1]["type"] == answer and dp.mode is mode
            assert trouble in sent[-1].get("why", "")

    in_loop(body)


def test_a_plan_that_the_secondary_refuses_ends_as_a_checkpoint() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.state, c.peer.connected = State.PROTECTED, True
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        asked: list[str] = []

        async def checkpoint(want: Any) -> None:
            asked.append(want.cause)
            if want.cause == "switchover":
                raise CheckpointFailed("the secondary: the SVM could not get it", refused=True)

        async def migration() -> str:
            return "colo"

        c.checkpoints.make, c.entry.migration = checkpoint, migration  # type: ignore[method-assign]
        guard = asyncio.ensure_future(c.checkpoints._serve())
        while not asked:
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="could not get it"):
            await c.switch_over(time.monotonic() + 5, "asked")
        while len(asked) < 3:
            await asyncio.sleep(0)
        guard.cancel()
        assert asked == ["controller_restart", "switchover", "operator"]

    in_loop(body)


def test_nobody_is_demoted_in_a_switchover() -> None:
    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.view.pair.confirmed = State.PROTECTED, True
        c._begin_hold(8, planned=True)
        with pytest.raises(ValueError, match="a switchover to this guest"):
            await c.commands.run("demote", {})
        assert dp.mode is Mode.CHECKPOINT

    asyncio.run(body())
