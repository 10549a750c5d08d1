# SPDX-License-Identifier: GPL-2.0-or-later
"""Throughput, waits and agreement, as figures of one document or of two."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.engine.counters import COUNTERS, UNCOMPARED
from colo_xdp.engine.waits import WAIT_BUCKETS
from colo_xdp.status import work as module
from colo_xdp.status.document import empty
from colo_xdp.status.work import Rate, quantile, work


def doc(role: str = "primary") -> dict[str, Any]:
    s = empty("web1", role).to_json()
    s["uptime_s"] = 100.0
    return s


def test_the_names_exist() -> None:
    """A counter that is renamed must not turn a figure into zero."""
    for program, reason in module._BY_KERNEL:
        assert program in abi.PROGRAMS and reason in abi.REASONS
    assert {"pvm_in", "pvm_out", "svm_out", "svm_net"} <= set(abi.PROGRAMS)
    assert set(UNCOMPARED) < {name for name, _ in COUNTERS}


def test_nothing_has_happened_yet() -> None:
    for role in ("primary", "secondary"):
        w = work(doc(role))
        assert (w.sent, w.received, w.wait_p50_s, w.agreed, w.by_kernel) == (None,) * 5
        assert work(doc(role), doc(role)).sent is None, "no time has passed"


def test_rates_are_of_the_time_between() -> None:
    before, s = doc(), doc()
    s["uptime_s"] = 102.0
    s["programs"]["pvm_out"]["pass_released"] = [10, 10_000]
    s["programs"]["pvm_out"]["offload_passed"] = [20, 20_000]
    s["programs"]["svm_arrival"]["offload_released"] = [10, 10_000]
    s["programs"]["pvm_out"]["punt"] = [99, 99_000]  # to the controller: it has not left
    s["programs"]["pvm_in"]["pass_mirrored"] = [4, 400]
    w = work(s, before)
    assert w.sent == Rate(20, 160_000) and w.received == Rate(2, 1600)
    promoted, was = doc("secondary"), doc("secondary")
    promoted["uptime_s"] = 101.0
    promoted["programs"]["svm_out"]["pass_rewritten"] = [3, 300]
    promoted["programs"]["svm_net"]["pass"] = [5, 500]
    w = work(promoted, was)
    assert w.sent == Rate(3, 2400) and w.received == Rate(5, 4000)


def test_a_document_of_another_controller_gives_no_rate() -> None:
    s, before = doc(), doc()
    s["uptime_s"] = 5.0  # it has been restarted meanwhile
    assert work(s, before).sent is None
    before["role"], before["uptime_s"] = "secondary", 1.0
    assert work(s, before).sent is None


def test_agreement_and_the_kernels_share() -> None:
    s = doc()
    s["engine"]["released"] = 30
    s["engine"]["released_by_checkpoint"] = 4
    s["engine"]["uncompared"] = 1
    s["programs"]["svm_arrival"]["offload_rebuilt"] = [70, 1]
    w = work(s)
    assert w.agreed == 0.95 and w.by_kernel == 0.7
    later = deepcopy(s)
    later["uptime_s"] += 1
    later["engine"]["released"] = 40
    assert work(later, s).agreed == pytest.approx(105 / 110), "since the start"
    w = work(later, s, s)
    assert w.agreed == 1.0 and w.by_kernel == 0.0, "of the last second"
    assert w.wait_p50_s is None


def test_waits_are_of_both_paths() -> None:
    s = doc()
    s["wait"]["buckets"][WAIT_BUCKETS.index(1e-2)] = 1  # 5 to 10 ms
    s["offload"]["waits"][4] = 99  # 8 to 16 us
    w = work(s)
    assert w.wait_p50_s is not None and 8e-6 < w.wait_p50_s < 16e-6
    assert w.wait_p99_s is not None and w.wait_p99_s <= 16e-6
    s["wait"]["buckets"][WAIT_BUCKETS.index(1e-2)] = 2
    w = work(s)
    assert w.wait_p99_s is not None and 5e-3 < w.wait_p99_s < 10e-3


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([0, 0, 0], 0.5, None),
        ([4, 0, 0], 0.5, 0.5),
        ([4, 0, 0], 1.0, 1.0),
        ([1, 1, 0], 0.75, 1.5),
        ([0, 0, 5], 0.5, 2.0),  # above the last bound
        ([1, 0, 0], 0.99, 0.99),
    ],
)
def test_quantiles(counts: list[int], share: float, value: float | None) -> None:
    assert quantile([((1.0, 2.0), counts)], share) == value
    assert quantile([((1.0, 2.0), counts), ((1.5,), [0, 0])], share) == value
