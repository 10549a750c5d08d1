# SPDX-License-Identifier: GPL-2.0-or-later
"""Fragments are compared as the datagrams that they make up, and leave together or not at all."""

from __future__ import annotations

import itertools
import random
import struct

import pytest

from colo_xdp.compare.policy import Policy
from colo_xdp.net.packet import Kind, parse
from tests.unit import frames as f
from tests.unit.compare.test_datagram import Pair

UDP = struct.pack("!HHHH", 53, 4000, 8 + 40, 0) + bytes(range(40))


def cut4(body: bytes, at: tuple[int, ...], ident: int = 1, proto: int = 17) -> list[bytes]:
    """`body` as IPv4 fragments that begin at `at` (multiples of 8)."""
    ends = (*at[1:], len(body))
    return [
        f.ip4(proto, body[a:b], frag=a // 8 | (0x2000 if b < len(body) else 0), ident=ident)
        for a, b in zip(at, ends, strict=True)
    ]


def cut6(body: bytes, at: tuple[int, ...], ident: int = 1, nxt: int = 17) -> list[bytes]:
    ends = (*at[1:], len(body))
    return [
        f.ip6(44, struct.pack("!BBHI", nxt, 0, a | (b < len(body)), ident) + body[a:b])
        for a, b in zip(at, ends, strict=True)
    ]


@pytest.mark.parametrize("cut", [cut4, cut6])
def test_cut_differently_and_in_any_order(cut: object) -> None:
    make = cut4 if cut is cut4 else cut6
    whole = f.ip4(17, UDP) if cut is cut4 else f.ip6(17, UDP)
    for mine in itertools.permutations(make(UDP, (0, 16, 32), ident=5)):
        for theirs in (make(UDP, (0, 24), ident=9), make(UDP, (0, 8, 40)), [whole]):
            pair = Pair()
            for frame in mine:
                pair.p(frame).is_now([])
            for frame in theirs[:-1]:
                pair.s(frame).is_now([])
            pair.s(theirs[-1]).is_now(list(mine)).wait(4000).is_now(list(mine))
            assert pair.e.held_packets == pair.e.svm_packets == 0


def test_whole_on_the_primary_and_fragments_on_the_secondary() -> None:
    whole = f.ip4(17, UDP)
    a, b = cut4(UDP, (0, 24))
    Pair().p(whole).s(b).is_now([]).s(a).is_now([whole])


def test_none_leaves_before_all_are_proven() -> None:
    a, b = cut4(UDP, (0, 24))
    pair = Pair().p(a, b).s(a).is_now([])
    pair.wait(3001).is_now([], "compare_timeout").checkpoint().is_now([a, b], "compare_timeout")
    assert pair.e.held_packets == 0


def test_a_fragment_that_never_comes_costs_one_checkpoint() -> None:
    a, _ = cut4(UDP, (0, 24))
    pair = Pair().p(a).s(a).wait(2990).is_now([]).wait(20).is_now([], "compare_timeout")
    pair.checkpoint().is_now([a], "compare_timeout").wait(9000).is_now([a], "compare_timeout")
    assert (pair.e.held_packets, pair.e.svm_packets) == (0, 0)


def test_a_fragment_that_never_comes_is_asked_for_under_new_rules_too() -> None:
    """The engine forgets its timers then."""
    (a, _), (b, _) = (cut4(UDP, (0, 24), ident) for ident in (1, 2))
    pair = Pair().p(a)
    pair.e.set_policy(Policy())
    pair.checkpoint().is_now([a], "policy")
    pair.p(b).s(b).wait(3001).is_now([a], "policy", "compare_timeout")


def test_a_checkpoint_between_two_fragments() -> None:
    """The SVM is a copy of a PVM that has sent the first half: both send the second only."""
    a, b = cut4(UDP, (0, 24))
    pair = Pair().p(a).checkpoint().is_now([a])
    pair.p(b).is_now([a]).s(b).is_now([a, b]).wait(9000).is_now([a, b])
    assert (pair.e.held_packets, pair.e.svm_packets) == (0, 0)


def test_overlaps_never_complete() -> None:
    a, _ = cut4(UDP, (0, 24))
    other = f.ip4(17, UDP[16:], frag=2, ident=1)
    pair = Pair().p(a, other).s(a, other).is_now([])
    pair.wait(3001).is_now([], "compare_timeout")


def test_a_flipped_byte_in_any_fragment_is_never_released() -> None:
    good = cut4(UDP, (0, 16, 32))
    for which, frame in enumerate(good):
        for at in range(34, len(frame)):
            bad = bytearray(frame)
            bad[at] ^= 0x10
            pair = Pair().p(*good)
            pair.s(*[bytes(bad) if i == which else g for i, g in enumerate(good)])
            assert not pair.out or (which == 0 and 38 <= at < 42), at  # UDP length and checksum
            pair.wait(3001)
            assert pair.asked or pair.out


def test_tcp_in_fragments() -> None:
    syn = f.tcp(100, 1, b"", f.SYN | f.ACK, opts=f.SYN_OPTS)
    data = f.segment(101, 1, bytes(range(100)))
    pair = Pair().p(syn).s(syn)
    mine = cut4(data, (0, 64), proto=6)
    pair.p(*mine).is_now([syn]).s(f.tcp(101, 1, bytes(range(100)))).is_now([syn, *mine])


def test_random_fragments_never_raise_and_nothing_stays() -> None:
    for seed in range(200):
        rnd = random.Random(seed)
        pair = Pair()
        sent = 0
        for _ in range(40):
            at = rnd.randrange(0, 80, 8)
            body = bytes(rnd.randrange(1, 40))
            v6 = rnd.random() < 0.5
            word = at | rnd.randrange(2) if v6 else at // 8 | rnd.choice((0, 0x2000))
            frame = (
                f.ip6(44, struct.pack("!BBHI", 17, 0, word, rnd.randrange(3)) + body)
                if v6
                else f.ip4(17, body, frag=word, ident=rnd.randrange(3))
            )
            if parse(frame).kind is not Kind.FRAGMENT:
                continue
            if rnd.random() < 0.5:
                pair.p(frame)
                sent += 1
            else:
                pair.s(frame)
            if rnd.random() < 0.1:
                pair.checkpoint()
        pair.wait(3001).checkpoint().wait(9000)
        assert len(pair.out) == sent
        assert (pair.e.held_packets, pair.e.held_bytes, pair.e.svm_packets) == (0, 0, 0), seed
