# SPDX-License-Identifier: GPL-2.0-or-later
"""An entry into COLO that fails: the PVM runs again, and what fails twice is not tried for ever."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.abi import Mode, SyncState
from colo_xdp.config.qemu import Disk
from colo_xdp.controller.checkpoint import Checkpoint, CheckpointFailed
from colo_xdp.controller.colo_entry import BACKOFF_FREE_S, BACKOFF_S, Tries
from colo_xdp.failover.states import State
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.hardware import encode
from colo_xdp.qemu.migration import MigrationOptions
from colo_xdp.qemu.nic import Card
from colo_xdp.qemu.qmp import QmpError
from tests.unit.controller.fakes import in_loop, primary, secondary, undecided
from tests.unit.controller.test_guest_lifecycle import OFF, says

DISK = {"device": "d0", "inserted": {"ro": False, "file": "/a.qcow2", "node-name": "n0"}}


class Qemu:
    """A PVM's QEMU after an entry that has gone wrong."""

    def __init__(self, status: str, migration: str, *, hangs: bool = False) -> None:
        self.connected, self.said = True, []  # type: tuple[bool, list[str]]
        self.now, self.migration, self.hangs = status, migration, hangs
        self.blocks: list[Any] = []
        self.name = "PVM"

    async def status(self, timeout: float | None = None) -> str:
        return self.now

    async def migration_status(self, timeout: float | None = None) -> str:
        return self.migration

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        self.said.append("x-colo-lost-heartbeat")
        self.migration = "completed"

    async def yank(self, timeout: float | None = None) -> None:
        self.said.append("yank")
        self.migration = "failed"

    async def cards(self) -> list[Card]:
        return []

    async def hardware(self) -> dict[str, str]:
        return {"vCPUs": "1"}

    async def prepare(self, *, primary: bool, migration: MigrationOptions) -> None:
        self.said.append("prepare")

    async def migration_trouble(self, options: MigrationOptions, *, primary: bool) -> str:
        return "no such credentials" if options.tls_creds else ""

    async def migrate(self, uri: str) -> None:
        self.said.append("migrate")

    async def execute(self, command: str) -> Any:
        if command == "query-block":
            return self.blocks
        if command == "query-migrate":
            return {"status": self.migration}
        refused = self.now == "finish-migrate" and self.migration in ("colo", "cancelling")
        if command == "cont" and refused:
            raise QmpError("Migration is not finalized yet")
        self.said.append(command)
        if command == "migrate_cancel":
            self.migration = "cancelling" if self.hangs else "cancelled"
        if command == "cont":
            self.now = "running"
        return {}


@pytest.mark.parametrize(
    ("status", "migration", "hangs", "said"),
    [
        ("postmigrate", "completed", False, ["cont"]),
        ("finish-migrate", "colo", False, ["x-colo-lost-heartbeat", "cont"]),
        ("finish-migrate", "pre-switchover", False, ["migrate_cancel", "cont"]),
        ("finish-migrate", "device", True, ["migrate_cancel", "yank", "cont"]),
        ("paused", "failed", False, ["cont"]),
        ("paused", "", False, ["cont"]),
        ("running", "active", False, ["migrate_cancel"]),
        ("prelaunch", "failed", False, []),  # started with -S
    ],
)
def test_the_pvm_runs_however_an_entry_ends(
    status: str, migration: str, hangs: bool, said: list[str]
) -> None:
    async def body() -> None:
        c, dp, sent = primary(Mode.CHECKPOINT)
        c.state, c.qemu.qmp = State.CHECKPOINTING, Qemu(status, migration, hangs=hangs)  # type: ignore[assignment]
        began = time.monotonic()
        await c.entry._failed("of a reason")
        assert time.monotonic() - began < 1
        assert c.qemu.qmp.now in ("running", "prelaunch")  # type: ignore[attr-defined]
        assert c.qemu.qmp.said == said  # type: ignore[attr-defined]
        assert c.state is State.STARTING and dp.mode is Mode.BYPASS and "of a reason" in c.reason
        assert sent.kinds() == ["failed"], "the secondary's QEMU may be of no use any more"

    in_loop(body)


