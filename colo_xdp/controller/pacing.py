# SPDX-License-Identifier: GPL-2.0-or-later
"""The governor of checkpoints: over any longer time they take at most a share of it. Pure.

Nearly every packet of a client can ask for one. Time for checkpoints is credit that grows at the
configured share, up to a burst: some in a row are not delayed, a stream of them is. A delayed
request is not lost: all that differ meanwhile fold into it, and one checkpoint serves them all.

Times in ns.
"""

from __future__ import annotations

from ..compare.causes import Cause

#: checkpoints in a row that may use this much time beyond their share
BURST_NS = 250_000_000
#: what no client can ask for, or what somebody waits for: begun at once
URGENT = frozenset({
    Cause.SWITCHOVER, Cause.OPERATOR, Cause.INITIAL, Cause.PEER_GAP, Cause.CONTROLLER_RESTART,
    Cause.POLICY, Cause.PERIODIC,
})  # fmt: skip


class Pacer:
    """How long the next checkpoint has to wait."""

    def __init__(self, share: int, ceiling_ns: int) -> None:
        """`share`: per cent; 100: nothing is ever delayed. `ceiling_ns`: the longest delay."""
        self._share, self._ceiling_ns = share, ceiling_ns
        self._credit_ns, self._at_ns = float(BURST_NS), 0
        self._last_ns = 0  # end of the last checkpoint

    def took(self, began_ns: int, ended_ns: int) -> None:
        """A checkpoint, whatever asked for it, held everything for this long."""
        self._credit_ns = self._credit(began_ns) - (ended_ns - began_ns)
        self._at_ns = self._last_ns = ended_ns

    def _credit(self, now_ns: int) -> float:
        """What is there now. Time in a checkpoint brings no credit."""
        grown = max(0, now_ns - self._at_ns) * self._share / (100 - self._share or 1)
        return min(float(BURST_NS), self._credit_ns + grown)

    def begin_ns(self, now_ns: int) -> int:
        """When the next one may begin: now, or later by the ceiling at most."""
        if self._share >= 100:
            return now_ns
        debt = -self._credit(now_ns)
        if debt <= 0:
            return now_ns
        wait = debt * (100 - self._share) / self._share
        return max(now_ns, min(now_ns + int(wait), self._last_ns + self._ceiling_ns))
