# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's own end and its resets: what both controllers make of them."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, Source, SyncState
from colo_xdp.compare.causes import Cause
from colo_xdp.controller.checkpoint import CheckpointFailed, CheckpointRequest
from colo_xdp.controller.guest_lifecycle import ENDED
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.states import State
from colo_xdp.peer.heartbeat_datagram import Flag
from colo_xdp.qemu.events import QmpEvent
from tests.netns.frames import udp
from tests.unit.controller.fakes import BEAT, FakeQmp, in_loop, primary, secondary

OFF = {"guest": True, "reason": "guest-shutdown"}


def says(c: Primary | Secondary, name: str, **data: Any) -> None:
    now = time.monotonic_ns()
    c.qemu.on_event(QmpEvent(name, data, now, now))


class Status(FakeQmp):
    """QEMU in a run state."""

    def __init__(self, status: str) -> None:
        super().__init__()
        self.now = status

    async def status(self, timeout: float | None = None) -> str:
        return self.now

    async def execute(self, command: str) -> list[Any]:
        self.said.append(command)
        return []

    async def quit(self) -> None:
        self.said.append("quit")
        self.connected = False


@pytest.mark.parametrize("answers", ["gone", "beat", ""])
def test_a_pvm_that_is_off_ends_the_pair(answers: str) -> None:
    """Its last words leave when the SVM is silent for certain; nobody is asked to go on."""

    async def body() -> None:
        c, dp, sent = primary()
        c.state, c.peer.connected = State.PROTECTED, True  # type: ignore[misc]
        now = time.monotonic_ns()
        c.on_frame(CapturedFrame(Source.PVM, now, 7, udp(b"last word"), 0, False))
        says(c, "SHUTDOWN", **OFF)
        await asyncio.sleep(0)
        assert "guest_off" in sent.kinds() and "shut" not in sent.kinds()
        assert dp.mode is Mode.CHECKPOINT and not dp.injectors["release"].frames
        if answers == "gone":
            c._peer_message({"type": "shut", "why": "silent", "standalone": False})
        elif answers:
            beat = {"role": "secondary", "state": "stopped", "epoch": 7, "shut": True}
            c._peer_message(BEAT | beat | {"over": True, "promise": False})
        assert c._busy is not None
        await c._busy
        assert (c.state, dp.mode, dp.sync_state) == (State.STOPPED, Mode.DROP, SyncState.NONE)
        assert "the guest has shut itself down" in c.reason
        assert len(dp.injectors["release"].frames) == bool(answers)
        assert sent[-1]["type"] == "heartbeat" and sent[-1]["over"] and sent[-1]["shut"]
        assert Flag.SHUT not in c.heartbeats.flags(), "no reason to take over, on no path"
        c.qemu._on_closed("closed")  # its QEMU ends
        c.reconsider()
        assert "shut" not in sent.kinds()

    in_loop(body)


@pytest.mark.parametrize("word", ["off", "beat"])
def test_the_copy_of_a_guest_that_is_off_does_not_take_over(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colo_xdp.controller.guest_lifecycle.GRACE_S", 0.05)

    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.qemu.qmp = State.PROTECTED, Status("running")  # type: ignore[assignment]
        over = BEAT | {"state": "stopped", "epoch": 7, "shut": True, "over": True}
        c._peer_message({"type": "guest_off", "why": "the guest has shut itself down"}
                        if word == "off" else over)  # fmt: skip
        assert (c.state, dp.mode, dp.sync_state) == (State.STOPPED, Mode.DROP, SyncState.NONE)
        assert sent.kinds()[-1] == "shut"
        c.view.guest.colo_exit = True
        c._peer_message(over)
        await asyncio.sleep(0)
        assert c._busy is None and c.state is State.STOPPED
        end = time.monotonic() + 5
        while "quit" not in c.qemu.qmp.said and time.monotonic() < end:  # type: ignore[attr-defined]
            await asyncio.sleep(0.02)
        assert "quit" in c.qemu.qmp.said, "it is of no use to anybody"  # type: ignore[attr-defined]

    in_loop(body)


def test_an_svm_that_is_off_alone_is_lost() -> None:
    async def body() -> None:
        c, dp, sent = secondary()
        c.state = State.PROTECTED
        says(c, "SHUTDOWN", **OFF)
        assert c._busy is not None
        await c._busy
        assert c.state is State.STOPPED and dp.mode is Mode.DROP
        assert sent.kinds()[-1] == "shut" and "shut itself down" in sent[-1]["why"]

    in_loop(body)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_the_end_of_a_guest_that_is_alone_is_said(role: str) -> None:
    async def body() -> None:
        c, dp, _ = primary(Mode.BYPASS) if role == "primary" else secondary(Mode.TAKEOVER)
        c.state = State.SOLO if role == "primary" else State.PROMOTED
        says(c, "SHUTDOWN", **OFF)
        assert c._busy is not None
        await c._busy
        assert c.state is State.STOPPED and dp.mode is Mode.DROP
        assert "the guest has shut itself down" in c.reason

    in_loop(body)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("RESET", {"guest": True, "reason": "guest-reset"}),
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        ("POWERDOWN", {}),
        ("GUEST_PANICKED", {"action": "run"}),
    ],
)
def test_what_makes_the_guests_unequal_is_a_checkpoint(name: str, data: dict[str, Any]) -> None:
    c, _, _ = primary()
    c.state = State.PROTECTED
    says(c, name, **data)
    assert c.checkpoints.wanted is not None and c.checkpoints.wanted.cause == Cause.GUEST_EVENT

    s, _, sent = secondary()
    s.state = State.PROTECTED
    says(s, name, **data)
    assert sent.kinds() == ["request"]
    c, _, _ = primary()
    c.state = State.PROTECTED
    c._peer_message(sent[0])
    assert c.checkpoints.wanted is not None and c.checkpoints.wanted.cause == Cause.GUEST_EVENT