def test_a_pvm_that_does_not_run_again_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colo_xdp.controller.colo_entry.YANK_S", 1e9)

    async def body() -> None:
        c, _, _ = primary(Mode.CHECKPOINT)
        c.state = State.CHECKPOINTING
        q = Qemu("finish-migrate", "cancelling")
        c.qemu.qmp = q  # type: ignore[assignment]
        task = asyncio.ensure_future(c.entry._failed("of a reason"))
        end = time.monotonic() + 5
        while "stands still" not in c.reason and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert "of a reason" in c.reason and "stands still (finish-migrate)" in c.reason
        assert c.state is State.STARTING
        q.migration = "cancelled"
        await task
        assert q.now == "running"

    in_loop(body)


@pytest.mark.parametrize(
    ("migration", "says"),
    [
        ("completed", "`completed`, which does not lead to COLO"),
        ("pre-switchover", "`pre-switchover`"),
        ("postcopy-active", "`postcopy-active`"),
        ("failed", "`failed`"),
    ],
)
def test_a_migration_that_leads_elsewhere_ends_the_entry(migration: str, says: str) -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.qemu.qmp = Qemu("paused", migration)  # type: ignore[assignment]
        with pytest.raises(CheckpointFailed, match=says):
            await c.entry.watch(Checkpoint(1, "initial", time.monotonic_ns()))

    in_loop(body)


def test_a_pvm_stands_still_for_an_entry_for_enter_stop_at_most() -> None:
    """Whatever enter_timeout is."""

    async def body() -> None:
        c, _, _ = primary()
        c.qemu.qmp = Qemu("finish-migrate", "active")  # type: ignore[assignment]
        limit = c.config.qemu.enter_stop * 1_000_000
        ck = Checkpoint(1, "initial", time.monotonic_ns())
        await c.entry.watch(ck)
        ck.stop_ns = time.monotonic_ns() - limit // 2
        await c.entry.watch(ck)
        ck.stop_ns = time.monotonic_ns() - limit - 2_000_000
        with pytest.raises(CheckpointFailed, match="enter_stop, in `finish-migrate`"):
            await c.entry.watch(ck)
        ck.resume_ns = time.monotonic_ns()
        await c.entry.watch(ck)

    in_loop(body)


def test_a_long_entry_does_not_delay_the_next_checkpoint() -> None:
    """It holds nothing for most of its time."""

    async def body() -> None:
        c, dp, _ = primary(Mode.BYPASS)
        dp.epoch, c.state = 0, State.STARTING
        q = Qemu("running", "colo")
        c.qemu.qmp = q  # type: ignore[assignment]

        async def migrate(uri: str) -> None:
            now = time.monotonic_ns()
            for name in ("STOP", "RESUME"):
                c.on_qmp(QmpEvent(name, {}, now, now))

        q.migrate = migrate  # type: ignore[attr-defined]

        def send(kind: str, **f: Any) -> bool:
            answers = {
                "begin": [("begin_ack", {"n": 1}), ("resumed", {"n": 1})],
                "offsets": [("offsets_ack", f)],
            }
            for answer, fields in answers.get(kind, []):
                c.on_message({"type": answer, **fields})
            return True

        c.peer = SimpleNamespace(connected=True, send=send, ending="")  # type: ignore[assignment]
        c.beat = lambda: None  # type: ignore[method-assign]
        began = time.monotonic_ns()
        real = c.checkpoints.pacer.took
        c.checkpoints.pacer.took = lambda b, e: real(began - 60_000_000_000, e)  # type: ignore[method-assign]
        await c.entry._enter()
        assert c.state is State.PROTECTED
        now = time.monotonic_ns()
        assert c.checkpoints.pacer.begin_ns(now) == now

    in_loop(body)


