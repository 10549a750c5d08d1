# SPDX-License-Identifier: GPL-2.0-or-later
"""What both hosts' controllers have in common: the loop, the peer, orders of an operator."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace

import pytest

from colo_xdp.abi import Mode, Source, SyncState
from colo_xdp.config.file import load
from colo_xdp.controller.controller import REDECIDE
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.controller.ticker import TICK_S
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.arbiter import LeaseArbiter
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.lease import boot_ns
from colo_xdp.failover.states import State
from colo_xdp.peer.heartbeat_datagram import Flag, Heartbeat
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.status.builder import active_json
from tests.netns.frames import tcp, udp
from tests.unit.controller.fakes import (
    EXAMPLES,
    FakeDataPath,
    FakeQmp,
    Leased,
    in_loop,
    primary,
    secondary,
)


def test_an_idle_controller_sleeps_until_something_cannot_wait() -> None:
    c, dp, _ = primary()

    async def body() -> None:
        task = asyncio.ensure_future(c.ticker.rest(1.0))
        await asyncio.sleep(0)
        now = time.monotonic_ns()
        assert c.ticker.at_ns > now + 4 * TICK_S * 1e9
        dp.waiting = [CapturedFrame(Source.PVM, now, 7, tcp(b"p"), 0, False)]
        c.drain()
        assert c.ticker.at_ns > now + 4 * TICK_S * 1e9, "compare_timeout is seconds"
        dp.waiting = [
            CapturedFrame(source, now, 7, udp(payload), 0, False)
            for source, payload in ((Source.PVM, b"p"), (Source.SVM, b"s"))
        ]
        c.drain()
        assert c.ticker.at_ns <= time.monotonic_ns() + TICK_S * 1e9
        await task
        assert time.monotonic_ns() >= c.ticker.at_ns
        task = asyncio.ensure_future(c.ticker.rest(1.0))  # on from here it is due all the time
        await asyncio.sleep(0)
        assert c.ticker.at_ns <= time.monotonic_ns() + TICK_S * 1e9
        task.cancel()
        await asyncio.wait({task})
        c.drain()  # nobody rests
        await asyncio.sleep(2 * TICK_S)

    in_loop(body)


def test_a_controller_that_idles_is_not_taken_for_a_dead_one() -> None:
    """controller_loss may be as short as an idle controller's sleep."""
    config = load(EXAMPLES / "primary.toml")
    config = replace(config, datapath=replace(config.datapath, controller_loss=50))
    c = Primary(config, FakeDataPath(Mode.RUN))  # type: ignore[arg-type]

    async def body() -> None:
        task = asyncio.ensure_future(c.ticker.rest(1.0))
        await asyncio.sleep(0)
        assert c.ticker.at_ns - time.monotonic_ns() < 0.02 * 1e9
        await task

    in_loop(body)


@pytest.mark.parametrize(
    ("held", "may", "lease"),
    [(True, True, "held"), (False, True, "promised"), (False, False, "none")],
)
def test_who_reaches_the_network_and_by_which_right(held: bool, may: bool, lease: str) -> None:
    c, dp, _ = primary()
    rest = {"undecided": False, "disks_unproven": False, "sync": "in_sync"}
    assert active_json(c) == {"transmitting": True, "lease": "", "remaining_s": None, **rest}
    c.arbiter = LeaseArbiter(Leased(held, "", may=may))  # type: ignore[arg-type]
    want = {"transmitting": may, "lease": lease, "remaining_s": 1.5 * may, **rest}
    assert active_json(c) == want
    for sign in ("gone", "absent"):
        setattr(c.view.guest, sign, True)
        assert not active_json(c)["transmitting"], "no QEMU, no voice"
        setattr(c.view.guest, sign, False)
    dp.mode = Mode.DROP
    assert active_json(c) == want | {"transmitting": False}
    s, dp, _ = secondary()
    assert not active_json(s)["transmitting"], "a standby"
    dp.mode, dp.sync_state = Mode.TAKEOVER, SyncState.STANDALONE
    assert active_json(s)["transmitting"] and active_json(s)["sync"] == "standalone"


