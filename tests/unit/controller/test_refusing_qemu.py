# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that answers every command with an error, as through a relay that has lost its other end:
nothing can be asked of it, so the pair does not call itself protected."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.controller.story import Kind
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.prospect import Outcome
from colo_xdp.failover.states import State
from colo_xdp.qemu import supervisor
from colo_xdp.qemu.qmp import QmpRefused
from colo_xdp.status.builder import if_peer_died_json
from tests.unit.controller.fakes import FakeQmp, in_loop, primary, secondary

ERROR = "SVM: query-status: GenericError: \x1b]0;no connection to libvirtd"
SHOWN = (
    "QEMU answers with errors, so nothing can be asked of it: SVM: query-status: GenericError: "
    "\N{REPLACEMENT CHARACTER}]0;no connection to libvirtd"
)


class RefusingQmp(FakeQmp):
    """Refuses every command for as long as it is told to."""

    refuses = True

    async def status(self, timeout: float | None = None) -> str:
        self.said.append("query-status")
        if self.refuses:
            raise QmpRefused(ERROR)
        return "running"

    async def migration_status(self, timeout: float | None = None) -> str:
        if self.refuses:
            raise QmpRefused("SVM: query-migrate: GenericError: no connection to libvirtd")
        return await super().migration_status(timeout)


def protected(c: Primary | Secondary) -> RefusingQmp:
    c.state, c.reason = State.PROTECTED, "both guests are equal"
    c.peer.connected, c.peer.last_seen_ns = True, time.monotonic_ns()
    c.view.in_colo()
    c.view.copy_confirmed()
    qmp = c.qemu.qmp = RefusingQmp()  # type: ignore[assignment]
    return qmp


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WATCH_S", 0.001)
    monkeypatch.setattr(supervisor, "WATCH_LESS_S", 0.0)


async def until_asked(qmp: RefusingQmp, times: int) -> None:
    end = len(qmp.said) + times
    while len(qmp.said) < end:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)


@pytest.mark.parametrize("make", [primary, secondary])
def test_a_pair_whose_qemu_refuses_everything_is_not_protected(make: Any) -> None:
    async def body() -> None:
        c, _, sent = make()
        events: list[dict[str, Any]] = []
        c.story.keep = events.append
        qmp = protected(c)
        watch = asyncio.ensure_future(c.qemu.watch())
        await until_asked(qmp, 1)
        assert c.announced_state()[0] is State.PROTECTED, "one error is nothing"
        await until_asked(qmp, 4)
        assert c.announced_state() == (State.DEGRADED, SHOWN)
        c.beat()
        assert sent[-1]["state"] == "degraded", "so that the other host does not say it either"
        assert decide(c.facts()).action is Action.NONE, "nobody is given up for that"
        c.state = State.CHECKPOINTING
        assert c.announced_state()[0] is State.DEGRADED
        c.state = State.PROTECTED
        qmp.refuses = False
        await until_asked(qmp, 2)
        assert c.announced_state() == (State.PROTECTED, "both guests are equal")
        told = [e["why"] for e in events if e["kind"] == Kind.QEMU]
        assert told == [SHOWN, "QEMU does not answer with errors any more"]
        assert [h["reason"] for h in c.history] == told
        watch.cancel()

    in_loop(body)


def test_what_the_other_hosts_death_would_lead_to() -> None:
    """A copy that cannot be told to take over does not; a PVM runs on without being told."""
    p, _, _ = primary()
    s, _, _ = secondary()
    for c, outcome in ((p, Outcome.GOES_SOLO), (s, Outcome.TAKES_OVER)):
        protected(c)
        assert if_peer_died_json(c)["outcome"] == outcome
        c.qemu.trouble = SHOWN
    assert if_peer_died_json(p)["outcome"] == Outcome.GOES_SOLO
    died = if_peer_died_json(s)
    assert died["outcome"] == Outcome.WAITS and died["within_s"] is None
    assert SHOWN in died["sentence"]


def test_no_switchover_to_a_guest_that_cannot_take_over() -> None:
    c, dp, sent = secondary()
    protected(c)
    c.qemu.trouble = SHOWN
    c.on_message({"type": "begin", "n": 8, "cause": "switchover", "initial": False})
    assert sent[-1] == {"type": "failed", "n": 8, "why": SHOWN}
    assert dp.mode is Mode.RUN and c.state is State.PROTECTED
    c.on_message({"type": "begin", "n": 8, "cause": "periodic", "initial": False})
    assert sent[-1]["type"] == "begin_ack", "QEMU's events tell of its end"
