# SPDX-License-Identifier: GPL-2.0-or-later
"""One TCP connection through the engine: what leaves, and what asks for a checkpoint."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.compare.tcp_secondary import SvmStream
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.engine.journal import Divergence
from colo_xdp.net.packet import parse
from tests.unit import frames as f

MS = 1_000_000
START = 1_000 * MS
SYNACK = f.SYN | f.ACK


class Pair:
    """An engine, the frames that left as indexes of the PVM's frames, and the causes asked."""

    def __init__(self, limits: Limits | None = None, base: int = 1000) -> None:
        self.now, self.released_nxt = START, base
        self.sent: list[Frame] = []
        self.out: list[int] = []
        self.asked: list[str] = []
        self.found: list[Divergence] = []
        self.waits: list[int] = []
        self.e = Engine(
            limits or Limits(),
            Policy(),
            lambda rec: self.out.append(next(i for i, r in enumerate(self.sent) if r is rec)),
            request_checkpoint=lambda d: self.asked.append(d.cause),
            on_wait=self.waits.append,
            on_divergence=self.found.append,
        )

    def p(self, pos: int, data: bytes = b"", flags: int = f.ACK, ack: int = 1, **kw: Any) -> Pair:
        self.now += 1
        rec = Frame(f.tcp(self.released_nxt + pos, ack, data, flags, **kw), self.now)
        self.sent.append(rec)
        self.e.from_pvm(rec, self.now)
        return self

    def s(self, pos: int, data: bytes = b"", flags: int = f.ACK, ack: int = 1, **kw: Any) -> Pair:
        self.now += 1
        raw = f.tcp(self.released_nxt + pos, ack, data, flags, ident=77, **{"win": 600, **kw})
        self.e.from_svm(Frame(raw, self.now), self.e.epoch & 0xFFF, self.now)
        return self

    def wait(self, ms: float) -> Pair:
        self.now += int(ms * MS)
        self.e.tick(self.now)
        return self

    def checkpoint(self) -> Pair:
        self.e.begin_checkpoint()
        self.now += 1
        self.e.commit_checkpoint(self.now, self.e.epoch + 1, self.now + 1)
        self.now += 1
        return self

    def is_now(self, out: list[int], *asked: str) -> Pair:
        assert (self.out, self.asked) == (out, list(asked))
        return self


