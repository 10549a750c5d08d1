# SPDX-License-Identifier: GPL-2.0-or-later
"""Both controllers without kernel and QEMU: what they make of messages and events."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode, Source, SyncState
from colo_xdp.compare.causes import Cause
from colo_xdp.config.file import load
from colo_xdp.controller.checkpoint_coordinator import (
    Checkpoint,
    CheckpointFailed,
    CheckpointRequest,
)
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.controller.ticker import TICK_S
from colo_xdp.datapath.addresses import AddressTable
from colo_xdp.datapath.attach import NetlinkError, NoSuchDevice
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.arbiter import FenceArbiter, LeaseArbiter
from colo_xdp.failover.decision import Action, State, decide, other_guest
from colo_xdp.failover.lease import Leadership, StoreError, StoreView, boot_ns
from colo_xdp.net.address_claims import mac_key
from colo_xdp.peer.heartbeat import Flag, Heartbeat
from colo_xdp.peer.messages import encode
from colo_xdp.qemu.event import QmpEvent
from colo_xdp.qemu.nic import NicError
from colo_xdp.qemu.qmp import QmpTimeout
from colo_xdp.status.builder import active_json
from tests.netns.frames import GUEST_MAC, tcp, udp
from tests.sim.host import MapDict
from tests.unit.offload.test_scheduler import Pair

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"


class FakeInjector:
    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.sent, self.failed = 0, {}

    def send(
        self, frame: bytes, gso_size: int = 0, partial: bool = False, gso_type: int = 0
    ) -> bool:
        self.frames.append(frame)
        return True


class FakeDataPath:
    """Remembers what it is told."""

    def __init__(self, mode: Mode, *, adopted: bool = False) -> None:
        self.mode, self.adopted, self.epoch, self.shadowed = mode, adopted, 7, 0
        self.sync_state = (
            SyncState.IN_SYNC if mode in (Mode.RUN, Mode.CHECKPOINT) else SyncState.NONE
        )
        self.fast = None
        self.order = ""
        self.injectors = {n: FakeInjector() for n in ("release", "deliver", "forward")}
        self.objects = SimpleNamespace(
            map=lambda name: SimpleNamespace(info=SimpleNamespace(max_entries=8), items=lambda: [])
        )
        self.waiting: list[CapturedFrame] = []
        self.found, self.came = Look(), 0
        self.opened = self.changed = self.stepped_in = 0
        self.in_bridge = False
        self.promoted_epoch = self.peer_stopped = self.closed = 0
        self.undecided = False
        self.unmirrored: set[bytes] = set()
        self.addresses = AddressTable(MapDict(), MapDict())
        self.port_state, self.port_forwarding = "", True
        self.macs: list[bytes] = []

    def is_at(self, *macs: bytes) -> None:
        self.macs = list(macs)

    def watch_guest(self) -> None:
        pass

    def look_at_port(self) -> None:
        pass

    def lost_events(self) -> int:
        return 0

    def unmirror(self, key: bytes | None) -> None:
        self.unmirrored = set() if key is None else self.unmirrored | {key}

    def watch_bridge(self) -> None:
        pass

    def look(self) -> Look:
        return self.found

    def changes(self) -> None:
        return None

    def arrived(self) -> int:
        return self.came

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 0) -> int:
        events, self.waiting = self.waiting, []
        for e in events:
            sink(e)
        return len(events)

    def lease_expiry(self, boot_ns: int) -> None:
        self.until = boot_ns

    def flows(self) -> None:
        return None

    def counters(self) -> dict[str, dict[str, tuple[int, int]]]:
        sent = len(self.injectors["forward"].frames)
        return {"svm_out": {"pass": (0, 0), "pass_rewritten": (0, 0), "pass_released": (sent, 0)}}

    def change_role(self) -> None:
        self.changed += 1

    def open_network(self) -> None:
        self.opened += 1

    def close_network(self) -> None:
        self.closed += 1

    def tap_alive(self) -> bool:
        return True

    def step_in(self) -> None:
        self.stepped_in += 1


class Sent(list[dict[str, Any]]):
    def __call__(self, kind: str, **fields: Any) -> bool:
        self.append({"type": kind, **fields})
        return True

    def kinds(self) -> list[str]:
        return [m["type"] for m in self]


def primary(mode: Mode = Mode.RUN, *, adopted: bool = False) -> tuple[Primary, FakeDataPath, Sent]:
    dp = FakeDataPath(mode, adopted=adopted)
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def secondary(
    mode: Mode = Mode.RUN, *, adopted: bool = True
) -> tuple[Secondary, FakeDataPath, Sent]:
    dp = FakeDataPath(mode, adopted=adopted)
    c = Secondary(load(EXAMPLES / "secondary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def in_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 10))


def event(name: str, ts: int, seen: int) -> QmpEvent:
    return QmpEvent(name, {}, ts, seen)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (State.PROTECTED, True),
        (State.CHECKPOINTING, True),  # the engine asks once per epoch: a request must not be lost
        (State.DEGRADED, True),
        (State.STARTING, False),
        (State.SOLO, False),
        (State.STOPPED, False),
    ],
)
def test_requests_are_kept_where_a_checkpoint_can_follow(state: State, wanted: bool) -> None:
    c, _, _ = primary()
    c.state = state
    c.checkpoints.request(Cause.PAYLOAD_DIFFERS, "here")
    assert (c.checkpoints.wanted is not None) == wanted


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


@pytest.mark.parametrize("state", [State.DEGRADED, State.STARTING, State.SOLO])
def test_what_is_kept_back_for_tier_k_leaves_also_where_no_time_runs_out(state: State) -> None:
    c, dp, _ = primary()
    dp.mode = Mode.CHECKPOINT
    pair = Pair()
    sent = pair.until_braked()
    c.output.engine, c.state = pair.e, state
    c.on_tick(pair.now)
    assert pair.out == sent


@pytest.mark.parametrize(("status", "told"), [("inmigrate", True), ("running", False)])
def test_a_primary_that_gave_up_is_told_again_who_waits(
    status: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr("colo_xdp.controller.secondary.REMIND_S", 0.05)
        c, _, sent = secondary(adopted=False)
        asked = 0

        async def state_of_qemu() -> str:
            nonlocal asked
            asked += 1
            return status

        async def no_disks(command: str) -> list[Any]:
            return []

        c.qemu.qmp = SimpleNamespace(  # type: ignore[assignment]
            connected=True, status=state_of_qemu, execute=no_disks
        )
        c.peer = SimpleNamespace(connected=True, send=sent)  # type: ignore[assignment]
        c._ready_wanted, c.view.peer.state = True, "checkpointing"
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            c.on_tick(0)
        assert not asked, "it is at work"
        c.view.peer.state = "starting"
        c.on_tick(0)
        assert not asked, "it has just become so"
        while not asked:
            c.on_tick(0)
            await asyncio.sleep(0)
        assert sent.kinds() == ["ready"] * told

    in_loop(body)


@pytest.mark.parametrize(
    ("held", "may", "lease"),
    [(True, True, "held"), (False, True, "promised"), (False, False, "none")],
)
def test_who_reaches_the_network_and_by_which_right(held: bool, may: bool, lease: str) -> None:
    c, dp, _ = primary()
    rest = {"undecided": False, "sync": "in_sync"}
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


@pytest.mark.parametrize(
    ("state", "epoch", "exited", "again"),
    [
        ("protected", 7, False, True),
        ("degraded", 7, False, False),  # it will ask for a checkpoint
        ("protected", 6, False, False),
        ("protected", 7, True, False),
    ],
)
def test_a_silence_that_only_the_secondary_noticed(
    state: str, epoch: int, exited: bool, again: bool
) -> None:
    s, dp, _ = secondary()
    dp.epoch, s.state, s.view.pair.in_colo, s.view.guest.colo_exit = 7, State.DEGRADED, True, exited
    s.on_message(
        {"type": "heartbeat", "state": state, "epoch": epoch, "shut": False, "alone": False}
    )
    assert (s.state is State.PROTECTED) == again


def test_a_checkpoint_that_is_cancelled_with_its_last_word_goes_no_further() -> None:
    """What follows would commit a pair that was given up. (wait_for() forgets such an end.)"""

    async def body() -> None:
        c, _, _ = primary()
        c.peer = SimpleNamespace(connected=True)  # type: ignore[assignment]
        c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
        for turns in range(4):  # of the loop between the two: the answer may be anywhere on its way
            ck = Checkpoint(8, "operator", time.monotonic_ns())
            went_on = False

            async def checkpoint(ck: Checkpoint = ck) -> None:
                nonlocal went_on
                await c.checkpoints._await(ck, "a word", time.monotonic() + 5)
                await c.checkpoints.sleep_or_wake(5)
                went_on = True

            task = asyncio.create_task(checkpoint())
            for _ in range(5):
                await asyncio.sleep(0)
            ck.changed.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            c.checkpoints._wake.set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not went_on

    in_loop(body)


def test_stop_with_an_impossible_time_releases_less_not_more() -> None:
    c, _, _ = primary()
    now = time.monotonic_ns()
    c.checkpoints.running = Checkpoint(8, "operator", now)
    c.on_qmp(event("STOP", now + 10**9, now + 2000))
    assert c.checkpoints.running.stop_ns == now
    c.on_qmp(event("STOP", now + 1000, now + 2000))
    assert c.checkpoints.running.stop_ns == now + 1000


def test_a_second_stop_moves_nothing_and_costs_a_checkpoint() -> None:
    """Between RESUME and the secondary's `done` somebody stops QEMU again."""
    c, _, _ = primary()
    began = time.monotonic_ns()
    c.checkpoints.running = ck = Checkpoint(8, "operator", began)
    for name, ts in (("STOP", 1000), ("RESUME", 2000), ("STOP", 9000), ("RESUME", 9500)):
        c.on_qmp(event(name, began + ts, began + ts + 1))
    assert (ck.stop_ns, ck.resume_ns) == (began + 1000, began + 2000)
    assert c.checkpoints.wanted is not None and "again" in c.checkpoints.wanted.detail


