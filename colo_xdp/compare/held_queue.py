# SPDX-License-Identifier: GPL-2.0-or-later
"""Queue of PVM frames that wait, in the order in which they leave, charged to a ledger.

Each compared flow has one; so has a checkpoint, for the frames that it will decide about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from ..net.frame import Frame
from ..net.packet import Packet
from .ledger import Ledger

#: a held frame: record, parsed frame, CLOCK_MONOTONIC ns from which its timeout runs
Held = tuple[Frame, Packet, int]


class HeldQueue:
    """Frames held by one flow or checkpoint, oldest first. `frames` is a read-only view."""

    __slots__ = ("_frames", "_ledger", "frames")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._frames: deque[Held] = deque()
        self.frames: Sequence[Held] = self._frames  # the same deque, for readers

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._frames)

    def __getitem__(self, i: int) -> Held:
        return self._frames[i]

    def offer(self, rec: Frame, p: Packet, since_ns: int) -> bool:
        """Append a frame if the ledger has room for it; return whether it had."""
        ledger = self._ledger  # room() and push() inlined, since every held frame passes here
        if ledger.pvm_packets >= ledger.max_packets or ledger.pvm_bytes >= ledger.max_bytes:
            return False
        ledger.pvm_packets += 1
        ledger.pvm_bytes += len(rec.frame)
        self._frames.append((rec, p, since_ns))
        return True

    def push(self, rec: Frame, p: Packet, since_ns: int) -> None:
        """Append a frame regardless of the limit."""
        self._ledger.pvm_packets += 1
        self._ledger.pvm_bytes += len(rec.frame)
        self._frames.append((rec, p, since_ns))

    def extend(self, frames: Iterable[Held]) -> None:
        """Append frames regardless of the limit."""
        for held in frames:
            self.push(*held)

    def pop(self) -> Held:
        """Remove and return the oldest frame."""
        held = self._frames.popleft()
        ledger = self._ledger
        ledger.pvm_packets -= 1
        ledger.pvm_bytes -= len(held[0].frame)
        return held

    def replace_head(self, rec: Frame, p: Packet) -> None:
        """Replace the oldest frame, part of which has left, by its rest.

        Its waiting time goes on.
        """
        whole, _, since = self._frames[0]
        self._ledger.pvm_bytes += len(rec.frame) - len(whole.frame)
        self._frames[0] = (rec, p, since)

    def drain(self) -> list[Held]:
        """Remove and return all frames, oldest first."""
        held = list(self._frames)
        self._frames.clear()
        self._ledger.pvm_packets -= len(held)
        self._ledger.pvm_bytes -= sum(len(rec.frame) for rec, _, _ in held)
        return held
