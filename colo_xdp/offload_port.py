# SPDX-License-Identifier: GPL-2.0-or-later
"""What a compared flow keeps for the kernel's fast path, and how its kind goes there and back."""

from __future__ import annotations

from typing import Protocol, TypeVar

from .comparer import Outbox, Partial, Source
from .flow import FlowKey
from .packet import Packet
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence, Record
from .tier_k import Gift, Words

F = TypeVar("F", contravariant=True)


class OffloadCodec(Protocol[F]):
    """How flows of one kind go to tier K and come back. It keeps nothing of them."""

    def ready(self, flow: F) -> bool:
        """Whether tier K could go on from here."""
        ...

    def young(self, flow: F) -> bool:
        """Whether it has just begun, and is best given at once."""
        ...

    def said(self, flow: F) -> int:
        """Bytes that the guest has said."""
        ...

    def waits_since(self, flow: F) -> int:
        """Since when anything of a ready one waits; 0: nothing does."""
        ...

    def pack(self, flow: F, epoch: int) -> Gift | None:
        """A ready one for Fast.give() in this epoch; None: it cannot be given yet."""
        ...

    def given(self, flow: F) -> None:
        """Tier K has it now, and what waited in it."""
        ...

    def recall(self, flow: F, words: Words, now_ns: int) -> None:
        """Let an empty or given one go on from what the kernel had."""
        ...

    def probe(self, key: FlowKey, words: Words) -> Packet:
        """A frame of the flow, for the policy to judge."""
        ...


class Brake:
    """An outbox that keeps the frames of one flow, in order; until when at most.

    They may leave. Tier K gets the flow when none of its frames is on its way here any more, and
    no ack makes the guest send the next one meanwhile.
    """

    __slots__ = ("_outbox", "frames", "size", "until_ns")

    def __init__(self, outbox: Outbox, until_ns: int) -> None:
        self._outbox, self.until_ns = outbox, until_ns
        self.frames: list[Record] = []
        self.size = 0  # bytes

    def release(self, rec: Record) -> None:
        """One more, the last to leave."""
        self.frames.append(rec)
        self.size += len(rec.frame)

    def request(self, cause: Cause, flow: Source, evidence: Evidence = NO_EVIDENCE) -> None:
        """See Outbox."""
        self._outbox.request(cause, flow, evidence)

    def count(self, name: str, n: int = 1) -> None:
        """See Outbox."""
        self._outbox.count(name, n)

    def part_verified(self, flow: Partial) -> None:
        """See Outbox."""
        self._outbox.part_verified(flow)


class OffloadState:
    """Where a flow is on its way to tier K."""

    __slots__ = ("brake", "calm", "captured", "given_ns", "offered", "patience", "refused")

    def __init__(self) -> None:
        self.captured = 0  # the newest frame that tier K has counted
        self.given_ns = 0  # when it had the flow last
        self.brake: Brake | None = None  # the flow's outbox, while its frames are kept back
        self.patience = 1  # settled batches wanted
        self.refused = 0  # gifts, since frames were on their way here; since the last one taken
        self.reset()

    def reset(self) -> None:
        """Tier K does not know the flow."""
        self.offered = False
        self.calm = 0  # settled batches seen
