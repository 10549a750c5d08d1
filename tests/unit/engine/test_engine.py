# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine around the flows: epochs, checkpoints, limits, ageing, counters."""

from __future__ import annotations

from collections import Counter

from colo_xdp.compare.causes import DESCRIPTIONS, Cause
from colo_xdp.compare.limits import NEVER
from colo_xdp.engine.engine import COUNTERS, Engine, Frame, Limits, Policy
from tests.unit import frames as f

MS = 1_000_000
S = 1_000 * MS


class Pair:
    def __init__(self, limits: Limits | None = None, epoch: int = 0) -> None:
        self.now = 10 * S
        self.out: list[Frame] = []
        self.asked: list[str] = []
        self.e = Engine(
            limits or Limits(),
            Policy(),
            self.out.append,
            request_checkpoint=lambda d: self.asked.append(d.cause),
            on_wait=lambda ns: None,
        )
        self.e.epoch = epoch

    def p(self, raw: bytes, ts: int = 0) -> Frame:
        self.now += 1
        rec = Frame(raw, ts or self.now)
        self.e.from_pvm(rec, self.now)
        return rec

    def s(self, raw: bytes, epoch: int | None = None) -> None:
        self.now += 1
        tag = self.e.epoch if epoch is None else epoch
        self.e.from_svm(Frame(raw, self.now), tag & 0xFFF, self.now)

    def wait(self, ms: float) -> None:
        self.now += int(ms * MS)
        self.e.tick(self.now)


def test_checkpoint_splits_at_stop() -> None:
    w = Pair(epoch=4095)  # the tag wraps
    a = w.p(f.tcp(0, 1, b"aa"))
    w.e.begin_checkpoint()
    b = w.p(f.tcp(2, 1, b"bb"))
    stop = w.now
    c = w.p(f.tcp(4, 1, b"cc"))
    d = w.p(f.udp(b"d"))
    w.s(f.tcp(0, 1, b"aabbcc"))  # of the epoch that ends
    w.s(f.tcp(4, 1, b"c"), 4096)
    w.s(f.udp(b"d"), 4096)
    assert w.out == []
    assert w.e.held_packets == 4
    w.e.commit_checkpoint(stop, 4096, w.now)
    assert w.out == [a, b, d]
    w.s(f.tcp(5, 1, b"c"), 4095)
    assert w.out == [a, b, d]
    w.s(f.tcp(5, 1, b"c"))
    assert w.out == [a, b, d, c]
    n = w.e.counters
    assert (n["svm_superseded"], n["svm_stale"], n["svm_buffered"]) == (1, 1, 2)
    assert (n["released_by_checkpoint"], n["checkpoints"], n["released"]) == (2, 1, 4)
    assert (n["pvm_frames"], n["svm_frames"]) == (4, 5)


def test_late_frame_is_part_of_the_checkpoint() -> None:
    w = Pair()
    w.p(f.tcp(0, 1, b"aa"))
    w.e.begin_checkpoint()
    stop = w.now + 100
    w.now += 200
    w.e.commit_checkpoint(stop, 1, w.now)
    c = w.p(f.tcp(4, 1, b"cc"))
    w.s(f.tcp(2, 1, b"bbcc"))
    assert w.out[1:] == [c]  # the hole before it is the SVM's, too
    b = w.p(f.tcp(2, 1, b"bb"), ts=stop)
    assert b in w.out
    assert w.e.counters["released_late"] == 1
    w.s(f.tcp(4, 1, b"cc"))
    assert c in w.out
    again = w.p(f.tcp(2, 1, b"bb"))
    assert w.out[-1] is again


def test_release_until() -> None:
    w = Pair()
    w.e.begin_checkpoint()
    a, b = w.p(f.tcp(0, 1, b"a")), w.p(f.tcp(1, 1, b"b"))
    assert w.e.release_until(a.ts_ns) == 1
    assert (w.out, w.e.held_packets) == ([a], 1)
    w.e.commit_checkpoint(a.ts_ns, 1, w.now)
    w.s(f.tcp(1, 1, b"b"))
    assert w.out == [a, b]


