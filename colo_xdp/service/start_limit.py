# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a controller was started lately, so that one that fails again and again backs off.

A controller that dies once has to be back at once, since packets wait for it: the unit's
RestartSec is short. RestartSteps=, which would make it longer step by step, needs systemd 254;
StartLimitBurst= would end in a unit that stays dead. So the next controller itself waits, before
it touches anything.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from .systemd import Notifier

log = logging.getLogger("colo_xdp")

WINDOW_S = 300.0
AT_ONCE = 3  # starts within WINDOW_S that wait for nothing
LONGEST_S = 30.0
STEP_S = 1.0
LOAD_S = 120.0  # what a start may take besides: compiling, on a busy machine


def delay(earlier: int) -> float:
    """Seconds to wait after so many starts within WINDOW_S, none of which ended in order."""
    return 0.0 if earlier < AT_ONCE else min(LONGEST_S, 2.0 ** (earlier - AT_ONCE))


class Starts:
    """The times of the last starts (monotonic, s), in a file that does not outlive a boot."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now

    def _read(self) -> list[float]:
        with contextlib.suppress(OSError, ValueError):
            times = [float(x) for x in self._path.read_text().split()]
            # one in the future is of another boot: the directory was not in memory
            return [t for t in times if 0 <= self._now() - t < WINDOW_S]
        return []

    def note(self) -> float:
        """Write this start down; the seconds that it should wait."""
        earlier = self._read()
        # one number for each step of the delay is enough
        times = [*earlier[-AT_ONCE - 8 :], self._now()]
        self._path.write_text("\n".join(f"{t:.3f}" for t in times))
        return delay(len(earlier))

    def forget(self) -> None:
        """It has ended in order."""
        self._path.unlink(missing_ok=True)

    def wait(self, notifier: Notifier, sleep: Callable[[float], None] = time.sleep) -> None:
        """Note this start and wait as long as it should; systemd is told why."""
        left = self.note()
        if left:
            log.error(
                "started too often in %.0f s: waiting %.0f s before the next try", WINDOW_S, left
            )
        while left > 0:
            # the unit's start has a deadline of its own
            notifier.send(
                STATUS=f"failed again and again: the next try is in {left:.0f} s",
                EXTEND_TIMEOUT_USEC=str(int((STEP_S + LOAD_S) * 1e6)),
            )
            sleep(min(left, STEP_S))
            left -= STEP_S
