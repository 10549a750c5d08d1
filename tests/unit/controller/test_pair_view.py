# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host knows of the pair: changed in one place, thrown away with what it is about."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.controller.pair_view import LocalGuest, PairLife, PairView
from colo_xdp.failover.facts import OtherGuest
from colo_xdp.failover.states import Role, sends_nothing
from colo_xdp.status.builder import active_json
from colo_xdp.status.server import health
from tests.unit.controller.fakes import (
    FakeDataPath,
    WaitingQmp,
    in_loop,
    primary,
    secondary,
)

PACKAGE = Path(__file__).parents[3] / "colo_xdp"


def writes(path: Path) -> list[str]:
    """Assignments to something that is reached by way of a `view`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [x for t in node.targets for x in getattr(t, "elts", [t])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for t in targets:
            text = ast.unparse(t)
            if isinstance(t, ast.Attribute) and "view" in text.split(".")[:-1]:
                found.append(f"{path.name}:{node.lineno}: {text}")
    return found


def test_what_is_known_changes_in_one_place() -> None:
    assert [x for p in PACKAGE.rglob("*.py") for x in writes(p)] == []
    assert writes(Path(__file__)), "it finds those below"


def known() -> PairView:
    """A view of which everything is known, and something is set in each field."""
    view = PairView(Role.SECONDARY, 1, 2)
    for part in (view.guest, view.pair):
        for f in fields(part):
            value = getattr(part, f.name)
            setattr(part, f.name, "x" if isinstance(value, str) else True)
    view.peer.shut, view.peer.state, view.peer.guest = True, "solo", OtherGuest.TRANSMITTING
    view.paused = view.shadow = True
    return view


def test_a_new_guest_has_nothing_of_the_one_before() -> None:
    view = known()
    view.new_guest()
    assert (view.guest, view.pair) == (LocalGuest(), PairLife())
    assert not view.peer.shut
    assert view.peer.state == "solo" and view.peer.guest is OtherGuest.TRANSMITTING, (
        "it is still there"
    )
    assert view.paused, "a person has said so of this host"
    assert view.shadow, "a later checkpoint ends it"


def test_a_new_pair_keeps_the_guest_that_is_there() -> None:
    view = known()
    view.new_pair()
    assert view.pair == PairLife()
    assert view.guest.standalone and view.guest.over, "its clients are the same"


@pytest.mark.parametrize(("sign", "value"), [("absent", True), ("halted", "its disk is full")])
def test_a_guest_that_follows_a_dead_one_is_heard_like_any_other(sign: str, value: Any) -> None:
    """Whatever became of the one before: the next one takes over, and is said to transmit."""

    async def body() -> None:
        c, dp, _ = secondary(Mode.DROP)
        c.qemu.qmp = WaitingQmp()  # type: ignore[assignment]
        c.view.guest_gone()
        setattr(c.view.guest, sign, value)
        await c.on_replacement_qemu()
        dp.mode = Mode.TAKEOVER
        assert active_json(c)["transmitting"] and not c.view.guest.halted
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("forwarding", [True, False])
@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("make", [primary, secondary])
def test_everybody_says_the_same_of_who_is_heard(
    make: Any, mode: Mode, forwarding: bool, gone: bool
) -> None:
    c, dp, _ = make()
    assert isinstance(dp, FakeDataPath)
    dp.mode, dp.port_forwarding, c.view.guest.gone = mode, forwarding, gone
    passes = {
        Role.PRIMARY: (Mode.RUN, Mode.CHECKPOINT, Mode.BYPASS),
        Role.SECONDARY: (Mode.TAKEOVER,),
    }[c.role]
    if c.role is Role.PRIMARY and mode is Mode.TAKEOVER:
        return  # no mode of a primary
    heard = mode in passes and forwarding and not gone
    said = active_json(c)
    assert said["transmitting"] is heard
    answer = health("/primary", {"state": "x", "role": "x", "reason": "", "active": said})
    assert answer is not None and (answer[0] == 200) is heard
    assert c.silent() is sends_nothing(c.role, mode) is (mode not in passes)