@pytest.mark.parametrize(("planned", "fenced"), [(True, False), (False, True)])
def test_a_stopped_controller_gets_nobody_fenced(planned: bool, fenced: bool) -> None:
    """Nor after a restart of the one that has heard it; until it is heard again."""
    c, dp, _ = secondary()
    c.peer.connected = True
    c._peer_message({"type": "bye", "why": "a signal", "planned": planned, "back": 0})
    c.peer.connected = False
    again = Secondary(c.config, dp)  # type: ignore[arg-type]
    for one in (c, again):
        one.peer.last_seen_ns, one.view.born_ns = 1, 1  # long ago
        assert (decide(one.facts()).action is Action.FENCE) == fenced
    again._peer_up()
    again.peer.connected = False
    assert decide(again.facts()).action is Action.FENCE


def test_a_controller_that_said_when_it_comes_back_is_waited_for_until_then() -> None:
    c, dp, _ = secondary()
    c.peer.connected = True
    c._peer_message({"type": "bye", "why": "roles", "planned": True, "back": 60_000})
    c.peer.connected = False
    c.peer.last_seen_ns, c.view.born_ns = 1, 1
    assert decide(c.facts()).action is Action.DEGRADE
    dp.peer_stopped -= 60_000 * 1_000_000
    assert decide(c.facts()).action is Action.FENCE


@pytest.mark.parametrize("order", ["failover", "force"])
def test_an_operators_request_outlives_the_controller_that_received_it(order: str) -> None:
    async def body() -> None:
        c, dp, _ = secondary()
        dp.order = order
        c = Secondary(c.config, dp)  # type: ignore[arg-type]
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        object.__setattr__(c.config.failover, "fence", ("/bin/false",))
        c.reconsider()
        assert c._busy is not None
        await c._busy
        if order == "force":
            assert c.state is State.PROMOTED and dp.mode is Mode.TAKEOVER
        else:
            assert c.view.pair.fence.result is False and dp.mode is Mode.RUN

    in_loop(body)


def test_a_fence_holds_until_the_peer_is_heard_again() -> None:
    """Power that came back, or a fence that only cut its ports: what it said then is over."""

    async def body(heard: str) -> None:
        c, _, _ = secondary()
        c.state = State.DEGRADED
        object.__setattr__(c.config.failover, "fence", ("/bin/true",))
        c.view.pair.fence.result = await c.arbiter.fence()
        c.view.pair.fence.ended_boot_ns = boot_ns()
        assert c.view.pair.fence.result
        word = Heartbeat(Flag.VM, 0, 7, boot_ns(), c.view.pair.fence.ended_boot_ns - 1)
        c.heartbeats.on_heartbeat(word)  # sent before, and late
        assert c.view.pair.fence.result
        if heard == "datagram":
            c.heartbeats.on_heartbeat(replace(word, t=boot_ns(), after=boot_ns()))
        else:
            c._peer_up()
        c.view.guest.colo_exit = True
        facts = replace(c.facts(), peer_connected=False, peer_silent_ms=1e6, links=())
        assert decide(facts).action is Action.FENCE
        c.view.pair.fence.result = True
        facts = replace(facts, arbiter=replace(facts.arbiter, fenced=True))
        assert decide(facts).action is Action.TAKE_OVER, "or else it would be enough"

    for heard in ("datagram", "channel"):
        asyncio.run(body(heard))


