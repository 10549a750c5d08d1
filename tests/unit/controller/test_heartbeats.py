# SPDX-License-Identifier: GPL-2.0-or-later
"""What both controllers make of datagrams, and of their own loop standing still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.controller.checkpoint_coordinator import CheckpointRequest
from colo_xdp.controller.controller import Controller
from colo_xdp.controller.heartbeats import round_length
from colo_xdp.engine.engine import Engine
from colo_xdp.failover.decision import Action
from colo_xdp.failover.facts import Ending
from colo_xdp.failover.lease import boot_ns
from colo_xdp.failover.states import State
from colo_xdp.peer.channel import OTHER
from colo_xdp.peer.heartbeat_datagram import NONCE, Flag, Heartbeat, HeartbeatSession, session_key
from tests.unit.controller.fakes import FakeDataPath, Sent, primary, secondary

LINK = "peer link"
Made = tuple[Controller, FakeDataPath, list[Action]]


def word(flags: Flag, *, late_ms: float = 5, lag_ms: int = 0, epoch: int = 7) -> Heartbeat:
    """Said after the peer had heard what this side sent so long ago."""
    return Heartbeat(flags, lag_ms, epoch, boot_ns(), boot_ns() - int(late_ms * 1e6))


def cut(make: Callable[[], tuple[Any, FakeDataPath, Sent]]) -> Made:
    """A protected pair whose control channel has gone; what is performed is only noted."""
    c, dp, _ = make()
    c.state = State.PROTECTED
    c.qemu.qmp = SimpleNamespace(connected=True)
    c.peer.connected = False
    c.view.peer.guest_since_boot_ns = boot_ns() - 10**10
    done: list[Action] = []

    async def perform(action: Action, why: str) -> None:
        done.append(action)

    c.perform = perform
    return c, dp, done


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 10))


@pytest.mark.parametrize(
    ("make", "over"), [(primary, Action.GO_SOLO), (secondary, Action.TAKE_OVER)]
)
def test_a_shut_data_path_is_certain_silence(make: Any, over: Action) -> None:
    async def body() -> None:
        c, _, done = cut(make)
        c.heartbeats.on_heartbeat(word(Flag.SHUT | Flag.HANGS))
        assert c.view.peer.shut and "hangs" in c.facts().peer_why
        await asyncio.sleep(0)
        assert done == [over]

    run(body)


@pytest.mark.parametrize(
    "why", ["connected", "kept back", "before the guest", "hears nothing", "overtaken"]
)
@pytest.mark.parametrize("make", [primary, secondary])
def test_only_a_fresh_datagram_counts_and_only_without_the_channel(make: Any, why: str) -> None:
    async def body() -> None:
        c, _, done = cut(make)
        said = word(Flag.SHUT | Flag.ASK | Flag.STANDALONE | Flag.SVM)
        if why == "connected":
            c.peer.connected = True
        elif why == "kept back":
            said = word(said.flags, late_ms=c.config.peer.heartbeat_timeout + 1)
        elif why == "before the guest":
            c._peer_message(
                {"type": "ready", "epoch": 7, "disks": {}, "hardware": "", "nics": {"net0": 0}}
            )
            c.peer.connected = False
        elif why == "overtaken":  # by what the control channel brought before it was cut
            beat = {"t": said.t, "echo": 0, "state": "protected", "epoch": 7, "vm": True,
                    "shut": False, "standalone": False, "shadow": False, "promise": False,
                    "delivered": 0, "sent": 0,
                    "role": OTHER[c.role.value]}  # fmt: skip
            c._peer_message({"type": "heartbeat", **beat})
        else:
            said = Heartbeat(said.flags, 0, 7, said.t, 0)
        c.heartbeats.on_heartbeat(said)
        await asyncio.sleep(0)
        assert not c.view.peer.shut and done == [] and c.state is State.PROTECTED

    run(body)


def test_asked_by_datagram_a_secondary_is_demoted_and_reports_it() -> None:
    async def body() -> None:
        c, dp, _ = cut(secondary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.ASK))
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and c.view.guest.demoted
        assert Flag.SHUT in c.heartbeats.flags() and Flag.STANDALONE not in c.heartbeats.flags()
        # and comes back if the primary dies without having transmitted alone, as on the channel
        c.heartbeats.on_heartbeat(word(Flag.SHUT))
        assert c.state is State.DEGRADED

    run(body)


def test_a_primary_that_ran_standalone_leaves_nothing_to_come_back_to() -> None:
    async def body() -> None:
        c, _, done = cut(secondary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.ASK))
        c.heartbeats.on_heartbeat(word(Flag.SHUT | Flag.STANDALONE))
        await asyncio.sleep(0)
        assert c.state is State.STOPPED and done == []

    run(body)


def test_a_secondary_is_demoted_when_the_primary_has_run_standalone() -> None:
    async def body() -> None:
        c, dp, done = cut(secondary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.STANDALONE))
        assert c.state is State.STOPPED and dp.mode is Mode.DROP
        c.heartbeats.on_heartbeat(word(Flag.SHUT))
        await asyncio.sleep(0)
        assert c.state is State.STOPPED and done == [], "whatever becomes of it"

    run(body)


def test_a_primary_asks_no_primary_to_be_demoted() -> None:
    async def body() -> None:
        c, _, _ = cut(primary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.ASK))
        assert c.state is State.PROTECTED
        s, _, _ = cut(secondary)
        s.heartbeats.on_heartbeat(word(Flag.VM | Flag.ASK | Flag.SVM))
        assert s.state is State.PROTECTED

    run(body)


def test_a_primary_never_transmits_against_a_secondary_that_took_over() -> None:
    async def body() -> None:
        c, dp, _ = cut(primary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.SVM))
        assert c.state is State.PROTECTED
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.SVM | Flag.STANDALONE))
        assert c.state is State.STOPPED and dp.mode is Mode.DROP

    run(body)


def test_shadow_is_reported_by_datagram_too() -> None:
    async def body() -> None:
        c, _, done = cut(secondary)
        c.heartbeats.on_heartbeat(word(Flag.VM | Flag.SHADOW))
        c.heartbeats.on_heartbeat(word(Flag.SHUT))
        await asyncio.sleep(0)
        assert c.view.shadow and done == [], "clients may know what this guest never said"

    run(body)


def test_asking_ends_with_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        c, _, sent = primary()
        c.state = State.PROTECTED
        c.peer.send = lambda kind, **_: False  # type: ignore[method-assign]
        await c.perform(Action.ASK_SHUT, "why")
        assert Flag.ASK in c.heartbeats.flags()
        c._peer_up()
        assert Flag.ASK not in c.heartbeats.flags()
        c.peer.send = sent  # type: ignore[method-assign]
        await c.perform(Action.ASK_SHUT, "why")
        assert Flag.ASK not in c.heartbeats.flags() and "demote" in sent.kinds()

    run(body)


def test_timeouts_go_on_over_a_cut_so_that_waiting_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks: list[int] = []
    monkeypatch.setattr(Engine, "tick", lambda self, now: ticks.append(now))
    c, dp, _ = cut(primary)
    assert not c.waiting
    for state, mode, up, ticked in (
        (State.DEGRADED, Mode.RUN, False, True),
        (State.DEGRADED, Mode.RUN, True, False),
        (State.DEGRADED, Mode.CHECKPOINT, False, False),
        (State.PROTECTED, Mode.RUN, True, True),
    ):
        ticks.clear()
        c.state, dp.mode, c.peer.connected = state, mode, up
        c.on_tick(time.monotonic_ns())
        assert bool(ticks) == ticked
    dp.mode = Mode.CHECKPOINT
    assert c.facts().waiting, "held for a checkpoint that the cut has ended"
    dp.mode = Mode.RUN
    assert not c.facts().waiting
    c.checkpoints.wanted = CheckpointRequest("payload_differs", "here")
    assert c.facts().waiting


@pytest.mark.parametrize(
    ("interval", "timeout", "intervals"),
    [(100, 1000, 3), (100, 900, 3), (100, 800, 2), (100, 600, 1), (100, 300, 1), (10, 30, 1)],
)
def test_a_round_ends_before_anybody_looks_at_the_silence(
    interval: int, timeout: int, intervals: int
) -> None:
    assert round_length(interval, timeout) == intervals
    if intervals > 1:
        assert (intervals + 1) * interval < timeout / 2


class Host:
    """One end of a control channel whose messages arrive at once, and its heartbeat links."""

    def __init__(self, make: Callable[[], tuple[Any, FakeDataPath, Sent]]) -> None:
        self.c, _, _ = make()
        self.peer: Host
        self.texts: list[dict[str, Any]] = []
        self.passes, self.early = True, False
        self.c.peer.send = self._send  # type: ignore[method-assign]
        self.c.heartbeat_links.send = lambda *_: None  # type: ignore[method-assign]

    def _send(self, kind: str, **fields: Any) -> bool:
        assert kind == "heartbeat"
        self.texts.append(fields)
        self.peer.c.heartbeats.echoed(fields["echo"])
        self.peer.c.view.heartbeat_read(fields["t"])
        return True

    def interval(self) -> None:
        """Send what is due. If that begins a round the peer answers, in place of its next one."""
        early, self.early = self.early, False
        if early:
            return
        link = self.c.heartbeat_links.core.links[0]
        link.heard_ns = link.echo_ns = boot_ns() if self.passes else 1
        self.c.heartbeats.beat(due=True)
        if self.peer.c.heartbeats.to_answer(0.0):
            self.peer.c.heartbeats.beat(due=True)
            self.peer.early = True


def hosts() -> tuple[Host, Host]:
    p, s = Host(primary), Host(secondary)
    p.peer, s.peer = s, p
    return p, s


def rounds(p: Host, s: Host, intervals: int) -> list[int]:
    """Return how many messages both have sent."""
    before = [len(h.texts) for h in (p, s)]
    for _ in range(intervals):
        for h in (p, s):
            h.interval()
    return [len(h.texts) - n for h, n in zip((p, s), before, strict=True)]


def test_while_datagrams_pass_the_control_channel_carries_a_heartbeat_in_three_intervals() -> None:
    p, s = hosts()
    rounds(p, s, 3)
    assert all(7 <= n <= 10 for n in rounds(p, s, 30))
    # Both begin in turns, so each has its own clock returned at once now and then.
    for h in (p, s):
        returned = {text["t"] for text in h.texts} & {text["echo"] for text in h.peer.texts}
        assert len(returned) > 4


def test_each_interval_has_a_heartbeat_on_the_control_channel_without_datagrams() -> None:
    p, s = hosts()
    rounds(p, s, 3)
    s.passes = False
    assert rounds(p, s, 12)[1] >= 12
    s.passes = True
    rounds(p, s, 3)
    assert all(7 <= n <= 10 for n in rounds(p, s, 30))


def test_what_is_new_is_sent_with_the_next_interval() -> None:
    p, s = hosts()
    rounds(p, s, 9)
    for change in (State.DEGRADED, State.PROTECTED, State.DEGRADED):
        p.c.state = change
        assert rounds(p, s, 1)[0] >= 1
        assert p.texts[-1]["state"] == change


def test_an_echo_that_was_kept_back_is_no_round_trip() -> None:
    c, _, _ = primary()
    c.beat()
    sent = c.heartbeats._sent_ns
    assert c.heartbeats.echoed(0) is None and c.heartbeats.to_answer(0.0)
    assert not c.heartbeats.to_answer(60.0), "a flood is not answered by a flood"
    took = c.heartbeats.echoed(sent)
    assert took is not None and 0 <= took < 50e6 and not c.heartbeats.to_answer(0.0)
    assert c.heartbeats.echoed(boot_ns() - 60_000_000) is None, "half an interval and more"
    assert c.heartbeats.echoed(boot_ns() + 10**9) is None, "a clock of another boot"


def test_a_loop_that_stood_still_says_so_and_blames_nobody() -> None:
    c, _, _ = primary()
    c.peer.last_seen_ns = time.monotonic_ns()
    before = c.peer.last_seen_ns
    c.heartbeats.stood_still(0.02, 0.1)
    assert c.peer.last_seen_ns == before, "within the heartbeat's interval: nothing"
    c.heartbeats.stood_still(2.0, 0.1)
    assert c.peer.last_seen_ns == before + 2 * 10**9
    sent: list[tuple[Flag, int]] = []
    c.heartbeat_links.send = lambda flags, lag, epoch: sent.append((flags, lag))  # type: ignore[method-assign]
    c.beat()
    c.beat()
    assert [lag for _, lag in sent] == [2000, 0]


def test_a_slow_peer_is_known_by_what_it_says() -> None:
    async def body() -> None:
        c, _, _ = cut(secondary)
        assert not c.facts().peer_slow
        c.heartbeats.on_heartbeat(word(Flag.VM, lag_ms=c.config.peer.heartbeat_timeout))
        assert c.facts().peer_slow

    run(body)


def test_facts_of_a_cut_come_from_the_datagrams() -> None:
    """From datagram to sentence."""

    async def body() -> None:
        c, _, _ = cut(secondary)
        key = session_key("web1", "11" * NONCE, "22" * NONCE)
        far = HeartbeatSession("web1", "primary", [LINK])
        for core in (c.heartbeat_links.core, far):
            core.rekey(key, same_peer=False)
        c.peer.last_seen_ns = time.monotonic_ns() - 2 * 10**9
        c.view.born_ns = 0
        c.peer.ending = Ending.LOST
        c.reconsider()
        assert "acknowledged nothing" in c.reason and f"control channel, {LINK}" in c.reason
        far.round()
        assert (
            c.heartbeat_links.core.receive(0, far.make(0, boot_ns(), Flag.VM, 0, 7), boot_ns())
            is not None
        )
        c.reconsider()
        assert c.state is State.DEGRADED
        assert "the control channel is cut, but the peer lives" in c.reason
        assert "does not receive this side's" in c.reason
        far.receive(0, c.heartbeat_links.core.make(0, boot_ns(), Flag.VM, 0, 7), boot_ns())
        c.heartbeat_links.core.receive(0, far.make(0, boot_ns(), Flag.VM, 0, 7), boot_ns())
        c.reconsider()
        assert c.reason.endswith(f"its heartbeats arrive over {LINK}")

    run(body)
