# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows that the status page plots."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.engine.waits import WAIT_BUCKETS
from colo_xdp.status import history
from colo_xdp.status.document import OFFLOAD_WAIT_BUCKETS, empty
from colo_xdp.status.history import COLUMNS, EVERY_S, SIZE, History, quantile, sample


def document(role: str = "primary") -> dict[str, Any]:
    return copy.deepcopy(empty("web1", role).to_json())


def test_the_first_row_has_what_needs_no_difference() -> None:
    s = document()
    s["held"]["packets"], s["peer"]["silent_ms"] = 7, 123.4567
    row = sample(s, None, 1000.04, 10)
    assert list(row) == list(COLUMNS)
    assert row["at"] == 1000.0 and row["state"] == "starting" and row["held"] == 7
    assert row["silent_ms"] == 123.5, "no more digits than are plotted"
    assert row["frames_per_s"] is None and row["wait_p99_ms"] is None and row["checkpoints"] == {}


def test_rates_are_differences() -> None:
    before, s = document(), document()
    before["engine"]["released"], s["engine"]["released"] = 100, 300
    out = s["programs"]["pvm_out"]
    out |= {"offload_passed": [700, 0], "punt": [300, 0], "drop_mode": [50, 0], "pass": [100, 0]}
    s["checkpoints"] |= {"total": 3}
    s["checkpoints"]["by_cause"] |= {"periodic": 2, "operator": 1}
    row = sample(s, before, 0, 10)
    assert row["frames_per_s"] == 100, "200 by the controller, 700 by the kernel, 100 let through"
    assert row["fast_share"] == 0.7
    assert row["checkpoints"] == {"periodic": 2, "operator": 1}


def test_waits_are_those_of_the_interval_and_of_both_paths() -> None:
    before, s = document(), document()
    before["wait"]["buckets"][-1] = s["wait"]["buckets"][-1] = 1000  # of long ago
    s["wait"]["buckets"][WAIT_BUCKETS.index(0.01)] = 2
    s["offload"]["waits"][OFFLOAD_WAIT_BUCKETS.index(16e-6)] = 98
    row = sample(s, before, 0, 10)
    assert row["wait_p50_ms"] == 0.016 and row["wait_p99_ms"] == 10


@pytest.mark.parametrize(
    ("q", "buckets", "want"),
    [
        (0.5, [], None),
        (0.5, [(1.0, 0)], None),
        (0.5, [(2.0, 1), (1.0, 1)], 1.0),
        (0.99, [(2.0, 1), (1.0, 99)], 1.0),
        (0.99, [(2.0, 2), (1.0, 98)], 2.0),
        (1.0, [(2.0, 1), (1.0, 1)], 2.0),
    ],
)
def test_quantiles(q: float, buckets: list[tuple[float, int]], want: float | None) -> None:
    assert quantile(buckets, q) == want


def test_the_secondary_loads_checkpoints_and_forwards_frames_once() -> None:
    before, s = document("secondary"), document("secondary")
    s["checkpoints"]["total"] = 4
    for prog in ("svm_out", "svm_out_xdp"):  # an XDP program precedes the other one
        s["programs"][prog]["pass_rewritten"] = [50, 0]
    row = sample(s, before, 0, 10)
    assert row["checkpoints"] == {"loaded": 4} and row["frames_per_s"] == 5
    assert row["fast_share"] is None


def test_counters_that_begin_again_are_no_negative_rates() -> None:
    """The controller's begin with it; those of programs with the data path."""
    before, s = document(), document()
    before["engine"]["released"] = 10_000
    before["checkpoints"]["total"], before["checkpoints"]["by_cause"]["periodic"] = 9, 9
    before["wait"]["buckets"][0] = 5
    row = sample(s, before, 0, 10)
    assert row["frames_per_s"] == 0 and row["checkpoints"] == {} and row["wait_p50_ms"] is None


def test_a_change_of_roles_has_no_difference() -> None:
    s = document("secondary")
    s["checkpoints"]["total"] = 4
    row = sample(s, document("primary"), 0, 10)
    assert row["frames_per_s"] is None and row["checkpoints"] == {}


def test_it_is_bounded_and_rows_keep_their_numbers() -> None:
    h = History(1000.0, size=3)
    for i in range(5):
        h.add(document(), 1000.0 + i, float(i))
    got = json.loads(h.to_json())
    assert got["columns"] == list(COLUMNS) and got["every_s"] == EVERY_S
    assert [r[0] for r in got["rows"]] == [1002, 1003, 1004] and got["last"] == 5
    assert [r[0] for r in json.loads(h.to_json(4))["rows"]] == [1004]
    assert json.loads(h.to_json(5))["rows"] == json.loads(h.to_json(99))["rows"] == []


def test_an_empty_one_is_json() -> None:
    assert json.loads(History(1.0).to_json()) == {
        "began": 1.0, "every_s": EVERY_S, "hours": history.HOURS, "columns": list(COLUMNS),
        "last": 0, "rows": [],
    }  # fmt: skip


def test_who_asks_each_second_takes_a_row_each_interval() -> None:
    h = History(0.0)
    taken = []
    for i in range(41):
        now = 5.0 + i * 1.003
        if h.due(now):
            h.add(document(), now, now)
            taken.append(i)
    assert taken == [0, 10, 20, 30, 40]


def test_six_hours_are_small_and_quick() -> None:
    h = History(1e9)
    s = document()
    s["state"] = "checkpointing"
    s["patience"] |= {"checkpoint_ms": 123.456, "lag_ms": 12.3456}
    for i in range(SIZE + 10):
        s["checkpoints"]["by_cause"] = dict.fromkeys(("periodic", "payload_differs"), i)
        h.add(copy.deepcopy(s) if i < 2 else s, 1.79e9 + 10 * i, 10.0 * i)
    began = time.perf_counter()
    text = h.to_json()
    assert time.perf_counter() - began < 0.05, "frames wait for the interpreter meanwhile"
    assert len(text) < 400_000 and len(json.loads(text)["rows"]) == SIZE


def test_every_program_that_is_read_exists() -> None:
    assert {"pvm_out", "svm_out", "svm_out_xdp"} <= set(abi.PROGRAMS)
    for prefix in (*history._PASSES, "punt"):
        assert [r for r in abi.REASONS if r.startswith(prefix)]
