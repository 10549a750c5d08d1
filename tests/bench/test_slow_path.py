# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the engine's benchmark runs, and what it reports on memory, scale and floods."""

from __future__ import annotations

import os

import pytest

from . import slow_path


@pytest.mark.netns
@pytest.mark.timeout(300)
def test_the_benchmark() -> None:
    if os.geteuid():
        assert not os.environ.get("CI")
        pytest.skip("a tap needs root")
    r = slow_path.measure(quick=True)
    for row in [*r["stages"], *r["scale"]]:
        assert row["ns"]["all"] > 0 and row["ratio"] > 1  # nothing is cheaper than the least
    f = r["flood"]
    assert f["in_order"] and f["checkpoints"] > 10
    assert f["lost"] <= f["checkpoints"]  # a full table costs a frame, which TCP retransmits
    few, many = r["scale"]
    assert many["ns"]["all"] < 4 * few["ns"]["all"], "the cost grows with the connections"


def test_100_000_connections_take_less_than_500_mib() -> None:
    m = slow_path.memory(100_000)
    assert m["bytes"] < 500 << 20, m
