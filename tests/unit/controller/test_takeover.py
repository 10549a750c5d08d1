# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary's takeover: epochs in doubt, promises of silence, announcements."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.failover.states import State
from colo_xdp.net.address_claims import mac_key
from colo_xdp.net.announce import ANNOUNCE_TIMES
from colo_xdp.qemu.nic import NicError
from colo_xdp.status.builder import active_json
from tests.netns.frames import GUEST_MAC
from tests.unit.controller.fakes import (
    BEAT,
    FakeDataPath,
    FakeQmp,
    event,
    in_loop,
    primary,
    secondary,
)


def test_a_checkpoint_that_nobody_saw_is_in_doubt_until_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.CHECKPOINT)
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        lost: list[int] = []
        monkeypatch.setattr(c.flows[0], "give_up", lambda epoch: lost.append(epoch) or 0)
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


@pytest.mark.parametrize("demoted", [False, True])
def test_a_checkpoint_that_comes_after_its_deadline_counts(demoted: bool) -> None:
    """The PVM's QEMU hung, sent the checkpoint in the end, and died: the SVM runs it."""

    async def body() -> None:
        c, dp, _ = secondary()
        c.state, c.qemu.qmp = State.PROTECTED, FakeQmp()  # type: ignore[assignment]
        c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
        assert c.held.hold is not None
        c.held.hold.deadline = 0.0
        c.on_tick(time.monotonic_ns())
        assert c.state is State.DEGRADED and dp.mode is Mode.RUN
        if demoted:
            c.on_message({"type": "demote", "why": "its checkpoint hangs"})
        shut = Mode.DROP if demoted else Mode.CHECKPOINT
        t = time.monotonic_ns()
        c.on_qmp(event("STOP", t, t))
        assert dp.mode is shut
        c.on_qmp(event("RESUME", t + 1, t + 1))
        assert dp.epoch == 8 and dp.mode is (shut if demoted else Mode.RUN)
        c._peer_message(BEAT | {"state": "stopped", "epoch": 7, "shut": True})
        assert c._busy is not None
        await c._busy
        assert c.state is State.PROMOTED and dp.epoch == 8

    in_loop(body)


@pytest.mark.parametrize("lives", [False, True])
def test_only_a_primary_that_lives_is_heard_after_the_takeover_and_not_for_long(
    lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else writes to the peer link is no client. The deadline is there before the mode."""
    order: list[tuple[str, int]] = []

    class Recorder(FakeDataPath):
        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("mode", "mirrored_until"):
                order.append((name, int(value)))
            super().__setattr__(name, value)

    async def body() -> None:
        c, dp, _ = secondary()
        dp.__class__ = Recorder
        c.state, c.qemu.qmp = State.DEGRADED, FakeQmp()  # type: ignore[assignment]
        dp.mirrored_until = 1  # of an earlier takeover
        if lives:
            c.view.peer_shut()
        order.clear()
        now = time.monotonic_ns()
        await c.takeover.run("the test says so")
        (slot, until), mode = order
        assert (slot, mode) == ("mirrored_until", ("mode", Mode.TAKEOVER))
        if lives:
            assert now + ANNOUNCE_TIMES[-1] * 1e9 < until < time.monotonic_ns() + 3e9
        else:
            assert until == 0

    in_loop(body)


def test_a_demoted_guest_that_a_person_stops_loads_nothing_by_that() -> None:
    async def body() -> None:
        c, dp, _ = secondary()
        q = c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        c.replacement.begin = lambda: None  # type: ignore[method-assign]
        c.on_message({"type": "demote", "why": "the primary asks"})

        async def status(timeout: float | None = None) -> str:
            return "paused"

        t = time.monotonic_ns()
        running, q.status = q.status, status  # type: ignore[method-assign]
        c.on_qmp(event("STOP", t, t))
        await asyncio.gather(*c._tasks)
        q.status = running  # type: ignore[method-assign]
        c.on_qmp(event("RESUME", t + 1, t + 1))
        assert dp.epoch == 7 and c.held.hold is None and dp.mode is Mode.DROP
        c.on_qmp(event("STOP", t + 2, t + 2))  # a checkpoint
        await asyncio.gather(*c._tasks)
        c.on_qmp(event("RESUME", t + 3, t + 3))
        assert dp.epoch == 8 and dp.mode is Mode.DROP

    in_loop(body)


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


@pytest.mark.parametrize("word", ["solo", "demote", "beat"])
def test_a_takeover_does_not_break_a_promise_of_silence(word: str) -> None:
    """While QEMU leaves COLO the primary may ask this side to shut its guest in. It has said then
    that it did, and the PVM transmits alone because of that."""

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
                {
                    "type": "heartbeat",
                    "role": "primary",
                    "state": "solo",
                    "epoch": 7,
                    "shut": False,
                    "standalone": True,
                }
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
        c.on_message({"type": "claims", "n": 8, "nic": 0, "addresses": told.hex(), "macs": ""})
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
        c.qemu.options = replace(c.qemu.options, taps={"tap0": ""})
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        known, c.qemu.qmp = c.qemu.qmp, Unsure()  # type: ignore[assignment]
        assert await c.qemu.learn_macs() == [""] and not dp.macs, "it goes on mirroring everything"
        c.qemu.qmp = known
        c.qemu.on_event(event("NIC_RX_FILTER_CHANGED", 1, 1))
        while not dp.macs:
            await asyncio.sleep(0)
        assert [m.hex(":") for m in dp.macs] == ["52:54:00:12:34:56", "52:54:00:12:34:57"]
        c.qemu.qmp = Unsure()  # type: ignore[assignment]
        dp.macs = []
        assert await c.qemu.learn_macs() == ["52:54:00:12:34:56"], "as it was last told"
        assert not dp.macs
        c.qemu.options = replace(c.qemu.options, taps={"tap0": "02:00:00:00:00:09"})
        assert await c.qemu.learn_macs() == ["02:00:00:00:00:09"]
        assert dp.macs == [bytes.fromhex("020000000009")]

    in_loop(body)


def test_a_guest_with_too_many_mac_addresses_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks for the first one at a takeover gets it, whatever the table has room for."""

    async def body() -> None:
        c, _, _ = primary()

        def full(nic: int, *macs: bytes) -> None:
            raise OSError(errno.E2BIG, "map update")

        monkeypatch.setattr(c.qemu, "_is_at", full)
        c.qemu.options = replace(c.qemu.options, taps={"tap0": ""})
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        assert await c.qemu.learn_macs() == ["52:54:00:12:34:56"]
        assert "not all MAC addresses" in caplog.text

    in_loop(body)


def test_a_guest_behind_a_port_that_does_not_forward_does_not_transmit() -> None:
    c, dp, _ = primary(Mode.BYPASS)
    assert active_json(c)["transmitting"] is True
    dp.port_forwarding = False
    assert active_json(c)["transmitting"] is False