def undecided() -> tuple[Primary, FakeDataPath, Sent]:
    """A primary that found nothing pinned, connected to the other host's controller."""
    dp, sent = FakeDataPath(Mode.DROP), Sent()
    dp.undecided, dp.epoch = True, 0
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    c.peer.send = sent  # type: ignore[method-assign]
    c._peer_up()
    c.peer.connected = True
    return c, dp, sent


def beat(state: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "heartbeat", "t": 1, "echo": 0, "state": state, "epoch": 5, "vm": True,
        "shut": False,
        "alone": False, "shadow": False, "promise": False, "role": "secondary", **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "speaks", "state"),
    [
        (None, False, State.STARTING),
        (beat("starting"), True, State.STARTING),
        (beat("stopped", shut=True), True, State.STARTING),
        (beat("protected"), False, State.STARTING),
        (beat("promoted", alone=True), False, State.STOPPED),
        (beat("solo", alone=True, role="primary"), False, State.STOPPED),
        (beat("stopped", alone=True, shut=True), False, State.STARTING),
    ],
)
def test_a_guest_of_which_nothing_is_known_speaks_at_a_word(
    words: dict[str, Any] | None, speaks: bool, state: State
) -> None:
    async def body() -> None:
        c, dp, sent = undecided()
        c.reconsider()
        assert (
            dp.mode is Mode.DROP
            and not c.transmits
            and "does not know what happened before" in c.reason
        )
        assert sent[-1]["type"] == "heartbeat" and not sent[-1]["alone"] and not sent[-1]["shut"]
        if words is not None:
            c._peer_message(words)
        if c._busy is not None:
            await c._busy
        await asyncio.gather(*(t for t in c._tasks if t is not c.replacement._search))
        assert (c.transmits, c.state) == (speaks, state)
        assert (
            (dp.mode is Mode.BYPASS)
            == (dp.opened == 1)
            == (dp.sync_state is SyncState.STANDALONE)
            == speaks
        )
        assert dp.undecided is (state is State.STARTING and not speaks)
        copy = words is not None and words["state"] == "protected"
        c.beat()
        assert sent[-1]["shadow"] is copy, "the copy must not take over by itself"
        if c.replacement._search is not None:
            c.replacement._search.cancel()

    in_loop(body)


@pytest.mark.parametrize("alone", [False, True])
def test_a_primary_that_waits_for_a_word_supersedes_nobody(alone: bool) -> None:
    """A guest that has been made to stand down may be all that there is of the service: its QEMU
    is not ended for one that is silent itself."""
    c, _, _ = secondary()
    c.state, c.peer.connected = State.STOPPED, True
    c._peer_message(BEAT | beat("starting", role="primary", alone=alone))
    assert c.superseded() is alone


def test_who_waits_for_a_word_waits_after_a_restart_too() -> None:
    dp = FakeDataPath(Mode.DROP, adopted=True)
    dp.undecided = True
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    assert c.state is State.STARTING and c.undecided and not c.path_shut


def test_a_persons_word_opens_a_guest_of_which_nothing_is_known() -> None:
    async def body() -> None:
        c, dp, _ = undecided()
        c.peer.connected = False
        c.config = replace(c.config, failover=replace(c.config.failover, fence=(), automatic=False))
        c.arbiter = FenceArbiter(SimpleNamespace(config=c.config))  # type: ignore[arg-type]
        r = await c.commands.run("failover", {})
        assert r["done"] and c.state is State.SOLO and c.transmits
        assert dp.mode is Mode.BYPASS and dp.opened == 1 and not dp.undecided

    in_loop(body)


