# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU is looked after by what depends on it, and by nothing else that is known of the pair."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.failover.states import State
from colo_xdp.qemu import supervisor
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.qmp import QmpError, QmpRefused
from colo_xdp.qemu.supervisor import QemuOptions, QemuSupervisor, Stakes
from tests.unit.controller.fakes import in_loop, primary, secondary

OPTIONS = QemuOptions(
    pair="web1", name="PVM", qmp="/nowhere", qmp_oob="", timeout_s=1, taps={"tap0": ""},
    incoming=(),
)  # fmt: skip


class Owner:
    """Remembers what it is told."""

    def __init__(self, stakes: Stakes) -> None:
        self.stakes, self.said = stakes, []  # type: tuple[Stakes, list[str]]
        self.needs_copy = False

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.ensure_future(coro)

    def on_qmp_event(self, event: QmpEvent) -> None:
        self.said.append(event.name)

    async def on_qemu(self) -> None:
        self.said.append("connected")

    def on_qemu_found(self, *, there: bool) -> None:
        self.said.append("found" if there else "absent")

    def on_qemu_refused(self, why: str) -> None:
        self.said.append("refused")

    def on_qemu_trouble(self, trouble: str) -> None:
        self.said.append(trouble or "no trouble")

    def on_qemu_gone(self) -> None:
        self.said.append("waits")

    def on_guest_gone(self, *, hung: bool = False) -> None:
        self.said.append("hung" if hung else "dead")

    def reconsider(self) -> None:
        self.said.append("reconsiders")


class Nobody:
    """No QEMU answers at this socket; after some tries the test ends."""

    connected, name = False, "PVM"

    def __init__(self, *args: Any) -> None:
        self.tries = 0

    async def connect(self) -> None:
        self.tries += 1
        if self.tries > 2:
            raise asyncio.CancelledError
        raise QmpError("nobody is there")


@pytest.mark.parametrize(
    ("stakes", "alive", "said"),
    [
        (Stakes.NOTHING_YET, False, ["waits", "absent", "absent"]),
        (Stakes.GUEST, False, ["dead"]),
        (Stakes.WATCHED, False, ["dead"]),
        (Stakes.GUEST, True, ["dead"]),  # no word from anybody
    ],
)
def test_what_a_lost_connection_means_is_a_matter_of_what_depends_on_it(
    stakes: Stakes, alive: bool, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "Qmp", Nobody)
    monkeypatch.setattr(supervisor, "QMP_RETRY_S", 0.001)
    monkeypatch.setattr(supervisor, "DEATH_S", 0.02 if alive else 5.0)

    async def body() -> None:
        owner = Owner(stakes)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: alive, is_at=lambda nic, *macs: None)
        if alive:

            async def refused(self: Any) -> None:
                raise QmpError("nobody is there")

            monkeypatch.setattr(Nobody, "connect", refused)
        task = asyncio.ensure_future(q._after_loss())
        await asyncio.wait({task})
        assert owner.said == said

    in_loop(body)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_controller_that_is_being_stopped_decides_nothing(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks are cancelled, also the one that looks after a lost connection."""
    monkeypatch.setattr(supervisor, "Qmp", Nobody)
    tasks: list[asyncio.Task[Any]] = []

    async def body() -> None:
        owner = Owner(Stakes.GUEST)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: False, is_at=lambda nic, *macs: None)

        def spawn(coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
            tasks.append(asyncio.ensure_future(coro))
            return tasks[-1]

        owner.spawn = spawn  # type: ignore[method-assign]
        q._on_closed("closed")
        if stopped:
            tasks[0].cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(0)
        assert owner.said == ([] if stopped else ["dead", "reconsiders"])

    in_loop(body)


@pytest.mark.parametrize("held", [False, True])
def test_a_copy_that_died_in_the_entry_is_started_again(
    held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs where the copy is missing, and where nothing holds the tap any more."""
    monkeypatch.setattr(supervisor, "Qmp", Nobody)
    monkeypatch.setattr(supervisor, "QMP_RETRY_S", 0.001)
    monkeypatch.setattr(supervisor, "INCOMING_S", 0.02)
    runs: list[float] = []

    async def body() -> None:
        owner = Owner(Stakes.NOTHING_YET)
        q = QemuSupervisor(
            replace(OPTIONS, incoming=("qemu",)), owner, tap_alive=lambda: held,
            is_at=lambda nic, *macs: None,
        )  # fmt: skip
        loop = asyncio.get_running_loop()

        async def start() -> None:
            runs.append(loop.time())

        q.start_incoming = start  # type: ignore[method-assign]
        end = loop.time() + 5

        async def refused(self: Any) -> None:
            owner.needs_copy = loop.time() > end - 4.95
            if len(runs) == 2 or loop.time() > (end - 4.8 if held else end):
                raise asyncio.CancelledError
            raise QmpError("nobody is there")

        monkeypatch.setattr(Nobody, "connect", refused)
        await asyncio.wait({asyncio.ensure_future(q.connect())})
        assert len(runs) == (0 if held else 2)
        if runs:
            assert runs[0] >= end - 4.95 and runs[1] - runs[0] >= 0.02

    in_loop(body)


def test_a_secondary_needs_a_copy_while_the_other_guest_serves_alone() -> None:
    c, _, _ = secondary(adopted=False)
    c.state, c.peer.connected = State.STARTING, True
    assert not c.needs_copy, "nothing is known of the other guest"
    c.view.peer.role, c.view.peer.state = "primary", State.SOLO.value
    assert not c.needs_copy, "none was here yet: whoever sets the host up starts it"
    c.entry.qemus = 1
    assert c.needs_copy
    c.state = State.PROTECTED
    assert not c.needs_copy
    c.state, c.peer.connected = State.STARTING, False
    assert not c.needs_copy
    p, _, _ = primary()
    assert not p.needs_copy, "its guest is nobody's copy"


def test_where_the_next_one_is_looked_for_elsewhere_a_lost_connection_means_nothing() -> None:
    async def body() -> None:
        owner = Owner(Stakes.OVER)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: False, is_at=lambda nic, *macs: None)
        q._on_closed("closed")
        await asyncio.sleep(0)
        assert owner.said == []

    in_loop(body)


