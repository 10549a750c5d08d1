# SPDX-License-Identifier: GPL-2.0-or-later
"""An adaptive wait in the engine: deadlines, certain disagreement, needless checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colo_xdp.compare.limits import NEVER
from colo_xdp.compare.patience import LASTING, QUIET_NS, WINDOWS, Patience
from colo_xdp.compare.policy import Rule
from colo_xdp.engine.engine import MAX_MATCHES, Engine, Frame, Limits, Policy
from colo_xdp.engine.silence import LOOKS
from colo_xdp.net.flow_key import FlowKey
from colo_xdp.net.packet import parse
from colo_xdp.offload.kernel_format import ConnState, NoKernelPath, Overdue
from tests.unit import frames as f

MS = 1_000_000
CEILING, FLOOR = 3000 * MS, 60 * MS


class Kernel(NoKernelPath):
    """A fast path of which only what waits there is played."""

    enabled = True

    def __init__(self) -> None:
        self.late: list[Overdue] = []
        self.moved = 0
        self.reclaimed: list[FlowKey] = []

    def overdue(self, before_ns: int) -> list[Overdue]:
        return [x for x in self.late if x.since_ns <= before_ns]

    def oldest_ns(self) -> int:
        return min((x.since_ns for x in self.late), default=0)

    def moved_ns(self) -> int:
        return self.moved

    def reclaim(self, key: FlowKey) -> ConnState | None:
        self.reclaimed.append(key)
        return None


class Pair:
    def __init__(self, *, adaptive: bool = True, fast: Kernel | None = None) -> None:
        self.now = 10_000 * MS
        self.out: list[Frame] = []
        self.asked: list[str] = []
        self.patience = Patience(CEILING, FLOOR, adaptive=adaptive)
        for _ in range(8):
            self.patience.waited(MS)
            self.patience.end_window(self.now)
        self.patience.checkpointed(20 * MS)
        self.e = Engine(
            Limits(), Policy(), self.out.append,
            request_checkpoint=lambda d: self.asked.append(d.cause),
            on_wait=lambda ns: None, patience=self.patience, fast=fast,
        )  # fmt: skip

    def p(self, raw: bytes) -> Frame:
        self.now += 1
        rec = Frame(raw, self.now)
        self.e.from_pvm(rec, self.now)
        return rec

    def s(self, raw: bytes) -> None:
        self.now += 1
        self.e.from_svm(Frame(raw, self.now), self.e.epoch & 0xFFF, self.now)

    def both(self, raw: bytes) -> None:
        self.p(raw)
        self.s(raw)

    def until_asked(self, most_ms: int = 4000) -> float:
        """Tick when the engine says so, and every 50 ms; ms until it asks."""
        start = self.now
        while not self.asked and self.now - start < most_ms * MS:
            self.now = min(max(self.e.tick_ns(), self.now + MS), self.now + 50 * MS)
            self.e.tick(self.now)
        return (self.now - start) / MS

    def checkpoint(self) -> None:
        self.e.begin_checkpoint()
        self.now += 20 * MS
        self.e.commit_checkpoint(self.now, self.e.epoch + 1, self.now)
        self.asked.clear()


def other(seq: int, data: bytes = b"", flags: int = f.ACK) -> bytes:
    """A frame of another connection."""
    return f.tcp(seq, 1, data, flags, dport=4001)


@pytest.mark.parametrize("adaptive, ms", [(True, 60), (False, 3000)])
def test_a_frame_waits_as_long_as_patience_says(adaptive: bool, ms: float) -> None:
    w = Pair(adaptive=adaptive)
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    took = w.until_asked()
    assert ms <= took <= ms + (1 if adaptive else 50)
    assert w.asked == ["compare_timeout"]


def test_a_datagram_too() -> None:
    w = Pair()
    w.p(f.udp(b"a"))
    assert 60 <= w.until_asked() <= 61


def test_a_frame_that_came_before_patience_became_shorter_has_its_own() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    for _ in range(8):
        w.patience.waited(400 * MS)
        w.patience.end_window(w.now)
    w.p(f.tcp(2, 1, b"bb"))
    for _ in range(40):
        w.patience.waited(MS)
        w.patience.end_window(w.now)
    w.p(other(0, b"x"))  # one that comes later has the shorter patience
    assert 60 <= w.until_asked() <= 61


def test_a_frame_waits_longer_if_patience_has_become_longer_meanwhile() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    for _ in range(8):
        w.patience.waited(400 * MS)
        w.patience.end_window(w.now)
    assert 1200 <= w.until_asked() <= 1201
    for _ in range(8):
        w.patience.waited(40_000 * MS)
        w.patience.end_window(w.now)
    w.checkpoint()
    w.p(f.tcp(4, 1, b"cc"))
    assert 3000 <= w.until_asked() <= 3050, "and never longer than compare_timeout"


def test_an_svm_that_is_ahead_has_compare_timeout_since_nobody_waits() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.s(f.tcp(2, 1, b"bb"))
    assert 3000 <= w.until_asked() <= 3050
    assert w.asked == ["svm_ahead"]


def test_an_svm_that_has_not_even_acked_is_slow_and_not_different() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.s(f.tcp(2, 9))  # this client's request has been acked, but not answered
    w.p(f.tcp(2, 9, b"bb"))
    assert 60 <= w.until_asked() <= 61
    w.checkpoint()
    w.p(f.tcp(4, 20, b"bb"))
    assert 1000 <= w.until_asked() <= 1050
    w.checkpoint()
    w.p(other(0, b"", f.SYN | f.ACK))
    assert 1000 <= w.until_asked() <= 1050
    w.checkpoint()
    w.p(f.tcp(6, 40, b"bb"))
    w.s(other(1, b"x"))
    assert 999 <= w.until_asked() <= 1050, "nor have they crossed"


@pytest.mark.parametrize("ack_only", [False, True])
def test_after_a_checkpoint_waits_begin_with_the_svms_first_frame(ack_only: bool) -> None:
    """TCG translates everything anew then, so what was acked before proves nothing."""
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(f.tcp(2, 9))
    w.checkpoint()
    w.p(f.tcp(2, 9, b"bb"))
    w.p(other(0, b"x"))
    assert w.until_asked(70) >= 70 and not w.asked
    w.s(f.tcp(2, 9) if ack_only else other(0, b"x"))
    assert 60 <= w.until_asked() <= 120
    assert w.asked == ["compare_timeout"]


@pytest.mark.parametrize("late_ms", [0, 500, 2000])
def test_an_svm_that_sends_nothing_after_a_checkpoint_gets_a_second_once(late_ms: int) -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.checkpoint()
    w.now += late_ms * MS
    w.p(f.tcp(2, 1, b"bb"))
    most = max(60, 1000 - late_ms)
    assert most - 1 <= w.until_asked() <= most + 50


def test_a_fast_path_that_releases_shows_that_the_svm_runs() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.patience.kernel_waits(0, [1, 0])
    w.checkpoint()
    w.p(f.tcp(2, 1, b"bb"))
    assert w.until_asked(70) >= 70 and not w.asked
    w.patience.kernel_waits(0, [2, 0])  # that may have been before the checkpoint
    assert w.until_asked(70) >= 70 and not w.asked
    w.patience.kernel_waits(0, [3, 0])
    assert w.until_asked() <= 60


def test_an_svm_that_needs_long_after_each_checkpoint_causes_no_more_of_them() -> None:
    """Its kernel answers after 70 ms, its server after 150, and output is always there."""
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"xx"))
    seq, needed = 2, 0
    for _ in range(20):
        w.p(f.tcp(seq, 1, b"bb"))
        before = w.now
        if w.until_asked(70) >= 70:
            w.s(other(2))
            if w.until_asked(80) >= 80:
                w.s(f.tcp(seq, 1, b"bb"))
                assert not w.asked
        needed += bool(w.asked)
        seq += 2
        w.now = max(w.now, before + 250 * MS)
        w.patience.end_window(w.now)
        w.checkpoint()  # whatever for
        w.patience.checkpointed(20 * MS, missed=True)
    assert needed <= 6 and w.patience.lag_ns >= 79 * MS


def test_the_svms_slow_start_is_no_lag() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.patience.end_window(w.now)
    w.checkpoint()
    w.p(f.tcp(2, 1, b"bb"))
    w.now += 100 * MS
    w.s(other(0))
    w.now += 5 * MS
    w.s(f.tcp(2, 1, b"bb"))
    assert 5 * MS <= w.patience.longest_ns <= 6 * MS


def test_waits_of_a_moment_wake_nobody() -> None:
    w = Pair()
    for i in range(100):
        w.both(f.tcp(2 * i, 1, b"aa"))
    assert w.e.tick_ns() == NEVER


# -- certain disagreement


def test_guests_that_wait_for_each_others_client() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    w.s(other(2, b"granted"))
    assert QUIET_NS / MS <= w.until_asked() <= QUIET_NS / MS + 1
    assert w.asked == ["crossed"]


def serve_another(w: Pair, times: int) -> None:
    for i in range(times):
        w.now += 10 * MS
        w.both(f.tcp(2 * i, 1, b"aa", dport=4002))
        w.e.tick(w.now)


def test_other_clients_that_are_served_meanwhile_do_not_hide_them_for_long() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    serve_another(w, 2)
    w.s(other(2, b"granted"))
    serve_another(w, 2)
    assert not w.asked, "one of them has waited for too short a time"
    serve_another(w, 3)
    assert w.asked == ["crossed"]


def test_while_disagreement_lasts_what_the_svm_is_ahead_with_counts_sooner() -> None:
    """It has only just got its state, so it is the slower one: it has decided otherwise."""
    w = Pair()
    for i in range(LASTING):
        cross(w, 4100 + 2 * i)
        w.checkpoint()
        w.patience.checkpointed(20 * MS)
    assert w.patience.lasting
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    serve_another(w, 2)
    w.s(other(2, b"granted"))
    began, due = w.now, w.e.tick_ns()
    for i in range(2, 12):
        w.now += 3 * MS
        w.both(f.tcp(2 * i, 1, b"aa", dport=4002))
        if due <= w.now:
            w.e.tick(w.now)
            due = w.e.tick_ns()
        if w.asked:
            break
    assert w.asked == ["crossed"]
    assert QUIET_NS <= w.now - began <= QUIET_NS + QUIET_NS // LOOKS + 3 * MS


@pytest.mark.parametrize("side", ["pvm", "svm"])
def test_repetitions_break_no_silence(side: str) -> None:
    w = Pair()
    for _ in range(8):
        w.patience.waited(300 * MS)
        w.patience.end_window(w.now)
    assert w.patience.quiet_ns > 200 * MS
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    w.s(other(2, b"granted"))
    w.now += 200 * MS
    if side == "pvm":
        w.p(f.tcp(2, 1, b"granted"))
    else:
        w.s(other(2, b"granted"))
    assert 200 + w.until_asked() <= w.patience.quiet_ns / MS + 2
    assert w.asked == ["crossed"]


@pytest.mark.parametrize("side", ["pvm", "svm"])
def test_acks_break_no_silence(side: str) -> None:
    """A kernel acks by itself, 40 ms after the request whose answer is missing."""
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    w.s(other(2, b"granted"))
    w.now += 10 * MS
    (w.p if side == "pvm" else w.s)(f.tcp(9, 60, dport=4002))
    assert w.until_asked() <= QUIET_NS / MS - 9
    assert w.asked == ["crossed"]


def cross(w: Pair, port: int) -> float:
    """Have the guests wait for each other's clients; return after how many ms they are noticed."""
    w.both(f.tcp(0, 1, b"aa", dport=port))
    w.both(f.tcp(0, 1, b"aa", dport=port + 1))
    w.p(f.tcp(2, 1, b"granted", dport=port))
    w.s(f.tcp(2, 1, b"granted", dport=port + 1))
    return w.until_asked()