def test_a_panic_of_the_pvm_lets_the_svm_go_on() -> None:
    async def body() -> None:
        c, dp, sent = primary()
        c.state = State.PROTECTED
        says(c, "GUEST_PANICKED", action="pause")
        assert c._busy is not None
        await c._busy
        assert dp.mode is Mode.DROP and sent.kinds()[-1] == "shut"
        assert "panicked" in sent[-1]["why"]

    in_loop(body)


def test_what_qemu_said_before_it_went_is_the_reason() -> None:
    async def body() -> None:
        c, _, sent = primary()
        c.state = State.PROTECTED
        says(c, "SHUTDOWN", guest=False, reason="host-qmp-quit")
        assert c.state is State.PROTECTED
        c.view.guest.gone = True
        c.reconsider()
        assert c._busy is not None
        await c._busy
        assert "`quit` over QMP" in c.reason and sent.kinds()[-1] == "shut"

    in_loop(body)


def test_no_checkpoint_while_an_io_error_has_stopped_the_pvm() -> None:
    """QEMU aborts when it is to go from io-error to colo."""

    async def body() -> None:
        c, _, _ = primary()
        c.state, c.qemu.qmp = State.PROTECTED, Status("io-error")  # type: ignore[assignment]
        says(c, "BLOCK_IO_ERROR", action="stop", device="d0", operation="write", nospace=True)
        says(c, "STOP")
        await asyncio.sleep(0)
        assert c.checkpoints.wanted is None and "disk d0" in c.reason and c.state is State.PROTECTED
        c.checkpoints.sleep_or_wake = lambda seconds: asyncio.sleep(0)  # type: ignore[method-assign]
        assert await c.checkpoints._delayed(CheckpointRequest(Cause.PAYLOAD_DIFFERS, "x"))
        assert await c.checkpoints._delayed(CheckpointRequest(Cause.SWITCHOVER, "x"))
        with pytest.raises(ValueError, match="disk d0"):
            await c.commands.run("checkpoint", {})
        says(c, "RESUME")
        assert (
            not c.view.guest.halted
            and c.checkpoints.wanted is not None
            and c.checkpoints.wanted.cause == Cause.GUEST_EVENT
        )
        assert not await c.checkpoints._delayed(c.checkpoints.wanted)

    in_loop(body)


def test_no_checkpoint_of_a_pvm_that_an_io_error_stops_in_its_beginning() -> None:
    """Everything is held already, and QEMU has not been asked yet."""

    async def body() -> None:
        c, _, sent = primary()
        c.state, c.qemu.qmp = State.PROTECTED, Status("io-error")  # type: ignore[assignment]
        c.peer.connected = True
        task = asyncio.ensure_future(
            c.checkpoints.make(CheckpointRequest(Cause.PAYLOAD_DIFFERS, "x"))
        )
        while "begin" not in sent.kinds():
            await asyncio.sleep(0)
        says(c, "BLOCK_IO_ERROR", action="stop", device="d0", operation="write")
        says(c, "STOP")
        assert c.checkpoints.running is not None
        c.on_message({"type": "begin_ack", "n": c.checkpoints.running.n})
        with pytest.raises(CheckpointFailed, match="disk d0") as e:
            await task
        assert e.value.refused, "it is asked for again when the guest runs"
        assert not c.qemu.qmp.said  # type: ignore[attr-defined]

    in_loop(body)


def test_an_io_error_of_the_svm_is_its_loss() -> None:
    async def body() -> None:
        c, _, sent = secondary()
        c.state = State.PROTECTED
        says(c, "BLOCK_IO_ERROR", action="stop", device="d0", operation="write")
        assert c._busy is not None
        await c._busy
        assert sent.kinds()[-1] == "shut" and "disk d0" in sent[-1]["why"]

    in_loop(body)