def test_a_persons_word_that_opened_a_guest_does_not_break_the_pair_that_follows() -> None:
    """It was meant for what was before: the secondary that comes next is not fenced for it."""

    async def body() -> None:
        c, _, _ = undecided()
        c.commands.order("force", 40.0)
        c._peer_message(beat("stopped", shut=True))
        assert c._busy is not None
        await c._busy
        assert c.state is State.STARTING and not c.undecided
        c.on_message({"type": "ready", "epoch": 0})
        c.state = State.PROTECTED
        assert decide(c.facts()).action is Action.NONE

    in_loop(body)


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


@pytest.mark.parametrize("side", ["solo", "promoted"])
def test_a_guest_that_spoke_alone_and_dies_does_not_speak(side: str) -> None:
    async def body() -> None:
        make = primary if side == "solo" else secondary
        mode = Mode.BYPASS if side == "solo" else Mode.TAKEOVER
        c, dp, sent = make(mode)  # type: ignore[operator]
        c.state, c.view.guest.standalone, c.view.guest.gone = State(side), True, True
        assert not c.transmits and not active_json(c)["transmitting"]
        c.reconsider()
        await c._busy
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and c.path_shut
        assert "no guest is active now" in c.reason
        assert sent[-1]["type"] == "shut" and sent[-1]["alone"]
        c.replacement._search.cancel()

    in_loop(body)


def test_a_tap_leaves_the_bridge_when_the_other_guest_speaks() -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c._demote("the secondary took over")
        assert not dp.closed, "frames that still come here are mirrored"
        await c.leave_network()
        assert dp.closed == 1
        assert c.replacement._search is not None
        c.replacement._search.cancel()

    in_loop(body)


@pytest.mark.parametrize(
    "error", [NoSuchDevice("tap0 does not exist"), NetlinkError(105, "no buffer space")]
)
def test_a_tap_that_is_gone_with_its_guest_ends_no_controller(error: Exception) -> None:
    """Whoever starts the guest deletes its tap: `qemu.incoming` makes it anew, if it is run."""

    async def body() -> None:
        c, dp, _ = primary()

        def gone() -> None:
            raise error

        dp.close_network = gone  # type: ignore[method-assign]
        c._demote("the secondary took over")
        c.peer.connected, c.view.peer.state, c.replacement.wanted = True, "promoted", True
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        c.qemu.qmp.connected = True
        c.qemu.qmp.status = lambda: asyncio.sleep(0, "inmigrate")  # type: ignore[method-assign]
        assert c.replacement._search is not None
        await asyncio.wait({c.replacement._search}, timeout=2)
        assert c.role_changed and not c.failures

    in_loop(body)


def test_an_adopted_data_path_decides_nothing_before_a_checkpoint() -> None:
    c, dp, _ = primary(Mode.RUN, adopted=True)
    assert dp.mode is Mode.CHECKPOINT
    c.on_frame(CapturedFrame(Source.PVM, time.monotonic_ns(), 7, tcp(b"x"), 0, False))
    c.on_frame(CapturedFrame(Source.SVM, time.monotonic_ns(), 7, tcp(b"x"), 0, False))
    assert c.output.engine.held_packets == 1 and not dp.injectors["release"].frames


def test_a_shut_data_path_stays_shut_for_the_next_controller() -> None:
    c, dp, _ = primary(Mode.DROP, adopted=True)
    assert c.state is State.STOPPED and dp.mode is Mode.DROP
    c.on_frame(CapturedFrame(Source.PVM, 1, 7, tcp(b"x"), 0, False))
    assert c.output.engine.held_packets == 0


@pytest.mark.parametrize("kind", ["promoted", "heartbeat"])
def test_a_primary_never_speaks_against_a_secondary_that_took_over(kind: str) -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.PROTECTED
        beat = {"t": 1, "echo": 0, "state": "promoted", "epoch": 7, "vm": True,
                "shut": False, "alone": True, "role": "secondary"}  # fmt: skip
        c._peer_message({"type": kind, **({"why": "x"} if kind == "promoted" else beat)})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP

    in_loop(body)


def test_frames_of_a_checkpoint_go_where_their_time_says() -> None:
    c, dp, sent = secondary()
    c.state = State.PROTECTED
    c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
    c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
    assert sent.kinds() == ["begin_ack"] and dp.mode is Mode.CHECKPOINT
    t = time.monotonic_ns()
    for at, source, body in (
        (t + 10, Source.SVM, b"old guest"),
        (t + 20, Source.CLIENT, b"client"),
        (t + 40, Source.SVM, b"new guest"),
    ):
        c.on_frame(CapturedFrame(source, at, 7, tcp(body), 0, False))
    c.on_qmp(event("STOP", t + 15, t + 60))
    dp.waiting = [CapturedFrame(Source.SVM, t + 50, 7, tcp(b"read late"), 0, False)]
    c.on_qmp(event("RESUME", t + 30, t + 60))
    assert dp.epoch == 8 and dp.mode is Mode.RUN and c.state is State.PROTECTED
    assert [b"client" in f for f in dp.injectors["deliver"].frames] == [True]
    forwarded = b"".join(dp.injectors["forward"].frames)
    assert b"new guest" in forwarded and b"read late" in forwarded
    assert b"old guest" not in forwarded and c.held.stale == 1
    assert sent.kinds() == ["begin_ack", "resumed"]


def test_a_checkpoint_that_never_came_gives_everything_back() -> None:
    c, dp, sent = secondary()
    c.state = State.PROTECTED
    c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
    c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
    c.on_frame(CapturedFrame(Source.CLIENT, time.monotonic_ns(), 7, tcp(b"client"), 0, False))
    assert c.held.hold is not None
    c.held.hold.deadline = 0
    c.on_tick(time.monotonic_ns())
    assert dp.mode is Mode.RUN and dp.epoch == 7
    assert len(dp.injectors["deliver"].frames) == 1
    assert sent.kinds() == ["begin_ack", "failed"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"epoch": 9}, "is over"),
        ({"state": State.PROMOTED}, "promoted"),
        ({"qmp": SimpleNamespace(connected=False)}, "QMP to the SVM is down"),
        ({"in_colo": False}, "not in COLO"),
    ],
)
def test_a_checkpoint_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    c, dp, sent = secondary()
    c.state = State.PROTECTED
    c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
    for k, v in change.items():
        setattr({"epoch": dp, "in_colo": c.view.pair, "qmp": c.qemu}.get(k, c), k, v)
    c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
    assert sent[0]["type"] == "failed" and why in sent[0]["why"]
    assert dp.mode is Mode.RUN


def test_standing_down_and_coming_back() -> None:
    """Asked to be silent it is; it speaks again only if the primary died without having spoken."""

    async def body(alone: bool) -> State:
        c, dp, sent = secondary()
        c.state = State.PROTECTED
        done: list[str] = []

        async def perform(action: Any, why: str) -> None:
            done.append(action.value)

        c.perform = perform  # type: ignore[method-assign]
        c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
        c._peer_message({"type": "demote", "why": "hang"})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and sent.kinds() == ["shut"]
        c._peer_message({"type": "shut", "why": "dead", "alone": alone})
        await asyncio.sleep(0)
        assert done == ([] if alone else ["take_over"])
        return c.state

    assert asyncio.run(body(True)) is State.STOPPED
    assert asyncio.run(body(False)) is State.DEGRADED


