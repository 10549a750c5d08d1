# SPDX-License-Identifier: GPL-2.0-or-later
"""The pacing of checkpoints: in the long run they take at most a configured share of time. Pure.

Nearly every packet of a client can cause a checkpoint. Time for checkpoints is a credit that grows
at the configured share, up to a burst: a few in a row are not delayed, a stream of them is. A
delayed request is not lost: later divergences are folded into it, and one checkpoint serves all.

Times in ns.
"""

from __future__ import annotations

#: how much time checkpoints in a row may take beyond their share
BURST_NS = 250_000_000


class Pacer:
    """Computes how long the next checkpoint has to wait."""

    def __init__(self, share: int, ceiling_ns: int) -> None:
        """Set the share (per cent; 100 never delays) and `ceiling_ns`, the longest delay."""
        self._share, self._ceiling_ns = share, ceiling_ns
        self._credit_ns, self._at_ns = float(BURST_NS), 0
        self._last_ns = 0  # end of the last checkpoint

    def took(self, began_ns: int, ended_ns: int) -> None:
        """Charge a checkpoint, whatever its cause, for the time in which it held everything."""
        self._credit_ns = self._credit(began_ns) - (ended_ns - began_ns)
        self._at_ns = self._last_ns = ended_ns

    def _credit(self, now_ns: int) -> float:
        """Return the credit now. The time in a checkpoint earns none."""
        grown = max(0, now_ns - self._at_ns) * self._share / (100 - self._share or 1)
        return min(float(BURST_NS), self._credit_ns + grown)

    def begin_ns(self, now_ns: int) -> int:
        """Return when the next one may begin: now, or at most the longest delay after the last."""
        if self._share >= 100:
            return now_ns
        debt = -self._credit(now_ns)
        if debt <= 0:
            return now_ns
        wait = debt * (100 - self._share) / self._share
        return max(now_ns, min(now_ns + int(wait), self._last_ns + self._ceiling_ns))
