# SPDX-License-Identifier: GPL-2.0-or-later
"""What segments say besides bytes: signatures, urgent data, ECN, ids. Through the engine."""

from __future__ import annotations

import hashlib
import struct

import pytest

from colo_xdp.compare.tcp import TcpFlow
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.net.packet import Packet, parse
from colo_xdp.net.tcp_headers import ip_id
from colo_xdp.offload.tcp import TcpCodec
from tests.netns.frames import csum, tcp
from tests.unit.net.test_segment import checksum_right, wire_ids

MS = 1_000_000
PSH, ACK, URG, ECE, CWR, SYN = 0x08, 0x10, 0x20, 0x40, 0x80, 0x02
SYN_OPTIONS = b"\2\4\5\xb4\1\3\3\0"
BODY = bytes(i * 7 & 255 for i in range(20_000))
KEY = b"a password"


class Pair:
    """Both guests' frames by the place of their bytes; sequence numbers begin at 1000."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.now, self.out, self.asked = 1_000 * MS, [], []  # type: ignore[var-annotated]
        self.e = Engine(
            limits or Limits(), Policy(), self.out.append,
            request_checkpoint=lambda d: self.asked.append(str(d.cause)), on_wait=lambda ns: None,
        )  # fmt: skip

    def p(self, at: int, n: int = 0, gso: int = 0, **how: object) -> Pair:
        self.now += MS
        frame = tcp(BODY[at : at + n], seq=1000 + at, **how)  # type: ignore[arg-type]
        self.e.from_pvm(Frame(frame, self.now, gso), self.now)
        self.e.flush(self.now)
        return self

    def s(self, at: int, n: int = 0, **how: object) -> Pair:
        self.now += MS
        frame = tcp(BODY[at : at + n], seq=1000 + at, **how)  # type: ignore[arg-type]
        self.e.from_svm(Frame(frame, self.now), self.e.epoch & 0xFFF, self.now)
        self.e.flush(self.now)
        return self

    def wait(self, ms: int) -> Pair:
        for _ in range(ms // 10):
            self.now += 10 * MS
            self.e.tick(self.now)
        return self

    def checkpoint(self) -> Pair:
        self.e.begin_checkpoint()
        self.now += MS
        self.e.commit_checkpoint(self.now, self.e.epoch + 1, self.now)
        return self

    def took(self) -> list[Packet]:
        """What has left since the last time."""
        out = [parse(r.frame) for r in self.out]
        assert all(checksum_right(r) for r in self.out)
        self.out.clear()
        return out

    @property
    def stream(self) -> TcpFlow:
        (st,) = self.e._tcp.values()
        assert isinstance(st, TcpFlow)
        return st


def opened(isn_s: int = 999, limits: Limits | None = None, **how: object) -> Pair:
    """After both SYN-ACKs."""
    pair = Pair(limits)
    k = {"flags": SYN | ACK, "options": SYN_OPTIONS} | how
    pair.p(-1, **k).s(isn_s - 1000, **k)
    assert len(pair.took()) == 1
    return pair


# -- signatures


def md5(at: int, n: int, **how: object) -> bytes:
    """The option for such a frame: RFC 2385 2.0, over pseudo header, header, data and key."""
    frame = tcp(BODY[at : at + n], seq=1000 + at, options=b"\1\1\x13\x12" + bytes(16), **how)  # type: ignore[arg-type]
    p = parse(frame)
    head = bytearray(frame[p.l4 : p.l4 + 20])
    head[16:18] = b"\0\0"
    pseudo = frame[26:34] + struct.pack("!HH", 6, p.end - p.l4)
    return b"\1\1\x13\x12" + hashlib.md5(pseudo + head + frame[p.off : p.end] + KEY).digest()


def is_right(p: Packet) -> bool:
    at = p.seq - 1000
    same = {"ack": p.ack, "flags": p.flags, "window": p.window}
    return p.frame[p.l4 + 20 : p.off] == md5(at, p.end - p.off, **same)


def signed(pair: Pair, side: str, at: int, n: int, **how: object) -> None:
    (pair.p if side == "p" else pair.s)(at, n, options=md5(at, n, **how), **how)


def test_a_signed_connection_leaves_as_the_pvm_made_it() -> None:
    """Also where the SVM's window is smaller, and where it grows again."""
    pair = opened(options=SYN_OPTIONS[:4] + md5(0, 0))
    for i in range(3):
        signed(pair, "p", 100 * i, 100, window=500)
        signed(pair, "s", 100 * i, 100, window=400)
    signed(pair, "s", 300, 0, flags=ACK, window=65000)
    left = pair.took()
    assert [(p.seq, p.window) for p in left] == [(1000, 500), (1100, 500), (1200, 500)]
    assert all(map(is_right, left)) and not pair.asked
    assert pair.e.counters["signed_connections"] == 1
    assert not TcpCodec().ready(pair.stream), "the fast path puts headers over other frames"