def test_abort_holds_and_release_all_lets_go_in_order() -> None:
    w = Pair()
    a, b = w.p(f.tcp(0, 1, b"a")), w.p(f.udp(b"b"))
    w.e.begin_checkpoint()
    c = w.p(f.tcp(1, 1, b"c"))
    w.s(f.tcp(0, 1, b"a"), 1)
    w.e.abort_checkpoint(w.now)
    w.wait(5000)
    d = w.p(f.tcp(2, 1, b"d"))
    assert (w.out, w.asked, w.e.held_packets) == ([], [], 4)
    assert w.e.release_all() == 4
    assert w.out == [a, b, c, d]
    assert (w.e.held_packets, w.e.held_bytes, w.e.flows) == (0, 0, 0)
    e = w.p(f.tcp(3, 1, b"e"))
    w.s(f.tcp(3, 1, b"e"))
    assert w.out[-1] is e
    assert w.e.counters["released_solo"] == 5


def test_retried_checkpoint_takes_only_its_own_epoch() -> None:
    w = Pair()
    w.e.begin_checkpoint()
    w.s(f.udp(b"x"), 1)
    w.s(f.udp(b"y"), 2)
    x, y = w.p(f.udp(b"x")), w.p(f.udp(b"y"))
    w.e.commit_checkpoint(x.ts_ns - 1, 2, w.now)
    assert w.out == []
    assert w.e.counters["svm_stale"] == 1
    w.s(f.udp(b"x"))
    assert w.out == [x, y]


def test_one_request_per_epoch() -> None:
    w = Pair()
    for port in (1, 2, 3):
        w.p(f.tcp(0, 1, b"a", dport=port))
        w.s(f.tcp(0, 1, b"b", dport=port))
    assert w.asked == ["payload_differs"]
    assert w.e.counters["cause_payload_differs"] == 3
    w.e.begin_checkpoint()
    w.e.commit_checkpoint(w.now, 1, w.now)
    w.p(f.tcp(1, 1, b"a", dport=1))
    w.s(f.tcp(1, 1, b"b", dport=1))
    assert w.asked == ["payload_differs"] * 2


def test_timeout_counts_from_the_head() -> None:
    w = Pair()
    w.p(f.tcp(0, 1, b"a"))
    w.wait(2000)
    w.p(f.tcp(1, 1, b"b"))
    w.s(f.tcp(0, 1, b"a"))
    w.wait(2000)
    assert w.asked == []
    w.wait(1001)
    assert w.asked == ["compare_timeout"]


def test_queue_limits() -> None:
    w = Pair(Limits(max_queue_size=2))
    for i in range(5):
        w.p(f.tcp(i, 1, b"a"))
    assert (w.e.held_packets, w.asked) == (2, ["queue_full"])
    assert w.e.counters["queue_full_dropped"] == 3
    w.e.begin_checkpoint()
    for i in range(40):
        w.p(f.tcp(2 + i, 1, b"a"))
    assert w.e.held_packets == 32
    w.e.commit_checkpoint(10 * S, 1, w.now)  # all of them are newer
    assert w.e.held_packets == 32
    for i in range(32):
        w.s(f.tcp(i, 1, b"a"))
    assert len(w.out) == 32


def test_svm_overflow_before_the_commit_is_a_gap() -> None:
    w = Pair(Limits(max_queue_size=2))
    w.e.begin_checkpoint()
    for i in range(3):
        w.s(f.tcp(i, 1, b"a"), 1)
    assert w.asked == []
    w.e.commit_checkpoint(w.now, 1, w.now)
    assert w.asked == ["peer_gap"]
    assert w.e.counters["svm_buffer_overflow"] == 1


def test_flow_table_is_bounded() -> None:
    w = Pair(Limits(max_flows=3))
    for port in range(10):
        w.s(f.tcp(0, 1, dport=port))  # an ack leaves nothing to wait for
        w.p(f.tcp(0, 1, dport=port))
    assert (w.e.flows, len(w.out), w.e.counters["flows_evicted"]) == (3, 10, 7)
    for port in (20, 21, 22):
        w.p(f.tcp(0, 1, b"x", dport=port))
    w.p(f.tcp(0, 1, b"x", dport=23))
    assert (w.e.flows, w.asked) == (3, ["queue_full"])
    assert w.e.counters["flow_table_full_dropped"] == 1


