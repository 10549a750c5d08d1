# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what the runs of a pair at rest become; no guest runs here."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.bench import rest, stats
from tests.bench.report import Part

ROLLUP = """55d0c8a00000-7ffd8b5f6000 ---p 00000000 00:00 0                          [rollup]
Rss:              101500 kB
Pss:               79872 kB
Pss_Dirty:         60000 kB
Pss_Anon:          60001 kB
"""


def test_pss_is_read_from_the_rollup() -> None:
    assert rest.pss_mib(ROLLUP) == 78
    for text in ("", "Pss_Dirty: 1 kB\n", "Pss:\n", "Pss: 1 pages\n"):
        with pytest.raises(ValueError, match="no Pss"):
            rest.pss_mib(text)


def test_cpu_time_is_a_share_of_one_core() -> None:
    assert rest.percent(5, 300_000_005, 30) == 1


def runs(*cpu: float) -> list[rest.Run]:
    pss = {"primary": 80.0, "secondary": 78.0}
    return [rest.Run({rest.FLOOR: 0.25, "primary": x, "secondary": x / 2}, pss) for x in cpu]


def test_the_median_of_the_runs_counts_and_is_compared_with_the_base() -> None:
    part = Part("rest", "title")
    rest.add(part, runs(0.8, 1.5, 0.9))
    cpu, memory = part.rows
    assert cpu.arms["primary"].median == 0.9 and cpu.ratio("primary") == pytest.approx(0.25 / 0.9)
    assert memory.arms["secondary"].median == 78
    assert [g.met for g in part.goals] == [True, True]
    worse = Part("rest", "title")
    rest.add(worse, runs(0.8, 1.5, 1.1))
    assert [g.met for g in worse.goals] == [False, True]


def test_what_could_not_be_measured_is_no_goal_met() -> None:
    part = Part("rest", "title")
    rest.add(part, [])
    assert not part.rows and [g.met for g in part.goals] == [False, False]


def test_the_base_sends_and_reads() -> None:
    with ExitStack() as stack:
        pids = rest.start_floor(stack)
        assert len(pids) == 2 and all(stats.process_ns(pid) >= 0 for pid in pids)