def test_disagreement_that_lasts_is_noticed_sooner_until_that_was_wrong() -> None:
    w = Pair()
    for _ in range(WINDOWS):
        w.patience.waited(100 * MS)
        w.patience.end_window(w.now)
    for i in range(LASTING):
        assert cross(w, 4100 + 2 * i) >= 100 and not w.patience.lasting
        w.checkpoint()
        w.patience.checkpointed(20 * MS)
    assert w.patience.lasting and w.e.tick_ns() <= w.now + QUIET_NS
    assert QUIET_NS / MS <= cross(w, 4200) <= QUIET_NS / MS + 1
    w.e.begin_checkpoint()
    w.s(f.tcp(2, 1, b"granted", dport=4200))  # it was on its way
    assert not w.patience.lasting
    w.now += MS
    w.e.commit_checkpoint(w.now, w.e.epoch + 1, w.now)
    w.patience.checkpointed(20 * MS)
    w.asked.clear()
    assert cross(w, 4300) >= 100


def test_they_may_not_be_silent_yet_or_one_has_only_an_ack() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    w.s(other(2, b"granted"))
    serve_another(w, 2)
    assert not w.asked
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 2))  # a delayed ack is no disagreement
    w.s(other(2, b"granted"))
    assert w.until_asked() >= 60
    assert w.asked == ["compare_timeout"]


