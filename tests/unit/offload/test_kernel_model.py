# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path's rules for what it makes, case by case, on its model (tests/sim/offload_model.py),
which the differential test holds equal to the kernel's."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from colo_xdp.abi import FLOW_KEY, OWNER_KERNEL, OWNER_USER, SIDE_PVM, SIDE_SVM, Mode, Reason
from tests.netns.frames import checksum_fits, tcp
from tests.sim.offload_model import MAX_PIECE, SURE_MSS, Conn, Fate, KernelModel, completed

SEQ = 1000
BODY = bytes(i * 7 & 255 for i in range(70_000))
PSH, ACK, URG, ECE, CWR = 0x08, 0x10, 0x20, 0x40, 0x80
MD5 = b"\1\1\x13\x12" + bytes(16)  # RFC 2385
AO = b"\x1d\x10\1\1" + bytes(12)  # RFC 5925
EDGES = [bytes(10) + b"\xff\xff" + bytes((10, 9, 0, x)) for x in (2, 1)]
KEY = FLOW_KEY.pack(*EDGES, struct.pack("!H", 80), struct.pack("!H", 40000), 0)


class Talk:
    """One connection, both guests' bytes from SEQ on, in the fast path."""

    def __init__(self, mss: int = 0) -> None:
        self.k = KernelModel(4)
        self.k.mode, self.k.epoch, self.k.on = Mode.RUN, 1, True
        self.c = self.k.conns[KEY] = Conn(
            owner=OWNER_KERNEL, epoch=1, released=SEQ, next=SEQ, base_seq=SEQ, mss=mss, p_ack=5000,
            s_ack=5000,
            adv_ack=5000, p_win=4096, s_win=4096, adv_win=4096,
        )  # fmt: skip
        self.at = [0, 0]
        self.now = 0

    def say(
        self, side: int, n: int, *, gso: int = 0, flags: int = ACK | PSH, back: int = 0,
        **how: object,
    ) -> Fate:  # fmt: skip
        """The next n bytes of a guest, or n of those `back` before."""
        at = self.at[side] - back
        self.at[side] = max(self.at[side], at + n)
        frame = tcp(BODY[at : at + n], seq=SEQ + at, flags=flags, **how)  # type: ignore[arg-type]
        self.now += 1
        return self.k.fast(side, frame, self.now, gso_size=gso)

    def p(self, *sizes: int, gso: int = 0, flags: int = ACK | PSH) -> None:
        for n in sizes:
            self.say(SIDE_PVM, n, gso=gso, flags=flags)

    def s(self, n: int, gso: int = 0) -> list[int]:
        """What leaves when the SVM says n bytes: the payload of each packet on the wire."""
        sizes, at = [], self.c.released - SEQ
        for out in self.say(SIDE_SVM, n, gso=gso).out:
            body = out.frame[66:]
            assert checksum_fits(completed(out), 34, False)
            assert body == BODY[at : at + len(body)]
            at += len(body)
            size = out.gso_size or len(body)
            sizes += [min(size, len(body) - i) for i in range(0, len(body), size)]
        return sizes


@pytest.fixture
def talk() -> Iterator[Talk]:
    t = Talk()
    yield t
    t.k.close()


def test_segments_of_the_svm_that_are_longer_are_cut(talk: Talk) -> None:
    """The PVM has learnt of a narrower path, the SVM has not: with DF its segments were lost."""
    talk.p(1348, 1348, 1348)
    assert talk.s(1448) == [1348, 100]
    assert talk.s(1448) == [1348, 100]
    assert talk.s(1148) == [1148]


def test_segments_that_a_device_cuts_too(talk: Talk) -> None:
    talk.p(13480, gso=1348)
    assert talk.s(1348 * 4, gso=1348) == [1348] * 4  # as the PVM's: turned whole
    assert talk.s(1448 * 5, gso=1448) == [1348] * 5 + [500]