def test_signs_of_an_earlier_secondary_are_forgotten_with_the_next_one() -> None:
    c, _, _ = primary(Mode.BYPASS)
    c.view.peer.shut = True
    c.on_message({"type": "ready", "epoch": 0})
    assert not c.view.peer.shut


def test_a_first_checkpoint_counts_when_the_primary_has_confirmed_it() -> None:
    """Until then the primary may give up entering, and its guest speaks uncompared."""
    c, dp, sent = secondary()
    dp.mode, dp.epoch, c.state = Mode.RUN, 0, State.STARTING
    c.view.pair.in_colo = c.view.pair.confirmed = False
    c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
    c._on_begin(1, initial=True, planned=False, asked=True)
    t = time.monotonic_ns()
    c.on_frame(CapturedFrame(Source.CLIENT, t, 0, tcp(b"client"), 0, False))
    c.on_qmp(event("RESUME", t, t))
    assert sent.kinds() == ["begin_ack", "resumed"]
    beat = {"type": "heartbeat", "state": "checkpointing", "epoch": 0, "shadow": False}
    beat |= {"shut": False, "role": "primary", "alone": True}
    c.on_message(beat)
    assert c.state is State.STARTING and dp.mode is Mode.CHECKPOINT and dp.epoch == 0
    assert not dp.injectors["deliver"].frames
    c._ready_wanted = True
    c.on_message(beat | {"epoch": 1, "alone": False})
    assert dp.sync_state is SyncState.IN_SYNC
    c.peer_connected()
    assert "ready" not in sent.kinds(), "the guest is in use: none that waits"
    assert c.state is State.PROTECTED and dp.mode is Mode.RUN and dp.epoch == 1
    assert len(dp.injectors["deliver"].frames) == 1


def test_a_shadow_ends_with_a_later_checkpoint_only() -> None:
    """A primary controller that was started anew does not know of it, nor a secondary's."""
    c, dp, _ = secondary()
    beat = {
        "t": 1,
        "echo": 0,
        "state": "protected",
        "vm": True,
        "shut": False,
        "alone": False,
        "role": "primary",
    }
    beat |= {"type": "heartbeat"}
    c._peer_message(beat | {"epoch": 7, "shadow": True})
    c._peer_message(beat | {"epoch": 7, "shadow": False})
    assert c.view.shadow
    again = Secondary(c.config, dp)  # type: ignore[arg-type]
    assert again.view.shadow
    again._peer_message(beat | {"epoch": 8, "shadow": False})
    assert not again.view.shadow and not dp.shadowed


def test_a_shadow_begins_when_the_secondary_has_heard_of_it() -> None:
    """Whatever else it says of itself: a person may have paused it."""
    c, _, sent = primary()
    c.state = State.PROTECTED
    c.set_shadow(True)
    assert sent[-1]["shadow"] and not c.output.engine.shadow
    said = BEAT | {"epoch": 7, "state": "protected", "shut": False}
    c._peer_message(said | {"role": "secondary"})
    c._peer_message(said | {"role": "primary", "shadow": True})
    assert not c.output.engine.shadow
    c._peer_message(said | {"role": "secondary", "state": "paused", "shadow": True})
    assert c.output.engine.shadow
    other, _, answers = secondary()
    other.view.paused = True
    other._peer_message(said | {"shadow": True})
    assert answers[-1]["shadow"], "and it says so at once"


def test_a_shadow_that_is_left_behind_the_stop_goes_on_until_the_next_checkpoint() -> None:
    """What left in between is in no state that the SVM has loaded."""

    async def body() -> None:
        c, dp, sent = primary()
        c.peer.connected = True
        c.state, c.view.shadow, dp.epoch = State.PROTECTED, True, 7
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        for n, early in ((8, False), (9, True)):
            task = asyncio.ensure_future(c.checkpoints.make(CheckpointRequest("operator", "asked")))
            await asyncio.sleep(0)
            c.on_message({"type": "begin_ack", "n": n})
            while c.checkpoints.running is None or not c.checkpoints.running.triggered:
                await asyncio.sleep(0)
            if early:
                c.set_shadow(False)
            t = time.monotonic_ns()
            c.on_qmp(event("STOP", t, t))
            if not early:
                c.set_shadow(False)
            c.checkpoints.wanted = None
            c.on_qmp(event("RESUME", t + 1, t + 1))
            c.on_message({"type": "resumed", "n": n, "pause_us": 1})
            await task
            assert dp.epoch == n
            assert sent[-1]["type"] == "heartbeat" and sent[-1]["shadow"] is not early
            assert (c.checkpoints.wanted is None) == early, "it is not forgotten"
        assert not c.view.shadow and not c.shadow.leaving

    in_loop(body)


class FakeQmp:
    """Answers as a QEMU that has left COLO at once."""

    name = "fake"

    def __init__(self) -> None:
        self.connected, self.said = True, []  # type: tuple[bool, list[str]]
        self.colo = True

    async def migration_status(self, timeout: float | None = None) -> str:
        return "colo" if self.colo else "completed"

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        self.said.append("lost_heartbeat")
        self.colo = False

    async def status(self, timeout: float | None = None) -> str:
        return "running"

    async def trigger_checkpoint(self) -> None:
        self.said.append("checkpoint")

    async def guest_macs(self, tap: str) -> list[str]:
        return ["52:54:00:12:34:56", "52:54:00:12:34:57"]


BEAT = {
    "t": 1,
    "echo": 0,
    "vm": True,
    "alone": False,
    "shadow": False,
    "type": "heartbeat",
    "role": "primary",
}


def test_a_planned_failover_holds_until_this_side_speaks() -> None:
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


def test_a_checkpoint_that_nobody_saw_is_in_doubt_until_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.CHECKPOINT)
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        lost: list[int] = []
        monkeypatch.setattr(c.flows, "give_up", lambda epoch: lost.append(epoch) or 0)
        for _ in range(2):  # the former controller's, and one that this one was asked for
            assert c.held.hold is not None
            c.held.hold.deadline = 0.0
            c.on_tick(time.monotonic_ns())
            assert dp.mode is Mode.RUN
            c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
        c._peer_message(BEAT | {"state": "stopped", "epoch": 7, "shut": True})
        assert c._busy is not None
        await c._busy
        assert c.state is State.PROMOTED and lost == [7]

    in_loop(body)


def test_the_primarys_epoch_tells_a_new_secondary_controller_what_its_guest_has_loaded() -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.CHECKPOINT)
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        c._peer_message(BEAT | {"state": "stopped", "epoch": 8, "shut": True})
        assert c._busy is not None
        await c._busy
        assert c.state is State.PROMOTED and dp.epoch == 8

    in_loop(body)