def test_the_same_failure_twice_is_a_reason_to_stop() -> None:
    t, one, two = Tries(), (1, "s"), (2, "s")
    t.failed("the migration is `completed` after 12 ms", one, 100.0, stopped=True)
    assert not t.held_back(one, 100.0) and "times" not in t.story and "after 12" in t.story
    t.failed("the migration is `completed` after 15 ms", one, 101.0, stopped=True)
    assert "after 12 ms" in t.held_back(one, 1e9), "the first cause; for ever with this QEMU"
    assert t.held_back(two, 101.0 + BACKOFF_S[0] - 0.1)
    assert not t.held_back(two, 101.0 + BACKOFF_S[0])
    for n in range(20):
        t.failed("the migration is `completed` after 9 ms", two, 200.0, stopped=True)
        assert not t.held_back((3 + n, "s"), 200.0 + BACKOFF_S[1])
    assert t.held_back((99, "s"), 200.0 + BACKOFF_S[1] - 1) and t.count == 22
    t.failed("something else", two, 300.0, stopped=True)
    assert not t.held_back(two, 300.0)
    t.failed("something else", two, 300.0, stopped=True)
    t.forget()
    assert not t.held_back(two, 300.0) and not t.story


def test_what_costs_the_guest_nothing_is_tried_again_by_itself() -> None:
    t, one = Tries(), (1, "s")
    for _ in range(12):
        t.failed("connection refused", one, 100.0, stopped=False)
    assert t.held_back(one, 100.0 + BACKOFF_FREE_S - 1)
    assert not t.held_back(one, 100.0 + BACKOFF_FREE_S)
    assert not t.held_back((2, "s"), 100.0), "another QEMU"


def test_a_person_asks_again() -> None:
    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        for _ in range(2):
            c.entry.tries.failed("x", (1, "s"), time.monotonic(), stopped=True)
        assert c.entry.tries.held_back((1, "s"), time.monotonic())
        await c.commands.run("mode", {"mode": "protected"})
        assert not c.entry.tries.held_back((1, "s"), time.monotonic())

    in_loop(body)


@pytest.mark.parametrize("declared", [True, False])
def test_neither_side_is_one_of_a_pair_with_a_disk_of_its_own(declared: bool) -> None:
    async def body() -> None:
        for make in (primary, secondary):
            c, _, _ = make()  # type: ignore[operator]
            q = Qemu("inmigrate", "")
            q.blocks = [DISK]
            c.qemu.qmp = q
            if declared:
                object.__setattr__(c.config, "disks", (Disk(name="d0", external=True),))
            why = await c.life.unfit()
            assert ("disk d0 (node n0), file /a.qcow2, is writable" in why) != declared

    in_loop(body)


@pytest.mark.parametrize("disk", [True, False])
def test_a_secondary_says_ready_only_if_it_is(disk: bool) -> None:
    async def body() -> None:
        c, _, sent = secondary(Mode.DROP, adopted=False)
        q = Qemu("inmigrate", "")
        q.blocks = [DISK] * disk
        c.qemu.qmp = q  # type: ignore[assignment]
        await c.on_qemu()
        assert sent.kinds() == (["failed"] if disk else ["ready"])
        assert ("is writable" in c.reason) == disk
        if disk:
            p, _, _ = primary(Mode.BYPASS)
            p.state = State.STARTING
            p.on_message(sent[0])
            assert "is writable" in p.entry.peer_lacks
        else:
            assert sent[0]["qemu"] == 1

    in_loop(body)


def test_credentials_that_are_missing_keep_either_side_from_entering() -> None:
    async def body() -> None:
        for make, status in ((primary, "running"), (secondary, "inmigrate")):
            c, _, sent = make(Mode.DROP, adopted=False)  # type: ignore[operator]
            c.qemu.options = replace(c.qemu.options, migration=MigrationOptions(tls_creds="c"))
            c.qemu.qmp = Qemu(status, "")
            assert await c.life.unfit() == "COLO is not entered: no such credentials"
        await c.on_qemu()
        assert sent.kinds() == ["failed"] and "no such credentials" in c.reason

    in_loop(body)


