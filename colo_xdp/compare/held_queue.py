# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames of the PVM that wait, in the order in which they leave, charged to a ledger."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from ..net.frame import Frame
from ..net.packet import Packet
from .ledger import Ledger

#: a frame that waits: record, parsed, CLOCK_MONOTONIC ns from which its timeout runs
Held = tuple[Frame, Packet, int]


class HeldQueue:
    """What one flow, or a checkpoint, holds. `frames` is to be looked at: oldest first."""

    __slots__ = ("_frames", "_ledger", "frames")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._frames: deque[Held] = deque()
        self.frames: Sequence[Held] = self._frames  # the same, for those who may not change it

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._frames)

    def __getitem__(self, i: int) -> Held:
        return self._frames[i]

    def offer(self, rec: Frame, p: Packet, since_ns: int) -> bool:
        """Append a frame, if the ledger has room for it."""
        ledger = self._ledger  # room() and push(), written out: each held frame comes through here
        if ledger.pvm_packets >= ledger.max_packets or ledger.pvm_bytes >= ledger.max_bytes:
            return False
        ledger.pvm_packets += 1
        ledger.pvm_bytes += len(rec.frame)
        self._frames.append((rec, p, since_ns))
        return True

    def push(self, rec: Frame, p: Packet, since_ns: int) -> None:
        """Append a frame, whatever the limit."""
        self._ledger.pvm_packets += 1
        self._ledger.pvm_bytes += len(rec.frame)
        self._frames.append((rec, p, since_ns))

    def extend(self, frames: Iterable[Held]) -> None:
        """Append frames, whatever the limit."""
        for held in frames:
            self.push(*held)

    def pop(self) -> Held:
        """Remove the oldest frame."""
        held = self._frames.popleft()
        ledger = self._ledger
        ledger.pvm_packets -= 1
        ledger.pvm_bytes -= len(held[0].frame)
        return held

    def replace_head(self, rec: Frame, p: Packet) -> None:
        """The oldest frame has left in part: go on waiting with the rest, since the same time."""
        whole, _, since = self._frames[0]
        self._ledger.pvm_bytes += len(rec.frame) - len(whole.frame)
        self._frames[0] = (rec, p, since)

    def drain(self) -> list[Held]:
        """Remove all frames, oldest first."""
        held = list(self._frames)
        self._frames.clear()
        self._ledger.pvm_packets -= len(held)
        self._ledger.pvm_bytes -= sum(len(rec.frame) for rec, _, _ in held)
        return held
