# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a frame of the PVM waits for its counterpart before a checkpoint is requested. Pure.

There is one object per pair, which the engines of all NICs share. Patience is the largest of

- the floor,
- what a checkpoint costs now (smoothed): whoever waits as long as the remedy costs pays at most
  twice what the best choice in hindsight would have cost,
- LAGS times the lag with which the SVM has answered lately: a checkpoint that is requested while
  the counterpart is on its way is needless, and makes a slow SVM slower,

and never more than the ceiling, compare_timeout. An SVM that has not even acked what the PVM's
frame acks has not decided otherwise (its kernel acks, not an application): it does not run, or has
not got the client's frame. That is worth `stalled_ns`.

The lag is the second longest of the longest waits of the last WINDOWS windows of WINDOW_NS in which
anything left that the SVM has sent, too (not by a checkpoint, or a rule): one outlier does not
count, and many frames that hardly wait (a download) do not hide a few that do. A wait counts if its
counterpart has ended it, also one that came while a checkpoint was already requested; a wait that a
checkpoint ended says nothing about the SVM, nor does one that only `stalled_ns` allowed (a client's
frame that was lost to the SVM comes again after a second). So patience could stay too short for
ever where the SVM always needs a little longer: after EXPLORE - 1 checkpoints for waiting output,
the next wait may be LONGER times as long.

A frame that waits costs a call of answered(), a window a sort of WINDOWS numbers.

docs/design/checkpoints.md has the argument, and where it does not hold. All times in ns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import nlargest

#: What the lag is taken from: 8 s of traffic at most, of the last minute.
WINDOW_NS, WINDOWS, MEMORY_NS = 250_000_000, 32, 60_000_000_000
#: patience as a multiple of the lag
LAGS = 3
#: each of so many waits that end in a checkpoint is so many times as long, to learn
EXPLORE, LONGER = 4, 2
#: the least patience with an SVM that has not acked
STALLED_NS = 1_000_000_000
#: Until FEW windows are known the lag counts as at least this: a new copy is slow at first (TCG has
#: to translate all of its code).
UNKNOWN_LAG_NS, FEW = 330_000_000, 8
#: the cost of a checkpoint until one was made, and the weight of a new one in the mean
UNKNOWN_COST_NS, WEIGHT = 50_000_000, 0.25
#: The guests are quiet when neither has sent anything for this long, and for twice as long as the
#: longest wait of a usual window.
QUIET_NS = 15_000_000
#: Disagreement lasts if so many checkpoints for what waited were needed in so long.
LASTING, LASTING_NS = 4, 3_000_000_000
#: what patience can come from, as the status document names it
SOURCES = ("fixed", "ceiling", "lag", "checkpoint", "floor")


