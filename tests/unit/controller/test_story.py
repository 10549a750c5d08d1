# SPDX-License-Identifier: GPL-2.0-or-later
"""What a controller tells of itself: each thing once, and no successful checkpoint."""

from __future__ import annotations

import asyncio
from typing import Any

from colo_xdp.abi import Mode
from colo_xdp.controller.story import Kind, Story
from colo_xdp.failover.decision import Action, Decision
from colo_xdp.failover.states import Role, State
from tests.unit.controller.fakes import in_loop, primary, secondary


def told(story: Story) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    story.keep = events.append
    return events


def test_checkpoints_of_a_protected_pair_are_left_out() -> None:
    story = Story(Role.PRIMARY)
    events = told(story)
    for state in (State.CHECKPOINTING, State.PROTECTED, State.CHECKPOINTING, State.PROTECTED):
        story.became(state, f"epoch {len(events)}")
    story.became(State.DEGRADED, "suspected")
    story.became(State.DEGRADED, "suspected")
    story.became(State.DEGRADED, "fencing it")
    story.became(State.CHECKPOINTING, "the peer is back")
    story.became(State.CHECKPOINTING, "another request")
    story.became(State.PROTECTED, "equal")
    story.became(State.PROTECTED, "equal again")
    assert [(e["state"], e["why"]) for e in events] == [
        ("checkpointing", "epoch 0"), ("protected", "epoch 1"), ("degraded", "suspected"),
        ("degraded", "fencing it"), ("checkpointing", "the peer is back"), ("protected", "equal"),
    ]  # fmt: skip
    assert {e["role"] for e in events} == {"primary"} and {e["kind"] for e in events} == {"state"}


def test_a_start_tells_what_was_found() -> None:
    story = Story(Role.SECONDARY)
    events = told(story)
    story.began(17, State.STARTING, "starting")
    story.began(18, State.DEGRADED, "taken over")
    assert [e["why"] for e in events] == ["process 17", "process 18, degraded: taken over"]


def test_a_failover_is_told_step_by_step() -> None:
    async def body() -> None:
        c, _, _ = secondary()
        events = told(c.story)
        c.state = State.PROTECTED

        async def fence() -> bool:
            return True

        c.arbiter.fence = fence  # type: ignore[method-assign]
        await c._act(Decision(Action.FENCE, "silent; fencing it"))
        assert [(e["kind"], e.get("state"), e.get("ok")) for e in events] == [
            (Kind.STATE, "degraded", None), (Kind.FENCED, None, True),
        ]  # fmt: skip
        c._peer_down("silent for 1000 ms")
        c.change_role("a QEMU waits here")
        assert [e["kind"] for e in events[2:]] == [Kind.PEER, Kind.ROLE]

    in_loop(body)


def test_what_operators_ask_for_is_told_and_what_they_read_is_not() -> None:
    async def body() -> None:
        c, _, _ = primary(Mode.RUN)
        events = told(c.story)
        await c.commands.run("mode", {})
        await c.commands.run("failover", {"dry_run": True})
        assert events == []
        await c.commands.run("mode", {"mode": "paused"})
        assert [(e["kind"], e["why"]) for e in events] == [(Kind.OPERATOR, "mode paused")]

    asyncio.run(body())