@pytest.mark.parametrize(
    ("status", "asks", "lost", "cont"),
    [
        ("paused", True, False, False),
        ("guest-panicked", True, False, True),
        ("internal-error", False, True, False),
        ("colo", False, False, False),
    ],
)
def test_an_svm_that_stands_still_with_no_checkpoint(
    status: str, asks: bool, lost: bool, cont: bool
) -> None:
    """`colo`: somebody else's checkpoint, whose RESUME ends the epoch, as before."""

    async def body() -> None:
        c, dp, sent = secondary()
        c.state, c.view.pair.in_colo = State.PROTECTED, True
        c.qemu.qmp = Status(status)  # type: ignore[assignment]
        says(c, "STOP")
        for _ in range(5):
            await asyncio.sleep(0)
        assert ("request" in sent.kinds()) == asks
        assert ("cont" in c.qemu.qmp.said) == cont  # type: ignore[attr-defined]
        assert c.view.guest.gone == lost
        if lost:
            return
        says(c, "RESUME")
        assert dp.mode is Mode.RUN and dp.epoch == (7 if asks else 8), "whose state runs"
        assert c.held.count == 0

    in_loop(body)


def test_a_pvm_that_a_person_stopped_has_no_second_stop() -> None:
    """The checkpoint that lets it run again counts from the STOP that there was."""

    async def body() -> None:
        c, _, _ = primary()
        c.state, c.qemu.qmp = State.PROTECTED, Status("paused")  # type: ignore[assignment]
        says(c, "STOP")
        for _ in range(5):
            await asyncio.sleep(0)
        assert c.checkpoints.wanted is not None and "by a person" in c.checkpoints.wanted.detail
        c.peer = SimpleNamespace(  # type: ignore[assignment]
            connected=True, send=lambda kind, **f: begun(c, kind, f), rtt_ns=0, ending=""
        )
        c.beat = lambda: None  # type: ignore[method-assign]
        want, c.checkpoints.wanted = c.checkpoints.wanted, None
        task = asyncio.ensure_future(c.checkpoints.make(want))
        while "checkpoint" not in c.qemu.qmp.said:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        assert c.checkpoints.running is not None
        c.on_message({"type": "resumed", "n": c.checkpoints.running.n, "pause_us": 1})
        says(c, "RESUME")
        await task
        assert c.state is State.PROTECTED

    in_loop(body)


@pytest.mark.parametrize(
    ("adopted", "status"), [(False, "paused"), (True, "paused"), (True, "colo")]
)
def test_a_pvm_that_was_stopped_while_nobody_listened_has_no_stop(
    adopted: bool, status: str
) -> None:
    """The controller was started anew, or has lost QMP for a moment: its checkpoint ends all the
    same, and what is compared with it begins no later than it did."""

    async def body() -> None:
        c, _, _ = primary(Mode.RUN, adopted=adopted)
        c.state, c.qemu.qmp = State.DEGRADED, Status(status)  # type: ignore[assignment]
        c.checkpoints._serving = asyncio.ensure_future(asyncio.sleep(0))
        await c.on_qemu()
        before = time.monotonic_ns()
        c.peer = SimpleNamespace(  # type: ignore[assignment]
            connected=True, send=lambda kind, **f: begun(c, kind, f), rtt_ns=0, ending=""
        )
        c.beat = lambda: None  # type: ignore[method-assign]
        task = asyncio.ensure_future(
            c.checkpoints.make(CheckpointRequest(Cause.CONTROLLER_RESTART, "new"))
        )
        while "checkpoint" not in c.qemu.qmp.said:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        assert c.checkpoints.running is not None and 0 < c.checkpoints.running.stop_ns < before
        c.on_message({"type": "resumed", "n": c.checkpoints.running.n, "pause_us": 1})
        says(c, "RESUME")
        await task
        assert c.state is State.PROTECTED and not c.checkpoints._still_ns

    in_loop(body)


def test_what_stopped_the_pvm_is_asked_and_so_is_whether_it_runs_again() -> None:
    """QMP does not repeat its events for a controller that was not there."""

    async def body() -> None:
        c, _, _ = primary(Mode.RUN, adopted=True)
        c.state, c.qemu.qmp = State.DEGRADED, Status("io-error")  # type: ignore[assignment]
        c.checkpoints._serving = asyncio.ensure_future(asyncio.sleep(0))
        await c.on_qemu()
        assert "io-error" in c.view.guest.halted and c.checkpoints._still_ns
        assert await c.checkpoints._delayed(CheckpointRequest(Cause.CONTROLLER_RESTART, "new"))
        c.qemu.qmp.now = "running"  # type: ignore[attr-defined]
        await c.on_qemu()
        assert not c.view.guest.halted and not c.checkpoints._still_ns
        assert not await c.checkpoints._delayed(CheckpointRequest(Cause.CONTROLLER_RESTART, "new"))

    in_loop(body)


def begun(c: Primary, kind: str, fields: dict[str, Any]) -> bool:
    if kind == "begin":
        asyncio.get_running_loop().call_soon(c.on_message, {"type": "begin_ack", "n": fields["n"]})
    return True


def test_a_heartbeat_may_come_before_the_reason() -> None:
    c, _, _ = secondary()
    c.state, c.view.pair.in_colo, c.view.pair.confirmed = State.PROTECTED, True, True
    c.spawn = lambda coro: coro.close()  # type: ignore[method-assign,assignment]
    c.life.pair_over(ENDED)
    assert c.state is State.STOPPED and ENDED in c.reason
    c.life.pair_over("the guest has shut itself down")
    assert "shut itself down" in c.reason
    c.life.pair_over(ENDED)
    assert "shut itself down" in c.reason