@pytest.mark.parametrize("how", ["empty", "gso", "full", "repeated"])
def test_the_size_follows_the_pvm_downwards(how: str) -> None:
    talk = Talk(1448)
    try:
        talk.p(1448)
        if how == "empty":  # what waits begins anew
            talk.s(1448)
            talk.p(1348)
        elif how == "gso":  # which says the size
            talk.p(1348 * 4, gso=1348)
        elif how == "full":  # and so does one that ends where no write did
            talk.p(1348, flags=ACK)
        else:  # also where it repeats what was lost
            talk.p(1448)
            assert talk.s(1448) == [1448]
            talk.say(SIDE_PVM, 1348, back=2896, flags=ACK)
            assert talk.s(1448) == [1348, 100]
        assert talk.c.mss == 1348
    finally:
        talk.k.close()


def test_the_end_of_a_burst_says_nothing_of_the_path(talk: Talk) -> None:
    talk.p(1448, 1448, 1)
    assert talk.s(1448) == [1448]
    talk.p(1448)
    assert talk.s(1449) == [1448, 1]
    assert talk.c.mss == 1448


def test_a_short_segment_is_over_with_the_next_longer_one(talk: Talk) -> None:
    talk.p(1448)
    talk.s(1448)
    talk.p(1)
    assert talk.c.mss == SURE_MSS, "no path is narrower, and it has been wider"
    talk.p(1448)
    assert talk.s(1449) == [1448, 1]


def test_nothing_is_thought_certain_that_the_pvm_has_not_shown(talk: Talk) -> None:
    """A client may have announced an MSS of 88 (RFC 9293 3.7.1)."""
    talk.p(88, 88, 40)
    assert talk.s(216) == [88, 88, 40]


def test_jumbo_frames(talk: Talk) -> None:
    talk.p(8948, 8948)
    assert talk.s(8948) == [8948]
    assert talk.s(100) == [100]
    talk.p(8948)
    assert max(talk.s(8949)) == MAX_PIECE


def test_a_fin_goes_with_no_piece(talk: Talk) -> None:
    talk.p(1348)
    talk.say(SIDE_PVM, 100, flags=ACK | 1)
    assert not talk.say(SIDE_SVM, 1448, flags=ACK | 1).reason
    assert talk.c.owner == OWNER_USER


@pytest.mark.parametrize("side", [SIDE_PVM, SIDE_SVM])
@pytest.mark.parametrize(
    "how",
    [
        {"options": MD5}, {"options": AO}, {"flags": ACK | URG, "urgent": 3}, {"flags": ACK | ECE},
        {"flags": ACK | CWR}, {"reserved": 1}, {"reserved": 8},
    ],
)  # fmt: skip
def test_what_belongs_to_one_frame_is_for_user_space(
    talk: Talk, side: int, how: dict[str, object]
) -> None:
    """Signatures, urgent data, congestion signals: no other frame may have them, nor lose them."""
    talk.say(1 - side, 100)
    fate = talk.say(side, 100, **how)  # type: ignore[arg-type]
    assert not fate.reason and not fate.out and talk.c.owner == OWNER_USER
    assert talk.k.counts[Reason.PUNT_EXCEPTION] == 1


def test_an_id_is_lent_only_where_it_means_nothing(talk: Talk) -> None:
    """Without DF a packet may be cut on its way: each needs an id of its own (RFC 6864 4.2)."""
    talk.say(SIDE_PVM, 100, ident=500)
    (out,) = talk.say(SIDE_SVM, 100, ident=900, df=False).out
    assert struct.unpack_from("!HH", out.frame, 18) == (500, 0x4000)
    talk.say(SIDE_PVM, 100, ident=501, df=False)
    assert talk.c.owner == OWNER_USER and talk.k.counts[Reason.PUNT_EXCEPTION] == 1


def test_a_bare_ack_is_not_of_an_ecn_capable_transport(talk: Talk) -> None:
    """RFC 3168 6.1.4; its header is that of a segment which was."""
    talk.say(SIDE_PVM, 100, tos=0xB9, window=5000)
    talk.say(SIDE_SVM, 100, window=4000)
    (out,) = talk.say(SIDE_SVM, 0, window=5000).out
    assert out.frame[15] == 0xB8 and checksum_fits(out.frame, 34, False)
