# SPDX-License-Identifier: GPL-2.0-or-later
"""The rewriter's rules by scenario: every case where QEMU's filter-rewriter is known to be wrong
or weak must be right here. The kernel does the same; tests/bpf compares the two."""

from __future__ import annotations

import struct

import pytest

from colo_xdp.abi import EPOCH_BASE, Mode, Reason
from colo_xdp.conntrack.rewriter import FIN_CLIENT, FIN_GUEST, HAVE_ISN_C, HAVE_ISN_S, Rewriter
from colo_xdp.conntrack.tcp_state import TcpState
from colo_xdp.net.packet import parse
from tests.netns.frames import csum, tcp
from tests.sim.mutants import REWRITER_MUTANTS

SYN, FIN, RST, ACK = 2, 1, 4, 16
C, P, S = 5_000, 1_000, 77_000  # ISNs of the client, the PVM, the SVM
M = 2**32


def ts(val: int, ecr: int) -> bytes:
    return b"\1\1\x08\x0a" + struct.pack("!II", val, ecr)


class Link:
    """A rewriter with short words; every frame that leaves it has a right checksum."""

    def __init__(self, p: int = P, s: int = S, v6: bool = False) -> None:
        self.r, self.p, self.s, self.v6 = Rewriter(), p, s, v6

    def _out(self, frame: bytes) -> bytes:
        q = parse(frame)
        l4 = frame[q.l4 : q.end]
        addresses = frame[q.l3 + 8 : q.l3 + 40] if self.v6 else frame[q.l3 + 12 : q.l3 + 20]
        assert csum(l4, csum(addresses + struct.pack("!HH", 6, len(l4)))) == 0xFFFF
        return frame

    def c(self, flags: int, seq: int, ack: int = 0, body: bytes = b"", **kw: object) -> bytes:
        frame = tcp(body, seq=seq % M, ack=ack % M, flags=flags, reverse=True, v6=self.v6, **kw)  # type: ignore[arg-type]
        return self._out(self.r.to_svm(frame)[0])

    def g(self, flags: int, seq: int, ack: int = 0, body: bytes = b"", **kw: object) -> bytes:
        frame = tcp(body, seq=seq % M, ack=ack % M, flags=flags, v6=self.v6, **kw)  # type: ignore[arg-type]
        return self._out(self.r.from_svm(frame)[0])

    def tell(self, flags: int, seq: int, ack: int = 0, **kw: object) -> Reason:
        """A copy of a SYN of the PVM."""
        return self.r.note_pvm_header(tcp(seq=seq % M, ack=ack % M, flags=flags, v6=self.v6, **kw))  # type: ignore[arg-type]

    def passive(self) -> Link:
        self.c(SYN, C, options=ts(10, 0))
        self.g(SYN | ACK, self.s, C + 1, options=ts(900, 10))
        self.c(ACK, C + 1, self.p + 1, options=ts(11, 400))
        return self.translates()

    def translates(self, by: int | None = None) -> Link:
        off = (self.s - self.p if by is None else by) % M
        assert ack(self.c(ACK, C + 1, self.p + 1)) == (self.p + 1 + off) % M
        assert seq(self.g(ACK, self.p + 1 + off, C + 1)) == (self.p + 1) % M
        return self

    @property
    def state(self) -> TcpState:
        (flow,) = self.r.flows.values() or self.r.opening.values()
        return TcpState(flow.state)


def seq(frame: bytes) -> int:
    return parse(frame).seq


def ack(frame: bytes) -> int:
    return parse(frame).ack


