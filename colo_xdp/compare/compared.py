# SPDX-License-Identifier: GPL-2.0-or-later
"""What all flows that are compared have in common, TCP or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from ..net.flow_key import FlowKey
from ..net.frame import Frame
from ..net.packet import Packet
from .flow import LONG_AGO, Comparer, FlowContext
from .held_queue import Held, HeldQueue
from .offload_port import OffloadCodec, OffloadState
from .policy import Verdict


class ComparedFlow(ABC):
    """One flow, one direction: what the guest sends."""

    __slots__ = (
        "asked", "codec", "direction", "epoch", "held", "host", "key", "last", "offload", "outbox",
        "verdict", "when",
    )  # fmt: skip

    bypassed = False

    def __init__(
        self, host: FlowContext, key: FlowKey, epoch: int, verdict: Verdict, direction: str,
        codec: OffloadCodec[Self],
    ) -> None:  # fmt: skip
        self.host, self.key = host, key
        self.epoch = epoch
        self.verdict, self.direction = verdict, direction
        self.last = self.when = 0
        self.outbox = host.outbox  # another one while its frames are kept back for the fast path
        self.held = HeldQueue(host.ledger)  # of the PVM, not yet released
        self.asked = False  # this flow has asked for a checkpoint in this epoch
        self.codec = codec
        self.offload = OffloadState()

    @abstractmethod
    def text(self) -> str:
        """The flow's name for people."""

    @abstractmethod
    def service(self) -> tuple[str, int]:
        """Protocol and the service's port; 0: it has none."""

    @abstractmethod
    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """A frame of the PVM in the current epoch: release it, hold it, or ask."""

    @abstractmethod
    def svm(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM of the current epoch: only compared, never sent anywhere."""

    @abstractmethod
    def commit(self, p: Packet) -> None:
        """A frame that a complete checkpoint contains: released with no comparison."""

    @abstractmethod
    def release_ready(self, now_ns: int) -> None:
        """Release from the head what has become releasable."""

    @abstractmethod
    def expire(self, now_ns: int) -> int:
        """Ask if something is too old; the next deadline, 0 for none."""

    @abstractmethod
    def closed(self) -> bool:
        """The guest has closed it, or it never has an end; what comes now are stragglers."""

    @abstractmethod
    def svm_since(self) -> int:
        """Arrival of the oldest thing the SVM sent and the PVM did not; 0 if none."""

    @abstractmethod
    def unhold(self) -> list[Held]:
        """Give up the frames that wait."""

    @abstractmethod
    def forget_svm(self) -> None:
        """Forget what the SVM said, and has not been released."""

    @abstractmethod
    def new_epoch(self, epoch: int) -> None:
        """Forget what the SVM of the old epoch said (I7)."""

    def quiet(self) -> bool:
        """Nothing of either side waits."""
        return not self.held.frames and self.offload.backpressure is None and not self.svm_since()

    def release_part(self, now_ns: int, whole_segments: bool) -> bool:
        """See compare/tcp.py; a datagram has no parts."""
        return False

    def unknown(self, epoch: int) -> None:
        """Forget everything: the fast path had it, and has forgotten it."""
        self.offload.reset()
        self.new_epoch(epoch)

    # -- the engine's side

    def defer(self) -> list[Held]:
        """A checkpoint begins: give up the frames that wait, to be decided by it; those of a
        watched flow wait elsewhere, for they have left."""
        frames = self.unhold()
        if self.host.backlog is None:
            return frames
        self.host.backlog.extend(frames)
        return []

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Whether the frame has been dealt with. It has not: the checkpoint decides about it."""
        return False

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """A frame that has left while a checkpoint was under way; the rules were others then."""
        self.pvm(rec, p, now_ns)

    def miss(self) -> None:
        """A frame of the SVM's next epoch was not kept; the engine asks."""

    def outdate(self, epoch: int) -> None:
        """Other rules are in force from this epoch on: be judged anew when next seen."""
        self.new_epoch(epoch)
        self.epoch = LONG_AGO

    def judged(self, verdict: Verdict) -> None:
        """The rules in force want for it what those before did."""
        self.verdict = verdict

    def removed(self) -> None:
        """The flow is out of the tables."""

    def reclaim(self) -> Comparer:
        """The flow itself, which is here."""
        return self

    def stands_for(self, flow: object) -> bool:
        """Whether it is this one in the tables."""
        return flow is self
