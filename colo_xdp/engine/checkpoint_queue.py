# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes of both guests while a checkpoint is under way, and what it decides about it."""

from __future__ import annotations

from collections import deque

from ..compare.held_queue import Held, HeldQueue
from ..compare.ledger import Ledger
from ..compare.limits import CHECKPOINT_QUEUE
from ..net.frame import Frame
from ..net.packet import Packet

_LONG_AGO = -1


class CheckpointQueue:
    """Frames of the PVM that are undecided, in the order of capture, and those of the SVM that are
    of an epoch to come. `ledger` is what the PVM's are charged to."""

    def __init__(self, ledger: Ledger, max_packets: int) -> None:
        self._ledger, self._max_packets = ledger, max_packets
        self.held = HeldQueue(ledger)
        #: when the PVM stopped, of the last checkpoint: what was captured until then is in it
        self.stop_ns = _LONG_AGO
        # each with its epoch modulo 4096; the latter of flows that hold nothing
        self._next: deque[tuple[Frame, int]] = deque()
        self._next_bypassed: deque[tuple[Frame, int]] = deque()
        self.lost = 0  # frames of the SVM's next epoch that are missing

    # -- of the PVM

    def offer(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Hold one more, if there is room: for some times what the flows may hold."""
        if not self._ledger.room(CHECKPOINT_QUEUE):
            return False
        self.held.push(rec, p, now_ns)
        return True

    def collect(self, frames: list[Held]) -> None:
        """Take what the flows held, of each in its order; oldest first of all that is held."""
        if frames:
            frames = [*frames, *self.held.drain()]
            frames.sort(key=lambda held: held[2])
            self.held.extend(frames)

    def take_until(self, ts_ns: int) -> list[Held]:
        """Remove the frames that were captured at ts_ns or before."""
        frames = self.held.drain()
        self.held.extend(held for held in frames if held[0].ts_ns > ts_ns)
        return [held for held in frames if held[0].ts_ns <= ts_ns]

    # -- of the SVM

    def buffer(self, rec: Frame, tag: int, bypassed: bool) -> bool:
        """Keep a frame until its epoch begins, if there is room."""
        kept = self._next_bypassed if bypassed else self._next
        if len(kept) >= self._max_packets:
            return False
        kept.append((rec, tag))
        return True

    def take_svm(self) -> list[tuple[Frame, int]]:
        """Remove all of the SVM, with the tags of their epochs."""
        kept = [*self._next, *self._next_bypassed]
        self._next.clear()
        self._next_bypassed.clear()
        return kept

    def forget_svm(self) -> int:
        """Remove all of the SVM; how many were kept."""
        self.lost = 0
        return len(self.take_svm())
