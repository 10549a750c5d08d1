# SPDX-License-Identifier: GPL-2.0-or-later
"""An arbiter is one class and one name: nobody else knows more of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from colo_xdp.abi import Mode
from colo_xdp.config import schema
from colo_xdp.config.file import load
from colo_xdp.controller.secondary import Secondary
from colo_xdp.failover import arbiter
from colo_xdp.failover.arbiter import ARBITERS, Arbiter, ArbiterError, ArbiterKind, Host
from colo_xdp.failover.decision import Action
from colo_xdp.failover.facts import ArbiterView
from colo_xdp.failover.states import State
from colo_xdp.status.builder import active_json
from tests.unit.controller.fakes import (
    EXAMPLES,
    FakeDataPath,
    FakeQmp,
    Sent,
    in_loop,
    secondary,
)


class Witness(Arbiter):
    """A third place that lets one of the two hosts transmit."""

    needs_grant = True

    def __init__(self, host: Host) -> None:
        self.host = host
        self.granted = self.recorded = self.away = False
        self.asked: list[tuple[Action, bool]] = []

    def view(self) -> ArbiterView:
        return ArbiterView(
            "witness", needs_grant=True, granted=self.granted, recorded=self.recorded,
            may_transmit=self.granted,
        )  # fmt: skip

    def follow(self, action: Action, *, wants: bool) -> None:
        self.asked.append((action, wants))

    async def check(self) -> None:
        if self.away:
            raise ArbiterError("it is away")

    @property
    def right(self) -> str:
        return "witnessed" if self.granted else "none"

    def says(self, *, granted: bool, recorded: bool) -> None:
        self.granted, self.recorded = granted, recorded
        self.host.changed()


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARBITERS, "witness", ArbiterKind(Witness, needs_grant=True))


def with_a_third() -> tuple[Secondary, Witness, FakeDataPath, Sent]:
    config = load(EXAMPLES / "secondary.toml")
    config = replace(
        config, failover=replace(config.failover, arbiter="witness", automatic=True, fence=())
    )
    dp, sent = FakeDataPath(Mode.RUN, adopted=True), Sent()
    c = Secondary(config, dp)  # type: ignore[arg-type]
    c.peer.send = sent  # type: ignore[method-assign]
    c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
    c.state = State.PROTECTED
    assert isinstance(c.arbiter, Witness)
    return c, c.arbiter, dp, sent


def test_a_third_arbiter_is_asked_before_a_guest_transmits(third: None) -> None:
    async def body() -> None:
        c, witness, dp, _ = with_a_third()
        c.view.colo_lost()  # and nothing is heard of the peer
        c.peer.last_seen_ns, c.view.born_ns = 1, 1
        c.reconsider()
        assert witness.asked[-1] == (Action.ACQUIRE, True)
        assert c.state is State.DEGRADED and "waiting for the witness" in c.reason
        witness.says(granted=True, recorded=False)
        assert c._busy is None and dp.mode is Mode.RUN, "it has not written it down yet"
        assert not active_json(c)["transmitting"] and active_json(c)["lease"] == "witnessed"
        witness.says(granted=True, recorded=True)
        assert c._busy is not None
        await c._busy
        assert c.state is State.PROMOTED and dp.mode is Mode.TAKEOVER
        assert "the witness is held" in c.reason and active_json(c)["transmitting"]
        witness.granted = False
        assert not active_json(c)["transmitting"]
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


@pytest.mark.parametrize("away", [True, False])
def test_a_third_arbiter_is_asked_before_a_planned_failover(third: None, away: bool) -> None:
    async def body() -> None:
        c, witness, dp, sent = with_a_third()
        witness.away = away
        c.on_message({"type": "begin", "n": 8, "cause": "switchover", "initial": False})
        await asyncio.gather(*c._tasks)
        if away:
            assert sent[-1]["why"] == "the SVM could not get the witness: it is away"
        assert sent.kinds() == ["failed" if away else "begin_ack"]
        assert dp.mode is (Mode.RUN if away else Mode.CHECKPOINT)

    in_loop(body)


def test_each_arbiter_has_a_choice_of_the_configuration_and_each_choice_an_arbiter() -> None:
    key = schema.FailoverKeys.__dataclass_fields__["arbiter"]
    said = key.metadata["check"]("witness")
    assert said == "expected " + " or ".join(f'"{name}"' for name in ARBITERS)


@pytest.mark.parametrize("name", ARBITERS)
def test_programs_are_loaded_for_what_the_arbiter_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arbiter, "make_store", lambda config: None)
    config = load(EXAMPLES / "secondary.toml")
    config = replace(config, failover=replace(config.failover, arbiter=name, fence=("/bin/true",)))
    c = Secondary(config, FakeDataPath(Mode.RUN, adopted=True))  # type: ignore[arg-type]
    view = c.arbiter.view()
    assert ARBITERS[name].needs_grant is c.arbiter.needs_grant is view.needs_grant
    assert view.fences is (name == "fence")
    assert (c.facts().arbiter.name == "lease") is (name == "lease")


def test_what_is_forced_is_not_fenced_first() -> None:
    c, _, _ = secondary()
    object.__setattr__(c.config.failover, "fence", ("/bin/true",))
    assert c.facts().arbiter.fences
    c.commands.order("failover", 60)
    assert c.facts().arbiter.fences
    c.commands.order("force", 60)
    assert not c.facts().arbiter.fences