def test_with_a_fixed_wait_nothing_is_guessed() -> None:
    w = Pair(adaptive=False)
    w.both(f.tcp(0, 1, b"aa"))
    w.both(other(0, b"aa"))
    w.p(f.tcp(2, 1, b"granted"))
    w.s(other(2, b"granted"))
    w.p(f.tcp(2, 1, b"granted"))
    assert w.until_asked() >= 3000


def test_what_waits_in_the_fast_path_obeys_the_same_patience() -> None:
    kernel = Kernel()
    w = Pair(fast=kernel)
    key = parse(f.tcp(0, 1, b"aa")).key
    for held, limit in ((True, 60), (False, 3000)):
        start = w.now
        kernel.late = [Overdue(start, key, held, True)]
        kernel.reclaimed.clear()
        while not kernel.reclaimed:
            w.now = min(max(w.e.tick_ns(), w.now + MS), w.now + 50 * MS)
            w.e.tick(w.now)
            assert w.now - start < limit * MS, "there must be time left for the slow path"
        assert w.now - start >= limit * MS // 2


def test_guests_that_cross_in_the_fast_path_are_looked_at_in_the_slow_one() -> None:
    kernel = Kernel()
    w = Pair(fast=kernel)
    w.patience.moved_ns = w.now
    a, b = parse(f.tcp(0, 1, b"a")).key, parse(other(0, b"a")).key
    kernel.late = [Overdue(w.now, a, True, True), Overdue(w.now, b, False, True)]
    for _ in range(5):  # the kernel is busy with others
        w.now += 5 * MS
        kernel.moved = w.now
        w.e.tick(w.now)
    assert b not in kernel.reclaimed
    for _ in range(8):
        w.now += 5 * MS
        w.e.tick(w.now)
    assert {a, b} <= set(kernel.reclaimed)


