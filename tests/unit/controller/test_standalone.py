# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that ran standalone: what it means for its copy, its host and the next pair."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, SyncState
from colo_xdp.config.file import load
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.failover.lease import Leadership, StoreView
from colo_xdp.failover.states import State
from colo_xdp.qemu.qmp import QmpTimeout
from colo_xdp.status.builder import active_json
from tests.unit.controller.fakes import (
    BEAT,
    EXAMPLES,
    RAN_STANDALONE,
    FakeQmp,
    Sent,
    ToldStore,
    in_loop,
    primary,
    secondary,
)


@pytest.mark.parametrize("side", ["solo", "promoted"])
def test_a_guest_that_ran_standalone_and_dies_does_not_transmit(side: str) -> None:
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
        assert sent[-1]["type"] == "shut" and sent[-1]["standalone"]
        c.replacement._search.cancel()

    in_loop(body)


@pytest.mark.parametrize("kind", ["promoted", "heartbeat"])
def test_a_primary_never_transmits_against_a_secondary_that_took_over(kind: str) -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.PROTECTED
        beat = {"t": 1, "echo": 0, "state": "promoted", "epoch": 7, "vm": True,
                "shut": False, "standalone": True, "role": "secondary",
                "delivered": 0, "sent": 0}  # fmt: skip
        c._peer_message({"type": kind, **({"why": "x"} if kind == "promoted" else beat)})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP

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
        c.on_message(
            {"type": "ready", "epoch": 3, "disks": {}, "hardware": "", "nics": {"net0": 0}}
        )
        assert c.checkpoints._serving is not None
        await asyncio.wait({c.checkpoints._serving}, timeout=5)
        assert went == ["starting"] and c.qemu.qmp.said == ["lost_heartbeat"]  # type: ignore[attr-defined]
        assert not c.output.uncompared and not c.view.operator
        assert c.view.guest.standalone, "until the first checkpoint is complete"

    in_loop(body)


@pytest.mark.parametrize(
    ("migration", "first"), [("failed", ""), ("completed", ""), ("completed", "postmigrate")]
)
def test_a_guest_that_is_alone_runs_whatever_a_broken_checkpoint_has_left(
    migration: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when QEMU hangs for a while, or the controller is another one by then. One that a
    person has paused stays so."""
    monkeypatch.setattr("colo_xdp.controller.primary.REARM_S", 0.001)

    class Stopped(FakeQmp):
        answers = iter([first, "", "colo", "paused", "running"])

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
        stopped_by_it = migration == "failed" or first == "postmigrate"
        want = ["", "colo", "paused", "cont", "running"] if stopped_by_it else []
        assert c.qemu.qmp.said == [first, *want]  # type: ignore[attr-defined]

    in_loop(body)


@pytest.mark.parametrize("ours", [True, False])
def test_an_entry_that_waits_before_its_switchover_is_cancelled(ours: bool) -> None:
    """`pre-switchover` waits for a command that nobody sends; the guest stands still meanwhile."""

    class Waits(FakeQmp):
        migration, now = "pre-switchover", "finish-migrate"

        async def migration_status(self, timeout: float | None = None) -> str:
            return self.migration

        async def status(self, timeout: float | None = None) -> str:
            return self.now

        async def enters_colo(self) -> bool:
            return ours

        async def execute(self, command: str) -> list[Any]:
            self.said.append(command)
            if command == "migrate_cancel":
                self.migration = "cancelled"
            elif command == "cont":
                self.now = "running"
            return []

    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS, adopted=True)
        c.state, c.qemu.qmp = State.SOLO, Waits()  # type: ignore[assignment]
        await c.on_qemu()
        await asyncio.gather(*c._tasks)
        assert c.qemu.qmp.said == ["migrate_cancel", "cont"] * ours  # type: ignore[attr-defined]
        assert (await c.qemu.qmp.status() == "running") == ours

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


@pytest.mark.parametrize("state", [State.PROTECTED, State.DEGRADED])
@pytest.mark.parametrize("words", [["alive", "dead"], ["dead"]])
def test_a_copy_of_a_guest_that_ran_standalone_never_transmits(
    state: State, words: list[str]
) -> None:
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
            c._peer_message(RAN_STANDALONE | shut)
            await asyncio.sleep(0)
        assert c.state is State.STOPPED and dp.mode is Mode.DROP and not done
        c._peer_message({"type": "shut", "why": "dead", "standalone": False})
        await asyncio.sleep(0)
        assert c.state is State.STOPPED and not done, "whatever is said later"
        again = Secondary(c.config, dp)  # type: ignore[arg-type]
        assert again.state is State.STOPPED and not again.view.pair.confirmed
        assert "shut" in sent.kinds()

    in_loop(body)


def test_a_guest_that_waits_for_a_standalone_one_stays() -> None:
    c, dp, _ = secondary(Mode.DROP, adopted=False)
    c.entry.wanted = True
    c.on_message(RAN_STANDALONE)
    c.peer_shut(True)
    assert c.state is State.STARTING and dp.mode is Mode.DROP


def test_a_pvm_is_outdated_when_the_svm_ran_standalone_and_died() -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.DEGRADED
        c._peer_message({"type": "shut", "why": "dead", "standalone": True})
        assert c.state is State.STOPPED and dp.mode is Mode.DROP

    in_loop(body)


@pytest.mark.parametrize(
    ("mode", "sync", "state", "alone"),
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
def test_who_ran_standalone_outlives_the_primarys_controller(
    mode: Mode, sync: SyncState, state: State, alone: bool
) -> None:
    _, dp, _ = primary(mode)
    dp.sync_state, dp.adopted = sync, True
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    assert c.state is state
    c.beat()
    assert sent[-1]["standalone"] == alone


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
        assert not any(until), "the key is no permission while the other one transmitted alone"
        s.want = False
        store.seen = StoreView("", "")  # the pair was made anew
        while s.peer_standalone:
            await asyncio.sleep(0.001)
        s.want = True
        while not s.held:
            await asyncio.sleep(0.001)
        task.cancel()

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