@pytest.mark.parametrize("order", ["failover", "force"])
def test_a_persons_word_outlives_the_controller_that_heard_it(order: str) -> None:
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


def test_a_survivor_becomes_the_primary_when_a_new_qemu_waits() -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.TAKEOVER)
        object.__setattr__(c.config.qemu, "reverse_uri", "")
        c.on_message({"type": "ready", "epoch": 3})
        assert not c.role_changed, "nothing says where the other QEMU waits"
        object.__setattr__(c.config.qemu, "reverse_uri", "tcp:192.0.2.1:9998")
        c.on_message({"type": "ready", "epoch": 3})
        assert c.role_changed and dp.changed == 1
        await asyncio.wait_for(c.finished(), 1)

    in_loop(body)


def test_a_primary_that_is_alone_protects_again() -> None:
    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.state, c.view.guest.standalone = State.SOLO, True
        c.commands.order("failover", 60)
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        went: list[str] = []

        async def entered() -> bool:
            went.append(c.state.value)
            raise asyncio.CancelledError

        c.entry.until_entered = entered  # type: ignore[method-assign]
        c.on_message({"type": "ready", "epoch": 3})
        assert c.checkpoints._serving is not None
        await asyncio.wait({c.checkpoints._serving}, timeout=5)
        assert went == ["starting"] and c.qemu.qmp.said == ["lost_heartbeat"]  # type: ignore[attr-defined]
        assert not c.output.uncompared and not c.view.operator
        assert c.view.guest.standalone, "until the first checkpoint is complete"

    in_loop(body)


