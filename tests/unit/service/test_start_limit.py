# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller that is started again and again waits longer each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from colo_xdp.service.start_limit import LONGEST_S, WINDOW_S, Starts, delay
from colo_xdp.service.systemd import Notifier


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def starts(tmp_path: Path, clock: Clock) -> Starts:
    return Starts(tmp_path / "web1.starts", clock)


def test_the_first_ones_wait_for_nothing(starts: Starts) -> None:
    assert [starts.note() for _ in range(3)] == [0, 0, 0]


def test_then_it_doubles_up_to_a_limit(starts: Starts) -> None:
    assert [starts.note() for _ in range(10)][3:] == [1, 2, 4, 8, 16, 30, 30]
    assert delay(1000) == LONGEST_S


def test_a_loop_of_failures_comes_to_rest_at_the_limit(starts: Starts, clock: Clock) -> None:
    begin, n = clock.now, 0
    while clock.now < begin + 3600:
        starts.wait(Notifier(), clock.sleep)
        clock.sleep(1.5)  # a start that fails
        n += 1
    assert n < 3600 / LONGEST_S * 1.2 + 8


def test_an_orderly_end_and_time_are_forgotten(starts: Starts, clock: Clock) -> None:
    for _ in range(6):
        starts.note()
    starts.forget()
    assert starts.note() == 0
    for _ in range(6):
        starts.note()
    clock.now += WINDOW_S + 1
    assert starts.note() == 0


def test_a_file_of_another_boot_or_of_rubbish_is_none(starts: Starts, tmp_path: Path) -> None:
    for text in ("2000 2001 2002 2003 2004", "rubbish", "\0\0"):
        (tmp_path / "web1.starts").write_text(text)
        assert starts.note() == 0
