# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagram flows through the engine: counterparts, order, grace and timeouts."""

from __future__ import annotations

import pytest

from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.engine.journal import Divergence
from tests.unit import frames as f

MS = 1_000_000


class Pair:
    def __init__(self, limits: Limits | None = None, policy: Policy | None = None) -> None:
        self.now = 1_000 * MS
        self.out: list[bytes] = []
        self.asked: list[str] = []
        self.found: list[Divergence] = []
        self.unmirrored: list[bytes | None] = []
        self.e = Engine(
            limits or Limits(),
            policy or Policy(),
            lambda rec: self.out.append(rec.frame),
            request_checkpoint=lambda d: self.asked.append(d.cause),
            on_wait=lambda ns: None,
            on_divergence=self.found.append,
            unmirror=self.unmirrored.append,
        )

    def p(self, *raw: bytes) -> Pair:
        for r in raw:
            self.now += 1
            self.e.from_pvm(Frame(r, self.now), self.now)
        return self

    def s(self, *raw: bytes) -> Pair:
        for r in raw:
            self.now += 1
            self.e.from_svm(Frame(r, self.now), self.e.epoch & 0xFFF, self.now)
        return self

    def wait(self, ms: float) -> Pair:
        self.now += int(ms * MS)
        self.e.tick(self.now)
        return self

    def checkpoint(self) -> Pair:
        """One that contains all that was sent."""
        self.e.begin_checkpoint()
        self.now += 1
        self.e.commit_checkpoint(self.now, self.e.epoch + 1, self.now)
        return self

    def is_now(self, out: list[bytes], *asked: str) -> Pair:
        assert (self.out, self.asked) == (out, list(asked))
        return self


A, B, C = f.udp(b"a"), f.udp(b"b"), f.udp(b"c")


def test_three_queued_leave_in_order() -> None:
    Pair().p(A, B, C).s(A).is_now([A]).s(B, C).is_now([A, B, C]).wait(4000).is_now([A, B, C])


def test_svm_reordered_and_first() -> None:
    pair = Pair().s(C, A).p(A, B, C).is_now([A]).wait(5).is_now([A]).s(B).is_now([A, B, C])
    assert pair.e.held_packets == pair.e.svm_packets == 0


def test_equal_copies_are_counted() -> None:
    Pair().p(A, A).s(A).is_now([A]).s(A).is_now([A, A]).s(A).wait(4000).is_now([A, A])


def test_difference_after_grace_and_once() -> None:
    pair = Pair().p(A).s(B).wait(9).is_now([]).wait(2).is_now([], "datagram_differs")
    d = pair.found[-1]
    e = d.evidence
    assert (e.offset, e.at, e.pvm, e.svm) == (0, 0, b"a", b"b")
    pair.p(C).wait(4000).is_now([], "datagram_differs")


def test_counterpart_behind_the_head_is_no_difference() -> None:
    pair = Pair().p(A, B).s(B).wait(100).is_now([])
    pair.wait(2901).is_now([], "compare_timeout")


def test_svm_surplus_expires_silently() -> None:
    pair = Pair().s(A).wait(2999).wait(2).is_now([])
    assert pair.e.svm_packets == 0
    assert pair.e.counters["svm_datagram_expired"] == 1


def test_flows_are_independent() -> None:
    other = f.udp(b"z", sport=99)
    Pair().p(A, other).s(other).is_now([other])


@pytest.mark.parametrize(
    ("p", "s"),
    [
        (A, f.udp(b"a", options=b"\1\1\1\1")),
        (f.ip4(47, b"gre", ident=1, ttl=64), f.ip4(47, b"gre", ident=2, ttl=63)),
        (f.echo_reply(b"x"), f.echo_reply(b"x")),
        (f.ether(0x88CC, b"lldp"), f.ether(0x88CC, b"lldp")),
        (b"\0" * 10, b"\0" * 10),
        (b"", b""),
    ],
)
def test_counterparts(p: bytes, s: bytes) -> None:
    Pair().p(p).is_now([]).s(s).is_now([p]).wait(4000).is_now([p])


def test_echo_of_another_sequence_differs() -> None:
    pair = Pair().p(f.echo_reply(b"x", seq=1)).s(f.echo_reply(b"x", seq=2)).wait(11)
    pair.is_now([], "datagram_differs")


def test_checkpoint_forgets_the_svm() -> None:
    pair = Pair().s(A)
    pair.e.begin_checkpoint()
    pair.e.commit_checkpoint(pair.now, 1, pair.now)
    pair.p(A).is_now([]).s(A).is_now([A])


def test_policies() -> None:
    arp, odd = f.ether(0x0806, bytes(28)), f.ether(0x88CC, b"x")
    pair = Pair().p(arp, odd).s(arp).is_now([arp])
    assert pair.e.counters["uncompared"] == pair.e.counters["svm_uncompared_dropped"] == 1
    Pair(policy=Policy(arp="compare", other="pass")).p(arp, odd).is_now([odd]).s(arp).is_now(
        [odd, arp]
    )


def test_queue_limit() -> None:
    pair = Pair(Limits(max_queue_size=2)).p(A, B, C).is_now([], "queue_full")
    assert pair.e.counters["queue_full_dropped"] == 1
    pair.s(A, B, C).is_now([A, B], "queue_full")
    pair = Pair(Limits(max_queue_size=2)).s(A, B, C).is_now([], "queue_full")
    assert pair.e.counters["svm_queue_full_dropped"] == 1