@pytest.mark.parametrize("migration", ["failed", "completed"])
def test_a_guest_that_is_alone_runs_whatever_a_broken_checkpoint_has_left(
    migration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when QEMU hangs for a while, or the controller is another one by then. One that a
    person has paused stays so."""
    monkeypatch.setattr("colo_xdp.controller.primary.REARM_S", 0.001)

    class Stopped(FakeQmp):
        answers = iter(["", "", "colo", "paused", "running"])

        async def migration_status(self, timeout: float | None = None) -> str:
            return migration

        async def status(self, timeout: float | None = None) -> str:
            answer = next(self.answers)
            self.said.append(answer)
            if not answer:
                raise QmpTimeout("no answer")
            return answer

        async def execute(self, command: str) -> list[Any]:
            self.said.append(command)
            return []

    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS, adopted=True)
        c.state = State.SOLO
        c.qemu.qmp = Stopped()  # type: ignore[assignment]
        await c.on_qemu()
        await asyncio.gather(*c._tasks)
        want = ["", "colo", "paused", "cont", "running"] if migration == "failed" else []
        assert c.qemu.qmp.said == ["", *want]  # type: ignore[attr-defined]

    in_loop(body)


def test_offsets_of_its_own_are_handed_over_in_parts() -> None:
    async def body() -> None:
        c, dp, sent = primary(Mode.CHECKPOINT)
        dp.promoted_epoch = 7
        entries = [bytes([i % 256]) * 104 for i in range(700)]
        c.checkpoints.offsets.table = SimpleNamespace(export=lambda epoch: entries)  # type: ignore[assignment]
        c.peer.connected = True
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        ck = c.checkpoints.running = Checkpoint(8, "initial", time.monotonic_ns())

        async def answer() -> None:
            for n in range(3):
                while sum(m["type"] == "offsets" for m in sent) <= n:
                    await asyncio.sleep(0)
                c.on_message({"type": "offsets_ack", "n": n})

        await asyncio.gather(c.checkpoints._send_offsets(ck, time.monotonic() + 5), answer())
        parts = [m for m in sent if m["type"] == "offsets"]
        assert [(m["n"], m["last"]) for m in parts] == [(0, False), (1, False), (2, True)]
        assert b"".join(bytes.fromhex(m["flows"]) for m in parts) == b"".join(entries)
        for m in parts:
            encode(m["type"], **{k: v for k, v in m.items() if k != "type"})

    in_loop(body)


@pytest.mark.parametrize(
    ("role", "state", "connected", "over"),
    [
        ("secondary", "promoted", True, True),
        ("secondary", "promoted", False, False),
        ("secondary", "starting", True, False),
        ("secondary", "protected", True, False),
        ("primary", "solo", True, True),
        ("primary", "starting", True, True),
        ("primary", "degraded", True, False),
    ],
)
def test_a_guest_is_worthless_only_if_the_other_speaks(
    role: str, state: str, connected: bool, over: bool
) -> None:
    c, _, _ = primary(Mode.DROP, adopted=True)
    c.view.peer.role, c.view.peer.state, c.peer.connected = role, state, connected
    c.view.peer.guest = other_guest(role, state, alone=over, shut=False)
    assert c.superseded() is over


def test_what_stands_in_the_way_of_a_new_pair_is_said() -> None:
    c, _, _ = primary(Mode.DROP, adopted=True)
    with pytest.raises(ValueError, match="not known to run standalone"):
        asyncio.run(c.commands.run("reprotect", {}))
    c.state = State.PROTECTED
    with pytest.raises(ValueError, match="nothing to do"):
        asyncio.run(c.commands.run("reprotect", {}))
    c.state = State.SOLO
    c.peer.send = lambda kind, **fields: False  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not answer"):
        asyncio.run(c.commands.run("reprotect", {}))


def test_a_worthless_guest_makes_room_for_one_that_waits() -> None:
    """Its QEMU is ended, the command starts another, and its state is none of the old one's."""

    async def body() -> None:
        c, _, sent = secondary(Mode.DROP)
        object.__setattr__(c.config.qemu, "incoming", ("/bin/true",))
        c.qemu.options = replace(c.qemu.options, incoming=("/bin/true",))
        c.peer.connected, c.view.peer.role, c.view.peer.state = True, "primary", "solo"
        c.view.guest.demoted = c.view.guest.colo_exit = c.view.guest.gone = True
        qmp = WaitingQmp()
        c.qemu.qmp = qmp  # type: ignore[assignment]
        c.become(State.STOPPED, "stood down")
        assert c.replacement._search is not None
        await c.replacement._search
        assert qmp.said[:2] == ["quit", "prepare"]
        assert c.state is State.STARTING and sent.kinds() == ["ready"]
        assert not (c.view.guest.demoted or c.view.guest.colo_exit or c.view.guest.gone)
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


class WaitingQmp(FakeQmp):
    """Runs, until it is ended; the next one waits for a migration."""

    async def status(self, timeout: float | None = None) -> str:
        return "inmigrate" if "quit" in self.said else "running"

    async def quit(self) -> None:
        self.said.append("quit")

    async def prepare(self, *, primary: bool) -> None:
        self.said.append("prepare")

    async def execute(self, command: str, args: Any = None, timeout: Any = None) -> Any:
        assert command == "query-block"
        return []


class HungQmp(FakeQmp):
    """Its main loop answers again after a yank, or not; the way past it answers, or not."""

    def __init__(self, *, loop: bool, oob: bool, after: bool) -> None:
        super().__init__()
        self.loop, self.oob, self.after = loop, oob, after

    async def status(self, timeout: float | None = None) -> str:
        if not self.loop:
            raise QmpTimeout("query-status: no answer in time")
        return "running"

    async def yank(self, timeout: float | None = None) -> None:
        self.said.append("yank")
        if not self.oob:
            raise QmpTimeout("yank: no answer in time")
        self.loop = self.after


@pytest.mark.parametrize(
    ("qmp", "hangs"),
    [
        (HungQmp(loop=False, oob=True, after=True), False),  # it waited for the other
        (HungQmp(loop=False, oob=True, after=False), True),
        (HungQmp(loop=False, oob=False, after=False), True),
    ],
)
def test_a_qemu_that_waits_for_the_other_does_not_hang(qmp: HungQmp, hangs: bool) -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.qemu.qmp = qmp  # type: ignore[assignment]
        assert await c.qemu.hangs() is hangs and qmp.said == ["yank"]

    in_loop(body)


def test_a_pvm_that_hangs_is_shut_in_and_the_other_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr("colo_xdp.qemu.supervisor.WATCH_S", 0.01)
        c, dp, sent = primary()
        c.state = State.PROTECTED
        c.qemu.qmp = HungQmp(loop=False, oob=False, after=False)  # type: ignore[assignment]
        watch = asyncio.ensure_future(c.qemu.watch())
        while "shut" not in sent.kinds():
            await asyncio.sleep(0.01)
        watch.cancel()
        assert c.state is State.STOPPED and dp.mode is Mode.DROP
        assert "hangs" in c.reason
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


@pytest.mark.parametrize(
    ("beat", "stopped"),
    [
        ({"role": "primary", "state": "solo", "epoch": 8}, True),
        ({"role": "primary", "state": "starting", "epoch": 7}, False),  # this host began as one
        ({"role": "primary", "state": "solo", "epoch": 3}, False),
        ({"role": "primary", "state": "stopped", "epoch": 8}, False),
        ({"role": "secondary", "state": "starting", "epoch": 8}, False),
    ],
)
def test_of_two_primaries_the_one_that_knows_less_is_silent(
    beat: dict[str, Any], stopped: bool
) -> None:
    """A host that was rebooted while the roles were changed has lost the word of it."""

    async def body() -> None:
        c, dp, _ = primary(Mode.BYPASS)
        c._peer_message(BEAT | {"shut": False} | beat)
        assert (c.state is State.STOPPED and dp.mode is Mode.DROP) is stopped
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


def test_a_host_that_waits_for_a_new_guest_keeps_its_key() -> None:
    """It was silent, and its key free to be taken; as a secondary it may speak again."""
    c, _, _ = primary()
    speaker = Leadership(
        SimpleNamespace(), node="p", address="a", boot="1", ttl_ms=2000, margin_ms=500,
        transmitting=False, allow=lambda ns: None, changed=lambda: None,
    )  # type: ignore[arg-type]  # fmt: skip
    c.arbiter = LeaseArbiter(speaker)
    speaker.freed("1")
    assert speaker.steal == "1"
    c.on_message({"type": "ready", "epoch": 7})
    assert not speaker.steal


SPOKE = {
    "type": "heartbeat", "t": 1, "echo": 0, "epoch": 7, "vm": True, "promise": False,
    "shadow": False,
    "role": "primary", "state": "solo", "shut": False, "alone": True,
}  # fmt: skip


@pytest.mark.parametrize("state", [State.PROTECTED, State.DEGRADED])
@pytest.mark.parametrize("words", [["alive", "dead"], ["dead"]])
def test_a_copy_of_a_guest_that_spoke_alone_never_speaks(state: State, words: list[str]) -> None:
    """Also without a lease: a link was cut, a person opened the primary, and then it died."""

    async def body() -> None:
        c, dp, sent = secondary()
        c.state = state
        c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
        done: list[str] = []

        async def perform(action: Any, why: str) -> None:
            done.append(action.value)

        c.perform = perform  # type: ignore[method-assign]
        for word in words:
            shut = {"state": "stopped", "shut": True, "vm": False} if word == "dead" else {}
            c._peer_message(SPOKE | shut)
            await asyncio.sleep(0)
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and not done
        c._peer_message({"type": "shut", "why": "dead", "alone": False})
        await asyncio.sleep(0)
        assert c.state is State.STOPPED and not done, "whatever is said later"
        again = Secondary(c.config, dp)  # type: ignore[arg-type]
        assert again.state is State.STOPPED and not again.view.pair.confirmed
        assert "shut" in sent.kinds()

    in_loop(body)


def test_a_guest_that_waits_for_one_that_speaks_alone_stays() -> None:
    c, dp, _ = secondary(Mode.DROP, adopted=False)
    c._ready_wanted = True
    c.on_message(SPOKE)
    c.peer_shut(True)
    assert c.state is State.STARTING and dp.mode is Mode.DROP


def test_a_pvm_is_outdated_when_the_svm_spoke_alone_and_died() -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.DEGRADED
        c._peer_message({"type": "shut", "why": "dead", "alone": True})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP

    in_loop(body)


@pytest.mark.parametrize(
    ("mode", "bond", "state", "alone"),
    [
        (Mode.BYPASS, SyncState.STANDALONE, State.SOLO, True),
        (Mode.DROP, SyncState.STANDALONE, State.STOPPED, True),
        (Mode.DROP, SyncState.IN_SYNC, State.STOPPED, False),
        (Mode.RUN, SyncState.IN_SYNC, State.DEGRADED, False),
        (
            Mode.CHECKPOINT,
            SyncState.STANDALONE,
            State.DEGRADED,
            True,
        ),  # died in the first checkpoint
    ],
)
def test_who_spoke_alone_outlives_the_primarys_controller(
    mode: Mode, bond: SyncState, state: State, alone: bool
) -> None:
    _, dp, _ = primary(mode)
    dp.sync_state, dp.adopted = bond, True
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    assert c.state is state
    c.beat()
    assert sent[-1]["alone"] == alone


def test_a_first_checkpoint_nobody_finished_sets_the_guest_free() -> None:
    """Its controller died in it, and QEMU came out of it without COLO."""

    async def body() -> None:
        _, dp, _ = primary(Mode.CHECKPOINT)
        dp.sync_state, dp.adopted = SyncState.STANDALONE, True
        c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
        dp.waiting = [CapturedFrame(Source.PVM, time.monotonic_ns(), 0, tcp(b"held"), 0, False)]
        c.qemu.qmp = SimpleNamespace(migration_status=lambda: asyncio.sleep(0, "failed"))  # type: ignore[assignment]
        guard = asyncio.ensure_future(c.checkpoints._serve())
        while dp.mode is not Mode.BYPASS:
            await asyncio.sleep(0)
        guard.cancel()
        assert len(dp.injectors["release"].frames) == 1 and c.state is State.STARTING

    in_loop(body)


class Leased:
    """Of speaker.Speaker what a switchover asks."""

    def __init__(self, held: bool, trouble: str, *, may: bool = True) -> None:
        self.held, self.trouble = held, trouble
        self.may_transmit, self.peer_standalone, self.recorded, self.committed = (
            may,
            False,
            False,
            False,
        )
        self.want, self.remaining_s = True, 1.5 * may

    async def look(self) -> None:
        await asyncio.sleep(0)
        if self.trouble:
            raise StoreError(self.trouble)


def test_no_plan_while_the_lease_cannot_change_hands() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.state = State.PROTECTED
        c.arbiter = LeaseArbiter(Leased(False, "etcd is away"))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="etcd is away"):
            await c.switch_over(time.monotonic() + 1)
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
            await c.switch_over(time.monotonic() + 5)
        while len(asked) < 3:
            await asyncio.sleep(0)
        guard.cancel()
        assert asked == ["controller_restart", "switchover", "operator"]

    in_loop(body)