@pytest.mark.parametrize("force", [False, True])
def test_an_operators_request_does_not_count_for_ever(
    force: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It was told that nothing came of it, and the other host may be alive again by then."""
    c, _, _ = secondary()
    c.state = State.DEGRADED
    c.commands.order("force" if force else "failover", 60)
    assert c.facts().operator and c.view.forced is force
    c.view.ordered(forced=force, until_s=time.monotonic() - 1)
    assert not c.facts().operator and not c.view.forced
    assert "request it again" in caplog.text
    caplog.clear()
    c.commands.order("failover", -1)
    c.state = State.PROMOTED
    assert not c.facts().operator and not caplog.text, "it did come about"


BEAT = {
    "type": "heartbeat", "t": 1, "echo": 0, "state": "protected", "epoch": 7, "vm": True,
    "shut": False, "over": False, "standalone": False, "shadow": False, "promise": False,
    "role": "secondary", "delivered": 0, "sent": 0,
}  # fmt: skip


def at_rest() -> tuple[Primary, list[int]]:
    """Return a protected primary that hears its peer, and where its decisions are counted."""
    c, _, _ = primary()
    decisions: list[int] = []
    c.state = State.PROTECTED
    c.peer.connected = True
    c.peer.last_seen_ns = time.monotonic_ns()

    def facts() -> object:
        decisions.append(1)
        return Primary.facts(c)

    c.facts = facts  # type: ignore[assignment,method-assign]
    return c, decisions


def test_a_heartbeat_that_says_nothing_new_needs_no_decision() -> None:
    async def body() -> None:
        c, decisions = at_rest()
        c._next_beat = time.monotonic() + 60
        c._peer_message(BEAT)
        assert len(decisions) == 1, "the first one of a connection"
        c._peer_message(BEAT | {"t": 2, "delivered": 5})
        assert len(decisions) == 1
        for news in ({"epoch": 8}, {"state": "degraded"}, {"standalone": True}, {"vm": False}):
            before = len(decisions)
            c._peer_message(BEAT | news)
            assert len(decisions) == before + 1, news

    in_loop(body)


def test_whatever_happens_has_the_next_tick_decide() -> None:
    async def body() -> None:
        c, _ = at_rest()
        for happens in (
            lambda: c.on_qmp_event(QmpEvent("COLO_EXIT", {}, 0, 0)),
            lambda: c.on_qemu_found(there=True),
            lambda: c._peer_down("closed"),
            lambda: c.become(State.PROTECTED, "another reason"),
        ):
            c._news, c._undecided_beats = False, 0
            assert c._nothing_new()
            happens()
            assert not c._nothing_new()
        c._news, c._undecided_beats = False, 0
        assert [c._nothing_new() for _ in range(REDECIDE)][-2:] == [True, False]
        c._undecided_beats = 0
        c.peer.last_seen_ns -= 700_000_000
        assert not c._nothing_new(), "the peer may be about to count as silent"

    in_loop(body)


def test_a_heartbeat_that_is_due_soon_answers_the_peers() -> None:
    async def body() -> None:
        c, _ = at_rest()
        interval = c.config.peer.heartbeat_interval / 1000
        for early, begins, answers in (
            (0.5, False, False),
            (0.1, False, True),
            (0.5, True, True),
        ):
            c.beat()
            msg = BEAT | {"echo": 0 if begins else c.heartbeats._sent_ns}
            if begins:
                c.heartbeats._sent_ns -= int(interval * 1e9)
            c._next_beat = time.monotonic() + early * interval
            rest = asyncio.ensure_future(c.ticker.rest(60.0))
            await asyncio.sleep(0)
            c._peer_message(msg)
            assert rest.done() is False  # it ends in the next round of the loop
            await asyncio.sleep(0)
            assert rest.done() is answers and (c._next_beat == 0.0) is answers
            rest.cancel()
            await asyncio.wait({rest})

    in_loop(body)


def test_a_frame_that_an_internal_error_lost_ends_the_controller() -> None:
    """An event loop only logs what a callback raises; the pair would call itself protected."""

    async def body() -> None:
        c, dp, _ = primary()

        def broken(sink: object, limit: int = 0) -> int:
            raise KeyError("flow")

        reading, writing = os.pipe()
        dp.fds, dp.drain = (reading,), broken  # type: ignore[assignment, method-assign]
        asyncio.get_running_loop().add_reader(reading, c._readable)
        os.write(writing, b"x")
        await asyncio.wait_for(c.finished(), 5)
        assert c.failures == ["KeyError('flow')"]
        assert not asyncio.get_running_loop().remove_reader(reading), "it reads no more"
        os.close(reading)
        os.close(writing)

    in_loop(body)


def test_an_error_as_a_controller_comes_to_rest_ends_it_too() -> None:
    """A callback of the event loop asks; nothing would wake the controller up again."""

    async def body() -> None:
        c, dp, _ = primary()

        def broken(sink: object, limit: int = 0) -> int:
            raise KeyError("flow")

        dp.drain = broken  # type: ignore[method-assign, assignment]
        assert not c._at_rest()
        await asyncio.wait_for(c.finished(), 5)
        with pytest.raises(KeyError):
            c.drain()  # whoever goes on with what should be in it must not
        assert c.failures == ["KeyError('flow')"]

    in_loop(body)
