# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp flows` on a controller with real engines: filters, order, bounds, and no harm."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.controller.primary import Primary
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.engine.flow_report import Filters, row
from colo_xdp.net.flow_key import FlowKey
from colo_xdp.net.packet import parse
from colo_xdp.offload.kernel_format import KernelView
from colo_xdp.offload.offloaded import OffloadedFlow
from colo_xdp.status.flows import answer
from tests.netns.frames import tcp, udp
from tests.unit.controller.fakes import primary, secondary


def with_flows() -> Primary:
    c, _, _ = primary(Mode.RUN)
    now = time.monotonic_ns()
    for i, frame in enumerate([
        tcp(b"x" * 10, sport=80, dport=4000), tcp(b"x" * 30, sport=80, dport=4001),
        tcp(b"x" * 20, sport=443, dport=4002), udp(b"x" * 40, sport=53, dport=4003),
    ]):  # fmt: skip
        c.on_frame(CapturedFrame(abi.Source.PVM, now + i, 7, frame, 0, False, nic=0))
        time.sleep(0.002)
    return c


def ask(c: Any, **args: Any) -> dict[str, Any]:
    return asyncio.run(answer(c, args))


def ports(doc: dict[str, Any]) -> list[str]:
    return [r["flow"].rpartition(":")[2] for r in doc["flows"]]


def test_what_is_asked_for_comes_first() -> None:
    c = with_flows()
    doc = ask(c)
    assert doc["matched"] == doc["seen"] == 4 and doc["whole"]
    assert ports(ask(c, sort="wait")) == ["4000", "4001", "4002", "4003"]
    assert ports(ask(c, sort="idle")) == ["4000", "4001", "4002", "4003"]
    first = ask(c, sort="wait")["flows"][0]
    assert first["held"] == 1 and first["wait_ms"] > 5 and first["path"] == "controller"
    assert first["rule"] == "default" and first["idle_ms"] > 5


def test_filters() -> None:
    c = with_flows()
    assert sorted(ports(ask(c, proto="TCP"))) == ["4000", "4001", "4002"]
    assert ports(ask(c, proto="udp")) == ["4003"]
    assert sorted(ports(ask(c, port=80))) == ["4000", "4001"]
    peer = ask(c)["flows"][0]["flow"].partition(" > ")[2].rpartition(":")[0]
    assert ask(c, peer=peer)["matched"] == 4 and ask(c, peer=peer + "9")["matched"] == 0
    doc = ask(c, limit=1)
    assert len(doc["flows"]) == 1 and doc["matched"] == 4


@pytest.mark.parametrize(
    "args", [{"sort": "name"}, {"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"port": "x"},
             {"proto": 1}, {"peer": None}],
)  # fmt: skip
def test_wrong_questions_are_refused(args: dict[str, Any]) -> None:
    c, _, _ = primary()
    with pytest.raises(ValueError, match="flows: "):
        ask(c, **args)


def test_the_secondary_does_not_know() -> None:
    c, _, _ = secondary()
    with pytest.raises(ValueError, match="ask the primary host"):
        ask(c)


def test_a_large_table_does_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets wait for the loop: the answer is made in turns, for a limited time."""
    c = with_flows()
    (_, flows), *_ = c.output.nics[0].engine.tables()
    many = [(True, flows * 20_000)]
    monkeypatch.setattr(c.output.nics[0].engine, "tables", lambda: many)
    longest = 0.0

    async def body() -> dict[str, Any]:
        nonlocal longest
        task = asyncio.ensure_future(answer(c, {"limit": 5}))
        while not task.done():
            began = time.thread_time()  # of the CPU: others may have it meanwhile
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)
        return task.result()

    doc = asyncio.run(body())
    assert doc["whole"] and doc["seen"] == 60_000 and len(doc["flows"]) == 5
    assert longest < 0.05
    monkeypatch.setattr("colo_xdp.status.flows.DEADLINE_S", 0.01)
    assert not asyncio.run(body())["whole"]


def test_an_offloaded_flow_is_looked_at_and_stays_where_it_is() -> None:
    c = with_flows()
    (_, flows), *_ = c.output.nics[0].engine.tables()
    flow = next(f for f in flows if b"\x0f\xa0" in f.key)

    def never(_: Any) -> None:
        raise AssertionError("reclaimed")

    offloaded: Any = OffloadedFlow(flow, never)  # type: ignore[arg-type]
    now = time.monotonic_ns()

    def peek(key: FlowKey) -> KernelView | None:
        assert key == flow.key
        return KernelView(5_000_000, now - 7_000_000, now - 1_000_000)

    r = row(offloaded, True, now, Filters(), peek)
    assert r is not None and r["path"] == "kernel"
    assert r["wait_ms"] == 7 and r["idle_ms"] == 1 and r["held"] == 0
    assert r["bytes"] == (5_000_000 - flow.sent.origin) & 0xFFFFFFFF  # type: ignore[attr-defined]
    gone = row(offloaded, True, now, Filters(), lambda key: None)
    assert gone is not None and gone["wait_ms"] == 0


def test_the_other_end_of_ipv6_and_of_portless_flows() -> None:
    from colo_xdp.engine.flow_report import _peer
    from colo_xdp.net.flow_key import describe_tcp

    assert _peer("tcp [fd00::2]:80 > [fd00::1]:4000 vlan 7") == "fd00::1"
    assert _peer("icmp 10.9.0.2 > 10.9.0.1 type 8 id 3") == "10.9.0.1"
    assert _peer("icmp fd00::2 > fd00::1 type 128") == "fd00::1"
    assert _peer("opaque 00ff") == ""
    key = parse(tcp(b"x", sport=80, dport=4000)).key
    assert _peer(describe_tcp(key)).count(".") == 3
