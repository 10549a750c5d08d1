# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the rows and goals that lives become; no guest runs here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.bench.apps import part as apps
from tests.bench.apps.failover import Failover, longest_gap
from tests.bench.apps.lives import ARMS, FIXED, NONE, OURS, QEMU, SHADOW, Life, Seen
from tests.bench.apps.outputs import Outcome
from tests.bench.apps.workloads import WORKLOADS
from tests.bench.report import Part

RATES = {NONE: 20.0, SHADOW: 10.0, QEMU: 5.0, FIXED: 6.0, OURS: 8.0}


def life(rate: float, **more: Any) -> Life:
    outcome = Outcome(rate, 1e3 / rate, 2e3 / rate)
    return Life({w.key: Seen(outcome, **more) for w in WORKLOADS})


def lives() -> dict[str, list[Life]]:
    """Return three lives of each arm; the middle one counts."""
    found = {a: [life(r), life(2 * r), life(r / 2)] for a, r in RATES.items()}
    for one in found[OURS]:
        one.failover = Failover(0.5, 0.4, 0, 100)
        one.lateness = [2e-5] * 98 + [2e-3] * 2
        for seen in one.workloads.values():
            seen.released, seen.checkpoints = 1000, Counter(crossed=2, compare_timeout=1)
    return found


def goals(found: dict[str, list[Life]]) -> dict[str, Any]:
    part = Part("apps", "title")
    apps.add_goals(part, found)
    return {g.name.removeprefix("applications, "): g for g in part.goals}


def test_rows() -> None:
    part = Part("apps", "title")
    apps.add_rows(part, lives())
    rows = {r.name: r for r in part.rows}
    for w in WORKLOADS:
        row = rows[w.title]
        assert set(row.arms) == set(ARMS) and row.ratio(OURS) == pytest.approx(0.8)
        assert rows[f"{w.title}: p99"].ratio(OURS) == pytest.approx(0.8)
        assert set(rows[f"{w.title}: checkpoints for crossed"].arms) == {FIXED, OURS}
        assert f"{w.title}: errors" not in rows
    assert rows["nginx, 8 MiB"].arms[OURS].median == pytest.approx(64)
    assert rows["failover: the same of a line every 20 ms"].arms[OURS].median == 0.4


def test_goals() -> None:
    found = lives()
    got = goals(found)
    assert got["ours to QEMU's proxy: ssh, login"].value == pytest.approx(1.6)
    assert got["ours to shadow: nginx, 8 MiB"].met
    assert got["ours to shadow: one hot row, 4 clients"].met
    assert not got["ours to QEMU's proxy: one hot row, 4 clients, far ahead"].met
    assert got["ours: p99 of one hot row, 4 clients, ms"].met
    assert got["time of an ssh login to shadow's"].value == pytest.approx(1.25)
    assert got["errors of clients at a failover, the worst life"].met
    assert got["ours: from the later guest's frame to its release, p50, us"].met
    assert got["ours: from the later guest's frame to its release, p99, us"].value == 2000
    assert got["ours: needless checkpoints per released frame"].value == 0
    found[OURS][0].workloads["http"].needless = 100
    assert not goals(found)["ours: needless checkpoints per released frame"].met


@pytest.mark.parametrize(
    "predicted, factor, met",
    [(8.0, 1, True), (15, 1.875, True), (20, 2.5, False), (3, 2.67, False)],
)
def test_what_shadow_mode_predicts_is_compared_with_the_price(
    predicted: float, factor: float, met: bool
) -> None:
    found = lives()
    for one in found[SHADOW]:
        one.workloads["tpcb-4"].predicted = predicted
    (goal,) = (g for name, g in goals(found).items() if name.startswith("what explain predicts"))
    assert goal.value == pytest.approx(factor, rel=0.01) and goal.met == met
    part = Part("apps", "title")
    apps.add_rows(part, found)
    (row,) = (r for r in part.rows if r.name.endswith("what explain predicts for ours"))
    assert row.arms[SHADOW].median == predicted


def test_what_was_not_measured_is_not_met() -> None:
    nothing: dict[str, list[Life]] = {arm: [] for arm in ARMS}
    part = Part("apps", "title")
    apps.add_rows(part, nothing)
    assert part.rows == []
    assert not any(g.met or g.value is not None for g in goals(nothing).values())
    found = lives()
    found[OURS][1].failover = None
    assert not goals(found)["errors of clients at a failover, the worst life"].met


def test_a_workload_that_hangs_is_shown_and_counts() -> None:
    found = lives()
    for one in found[OURS]:
        one.workloads["tpcb-4"] = Seen(Outcome.at_deadline(60.0, 2))
    part = Part("apps", "title")
    apps.add_rows(part, found)
    title = next(w.title for w in WORKLOADS if w.key == "tpcb-4")
    hung = next(r for r in part.rows if r.name == f"{title}: not ended at its deadline")
    assert hung.arms[OURS].median == 1 and hung.arms[SHADOW].median == 0
    got = goals(found)
    assert not got["ours: p99 of one hot row, 4 clients, ms"].met
    assert got["ours to shadow: one hot row, 4 clients"].value == pytest.approx(0.005)


def test_lives_can_be_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPS_LIVES", raising=False)
    assert apps.wanted_lives(False) == 5 and apps.wanted_lives(True) == 1
    monkeypatch.setenv("APPS_LIVES", "2")
    assert apps.wanted_lives(False) == 2
    monkeypatch.setenv("APPS_LIVES", "0")
    with pytest.raises(ValueError, match="APPS_LIVES"):
        apps.wanted_lives(False)


def test_the_gap_of_a_failover_is_the_longest_after_it() -> None:
    assert longest_gap([0.0, 5.0, 5.5, 7.5, 8.0], 5.2) == 2.0
    assert longest_gap([0.0, 1.0, 4.0], 1.5) == 3.0  # it spans the kill
    assert longest_gap([0.0, 1.0], 2.0) == float("inf")  # nothing came any more


def test_some_workloads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPS_ONLY", raising=False)
    assert apps.wanted_workloads() == ()
    monkeypatch.setenv("APPS_ONLY", "tpcb-4 http")
    assert apps.wanted_workloads() == ("tpcb-4", "http")
    monkeypatch.setenv("APPS_ONLY", "tpcb-5")
    with pytest.raises(ValueError, match=r"no tpcb-5; there are .*tpcb-4"):
        apps.wanted_workloads()
