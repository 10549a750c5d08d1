# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the guests open themselves, from ports of their own."""

from __future__ import annotations

import pytest

from colo_xdp.compare.limits import Limits
from colo_xdp.compare.policy import Policy, Rule
from colo_xdp.engine.guest_opened import MAX_OPENINGS
from tests.unit import frames as f
from tests.unit.compare.test_datagram import Pair

SYN_OPTS = f.SYN_OPTS


def lookup(port: int, name: bytes = b"name") -> bytes:
    return f.udp(name, sport=port, dport=53)


def syn(port: int, v6: bool = False) -> bytes:
    return f.tcp(port, 0, b"", f.SYN, opts=SYN_OPTS, sport=port, dport=443, v6=v6)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (lookup(40001), lookup(40002)),
        (syn(40001), syn(40002)),
        (syn(40001, True), syn(40002, True)),
    ],
)
def test_from_different_ports_they_have_gone_apart(mine: bytes, theirs: bytes) -> None:
    pair = Pair().p(mine).s(theirs).wait(40).is_now([]).wait(20).is_now([], "opened_apart")
    pair.wait(2000).is_now([], "opened_apart").checkpoint().is_now([mine], "opened_apart")
    assert pair.found[0].evidence.pvm_frame is not None
    pair.wait(9000).is_now([mine], "opened_apart")


@pytest.mark.parametrize(
    "theirs", [lookup(40001, b"other"), f.udp(b"name", sport=40002, dport=123), syn(40002)]
)
def test_another_service_or_the_same_port_is_another_matter(theirs: bytes) -> None:
    pair = Pair().p(lookup(40001)).s(theirs).wait(60).wait(1000)
    assert "opened_apart" not in pair.asked


def test_late_and_in_another_order_is_no_difference() -> None:
    pair = Pair().p(lookup(40001), lookup(40002)).wait(100)
    pair.s(lookup(40002)).wait(100).s(lookup(40001))
    pair.is_now([lookup(40002), lookup(40001)])


def test_after_a_checkpoint_the_guests_are_equal() -> None:
    pair = Pair().p(lookup(40001)).checkpoint().s(lookup(40002)).wait(100).wait(1000)
    pair.is_now([lookup(40001)])


def test_what_a_rule_lets_pass_is_not_looked_at() -> None:
    rule = Rule(name="r", action="pass", direction="out")
    mine = lookup(40001)
    Pair(policy=Policy((rule,))).p(mine).s(lookup(40002)).wait(9000).is_now([mine])


def test_they_are_bounded_and_forgotten() -> None:
    pair = Pair(Limits(compare_timeout_ns=1_000_000_000, max_queue_size=4096))
    frames = [lookup(20_000 + i) for i in range(MAX_OPENINGS + 50)]
    pair.p(*frames)
    openings = pair.e._flows.openings
    assert openings._count == MAX_OPENINGS
    pair.s(*frames).wait(60)
    assert pair.out == frames and not openings._count and not openings._by
    pair.p(lookup(50_001)).s(lookup(50_002)).wait(60)
    assert pair.asked == ["opened_apart"] and not openings._count
