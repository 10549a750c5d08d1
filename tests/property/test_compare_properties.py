# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what neither segmentation nor order nor a flipped bit can do to what is released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colo_xdp.compare.datagram import DatagramFlow
from colo_xdp.compare.limits import Limits
from colo_xdp.compare.policy import Policy
from colo_xdp.compare.tcp import TcpFlow
from colo_xdp.engine.engine import Engine
from colo_xdp.engine.journal import Divergence
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse

from ..unit import frames as f
from ..unit.compare.test_fragments import cut4

MS = 1_000_000
MANY = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
Segment = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One connection as both guests send it: pieces of one stream, in one order of events."""

    isn: int
    body: bytes
    fin: bool
    pvm: list[Segment]
    svm: list[Segment]
    order: list[bool]  # True: the PVM's next piece, else the SVM's

    def frame(self, piece: Segment, body: bytes) -> bytes:
        start, end = piece
        last = f.FIN if self.fin and end == len(body) else 0
        return f.tcp((self.isn + 1 + start) % 2**32, 1, body[start:end], f.ACK | last)


def pieces(draw: Any, n: int) -> list[Segment]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=8)) - {n})
    return list(zip([0, *cuts], [*cuts, n], strict=True))


@st.composite
def cases(draw: Any, shuffled: bool = False) -> Case:
    n = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 255))
    body = bytes((seed + i * 7 + i // 256) % 256 for i in range(n))
    sides = [pieces(draw, n), pieces(draw, n)]
    if shuffled:
        for side in sides:
            extra = draw(st.lists(st.sampled_from(side), max_size=4))
            side[:] = draw(st.permutations([*side, *extra]))
    order = [True] * len(sides[0]) + [False] * len(sides[1])
    isn = draw(st.sampled_from((0, 1000, 2**31, 2**32 - 100, 2**32 - 1)))
    return Case(isn, body, draw(st.booleans()), *sides, draw(st.permutations(order)))


class Run:
    """Run the case through an engine that knows the connection from its SYN on."""

    def __init__(self, case: Case, pvm_body: bytes = b"", svm_body: bytes = b"") -> None:
        self.case, self.now = case, 1000 * MS
        self.out: list[Frame] = []
        self.asked: list[str] = []
        self.e = Engine(
            Limits(), Policy(), self.out.append, on_wait=lambda ns: None,
            request_checkpoint=lambda d: self.asked.append(d.cause),
        )  # fmt: skip
        syn = f.tcp(case.isn, 1, b"", f.SYN | f.ACK, opts=f.SYN_OPTS)
        self.e.from_pvm(Frame(syn, self.now), self.now)
        self.e.from_svm(Frame(syn, self.now), 0, self.now)
        left = {True: list(case.pvm), False: list(case.svm)}
        for of_pvm in case.order:
            self.now += MS
            body = (pvm_body or case.body) if of_pvm else (svm_body or case.body)
            rec = Frame(case.frame(left[of_pvm].pop(0), body), self.now)
            if of_pvm:
                self.e.from_pvm(rec, self.now)
            else:
                self.e.from_svm(rec, 0, self.now)
            self.e.flush(self.now)
        del self.out[:1]

    def pieces(self) -> list[tuple[int, bytes]]:
        """Return what has left: position in the stream and bytes."""
        found = []
        for rec in self.out:
            p = parse(rec.frame)
            place = (p.seq - self.case.isn - 1) % 2**32
            found.append((place, rec.frame[p.off : p.end]))
        return found

    def client(self) -> bytes:
        """Return what a client makes of it."""
        stream: dict[int, int] = {}
        for place, data in self.pieces():
            for i, byte in enumerate(data):
                assert stream.setdefault(place + i, byte) == byte
        return bytes(stream[i] for i in sorted(stream))


@MANY
@given(cases())
def test_segmentation_of_either_side_changes_nothing(case: Case) -> None:
    r = Run(case)
    assert r.client() == case.body and r.asked == []
    assert b"".join(data for _, data in r.pieces()) == case.body  # each byte once, in order
    assert not r.e.held_packets and not r.e.svm_packets
    fins = [p for p in (parse(x.frame) for x in r.out) if p.flags & f.FIN]
    assert len(fins) == case.fin


@MANY
@given(cases(shuffled=True))
def test_reordering_and_duplication_change_it_only_in_time(case: Case) -> None:
    r = Run(case)
    assert r.client() == case.body and r.asked == []
    # in the PVM's own order: a piece, or its parts one after the other, then the next one
    left = [data for _, data in r.pieces() if data]
    assert b"".join(left) == b"".join(case.body[a:b] for a, b in case.pvm)
    assert not r.e.held_packets


@MANY
@given(cases(shuffled=True), st.data())
def test_a_flipped_byte_is_never_released(case: Case, data: Any) -> None:
    at = data.draw(st.integers(0, len(case.body) - 1))
    body = bytearray(case.body)
    body[at] ^= 1 << data.draw(st.integers(0, 7))
    flipped = bytes(body)
    on_pvm = data.draw(st.booleans())
    r = Run(case, flipped if on_pvm else b"", b"" if on_pvm else flipped)
    for place, piece in r.pieces():
        assert not place <= at < place + len(piece)
    assert r.asked and r.asked[0] in ("payload_differs", "fin_differs")
    r.e.tick(r.now + 10_000 * MS)  # nor later
    assert all(not place <= at < place + len(piece) for place, piece in r.pieces())


def assert_counts_are_exact(e: Engine) -> None:
    """Check that what the engine has counted is what its flows hold and buffer."""
    flows = [*e._flows.tcp.values(), *e._flows.datagram.values(), e._fragments]
    held = [*e._queue.held, *(h for flow in flows for h in flow.held)]
    assert e.pvm_packets == len(held)
    assert e.ledger.pvm_bytes == sum(len(rec.frame) for rec, _, _ in held)
    buffered = len(e._fragments._svm)
    for flow in flows:
        if isinstance(flow, TcpFlow):
            buffered += len(flow.theirs.chunks) + len(flow.theirs.out_of_order)
        elif isinstance(flow, DatagramFlow):
            buffered += sum(map(len, flow.copies.values()))
    assert e.svm_packets == buffered


LIMITS = Limits(
    compare_timeout_ns=50 * MS, max_queue_size=8, max_held_bytes=4000, max_stream_bytes=2000,
    max_flows=6, history_bytes=500, history_total=2000, flow_idle_ns=2000 * MS,
)  # fmt: skip


@st.composite
def anything(draw: Any) -> bytes:
    kind = draw(st.integers(0, 10))
    port = draw(st.integers(4000, 4012))
    body = draw(st.binary(max_size=120))
    if kind < 6:
        seq = draw(st.sampled_from((0, 1, 100, 5000, 2**31, 2**32 - 50))) + draw(
            st.integers(0, 400)
        )
        flags = draw(
            st.sampled_from((f.ACK, f.ACK, f.ACK, f.SYN, f.SYN | f.ACK, f.FIN | f.ACK, f.RST, 0x3F))
        )
        return f.tcp(seq % 2**32, draw(st.integers(0, 900)), body, flags, dport=port)
    if kind < 8:
        return f.udp(body, dport=port)
    if kind == 10:
        return draw(st.sampled_from(cut4(body.ljust(64), (0, 24), draw(st.integers(0, 3)))))
    return body if kind == 8 else f.ip4(draw(st.integers(0, 255)), body)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 14), anything(), st.integers(0, 30)), max_size=150))
def test_no_input_takes_more_than_the_limits(events: list[tuple[int, bytes, int]]) -> None:
    seen: list[Divergence] = []
    e = Engine(
        LIMITS, Policy(), lambda rec: None, request_checkpoint=seen.append, on_wait=lambda ns: None
    )
    now, checkpointing = 1000 * MS, False
    for what, frame, ms in events:
        now += ms * MS
        rec = Frame(frame, now)
        if what < 5:
            e.from_pvm(rec, now)
        elif what < 10:
            e.from_svm(rec, (e.epoch + (what == 9)) & 0xFFF, now)
        elif what == 10:
            e.tick(now)
        elif what == 13:
            e.release_all()
            checkpointing = False
            assert not e.held_packets and not e.svm_packets
        elif what == 14:
            e.set_policy(Policy())
        elif checkpointing:
            e.commit_checkpoint(now - MS, e.epoch + 1, now)
            checkpointing = False
        else:
            e.begin_checkpoint()
            checkpointing = True
        e.flush(now)
        queue = 16 if checkpointing else 1
        assert_counts_are_exact(e)
        # what a checkpoint had accepted stays, even over the limit, until it is compared or leaves
        spare = 16 * LIMITS.max_queue_size
        assert 0 <= e.held_packets <= queue * LIMITS.max_queue_size + spare
        assert 0 <= e.svm_packets <= 2 * LIMITS.max_queue_size + 1
        assert len(e._flows.tcp) + len(e._flows.datagram) <= LIMITS.max_flows + spare
        assert e._histories.charged <= LIMITS.history_total + LIMITS.history_bytes * 2
        assert len(e._queue._next) <= LIMITS.max_queue_size
        for stream in e._flows.tcp.values():
            if isinstance(stream, TcpFlow):
                ahead = sum(end - off for _, off, end, _ in stream.theirs.chunks)
                assert ahead <= LIMITS.max_stream_bytes
