# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames of both guests that arrive during a checkpoint, until it decides about them."""

from __future__ import annotations

from collections import deque

from ..compare.held_queue import Held, HeldQueue
from ..compare.ledger import Ledger
from ..compare.limits import CHECKPOINT_QUEUE
from ..net.frame import Frame
from ..net.packet import Packet

_LONG_AGO = -1


class CheckpointQueue:
    """Undecided frames of the PVM in capture order, and frames of the SVM of an epoch to come.

    ledger: what the PVM's frames are charged to.
    """

    def __init__(self, ledger: Ledger, max_packets: int) -> None:
        self._ledger, self._max_packets = ledger, max_packets
        self.held = HeldQueue(ledger)
        #: When the PVM stopped for the last checkpoint (ns): what was captured until then is in it.
        self.stop_ns = _LONG_AGO
        # Each with its epoch modulo 4096; the second is of flows that hold nothing.
        self._next: deque[tuple[Frame, int]] = deque()
        self._next_bypassed: deque[tuple[Frame, int]] = deque()
        self.lost = 0  # missing frames of the SVM's next epoch

    # -- of the PVM

    def offer(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Hold one more frame if there is room: CHECKPOINT_QUEUE times what the flows may hold."""
        if not self._ledger.room(CHECKPOINT_QUEUE):
            return False
        self.held.push(rec, p, now_ns)
        return True

    def collect(self, frames: list[Held]) -> None:
        """Take over the frames that the flows held, and sort all held frames by age."""
        if frames:
            frames = [*frames, *self.held.drain()]
            frames.sort(key=lambda held: held[2])
            self.held.extend(frames)

    def take_until(self, ts_ns: int) -> list[Held]:
        """Remove and return the frames that were captured at ts_ns or before."""
        frames = self.held.drain()
        self.held.extend(held for held in frames if held[0].ts_ns > ts_ns)
        return [held for held in frames if held[0].ts_ns <= ts_ns]

    # -- of the SVM

    def buffer(self, rec: Frame, tag: int, bypassed: bool) -> bool:
        """Keep a frame until its epoch begins; return False if there is no room."""
        kept = self._next_bypassed if bypassed else self._next
        if len(kept) >= self._max_packets:
            return False
        kept.append((rec, tag))
        return True

    def take_svm(self) -> list[tuple[Frame, int]]:
        """Remove and return all frames of the SVM, with the tags of their epochs."""
        kept = [*self._next, *self._next_bypassed]
        self._next.clear()
        self._next_bypassed.clear()
        return kept

    def forget_svm(self) -> int:
        """Remove all frames of the SVM; return how many were kept."""
        self.lost = 0
        return len(self.take_svm())
