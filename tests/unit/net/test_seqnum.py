# SPDX-License-Identifier: GPL-2.0-or-later
"""Serial arithmetic around the wrap."""

import pytest

from colo_xdp.net import seqnum as s

TOP = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("a", "b", "d"),
    [(0, 0, 0), (1, 0, 1), (0, TOP, 1), (TOP, 0, -1), (10, TOP - 9, 20), (0x7FFFFFFF, 0, TOP >> 1)],
)
def test_diff(a: int, b: int, d: int) -> None:
    assert s.diff(a, b) == d
    assert s.add(b, d) == a
    assert s.lt(a, b) is (d < 0)
    assert s.leq(a, b) is (d <= 0)
    assert s.gt(a, b) is (d > 0)
    assert s.geq(a, b) is (d >= 0)


def test_half_way_is_less_both_ways() -> None:
    assert s.diff(0x80000000, 0) == s.diff(0, 0x80000000) == -0x80000000


def test_later() -> None:
    assert s.later(None, 5) == 5
    assert s.later(TOP, 5) == 5
    assert s.later(5, TOP) == 5
