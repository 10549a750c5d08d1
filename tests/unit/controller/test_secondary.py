# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary: frames over a checkpoint, and what is refused."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, Source, SyncState
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.states import State
from tests.netns.frames import tcp
from tests.unit.controller.fakes import event, in_loop, primary, secondary


@pytest.mark.parametrize(("status", "told"), [("inmigrate", True), ("running", False)])
def test_a_primary_that_gave_up_is_told_again_who_waits(
    status: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr("colo_xdp.controller.secondary_entry.REMIND_S", 0.05)
        c, _, sent = secondary(adopted=False)
        asked = 0

        async def state_of_qemu() -> str:
            nonlocal asked
            asked += 1
            return status

        async def no_disks(command: str) -> list[Any]:
            return []

        async def no_migration() -> str:
            return ""

        async def no_cards() -> list[Any]:
            return []

        async def nothing_special() -> dict[str, str]:
            return {}

        c.qemu.qmp = SimpleNamespace(  # type: ignore[assignment]
            connected=True,
            status=state_of_qemu,
            execute=no_disks,
            migration_status=no_migration,
            hardware=nothing_special,
            cards=no_cards,
        )
        c.peer = SimpleNamespace(connected=True, send=sent)  # type: ignore[assignment]
        c.entry.wanted, c.view.peer.state = True, "checkpointing"
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
        await asyncio.gather(*c._tasks)
        assert sent.kinds() == ["ready"] * told

    in_loop(body)


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
        {
            "type": "heartbeat",
            "role": "primary",
            "state": state,
            "epoch": epoch,
            "shut": False,
            "standalone": False,
        }
    )
    assert (s.state is State.PROTECTED) == again


def test_a_shut_data_path_stays_shut_for_the_next_controller() -> None:
    c, dp, _ = primary(Mode.DROP, adopted=True)
    assert c.state is State.STOPPED and dp.mode is Mode.DROP
    c.on_frame(CapturedFrame(Source.PVM, 1, 7, tcp(b"x"), 0, False))
    assert c.output.nics[0].engine.held_packets == 0


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


def test_signs_of_an_earlier_secondary_are_forgotten_with_the_next_one() -> None:
    c, _, _ = primary(Mode.BYPASS)
    c.view.peer.shut = True
    c.on_message({"type": "ready", "epoch": 0, "disks": {}, "hardware": "", "nics": {"net0": 0}})
    assert not c.view.peer.shut


def test_a_first_checkpoint_counts_when_the_primary_has_confirmed_it() -> None:
    """Until then the primary may give up entering, and its guest transmits uncompared."""
    c, dp, sent = secondary()
    dp.mode, dp.epoch, c.state = Mode.RUN, 0, State.STARTING
    c.view.pair.in_colo = c.view.pair.confirmed = False
    c.qemu.qmp = SimpleNamespace(connected=True)  # type: ignore[assignment]
    c._on_begin(1, initial=True, planned=False, asked=True)
    t = time.monotonic_ns()
    c.on_frame(CapturedFrame(Source.CLIENT, t, 0, tcp(b"client"), 0, False))
    c.on_qmp(event("RESUME", t, t))
    assert sent.kinds() == ["begin_ack", "resumed"]
    beat = {
        "type": "heartbeat",
        "role": "primary",
        "state": "checkpointing",
        "epoch": 0,
        "shadow": False,
        "delivered": 0,
        "sent": 0,
    }
    beat |= {"shut": False, "role": "primary", "standalone": True}
    c.on_message(beat)
    assert c.state is State.STARTING and dp.mode is Mode.CHECKPOINT and dp.epoch == 0
    assert not dp.injectors["deliver"].frames
    c.entry.wanted = True
    c.on_message(beat | {"epoch": 1, "standalone": False})
    assert dp.sync_state is SyncState.IN_SYNC
    c.peer_connected()
    assert "ready" not in sent.kinds(), "the guest is in use: none that waits"
    assert c.state is State.PROTECTED and dp.mode is Mode.RUN and dp.epoch == 1
    assert len(dp.injectors["deliver"].frames) == 1
