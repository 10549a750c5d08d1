# SPDX-License-Identifier: GPL-2.0-or-later
"""Count recent controller starts, so that a controller that fails again and again backs off.

A controller that dies once must be back at once, because packets wait for it: the unit's RestartSec
is short. RestartSteps=, which would lengthen it step by step, needs systemd 254; StartLimitBurst=
would end with a unit that stays dead. The next controller therefore waits itself, before it touches
anything.
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
AT_ONCE = 3  # starts within WINDOW_S that need not wait
LONGEST_S = 30.0
STEP_S = 1.0
LOAD_S = 120.0  # additional time a start may take, s: compiling on a busy machine


def delay(earlier: int) -> float:
    """Return the seconds to wait after this many failed starts within WINDOW_S."""
    return 0.0 if earlier < AT_ONCE else min(LONGEST_S, 2.0 ** (earlier - AT_ONCE))


class Starts:
    """Times of the last starts (monotonic, s), in a file that does not survive a reboot."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now

    def _read(self) -> list[float]:
        with contextlib.suppress(OSError, ValueError):
            times = [float(x) for x in self._path.read_text().split()]
            # a time in the future is from another boot: the directory was not in memory
            return [t for t in times if 0 <= self._now() - t < WINDOW_S]
        return []

    def note(self) -> float:
        """Record this start; return the seconds that it should wait."""
        earlier = self._read()
        # one entry for each step of the delay is enough
        times = [*earlier[-AT_ONCE - 8 :], self._now()]
        self._path.write_text("\n".join(f"{t:.3f}" for t in times))
        return delay(len(earlier))

    def forget(self) -> None:
        """Remove the record after an orderly end."""
        self._path.unlink(missing_ok=True)

    def wait(self, notifier: Notifier, sleep: Callable[[float], None] = time.sleep) -> None:
        """Record this start and wait as long as it should, reporting the reason to systemd."""
        left = self.note()
        if left:
            log.error(
                "started too often in %.0f s: waiting %.0f s before the next attempt",
                WINDOW_S,
                left,
            )
        while left > 0:
            # the unit's start has a deadline of its own
            notifier.send(
                STATUS=f"failed repeatedly: the next attempt is in {left:.0f} s",
                EXTEND_TIMEOUT_USEC=str(int((STEP_S + LOAD_S) * 1e6)),
            )
            sleep(min(left, STEP_S))
            left -= STEP_S