@pytest.mark.parametrize("there", [True, False])
def test_further_channels_on_one_side_are_refused_by_name(there: bool) -> None:
    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.qemu.qmp = Qemu("running", "")  # type: ignore[assignment]
        c.qemu.options = replace(c.qemu.options, migration=MigrationOptions(multifd=4))
        c.state = State.STARTING
        s, _, sent = secondary(Mode.DROP, adopted=False)
        s.qemu.qmp = Qemu("inmigrate", "")  # type: ignore[assignment]
        if there:
            s.qemu.options = replace(s.qemu.options, migration=MigrationOptions(multifd=4))
        await s.on_qemu()
        c.on_message(sent[0])
        assert await c.entry._alike() == there
        assert ("[migration] multifd: 4 here, none there" in c.reason) != there

    in_loop(body)


def test_machines_that_differ_are_no_pair() -> None:
    """The difference is named before anything is changed."""

    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.qemu.qmp = Qemu("running", "")  # type: ignore[assignment]
        c.state = State.STARTING
        for theirs, text in (
            (encode({"vCPUs": "2"}), "vCPUs: 1 here, 2 there"),
            ("no report", "the secondary's report"),
        ):
            c.on_message(
                {
                    "type": "ready",
                    "epoch": 0,
                    "qemu": 1,
                    "disks": {},
                    "hardware": theirs,
                    "nics": {"net0": 0},
                }
            )
            assert not await c.entry._alike() and text in c.reason
        c.on_message(
            {
                "type": "ready",
                "epoch": 0,
                "qemu": 2,
                "disks": {},
                "hardware": encode({"vCPUs": "1"}),
                "nics": {"net0": 0},
            }
        )
        assert await c.entry._alike() and not c.qemu.qmp.said  # type: ignore[attr-defined]

    in_loop(body)


@pytest.mark.parametrize(("status", "begun"), [("inmigrate", True), ("running", False)])
def test_an_entry_begins_with_a_look(status: str, begun: bool) -> None:
    """Capabilities that another tool has set since are set back."""

    async def body() -> None:
        c, dp, sent = secondary(Mode.DROP, adopted=False)
        dp.epoch, c.qemu.qmp = 0, Qemu(status, "")  # type: ignore[assignment]
        c.on_message({"type": "begin", "n": 1, "cause": "initial", "initial": True})
        await asyncio.gather(*c._tasks)
        assert sent.kinds() == (["begin_ack"] if begun else ["failed"])
        assert ("prepare" in c.qemu.qmp.said) == begun  # type: ignore[attr-defined]
        assert dp.mode is (Mode.CHECKPOINT if begun else Mode.DROP)

    in_loop(body)


@pytest.mark.parametrize(
    ("status", "migration", "state"),
    [("inmigrate", "", State.STARTING), ("running", "completed", State.STOPPED)],
)
def test_a_secondary_learns_that_the_entry_was_given_up(
    status: str, migration: str, state: State
) -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.DROP, adopted=False)
        dp.epoch = 0
        c.replacement.begin = lambda: None  # type: ignore[method-assign]
        c.qemu.qmp = Qemu("inmigrate", "")  # type: ignore[assignment]
        c._on_begin(1, initial=True, planned=False, asked=True)
        c.qemu.qmp = Qemu(status, migration)  # type: ignore[assignment]
        c.on_message({"type": "failed", "n": 1, "why": "it stood still"})
        await asyncio.gather(*c._tasks)
        assert c.state is state and dp.mode is Mode.DROP and not c.held.count
        assert "given up entering COLO: it stood still" in c.reason

    in_loop(body)