@pytest.fixture(params=[1000, 0xFFFFFFFE, 0], ids=["plain", "wraps", "zero"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(base=request.param)


def opened(pair: Pair) -> Pair:
    """After the handshake; frame 0 was the SYN-ACK, the stream starts at place 0."""
    pair.p(-1, flags=SYNACK, opts=f.SYN_OPTS).s(5555, flags=SYNACK, opts=f.SYN_OPTS)
    return pair.is_now([0])


def test_equal_data_either_order(pair: Pair) -> None:
    opened(pair).p(0, b"abc").is_now([0]).s(0, b"abc").is_now([0, 1])
    pair.s(3, b"defg").p(3, b"defg", f.ACK | f.PSH).is_now([0, 1, 2])
    assert pair.e.held_packets == pair.e.held_bytes == pair.e.svm_packets == 0
    assert pair.waits == [1, 1, 0]


@pytest.mark.parametrize("cut", [1, 3, 7, 19, 20])
def test_segmentation_is_free(pair: Pair, cut: int) -> None:
    text = bytes(range(20))
    opened(pair).p(0, text)
    for i in range(0, 20, cut):
        assert pair.out == [0]
        pair.s(i, text[i : i + cut])
    pair.is_now([0, 1]).s(20, text)
    for n, i in enumerate(range(0, 20, cut)):
        pair.p(20 + i, text[i : i + cut])
        assert len(pair.out) == 3 + n
    assert pair.e.svm_packets == 0
    pair.wait(4000).is_now(pair.out)  # nothing used up lies about


def test_difference_asks_at_once_and_once(pair: Pair) -> None:
    opened(pair).p(0, b"abcdefgh").s(0, b"ab").s(2, b"cX").is_now([0], "payload_differs")
    d = pair.found[-1]
    e = d.evidence
    assert (d.cause, e.offset, e.at) == (Cause.PAYLOAD_DIFFERS, 3, 3)
    assert (e.pvm, e.svm) == (b"abcdefgh", b"abcX")
    assert e.pvm_frame is not None and b"cX" in e.svm_frame
    assert (d.proto, d.port, d.rule) == ("tcp", 80, "default")
    assert d.flow == "tcp 10.9.0.2:80 > 10.9.0.1:4000"
    pair.p(8, b"more").s(4, b"efghmore").wait(4000).is_now([0], "payload_differs")
    pair.checkpoint().is_now([0, 1, 2], "payload_differs")
    pair.p(12, b"on").s(12, b"on").is_now([0, 1, 2, 3], "payload_differs")


def test_svm_out_of_order_and_overlapping(pair: Pair) -> None:
    opened(pair).s(6, b"ghi").s(3, b"defgh").s(9, b"").is_now([0])
    pair.p(0, b"abcdefghi").is_now([0]).s(0, b"abcd").is_now([0, 1])
    pair.s(0, b"abcd").s(3, b"defghi").wait(4000).is_now([0, 1])
    assert pair.e.counters["svm_retransmit"] == 2


def test_retransmission_is_verified(pair: Pair) -> None:
    opened(pair).p(0, b"abcdef").s(0, b"abcdef").is_now([0, 1])
    pair.p(0, b"abc").p(2, b"cde").p(5, b"f").is_now([0, 1, 2, 3, 4])
    pair.p(3, b"defgh").is_now([0, 1, 2, 3, 4]).s(6, b"gh").is_now([0, 1, 2, 3, 4, 5])
    pair.p(0, b"abX").is_now([0, 1, 2, 3, 4, 5], "payload_differs")


def test_retransmission_older_than_history() -> None:
    pair = opened(Pair(Limits(history_bytes=1000)))
    pair.p(0, bytes(9000)).s(0, bytes(9000)).p(9000, bytes(9000)).s(9000, bytes(9000))
    pair.p(17500, bytes(500)).is_now([0, 1, 2, 3])
    pair.p(0, bytes(500)).wait(3001).is_now([0, 1, 2, 3], "retransmit_unverifiable")
    pair.checkpoint().is_now([0, 1, 2, 3, 4], "retransmit_unverifiable")


def test_a_retransmission_is_verified_by_the_others() -> None:
    """What is older than the history: the SVM gets the same acks and sends it again, too."""
    for svm_first in (False, True):
        pair = opened(Pair(Limits(history_bytes=1000)))
        old = bytes(range(250)) * 36
        pair.p(0, old).s(0, old).p(9000, bytes(9000)).s(9000, bytes(9000)).is_now([0, 1, 2])
        if svm_first:
            pair.s(0, old).is_now([0, 1, 2]).p(500, old[500:1500]).is_now([0, 1, 2, 3])
        else:
            pair.p(500, old[500:1500]).is_now([0, 1, 2]).s(0, old[:500]).is_now([0, 1, 2])
            pair.s(500, old[500:2000]).is_now([0, 1, 2, 3])
    pair.p(0, old[:9] + b"!").is_now([0, 1, 2, 3], "payload_differs")


def test_ack_gate(pair: Pair) -> None:
    opened(pair).p(0, ack=501).wait(1).is_now([0]).s(0, ack=400).is_now([0])
    pair.s(0, ack=501).is_now([0, 1]).s(0, ack=300)  # an older one changes nothing
    pair.p(0, ack=501).p(0, ack=200).is_now([0, 1, 2, 3])
    pair.p(0, b"x", ack=502).s(0, b"x", ack=501).is_now([0, 1, 2, 3])
    pair.wait(2990).is_now([0, 1, 2, 3]).wait(11).is_now([0, 1, 2, 3], "compare_timeout")


def test_ack_gate_over_the_wrap() -> None:
    pair = Pair().s(0, ack=0xFFFFFFF0).p(0, ack=16).is_now([])
    pair.s(0, ack=16).is_now([0]).p(0, ack=0xFFFFFFF0).is_now([0, 1])


def test_padded_ack_then_differing_bytes(pair: Pair) -> None:
    opened(pair).s(0).p(0, opts=b"", pad=True).is_now([0, 1])
    pair.p(0, b"abcdef").s(0, b"ABCDEF").is_now([0, 1], "payload_differs")


def test_keepalive_of_the_pvm_only(pair: Pair) -> None:
    opened(pair).p(0, b"abc").s(0, b"abc").p(2).is_now([0, 1, 2])


def test_syn_options(pair: Pair) -> None:
    other = f.SYN_OPTS.replace(b"\5\xb4", b"\5\xb0")
    pair.p(-1, flags=SYNACK, opts=f.SYN_OPTS).s(9, flags=SYNACK, opts=other)
    pair.is_now([], "syn_options_differ")


def test_syn_needs_the_same_kind_of_syn(pair: Pair) -> None:
    pair.p(-1, flags=SYNACK, ack=7).s(9, flags=f.SYN).s(8, flags=SYNACK, ack=6).is_now([])
    pair.s(10, flags=SYNACK, ack=7).is_now([0])


def test_guest_opened_connection(pair: Pair) -> None:
    pair.p(-1, flags=f.SYN, ack=0).s(9, flags=f.SYN, ack=0).is_now([0])
    pair.p(-1, flags=f.SYN, ack=0).is_now([0, 1])  # sent again: same ISN
    pair.p(0, ack=4).is_now([0, 1]).s(0, ack=4).p(0, b"x", ack=4).s(0, b"x", ack=4)
    pair.is_now([0, 1, 2, 3])


def test_fin(pair: Pair) -> None:
    opened(pair).p(0, b"abc", f.FIN | f.ACK).s(0, b"abc").is_now([0]).s(3, flags=f.FIN | f.ACK)
    pair.is_now([0, 1]).p(0, b"abc", f.FIN | f.ACK).p(3, flags=f.FIN | f.ACK).p(4)
    pair.s(3, flags=f.FIN | f.ACK).wait(4000).is_now([0, 1, 2, 3, 4])


@pytest.mark.parametrize("order", ["ps", "sp"])
def test_fin_at_different_places(pair: Pair, order: str) -> None:
    opened(pair)
    for who in order:
        if who == "p":
            pair.p(0, flags=f.FIN | f.ACK)
        else:
            pair.s(0, b"more")
    pair.is_now([0], "fin_differs")


def test_data_beyond_the_svms_fin(pair: Pair) -> None:
    opened(pair).p(0, b"abcd").s(0, b"ab", f.FIN | f.ACK).is_now([0], "fin_differs")


def test_svm_data_behind_a_released_fin(pair: Pair) -> None:
    opened(pair).p(0, flags=f.FIN | f.ACK).checkpoint().is_now([0, 1])
    pair.s(1, b"more").is_now([0, 1], "fin_differs")


def test_fin_of_the_svm_only(pair: Pair) -> None:
    opened(pair).s(0, flags=f.FIN | f.ACK).wait(2999).is_now([0]).wait(2).is_now([0], "svm_ahead")


def test_rst_needs_its_counterpart(pair: Pair) -> None:
    opened(pair).p(0, flags=f.RST | f.ACK, ack=99).is_now([0]).s(0, flags=f.RST | f.ACK, ack=98)
    pair.is_now([0, 1]).p(0, flags=f.RST | f.ACK, ack=99).is_now([0, 1, 2])
    pair.s(0, flags=f.RST | f.ACK, ack=98).s(0, b"x", ack=98).is_now([0, 1, 2])


def test_rst_of_the_pvm_only(pair: Pair) -> None:
    opened(pair).p(0, flags=f.RST).s(0, b"abc").wait(3001).is_now([0], "rst_one_sided")


@pytest.mark.parametrize("order", ["frs", "fsr", "sfr", "fars", "dsr", "ds.r"])
def test_a_fin_and_a_reset_are_the_same_end_as_a_reset(pair: Pair, order: str) -> None:
    """The client's last data came after the PVM's server had closed, and before the SVM's."""
    opened(pair).p(0, b"bye").s(0, b"bye").is_now([0, 1])
    end = 3 + ("d" in order)
    for who in order:
        if who == "f":
            pair.p(end, flags=f.FIN | f.ACK)
        elif who == "d":
            pair.p(3, b"!", flags=f.FIN | f.ACK).s(3, b"!")
        elif who == "a":
            pair.p(end + 1)
        elif who == "r":
            pair.p(end + 1, flags=f.RST)
        elif who == "s":
            pair.s(end, flags=f.RST | f.ACK, ack=31)
        else:
            pair.wait(pair.e.patience.quiet_ns / MS - 2)
    out = list(range(1 + len(order) - order.count(".")))
    pair.is_now(out).wait(9000).is_now(out)
    pair.s(end, flags=f.RST | f.ACK, ack=31).p(end + 1, flags=f.RST).wait(9000)
    assert not pair.asked


@pytest.mark.parametrize(
    ("place", "flags", "then"),
    [
        (3, f.RST | f.ACK, "later"),  # the PVM's does not come
        (2, f.RST | f.ACK, "at once"),  # it has not sent everything
        (4, f.RST | f.ACK, "at once"),  # it has sent more, which was lost
        (3, f.RST, "at once"),  # it answers something: where its stream has ended is not known
    ],
)
def test_a_reset_that_is_another_end_than_a_fin(
    pair: Pair, place: int, flags: int, then: str
) -> None:
    opened(pair).p(0, b"bye").s(0, b"bye").p(3, flags=f.FIN | f.ACK).s(place, flags=flags, ack=31)
    if then == "later":
        quiet = pair.e.patience.quiet_ns / MS
        pair.wait(quiet - 1).is_now([0, 1]).wait(2)
    pair.is_now([0, 1], "rst_one_sided")
    pair.p(4, flags=f.RST)
    assert pair.out == ([0, 1, 2, 3] if place == 3 and flags & f.ACK else [0, 1])


@pytest.mark.parametrize("between", ["fin", "another fin", "text", "urgent"])
def test_what_could_not_leave_behind_a_fin_keeps_it(pair: Pair, between: str) -> None:
    """Both leave, or neither."""
    opened(pair).p(0, b"bye").s(0, b"bye").p(3, flags=f.FIN | f.ACK)
    if between == "fin":
        pair.p(3, flags=f.FIN | f.ACK, ack=40)
    elif between == "another fin":
        pair.p(2, flags=f.FIN | f.ACK)
    elif between == "urgent":
        pair.p(4, flags=0x20 | f.ACK)
    pair.p(4, b"no such process" if between == "text" else b"", flags=f.RST)
    pair.s(3, flags=f.RST | f.ACK, ack=31).is_now([0, 1])
    pair.wait(pair.e.patience.quiet_ns / MS + 1).is_now([0, 1], "rst_one_sided")


def test_a_reset_that_came_late_says_nothing_about_the_svm(pair: Pair) -> None:
    opened(pair).p(0, b"bye").s(0, b"bye").p(3, flags=f.FIN | f.ACK)
    pair.s(3, flags=f.RST | f.ACK, ack=31).wait(14)
    pair.s(3, ack=31).p(4, flags=f.RST).is_now([0, 1, 2, 3])
    assert pair.e.patience.longest_ns < 5 * MS


@pytest.mark.parametrize("how", ["matched", "checkpoint"])
def test_no_room_is_announced_for_what_was_reset(pair: Pair, how: str) -> None:
    pair.e._outbox._send = lambda rec: pair.out.append(parse(rec.frame).flags)
    pair.p(-1, flags=SYNACK, opts=f.SYN_OPTS).s(-1, flags=SYNACK, opts=f.SYN_OPTS)
    pair.s(0, ack=5, win=60).p(0, ack=5, win=600)
    assert pair.e.counters["window_shrunk"] == 1, "the client was told of less"
    pair.p(0, flags=f.RST | f.ACK, ack=5)
    if how == "matched":
        pair.s(0, flags=f.RST | f.ACK, ack=5)
    pair.checkpoint()
    assert pair.out == [SYNACK, f.ACK, f.RST | f.ACK]
    pair.s(7777, flags=SYNACK, ack=5, opts=f.SYN_OPTS)
    assert len(pair.out) == 3


def test_a_reset_of_an_earlier_svm_is_no_end(pair: Pair) -> None:
    opened(pair).p(0, b"bye").s(0, b"bye").s(3, flags=f.RST | f.ACK, ack=31).checkpoint()
    pair.p(3, flags=f.FIN | f.ACK).p(4, flags=f.RST).s(3, ack=31).is_now([0, 1])
    pair.s(3, flags=f.FIN | f.ACK).s(4, flags=f.RST).is_now([0, 1, 2, 3])


def test_a_reset_that_was_matched_is_no_end(pair: Pair) -> None:
    opened(pair).p(0, b"bye").s(0, b"bye").s(3, flags=f.RST | f.ACK, ack=31)
    pair.p(3, flags=f.RST).is_now([0, 1, 2]).p(3, flags=f.FIN | f.ACK).p(4, flags=f.RST)
    pair.s(3, ack=32).is_now([0, 1, 2])


def test_the_reset_of_another_connection_is_no_end_of_this_one(pair: Pair) -> None:
    opened(pair).p(0, b"bye").s(0, b"bye").p(3, flags=f.FIN | f.ACK).p(99_999, flags=f.SYN)
    pair.p(100_000, flags=f.RST).s(3, flags=f.RST | f.ACK, ack=31)
    quiet = pair.e.patience.quiet_ns / MS
    pair.is_now([0, 1]).wait(quiet + 1).is_now([0, 1], "rst_one_sided")


@pytest.mark.parametrize("order", ["ps", "sp"])
def test_rst_against_syn_ack(order: str) -> None:
    pair = Pair()
    for who in order:
        if who == "p":
            pair.p(-1, flags=SYNACK)
        else:
            pair.s(-1000, flags=f.RST | f.ACK)
    pair.is_now([], "rst_one_sided")


def test_rst_of_the_svm_while_data_waits(pair: Pair) -> None:
    opened(pair).p(0, b"abc").s(0, flags=f.RST).is_now([0], "rst_one_sided")


def test_rst_of_the_svm_while_only_an_ack_waits(pair: Pair) -> None:
    opened(pair).p(0, ack=50).s(0, flags=f.RST).is_now([0])
    pair.wait(3001).is_now([0], "compare_timeout")


def test_new_incarnation(pair: Pair) -> None:
    opened(pair).p(0, b"abc", ack=9).s(0, b"abc", ack=9).is_now([0, 1])
    pair.s(7777, flags=SYNACK, ack=5).p(99_999, flags=SYNACK, ack=5).is_now([0, 1, 2])
    pair.p(100_000, b"abc", ack=9).is_now([0, 1, 2]).s(100_000, b"abc", ack=5).is_now([0, 1, 2])
    pair.s(100_003, ack=9).is_now([0, 1, 2, 3])


def late_of_an_old_incarnation(pair: Pair) -> None:
    opened(pair).p(0, b"abc", ack=9).s(0, b"abc", ack=9).is_now([0, 1])
    pair.s(7777, flags=SYNACK, ack=5).p(99_999, flags=SYNACK, ack=5).is_now([0, 1, 2])
    pair.s(3, b"de", ack=5000)  # was long on its way: its numbers are of another stream
    pair.p(100_000, ack=4000).is_now([0, 1, 2]).s(100_000, ack=4000).is_now([0, 1, 2, 3])


def test_late_segments_of_an_old_incarnation_move_nothing(pair: Pair) -> None:
    late_of_an_old_incarnation(pair)


def test_and_the_test_notices_if_they_do(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SvmStream, "is_foreign", lambda *args: False)
    with pytest.raises(AssertionError):
        late_of_an_old_incarnation(pair)


def test_middle_of_an_unknown_connection(pair: Pair) -> None:
    pair.s(3, b"def").s(0, b"abc").p(0).p(0, b"abcd").is_now([0, 1]).p(4, b"ef").is_now([0, 1, 2])


def test_hole_of_the_pvm_is_verified_later(pair: Pair) -> None:
    opened(pair).s(0, b"abcdef").p(3, b"def").is_now([0, 1])  # the first three were lost
    pair.p(0, b"abc").is_now([0, 1, 2]).p(0, b"abX").is_now([0, 1, 2], "payload_differs")


def test_checkpoint_keeps_place_and_forgets_the_svm(pair: Pair) -> None:
    opened(pair).p(0, b"abc", ack=9).s(0, b"abcdef", ack=20).checkpoint().is_now([0, 1])
    pair.p(3, b"def", ack=9).p(6, ack=20).is_now([0, 1])  # said before the checkpoint
    pair.s(3, b"def", ack=9).is_now([0, 1, 2]).s(6, ack=20).is_now([0, 1, 2, 3])
    pair.p(0, b"abc", ack=1).is_now([0, 1, 2, 3, 4])  # history stays


def test_partly_verified_frame_begins_again(pair: Pair) -> None:
    opened(pair).p(0, b"abcdef").s(0, b"abc").is_now([0])
    stop = pair.sent[1].ts_ns - 1  # the STOP was before this frame
    pair.e.commit_checkpoint(stop, 1, pair.now)
    pair.is_now([0]).s(3, b"def").is_now([0]).s(0, b"abX").is_now([0], "payload_differs")


def test_idle_connection_survives_checkpoints(pair: Pair) -> None:
    opened(pair).p(0, b"abc").s(0, b"abc").checkpoint().checkpoint()
    pair.s(3, b"d").p(3, b"d").is_now([0, 1, 2])


def test_svm_handshake_sent_again_after_a_checkpoint(pair: Pair) -> None:
    opened(pair).checkpoint().s(-1, flags=SYNACK, opts=f.SYN_OPTS).wait(4000).is_now([0])
    pair.p(0, b"a").s(0, b"a").is_now([0, 1])


def test_svm_data_ahead_times_out_once(pair: Pair) -> None:
    opened(pair).s(0, b"abc").wait(2999).is_now([0]).wait(2).wait(5000).is_now([0], "svm_ahead")


def test_stream_full() -> None:
    pair = opened(Pair(Limits(max_stream_bytes=1000)))
    pair.s(0, bytes(600)).is_now([0]).s(600, bytes(600)).is_now([0], "stream_full")
    assert pair.e.svm_packets == 1


def test_one_64k_frame_against_mss_pieces() -> None:
    pair = opened(Pair())
    text = bytes(i % 251 for i in range(64000))
    pair.p(0, text)
    for i in range(0, 64000, 1448):
        pair.s(i, text[i : i + 1448])
    pair.is_now([0, 1])


def test_vlan_and_ipv6_are_compared() -> None:
    for kw in ({"v6": True}, {"tags": b"\x81\0\0\7"}):
        pair = Pair().p(0, b"abc", **kw).s(0, b"abX").is_now([])  # another flow
        pair.s(0, b"abX", **kw).is_now([], "payload_differs")


PRIORITY = b"\x81\0\xa0\0"  # 5, no VLAN


@pytest.mark.parametrize("vlan", [b"", b"\x81\0\0\7"])
def test_a_segment_with_another_priority_is_one_of_the_same_stream(vlan: bytes) -> None:
    """A guest tells a switch what is urgent; where its segments end is its own affair."""
    urgent = {"tags": vlan[:2] + b"\xa0\7" if vlan else PRIORITY}
    plain = {"tags": vlan}
    pair = Pair()
    for send in (pair.p, pair.s):
        send(-1, flags=SYNACK, opts=f.SYN_OPTS, **plain)
    pair.p(0, b"abc", **urgent).p(3, b"def", **plain).s(0, b"abcd", **plain)
    pair.is_now([0, 1]).s(4, b"ef", **urgent).is_now([0, 1, 2]).wait(4000).is_now([0, 1, 2])
    assert [r.frame[12 : 12 + len(urgent["tags"])] for r in pair.sent[1:2]] == [urgent["tags"]]
    pair.p(6, b"x", **urgent).s(6, b"y", **plain).is_now([0, 1, 2], "payload_differs")


class Windows:
    """An opened connection with window scale 7; what leaves, as (ack, scaled window, payload)."""

    def __init__(self, *, partial: bool = False, opened: bool = True) -> None:
        self.now, self.partial = START, partial
        self.left: list[tuple[int, int, bytes]] = []
        self.e = Engine(
            Limits(),
            Policy(),
            self._release,
            request_checkpoint=lambda d: pytest.fail(f"{d}"),
            on_wait=lambda ns: None,
        )
        if opened:
            self.send(True, -1, flags=SYNACK, opts=f.SYN_OPTS)
            self.send(False, -1, flags=SYNACK, opts=f.SYN_OPTS)
            self.left.clear()

    def _release(self, rec: Frame) -> None:
        p = parse(rec.frame)
        assert not p.defect
        if not rec.partial:
            l4 = rec.frame[p.l4 : p.end]
            pseudo = rec.frame[p.l3 + 12 : p.l3 + 20] + struct.pack("!HH", 6, len(l4))
            assert checksum(pseudo + l4 + b"\0" * (len(l4) % 2)) == 0xFFFF
        self.left.append((p.ack, p.window << 7, rec.frame[p.off : p.end]))

    def send(self, pvm: bool, pos: int, data: bytes = b"", **kw: Any) -> None:
        self.now += 1
        frame = with_checksum(
            f.tcp(1000 + pos, kw.pop("ack", 1), data, kw.pop("flags", f.ACK), **kw)
        )
        rec = Frame(frame, self.now, 0, self.partial)
        if pvm:
            self.e.from_pvm(rec, self.now)
        else:
            self.e.from_svm(rec, self.e.epoch & 0xFFF, self.now)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def with_checksum(frame: bytes) -> bytes:
    p = parse(frame)
    raw = bytearray(frame)
    raw[p.l4 + 16 : p.l4 + 18] = b"\0\0"
    l4 = bytes(raw[p.l4 : p.end])
    pseudo = frame[p.l3 + 12 : p.l3 + 20] + struct.pack("!HH", 6, len(l4))
    total = checksum(pseudo + l4 + b"\0" * (len(l4) % 2))
    struct.pack_into("!H", raw, p.l4 + 16, 0xFFFF & ~total)
    return bytes(raw)


def test_no_more_window_than_the_svm_offers() -> None:
    w = Windows()
    w.send(False, 0, ack=1001, win=10)
    w.send(True, 0, ack=1001, win=100)
    assert w.left == [(1001, 1280, b"")]
    # The SVM's right edge counts, not its window: it had acked less when it said so.
    w.send(False, 0, ack=3001, win=4)
    w.send(True, 0, b"abc", ack=2001, win=100)
    w.send(False, 0, b"abc", ack=3001, win=4)
    assert w.left[1:] == [(2001, (3001 + 4 * 128 - 2001) >> 7 << 7, b"abc")]


def test_the_edge_never_moves_back() -> None:
    w = Windows()
    w.send(False, 0, ack=1001, win=100)
    w.send(False, 0, ack=2001, win=0)  # the application is slow: same edge or less
    w.send(True, 0, ack=2001, win=100)
    assert w.left == [(2001, (1001 + 12800 - 2001) >> 7 << 7, b"")]


def test_the_client_is_told_when_the_svm_has_room_again() -> None:
    w = Windows()
    w.send(False, 0, ack=1001, win=0)
    w.send(True, 0, ack=1001, win=100)
    assert w.left == [(1001, 0, b"")]
    w.send(False, 0, ack=1001, win=5)  # too little to be worth a frame
    assert len(w.left) == 1
    w.send(False, 0, ack=1001, win=40)
    assert w.left[1:] == [(1001, 40 * 128, b"")]
    w.send(False, 0, ack=1001, win=200)
    assert w.left[2:] == [(1001, 100 * 128, b"")], "never more than the PVM has offered"
    w.send(False, 0, ack=1001, win=400)
    assert len(w.left) == 3


def test_a_checkpoint_makes_the_pvms_promise_the_svms() -> None:
    w = Windows()
    w.send(False, 0, ack=1001, win=10)
    w.send(True, 0, ack=1001, win=100)
    w.e.begin_checkpoint()
    w.e.commit_checkpoint(w.now, 1, w.now + 1)
    w.now += 2
    w.send(True, 0, b"new", ack=1001, win=100)
    w.send(False, 0, b"new", ack=1001, win=1)
    assert w.left[-1] == (1001, 12800, b"new")


def test_a_partial_checksum_stays_the_pseudo_headers() -> None:
    w = Windows(partial=True)
    w.send(False, 0, ack=1001, win=10)
    w.send(True, 0, ack=1001, win=100)
    assert w.left == [(1001, 1280, b"")]


def test_windows_are_compared_as_they_are_when_the_scale_is_unknown() -> None:
    w = Windows(opened=False)
    w.send(False, 0, ack=1001, win=10)
    w.send(True, 0, ack=1001, win=100)
    assert w.left == [(1001, 1280, b"")]
    w.send(False, 0, ack=1001, win=15)
    assert len(w.left) == 1  # not worth a frame
    w.send(False, 0, ack=1001, win=30)
    assert w.left[1:] == [(1001, 3840, b"")]
    w.send(False, 0, ack=2001, win=90)
    w.send(True, 0, b"abc", ack=1501, win=95)
    w.send(False, 0, b"abc", ack=2001, win=90)
    assert w.left[3:] == [(1501, 90 * 128, b"abc")]
    w.e.begin_checkpoint()
    w.e.commit_checkpoint(w.now, 1, w.now + 1)
    w.now += 2
    w.send(True, 3, ack=1501, win=95)  # the SVM is a copy of a PVM that offered this
    assert w.left[-1] == (1501, 95 * 128, b"")
