# SPDX-License-Identifier: GPL-2.0-or-later
"""When the engine gives a connection to the fast path, and what it does while it is not taken."""

from __future__ import annotations

import inspect
import struct
from collections import Counter
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.compare.tcp import TcpFlow
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.engine.journal import Divergence
from colo_xdp.net.flow_key import FlowKey
from colo_xdp.net.packet import parse
from colo_xdp.offload import scheduler
from colo_xdp.offload import tcp as offload_tcp
from colo_xdp.offload import udp as offload_udp
from colo_xdp.offload.kernel_format import (
    ConnState,
    NoKernelPath,
    OffloadRequest,
    OffloadResult,
    known,
)
from colo_xdp.offload.offloaded import OffloadedFlow
from colo_xdp.offload.scheduler import (
    AGAIN,
    BACKPRESSURE_AFTER,
    BACKPRESSURE_FRAMES,
    BACKPRESSURE_NS,
    BACKPRESSURE_STREAMS,
    MAX_BACKOFF,
    OFFER_AFTER,
    OFFER_BYTES,
    RETRY,
)
from tests.unit import frames as f

S = 1_000_000_000


class Busy(NoKernelPath):
    """Takes a connection only if there is no frame on its way."""

    def __init__(self) -> None:
        self.enabled = True
        self.answer = OffloadResult.IN_FLIGHT
        self.asked = 0
        self.taken: list[OffloadRequest] = []

    def offer(self, key: FlowKey) -> bool:
        return True

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        self.asked += 1
        if self.answer is OffloadResult.ACCEPTED:
            self.taken.append(request)
        return self.answer

    def reclaim(self, key: FlowKey) -> ConnState | None:
        """What was given last, of which nothing is outstanding."""
        if not self.taken:
            return None
        epoch, rel, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss, *_, cookie = (
            abi.OFFLOAD.unpack(self.taken[-1].state)
        )
        return ConnState(
            abi.OWNER_USER, epoch, rel, 0, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss, True,
            False, b"", 0, 0, 0, cookie, b"", b"",
        )  # fmt: skip


class Pair:
    def __init__(self) -> None:
        self.now = 10 * S
        self.at: Counter[int] = Counter()
        self.out: list[bytes] = []
        self.asked: list[Divergence] = []
        self.fast = Busy()
        self.e = Engine(
            Limits(), Policy(), lambda rec: self.out.append(rec.frame),
            request_checkpoint=self.asked.append, on_wait=lambda ns: None, fast=self.fast,
        )  # fmt: skip

    def next(self, sport: int = 80, size: int = 4) -> bytes:
        """The next segment of a connection."""
        at = self.at[sport]
        self.at[sport] += size
        return f.tcp(at, 1, (b"%04d" % at).ljust(size), sport=sport)

    def pvm(self, raw: bytes, punt_seq: int = 0) -> None:
        self.e.from_pvm(Frame(raw, self.now, punt_seq=punt_seq), self.now)

    def svm(self, raw: bytes, punt_seq: int = 0) -> None:
        self.e.from_svm(Frame(raw, self.now, punt_seq=punt_seq), self.e.epoch & 0xFFF, self.now)

    def end(self) -> None:
        """Of a batch."""
        self.e.flush(self.now)

    def both(self, sport: int = 80, size: int = 4) -> bytes:
        """The same segment of both guests; a batch of its own."""
        raw = self.next(sport, size)
        self.now += 10_000
        self.pvm(raw)
        self.svm(raw)
        self.end()
        return raw

    def until_backpressure(self) -> list[bytes]:
        """What was sent until frames are kept back, the last of it being the first of those."""
        sent: list[bytes] = []
        for _ in range(10 * (OFFER_AFTER + BACKPRESSURE_AFTER * RETRY)):
            sent.append(self.both())
            if len(self.out) < len(sent):
                return sent
        raise AssertionError("never")


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_settled_connection_is_given(pair: Pair) -> None:
    pair.fast.answer = OffloadResult.ACCEPTED
    while not pair.fast.taken:
        pair.both()
        assert pair.at[80] < 400
    assert pair.at[80] > 4 * OFFER_AFTER, "not a connection of a few frames"
    assert not pair.e.counters["offload_backpressured"]


def test_one_that_has_sent_much_is_offloaded_sooner(pair: Pair) -> None:
    pair.fast.answer = OffloadResult.ACCEPTED
    segments = 0
    while not pair.fast.taken:
        pair.both(size=1400)
        segments += 1
        assert segments < 400
    assert OFFER_BYTES <= pair.at[80] < OFFER_BYTES + 4 * 1400
    assert segments < OFFER_AFTER