class Answers(Nobody):
    """Is connected, and gives these answers to query-status; then the test ends."""

    connected = True

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)

    async def status(self, timeout: float | None = None) -> str:
        if not self.answers:
            raise asyncio.CancelledError
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


REFUSED = QmpRefused("PVM: query-status: GenericError: client\x1b[2J\nsocket is closed")
TROUBLE = (
    "QEMU answers with errors, so nothing can be asked of it: PVM: query-status: GenericError: "
    "client\N{REPLACEMENT CHARACTER}[2J socket is closed"
)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((REFUSED, REFUSED, "running", REFUSED, REFUSED), []),  # nothing that lasts
        ((REFUSED,) * 9, [TROUBLE]),
        ((*(REFUSED,) * 3, QmpRefused("another text each time")), [TROUBLE]),
        ((*(REFUSED,) * 4, "running", *(REFUSED,) * 3), [TROUBLE, "no trouble", TROUBLE]),
        # something else, with signs of its own
        ((QmpError("PVM: query-status: not connected"),) * 9, []),
    ],
)
def test_a_qemu_that_answers_with_errors_only_is_noticed(
    answers: tuple[str | Exception, ...], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay whose other end is gone: everything looks well, and nothing can be done."""
    monkeypatch.setattr(supervisor, "WATCH_S", 0.0)
    monkeypatch.setattr(supervisor, "WATCH_LESS_S", 0.0)

    async def body() -> None:
        owner = Owner(Stakes.WATCHED)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: True, is_at=lambda nic, *macs: None)
        q.qmp = Answers(*answers)  # type: ignore[assignment]
        await asyncio.wait({asyncio.ensure_future(q.watch())})
        assert owner.said == said, "and nobody was given up"
        assert q.trouble == (TROUBLE if said and said[-1] == TROUBLE else "")

    in_loop(body)


def test_it_is_asked_on_until_it_answers_well_again_or_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_S", 0.0)
    monkeypatch.setattr(supervisor, "WATCH_LESS_S", 0.0)

    async def body() -> None:
        owner = Owner(Stakes.WATCHED)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: True, is_at=lambda nic, *macs: None)

        def trouble(text: str) -> None:
            # as when a checkpoint fails because of it
            owner.stakes = Stakes.GUEST if text else Stakes.WATCHED

        owner.on_qemu_trouble = trouble  # type: ignore[method-assign]
        for again in (True, False):
            q.qmp = Answers(*(REFUSED,) * 3, *("running",) * again)  # type: ignore[assignment]
            await asyncio.wait({asyncio.ensure_future(q.watch())})
            assert bool(q.trouble) is not again
        owner.stakes = Stakes.OVER
        q._on_closed("closed")
        assert not q.trouble

    in_loop(body)


def test_a_socket_that_refuses_everything_from_the_start_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "QMP_RETRY_S", 0.001)
    answers: list[Exception] = [REFUSED] * 5 + [QmpError("nobody is there")]

    async def body() -> None:
        owner = Owner(Stakes.NOTHING_YET)
        q = QemuSupervisor(OPTIONS, owner, tap_alive=lambda: True, is_at=lambda nic, *macs: None)

        async def connect() -> None:
            raise answers.pop(0) if answers else asyncio.CancelledError

        q.qmp.connect = connect  # type: ignore[method-assign,assignment]
        await asyncio.wait({asyncio.ensure_future(q.connect())})
        assert [s for s in owner.said if s != "found"] == [TROUBLE, "no trouble"]

    in_loop(body)


def test_the_stakes_of_each_state() -> None:
    c, _, _ = primary()
    for state in State:
        c.state = state
        stakes = {
            State.STARTING: Stakes.NOTHING_YET,
            State.STOPPED: Stakes.OVER,
            State.PROTECTED: Stakes.WATCHED,
        }.get(state, Stakes.GUEST)
        assert c.stakes is stakes


def test_it_knows_neither_the_configuration_nor_the_data_path() -> None:
    tree = ast.parse(Path(supervisor.__file__).read_text())
    ours = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert not {m for m in ours if m} & {"config", "datapath", "failover", "pair_view", "node"}