class ToldStore:
    """speaker.Store that says what it is told to."""

    def __init__(self, seen: StoreView) -> None:
        self.seen, self.asked = seen, 0

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        self.asked += 1
        return StoreView(holder, self.seen.alone)

    async def look(self) -> StoreView:
        return self.seen

    async def record(self, holder: str, alone: str) -> bool:
        return True

    async def release(self) -> None: ...

    async def close(self) -> None: ...


def test_a_host_learns_that_the_other_is_not_alone_any_more() -> None:
    async def body() -> None:
        until: list[int] = []
        store = ToldStore(StoreView("", "primary"))
        s = Leadership(
            store, node="secondary", address="a", boot="1", ttl_ms=200, margin_ms=50,
            transmitting=True, allow=until.append, changed=lambda: None,
        )  # fmt: skip
        task = asyncio.ensure_future(s.run())
        s.want = True
        while not s.peer_standalone:
            await asyncio.sleep(0.001)
        assert not any(until), "the key is no permission while the other one spoke alone"
        s.want = False
        store.seen = StoreView("", "")  # the pair was made anew
        while s.peer_standalone:
            await asyncio.sleep(0.001)
        s.want = True
        while not s.held:
            await asyncio.sleep(0.001)
        task.cancel()

    in_loop(body)


def test_a_guest_stands_down_at_a_word() -> None:
    """Silent when the command returns, whoever it is; the peer is told, and may go on."""

    async def body(c: Primary | Secondary, dp: FakeDataPath, sent: Sent) -> None:
        dp.order = "failover"
        r = await c.commands.run("demote", {"why": "moved by the cluster"})
        assert dp.mode is Mode.DROP and c.path_shut and not active_json(c)["transmitting"]
        assert r["state"] == "stopped" and "moved by the cluster" in r["reason"]
        assert sent.kinds() == ["shut"] and dp.order == ""
        await c.commands.run("demote", {})  # again: nothing more is said
        assert sent.kinds() == ["shut"] and "moved by the cluster" in c.reason

    p, pd, ps = primary()
    p.state = State.PROTECTED
    asyncio.run(body(p, pd, ps))
    s, sd, ss = secondary()
    s.state = State.PROTECTED
    asyncio.run(body(s, sd, ss))


def test_a_guest_whose_programs_have_stepped_out_stands_down() -> None:
    """After a takeover nothing may be left at the tap that obeys the mode."""

    async def body() -> None:
        c, dp, sent = secondary(Mode.TAKEOVER)
        c.stepped_out = c.view.guest.standalone = True
        c.state = State.PROMOTED
        await c.commands.run("demote", {})
        assert dp.mode is Mode.DROP and not c.stepped_out and dp.stepped_in == 1
        assert sent[0]["alone"]

    asyncio.run(body())


def test_a_takeover_under_way_is_waited_for() -> None:
    """It opens the data path at its end: a silence that was promised before would not last."""

    async def body() -> None:
        c, dp, _ = secondary()
        c.state = State.DEGRADED
        go = asyncio.Event()

        async def take_over() -> None:
            await go.wait()
            dp.mode, c.state = Mode.TAKEOVER, State.PROMOTED

        c._busy = c.spawn(take_over())
        word = asyncio.ensure_future(c.commands.run("demote", {}))
        await asyncio.sleep(0.01)
        assert not word.done()
        go.set()
        await word
        assert dp.mode is Mode.DROP

    asyncio.run(body())


def test_nobody_is_demoted_in_a_switchover() -> None:
    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.view.pair.confirmed = State.PROTECTED, True
        c._begin_hold(8, planned=True)
        with pytest.raises(ValueError, match="a switchover to this guest"):
            await c.commands.run("demote", {})
        assert dp.mode is Mode.CHECKPOINT

    asyncio.run(body())


@pytest.mark.parametrize("word", ["solo", "demote", "beat"])
def test_a_takeover_does_not_break_a_promise_of_silence(word: str) -> None:
    """While QEMU leaves COLO the primary may ask this side to shut its guest in. It has said then
    that it did, and the PVM speaks alone because of that."""

    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.view.pair.confirmed = State.DEGRADED, True
        leaves = asyncio.Event()

        async def migration_status(limit: float = 0) -> str:
            return "completed" if leaves.is_set() else "colo"

        async def status() -> str:
            return "running"

        async def lost_heartbeat(limit: float = 0) -> None:
            pass

        async def execute(command: str) -> list[Any]:
            return []

        c.qemu.qmp = SimpleNamespace(  # type: ignore[assignment]
            migration_status=migration_status, status=status, lost_heartbeat=lost_heartbeat,
            execute=execute, connected=True,
        )  # fmt: skip
        act = c._busy = c.spawn(c.takeover.run("the fence command has succeeded"))
        await asyncio.sleep(0.01)
        asked = None
        if word == "solo":
            c._peer_message({"type": "demote", "why": "the PVM goes on alone"})
        elif word == "beat":
            c.on_message(
                {"type": "heartbeat", "state": "solo", "epoch": 7, "shut": False, "alone": True}
            )
        else:
            asked = asyncio.ensure_future(c.commands.run("demote", {}))
        await asyncio.sleep(0.01)
        leaves.set()
        await act
        if asked is not None:
            await asked  # it waited for the end of the takeover
        assert c.state is State.STOPPED and dp.mode is Mode.DROP
        assert "shut" in sent.kinds() and (asked is not None or "promoted" not in sent.kinds())
        assert not c.takeover.under_way or asked is not None

    asyncio.run(body())


def test_a_pair_is_not_entered_twice_at_a_time() -> None:
    """QMP may come while the PVM goes solo, and begin what a new secondary begins again."""

    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.state = State.SOLO
        old = c.checkpoints._serving = c.spawn(asyncio.sleep(60))
        await asyncio.sleep(0)
        c.on_message({"type": "ready", "epoch": 1, "qemu": 1})
        assert c.state is State.STARTING and c.checkpoints._serving is not old
        c.checkpoints._serving.cancel()
        await asyncio.wait([old], timeout=5)
        assert old.cancelled()

    in_loop(body)


