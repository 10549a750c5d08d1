# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with two NICs, in the controllers: each frame, address and offset stays with its NIC."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.compare.causes import Cause
from colo_xdp.compare.policy import Rule
from colo_xdp.config.file import Config, load
from colo_xdp.controller import device_watch
from colo_xdp.controller.device_watch import SILENT_CHECKPOINTS
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.states import State
from colo_xdp.net.address_claims import mac_key
from colo_xdp.status import builder
from tests.netns.frames import GUEST_MAC, tcp
from tests.unit.controller.fakes import EXAMPLES, FakeDataPath, FakeQmp, Sent, in_loop

LAN, SAN = 0, 1


class TwoNics(FakeDataPath):
    """The data path of a host whose guest has two."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode, adopted=True)
        self.other = FakeDataPath(mode, adopted=True)
        self.nics = (self, self.other)  # type: ignore[assignment]


def config(role: str) -> Config:
    c = load(EXAMPLES / f"{role}.toml")
    lan = replace(c.network, name="lan")
    san = replace(lan, name="san", tap="tap-san", peer_link="eth2", bridge="br2")
    compare = replace(c.compare, wait="fixed")  # so that three missed checkpoints are enough
    return replace(c, network=lan, further=(san,), compare=compare)


def primary(mode: Mode = Mode.RUN) -> tuple[Primary, TwoNics, Sent]:
    dp, sent = TwoNics(mode), Sent()
    c = Primary(config("primary"), dp)  # type: ignore[arg-type]
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def secondary(mode: Mode = Mode.RUN) -> tuple[Secondary, TwoNics, Sent]:
    dp, sent = TwoNics(mode), Sent()
    c = Secondary(config("secondary"), dp)  # type: ignore[arg-type]
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def seen(
    source: abi.Source, body: bytes, nic: int, ts_ns: int = 0, epoch: int = 7
) -> CapturedFrame:
    ts_ns = ts_ns or time.monotonic_ns()
    return CapturedFrame(source, ts_ns, epoch, tcp(body), 0, False, nic=nic)


def test_a_frame_is_compared_with_the_other_guests_at_the_same_nic() -> None:
    """Two networks may have the same addresses and ports."""

    async def body() -> None:
        c, dp, _ = primary()
        c.output.begin_checkpoint()
        c.output.commit_checkpoint(time.monotonic_ns(), 7, time.monotonic_ns())
        c.on_frame(seen(abi.Source.PVM, b"hello", SAN))
        c.on_frame(seen(abi.Source.SVM, b"hello", LAN))
        c.on_batch()
        assert c.output.nics[SAN].engine.held_packets == 1, "its counterpart is at another NIC"
        assert not dp.injectors["release"].frames and not dp.other.injectors["release"].frames
        c.output.hold()
        c.output.commit_checkpoint(time.monotonic_ns(), 8, time.monotonic_ns())
        assert len(dp.other.injectors["release"].frames) == 1
        assert not dp.injectors["release"].frames

    in_loop(body)


@pytest.mark.parametrize(
    "act",
    [
        lambda o: o.release_all(),
        lambda o: o.release_until(time.monotonic_ns()),
        lambda o: o.commit_checkpoint(time.monotonic_ns(), 8, time.monotonic_ns()),
    ],
    ids=["all", "until", "commit"],
)
def test_what_releases_does_so_at_both(act: Any) -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.output.hold()
        for nic in (LAN, SAN):
            c.on_frame(seen(abi.Source.PVM, b"hello", nic))
        assert c.output.held[0] == 2 and dp.mode is Mode.CHECKPOINT
        act(c.output)
        assert [len(n.injectors["release"].frames) for n in dp.nics] == [1, 1]
        assert c.output.held[0] == 0

    in_loop(body)


def test_a_shadow_and_lost_flows_concern_both() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.output.set_shadow(True, time.monotonic_ns())
        assert all(n.engine.shadow for n in c.output.nics) and c.output.shadow
        c.output.set_shadow(False, time.monotonic_ns())
        assert not any(n.engine.shadow for n in c.output.nics)
        lost: list[str] = []
        for n in c.output.nics:
            n.engine = SimpleNamespace(  # type: ignore[assignment]
                void_flows=lambda now, n=n: lost.append(n.name), tick_ns=lambda: 1,
            )  # fmt: skip
        c.output.void_flows(1)
        assert lost == ["lan", "san"]

    in_loop(body)


def test_a_rule_of_one_nic_holds_there_alone() -> None:
    async def body() -> None:
        base = config("primary")
        rule = Rule(name="only-here", action="pass", protocol="udp", nic="san")
        c = Primary(replace(base, rules=(rule,)), TwoNics(Mode.RUN))  # type: ignore[arg-type]
        names = [[r.name for r in n.engine.policy.order] for n in c.output.nics]
        assert "only-here" not in names[LAN] and names[SAN][0] == "only-here"
        shown = builder.rules_json(c)
        assert [r["name"] for r in shown].count("only-here") == 1

    in_loop(body)


def test_the_secondary_holds_and_lets_go_by_nic() -> None:
    async def body() -> None:
        c, dp, _ = secondary(Mode.CHECKPOINT)
        c.on_frame(seen(abi.Source.CLIENT, b"to the guest", SAN))
        c.on_frame(seen(abi.Source.SVM, b"of the guest", SAN))
        h = c.held.take()
        assert h is not None
        c.held.let_go(h)
        assert [len(n.injectors["deliver"].frames) for n in dp.nics] == [0, 1]
        assert [len(n.injectors["forward"].frames) for n in dp.nics] == [0, 1]

    in_loop(body)


def test_addresses_and_offsets_arrive_at_their_nic() -> None:
    async def body() -> None:
        c, dp, sent = secondary(Mode.CHECKPOINT)
        address = abi.ADDRESS.pack(bytes(10) + b"\xff\xff\x0a\x08\x00\x02", 0)
        claim = abi.CLAIM.pack(time.monotonic_ns(), mac_key(GUEST_MAC), 7, 0)
        dp.other.addresses._addresses.set(address, claim)
        told, _ = dp.other.addresses.export(256)
        dp.other.addresses._addresses.delete(address)
        c.on_message({"type": "claims", "n": 8, "nic": SAN, "addresses": told.hex(), "macs": ""})
        assert list(dp.other.addresses._addresses.keys()) == [address]
        assert not list(dp.addresses._addresses.keys())
        got: list[tuple[int, bytes, bool]] = []
        for i, flows in enumerate(c.flows):
            flows.adopt = lambda raw, first, i=i: got.append((i, raw, first))  # type: ignore[method-assign]
        c.view.pair.confirmed = False
        for first in (True, False):
            msg = {"type": "offsets", "n": 1, "nic": SAN, "first": first, "last": False}
            c.on_message(msg | {"flows": "00ff"})
        assert got == [(SAN, b"\0\xff", True), (SAN, b"\0\xff", False)]
        c.on_message(
            {"type": "offsets", "n": 2, "nic": 5, "first": True, "last": True, "flows": ""}
        )
        assert sent[-1]["type"] == "failed", "a NIC that is not there is an error with a name"
        c.on_message({"type": "claims", "n": 8, "nic": 5, "addresses": "", "macs": ""})

    in_loop(body)


def test_a_nic_without_old_connections_clears_the_copys_table() -> None:
    async def body() -> None:
        c, dp, _ = primary(Mode.CHECKPOINT)
        dp.promoted_epoch = dp.other.promoted_epoch = 7
        offsets = c.checkpoints.offsets
        offsets.tables[SAN] = SimpleNamespace(export=lambda epoch: [b"x" * 104] * 300)  # type: ignore[assignment]
        offsets.new_copy()
        assert not offsets.sent
        parts = await offsets.parts()
        assert [(p.nic, p.first, len(p.flows)) for p in parts] == [
            (LAN, True, 0),
            (SAN, True, 290 * 104),
            (SAN, False, 10 * 104),
        ]

    in_loop(body)


def test_both_are_announced_and_opened() -> None:
    async def body() -> None:
        c, dp, _ = secondary()
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        c.qemu.options = replace(
            c.qemu.options, taps={"tap0": "52:54:00:00:00:01", "tap-san": "52:54:00:00:00:02"}
        )
        c.state = State.PROMOTED
        await c.takeover.announce()
        for nic, mac in zip(dp.nics, ("525400000001", "525400000002"), strict=True):
            frames = nic.injectors["forward"].frames
            assert frames and all(f[6:12] == bytes.fromhex(mac) for f in frames)
        assert c.qemu.first_macs == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
        assert [n.macs for n in dp.nics] == [
            [bytes.fromhex("525400000001")],
            [bytes.fromhex("525400000002")],
        ]

    in_loop(body)


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        ({"lan": "52:54:00:00:00:01", "san": "52:54:00:00:00:02"}, ""),
        ({"lan": "", "san": ""}, ""),  # not known there
        ({"san": "52:54:00:00:00:02", "lan": "52:54:00:00:00:01"}, "in this order"),
        ({"lan": "52:54:00:00:00:01"}, "the NICs lan, san"),
        ({"lan": "52:54:00:00:00:02", "san": "52:54:00:00:00:01"}, "exchanged"),
        ({"lan": 3, "san": None}, ""),
    ],
)
def test_both_configurations_name_the_same_cards(theirs: dict[str, Any], why: str) -> None:
    async def body() -> None:
        c, _, _ = primary(Mode.BYPASS)
        c.qemu.first_macs = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
        c.entry.peer_nics = theirs
        found = c.entry._other_nics()
        assert (why in found) if why else not found

    in_loop(body)


def test_a_nic_whose_counterpart_is_missed_is_named_whatever_comes_at_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FRESH_NS", "FRESH_BEATS"):  # reports are new
        monkeypatch.setattr(device_watch, name, 0)

    async def body() -> None:
        c, dp, _ = primary()
        c.state = State.PROTECTED
        for _ in range(SILENT_CHECKPOINTS):
            assert not c.devices.cut
            dp.came += 1  # the first NIC's frames arrive
            c.devices.checkpointed(Cause.COMPARE_TIMEOUT, "san")
        assert c.devices.cut_nics == {SAN}
        assert "does not arrive over eth2" in c.devices.trouble
        assert [bool(n["trouble"]) for n in builder.nics_json(c)] == [False, True]
        dp.other.came += 1
        c.devices.checkpointed(Cause.COMPARE_TIMEOUT, "san")
        assert not c.devices.cut

    in_loop(body)


def test_only_what_waits_at_a_cut_link_is_hurried() -> None:
    async def body() -> None:
        c, _, _ = primary()
        c.state, c.peer.connected = State.PROTECTED, True
        c.output.begin_checkpoint()
        c.output.commit_checkpoint(time.monotonic_ns(), 7, time.monotonic_ns())
        c.devices._found(Look(trouble=["peer_link: eth2 is down"], cut=True, cut_nics={SAN}))
        c.checkpoints.wanted = None
        c.on_frame(seen(abi.Source.PVM, b"its counterpart comes", LAN))
        c.on_tick(time.monotonic_ns())
        assert c.checkpoints.wanted is None
        c.on_frame(seen(abi.Source.PVM, b"nothing comes", SAN))
        c.on_tick(time.monotonic_ns())
        assert c.checkpoints.wanted is not None
        assert c.checkpoints.wanted.cause == Cause.PEER_LINK

    in_loop(body)


def test_the_status_has_each_nic() -> None:
    async def body() -> None:
        c, dp, _ = primary()
        c.on_frame(seen(abi.Source.PVM, b"waits", SAN))
        dp.other.came = 5
        shown = builder.nics_json(c)
        assert [n["name"] for n in shown] == ["lan", "san"]
        assert [n["arrived"] for n in shown] == [0, 5]
        assert [n["peer_link"] for n in shown] == [c.config.network.peer_link, "eth2"]

    in_loop(body)