@pytest.mark.parametrize(
    ("role", "state", "confirmed", "over"),
    [
        ("primary", "starting", False, True),
        ("primary", "solo", False, True),  # its controller too is another one by now
        ("primary", "checkpointing", False, False),
        ("primary", "starting", True, False),
        ("secondary", "starting", False, False),
    ],
)
def test_a_secondary_that_has_not_heard_of_the_end_of_an_entry_concludes_it(
    role: str, state: str, confirmed: bool, over: bool
) -> None:
    """Its controller was dead meanwhile. The SVM is left in COLO, which never goes on."""

    async def body() -> None:
        c, dp, _ = secondary(Mode.CHECKPOINT)
        c.state, c.view.pair.confirmed = State.STARTING, confirmed
        assert c.held.hold is not None and c.view.pair.in_colo
        c.replacement.begin = lambda: None  # type: ignore[method-assign]
        c.qemu.qmp = Qemu("running", "colo")  # type: ignore[assignment]
        c.on_message(
            {"type": "heartbeat", "role": role, "state": state, "epoch": 7, "shut": False,
             "standalone": False}
        )  # fmt: skip
        await asyncio.gather(*c._tasks)
        assert (c.state is State.STOPPED) == over and (c.held.hold is None) == over
        assert (dp.mode is Mode.DROP) == over
        if over:
            assert "is not entering it any more" in c.reason

    in_loop(body)


@pytest.mark.parametrize(
    ("migration", "announced", "over"),
    [("colo", False, True), ("active", False, False), ("", False, False), ("colo", True, False)],
)
def test_an_svm_that_an_unknown_entry_has_left_in_colo_is_replaced(
    migration: str, announced: bool, over: bool
) -> None:
    """One that merely runs was started by somebody, without -incoming: it is left alone."""

    async def body() -> None:
        c, dp, _ = secondary(Mode.DROP, adopted=False)
        c.state, c.entry.wanted = State.STARTING, announced
        c.replacement.begin = lambda: None  # type: ignore[method-assign]
        c.qemu.qmp = Qemu("running", migration)  # type: ignore[assignment]
        c.on_message(
            {"type": "heartbeat", "role": "primary", "state": "starting", "epoch": 7,
             "shut": False, "standalone": False}
        )  # fmt: skip
        await asyncio.gather(*c._tasks)
        assert (c.state is State.STOPPED) == over and dp.mode is Mode.DROP

    in_loop(body)


def test_a_secondary_whose_qemu_dies_while_entering_says_so() -> None:
    async def body() -> None:
        c, dp, sent = secondary(Mode.DROP, adopted=False)
        dp.epoch = 0
        c.qemu._tap_alive = lambda: False
        c.qemu.qmp = Qemu("inmigrate", "")  # type: ignore[assignment]
        c._on_begin(1, initial=True, planned=False, asked=True)
        assert c.reason == "checkpoint to epoch 1"

        async def connect() -> None:
            raise asyncio.CancelledError

        c.qemu._new_qmp = lambda: SimpleNamespace(connect=connect, connected=False)  # type: ignore[assignment,method-assign,return-value]
        with pytest.raises(asyncio.CancelledError):
            await c.qemu._after_loss()
        assert sent[-1] == {"type": "failed", "n": 1, "why": "the SVM's QEMU is gone"}
        assert "waiting for another one" in c.reason and c.state is State.STARTING
        assert dp.mode is Mode.DROP

    in_loop(body)


def test_a_guest_that_is_off_is_not_let_out_by_the_entry_that_ends_with_it() -> None:
    """It shuts itself down while it is copied for the first time, and then QMP closes."""

    async def body() -> None:
        c, dp, _ = primary(Mode.BYPASS)
        q = c.qemu.qmp = Qemu("running", "active")  # type: ignore[assignment]
        c.peer.connected = c.entry.peer_ready = True
        c.entry.peer_hardware = encode({"vCPUs": "1"})
        c.entry.peer_nics = {"net0": 0}
        c.checkpoints._serving = c.spawn(c.checkpoints._serve())
        while "migrate" not in q.said:
            if c.checkpoints.running is not None and not c.checkpoints.running.begun:
                c.checkpoints.running.begun = True
                c.checkpoints.running.changed.set()
            await asyncio.sleep(0.005)
        says(c, "SHUTDOWN", **OFF)
        assert c._busy is not None
        await c._busy
        q.connected = False
        if c.checkpoints.running is not None:
            c.checkpoints.running.changed.set()
        await asyncio.wait({c.checkpoints._serving}, timeout=0.5)
        assert (c.state, dp.mode) == (State.STOPPED, Mode.DROP)
        assert c.checkpoints._serving.done()

    in_loop(body)


