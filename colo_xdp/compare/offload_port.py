# SPDX-License-Identifier: GPL-2.0-or-later
"""Interface between compared flows and the kernel's fast path.

It defines what a flow stores for offloading, and how flows of one kind are converted to the
kernel's state and back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from ..net.flow_key import FlowKey
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from ..net.packet import Packet
from .causes import Cause
from .flow import Outbox, Partial, Requester

if TYPE_CHECKING:
    from ..offload.kernel_format import ConnState, OffloadRequest

F = TypeVar("F", contravariant=True)


class OffloadCodec(Protocol[F]):
    """Converts flows of one kind to the fast path's state and back.

    It stores nothing about them.
    """

    def ready(self, flow: F) -> bool:
        """Return whether the fast path could continue from here."""
        ...

    def young(self, flow: F) -> bool:
        """Return whether the flow has just begun, and is best offloaded at once."""
        ...

    def bytes_sent(self, flow: F) -> int:
        """Return the number of bytes that the guest has sent."""
        ...

    def waits_since(self, flow: F) -> int:
        """Return since when (ns) anything of a ready flow waits; 0: nothing does."""
        ...

    def pack(self, flow: F, epoch: int) -> OffloadRequest | None:
        """Return a ready flow's state for an offload in this epoch; None: not possible yet."""
        ...

    def on_offloaded(self, flow: F) -> None:
        """Note that the fast path owns the flow now, and what waited in it."""
        ...

    def restore(self, flow: F, state: ConnState, now_ns: int) -> None:
        """Continue an empty or offloaded flow from the kernel's state."""
        ...

    def probe(self, key: FlowKey, state: ConnState) -> Packet:
        """Return a frame of the flow for the policy to judge."""
        ...


class Backpressure:
    """Outbox that keeps the frames of one flow back, in order, until `until_ns` at most.

    They may leave. While they are kept, no ack makes the guest send more. So the moment comes when
    no frame of the flow is on its way to user space, and the fast path can take the flow.
    """

    __slots__ = ("_outbox", "frames", "size", "until_ns")

    def __init__(self, outbox: Outbox, until_ns: int) -> None:
        self._outbox, self.until_ns = outbox, until_ns
        self.frames: list[Frame] = []
        self.size = 0  # bytes

    def release(self, rec: Frame, agreed: bool = True) -> None:
        """Keep one more frame, the last to leave."""
        self.frames.append(rec)
        self.size += len(rec.frame)

    def request(self, cause: Cause, flow: Requester, evidence: Evidence = NO_EVIDENCE) -> None:
        """Pass the request on; see Outbox."""
        self._outbox.request(cause, flow, evidence)

    def count(self, name: str, n: int = 1) -> None:
        """Pass the count on; see Outbox."""
        self._outbox.count(name, n)

    def part_verified(self, flow: Partial) -> None:
        """Pass the note on; see Outbox."""
        self._outbox.part_verified(flow)


class OffloadState:
    """Progress of a flow toward the fast path."""

    __slots__ = (
        "backoff",
        "backpressure",
        "in_vain",
        "offered",
        "offloaded_ns",
        "punt_seq",
        "refused",
        "settled_batches",
    )

    def __init__(self) -> None:
        self.punt_seq = 0  # number of the newest frame that the fast path has counted
        self.offloaded_ns = 0  # when it was last offloaded, ns
        # the flow's outbox while its frames are kept back
        self.backpressure: Backpressure | None = None
        self.backoff = 1  # settled batches required before an offload
        # offloads refused because frames were on their way here, since the last success
        self.refused = 0
        self.in_vain = 0  # backpressure that ended without one, since the last success
        self.reset()

    def reset(self) -> None:
        """Note that the fast path does not know the flow."""
        self.offered = False
        self.settled_batches = 0  # settled batches seen
