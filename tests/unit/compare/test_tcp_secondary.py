# SPDX-License-Identifier: GPL-2.0-or-later
"""Both halves of a TCP flow: what the SVM has said, and what has left."""

from __future__ import annotations

import random

import pytest

from colo_xdp.compare.history import History
from colo_xdp.compare.ledger import Ledger
from colo_xdp.compare.released import UNPROVEN, ReleasedStream
from colo_xdp.compare.tcp_secondary import MAX_RSTS, Push, SvmStream
from colo_xdp.net.packet import Packet, parse

from .. import frames as f

BASE = 2**32 - 300  # numbers wrap
TEXT = random.Random(5).randbytes(4096)


def segment(at: int, n: int) -> Packet:
    return parse(f.tcp((BASE + at) % 2**32, 1, TEXT[at : at + n]))


def place(at: int) -> int:
    return (BASE + at) % 2**32


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(64, 1 << 20)


@pytest.fixture
def svm(ledger: Ledger) -> SvmStream:
    s = SvmStream(ledger)
    s.begin_at(BASE)
    return s


def text_of(s: SvmStream) -> bytes:
    return b"".join(frame[off:end] for frame, off, end, _ in s.chunks)


def test_segments_in_any_order_and_overlapping_make_up_the_stream() -> None:
    for seed in range(100):
        rnd, ledger = random.Random(seed), Ledger(1 << 20, 0)
        s = SvmStream(ledger)
        if seed % 2:
            s.begin_at(BASE)
        cuts = sorted({0, 1000, *(rnd.randrange(1, 1000) for _ in range(12))})
        parts = [(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
        parts += [(at, rnd.randrange(1, 1000 - at + 1)) for at in rnd.sample(range(999), 8)]
        rnd.shuffle(parts)
        for at, n in parts:
            outcome = s.push(segment(at, n), 7, BASE, 1 << 20)
            assert outcome in (Push.STORED, Push.EARLY, Push.KNOWN)
        if not seed % 2:
            s.begin_at(BASE)
        assert (text_of(s), s.svm_nxt, s.out_of_order) == (TEXT[:1000], place(1000), [])
        assert ledger.svm_packets == len(s.chunks)
        s.forget()
        assert not ledger.svm_packets and not s.chunks


def test_what_becomes_of_payload(svm: SvmStream, ledger: Ledger) -> None:
    ledger.max_packets = 3
    assert svm.push(segment(0, 100), 1, BASE, 500) is Push.STORED
    assert svm.push(segment(20, 80), 2, BASE, 500) is Push.KNOWN
    assert svm.push(segment(200, 100), 3, BASE, 500) is Push.EARLY
    assert svm.push(segment(900, 100), 4, BASE, 500) is Push.FOREIGN
    assert svm.push(segment(50, 100), 5, BASE, 120) is Push.BEYOND
    assert (text_of(svm), svm.svm_nxt, ledger.svm_packets) == (TEXT[:100], place(100), 2)
    assert svm.push(segment(50, 100), 6, BASE, 500) is Push.STORED
    assert svm.push(segment(150, 10), 7, BASE, 500) is Push.FULL
    assert svm.push(segment(400, 10), 8, BASE, 500) is Push.FULL
    assert svm.since() == 1 and svm.is_beyond(place(299)) and not svm.is_beyond(place(300))


def test_the_oldest_thing_of_any_kind(svm: SvmStream) -> None:
    assert svm.since() == 0
    svm.finish(place(10), 9)
    assert svm.since() == 9
    assert svm.reset((False, 1), place(10), 8) and svm.reset((False, 2), None, 3)
    assert svm.since() == 8 and svm.svm_rst_place == place(10), "of the first reset"
    svm.begin(parse(f.tcp(77, 5, b"", f.SYN | f.ACK)), 6)
    assert svm.since() == 6 and (svm.svm_nxt, svm.svm_ack, svm.svm_fin, svm.svm_rsts) == (
        None,
        5,
        None,
        [],
    )
    assert [svm.reset((True, i), None, 1) for i in range(MAX_RSTS + 1)] == [True] * MAX_RSTS + [
        False
    ]


def test_bytes_are_compared_once_and_then_with_the_history(svm: SvmStream) -> None:
    sent = ReleasedStream()
    sent.begin_at(BASE, svm)
    svm.push(segment(0, 700), 1, BASE, 5000)
    assert sent.verify(segment(0, 100), place(0), svm) == (place(100), None)
    assert sent.verify(segment(100, 900), place(100), svm) == (place(700), None), "the rest waits"
    assert text_of(svm) == b"" and sent.verified == place(700) and sent.history.size == 700
    assert sent.verify(segment(50, 300), place(50), svm) == (place(350), None)
    wrong = parse(f.tcp(place(50), 1, TEXT[50:90] + b"\0" + TEXT[91:]))
    upto, mismatch = sent.verify(wrong, place(50), svm)
    assert upto == place(90) and mismatch is not None and mismatch.svm == TEXT[90:154]
    sent.history.trim(0)
    sent.history.clear()
    assert sent.verify(segment(50, 300), place(50), svm) == (place(50), UNPROVEN)
    svm.keep_again(segment(40, 400))
    assert sent.verify(segment(50, 300), place(50), svm) == (place(350), None)


def test_a_checkpoint_takes_back_what_has_not_left(svm: SvmStream) -> None:
    sent = ReleasedStream()
    sent.begin_at(BASE, svm)
    svm.push(segment(0, 700), 1, BASE, 5000)
    sent.verify(segment(0, 700), BASE, svm)
    sent.data(place(300))
    sent.roll_back()
    assert (sent.verified, sent.released_nxt) == (place(300), place(300))
    assert sent.history.back(300, 300) == TEXT[:300] and sent.history.size == 300
    new = ReleasedStream()
    new.verified = BASE
    new.roll_back()
    assert new.verified is None, "nothing has left: nothing is known"


def test_what_a_checkpoint_contains_is_history(svm: SvmStream) -> None:
    sent = ReleasedStream()
    sent.commit_data(segment(0, 100), svm)
    sent.commit_data(segment(60, 100), svm)
    assert sent.released_nxt == sent.verified == svm.svm_nxt == place(160)
    assert sent.history.back(160, 160) == TEXT[:160]
    sent.commit_data(segment(300, 100), svm)
    assert sent.released_nxt == place(400) and sent.history.back(100, 100) == TEXT[300:400]
    assert sent.history.size == 100, "one in between was lost"
    assert not sent.over() and sent.fin(place(400)) and sent.over()
    assert sent.verified == sent.released_nxt == place(401) and not sent.fin(place(400))


def test_bytes_that_the_pvm_has_lost_are_taken_over(svm: SvmStream) -> None:
    svm.push(segment(0, 300), 1, BASE, 5000)
    history = History()
    svm.move(120, history)
    assert history.back(120, 120) == TEXT[:120] and text_of(svm) == TEXT[120:300]
    svm.move(500, history)
    assert history.back(300, 300) == TEXT[:300] and not svm.chunks
