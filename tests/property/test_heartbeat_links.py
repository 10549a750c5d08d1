# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that more heartbeat links make a decision more careful, never less."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.facts import ArbiterView, Ending, Facts, LinkView, OtherGuest, OwnGuest
from colo_xdp.failover.states import Role, State

CASES = 15_000
TIMES = (0.0, 5.0, 999.0, 1000.0, 1001.0, 5000.0, 5001.0, 10_000.0, 10_001.0, float("inf"))


def cases(seed: int) -> Iterator[tuple[Facts, tuple[LinkView, ...]]]:
    """Yield arbitrary facts, with one to three links."""
    rnd = random.Random(seed)
    flags = (
        "own_vm_alive", "own_qmp", "peer_connected", "peer_vm_gone", "colo_exit", "automatic",
        "operator", "checkpoint_overdue", "shadow", "own_vm_hangs", "peer_slow", "waiting",
    )  # fmt: skip
    arbiters = (
        "fences", "needs_grant", "granted", "may_transmit", "peer_standalone", "recorded",
        "requested",
    )  # fmt: skip
    for _ in range(CASES):
        # most of them are decided by an earlier row of the table: no more of these than needed
        rare = {
            "operator", "peer_vm_gone", "shadow", "needs_grant", "requested", "peer_standalone",
        }  # fmt: skip
        drawn = {n: rnd.random() < (0.15 if n in rare else 0.5) for n in (*flags, *arbiters)}
        drawn["own_vm_alive"] = rnd.random() < 0.95
        drawn["fences"] &= not drawn["needs_grant"]  # it is one arbiter or the other
        its: dict[str, Any] = {n: drawn.pop(n) for n in arbiters}
        its["fenced"] = rnd.choice((None, False, True)) if its["fences"] else None
        f = Facts(
            role=rnd.choice(list(Role)), state=rnd.choice(list(State)),
            peer_silent_ms=rnd.choice(TIMES), heartbeat_timeout_ms=1000.0,
            dead_after_ms=rnd.choice((5000.0, 10_000.0)),
            arbiter=ArbiterView("lease", **its), ending=rnd.choice(list(Ending)),
            undecided=rnd.random() < 0.1, other_guest=rnd.choice(list(OtherGuest)),
            own_guest=rnd.choice(list(OwnGuest)),
            **drawn,  # type: ignore[arg-type]
        )  # fmt: skip
        yield f, tuple(some_links(rnd, rnd.choice((1, 2, 3))))


def some_links(rnd: random.Random, n: int) -> Iterator[LinkView]:
    for _ in range(n):
        yield LinkView("way", rnd.choice(TIMES), rnd.choice(TIMES))


#: what cannot be undone
GRAVE = (Action.TAKE_OVER, Action.GO_SOLO, Action.FENCE, Action.ACQUIRE, Action.OPEN)


def test_no_path_leads_to_what_cannot_be_called_back() -> None:
    careful = 0
    for f, links in cases(1):
        one, more = decide(f), decide(replace(f, links=links))
        if more.action in GRAVE:
            assert one.action is more.action, (f, links)
        if one.action in (Action.NONE, Action.DEGRADE, Action.REARM, Action.WAIT):
            assert more.action in (one.action, Action.NONE, Action.DEGRADE, Action.ASK_SHUT)
        careful += one.action in GRAVE and more.action not in GRAVE
    assert careful > 40, "else the cases prove nothing"


def test_nor_does_one_more() -> None:
    rnd = random.Random(3)
    for f, links in cases(2):
        a = decide(replace(f, links=links))
        b = decide(replace(f, links=(*links, *some_links(rnd, 1))))
        if b.action in GRAVE:
            assert a.action is b.action, (f, links)


def test_a_silent_path_changes_no_action() -> None:
    """Nor does it delay anything: what is decided is decided at the same time."""
    for f, links in cases(4):
        dead = tuple(replace(p, silent_ms=max(p.silent_ms, f.peer_silent_ms)) for p in links)
        assert decide(replace(f, links=dead)).action is decide(f).action


def test_links_change_nothing_while_the_control_channel_is_up() -> None:
    for f, links in cases(5):
        f = replace(f, peer_silent_ms=5.0)
        assert decide(replace(f, links=links)) == decide(f)


def test_who_is_heard_is_not_fenced_unless_he_is_deaf() -> None:
    deaf = asked = 0
    for f, links in cases(6):
        f = replace(
            f,
            links=(*links, LinkView("heard", 5.0, 5.0)),
            operator=False,
            arbiter=replace(f.arbiter, requested=False),
        )
        d = decide(f)
        if d.action in GRAVE and not f.peer_vm_gone and d.action is not Action.OPEN:
            deaf += 1
            assert f.role is Role.PRIMARY and f.peer_silent_ms > 2 * f.dead_after_ms
            assert f.colo_exit or f.checkpoint_overdue or f.waiting
            assert "does not demote itself" in d.why
        if d.action is Action.ASK_SHUT:
            asked += 1
            assert f.role is Role.PRIMARY and f.own_qmp
    assert deaf > 10 and asked > 40


def test_there_is_always_a_sentence() -> None:
    """It contains no number that changes by itself: it would be logged over and over."""
    for f, links in cases(7):
        d = decide(replace(f, links=links))
        assert len(d.why) > 10 and not any(c.isdigit() for c in d.why)