def test_a_signed_connection_that_is_older_than_the_controller() -> None:
    pair = Pair()
    signed(pair, "p", 0, 100, window=500)
    signed(pair, "s", 0, 50, window=400)
    assert not pair.took()
    signed(pair, "s", 50, 50, window=400)
    (p,) = pair.took()
    assert is_right(p) and not pair.asked


def test_a_signed_frame_whose_rest_does_not_come() -> None:
    """The SVM may wait for an ack of its part (RFC 9293 3.7.4): not for all of compare_timeout."""
    pair = opened(options=SYN_OPTIONS[:4] + md5(0, 0))
    signed(pair, "p", 0, 200)
    signed(pair, "s", 0, 100)
    pair.wait(150)
    assert not pair.asked
    pair.wait(60)
    assert pair.asked == ["signed_connection"] and not pair.took()
    pair.checkpoint()
    (p,) = pair.took()
    assert is_right(p)
    pair.wait(9000)
    assert pair.asked == ["signed_connection"]


def test_a_svm_that_cannot_take_what_the_client_signs() -> None:
    """It has another ISN, so the secondary's host translates, and the signature is wrong. One
    checkpoint at once; from then on both guests have the same numbers."""
    pair = opened(isn_s=777_000, options=SYN_OPTIONS[:4] + md5(0, 0))
    signed(pair, "p", 0, 100)
    assert pair.asked == ["signed_connection"] and not pair.took()
    pair.checkpoint()
    assert len(pair.took()) == 1
    signed(pair, "p", 100, 100)
    signed(pair, "s", 100, 100)
    pair.wait(9000)
    assert len(pair.took()) == 1 and pair.asked == ["signed_connection"]


def test_an_unsigned_connection_on_the_same_ports_is_an_ordinary_one() -> None:
    pair = opened(isn_s=777_000, options=SYN_OPTIONS[:4] + md5(0, 0))
    pair.checkpoint()
    k = {"flags": SYN | ACK, "options": SYN_OPTIONS}
    pair.p(8999, **k).s(50_000, **k)
    pair.p(9000, 200).s(9000, 100).wait(10)
    assert [p.end - p.off for p in pair.took()] == [0, 100] and not pair.asked
    assert not pair.stream.marks.signed


# -- urgent data


def test_urgent_data_may_be_overtaken_by_more_of_it() -> None:
    """A guest that has more to say says so with the later place only (RFC 9293 3.8.5)."""
    pair = opened()
    u = ACK | PSH | URG
    pair.s(0, 10, flags=u, urgent=10).s(10, 10, flags=u, urgent=10)
    pair.p(0, 20, flags=u, urgent=20)
    assert len(pair.took()) == 1 and not pair.asked
    assert not pair.stream.theirs.svm_urgent
    pair.p(20, 5).s(20, 5)
    assert len(pair.took()) == 1
    assert TcpCodec().ready(pair.stream)


