# SPDX-License-Identifier: GPL-2.0-or-later
"""When the engine gives a connection to tier K, and what it does while it is not taken."""

from __future__ import annotations

import pytest

from colo_xdp.compare import Engine, Limits, Policy, Record
from colo_xdp.fastpath import BRAKE_AFTER, BRAKE_FRAMES, BRAKE_NS, OFFER_AFTER, RETRY, Gift, NoFast
from colo_xdp.flow import FlowKey
from colo_xdp.journal import Divergence

from . import frames as f

S = 1_000_000_000


class Busy(NoFast):
    """Takes a connection only if there is no frame on its way."""

    def __init__(self) -> None:
        self.enabled = True
        self.on_their_way = True
        self.asked = 0
        self.taken: list[Gift] = []

    def offer(self, key: FlowKey) -> bool:
        return True

    def give(self, key: FlowKey, gift: Gift, captured: int) -> bool:
        self.asked += 1
        if not self.on_their_way:
            self.taken.append(gift)
        return not self.on_their_way


class Pair:
    def __init__(self) -> None:
        self.now, self.at = 10 * S, 0
        self.out: list[bytes] = []
        self.asked: list[Divergence] = []
        self.fast = Busy()
        self.e = Engine(
            Limits(), Policy(), lambda rec: self.out.append(rec.frame),
            request_checkpoint=self.asked.append, on_wait=lambda ns: None, fast=self.fast,
        )  # fmt: skip

    def both(self) -> bytes:
        """The same segment of both guests; a batch of its own."""
        raw = f.tcp(self.at, 1, b"%04d" % self.at)
        self.at += 4
        self.now += 10_000
        self.e.from_pvm(Record(raw, self.now), self.now)
        self.e.from_svm(Record(raw, self.now), self.e.epoch & 0xFFF, self.now)
        self.e.flush(self.now)
        return raw

    def until_braked(self) -> list[bytes]:
        """What was sent until frames are kept back, the last of it being the first of those."""
        sent: list[bytes] = []
        for _ in range(10 * (OFFER_AFTER + BRAKE_AFTER * RETRY)):
            sent.append(self.both())
            if len(self.out) < len(sent):
                return sent
        raise AssertionError("never")


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_settled_connection_is_given(pair: Pair) -> None:
    pair.fast.on_their_way = False
    while not pair.fast.taken:
        pair.both()
        assert pair.at < 400
    assert pair.at > 4 * OFFER_AFTER, "not a connection of a few frames"
    assert not pair.e.counters["fast_braked"]


def test_a_busy_one_is_kept_back_until_it_is_taken(pair: Pair) -> None:
    sent = pair.until_braked()
    pair.fast.on_their_way = False
    sent.append(pair.both())
    assert len(pair.fast.taken) == 1 and pair.out == sent
    assert pair.e.counters["fast_braked"] == 1


def test_but_not_for_long(pair: Pair) -> None:
    sent = pair.until_braked()
    pair.now += BRAKE_NS
    pair.e.tick(pair.now)
    assert pair.out == sent and not pair.fast.taken
    tries = pair.fast.asked
    for _ in range(50):
        sent.append(pair.both())
        assert pair.out == sent
    assert pair.fast.asked == tries, "it is left alone for a while"


def test_and_not_many_frames(pair: Pair) -> None:
    sent = pair.until_braked()
    for _ in range(BRAKE_FRAMES):
        pair.now -= 10_000  # no time goes by
        sent.append(pair.both())
    assert pair.out == sent


@pytest.mark.parametrize("what", ["checkpoint", "solo", "shadow"])
def test_what_is_kept_back_leaves_before_anything_else_happens(pair: Pair, what: str) -> None:
    sent = pair.until_braked()
    if what == "checkpoint":
        pair.e.begin_checkpoint()
    elif what == "solo":
        pair.e.release_all()
    else:
        pair.e.set_shadow(True, pair.now)
    assert pair.out == sent
    assert not pair.asked
