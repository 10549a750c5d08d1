# SPDX-License-Identifier: GPL-2.0-or-later
"""Controllers of a guest with replicated disks: a checkpoint counts only with whole disks."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.compare.causes import Cause
from colo_xdp.controller import mirror_watch, secondary_disks
from colo_xdp.controller.checkpoint import Checkpoint, CheckpointFailed
from colo_xdp.controller.disk_proof import DiskProof
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.states import State
from colo_xdp.qemu.disks import DiskError
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.overlays import ReplicatedDisk, Room
from colo_xdp.qemu.qmp import QmpError, QmpTimeout
from tests.unit.controller.fakes import FakeQmp, beat, event, in_loop, primary, secondary


class Disks:
    """DiskReplication that says what it is told to, in one with its parts."""

    any = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.mirroring = False
        self.trouble, self.copied_now = "", True
        self.copying = "copying disks: 7 %"
        self.fails: list[Exception] = []  # of the next calls
        self.overlays_there = False
        self.still_whole = self.ended_whole = False
        self.lost = self.waits = ""
        self.sizes: dict[str, int] = {}
        self.room = Room("/", (), 0, 0, 0)
        self.block = self.mirrors = self.replica = self.files = self

    async def look(self) -> None:
        self._do("look")

    def silent(self) -> str:
        return self.waits

    async def give_up(self, why: str) -> None:
        self._do("give up")

    async def overlay_sizes(self) -> dict[str, int]:
        return self.sizes

    def rooms(self) -> list[Room]:
        return [self.room]

    async def adopt(self) -> None: ...

    def _do(self, what: str) -> None:
        self.said.append(what)
        if self.fails:
            raise self.fails.pop(0)

    async def whole(self) -> str:
        return self.trouble

    async def copied(self) -> bool:
        if self.trouble:
            raise DiskError(self.trouble)
        return self.copied_now

    async def start(self, theirs: Any) -> None:
        self.mirroring = True
        self._do("start")

    async def cut(self) -> None:
        self.mirroring = False
        self._do("cut")

    async def yank(self, timeout: float | None = None) -> None:
        self.said.append("yank")

    async def stop_serving(self, timeout: float | None = None) -> None:
        self._do("stop_serving")

    async def serve(self) -> dict[str, int]:
        self._do("serve")
        return {"d0": 1}

    async def committing(self) -> bool:
        return self.overlays_there

    async def remove_all(self) -> None:
        self.said.append("remove")

    def on_event(self, e: QmpEvent) -> str:
        return "disk d0 is no longer mirrored" if e.name == "BLOCK_JOB_ERROR" else ""


def a_secondary() -> tuple[Secondary, Any, Any, Disks]:
    c, dp, sent = secondary()
    c.qemu.qmp, c.qemu.disks = FakeQmp(), Disks()  # type: ignore[assignment]
    c.state, c.view.pair.in_colo, c.view.pair.confirmed = State.PROTECTED, True, True
    c.disks.proof.whole(dp.epoch)
    return c, dp, sent, c.qemu.disks  # type: ignore[return-value]


def a_primary(mode: Mode = Mode.RUN) -> tuple[Primary, Any, Any, Disks]:
    c, dp, sent = primary(mode)
    c.qemu.qmp, c.qemu.disks = FakeQmp(), Disks()  # type: ignore[assignment]
    return c, dp, sent, c.qemu.disks  # type: ignore[return-value]


def load(c: Secondary, n: int) -> None:
    c.on_message({"type": "begin", "n": n, "cause": "operator", "initial": False})
    now = time.monotonic_ns()
    c.on_qmp(event("STOP", now, now))
    c.on_qmp(event("RESUME", now + 1, now + 1))


def lost_peer(c: Secondary) -> None:
    c.view.peer_shut()


# ---- the secondary


@pytest.mark.parametrize("first", ["word", "resume"])
def test_a_checkpoint_is_reported_with_its_disks(first: str) -> None:
    c, dp, sent, _ = a_secondary()
    c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
    now = time.monotonic_ns()
    c.on_qmp(event("STOP", now, now))
    if first == "word":
        c.on_message({"type": "disks_whole", "n": 8})
        assert "resumed" not in sent.kinds() and not c.disk_unproven
    c.on_qmp(event("RESUME", now + 1, now + 1))
    assert dp.epoch == 8, "it runs that state, whatever its disks are"
    if first == "resume":
        assert "resumed" not in sent.kinds() and c.disk_unproven
        c.on_message({"type": "disks_whole", "n": 7})
        assert c.disk_unproven, "of another checkpoint"
        c.on_message({"type": "disks_whole", "n": 8})
        assert c.disks.proof_ms >= 0
    assert not c.disk_unproven and sent.kinds() == ["begin_ack", "resumed"]
    c.on_message({"type": "disks_whole", "n": 8})
    assert sent.kinds().count("resumed") == 1


def test_a_guest_without_disks_waits_for_no_disks_whole() -> None:
    c, _, sent, disks = a_secondary()
    disks.any = False
    load(c, 8)
    assert sent.kinds() == ["begin_ack", "resumed"] and not c.disk_unproven


def test_between_the_checkpoint_and_disks_whole_an_operator_decides() -> None:
    c, _, _, _ = a_secondary()
    load(c, 8)
    assert decide(c.facts()).action is not Action.TAKE_OVER, "the primary lives"
    lost_peer(c)
    d = decide(c.facts())
    assert d.action is Action.DEGRADE and "disks" in d.why
    c.view.ordered(forced=False, until_s=time.monotonic() + 60)
    assert decide(c.facts()).action is Action.DEGRADE, "as a cluster manager orders it"
    with pytest.raises(ValueError, match="--force"):
        asyncio.run(c.commands.failover({}))
    c.view.ordered(forced=True, until_s=time.monotonic() + 60)
    assert decide(c.facts()).action is Action.TAKE_OVER
    c.view.order_withdrawn()
    c.on_message({"type": "disks_whole", "n": 8})
    assert decide(c.facts()).action is Action.TAKE_OVER


def test_a_new_try_of_a_checkpoint_needs_a_new_disks_whole() -> None:
    p = DiskProof()
    p.begin(8)
    p.whole(8)
    assert p.said(8)
    p.begin(8)
    assert not p.said(8) and not p.missing, "nothing was loaded"
    p.loaded(8)
    assert p.missing
    p.whole(8)
    assert not p.missing
    p.begin(9)
    assert not p.missing, "the SVM runs 8, whose disks are whole"


@pytest.mark.parametrize("word", [False, True])
def test_a_controller_that_dies_between_checkpoint_and_disks_whole(word: bool) -> None:
    c, dp, _, _ = a_secondary()
    load(c, 8)
    if word:
        c.on_message({"type": "disks_whole", "n": 8})
    assert dp.disks_whole == 8 * word and dp.mode is Mode.RUN
    dp.adopted = True
    n = Secondary(c.config, dp)
    n.qemu.disks = Disks()  # type: ignore[assignment]
    assert n.disk_unproven != word
    n.on_message(beat("protected", role="primary", epoch=7))
    assert n.disk_unproven != word
    n.on_message(beat("protected", role="primary", epoch=8))
    assert not n.disk_unproven, "it has committed that checkpoint"


def test_the_next_controller_does_not_know_what_was_loaded() -> None:
    c, dp, _ = secondary(Mode.CHECKPOINT)
    c.qemu.disks = Disks()  # type: ignore[assignment]
    c.disks.proof.whole(dp.epoch)
    assert c.disk_unproven, "it may run the state after that"
    dp.epoch += 1
    assert not c.disk_unproven


def test_the_primary_tells_the_next_controller_what_was_loaded() -> None:
    """Also one that has handed over: it committed that checkpoint, and fell silent with it."""
    c, dp, _ = secondary(Mode.CHECKPOINT)
    c.qemu.disks = Disks()  # type: ignore[assignment]
    c.disks.proof.whole(dp.epoch)
    c.on_message(beat("stopped", role="primary", epoch=dp.epoch, shut=True))
    assert c.disk_unproven, "it may have died before the SVM loaded the next one"
    c.on_message(beat("stopped", role="primary", epoch=dp.epoch + 1, shut=True))
    assert not c.disk_unproven


@pytest.mark.parametrize("forced", [False, True])
def test_a_checkpoint_that_was_loaded_as_the_primary_died(forced: bool) -> None:
    """Its RESUME comes while QEMU leaves COLO."""

    async def body() -> None:
        c, dp, _, _disks = a_secondary()
        c.on_message({"type": "begin", "n": 8, "cause": "operator", "initial": False})
        real = c.qemu.qmp.lost_heartbeat

        async def lost_heartbeat(timeout: float | None = None) -> None:
            for name in ("STOP", "RESUME", "STOP", "RESUME"):
                c.on_qmp(event(name, 1, 1))
            await real(timeout)

        c.qemu.qmp.lost_heartbeat = lost_heartbeat  # type: ignore[method-assign]
        if forced:
            c.view.ordered(forced=True, until_s=time.monotonic() + 60)
        await c.takeover.run("the primary is gone")
        assert (c.state is State.PROMOTED) == forced
        assert (dp.mode is Mode.TAKEOVER) == forced
        if not forced:
            assert c.disk_unproven
            lost_peer(c)
            assert decide(c.facts()).action is Action.DEGRADE

    in_loop(body)


def test_the_images_are_closed_before_anything_else() -> None:
    async def body() -> None:
        c, _dp, _, disks = a_secondary()
        disks.overlays_there = True
        order: list[str] = []
        disks.said = order
        c.qemu.qmp.said = order  # type: ignore[attr-defined]
        await c.takeover.run("the primary is gone")
        assert c.state is State.PROMOTED and order.index("stop_serving") == 0
        assert "lost_heartbeat" in order
        await asyncio.sleep(0.01)
        assert c.takeover.committing and "remove" not in order
        disks.overlays_there = False
        while c.takeover.committing:
            await asyncio.sleep(0.01)
        assert "remove" in order
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


@pytest.mark.parametrize("error", [QmpError("no"), QmpTimeout("slow")])
def test_a_guest_whose_images_stay_open_is_not_promoted(error: Exception) -> None:
    """A primary that lives would write into them. A QEMU that hangs is freed first."""

    async def body() -> None:
        c, dp, _, disks = a_secondary()
        disks.fails = [error, QmpError("still not")]
        await c.takeover.run("the primary is gone")
        assert c.state is State.DEGRADED and dp.mode is not Mode.TAKEOVER
        assert "open to the primary" in c.reason
        assert c.qemu.qmp.colo, "not before"  # type: ignore[attr-defined]
        assert ("yank" in disks.said) == isinstance(error, QmpTimeout)
        disks.fails = []
        await c.takeover.run("again")
        assert c.state is State.PROMOTED

    in_loop(body)


@pytest.mark.parametrize(
    ("operation", "state", "lost"),
    [
        ("write", State.PROTECTED, True),
        ("read", State.PROTECTED, False),
        ("write", State.STARTING, False),
    ],
)
def test_a_copy_whose_disk_fails_is_no_copy(operation: str, state: State, lost: bool) -> None:
    c, _, _, _ = a_secondary()
    c.state = state
    c.reconsider = lambda: None  # type: ignore[method-assign]
    c.on_qmp(
        QmpEvent(
            "BLOCK_IO_ERROR", {"operation": operation, "action": "report", "device": "d0"}, 1, 1
        )
    )
    assert c.view.guest.gone == lost
    if lost:
        assert "disk d0" in c.view.guest.why


def test_full_overlays_are_emptied_by_a_checkpoint() -> None:
    p, _, _, _ = a_primary()
    p.state = State.PROTECTED
    p.on_message({"type": "request", "cause": "overlay_full", "why": "300 MiB"})
    assert p.checkpoints.wanted is not None
    assert p.checkpoints.wanted.cause == Cause.OVERLAY_FULL
    p.checkpoints.wanted = None
    p.on_message({"type": "request", "cause": "what the peer likes", "why": "x"})
    assert p.checkpoints.wanted.cause == Cause.GUEST_EVENT


# ---- the primary


def test_a_lost_mirror_is_a_lost_secondary() -> None:
    async def body() -> None:
        c, _, sent, _ = a_primary()
        c.state, c.peer.connected = State.PROTECTED, True
        c.peer.silent_ms = lambda: 0.0  # type: ignore[method-assign]
        c.on_qmp(QmpEvent("BLOCK_JOB_ERROR", {}, 1, 1))
        assert c.state is State.DEGRADED and "d0" in c.reason
        assert decide(c.facts()).action is Action.ASK_SHUT
        await asyncio.gather(*c._tasks)
        assert "demote" in sent.kinds()
        with pytest.raises(CheckpointFailed, match="d0"):
            await c.checkpoints._await(Checkpoint(8, "operator", 1), "x", time.monotonic() + 1)
        c.view.entering()
        assert not c.view.guest.copy_lost, "of the former secondary"

    in_loop(body)


@pytest.mark.parametrize("state", [State.STARTING, State.SOLO, State.STOPPED])
def test_a_mirror_that_nothing_depends_on_may_end(state: State) -> None:
    c, _, _, _ = a_primary()
    c.state = state
    c.on_qmp(QmpEvent("BLOCK_JOB_ERROR", {}, 1, 1))
    assert c.state is state and not c.view.guest.copy_lost


def test_no_checkpoint_is_asked_of_qemu_without_its_mirrors() -> None:
    """QEMU would empty the overlays of the secondary, and its disks would be old."""

    async def body() -> None:
        c, _, _, disks = a_primary()
        disks.trouble = "disk d0 is not mirrored"
        with pytest.raises(CheckpointFailed, match="not mirrored"):
            await c.checkpoints._trigger(Checkpoint(8, "operator", 1))
        assert c.qemu.qmp.said == []  # type: ignore[attr-defined]

    in_loop(body)


def test_disks_whole_follows_the_stop() -> None:
    async def body() -> None:
        c, _, sent, _disks = a_primary()
        ck = Checkpoint(8, "operator", 1)
        await c.checkpoints._prove_disks(ck)
        assert not sent, "the guest still writes"
        ck.stop_ns = 5
        await c.checkpoints._prove_disks(ck)
        await c.checkpoints._prove_disks(ck)
        assert sent.kinds() == ["disks_whole"] and sent[0]["n"] == 8
        ck.trigger(0)
        assert not ck.disks_whole, "another try"

    in_loop(body)


def test_disks_whole_does_not_wait_for_a_qemu_that_is_busy() -> None:
    async def body() -> None:
        c, _, sent, disks = a_primary()
        disks.still_whole = True

        async def whole() -> str:
            await asyncio.Event().wait()
            return ""

        disks.whole = whole  # type: ignore[method-assign]
        ck = Checkpoint(8, "operator", 1)
        ck.stop_ns = 5
        await c.checkpoints._prove_disks(ck)
        assert sent.kinds() == ["disks_whole"]

    in_loop(body)


@pytest.mark.parametrize("whole", [True, False])
def test_a_qemu_that_dies_before_it_answers(whole: bool) -> None:
    """A secondary that has the whole state of the checkpoint has whole disks, too."""

    async def body() -> None:
        c, _, sent, disks = a_primary()

        async def dies() -> str:
            disks.ended_whole = whole
            raise QmpError("PVM: query-block-jobs: Disconnected")

        disks.whole = dies  # type: ignore[method-assign]
        ck = Checkpoint(8, "operator", 1)
        ck.stop_ns = 5
        with pytest.raises(QmpError):
            await c.checkpoints._prove_disks(ck)
        assert sent.kinds() == ["disks_whole"] * whole

    in_loop(body)


def test_nothing_is_released_by_a_checkpoint_whose_disks_are_not_whole() -> None:
    async def body() -> None:
        c, dp, sent, disks = a_primary(Mode.CHECKPOINT)
        disks.trouble = "disk d0 is no longer mirrored"
        ck = Checkpoint(8, "operator", 1)
        ck.stop_ns, ck.resume_ns = 5, 6
        epoch = dp.epoch
        with pytest.raises(CheckpointFailed, match="d0"):
            await c.checkpoints._commit(ck, None)  # type: ignore[arg-type]
        assert dp.epoch == epoch and dp.mode is Mode.CHECKPOINT and not sent

    in_loop(body)


class Fit:
    async def unfit(self) -> str:
        return ""


def test_disks_are_copied_before_colo_is_entered() -> None:
    async def body() -> None:
        c, _, _, disks = a_primary(Mode.BYPASS)
        c.life, c.entry._c.state = Fit(), State.STARTING  # type: ignore[assignment]
        e = c.entry
        e.peer_qemu, disks.copied_now = (1, "s"), False
        assert not await e._copy_disks() and c.reason == "copying disks: 7 %"
        assert not await e._copy_disks() and disks.said == ["start"]
        disks.copied_now = True
        assert await e._copy_disks()
        e.peer_qemu = (2, "s")
        assert await e._copy_disks() and disks.said == ["start", "cut", "start"], "another QEMU"
        await e._drop_mirrors()
        assert disks.mirroring, "in COLO"
        c.qemu.qmp.colo = False  # type: ignore[attr-defined]
        await e._drop_mirrors()
        assert not disks.mirroring

    in_loop(body)


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_copy_that_fails_is_tried_again_at_its_price(when: str) -> None:
    async def body() -> None:
        c, _, _, disks = a_primary(Mode.BYPASS)
        c.life, c.state = Fit(), State.STARTING  # type: ignore[assignment]
        c.entry.peer_qemu = (1, "s")
        for _ in range(2):
            if when == "start":
                disks.fails = [DiskError("no room")]
            else:
                disks.trouble = "no room"
            assert not await c.entry._copy_disks()
            assert "no room" in c.reason and not disks.mirroring
        begun = disks.said.count("start")
        disks.fails, disks.trouble = [], ""
        assert not await c.entry._copy_disks() and "2 times in the same way" in c.reason
        assert disks.said.count("start") == begun, "not at once"
        c.entry.tries.forget()
        assert await c.entry._copy_disks()

    in_loop(body)


def test_leaving_colo_ends_the_mirrors_first() -> None:
    async def body() -> None:
        c, _, _, disks = a_primary()
        order: list[str] = []
        disks.said = order
        c.qemu.qmp.said = order  # type: ignore[attr-defined]
        await c.qemu.leave_colo()
        assert order == ["cut", "lost_heartbeat"]
        disks.fails = [QmpError("the mirrors do not end")]
        with pytest.raises(QmpError):
            await c.qemu.leave_colo()
        assert order[-1] == "cut", "it would drain a disk that waits for a dead host"

    in_loop(body)


def test_ready_carries_the_sizes_of_the_images() -> None:
    async def body() -> None:
        s, _, sent, disks = a_secondary()
        s.life, s.state = Fit(), State.STARTING  # type: ignore[assignment]
        await s.entry.send_ready()
        assert sent[-1]["type"] == "ready" and sent[-1]["disks"] == {"d0": 1}
        disks.fails = [DiskError("no room")]
        await s.entry.send_ready()
        assert sent[-1]["type"] == "failed" and "no room" in sent[-1]["why"]
        assert "no room" in s.reason

    in_loop(body)


# ---- silence


def test_a_silent_secondary_is_given_up() -> None:
    async def body() -> None:
        c, _, _, disks = a_primary()
        c.state, c.peer.connected, disks.mirroring = State.PROTECTED, True, True
        c.peer.silent_ms = lambda: 0.0  # type: ignore[method-assign]
        await c.mirrors.look()
        assert c.state is State.PROTECTED and disks.said == ["look"]
        disks.waits = "a write to disk d0 has waited"
        disks.fails = [QmpError("look: no answer")]
        await c.mirrors.look()
        assert disks.said == ["look", "look", "give up"]
        assert c.state is State.PROTECTED, "until QEMU reports the end of the mirror"

    in_loop(body)


def hear(c: Primary, silent_ms: float = 0.0) -> None:
    c.peer.connected = True
    c.peer.silent_ms = lambda: silent_ms  # type: ignore[method-assign]


def test_a_cut_link_is_no_silent_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP sends again by itself, up to as long after the cut as that has lasted."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(mirror_watch, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def body() -> None:
        c, _, _, disks = a_primary()
        c.state, disks.mirroring, disks.waits = State.PROTECTED, True, "silent"
        hear(c, 600.0)
        await c.mirrors.look()
        clock.now += 1.5
        c.peer.connected = False
        await c.mirrors.look()
        assert disks.said == []
        hear(c)
        await c.mirrors.look()
        clock.now += 1.9
        await c.mirrors.look()
        assert "give up" not in disks.said
        clock.now += 0.2
        await c.mirrors.look()
        assert disks.said[-1] == "give up"

    in_loop(body)


@pytest.mark.parametrize("why", ["no mirror", "lost before", "no QMP", "no peer"])
def test_nobody_looks_for_mirrors_that_are_not_there(why: str) -> None:
    async def body() -> None:
        c, _, _, disks = a_primary()
        disks.mirroring = why != "no mirror"
        disks.lost = "so it is" if why == "lost before" else ""
        c.qemu.qmp.connected = why != "no QMP"  # type: ignore[misc]
        hear(c)
        c.peer.connected = why != "no peer"
        await c.mirrors.look()
        assert disks.said == []
        disks.any = False
        await c.mirrors.run()  # ends

    in_loop(body)


def test_a_qemu_that_hangs_by_itself_is_no_fault_of_the_secondary() -> None:
    """Nor does its copy fall silent for that: it is the one to take over."""

    async def body() -> None:
        c, _, sent, disks = a_primary()
        c.state, disks.mirroring, disks.waits = State.PROTECTED, True, "silent"
        hear(c)
        disks.fails = [QmpTimeout("query-block-jobs"), QmpTimeout("query-yank: no answer")]
        await c.mirrors.look()
        assert c.state is State.PROTECTED and not c.view.guest.copy_lost and not sent

    in_loop(body)


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.PROTECTED])
def test_a_write_that_fell_silent_just_before_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """QEMU waits for it while it stops the guest, and answers nothing: it was never seen."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(mirror_watch, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def body() -> None:
        c, _, _, disks = a_primary()
        c.state, disks.mirroring = state, True
        hear(c)
        for _ in range(3):
            disks.fails = [QmpTimeout("query-block-jobs")]
            await c.mirrors.look()
            clock.now += 0.7
        assert "give up" not in disks.said
        disks.fails = [QmpTimeout("query-block-jobs")]
        await c.mirrors.look()
        assert ("give up" in disks.said) == (state is State.CHECKPOINTING)
        disks.said.clear()
        await c.mirrors.look()
        disks.fails = [QmpTimeout("query-block-jobs")]
        await c.mirrors.look()
        assert "give up" not in disks.said, "it has answered meanwhile"

    in_loop(body)