def test_a_pvm_that_repeats_what_waits_has_noticed_itself() -> None:
    w = Pair()
    for _ in range(8):
        w.patience.waited(100 * MS)
        w.patience.end_window(w.now)
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    w.now += 20 * MS
    w.p(f.tcp(2, 1, b"bb"))  # a probe, long before the SVM can be called late
    w.p(f.tcp(2, 1))  # repeats nothing
    assert not w.asked
    w.now += 190 * MS
    w.p(f.tcp(2, 1, b"bb"))
    assert w.asked == ["repeated"]


def test_a_hole_in_the_svms_stream_is_a_lost_frame() -> None:
    w = Pair()
    for _ in range(8):  # the SVM may be late by 100 ms at other times
        w.patience.waited(100 * MS)
        w.patience.end_window(w.now)
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    w.p(f.tcp(4, 1, b"cc"))
    w.s(f.tcp(4, 1, b"cc"))  # its "bb" does not come
    waited = w.until_asked()
    assert w.asked == ["frame_lost"]
    assert w.patience.quiet_ns / MS <= waited < w.patience.usual_ns / MS


def test_a_hole_before_the_pvm_has_said_as_much_counts_from_then_on() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.s(f.tcp(4, 1, b"cc"))
    w.now += 1000 * MS
    w.e.tick(w.now)
    assert not w.asked, "nothing waits for it"
    w.p(f.tcp(2, 1, b"bb"))
    assert w.until_asked() <= w.patience.quiet_ns / MS + 1
    assert w.asked == ["frame_lost"]


