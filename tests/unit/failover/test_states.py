# SPDX-License-Identifier: GPL-2.0-or-later
"""Legal transitions: what the table says is what become() lets pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.failover import states
from colo_xdp.failover.states import TRANSITIONS, IllegalTransition, Role, State, diagram, legal
from tests.unit.controller.fakes import in_loop, primary, secondary

SHOWN_ONLY = {State.PAUSED, State.SHADOW}


@pytest.mark.parametrize("role", Role)
def test_each_state_is_reached_from_the_first_and_none_is_unknown(role: Role) -> None:
    table, seen, todo = TRANSITIONS[role], set(), [State.STARTING]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo += table[state]
    other = State.PROMOTED if role is Role.PRIMARY else State.SOLO
    assert seen == set(table) == set(State) - SHOWN_ONLY - {other}


@pytest.mark.parametrize("role", Role)
def test_who_ran_standalone_is_protected_by_a_first_checkpoint_only(role: Role) -> None:
    for state in set(TRANSITIONS[role]) & {State.SOLO, State.PROMOTED, State.STOPPED}:
        assert not legal(role, state, State.PROTECTED)
        assert not legal(role, state, State.CHECKPOINTING)
    assert not legal(Role.PRIMARY, State.STOPPED, State.SOLO)
    assert not legal(Role.SECONDARY, State.STARTING, State.PROMOTED), "it is no copy"


@pytest.mark.parametrize("role", Role)
def test_the_diagram_shows_what_is_legal_and_nothing_else(role: Role) -> None:
    first, start, *arrows = diagram(role).splitlines()
    assert (first, start) == ("stateDiagram-v2", "    [*] --> starting")
    shown = {tuple(line.strip().replace("_", "-").split(" --> ")) for line in arrows}
    states_ = set(State) - SHOWN_ONLY
    assert shown == {
        (a.value, b.value) for a in states_ for b in states_ if a is not b and legal(role, a, b)
    }
    assert len(shown) == len(arrows)


@pytest.mark.parametrize("role", Role)
def test_the_documents_draw_what_the_table_says(role: Role) -> None:
    text = (Path(__file__).parents[3] / "docs/design/failover.md").read_text()
    assert f"```mermaid\n{diagram(role)}```" in text


@pytest.mark.parametrize("make", [primary, secondary])
def test_an_illegal_transition_is_counted_and_made_in_production_and_raises_in_tests(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The data path has changed before: a controller that kept its old state would lie about it."""

    async def body() -> None:
        c, _, _ = make()
        end = State.SOLO if c.role is Role.PRIMARY else State.PROMOTED
        c.state = end
        with pytest.raises(IllegalTransition, match=f"{end.value} to protected"):
            c.become(State.PROTECTED, "a mistake")
        assert c.state is end
        monkeypatch.setattr(states, "STRICT", False)
        c.failures.clear()
        with caplog.at_level(logging.ERROR):
            c.become(State.PROTECTED, "a mistake")
        assert c.state is State.PROTECTED and len(c.failures) == 1
        assert f"{end.value} to protected" in c.failures[0] and c.failures[0] in caplog.text
        assert not c._finished.is_set(), "its guest goes on, and so does it"
        c.become(State.PROTECTED, "the same for another reason")
        c.become(State.CHECKPOINTING, "a legal one")
        assert len(c.failures) == 1

    in_loop(body)