def test_the_longest_idle_flow_is_evicted() -> None:
    w = Pair(Limits(max_flows=2))
    for port in (1, 2, 1):
        w.s(f.tcp(0, 1, dport=port))
        w.now += S
    w.s(f.tcp(0, 1, dport=3))
    w.p(f.tcp(0, 1, dport=1))  # its ack is still known
    assert len(w.out) == 1


def test_ageing() -> None:
    w = Pair(Limits(flow_idle_ns=10 * S))
    w.p(f.udp(b"x"))
    w.s(f.udp(b"x"))
    w.s(f.tcp(0, 1))
    assert w.e.flows == 2
    w.wait(2500)
    assert w.e.flows == 1  # datagram flows have a fifth of the time
    w.wait(6000)
    assert w.e.flows == 1
    w.wait(3000)
    assert (w.e.flows, w.e.counters["flows_aged"]) == (0, 2)


def test_what_waits_does_not_age() -> None:
    w = Pair(Limits(flow_idle_ns=10 * S))
    w.p(f.tcp(0, 1, b"x"))
    w.wait(20_000)
    w.wait(20_000)
    assert w.e.flows == w.e.held_packets == 1


def test_history_is_bounded() -> None:
    w = Pair(Limits(history_total=10_000, history_bytes=4096))
    for port in range(6):
        for i in range(8):
            w.s(f.tcp(i * 1000, 1, bytes(1000), dport=port))
            w.p(f.tcp(i * 1000, 1, bytes(1000), dport=port))
    assert len(w.out) == 48
    assert w.e.counters["history_evicted"] >= 3
    assert w.e._histories.charged <= 10_000
    assert sum(len(s.sent.history) for s in w.e._tcp.values()) <= 10_000
    w.p(f.tcp(7000, 1, bytes(1000), dport=5))  # the newest has its history
    assert len(w.out) == 49


def test_malformed_frames_are_counted_by_defect() -> None:
    w = Pair()
    w.p(b"")
    w.s(b"")
    assert len(w.out) == 1
    assert (w.e.counters["opaque"], w.e.counters["defect_runt"]) == (2, 2)


def test_all_names_are_described_and_start_at_zero() -> None:
    w = Pair()
    names = [n for n, text in COUNTERS if text]
    assert len(names) == len(set(names)) == len(COUNTERS)
    assert w.e.counters == Counter(dict.fromkeys(names, 0))
    assert set(w.e.counters) == set(names)
    assert set(DESCRIPTIONS) == set(Cause)


def test_only_what_cannot_be_late_asks_for_a_tick() -> None:
    w = Pair()
    assert w.e.tick_ns() == NEVER
    w.p(f.tcp(0, 1, b"aa"))
    assert w.e.tick_ns() == NEVER, "compare_timeout is seconds"
    held = []
    for port in (7, 8):
        w.p(f.udp(b"of the PVM", sport=port))
        w.s(f.udp(b"of the SVM", sport=port))  # it differs, and may be reordered only
        held.append(w.e.tick_ns())
        w.now += 3 * MS
    first = held[0]
    assert held == [first, first] and w.now < first < w.now + w.e.limits.datagram_grace_ns
    w.wait(2)
    assert w.e.tick_ns() == first, "it is not over yet"
    w.wait(2.5)
    assert first < w.e.tick_ns() <= first + 3 * MS + 10, "the other one's"
    w.wait(10)
    assert w.e.tick_ns() == NEVER


def test_a_short_compare_timeout_is_kept() -> None:
    w = Pair(Limits(compare_timeout_ns=30 * MS))
    w.p(f.tcp(0, 1, b"aa"))
    assert w.e.tick_ns() == w.now + 30 * MS
    w.wait(30)
    assert w.asked