def test_a_primary_that_hears_of_a_takeover_while_it_goes_solo_stays_silent() -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.DEGRADED
        left = asyncio.Event()

        async def leave_colo() -> None:
            await left.wait()

        c.qemu.leave_colo = leave_colo  # type: ignore[method-assign]
        act = c.spawn(c._go_solo("asked by the operator"))
        await asyncio.sleep(0.01)
        c._peer_message({"type": "promoted", "why": "asked by the operator there"})
        left.set()
        await act
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and c.path_shut

    asyncio.run(body())


@pytest.mark.parametrize("status", ["colo", "inmigrate", "running"])
def test_qmp_that_comes_back_does_not_undo_a_stand_down(status: str) -> None:
    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.view.pair.confirmed, c.view.pair.in_colo = (
            State.DEGRADED,
            True,
            status != "running",
        )
        answers = asyncio.Event()

        async def ask(*args: Any, **more: Any) -> str:
            await answers.wait()
            return status

        c.qemu.qmp = SimpleNamespace(  # type: ignore[assignment]
            status=ask, migration_status=ask, prepare=ask, connected=True
        )
        back = c.spawn(c.on_qemu())
        await asyncio.sleep(0.01)
        c._peer_message({"type": "demote", "why": "the PVM goes on alone"})
        answers.set()
        await back
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and sent.kinds() == ["shut"]

    asyncio.run(body())


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
        if heard == "beacon":
            c.heartbeats.on_heartbeat(replace(word, t=boot_ns(), after=boot_ns()))
        else:
            c._peer_up()
        c.view.guest.colo_exit = True
        facts = replace(c.facts(), peer_connected=False, peer_silent_ms=1e6, paths=())
        assert decide(facts).action is Action.FENCE
        c.view.pair.fence.result = True
        facts = replace(facts, arbiter=replace(facts.arbiter, fenced=True))
        assert decide(facts).action is Action.TAKE_OVER, "or else it would be enough"

    for heard in ("beacon", "channel"):
        asyncio.run(body(heard))


@pytest.mark.parametrize("force", [False, True])
def test_a_persons_word_does_not_count_for_ever(
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


def test_the_primary_tells_what_its_guest_has_said_before_the_checkpoint() -> None:
    """What the copied state knows of itself; nothing is said where there is nothing to say."""

    async def body() -> None:
        for mine in ([], [GUEST_MAC]):
            c, dp, sent = primary()
            c.peer.connected = True  # type: ignore[misc]
            c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
            dp.addresses.announced(3, b"", b"".join(mine), running=3)
            task = asyncio.ensure_future(c.checkpoints.make(CheckpointRequest("operator", "asked")))
            while "begin" not in sent.kinds():
                await asyncio.sleep(0)
            task.cancel()
            told = [m for m in sent if m["type"] == "claims"]
            assert [m["macs"] for m in told] == [GUEST_MAC.hex() for _ in mine]
            if told:
                assert sent.kinds().index("claims") < sent.kinds().index("begin")
                encode("claims", **{k: v for k, v in told[0].items() if k != "type"})
                s, there, _ = secondary()
                s.on_message(told[0])
                assert there.addresses.macs(8) == mine and there.addresses.macs(7) == []
                s.on_message(told[0] | {"n": 7})  # late: this epoch is already here
                s.on_message(told[0] | {"macs": "00"})  # damaged: one warning, no more
                assert there.addresses.macs(7) == []

    in_loop(body)


def test_a_primary_that_dies_in_a_checkpoint_leaves_the_svm_its_addresses() -> None:
    """What it has told was for a state that never came; the SVM is announced as what it is."""
    mine = abi.ADDRESS.pack(bytes(10) + b"\xff\xff\x0a\x09\x00\x03", 0)
    other = abi.ADDRESS.pack(bytes(10) + b"\xff\xff\x0a\x09\x00\x04", 0)

    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.qemu.qmp = State.PROTECTED, FakeQmp()  # type: ignore[assignment]
        for key, epoch in ((mine, 7), (other, 8)):
            claim = abi.CLAIM.pack(time.monotonic_ns(), mac_key(GUEST_MAC), epoch, 0)
            dp.addresses._addresses.set(key, claim)
        told, _ = dp.addresses.export(256)
        c.on_message({"type": "claims", "n": 8, "addresses": told.hex(), "macs": ""})
        c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
        await c.takeover.run("the primary is dead")
        assert dp.epoch == 7
        assert [o.address for o in dp.addresses.own(GUEST_MAC, 7)] == [mine[:16]]
        assert len(dp.addresses.own(GUEST_MAC, None)) == 1

    in_loop(body)


def test_the_data_path_learns_whose_frames_it_mirrors() -> None:
    class Unsure(FakeQmp):
        async def guest_macs(self, tap: str) -> list[str]:
            raise NicError("several cards")

    async def body() -> None:
        c, dp, _ = primary()
        c.qemu.options = replace(c.qemu.options, guest_mac="")
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        known, c.qemu.qmp = c.qemu.qmp, Unsure()  # type: ignore[assignment]
        assert await c.qemu.learn_macs() == "" and not dp.macs, "it goes on mirroring everything"
        c.qemu.qmp = known
        c.qemu.on_event(event("NIC_RX_FILTER_CHANGED", 1, 1))
        while not dp.macs:
            await asyncio.sleep(0)
        assert [m.hex(":") for m in dp.macs] == ["52:54:00:12:34:56", "52:54:00:12:34:57"]
        c.qemu.qmp = Unsure()  # type: ignore[assignment]
        dp.macs = []
        assert await c.qemu.learn_macs() == "52:54:00:12:34:56", "as it was last told"
        assert not dp.macs
        c.qemu.options = replace(c.qemu.options, guest_mac="02:00:00:00:00:09")
        assert await c.qemu.learn_macs() == "02:00:00:00:00:09"
        assert dp.macs == [bytes.fromhex("020000000009")]

    in_loop(body)


def test_a_guest_with_too_many_mac_addresses_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks for the first one at a takeover gets it, whatever the table has room for."""

    async def body() -> None:
        c, _, _ = primary()

        def full(*macs: bytes) -> None:
            raise OSError(errno.E2BIG, "map update")

        monkeypatch.setattr(c.qemu, "_is_at", full)
        c.qemu.options = replace(c.qemu.options, guest_mac="")
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        assert await c.qemu.learn_macs() == "52:54:00:12:34:56"
        assert "not all MAC addresses" in caplog.text

    in_loop(body)


def test_a_guest_behind_a_port_that_does_not_forward_does_not_speak() -> None:
    c, dp, _ = primary(Mode.BYPASS)
    assert active_json(c)["transmitting"] is True
    dp.port_forwarding = False
    assert active_json(c)["transmitting"] is False
