# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a frame waits: what it comes from, its bounds, and what waiting that long costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.compare.patience import (
    EXPLORE,
    FEW,
    LAGS,
    LASTING,
    LASTING_NS,
    LONGER,
    MEMORY_NS,
    QUIET_NS,
    STALLED_NS,
    UNKNOWN_LAG_NS,
    WINDOW_NS,
    WINDOWS,
    Patience,
)

MS = 1_000_000
CEILING, FLOOR = 3000 * MS, 50 * MS


def windows(p: Patience, *waits_ms: float, now: int = 0) -> int:
    """One window for each wait; returns the time."""
    for wait in waits_ms:
        p.waited(int(wait * MS))
        now += WINDOW_NS
        assert p.due(now)
        p.end_window(now)
        assert not p.due(now + WINDOW_NS - 1)
    return now


def test_a_fixed_wait_is_the_ceiling_whatever_is_measured() -> None:
    p = Patience(CEILING, FLOOR)
    p.waited(7 * MS)
    p.checkpointed(20 * MS)
    p.end_window(WINDOW_NS)
    windows(p, *[7] * FEW, now=WINDOW_NS)
    assert (p.ns, p.source, p.lag_ns) == (CEILING, "fixed", 7 * MS)


def test_it_begins_with_a_guess() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    assert (p.ns, p.source) == (LAGS * UNKNOWN_LAG_NS, "lag")
    windows(p, *[1] * (FEW - 1))
    assert p.ns == LAGS * UNKNOWN_LAG_NS
    windows(p, 1, now=FEW * WINDOW_NS)
    assert p.ns == FLOOR


def test_it_follows_the_lag_the_cost_and_the_floor() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    now = windows(p, *[2] * WINDOWS)
    p.checkpointed(20 * MS)
    assert (p.ns, p.source, p.lag_ns) == (FLOOR, "floor", 2 * MS)
    assert (p.quiet_ns, p.repeat_ns) == (QUIET_NS, 2 * QUIET_NS)
    windows(p, *[20] * 20, 25, 90, 91, now=now)
    assert p.quiet_ns == 40 * MS, "twice what is usual"
    assert p.repeat_ns == 180 * MS and p.ns == 270 * MS
    now = windows(p, *[2] * WINDOWS, now=2 * now)
    for _ in range(40):
        p.checkpointed(90 * MS)
    assert p.source == "checkpoint" and 80 * MS < p.ns <= 90 * MS
    now = windows(p, *[100] * 2, now=now)
    assert (p.ns, p.source) == (300 * MS, "lag")
    now = windows(p, *[2000] * 2, now=now)
    assert (p.ns, p.source) == (CEILING, "ceiling")
    windows(p, *[2] * WINDOWS, now=now)
    assert p.source == "checkpoint"


def test_one_outlier_is_none_and_windows_without_frames_do_not_count() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    now = windows(p, *[5] * 10, 900, *[5] * 10)
    assert p.lag_ns == 5 * MS
    for _ in range(100):
        now += WINDOW_NS
        p.end_window(now)
    assert p.lag_ns == 5 * MS
    now = windows(p, 900, now=now)
    assert p.lag_ns == 900 * MS
    now += MEMORY_NS + 1
    p.end_window(now)
    assert len(p._windows) == FEW, "what is older than a minute, but for a few"
    now = windows(p, *[5] * WINDOWS, now=now)
    assert p.lag_ns == 5 * MS
    p.new_copy()
    assert p.lag_ns == UNKNOWN_LAG_NS


def test_the_fast_paths_waits_count_by_what_was_added() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    waits = [0] * 24
    waits[23] = 5  # from before this controller
    p.kernel_waits(0, waits)
    p.kernel_waits(1, waits)
    assert not p.longest_ns
    p.kernel_waits(0, waits)
    assert not p.longest_ns
    waits[3] += 1000
    waits[14] += 1
    waits[20] += 1  # half a second: it cannot have been a wait of the PVM's output alone
    p.kernel_waits(1, waits)
    assert p.longest_ns == (750 << 14)
    p.kernel_waits(1, waits)
    p.end_window(WINDOW_NS)
    assert not p.longest_ns


def test_each_fourth_wait_that_a_checkpoint_ends_is_longer_and_is_learnt_from() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    now, usual = windows(p, *[2] * WINDOWS), []
    for _ in range(2 * EXPLORE):
        p.checkpointed(20 * MS, missed=True)
        usual.append(p.ns)
    longer = LONGER * FLOOR
    assert usual == [FLOOR, FLOOR, longer, FLOOR] * 2
    p.checkpointed(20 * MS)
    assert p.ns == FLOOR, "others say nothing about waits"
    for _ in range(3):
        p.checkpointed(20 * MS, missed=True)
    assert p.ns == longer
    now = windows(p, 5, now=now)
    assert p.ns == longer, "nothing has waited for as long yet"
    windows(p, 90, 95, now=now)
    assert (p.usual_ns, p.source) == (LAGS * 90 * MS, "lag")
    p.checkpointed(20 * MS, missed=True)
    assert p.ns == p.usual_ns and p.stalled_ns == STALLED_NS