def stamps(frame: bytes) -> tuple[int, int]:
    a, b = struct.unpack_from("!II", frame, parse(frame).l4 + 24)
    return a, b


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize(
    ("p", "s"), [(P, S), (S, P), (P, 0), (P, M - 256), (M - 1, 5), (P, (P + M // 2) % M), (P, P)]
)
def test_any_offset(p: int, s: int, v6: bool) -> None:
    Link(p, s, v6).passive()


def test_timestamps_of_both_directions() -> None:
    x = Link().passive()
    assert stamps(x.c(ACK, C + 1, P + 1, options=ts(12, 450))) == (12, 950)
    assert stamps(x.g(ACK, S + 1, C + 1, options=ts(960, 12))) == (460, 12)


@pytest.mark.parametrize("pad", [b"\1\1", b"\1", b""], ids=["even", "odd", "none"])
def test_sack_blocks_at_any_place(pad: bytes) -> None:
    x = Link().passive()
    blocks = (P + 100, P + 200, P + 300, P + 400)
    options = pad + b"\5\x12" + struct.pack("!4I", *blocks)
    options += b"\0" * (-len(options) % 4)
    out = x.c(ACK, C + 1, P + 1, options=options)
    got = struct.unpack_from("!4I", out, parse(out).l4 + 20 + len(pad) + 2)
    assert got == tuple(b + S - P for b in blocks)


def test_the_clients_ack_may_come_before_the_svms_syn_ack() -> None:
    x = Link()
    x.c(SYN, C)
    assert ack(x.c(ACK, C + 1, P + 1)) == P + 1  # nothing known yet: untouched
    x.g(SYN | ACK, S, C + 1)
    x.translates()


def test_first_ack_with_data() -> None:
    x = Link()
    x.c(SYN, C)
    x.g(SYN | ACK, S, C + 1)
    assert ack(x.c(ACK, C + 1, P + 1, b"hello")) == S + 1
    x.translates()


def test_syn_again_and_the_guest_begins_anew() -> None:
    x = Link()
    x.c(SYN, C)
    x.g(SYN | ACK, S, C + 1)
    x.c(SYN, C)
    x.g(SYN | ACK, S + 11_000, C + 1)
    x.c(ACK, C + 1, P + 1)
    x.s = S + 11_000
    x.translates()


def test_syn_ack_again_after_established() -> None:
    x = Link().passive()
    x.g(SYN | ACK, S, C + 1)
    x.translates()


def test_a_stray_duplicate_syn_does_no_harm() -> None:
    x = Link().passive()
    x.c(SYN, C)
    x.translates()
    x.c(SYN, C + 999_999)  # not even another client ISN, until the guest takes it
    x.translates()


def test_the_ports_are_used_again() -> None:
    x = Link().passive()
    x.c(SYN, C + 999_999)
    x.g(SYN | ACK, S + 5, C + 1_000_000)
    assert ack(x.c(ACK, C + 1_000_000, 123_457)) == S + 6
    assert seq(x.g(ACK, S + 6, C + 1_000_000)) == 123_457


@pytest.mark.parametrize("flags", [RST, RST | ACK])
def test_resets_are_translated_too(flags: int) -> None:
    x = Link().passive()
    assert seq(x.g(flags, S + 1, C + 1)) == P + 1


def test_reset_in_the_handshake_is_left_alone() -> None:
    x = Link()
    x.c(SYN, C)
    assert seq(x.g(RST | ACK, 0, C + 1)) == 0


def test_the_guest_opens() -> None:
    x = Link()
    assert seq(x.g(SYN, S, options=ts(900, 0))) == S
    out = x.c(SYN | ACK, C, P + 1, options=ts(10, 400))
    assert ack(out) == S + 1 and stamps(out) == (10, 900)
    assert seq(x.g(ACK, S + 1, C + 1)) == P + 1
    x.translates()


def test_midstream_is_left_alone() -> None:
    x = Link()
    assert ack(x.c(ACK, C + 1, P + 1)) == P + 1
    assert seq(x.g(ACK, S + 1, C + 1)) == S + 1
    assert not x.r.flows


def test_a_checkpoint_voids_offsets_also_half_open_ones() -> None:
    x = Link().passive()
    x.r.epoch += 1
    x.translates(by=0)
    y = Link()
    y.c(SYN, C)
    y.g(SYN | ACK, S, C + 1)
    y.r.epoch += 1  # the SVM is a copy of the PVM in SYN_RECEIVED now
    assert ack(y.c(ACK, C + 1, P + 1)) == P + 1
    assert seq(y.g(ACK, P + 1, C + 1)) == P + 1


def test_a_handshake_around_a_checkpoint_is_learnt_under_the_new_epoch() -> None:
    x = Link()
    x.c(SYN, C)
    x.r.epoch += 1
    x.g(SYN | ACK, S, C + 1)
    x.c(ACK, C + 1, P + 1)
    x.translates()


def test_takeover_keeps_old_offsets_and_learns_nothing_new() -> None:
    x = Link().passive()
    x.r.mode = Mode.TAKEOVER
    x.translates()
    fresh = Link()
    fresh.r.mode = Mode.TAKEOVER
    fresh.c(SYN, C)
    fresh.g(SYN | ACK, S, C + 1)
    assert ack(fresh.c(ACK, C + 1, S + 1)) == S + 1
    x.c(SYN, C + 999_999)  # the same ports once more: the client will know the SVM's own ISN
    x.g(SYN | ACK, S + 5, C + 1_000_000)
    assert ack(x.c(ACK, C + 1_000_000, S + 6)) == S + 6


def test_closed_by_the_client() -> None:
    x = Link().passive()
    assert x.state is TcpState.ESTABLISHED
    x.c(FIN | ACK, C + 1, P + 1)
    assert x.state is TcpState.CLOSE_WAIT
    x.g(ACK, S + 1, C + 2)
    x.g(FIN | ACK, S + 1, C + 2)
    assert x.state is TcpState.LAST_ACK
    x.c(ACK, C + 2, P + 1)  # does not cover the FIN
    assert x.state is TcpState.LAST_ACK
    x.c(ACK, C + 2, P + 2)
    assert x.state is TcpState.CLOSED


def test_closed_by_the_guest() -> None:
    x = Link().passive()
    x.g(FIN | ACK, S + 1, C + 1, b"bye")
    assert x.state is TcpState.FIN_WAIT_1
    x.c(ACK, C + 1, P + 4)
    assert x.state is TcpState.FIN_WAIT_1
    x.c(ACK, C + 1, P + 5)
    assert x.state is TcpState.FIN_WAIT_2
    x.c(FIN | ACK, C + 1, P + 5)
    assert x.state is TcpState.TIME_WAIT


def test_closed_by_both_at_once() -> None:
    x = Link().passive()
    x.g(FIN | ACK, S + 1, C + 1)
    x.c(FIN | ACK, C + 1, P + 1)
    assert x.state is TcpState.CLOSING
    x.c(ACK, C + 2, P + 2)
    assert x.state is TcpState.TIME_WAIT


def test_the_first_ack_may_cover_data_if_the_pvm_has_told_its_isn() -> None:
    """The client's first ack was lost between the hosts, the next one covers 100 bytes."""
    x = Link()
    x.c(SYN, C, options=ts(10, 0))
    assert x.tell(SYN | ACK, P, C + 1, options=ts(400, 10)) is Reason.DROP_PVM_SYN
    x.g(SYN | ACK, S, C + 1, options=ts(900, 10))
    out = x.c(ACK, C + 1, P + 101, options=ts(11, 450))
    assert ack(out) == S + 101 and stamps(out) == (11, 950)
    x.translates()


@pytest.mark.parametrize("late", [False, True])
def test_data_on_the_syn_ack(late: bool) -> None:
    x = Link()
    x.c(SYN, C)
    x.g(SYN | ACK, S, C + 1, b"hello")
    if late:
        frame = tcp(seq=C + 1, ack=P + 6, flags=ACK, reverse=True)
        assert x.r.to_svm(frame) == (frame, Reason.PASS_OFFSET_UNKNOWN)
    x.tell(SYN | ACK, P, C + 1)
    assert ack(x.c(ACK, C + 1, P + 6)) == S + 6
    x.translates()


def test_fast_open_of_a_client() -> None:
    """RFC 7413 4.2: the server answers before any ack, and the first one covers the answer."""
    x = Link()
    x.c(SYN, C, 0, b"GET /")
    x.g(SYN | ACK, S, C + 6)
    frame = tcp(seq=C + 6, ack=P + 1001, flags=ACK, reverse=True)
    assert x.r.to_svm(frame) == (frame, Reason.PASS_OFFSET_UNKNOWN), (
        "the PVM's SYN-ACK is late, or lost"
    )
    x.tell(SYN | ACK, P, C + 6)
    assert seq(x.g(ACK, S + 1, C + 6, b"x" * 1000)) == P + 1, "before any ack of the client"
    assert ack(x.c(ACK, C + 6, P + 1001)) == S + 1001
    x.translates()


def test_a_guest_that_has_sent_is_not_learnt_from_acks() -> None:
    x = Link()
    x.c(SYN, C)
    x.g(SYN | ACK, S, C + 1)
    x.g(ACK, S + 1, C + 1, b"banner")
    frame = tcp(seq=C + 1, ack=P + 7, flags=ACK, reverse=True)
    assert x.r.to_svm(frame) == (frame, Reason.PASS_OFFSET_UNKNOWN)
    x.tell(SYN | ACK, P, C + 1)  # as it left, once more
    assert ack(x.c(ACK, C + 1, P + 7)) == S + 7
    x.translates()


@pytest.mark.parametrize("taken", [0, 5])
def test_fast_open_of_the_guest(taken: int) -> None:
    """The server's SYN-ACK may ack the SYN's data, or the SYN alone."""
    x = Link()
    x.g(SYN, S, 0, b"GET /", options=ts(900, 0))
    x.tell(SYN, P, options=ts(400, 0))
    out = x.c(SYN | ACK, C, P + 1 + taken, options=ts(10, 400))
    assert ack(out) == S + 1 + taken and stamps(out) == (10, 900)
    x.translates()
    y = Link()
    y.g(SYN, S, 0, b"GET /")
    frame = tcp(seq=C, ack=P + 1 + taken, flags=SYN | ACK, reverse=True)
    assert y.r.to_svm(frame) == (frame, Reason.PASS_OFFSET_UNKNOWN)


def test_what_the_pvm_tells_of_the_next_connection_is_not_of_this_one() -> None:
    x = Link().passive()
    assert x.tell(SYN | ACK, P + 123_456, C + 1_000_000) is Reason.DROP_PVM_SYN
    x.translates()
    x.c(SYN, C + 999_999)
    x.translates()
    x.g(SYN | ACK, S + 5, C + 1_000_000)
    assert seq(x.g(ACK, S + 6, C + 1_000_000)) == P + 123_457
    assert ack(x.c(ACK, C + 1_000_000, P + 123_457 + 50)) == S + 56


def test_the_next_connection_does_not_end_one_that_was_told() -> None:
    x = Link()
    x.c(SYN, C)
    x.tell(SYN | ACK, P, C + 1)
    x.g(SYN | ACK, S, C + 1)
    x.translates()
    x.tell(SYN | ACK, P + 5, C + 77)
    x.translates()


def test_the_pvm_gave_up_and_began_again() -> None:
    x = Link()
    x.c(SYN, C)
    x.tell(SYN | ACK, P - 999, C + 1)
    x.g(SYN | ACK, S, C + 1)
    x.tell(SYN | ACK, P, C + 1)
    x.translates()


def test_a_syn_ack_that_is_sent_again_keeps_its_number_for_the_primary() -> None:
    """It tells a repetition from another connection by the number."""
    x = Link()
    x.c(SYN, C)
    assert seq(x.g(SYN | ACK, S, C + 1)) == S
    x.tell(SYN | ACK, P, C + 1)
    assert seq(x.g(SYN | ACK, S, C + 1)) == S
    x.r.mode = Mode.TAKEOVER
    assert seq(x.g(SYN | ACK, S, C + 1)) == P, "and now to the client, which knows the PVM's"


def test_after_a_takeover_the_former_pvm_tells_nothing() -> None:
    x = Link()
    x.c(SYN, C)
    x.r.mode = Mode.TAKEOVER
    assert x.tell(SYN | ACK, P, C + 1) is Reason.DROP_PVM_SYN_UNKNOWN
    x.g(SYN | ACK, S, C + 1)
    assert seq(x.g(ACK, S + 1, C + 1)) == S + 1


def test_what_the_pvm_told_before_a_checkpoint_holds_after_it() -> None:
    """A SYN-ACK of the old epoch comes late; the guest, its clone now, sends the same again."""
    x = Link(S, S)
    x.c(SYN, C)
    x.r.epoch += 1
    x.g(SYN | ACK, S, C + 1)
    x.tell(SYN | ACK, S, C + 1)
    x.translates(by=0)


def test_an_offset_for_good_is_not_told() -> None:
    """Half open when it was handed over: the PVM itself may say a number that no client knows."""
    x = Link()
    x.c(SYN, C)
    x.g(SYN | ACK, S, C + 1)
    (flow,) = x.r.opening.values()
    flow.epoch = EPOCH_BASE
    x.r.flows, x.r.opening = x.r.opening, {}
    assert x.tell(SYN | ACK, S, C + 1) is Reason.DROP_PVM_SYN_UNKNOWN
    x.c(ACK, C + 1, P + 1)
    x.translates()


def test_strangers_take_no_place() -> None:
    """SYNs, and acks of what nobody has said, from as many addresses as there are."""
    x = Link().passive()
    x.r.limit = 8
    for port in range(1000, 1100):
        for flags, seq_, ack_ in ((SYN, 7, 0), (ACK, 8, 77), (ACK, 8, 78)):
            x.c(flags, seq_, ack_, sport=81, dport=port)
    assert len(x.r.flows) == 1 and len(x.r.opening) <= 8
    x.translates()
    for port in range(2000, 2100):  # a service that answers, to addresses that are not there
        x.c(SYN, 7, 0, sport=80, dport=port)
        x.tell(SYN | ACK, P, 8, sport=80, dport=port)
        x.g(SYN | ACK, S, 8, sport=80, dport=port)
        x.c(ACK, 8, 77, sport=80, dport=port)
    assert len(x.r.flows) == 1
    kw = {"sport": 80, "dport": 3000}
    x.c(SYN, C, **kw)
    x.g(SYN | ACK, S, C + 1, **kw)
    assert ack(x.c(ACK, C + 1, P + 1, **kw)) == S + 1
    assert len(x.r.flows) == 2, "a client that hears the guest has one"


def test_a_full_table_is_a_named_reason() -> None:
    x = Link().passive()
    x.r.limit = 1
    frame = tcp(flags=SYN, seq=C, ack=0, reverse=True, dport=41_000)
    assert x.r.to_svm(frame)[1] is Reason.PASS_REDIRECTED
    x.g(SYN | ACK, S, C + 1, dport=41_000)
    frame = tcp(flags=ACK, seq=C + 1, ack=P + 1, reverse=True, dport=41_000)
    assert x.r.to_svm(frame) == (frame, Reason.PASS_FLOW_TABLE_FULL)
    x.translates()


def test_a_syn_is_not_an_answer() -> None:
    x = Link()
    x.c(SYN, C)
    assert x.state is TcpState.LISTEN
    x.c(ACK, C + 1, P + 1)
    assert x.state is TcpState.LISTEN and not x.r.flows
    x.g(SYN | ACK, S, C + 1)
    assert x.state is TcpState.SYN_RECEIVED
    x.translates()
    assert x.state is TcpState.ESTABLISHED and len(x.r.flows) == 1


@pytest.mark.parametrize("cut", [0, 13, 20, 33, 34, 50, 53])
def test_cut_frames_are_bytes(cut: int) -> None:
    frame = tcp(b"x" * 20)[:cut]
    assert Rewriter().from_svm(frame) == (frame, Reason.NOTE_UNPARSED)


def test_a_bad_checksum_stays_bad() -> None:
    x = Link().passive()
    frame = bytearray(tcp(b"hello", seq=C + 1, ack=P + 1, reverse=True))
    frame[-1] ^= 0x40
    out = x.r.to_svm(bytes(frame))[0]
    assert ack(out) == S + 1
    l4 = out[34:]
    assert csum(l4, csum(out[26:34] + struct.pack("!HH", 6, len(l4)))) != 0xFFFF


def test_an_offset_for_good_outlives_checkpoints_but_not_the_connection() -> None:
    link = Link().passive()
    (flow,) = link.r.flows.values()
    flow.epoch = EPOCH_BASE
    for link.r.epoch in (1, 2, 3):
        link.translates()
    link.c(SYN, C + 500_000)
    link.g(SYN | ACK, S + 9, C + 500_001)
    link.c(ACK, C + 500_001, P + 7)
    assert flow.epoch == 3, "what is learnt now is of the epoch"
    assert seq(link.g(ACK, S + 10, C + 500_001)) == P + 7
    link.r.epoch = 4
    assert seq(link.g(ACK, S + 10, C + 500_001)) == S + 10


@pytest.mark.parametrize("left", ["nothing", "fins", "isn_c", "isn_s"])
@pytest.mark.parametrize("guest_opens", [False, True])
def test_a_connection_on_an_entry_that_holds_no_offset_is_of_the_epoch(
    left: str, guest_opens: bool
) -> None:
    """An entry for good of which nothing is known, or half of a handshake, is no place to learn
    in: at the next checkpoint both guests have the same numbers."""
    link = Link().passive()
    (flow,) = link.r.flows.values()
    flow.epoch, flow.have, flow.have_client = EPOCH_BASE, 0, 0
    if left == "fins":
        flow.have, flow.have_client = FIN_GUEST, FIN_CLIENT
    elif left == "isn_c":
        flow.have_client = HAVE_ISN_C
    elif left == "isn_s":
        flow.have = HAVE_ISN_S
    link.r.epoch = 3
    if guest_opens:
        link.g(SYN, S + 9, 0)
        link.c(SYN | ACK, C + 500_000, P + 7)
    else:
        link.c(SYN, C + 500_000)
        link.g(SYN | ACK, S + 9, C + 500_001)
    link.c(ACK, C + 500_001, P + 7)
    assert flow.epoch == 3
    assert seq(link.g(ACK, S + 10, C + 500_001)) == P + 7
    link.r.epoch = 4
    assert seq(link.g(ACK, S + 10, C + 500_001)) == S + 10


@pytest.mark.parametrize("name", REWRITER_MUTANTS)
def test_a_fault_of_the_rewriter_would_be_noticed(name: str) -> None:
    with pytest.MonkeyPatch.context() as mp:
        REWRITER_MUTANTS[name](mp)
        with pytest.raises(AssertionError):
            test_a_connection_on_an_entry_that_holds_no_offset_is_of_the_epoch("nothing", False)


def test_a_takeover_ends_no_offset_that_is_for_good() -> None:
    link = Link().passive()
    (flow,) = link.r.flows.values()
    flow.epoch = EPOCH_BASE
    link.r.mode, link.r.epoch = Mode.TAKEOVER, 9
    link.translates()
    link.c(SYN, C + 500_000)
    link.g(SYN | ACK, S + 9, C + 500_001)
    link.translates(0)
