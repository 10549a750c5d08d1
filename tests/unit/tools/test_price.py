# SPDX-License-Identifier: GPL-2.0-or-later
"""What disagreement costs, from the journal of checkpoints."""

from __future__ import annotations

import random
from typing import Any

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.controller.pacing import Pacer
from colo_xdp.tools.price import LOOK_MS, Price, estimate, lines

NOW = {"shadow": False, "patience_ms": 300.0, "quiet_ms": 15.0, "share": 25, "agreed_ms": 0.0}


def entry(
    agreed: float, waited: float, total: float, cause: Cause = Cause.CROSSED, **more: Any
) -> dict[str, Any]:
    return {
        "cause": cause.value, "agreed_ms": agreed, "waited_ms": waited, "total_ms": total,
        "failed": "", "differed": True, "followed_ms": 0.0, **more,
    }  # fmt: skip


def test_guests_that_never_differed_have_no_price() -> None:
    assert estimate([], NOW) is None and lines([], NOW) == []
    other = entry(50.0, 0.0, 30.0, Cause.OPERATOR, differed=False)
    assert estimate([other, entry(1.0, 2.0, 3.0, failed="no answer")], NOW) is None


def test_work_that_waits_gets_what_agreement_leaves() -> None:
    price = estimate([entry(100.0, 30.0, 70.0), entry(300.0, 10.0, 30.0)], NOW)
    assert price == Price(2, 200.0, 200.0, 20.0, 50.0, 25)
    assert price.left == pytest.approx(200 / 270)
    text = "\n".join(lines([entry(100.0, 30.0, 70.0)], NOW))
    assert "costs 30 ms until it is noticed" in text and "36%" in text and "a guess" in text


def test_agreement_that_something_else_has_ended_counts() -> None:
    entries = [
        entry(100.0, 10.0, 40.0),
        entry(200.0, 0.0, 40.0, Cause.OPERATOR, differed=False),
        entry(60.0, 0.0, 40.0, failed="no answer"),
    ]
    price = estimate(entries, NOW | {"agreed_ms": 100.0})
    assert price is not None and (price.differences, price.agreed_ms) == (1, 400.0)


def test_the_governor_bounds_what_checkpoints_take() -> None:
    price = Price(20, 10.0, 10.0, 0.0, 50.0, 25)
    assert price.left == pytest.approx(10 / 200)
    assert Price(20, 10.0, 10.0, 0.0, 50.0, 100).left == pytest.approx(10 / 60)


def test_in_shadow_mode_waits_are_those_that_protection_would_have() -> None:
    now = NOW | {"shadow": True}
    often = [entry(100.0, 700.0, 50.0, Cause.COMPARE_TIMEOUT)] * 12
    price = estimate(often, now)
    assert price is not None and price.noticed_ms == 15.0 + LOOK_MS
    rare = estimate([entry(5000.0, 700.0, 50.0, Cause.COMPARE_TIMEOUT)] * 12, now)
    assert rare is not None and rare.noticed_ms == 300.0 + LOOK_MS
    varied = [entry(100.0, 700.0, 10.0 * i, Cause.COMPARE_TIMEOUT) for i in range(1, 13)]
    cheap = estimate(varied, now)
    assert cheap is not None and cheap.checkpoint_ms == 40.0
    full = estimate([entry(100.0, 1400.0, 50.0, Cause.QUEUE_FULL)] * 12, now)
    assert full is not None and full.noticed_ms == 15.0 + LOOK_MS, "the head would have asked"
    certain = estimate([entry(100.0, 2.0, 50.0, Cause.PAYLOAD_DIFFERS)] * 12, now)
    assert certain is not None and certain.noticed_ms == 2.0
    assert "would cost" in "\n".join(lines(often, now))


def test_a_slower_svm_would_be_waited_for() -> None:
    now = NOW | {"shadow": True}
    entries = [
        entry(100.0, 700.0, 50.0, Cause.COMPARE_TIMEOUT, followed_ms=250.0),
        entry(100.0, 700.0, 50.0, Cause.COMPARE_TIMEOUT, followed_ms=90.0),  # not even all of it
    ]
    price = estimate(entries * 6, now)
    assert price is not None and (price.agreed_ms, price.followed_ms) == (100.0, 175.0)
    assert price.left == pytest.approx(100 / (175 + 15 + LOOK_MS + 50))
    assert "the SVM took 175 ms for what they agreed on" in "\n".join(lines(entries, now))
    assert "the SVM took" not in "\n".join(lines([entry(100.0, 30.0, 70.0)], NOW))


def test_shadow_mode_predicts_what_protection_costs_although_it_sees_fewer_differences() -> None:
    """A guest that differs every 120 ms of its work, which nothing else ends."""
    rnd = random.Random(3)
    work, wait, cost = 120.0, 700.0, 60.0
    entries, clock = [], 0.0
    while clock < 3_600_000 / 60:
        agreed = rnd.expovariate(1 / work)
        entries.append(entry(agreed, wait, cost, Cause.COMPARE_TIMEOUT))
        clock += agreed + wait + cost
    seen = len(entries) / clock
    assert seen < 0.2 / work, "an hour of shadow mode shows fewer than protection would"
    price = estimate(entries, NOW | {"shadow": True})
    assert price is not None
    pacer, done, now = Pacer(25, 3_000_000_000), 0.0, 0.0
    for _ in range(2000):  # protected: all work stops while it waits
        agreed = rnd.expovariate(1 / work)
        done += agreed
        began = pacer.begin_ns(int((now + agreed + 15 + LOOK_MS) * 1e6))
        now = began / 1e6 + cost
        pacer.took(began, int(now * 1e6))
    assert price.left == pytest.approx(done / now, rel=0.25)
