# SPDX-License-Identifier: GPL-2.0-or-later
"""What both controllers make of a data path that is not there, or brings nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.compare.causes import Cause
from colo_xdp.controller.copy_health import Traffic
from colo_xdp.controller.device_watch import SILENT_CHECKPOINTS
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover import lease
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.states import State
from colo_xdp.peer.heartbeat_datagram import NONCE, session_key
from tests.netns.frames import tcp
from tests.unit.controller.fakes import primary, secondary

KEY = session_key("web1", "11" * NONCE, "22" * NONCE)
GONE = "[network] peer_link: network device eth1 does not exist"


class Clock:
    """CLOCK_BOOTTIME as the controllers see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 10**12
        for module in (lease, "colo_xdp.controller.device_watch", "colo_xdp.controller.controller"):
            name = module if isinstance(module, str) else module.__name__
            monkeypatch.setattr(f"{name}.boot_ns", lambda: self.ns)

    def go(self, ms: float) -> None:
        self.ns += int(ms * 1e6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def protected(c: Primary | Secondary) -> None:
    c.state, c.reason = State.PROTECTED, "both guests are equal"
    c.peer.connected, c.peer.heartbeat_key = True, KEY
    c.peer.last_seen_ns = time.monotonic_ns()
    c.devices.connected()


def shown(c: Primary | Secondary) -> tuple[State, str]:
    state, reason = c.announced_state()
    return state, reason


def frame(n: int) -> CapturedFrame:
    return CapturedFrame(0, time.monotonic_ns(), 7, tcp(b"x" * 9, seq=1000 + 9 * n), 0, False)


@pytest.mark.parametrize("make", [primary, secondary])
def test_a_path_that_is_not_there_is_never_protected(make: Any) -> None:
    c, _, _ = make()
    protected(c)
    assert shown(c) == (State.PROTECTED, c.reason)
    c.devices._found(Look(trouble=[GONE], cut=True))
    assert shown(c) == (State.DEGRADED, GONE)
    c.state = State.CHECKPOINTING
    assert shown(c)[0] is State.DEGRADED, "whatever a checkpoint says"
    c.state, c.reason = State.STARTING, "waiting for the secondary"
    assert shown(c) == (State.STARTING, f"waiting for the secondary; {GONE}")
    c.state = State.PROTECTED
    assert decide(c.facts()).action is Action.NONE, "no reason to run standalone, nor for a fence"
    assert [h["reason"] for h in c.history] == [GONE]
    c.devices._found(Look())
    assert shown(c)[0] is State.PROTECTED
    assert [h["reason"] for h in c.history] == [GONE, "the data path is whole again"]


def test_the_other_hosts_trouble_is_told_but_not_sent_back() -> None:
    c, _, sent = secondary()
    protected(c)
    c.view.peer.state = "degraded"
    assert shown(c)[0] is State.DEGRADED and "the other host" in shown(c)[1]
    c.beat()
    assert sent[-1]["state"] == "protected"


def beats(c: Primary | Secondary, clock: Clock, n: int, *, heard: bool) -> None:
    for _ in range(n):
        clock.go(100)
        c.peer.last_seen_ns = time.monotonic_ns()
        if heard:
            c.heartbeat_links.core.links[0].heard_ns = c.heartbeat_links.core.links[0].echo_ns = (
                clock.ns
            )
        c.devices.listen()


@pytest.mark.parametrize("make", [primary, secondary])
def test_a_link_that_is_silent_while_the_control_channel_lives(make: Any, clock: Clock) -> None:
    c, _, _ = make()
    protected(c)
    beats(c, clock, 20, heard=True)
    assert shown(c)[0] is State.PROTECTED
    beats(c, clock, 20, heard=False)
    state, reason = shown(c)
    assert state is State.DEGRADED and "nothing arrives over" in reason
    assert c.devices.cut
    beats(c, clock, 1, heard=True)
    assert shown(c)[0] is State.PROTECTED and not c.devices.cut


def test_a_link_whose_frames_arrive_is_not_silent(clock: Clock) -> None:
    c, dp, _ = primary()
    protected(c)
    beats(c, clock, 5, heard=True)
    for _ in range(30):
        dp.came += 1
        beats(c, clock, 1, heard=False)
    assert shown(c)[0] is State.PROTECTED


def test_what_the_other_host_does_not_hear(clock: Clock) -> None:
    c, _, _ = secondary()
    protected(c)
    beats(c, clock, 5, heard=True)
    for _ in range(20):
        clock.go(100)
        c.heartbeat_links.core.links[0].heard_ns = clock.ns
        c.devices.listen()
    assert "the other host receives nothing over" in shown(c)[1]


def test_a_secondary_that_says_nothing_is_none(clock: Clock) -> None:
    """Checkpoint after checkpoint for output that waited, and not one frame of its guest."""
    c, dp, _ = primary()
    protected(c)
    dp.came = 5
    c.devices.checkpointed(Cause.OPERATOR)
    for n in range(SILENT_CHECKPOINTS):
        assert shown(c)[0] is State.PROTECTED and not c.devices.cut, n
        c.devices.checkpointed(Cause.OPERATOR)  # asked for by a person: says nothing
        c.devices.checkpointed(Cause.COMPARE_TIMEOUT)
        clock.go(40)
    assert not c.devices.cut, "with a short patience the guest may just be slow"
    beats(c, clock, 30, heard=True)
    c.devices.checkpointed(Cause.COMPARE_TIMEOUT)
    state, reason = shown(c)
    assert state is State.DEGRADED
    assert "the secondary's output does not arrive over" in reason and c.devices.cut
    said = len(c.history)
    c.devices.checkpointed(Cause.PEER_LINK)
    assert c.devices.silent_checkpoints == SILENT_CHECKPOINTS + 2
    assert len(c.history) == said, "told once"
    dp.came += 1
    c.devices.listen()
    assert shown(c)[0] is State.PROTECTED and not c.devices.cut


def missing(c: Primary, clock: Clock, delivered: int, sent: int) -> None:
    """Make checkpoints for output without a counterpart, while the SVM's host counts frames."""
    c.devices.checkpointed(Cause.OPERATOR)
    for n in range(1, 2 * SILENT_CHECKPOINTS):
        c.view.peer.traffic = Traffic(10 + n * delivered, 7 + n * sent)
        c.devices.checkpointed(Cause.COMPARE_TIMEOUT)
        beats(c, clock, 11, heard=True)  # the base is taken with one of them


@pytest.mark.parametrize(
    ("delivered", "sent", "cut"),
    [(4, 0, False), (4, 3, True), (0, 0, True)],
    ids=["the guest is silent", "from the guest", "to the guest"],
)
def test_a_guest_that_sends_nothing_is_not_the_links_fault(
    clock: Clock, delivered: int, sent: int, cut: bool
) -> None:
    """Otherwise what waits would leave at once for ever, and nobody give the guest up."""
    c, dp, _ = primary()
    protected(c)
    dp.came = 5
    missing(c, clock, delivered, sent)
    assert c.devices.silent_checkpoints >= SILENT_CHECKPOINTS
    assert c.devices.cut is cut and bool(c.devices.trouble) is cut


@pytest.mark.parametrize("timeout_ms", [20, 100, 300])
def test_a_silent_guest_is_not_the_links_fault_however_short_the_waits(
    clock: Clock, timeout_ms: int
) -> None:
    """Reports are older than many of such waits."""
    c, dp, _ = primary()
    protected(c)
    dp.came = 5
    c.devices.checkpointed(Cause.OPERATOR)
    link = c.heartbeat_links.core.links[0]
    for n in range(1, 4000 // timeout_ms):
        clock.go(timeout_ms)
        link.heard_ns = link.echo_ns = clock.ns
        halves = n * timeout_ms // 500
        # its last frame is reported late
        c.view.peer.traffic = Traffic(10 + halves, 7 + (halves > 0))
        c.devices.listen()
        c.devices.checkpointed(Cause.COMPARE_TIMEOUT)
        assert not c.devices.cut, n


def test_counters_of_the_other_host_that_begin_anew_say_nothing(clock: Clock) -> None:
    c, dp, _ = primary()
    protected(c)
    dp.came = 5
    missing(c, clock, 4, 0)
    c.view.peer.traffic = Traffic(0, 0)
    for n in range(4):
        c.devices.checkpointed(Cause.COMPARE_TIMEOUT)
        c.view.peer.traffic = Traffic(n + 1, 0)
        beats(c, clock, 11, heard=True)
        assert not c.devices.cut


def test_a_link_that_was_to_blame_stays_so_until_a_frame_comes(clock: Clock) -> None:
    """Checkpoints that follow at once leave its guest no time to send."""
    c, dp, _ = primary()
    protected(c)
    dp.came = 5
    missing(c, clock, 4, 3)
    c.view.peer.traffic = Traffic(900, c.view.peer.traffic.sent)
    for _ in range(5):
        c.devices.checkpointed(Cause.PEER_LINK)
        assert c.devices.cut
    dp.came += 1
    c.devices.listen()
    assert not c.devices.cut


def wants(c: Primary) -> str:
    want, c.checkpoints.wanted = c.checkpoints.wanted, None
    return want.cause if want else ""


def test_what_waits_while_nothing_arrives_does_not_wait_for_a_timeout() -> None:
    c, _, _ = primary()
    protected(c)
    c.output.nics[0].engine.epoch = 7
    c.on_frame(frame(0))
    assert c.output.nics[0].engine.held_packets == 1
    c.on_tick(time.monotonic_ns())
    assert wants(c) == "", "the counterpart may come"
    c.devices._found(Look(trouble=[GONE], cut=True))
    assert c.tick_ns() <= time.monotonic_ns()
    c.on_tick(time.monotonic_ns())
    assert wants(c) == Cause.PEER_LINK
    assert c.output.nics[0].engine.held_packets == 1, (
        "it leaves with the checkpoint, and not before"
    )
    c.checkpoints.ended_ns, c.checkpoints.last = time.monotonic_ns(), {"total_ms": 9000.0}
    c.on_tick(time.monotonic_ns())
    assert wants(c) == "", "paced: at most half of the time"
    c.devices._found(Look())
    assert wants(c) == Cause.PEER_LINK, "what clients said meanwhile has to reach the other guest"


def test_programs_that_were_gone_cost_one_checkpoint() -> None:
    c, _, sent = primary()
    protected(c)
    assert not c.view.shadow
    c.devices._found(Look(restored=["pvm_out on tap0"], unseen=True, missed=True))
    assert wants(c) == Cause.HOOKS_LOST
    beat = next(m for m in sent if m["type"] == "heartbeat")
    assert beat["shadow"], "the secondary may lack what clients know, and is told at once"
    assert c.shadow.leaving and not c.output.nics[0].engine.shadow, "everything is held"
    sent.clear()
    c.devices._found(Look(restored=["svm_arrival on eth1"], missed=True))
    assert wants(c) == Cause.HOOKS_LOST
    assert c.devices.restored == 2


def test_a_filter_before_ours_is_as_a_shadow_that_nobody_asked_for() -> None:
    c, _, _ = primary()
    protected(c)
    look = Look(trouble=["tap0 ingress: a filter of somebody else"], exposed=True)
    c.devices._found(look)
    assert c.view.shadow and not c.shadow.leaving and wants(c) == ""
    word = {
        "type": "heartbeat",
        "shadow": True,
        "role": "secondary",
        "state": "protected",
        "epoch": 7,
    }
    c.on_message(word | {"shut": False, "standalone": False})
    assert not c.output.nics[0].engine.shadow, "what passes us is bad enough"
    c.devices._found(Look())
    assert c.shadow.leaving and wants(c) == Cause.HOOKS_LOST


def test_a_shadow_that_was_asked_for_stays() -> None:
    c, _, _ = primary()
    protected(c)
    c.view.shadow = True
    c.output.nics[0].engine.set_shadow(True, time.monotonic_ns())
    c.devices._found(Look(restored=["pvm_out on tap0"], unseen=True))
    assert c.view.shadow and not c.shadow.leaving and c.output.nics[0].engine.shadow


def test_the_secondary_says_what_it_missed() -> None:
    s, _, sent = secondary()
    protected(s)
    s.view.pair.in_colo = True
    s.devices._found(Look(restored=["svm_in on eth1"], missed=True))
    assert sent[-1] == {"type": "missed", "why": "svm_in on eth1"}
    s.peer.send = lambda kind, **fields: False  # type: ignore[method-assign]
    s.devices._found(Look(restored=["svm_out on tap0"], missed=True))
    s.peer.send = sent  # type: ignore[method-assign]
    s.peer_connected()
    assert sent[-1] == {"type": "missed", "why": "svm_out on tap0"}, "the channel was down"
    s.peer_connected()
    assert len([m for m in sent if m["type"] == "missed"]) == 2
    p, _, _ = primary()
    protected(p)
    p.on_message(sent[-1])
    assert wants(p) == Cause.HOOKS_LOST and not p.view.shadow


@pytest.mark.parametrize("state", [State.STARTING, State.SOLO, State.STOPPED])
def test_nothing_is_asked_for_where_no_pair_is(state: State) -> None:
    c, _, sent = primary(Mode.BYPASS)
    c.state = state
    c.devices._found(Look(restored=["pvm_out on tap0"], unseen=True, missed=True))
    assert wants(c) == "" and not c.view.shadow and not sent


def test_flows_are_met_anew_after_what_nobody_saw() -> None:
    """The guest has sent 5,000 bytes past us; after the checkpoint both go on behind them."""
    c, dp, _ = primary()
    protected(c)
    e = c.output.nics[0].engine
    e.epoch = 7
    out = dp.injectors["release"].frames
    c.on_frame(frame(0))
    counterpart = frame(0)
    counterpart.source = 1
    c.on_frame(counterpart)
    assert len(out) == 1 and e.held_packets == 0
    c.hooks_lost("pvm_out on tap0", unseen=True, still=False)
    e.begin_checkpoint()
    now = time.monotonic_ns()
    e.commit_checkpoint(now, 8, now)
    assert e._void_ns == 0
    for source in (0, 1):
        late = CapturedFrame(source, time.monotonic_ns(), 8, tcp(b"y" * 9, seq=6009), 0, False)
        c.on_frame(late)
    assert len(out) == 2 and e.held_packets == 0, "no hole is waited for"