def test_a_pair_of_which_nothing_is_known_is_no_pair_before_it_has_been_decided() -> None:
    """QEMU is in COLO, but a checkpoint is not what lets its guest transmit."""

    async def body() -> None:
        c, dp, _ = undecided()
        c.qemu.qmp = Qemu("running", "colo")  # type: ignore[assignment]
        task = asyncio.ensure_future(c.entry.until_entered())
        await asyncio.wait({task}, timeout=0.05)
        assert not task.done() and c.checkpoints.wanted is None
        c._open("a word")
        await asyncio.wait({task}, timeout=1)
        assert task.done() and task.result() and dp.mode is Mode.BYPASS

    in_loop(body)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_entry_that_a_former_controller_began_stops_the_pvm_for_enter_stop_at_most(
    loaded: bool,
) -> None:
    """QEMU is in COLO, and waits for the SVM's QEMU to report that it has the state."""

    async def body() -> None:
        c, dp, sent = primary(Mode.CHECKPOINT, adopted=True)
        c.config = replace(c.config, qemu=replace(c.config.qemu, enter_stop=200))
        c.view.guest.standalone, c.peer.connected = True, True  # no checkpoint has counted
        q = c.qemu.qmp = Qemu("finish-migrate", "colo")  # type: ignore[assignment]
        task = asyncio.ensure_future(c.entry.until_entered())
        await asyncio.wait({task}, timeout=0.1)
        assert not task.done() and not q.said and "stands still" in c.reason
        if loaded:
            q.now = "running"
            assert await asyncio.wait_for(task, 1), "a checkpoint makes the pair equal"
            assert dp.mode is Mode.CHECKPOINT and not q.said
            return
        end = time.monotonic() + 2
        while q.now != "running" and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert q.said == ["x-colo-lost-heartbeat", "cont"] and dp.mode is Mode.BYPASS
        assert c.state is State.STARTING and "failed" in sent.kinds() and not task.done()
        task.cancel()

    in_loop(body)


@pytest.mark.parametrize("answer", ["failed", ""])
def test_an_entry_whose_checkpoint_counts_is_no_entry_that_failed(answer: str) -> None:
    """The secondary may take over from now on: nothing leaves uncompared before it is silent."""

    async def body() -> None:
        c, dp, sent = primary(Mode.BYPASS)
        c.view.guest.standalone, c.peer.connected, c.entry.peer_ready = True, True, True
        c.entry.peer_hardware = encode({"vCPUs": "1"})
        c.entry.peer_nics = {"net0": 0}
        q = c.qemu.qmp = Qemu("running", "")  # type: ignore[assignment]

        async def checkpoint(want: Any) -> None:
            c.view.guest.standalone, dp.sync_state, dp.mode = False, SyncState.IN_SYNC, Mode.RUN
            c.become(State.CHECKPOINTING, "entering COLO")
            c.become(State.PROTECTED, "both guests are equal")
            q.migration = answer

        async def migration() -> str:
            if dp.mode is Mode.RUN and not answer:
                raise QmpError("no answer")
            return q.migration

        c.checkpoints.make, q.migration_status = checkpoint, migration  # type: ignore
        await asyncio.wait_for(c.entry.until_entered(), 5)
        assert dp.mode is Mode.RUN and c.state is State.DEGRADED
        c.reconsider()
        assert c._busy is not None
        await c._busy
        assert "demote" in sent.kinds() and dp.mode is Mode.RUN, "it is asked to shut its guest in"

    in_loop(body)