def test_a_hole_that_is_filled_in_time_is_reordering() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    w.s(f.tcp(4, 1, b"cc"))
    w.now += 10 * MS
    w.e.tick(w.now)
    w.s(f.tcp(2, 1, b"bb"))
    w.p(f.tcp(4, 1, b"cc"))
    w.now += 200 * MS
    w.e.tick(w.now)
    assert not w.asked and len(w.out) == 3


def test_an_ack_does_not_wait_for_a_hole() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 9))
    w.s(f.tcp(4, 1, b"cc"))
    assert w.until_asked() > w.patience.quiet_ns / MS + 1
    assert w.asked != ["frame_lost"]


def test_a_reset_where_the_other_guest_has_data() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.s(f.tcp(2, 1, b"more"))
    w.p(f.tcp(2, 1, b"", f.RST | f.ACK))
    assert w.until_asked() <= QUIET_NS / MS + 1
    assert w.asked == ["rst_one_sided"]


# -- what is learnt


def test_only_waits_that_a_counterpart_has_ended_count() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.patience.end_window(w.now)
    w.p(f.tcp(2, 1, b"bb"))
    w.until_asked()
    w.e.begin_checkpoint()
    w.now += 20 * MS
    stop = w.now
    w.now += 20 * MS
    w.p(f.tcp(4, 1, b"cc"))  # after STOP: it waits for the checkpoint's end
    w.now += 20 * MS
    w.e.commit_checkpoint(stop, 1, w.now)
    w.s(f.tcp(4, 1, b"cc"))
    assert len(w.out) == 3 and w.patience.longest_ns <= 1
    w.p(f.tcp(6, 1, b"dd"))
    w.now += 3 * MS
    w.s(f.tcp(6, 1, b"dd"))
    assert w.patience.longest_ns == 3 * MS + 1
    w.p(f.tcp(8, 40))
    w.now += 30 * MS
    w.s(f.tcp(8, 40))  # a delayed ack
    assert w.patience.longest_ns == 3 * MS + 1
    w.p(f.tcp(8, 50, b"ee"))  # acks what the SVM has got only when its client sent it again
    w.now += 900 * MS
    w.s(f.tcp(8, 50, b"ee"))
    assert len(w.out) == 6
    assert w.patience.longest_ns == 3 * MS + 1


def test_what_checkpoints_release_says_nothing_about_the_svms_lag() -> None:
    """A peer link that delivers nothing is bridged by checkpoints, all of which release output."""
    w = Pair()
    for _ in range(WINDOWS):
        w.patience.waited(100 * MS)
        w.patience.end_window(w.now)
    before = w.patience.ns
    for i in range(2 * WINDOWS):
        w.p(f.tcp(2 * i, 1, b"aa"))
        assert w.until_asked() > 200
        w.now += 20 * MS
        w.checkpoint()
        w.patience.end_window(w.now)
    assert len(w.out) == 2 * WINDOWS and w.patience.ns == before


def test_what_a_rule_lets_pass_says_nothing_about_the_svms_lag() -> None:
    w = Pair()
    w.e.set_policy(Policy(rules=(Rule(name="dns", protocol="udp", action="pass"),)))
    w.checkpoint()
    w.patience.longest_ns = 0
    w.p(f.udp(b"a"))
    assert len(w.out) == 1 and not w.patience.longest_ns