def test_the_commits_of_several_nics_are_one_checkpoint() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    p.awake_ns = 5
    p.begin_epoch(1000)
    assert not p.awake_ns
    p.since_ns, p.awake_ns = 1000, 990  # the first NIC had a frame of the SVM, of the new epoch
    p.begin_epoch(1000)
    assert p.awake_ns == 990


def test_disagreement_lasts_while_checkpoints_are_needed_in_a_row() -> None:
    p = Patience(CEILING, FLOOR, adaptive=True)
    now = windows(p, *[40] * WINDOWS)
    assert p.quiet_ns == 40 * MS
    for i in range(LASTING):
        assert not p.lasting
        p.needed(now + i * 100 * MS)
        p.checkpointed(20 * MS)
    assert p.lasting and p.quiet_ns == QUIET_NS
    p.needed(now + LASTING_NS)
    p.needless()
    p.checkpointed(20 * MS)
    assert not p.lasting and p.quiet_ns == 40 * MS
    for i in range(LASTING):
        p.needed(now + i * LASTING_NS // 2)
    assert not p.lasting, "they are too far apart"
    for _ in range(LASTING):
        p.needed(now)
    assert p.lasting
    p.end_window(now + LASTING_NS + 1)
    assert not p.lasting and p.quiet_ns == 40 * MS, "it has ended by itself"
    for _ in range(LASTING):
        p.needed(now)
    p.new_copy()
    assert not p.lasting


@given(
    st.integers(1, 600_000), st.integers(1, 600_000),
    st.lists(st.tuples(st.sampled_from(["wait", "checkpoint", "window"]), st.integers(0, 1 << 45))),
)  # fmt: skip
def test_it_is_never_more_than_the_ceiling_nor_less_than_the_floor(
    ceiling: int, floor: int, events: list[tuple[str, int]]
) -> None:
    p, now = Patience(ceiling * MS, floor * MS, adaptive=True), 0
    for kind, n in events:
        if kind == "wait":
            p.waited(n)
        elif kind == "checkpoint":
            p.checkpointed(n, missed=bool(n & 1))
        else:
            now += WINDOW_NS
            p.end_window(now)
        assert min(floor, ceiling) * MS <= p.ns <= ceiling * MS
        assert min(QUIET_NS, p.ns) <= p.quiet_ns <= p.usual_ns <= p.ns
        assert p.quiet_ns <= p.repeat_ns <= p.usual_ns
        assert p.ns <= p.stalled_ns <= ceiling * MS
        assert len(p._windows) <= WINDOWS


def paid(patience: float, cost: float, arrives: float) -> float:
    """What a frame pays whose counterpart arrives then (inf: never)."""
    return arrives if arrives <= patience else patience + cost


@pytest.mark.parametrize("cost", [5.0, 40.0, 900.0])
def test_waiting_as_long_as_the_remedy_costs_is_at_most_twice_the_best(cost: float) -> None:
    """Where patience is the cost of a checkpoint (docs/design/checkpoints.md)."""
    for arrives in [0.0, cost / 3, cost, cost + 0.01, 2 * cost, 1e6, float("inf")]:
        assert paid(cost, cost, arrives) <= 2 * min(arrives, cost) + 1e-9
    # with the lag in place of the cost the bound is 1 + patience / cost
    assert paid(3 * cost, cost, float("inf")) == 4 * cost


@pytest.mark.parametrize("lag_ms", [3, 30, 200])
def test_simulated_frames_of_guests_that_agree_are_hardly_ever_too_late(lag_ms: int) -> None:
    """Lags with a long tail: needless checkpoints below 1 in 1,000 frames."""
    rnd, p, now, late = random.Random(lag_ms), Patience(CEILING, FLOOR, adaptive=True), 0, 0
    frames = 20_000
    for _ in range(frames):
        now += rnd.randrange(40 * MS)
        lag = int(rnd.lognormvariate(0, 0.6) * lag_ms * MS / 2)
        late += lag > p.ns
        p.waited(lag)  # its counterpart comes while the checkpoint begins
        if p.due(now):
            p.end_window(now)
    assert late < frames / 1000, (late, p.ns)


def test_simulated_frames_of_guests_that_disagree_pay_about_a_checkpoint() -> None:
    rnd, p, now, total = random.Random(1), Patience(CEILING, FLOOR, adaptive=True), 0, 0
    cost, frames = 30 * MS, 5000
    for _ in range(frames):
        now += rnd.randrange(20 * MS)
        if rnd.random() < 0.05:
            total += p.ns + cost
            p.checkpointed(cost)
        else:
            p.waited(rnd.randrange(10 * MS))
        if p.due(now):
            p.end_window(now)
    assert total / (frames * 0.05) < 4 * cost
