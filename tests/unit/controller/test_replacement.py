# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU that follows one that is over, and the tap of a worthless guest."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from colo_xdp.abi import Mode
from colo_xdp.datapath.devices import NoSuchDevice
from colo_xdp.datapath.netlink import NetlinkError
from colo_xdp.failover.arbiter import LeaseArbiter
from colo_xdp.failover.facts import other_guest
from colo_xdp.failover.lease import Leadership
from colo_xdp.failover.states import State
from colo_xdp.qemu.qmp import QmpError
from tests.unit.controller.fakes import FakeQmp, HungQmp, WaitingQmp, in_loop, primary, secondary


def test_a_tap_leaves_the_bridge_when_the_other_guest_transmits() -> None:
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
        c.qemu.qmp.migration_status = lambda: asyncio.sleep(0, "")  # type: ignore[method-assign]
        assert c.replacement._search is not None
        await asyncio.wait({c.replacement._search}, timeout=2)
        assert c.role_changed and not c.failures

    in_loop(body)


def test_a_survivor_becomes_the_primary_when_a_new_qemu_waits() -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.TAKEOVER)
        object.__setattr__(c.config.qemu, "reverse_uri", "")
        c.on_message(
            {"type": "ready", "epoch": 3, "disks": {}, "hardware": "", "nics": {"net0": 0}}
        )
        assert not c.role_changed, "nothing says where the other QEMU waits"
        object.__setattr__(c.config.qemu, "reverse_uri", "tcp:192.0.2.1:9998")
        c.on_message(
            {"type": "ready", "epoch": 3, "disks": {}, "hardware": "", "nics": {"net0": 0}}
        )
        assert c.role_changed and dp.changed == 1
        await asyncio.wait_for(c.finished(), 1)

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
def test_a_guest_is_worthless_only_if_the_other_transmits(
    role: str, state: str, connected: bool, over: bool
) -> None:
    c, _, _ = primary(Mode.DROP, adopted=True)
    c.view.peer.role, c.view.peer.state, c.peer.connected = role, state, connected
    c.view.peer.guest = other_guest(role, state, standalone=over, shut=False)
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


@pytest.mark.parametrize("asked", [False, True])
def test_a_host_that_is_about_to_go_gets_no_copy(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was handed over: the copy would die with it. A person who stays asks for one."""
    monkeypatch.setattr("colo_xdp.controller.replacement.QMP_RETRY_S", 0.001)

    async def body() -> None:
        c, _, _ = secondary(Mode.DROP)
        object.__setattr__(c.config.qemu, "incoming", ("/bin/true",))
        c.peer.connected, c.view.peer.role, c.view.peer.state = True, "primary", "solo"
        looks, started = 0, asyncio.Event()

        def superseded() -> bool:
            nonlocal looks
            looks += 1
            return True

        async def nobody() -> None:
            raise QmpError("nobody is there")

        async def start() -> None:
            started.set()
            c.role_changed = True

        c.superseded, c.qemu.reconnect = superseded, nobody  # type: ignore[method-assign]
        c.qemu.start_incoming = start  # type: ignore[method-assign]
        c.replacement.off = True
        c.become(State.STOPPED, "demoted: its host shuts down")
        if asked:
            await c.commands.run("reprotect", {})
        search = c.replacement._search
        assert search is not None
        if asked:
            await asyncio.wait_for(started.wait(), 5)
            assert not c.replacement.off
        else:
            await asyncio.sleep(0.1)  # a hundred looks
            assert not started.is_set() and not looks
        search.cancel()

    in_loop(body)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_qemu_that_is_coming_up_is_not_started_again(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for a copy has just run the command; a person may ask for it all the same."""
    monkeypatch.setattr("colo_xdp.controller.replacement.QMP_RETRY_S", 0.001)

    async def body() -> None:
        c, _, _ = secondary(Mode.DROP)
        object.__setattr__(c.config.qemu, "incoming", ("/bin/true",))
        c.peer.connected, c.view.peer.role, c.view.peer.state = True, "primary", "solo"
        looks = 0

        async def nobody() -> None:
            nonlocal looks
            looks += 1
            raise QmpError("nobody is there")

        started = asyncio.Event()

        async def start() -> None:
            started.set()
            c.role_changed = True

        c.qemu.reconnect, c.qemu.start_incoming = nobody, start  # type: ignore[method-assign]
        c.qemu.last_start, c.replacement.wanted = time.monotonic(), wanted
        c.become(State.STOPPED, "demoted")
        search = c.replacement._search
        assert search is not None
        while looks < 5 and not started.is_set():
            await asyncio.sleep(0)
        assert started.is_set() == wanted
        search.cancel()

    in_loop(body)


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


def test_a_host_that_waits_for_a_new_guest_keeps_its_key() -> None:
    """It was silent, and its key free to be taken; as a secondary it may transmit again."""
    c, _, _ = primary()
    leadership = Leadership(
        SimpleNamespace(), node="p", address="a", boot="1", ttl_ms=2000, margin_ms=500,
        transmitting=False, allow=lambda ns: None, changed=lambda: None,
    )  # type: ignore[arg-type]  # fmt: skip
    c.arbiter = LeaseArbiter(leadership)
    leadership.freed("1")
    assert leadership.steal == "1"
    c.on_message({"type": "ready", "epoch": 7, "disks": {}, "hardware": "", "nics": {"net0": 0}})
    assert not leadership.steal