def test_what_the_svm_calls_urgent_leaves_in_no_part() -> None:
    pair = opened()
    pair.p(0, 3000, gso=1448).s(0, 1448, flags=ACK | URG, urgent=1400)
    pair.wait(20)
    assert not pair.took() and pair.asked == ["urgent_differs"]


def test_urgent_data_that_a_checkpoint_contains_may_be_repeated() -> None:
    pair = opened()
    u = ACK | PSH | URG
    pair.p(0, 10, flags=u, urgent=10).checkpoint()
    pair.p(0, 10, flags=u, urgent=10).s(0, 10, flags=u, urgent=10)
    assert len(pair.took()) == 2
    pair.wait(9000)
    assert not pair.asked


def test_a_svm_that_has_said_urgent_and_no_byte_yet() -> None:
    pair = opened()
    pair.s(0, flags=ACK | URG, urgent=5).s(0, 4)
    assert not TcpCodec().ready(pair.stream)
    pair.p(0, 10)
    assert pair.asked == ["urgent_differs"]


# -- ECN


@pytest.mark.parametrize(
    ("syn_ack", "counts"),
    [({}, False), ({"flags": SYN | ACK | ECE}, False), ({"flags": SYN | ACK | CWR}, True)],
)
def test_cwr_in_parts(syn_ack: dict[str, int], counts: bool) -> None:
    """ECN: with the first only (RFC 3168 6.1.2). AccECN: a digit of a number (RFC 9768 3.2.2)."""
    pair = opened(**syn_ack)
    pair.p(0, 2896, gso=1448, flags=ACK | CWR).s(0, 1448).s(1448, 1448)
    assert [p.flags & CWR for p in pair.took()] == [CWR, CWR if counts else 0]


def test_cwr_of_a_connection_of_which_the_answer_is_not_known() -> None:
    """The guest has asked for AccECN; the answer is a client's frame, which nobody here sees."""
    pair = Pair()
    k = {"flags": SYN | ECE | CWR, "reserved": 1, "options": SYN_OPTIONS, "ack": 0}
    pair.p(-1, **k).s(-1, **k)
    pair.p(0, 2896, gso=1448, flags=ACK | CWR).s(0, 1448)
    pair.wait(20)
    assert len(pair.took()) == 1, "the SYN"
    pair.s(1448, 1448)
    assert len(pair.took()) == 1
    pair.p(2896, 2896, gso=1448, flags=ACK | ECE, reserved=1).s(2896, 1448)
    assert len(pair.took()) == 1, "AE tells"
    pair.s(4344, 1448).p(5792, 2896, gso=1448, flags=ACK | CWR).s(5792, 2896 - 1)
    assert [p.flags & CWR for p in pair.took()] == [0, CWR]


# -- ids


def test_ids_of_a_guest_without_df_are_never_twice() -> None:
    pair = opened(df=False)
    ids: list[int] = []
    for i in range(40):
        at, ack = 400 * i, 10_000 + 5000 * i
        pair.p(at, 400, ident=600 + i, df=False, ack=ack)
        for j in range(4):  # in parts, with a smaller window, and told when it grows
            pair.s(at + 100 * j, 100, window=100, ack=ack).wait(10)
        pair.s(at + 400, flags=ACK, ack=ack)
        ids += [i for r in pair.out for i in wire_ids(r)]
        pair.took()
    assert len(ids) > 160 and len(set(ids)) == len(ids)
    assert pair.e.counters["released_in_parts"] > 100 and pair.e.counters["window_updates"] > 10
    assert not set(ids) & set(range(641, 17_000)), "which the guest gives out next"
    assert not TcpCodec().ready(pair.stream)


def test_ids_that_mean_nothing_stay() -> None:
    pair = opened()
    pair.p(0, 200, ident=600).s(0, 100).wait(10).s(100, 100)
    left = pair.took()
    assert [ip_id(p) for p in left] == [600, 600] and csum(left[0].frame[14:34]) == 0xFFFF
    assert TcpCodec().ready(pair.stream)