class Patience:
    """Patience of one pair.

    adaptive: False: always the ceiling, but it is measured all the same.
    """

    __slots__ = (
        "_cost_ns",
        "_exploring",
        "_floor_ns",
        "_fresh",
        "_kernel",
        "_missed",
        "_needed",
        "_next_ns",
        "_windows",
        "adaptive",
        "awake_ns",
        "before_ns",
        "ceiling_ns",
        "heard_ns",
        "lag_ns",
        "lasting",
        "longest_ns",
        "moved_ns",
        "ns",
        "quiet_ns",
        "repeat_ns",
        "since_ns",
        "source",
        "stalled_ns",
        "usual_ns",
    )

    def __init__(self, ceiling_ns: int, floor_ns: int = 0, *, adaptive: bool = False) -> None:
        self.ceiling_ns, self._floor_ns = ceiling_ns, floor_ns
        self.adaptive = adaptive
        # the end and the longest wait of each, the oldest first
        self._windows: deque[tuple[int, int]] = deque(maxlen=WINDOWS)
        self._kernel: dict[int, list[int]] = {}  # the fast path's histograms, by NIC
        self._fresh: set[int] = set()  # NICs whose histogram was read since the last checkpoint
        self._cost_ns = 0.0  # 0: not known
        self._next_ns = 0
        self._missed = 0  # checkpoints for output that had waited
        self._exploring = False
        self._needed: deque[int] = deque(maxlen=LASTING)  # when the latest of them were complete
        #: the guests disagree again and again: silence means that, and is looked for more often
        self.lasting = False
        #: the longest wait of this window that a counterpart has ended; 0: none
        self.longest_ns = 0
        #: when the last frame of the SVM was captured
        self.heard_ns = 0
        #: when the last checkpoint was complete: waits of older frames are not the SVM's doing
        self.since_ns = 0
        #: when the SVM first sent anything since then; 0: not yet
        self.awake_ns = 0
        #: when a frame of either guest last came to user space, at any NIC, but for repetitions and
        #: acks; what that was before the frame that is processed now
        self.moved_ns = self.before_ns = 0
        self.ns = self.usual_ns = self.stalled_ns = self.lag_ns = self.quiet_ns = 0
        self.repeat_ns = 0  # least age of output whose repetition by the PVM counts
        self.source = "fixed"
        self._update()

    @property
    def cost_ns(self) -> int:
        """Return what a checkpoint costs, as far as is known."""
        return int(self._cost_ns) or UNKNOWN_COST_NS

    def waited(self, ns: int) -> None:
        """Note a wait that a counterpart has ended."""
        if ns > self.longest_ns:
            self.longest_ns = ns

    def answered(self, sent_ns: int, asked: bool) -> None:
        """Note that the frame of the SVM that was heard last has ended the wait of one of the PVM.

        sent_ns: when that was captured; asked: its flow has requested a checkpoint. A wait that is
        longer than patience without that was one for an SVM that does not run, or has not got what
        its client sent. The times of capture count: what this host's controller is late by is not
        the SVM's lag.
        """
        lag = self.heard_ns - max(sent_ns, self.awake_ns)
        if lag > self.longest_ns and sent_ns > self.since_ns and (lag <= self.ns or asked):
            self.longest_ns = lag

    def due_ns(self, at_ns: int, limit_ns: int = 0) -> int:
        """Return until when output may wait that has waited since at_ns.

        limit_ns: how long once the SVM runs; 0: patience.
        """
        limit = limit_ns or self.ns
        if not self.adaptive:
            return at_ns + limit
        if self.awake_ns:
            due = max(at_ns, self.awake_ns) + limit
        else:
            due = max(at_ns + limit, self.since_ns + STALLED_NS)
        return min(due, at_ns + self.ceiling_ns)

    def look_ns(self, due_ns: int, now_ns: int) -> int:
        """Return when to look again at what may wait until due_ns; earlier if that may change."""
        return due_ns if self.awake_ns else min(due_ns, now_ns + self.ns)

    def repeated(self) -> None:
        """Note that the frame that is processed now is an old one, sent again.

        A guest that has nothing to say repeats what its client has not acked. So a silence that is
        longer than a retransmission timeout (200 ms) would never be seen.
        """
        self.moved_ns = self.before_ns

    def kernel_waits(self, nic: int, waits: Sequence[int]) -> None:
        """Note the fast path's histogram of a NIC: counts of waits below 1, 2, 4, ... us.

        The middle of the highest bucket that has grown counts as a wait. Output of the PVM does not
        wait there for more than half of patience, and then waits in the slow path. The kernel
        counts from when anything of the connection began to wait, so larger values also arise
        where a late ack is followed by data.
        """
        before, fresh = self._kernel.get(nic), nic in self._fresh
        self._kernel[nic] = list(waits)
        self._fresh.add(nic)
        if fresh and not self.awake_ns and list(waits) != before:
            self.awake_ns = self.since_ns
        if before is None or len(before) != len(waits):
            return
        for i in range(len(waits) - 1, -1, -1):
            if waits[i] > before[i] and 1000 << i <= self.ns:
                self.waited(750 << i)
                return

    def begin_epoch(self, now_ns: int) -> None:
        """Note that a checkpoint is complete: called once for each NIC, with the same time."""
        if self.since_ns != now_ns:
            self.awake_ns = 0
            self._fresh.clear()

    def checkpointed(self, took_ns: int, *, missed: bool = False) -> None:
        """Note a checkpoint, from its beginning to its end.

        missed: it was requested because output of the PVM had no counterpart in time.
        """
        if missed:
            self._missed += 1
            self._exploring = self._missed % EXPLORE == EXPLORE - 1
        if self._cost_ns:
            self._cost_ns += WEIGHT * (took_ns - self._cost_ns)
        else:
            self._cost_ns = float(max(1, took_ns))
        self._update()

    def needed(self, now_ns: int) -> None:
        """Note that a checkpoint for what had waited is complete, and was right."""
        self._needed.append(now_ns)
        self._look_whether_it_lasts(now_ns)

    def needless(self) -> None:
        """Note that a checkpoint for what had waited was requested too soon."""
        self._needed.clear()
        self.lasting = False

    def _look_whether_it_lasts(self, now_ns: int) -> None:
        needed = self._needed
        self.lasting = len(needed) == LASTING and now_ns - needed[0] <= LASTING_NS

    def new_copy(self) -> None:
        """Forget the lag: there is another SVM."""
        self._windows.clear()
        self._exploring = False
        self.needless()
        self._update()

    def due(self, now_ns: int) -> bool:
        """Return whether a window has ended; end_window() is to be called then."""
        return now_ns >= self._next_ns

    def end_window(self, now_ns: int) -> None:
        """End a window. One in which nothing was released that both have sent does not count."""
        self._next_ns = now_ns + WINDOW_NS
        was = self.lasting
        self._look_whether_it_lasts(now_ns)
        known = len(self._windows)
        while len(self._windows) > FEW and self._windows[0][0] < now_ns - MEMORY_NS:
            self._windows.popleft()
        if self.longest_ns:
            self._windows.append((now_ns, self.longest_ns))
        if self.longest_ns or len(self._windows) != known or self.lasting != was:
            self.longest_ns = 0
            self._update()

    def _update(self) -> None:
        top = nlargest(2, (wait for _, wait in self._windows))
        self.lag_ns = top[-1] if top else 0
        if len(self._windows) < FEW:
            self.lag_ns = max(UNKNOWN_LAG_NS, *top, 0)
        wanted, self.source = max(
            (LAGS * self.lag_ns, "lag"), (self.cost_ns, "checkpoint"), (self._floor_ns, "floor")
        )
        if not self.adaptive:
            wanted, self.source = self.ceiling_ns, "fixed"
        elif wanted >= self.ceiling_ns:
            wanted, self.source = self.ceiling_ns, "ceiling"
        ceiling = self.ceiling_ns
        self.usual_ns = wanted
        self.ns = min(ceiling, wanted * LONGER) if self._exploring else wanted
        self.stalled_ns = min(ceiling, max(self.ns, LONGER * wanted, STALLED_NS))
        waits = sorted(wait for _, wait in self._windows)
        usual = waits[len(waits) // 2] if len(waits) >= FEW else self.lag_ns
        quiet = QUIET_NS if self.lasting else max(QUIET_NS, min(self.lag_ns, 2 * usual))
        self.quiet_ns = min(wanted, quiet)
        self.repeat_ns = min(wanted, 2 * max(QUIET_NS, self.lag_ns))