def test_a_busy_one_is_kept_back_until_it_is_taken(pair: Pair) -> None:
    sent = pair.until_backpressure()
    pair.fast.answer = OffloadResult.ACCEPTED
    sent.append(pair.both())
    assert len(pair.fast.taken) == 1 and pair.out == sent
    assert pair.e.counters["offload_backpressured"] == 1


def test_but_not_for_long(pair: Pair) -> None:
    sent = pair.until_backpressure()
    assert pair.e.tick_ns() <= pair.now, "it has to be looked at soon"
    pair.now += BACKPRESSURE_NS
    pair.e.tick(pair.now)
    assert pair.out == sent and not pair.fast.taken
    assert pair.e.tick_ns() > pair.now
    tries = pair.fast.asked
    for _ in range(AGAIN):
        sent.append(pair.both())
        assert pair.out == sent
    assert pair.fast.asked == tries, "it is left alone for a while"


def test_each_time_in_vain_allows_the_next_one_longer_and_later(pair: Pair) -> None:
    """A window of small frames takes the slow path longer than the first time allows."""
    times, pauses = [], []
    for _ in range(7):
        count, sent = pair.e.counters["offload_backpressured"], 0
        while pair.e.counters["offload_backpressured"] == count:
            pair.both()
            sent += 1
            assert sent < 2 * MAX_BACKOFF, "it is never given up for good"
        pauses.append(sent)
        start = pair.now
        pair.both()
        while pair.e.held_packets:
            pair.now += 1_000_000
            pair.e.tick(pair.now)
        times.append(pair.now - start)
    assert [t // 10_000_000 for t in times[:2]] == [2, 4]
    assert {t // 10_000_000 for t in times[2:]} == {8}
    assert pauses[1:] == sorted(pauses[1:]) and AGAIN < pauses[1] < pauses[2]
    assert MAX_BACKOFF <= pauses[-1] == pauses[-2]


def test_and_not_many_frames(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pair.until_backpressure()
    monkeypatch.setattr(scheduler, "BACKPRESSURE_FRAMES", 20)
    for _ in range(20):
        pair.now -= 10_000  # no time goes by
        sent.append(pair.both())
    assert pair.out == sent


@pytest.mark.parametrize("what", ["checkpoint", "solo", "shadow"])
def test_what_is_kept_back_leaves_before_anything_else_happens(pair: Pair, what: str) -> None:
    sent = pair.until_backpressure()
    if what == "checkpoint":
        pair.e.begin_checkpoint()
    elif what == "solo":
        pair.e.release_all()
    else:
        pair.e.set_shadow(True, pair.now)
    assert pair.out == sent
    assert not pair.asked


def test_what_is_kept_back_is_held(pair: Pair) -> None:
    sent = pair.until_backpressure()
    for _ in range(3):
        sent.append(pair.both())
    kept = sent[len(pair.out) :]
    assert len(kept) == 4
    assert pair.e.held_packets == 4 and pair.e.held_bytes == sum(len(x) for x in kept)
    pair.e.end_backpressure(pair.now)
    assert pair.out == sent
    assert pair.e.held_packets == pair.e.held_bytes == 0


def test_nor_many_bytes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pair.until_backpressure()
    monkeypatch.setattr(scheduler, "BACKPRESSURE_BYTES", 2 * len(sent[-1]))
    sent.append(pair.both())
    assert len(pair.out) == len(sent) - 2
    sent.append(pair.both())
    assert pair.out == sent


def test_nor_of_many_connections(pair: Pair) -> None:
    ports = range(1, BACKPRESSURE_STREAMS + 10)
    for _ in range(OFFER_AFTER + 2 * BACKPRESSURE_AFTER * RETRY):
        for port in ports:
            pair.both(port)
            pair.now -= 10_000  # no time goes by
    assert pair.e.counters["offload_backpressured"] == BACKPRESSURE_STREAMS
    assert pair.e.held_packets <= BACKPRESSURE_STREAMS * (BACKPRESSURE_FRAMES + 1)
    for _ in range(2 * BACKPRESSURE_AFTER * RETRY):
        for port in ports:
            pair.both(port)
        pair.now += BACKPRESSURE_NS
        pair.e.tick(pair.now)
    assert pair.e.counters["offload_backpressured"] == len(ports), "the others have their turn"


def test_backpressure_is_for_frames_on_their_way_only(pair: Pair) -> None:
    pair.fast.answer = OffloadResult.UNAVAILABLE  # no buffer is free
    sent = [pair.both() for _ in range(OFFER_AFTER + 20 * BACKPRESSURE_AFTER * RETRY)]
    assert pair.fast.asked > 3 * BACKPRESSURE_AFTER
    assert pair.out == sent and not pair.e.counters["offload_backpressured"]


def test_a_frame_that_the_fast_path_has_not_counted_reclaims_nothing(pair: Pair) -> None:
    """It went here as the connection was locked; there may be more of them."""
    pair.fast.answer = OffloadResult.ACCEPTED
    while not pair.fast.taken:
        pair.both()
    pair.now += S  # a long stay each: it may go back at once
    raw = pair.next()
    pair.pvm(raw, 7)
    pair.svm(raw, 8)
    pair.end()
    assert len(pair.fast.taken) == 2
    pair.now += S
    raw = pair.next()
    pair.pvm(raw)
    pair.end()
    assert len(pair.fast.taken) == 2
    pair.svm(raw, 9)
    pair.end()
    assert len(pair.fast.taken) == 3 and pair.out[-1] == raw
    assert pair.e.counters["offload_reclaimed"] == 2


def test_a_priority_tag_is_not_for_the_fast_path() -> None:
    """The connection is one without tags, this frame of it has one. What IP's version is read from
    must not be the tag, nor may IP options make up for the tag's length."""
    for tag in (b"\x81\0\x40\0", b"\x81\0\xa0\0", b"\x88\xa8\x60\0\x81\0\0\0"):
        for options in range(0, 41, 4):
            ip = {"options": bytes([1]) * options}
            tcp = parse(f.ip4(6, f.segment(1, 1, b"abc"), tags=tag, **ip))
            udp = parse(f.ip4(17, struct.pack("!HHHH", 53, 4000, 11, 0) + b"abc", tags=tag, **ip))
            assert known(tcp.key) and known(udp.key)
            assert not offload_tcp._plain(tcp) and not offload_udp._plain(udp)
    assert offload_tcp._plain(parse(f.tcp(1, 1, b"abc")))
    assert offload_udp._plain(parse(f.udp(b"abc")))


NEXT = parse(f.tcp(0, 1, b"next", sport=80))
CALLS: dict[str, tuple[Any, ...]] = {
    "pvm": (Frame(NEXT.frame, 0), NEXT, 0),
    "svm": (NEXT, 0),
    "commit": (NEXT,),
    "release_ready": (0,),
    "pvm_in_checkpoint": (Frame(NEXT.frame, 0), NEXT, 0),
    "catch_up": (Frame(NEXT.frame, 0), NEXT, 0),
    "miss": (),
    "unhold": (),
    "defer": (),
    "forget_svm": (),
    "new_epoch": (1,),
    "judged": (Policy().verdicts[0],),
    "expire": (0,),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_call_to_an_offloaded_connection_reclaims_it(
    pair: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.fast.answer = OffloadResult.ACCEPTED
    while not pair.fast.taken:
        pair.both()
    table, reclaimed = pair.e._flows.tcp, pair.e.counters["offload_reclaimed"]
    ((key, offloaded),) = table.items()
    assert isinstance(offloaded, OffloadedFlow) and offloaded.key == key
    assert (
        offloaded.quiet() and offloaded.closed() and not offloaded.held and not offloaded.bypassed
    )
    assert offloaded.stands_for(offloaded.flow) and offloaded.epoch == pair.e.epoch
    offloaded.outdate(1)
    assert table[key] is offloaded and pair.e.counters["offload_reclaimed"] == reclaimed
    passed_on = []
    monkeypatch.setattr(TcpFlow, name, lambda self, *args: passed_on.append((self, args)))
    getattr(offloaded, name)(*CALLS[name])
    assert passed_on == [(offloaded.flow, CALLS[name])]
    assert table[key] is offloaded.flow and pair.e.counters["offload_reclaimed"] == reclaimed + 1
    getattr(offloaded, name)(*CALLS[name])  # by somebody who has not noticed
    assert len(passed_on) == 2 and pair.e.counters["offload_reclaimed"] == reclaimed + 1


def test_every_call_is_tried() -> None:
    looks = {"quiet", "closed", "stands_for", "outdate", "removed", "reclaim", "__init__"}
    calls = {n for n, what in vars(OffloadedFlow).items() if inspect.isfunction(what)}
    assert calls - looks == set(CALLS)