@pytest.mark.parametrize("covered", [True, False])
def test_a_disk_that_is_plugged_in_ends_the_protection(
    monkeypatch: pytest.MonkeyPatch, covered: bool
) -> None:
    monkeypatch.setattr("colo_xdp.controller.primary.PLUGGED_S", 0.001)

    async def body() -> None:
        c, _, _, _ = a_primary()
        c.state, c.peer.connected = State.PROTECTED, True
        c.peer.silent_ms = lambda: 0.0  # type: ignore[method-assign]
        blocks = [{"device": "", "qdev": "/machine/peripheral/vnew/virtio-backend",
                   "inserted": {"node-name": "new", "ro": covered, "file": "f"}}]  # fmt: skip
        c.qemu.qmp.execute = answers(blocks)  # type: ignore[method-assign]
        task = asyncio.ensure_future(c._watch_disks())
        await asyncio.sleep(0.02)
        assert (c.state is State.PROTECTED) == covered
        if not covered:
            assert "disk new" in c.view.guest.copy_lost
        for t in (task, *c._tasks):
            t.cancel()

    in_loop(body)


def answers(what: Any) -> Any:
    async def execute(command: str) -> Any:
        assert command == "query-block"
        return what

    return execute


# ---- room


async def looks(c: Secondary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the secondary look at its overlays once."""
    c.qemu.disks.options = SimpleNamespace(  # type: ignore[misc]
        disks=(ReplicatedDisk("d0", "/", 8 << 20),)
    )
    monkeypatch.setattr(secondary_disks, "OVERLAY_S", 0.001)
    monkeypatch.setattr(secondary_disks, "SHORT_S", 0.001)
    task = asyncio.ensure_future(c.disks.watch())
    await asyncio.sleep(0.02)
    task.cancel()


@pytest.mark.parametrize(
    ("size", "room", "asks"),
    [
        (1 << 20, Room("/o", ("d0",), 99 << 20, 1 << 20, 15 << 20), ""),
        (9 << 20, Room("/o", ("d0",), 99 << 20, 9 << 20, 7 << 20), "the overlay of disk d0 has 9"),
        (1 << 20, Room("/o", ("d0",), 3 << 20, 2 << 20, 14 << 20), ""),
        (2 << 20, Room("/o", ("d0",), 3 << 20, 4 << 20, 12 << 20), "/o has 3 MiB free"),
    ],
)
def test_overlays_that_run_out_of_room_are_emptied(
    monkeypatch: pytest.MonkeyPatch, size: int, room: Room, asks: str
) -> None:
    async def body() -> None:
        c, _, sent, disks = a_secondary()
        disks.sizes, disks.room = {"d0": size}, room
        await looks(c, monkeypatch)
        assert bool(sent) == bool(asks)
        if asks:
            assert sent[0]["cause"] == Cause.OVERLAY_FULL and asks in sent[0]["why"]
        if asks.startswith("/o") or not asks:
            assert c.disks.room_trouble == room.trouble
        sent.clear()
        c.state = State.DEGRADED
        await looks(c, monkeypatch)
        assert not sent

    in_loop(body)
