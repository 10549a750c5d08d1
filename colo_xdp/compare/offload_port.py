# SPDX-License-Identifier: GPL-2.0-or-later
"""What a compared flow keeps for the kernel's fast path, and how its kind goes there and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from ..net.flow_key import FlowKey
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import Packet
from .causes import Cause
from .flow import Outbox, Partial, Source

if TYPE_CHECKING:
    from ..offload.kernel_format import ConnState, OffloadRequest

F = TypeVar("F", contravariant=True)


class OffloadCodec(Protocol[F]):
    """How flows of one kind go to the fast path and come back. It keeps nothing of them."""

    def ready(self, flow: F) -> bool:
        """Whether the fast path could go on from here."""
        ...

    def young(self, flow: F) -> bool:
        """Whether it has just begun, and is best given at once."""
        ...

    def bytes_sent(self, flow: F) -> int:
        """Bytes that the guest has said."""
        ...

    def waits_since(self, flow: F) -> int:
        """Since when anything of a ready one waits; 0: nothing does."""
        ...

    def pack(self, flow: F, epoch: int) -> OffloadRequest | None:
        """A ready one for Fast.give() in this epoch; None: it cannot be given yet."""
        ...

    def on_offloaded(self, flow: F) -> None:
        """The fast path has it now, and what waited in it."""
        ...

    def recall(self, flow: F, state: ConnState, now_ns: int) -> None:
        """Let an empty or given one go on from what the kernel had."""
        ...

    def probe(self, key: FlowKey, state: ConnState) -> Packet:
        """A frame of the flow, for the policy to judge."""
        ...


class Backpressure:
    """An outbox that keeps the frames of one flow, in order; until when at most.

    They may leave. The fast path gets the flow when none of its frames is on its way here any more,
    and no ack makes the guest send the next one meanwhile.
    """

    __slots__ = ("_outbox", "frames", "size", "until_ns")

    def __init__(self, outbox: Outbox, until_ns: int) -> None:
        self._outbox, self.until_ns = outbox, until_ns
        self.frames: list[Frame] = []
        self.size = 0  # bytes

    def release(self, rec: Frame) -> None:
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
    """Where a flow is on its way to the fast path."""

    __slots__ = (
        "backoff",
        "backpressure",
        "offered",
        "offloaded_ns",
        "punt_seq",
        "refused",
        "settled_batches",
    )

    def __init__(self) -> None:
        self.punt_seq = 0  # the newest frame that the fast path has counted
        self.offloaded_ns = 0  # when it had the flow last
        self.backpressure: Backpressure | None = (
            None  # the flow's outbox, while its frames are kept back
        )
        self.backoff = 1  # settled batches wanted
        self.refused = 0  # gifts, since frames were on their way here; since the last one taken
        self.reset()

    def reset(self) -> None:
        """The fast path does not know the flow."""
        self.offered = False
        self.settled_batches = 0  # settled batches seen
