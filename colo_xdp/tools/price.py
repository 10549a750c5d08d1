# SPDX-License-Identifier: GPL-2.0-or-later
"""Estimate what disagreement costs, or in shadow mode what it would cost if output were held. Pure.

Between two checkpoints the guests agree for some time, then they differ, and that costs a wait and
a checkpoint. Shadow mode shows how long they agree as well as protection does, although fewer
differences are seen there: what one leads to goes on until the next checkpoint, and counts once. So
the estimate rests on the time from a checkpoint to the arrival of the first frame that differed or
waited in vain, not on the number of differences in an hour. Checkpoints for other reasons end such
a time without a difference.

In shadow mode the PVM does not wait for the SVM, which may be the slower one, above all after a
checkpoint. With protection the same work takes as long as the SVM needs for it: until it had sent
all of the output that the two agreed on. Its checkpoints are further apart than protection's, so
each has more memory to copy: the cheaper ones count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.causes import WAITS, Cause

#: fewer differences than these say little
ENOUGH = 10
#: ms until the engine looks whether the guests are silent, on average
LOOK_MS = 10.0
#: of checkpoints in shadow mode that would have come sooner if output were held
_LATE = WAITS | {Cause.QUEUE_FULL}


@dataclass(frozen=True, slots=True)
class Price:
    """What a difference costs, and how often there is one. Times in ms."""

    differences: int
    #: how long the guests agreed before one, on average
    agreed_ms: float
    #: how long that takes with protection, where the PVM waits for the SVM
    followed_ms: float
    #: until it is noticed, on average; in shadow mode what it would be if output were held
    noticed_ms: float
    checkpoint_ms: float
    #: checkpoints take this share of the time at most, per cent
    share: int

    @property
    def left(self) -> float:
        """Return the part of its work that the guest gets done if all of it waits: 0 to 1."""
        period = max(
            self.followed_ms + self.noticed_ms + self.checkpoint_ms,
            self.checkpoint_ms * 100 / self.share,
        )
        return self.agreed_ms / period if period else 1.0


def estimate(entries: Sequence[dict[str, Any]], now: dict[str, Any]) -> Price | None:
    """Return what the journal's checkpoints say; None: no difference has been seen.

    entries: the newest last; now: the `now` of the answer to `explain`.
    """
    done = [e for e in entries if not e["failed"]]
    differed = [e for e in done if e["differed"]]
    if not differed:
        return None
    n = len(differed)
    agreed = sum(e["agreed_ms"] for e in done) + now["agreed_ms"]
    followed = sum(max(e["agreed_ms"], e["followed_ms"]) for e in done) + now["agreed_ms"]
    noticed = [e["waited_ms"] for e in differed]
    costs = sorted(e["total_ms"] for e in differed)
    checkpoint = sum(costs) / n
    if now["shadow"]:
        checkpoint = costs[n // 4]
        often = agreed / n * 4 < 3000  # compare/patience.py: LASTING in LASTING_NS
        wait = now["quiet_ms"] if often else now["patience_ms"]
        noticed = [wait + LOOK_MS if e["cause"] in _LATE else e["waited_ms"] for e in differed]
    return Price(n, agreed / n, followed / n, sum(noticed) / n, checkpoint, now["share"])


def lines(entries: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """Say it to an operator."""
    price = estimate(entries, now)
    if price is None:
        return []
    would = "would cost" if now["shadow"] else "costs"
    out = [
        "",
        f"what disagreement {would}:",
        f"  the guests agreed for {price.agreed_ms:.0f} ms on average, {price.differences} times; "
        f"each difference {would} {price.noticed_ms:.0f} ms until it is noticed",
        f"  and {price.checkpoint_ms:.0f} ms for the checkpoint",
    ]
    if price.followed_ms > price.agreed_ms:
        out.append(
            f"  the SVM took {price.followed_ms:.0f} ms for what they agreed on, and would be "
            "waited for"
        )
    out.append(f"  work that waits for all of that gets {price.left:.0%} of what it gets without")
    if price.differences < ENOUGH:
        out.append(f"  (a guess: fewer than {ENOUGH} differences)")
    return out
