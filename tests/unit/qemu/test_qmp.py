# SPDX-License-Identifier: GPL-2.0-or-later
"""The QMP adapter against a fake QEMU on a real socket: deadlines, refusals, events, death."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.qmp import QemuInfo, Qmp, QmpError, QmpRefused, refusal
from colo_xdp.qemu.survey import probe

MACHINE = "pc-i440fx-7.2-machine"
VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}


class FakeQemu:
    """Answers commands from a table; a missing answer is silence."""

    def __init__(self, path: Path, answers: dict[str, Any] | None = None) -> None:
        self.path = path
        self.said: list[str] = []
        self.args: dict[str, Any] = {}
        self.writer: asyncio.StreamWriter | None = None
        self.open = 0  # connections
        self.answers: dict[str, Any] = {
            "qmp_capabilities": {},
            "query-version": VERSION,
            "query-kvm": {"enabled": True, "present": True},
            "query-status": {"status": "running", "running": True},
            "qom-get": MACHINE,
            **(answers or {}),
        }

    async def __aenter__(self) -> FakeQemu:
        self.server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.open += 1
        writer.write(json.dumps({"QMP": {"version": VERSION, "capabilities": []}}).encode() + b"\n")
        text, decoder = "", json.JSONDecoder()
        while data := await reader.read(4096):
            # The client ends its messages with nothing, as QEMU's parser allows.
            text += data.decode()
            try:
                msg, end = decoder.raw_decode(text)
            except ValueError:
                continue
            text = text[end:].lstrip()
            name = msg.get("execute") or "oob " + msg["exec-oob"]
            self.said.append(name)
            self.args[name] = msg.get("arguments")
            answer = self.answers.get(name)
            if answer is None:
                continue
            key = "error" if "class" in answer else "return"
            ident = {"id": msg["id"]} if "id" in msg else {}
            writer.write(json.dumps({key: answer, **ident}).encode() + b"\n")
        self.open -= 1
        writer.close()

    def event(self, name: str, at: float) -> None:
        assert self.writer is not None
        stamp = {"seconds": int(at), "microseconds": int(at % 1 * 1e6)}
        self.writer.write(json.dumps({"event": name, "timestamp": stamp}).encode() + b"\n")


class Heard:
    def __init__(self) -> None:
        self.events: list[QmpEvent] = []
        self.closed: list[str] = []

    def qmp(self, path: Path, timeout: float = 0.5) -> Qmp:
        return Qmp(str(path), "PVM", timeout, self.events.append, self.closed.append)


def with_fake(
    tmp_path: Path,
    body: Callable[[FakeQemu, Qmp, Heard], Awaitable[None]],
    answers: dict[str, Any] | None = None,
) -> None:
    async def go() -> None:
        heard = Heard()
        async with asyncio.timeout(20), FakeQemu(tmp_path / "q", answers) as fake:
            q = heard.qmp(tmp_path / "q")
            await q.connect()
            try:
                await body(fake, q, heard)
            finally:
                await q.close()

    asyncio.run(go())


async def until(cond: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not cond():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [{}, {"status": 7}, ["running"]])
def test_an_answer_without_a_run_state_is_an_error_that_names_it(
    tmp_path: Path, answer: Any
) -> None:
    async def body(fake: FakeQemu, q: Qmp, _: Heard) -> None:
        fake.answers["query-status"] = answer
        with pytest.raises(QmpRefused, match="PVM: query-status: no run state in"):
            await q.status()

    with_fake(tmp_path, body)


def test_nobody_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="PVM: no QMP at"):
        asyncio.run(Heard().qmp(tmp_path / "none").connect())
    with pytest.raises(QmpError, match="no QMP at"):
        probe(str(tmp_path / "none"), 0.5)


def test_who_it_is(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        assert await q.info() == QemuInfo((7, 2, 22), True, "running", MACHINE)

    with_fake(tmp_path, body)


def test_errors_name_command_and_qemu(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        with pytest.raises(QmpError, match="PVM: x-colo-lost-heartbeat: GenericError: not in COLO"):
            await q.lost_heartbeat()

    error = {"class": "GenericError", "desc": "not in COLO"}
    with_fake(tmp_path, body, {"x-colo-lost-heartbeat": error})


def test_a_socket_that_refuses_everything_is_not_connected(tmp_path: Path) -> None:
    """Each attempt opens one connection and leaves none behind."""
    error = {"class": "GenericError", "desc": "no connection to libvirtd"}

    async def go() -> None:
        heard = Heard()
        async with asyncio.timeout(20), FakeQemu(tmp_path / "q", {"query-version": error}) as fake:
            for _ in range(3):
                q = heard.qmp(tmp_path / "q")
                with pytest.raises(QmpRefused, match="PVM: query-version: GenericError: no conn"):
                    await q.connect()
                assert not q.connected
                await until(lambda: fake.open == 0)
            assert fake.said.count("qmp_capabilities") == 3 and not heard.closed

    asyncio.run(go())


def test_silence_has_a_deadline(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        with pytest.raises(QmpError, match="migrate-set-parameters: no answer in time"):
            await q.trigger_checkpoint()
        assert await q.status() == "running", "the connection is still good"

    with_fake(tmp_path, body)


def test_events_carry_qemus_time_as_monotonic(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        ago = 0.25
        mono = time.monotonic_ns()
        fake.event("STOP", time.time() - ago)
        await until(lambda: heard.events)
        e = heard.events[0]
        assert e.name == "STOP" and e.data == {}
        assert abs(e.ts_ns - (mono - ago * 1e9)) < 50e6
        assert e.seen_ns >= mono

    with_fake(tmp_path, body)


def test_death_is_told_once_and_commands_fail(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        assert fake.writer is not None
        fake.writer.transport.abort()
        await until(lambda: heard.closed)
        assert len(heard.closed) == 1 and "connection lost" in heard.closed[0]
        assert not q.connected
        with pytest.raises(QmpError, match="not connected"):
            await q.status()

    with_fake(tmp_path, body)


def caps(*names: str) -> list[dict[str, Any]]:
    return [{"capability": n, "state": False} for n in names]


@pytest.mark.parametrize("turns", range(12))
def test_a_qemu_may_die_while_the_connection_is_closed(tmp_path: Path, turns: int) -> None:
    """Two calls of disconnect() at a time fail within the library, at some of these points."""

    async def body() -> None:
        async with FakeQemu(tmp_path / "s") as qemu:
            q = Qmp(str(qemu.path), "PVM", 1, lambda e: None, lambda why: None)
            await q.connect()
            assert qemu.writer is not None
            qemu.writer.close()
            for _ in range(turns):  # of the loop: the death is noticed meanwhile
                await asyncio.sleep(0)
            await q.close()
            await q.close()

    asyncio.run(body())


def test_a_qemu_without_colo_is_refused(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        with pytest.raises(QmpError, match="without COLO"):
            await q.prepare(primary=True)

    with_fake(tmp_path, body, {"query-migrate-capabilities": caps("events")})


@pytest.mark.parametrize("on", [True, False])
def test_whether_a_migration_is_an_entry(tmp_path: Path, on: bool) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        assert await q.enters_colo() == on

    known = [{"capability": "events", "state": True}, {"capability": "x-colo", "state": on}]
    with_fake(tmp_path, body, {"query-migrate-capabilities": known})


@pytest.mark.parametrize(
    ("version", "kvm", "stops", "return_path"),
    [((7, 2), True, False, False), ((7, 2), False, True, False), ((11, 1), False, False, True)],
)
def test_what_each_qemu_needs(
    tmp_path: Path, version: tuple[int, int], kvm: bool, stops: bool, return_path: bool
) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        await q.prepare(primary=True)
        assert ("stop" in fake.said) == stops
        said = fake.args["migrate-set-capabilities"]["capabilities"]
        on = {c["capability"] for c in said if c["state"]}
        assert on == {"x-colo", "events"} | ({"return-path"} if return_path else set())
        off = {c["capability"] for c in said if not c["state"]}
        left = {"return-path", "pause-before-switchover", "multifd"}
        assert off == left - on, "another tool's, turned off; what is off is not named"

    answers: dict[str, Any] = {
        "query-version": {"qemu": {"major": version[0], "minor": version[1], "micro": 3}},
        "query-kvm": {"enabled": kvm, "present": True},
        "query-migrate-capabilities": caps("x-colo", "events", "xbzrle")
        + [
            {"capability": n, "state": True}
            for n in ("return-path", "pause-before-switchover", "multifd")
        ],
        "migrate-set-capabilities": {},
        "migrate-set-parameters": {},
        "stop": {},
    }
    with_fake(tmp_path, body, answers)


@pytest.mark.parametrize(
    ("version", "ok"),
    [((7, 2, 22), True), ((10, 0, 2), False), ((10, 0, 12), False), ((10, 0, 13), True),
     ((11, 1, 3), True), ((6, 2, 0), False)],
)  # fmt: skip
def test_versions(version: tuple[int, int, int], ok: bool) -> None:
    why = refusal(QemuInfo(version, True, "running"))
    assert (why is None) == ok
    assert ok or ".".join(map(str, version)) in (why or "")


@pytest.mark.parametrize(
    ("version", "machine", "ok"),
    [
        ((7, 2, 22), "pc-q35-7.2-machine", False),
        ((10, 0, 13), "pc-q35-10.0-machine", False),
        ((11, 1, 3), "pc-q35-11.1-machine", True),
        ((7, 2, 22), "pc-i440fx-7.2-machine", True),
        ((7, 2, 22), "microvm-machine", True),
    ],
)
def test_machines(version: tuple[int, int, int], machine: str, ok: bool) -> None:
    why = refusal(QemuInfo(version, True, "running", machine))
    assert (why is None) == ok
    assert ok or "q35" in (why or "")


def test_yank_goes_past_the_main_loop(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        await q.yank()
        assert fake.said[-1] == "oob yank"
        assert fake.args["oob yank"] == {"instances": [{"type": "migration"}]}

    with_fake(tmp_path, body, {"oob yank": {}})


def test_what_a_qemu_says_steers_no_terminal() -> None:
    assert (
        str(QmpError("qemu: cont: \x1b[2Jgone")) == "qemu: cont: \N{REPLACEMENT CHARACTER}[2Jgone"
    )
