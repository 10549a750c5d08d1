# SPDX-License-Identifier: GPL-2.0-or-later
"""The governor of checkpoints: the share of time, the burst, the ceiling."""

from __future__ import annotations

import pytest

from colo_xdp.controller.pacing import BURST_NS, Pacer

MS = 1_000_000
CEILING = 3000 * MS


def flood(p: Pacer, took: int, until: int) -> list[tuple[int, int]]:
    """Somebody wants a checkpoint at each moment; (begin, end) of each, ns."""
    now, made = 1000 * MS, []
    while now < until:
        begin = p.begin_ns(now)
        assert begin - now <= CEILING
        now = begin + took
        p.took(begin, now)
        made.append((begin, now))
    return made


@pytest.mark.parametrize("share", [5, 25, 50, 90])
@pytest.mark.parametrize("took_ms", [2, 10, 80])
def test_a_flood_gets_its_share_and_no_more(share: int, took_ms: int) -> None:
    whole = 60_000 * MS
    made = flood(Pacer(share, CEILING), took_ms * MS, whole)
    used = sum(end - begin for begin, end in made)
    span = made[-1][1] - made[0][0]
    allowed = share / 100 * span + BURST_NS + took_ms * MS
    assert used <= allowed * 1.01
    assert used >= share / 100 * span * 0.95, "and it gets that"


def test_a_few_in_a_row_do_not_wait() -> None:
    p, now = Pacer(50, CEILING), 5000 * MS
    for _ in range(BURST_NS // (10 * MS)):
        assert p.begin_ns(now) == now
        p.took(now, now + 10 * MS)
        now += 10 * MS
    p.took(now, now + 10 * MS)
    assert p.begin_ns(now + 10 * MS) == now + 20 * MS, "as long as the last one took"
    assert p.begin_ns(now + 3000 * MS) == now + 3000 * MS


def test_the_wait_has_a_ceiling() -> None:
    """I4: what is held leaves after compare_timeout, the ceiling, and one checkpoint."""
    p = Pacer(1, 100 * MS)
    p.took(0, 9000 * MS)
    assert p.begin_ns(9000 * MS) == 9100 * MS
    assert p.begin_ns(9500 * MS) == 9500 * MS


def test_all_of_the_time_means_no_wait() -> None:
    p = Pacer(100, CEILING)
    p.took(0, 9000 * MS)
    assert p.begin_ns(9000 * MS) == 9000 * MS
