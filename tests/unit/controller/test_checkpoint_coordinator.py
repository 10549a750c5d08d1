# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints of the primary: what is asked for, and what belongs to each."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from colo_xdp.abi import Mode, Source, SyncState
from colo_xdp.compare.causes import Cause
from colo_xdp.config.file import load
from colo_xdp.controller.checkpoint_coordinator import (
    Checkpoint,
    CheckpointRequest,
)
from colo_xdp.controller.primary import Primary
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.states import State
from colo_xdp.peer.messages import encode
from tests.netns.frames import GUEST_MAC, tcp
from tests.unit.controller.fakes import EXAMPLES, FakeQmp, event, in_loop, primary, secondary
from tests.unit.offload.test_scheduler import Pair


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


@pytest.mark.parametrize("state", [State.DEGRADED, State.STARTING, State.SOLO])
def test_what_backpressure_keeps_leaves_also_where_no_time_runs_out(
    state: State,
) -> None:
    c, dp, _ = primary()
    dp.mode = Mode.CHECKPOINT
    pair = Pair()
    sent = pair.until_backpressure()
    c.output.nics[0].engine, c.state = pair.e, state
    c.on_tick(pair.now)
    assert pair.out == sent


def test_a_checkpoint_that_is_cancelled_with_its_last_message_goes_no_further() -> None:
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


def test_an_adopted_data_path_decides_nothing_before_a_checkpoint() -> None:
    c, dp, _ = primary(Mode.RUN, adopted=True)
    assert dp.mode is Mode.CHECKPOINT
    c.on_frame(CapturedFrame(Source.PVM, time.monotonic_ns(), 7, tcp(b"x"), 0, False))
    c.on_frame(CapturedFrame(Source.SVM, time.monotonic_ns(), 7, tcp(b"x"), 0, False))
    assert c.output.nics[0].engine.held_packets == 1 and not dp.injectors["release"].frames


def test_offsets_of_its_own_are_handed_over_in_parts() -> None:
    async def body() -> None:
        c, dp, sent = primary(Mode.CHECKPOINT)
        dp.promoted_epoch = 7
        entries = [bytes([i % 256]) * 104 for i in range(700)]
        c.checkpoints.offsets.tables[0] = SimpleNamespace(export=lambda epoch: entries)  # type: ignore[assignment]
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
        assert [(m["nic"], m["first"]) for m in parts] == [(0, True), (0, False), (0, False)]
        assert b"".join(bytes.fromhex(m["flows"]) for m in parts) == b"".join(entries)
        for m in parts:
            encode(m["type"], **{k: v for k, v in m.items() if k != "type"})

    in_loop(body)


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


def test_a_pair_is_not_entered_twice_at_a_time() -> None:
    """QMP may come while the PVM goes solo, and begin what a new secondary begins again."""

    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.state = State.SOLO
        old = c.checkpoints._serving = c.spawn(asyncio.sleep(60))
        await asyncio.sleep(0)
        c.on_message(
            {
                "type": "ready",
                "epoch": 1,
                "qemu": 1,
                "disks": {},
                "hardware": "",
                "nics": {"net0": 0},
            }
        )
        assert c.state is State.STARTING and c.checkpoints._serving is not old
        c.checkpoints._serving.cancel()
        await asyncio.wait([old], timeout=5)
        assert old.cancelled()

    in_loop(body)


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