@pytest.mark.parametrize(
    "mine, late",
    [
        (f.tcp(2, 1, b"bb"), f.tcp(0, 1, b"aabb")),
        (f.tcp(2, 7), f.tcp(2, 9)),
        (f.tcp(2, 1, b"", f.FIN | f.ACK), f.tcp(2, 1, b"", f.FIN | f.ACK)),
        (f.udp(b"a"), f.udp(b"a")),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_checkpoint_whose_counterpart_was_on_its_way_was_needless(
    mine: bytes, late: bytes, begun: bool
) -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.p(mine)
    w.until_asked()
    steps: list[Callable[[], None]] = [w.e.begin_checkpoint, lambda: w.s(late)]
    for step in steps if begun else steps[::-1]:
        step()
    assert w.e.counters["checkpoints_needless"] == 1
    if parse(mine).off != parse(mine).end:
        assert w.patience.longest_ns >= 60 * MS, "and shows how long the SVM needs"
    w.s(late)
    w.e.commit_checkpoint(w.now, 1, w.now)
    assert w.e.counters["checkpoints_needless"] == 1


@pytest.mark.parametrize(
    "late", [f.tcp(2, 1, b"xx"), f.tcp(0, 1, b"aa"), f.tcp(4, 1, b"cc"), other(2, b"bb")]
)
def test_any_other_frame_proves_nothing(late: bytes) -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    w.p(f.tcp(2, 1, b"bb"))
    w.until_asked()
    w.e.begin_checkpoint()
    w.s(late)
    assert not w.e.counters["checkpoints_needless"]


def test_shadow_mode_keeps_when_the_svm_had_sent_what_both_have() -> None:
    w = Pair()
    w.both(f.tcp(0, 1, b"aa"))
    assert w.e.followed_ns(0, w.now) == 0, "not in shadow mode"
    w.e.set_shadow(True, w.now)
    began = w.now
    first, second = w.p(f.tcp(2, 1, b"bb")), w.p(f.tcp(4, 1, b"cc"))
    third = w.p(f.tcp(6, 1, b"dd"))  # the SVM never sends it
    assert w.e.waiting_ns() == first.ts_ns
    assert len(w.out) == 4 and w.e.followed_ns(began, w.now) == 0
    w.now += 50 * MS
    w.s(f.tcp(2, 1, b"bb"))
    then = w.now
    assert w.e.followed_ns(began, w.now) == then
    w.now += 50 * MS
    w.s(f.tcp(4, 1, b"cc"))
    assert w.e.followed_ns(began, first.ts_ns) == then
    assert w.e.followed_ns(began, second.ts_ns) == w.now
    assert w.e.followed_ns(second.ts_ns, w.now) == 0
    assert w.e.waiting_ns() == third.ts_ns
    for i in range(MAX_MATCHES):
        w.both(other(2 * i, b"xx"))
    assert w.e.followed_ns(began, first.ts_ns) == 0, "forgotten, and so not known"
    w.e.set_shadow(False, w.now)
    assert w.e.followed_ns(began, w.now) == 0


@pytest.mark.parametrize("shadow", [True, False])
def test_shadow_mode_notes_when_held_output_would_have_crossed(shadow: bool) -> None:
    """The PVM goes on, as its client has an answer, and the SVM finds the way back to it."""
    w = Pair()
    for port in (5000, 5001):
        w.both(f.tcp(0, 1, b"aa", dport=port))
    w.e.set_shadow(shadow, w.now)
    w.p(f.tcp(2, 1, b"bb", dport=5000))
    w.s(f.tcp(2, 1, b"bb", dport=5001))
    began = w.now
    for i in range(5):
        w.now += 5 * MS
        w.both(other(2 * i, b"zz"))  # others are served
        w.e.tick(w.now)
    assert w.e.crossed_ns == 0, "the SVM may be late"
    w.now += 20 * MS
    w.e.tick(w.now)
    assert (began <= w.e.crossed_ns <= w.now) == shadow
    if shadow:
        first = w.e.crossed_ns
        w.p(f.tcp(2, 1, b"bb", dport=5001))
        w.s(f.tcp(2, 1, b"bb", dport=5000))
        w.now += 100 * MS
        w.e.tick(w.now)
        assert w.e.crossed_ns == first


def test_shadow_mode_does_not_look_for_crossings_with_each_tick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look goes through all flows that wait."""
    w = Pair(adaptive=False)  # so that nothing else looks
    looks: list[int] = []

    def look(pvm_ns: int, svm_ns: int) -> tuple[None, bool]:
        looks.append(pvm_ns)
        return None, False

    monkeypatch.setattr(w.e._watch, "waiting", look)
    w.both(f.tcp(0, 1, b"aa"))
    w.e.set_shadow(True, w.now)
    w.p(f.tcp(2, 1, b"bb"))
    for _ in range(40):
        w.now += MS
        w.e.tick(w.now)
    assert 0 < len(looks) <= 40 * MS // QUIET_NS + 3
