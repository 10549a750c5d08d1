# SPDX-License-Identifier: GPL-2.0-or-later
"""Base class of the flows that are compared: TcpFlow and DatagramFlow."""

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
    """One compared flow, in the direction in which the guest sends."""

    __slots__ = (
        "asked",
        "codec",
        "direction",
        "epoch",
        "held",
        "host",
        "key",
        "last",
        "offload",
        "outbox",
        "verdict",
        "when",
    )

    bypassed = False

    def svm_deaf(self) -> bool:
        """Return whether the head acks what the SVM has not acked; only TCP tells."""
        return False

    def head_ns(self) -> int:
        """Return the arrival (ns) of the oldest frame of the PVM that waits; 0: none does."""
        return self.held[0][2] if self.held else 0

    def __init__(
        self,
        host: FlowContext,
        key: FlowKey,
        epoch: int,
        verdict: Verdict,
        direction: str,
        codec: OffloadCodec[Self],
    ) -> None:
        self.host, self.key = host, key
        self.epoch = epoch
        self.verdict, self.direction = verdict, direction
        self.last = self.when = 0
        self.outbox = host.outbox  # replaced while its frames are kept back for the fast path
        self.held = HeldQueue(host.ledger)  # of the PVM, not yet released
        self.asked = False  # the flow has requested a checkpoint in this epoch
        self.codec = codec
        self.offload = OffloadState()

    @abstractmethod
    def text(self) -> str:
        """Return the flow's name for operators."""

    @abstractmethod
    def service(self) -> tuple[str, int]:
        """Return the protocol and the service's port; 0 if it has none."""

    @abstractmethod
    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Release or hold a frame of the PVM in the current epoch, or request a checkpoint."""

    @abstractmethod
    def svm(self, p: Packet, now_ns: int) -> None:
        """Compare a frame of the SVM in the current epoch. It is never sent anywhere."""

    @abstractmethod
    def commit(self, p: Packet) -> None:
        """Note a frame that a complete checkpoint contains; it leaves without comparison."""

    @abstractmethod
    def release_ready(self, now_ns: int) -> None:
        """Release from the head whatever has become releasable."""

    @abstractmethod
    def expire(self, now_ns: int) -> int:
        """Request a checkpoint if something is overdue; return the next deadline, 0 for none."""

    @abstractmethod
    def closed(self) -> bool:
        """Return whether the guest has closed the flow, or whether it never ends.

        What follows are stragglers.
        """

    @abstractmethod
    def svm_since(self) -> int:
        """Return the arrival (ns) of the SVM's oldest unmatched output; 0 if none."""

    @abstractmethod
    def unhold(self) -> list[Held]:
        """Remove and return the held frames."""

    @abstractmethod
    def forget_svm(self) -> None:
        """Forget output of the SVM that has not been released."""

    @abstractmethod
    def new_epoch(self, epoch: int) -> None:
        """Begin an epoch: forget the output of the previous epoch's SVM."""

    def quiet(self) -> bool:
        """Return whether nothing of either guest waits."""
        return not self.held.frames and self.offload.backpressure is None and not self.svm_since()

    def release_part(self, now_ns: int, whole_segments: bool) -> bool:
        """Release the verified part of the head (see compare/tcp.py); a datagram has no parts."""
        return False

    def wait_for(self, due_ns: int) -> None:
        """Have the flow examined at due_ns, unless it will be earlier.

        Patience may have become shorter since the timer was set. If it becomes longer, expire()
        sets a new one.
        """
        if not self.when or due_ns < self.when:
            self.host.timers.arm(self, due_ns)

    def reset(self, epoch: int) -> None:
        """Forget everything: the fast path had the flow and has forgotten it."""
        self.offload.reset()
        self.new_epoch(epoch)

    # -- called by the engine

    def defer(self) -> list[Held]:
        """Remove and return the held frames, as a checkpoint that will decide about them begins.

        Those of a monitored flow have already left, and move to its backlog instead.
        """
        frames = self.unhold()
        if self.host.backlog is None:
            return frames
        self.host.backlog.extend(frames)
        return []

    def pvm_in_checkpoint(self, rec: Frame, p: Packet, now_ns: int) -> bool:
        """Return whether the flow deals with the frame itself.

        It does not: the checkpoint will decide.
        """
        return False

    def catch_up(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Compare a frame that left during a checkpoint, under the rules in force then."""
        self.pvm(rec, p, now_ns)

    def miss(self) -> None:
        """Ignore a lost frame of the SVM's next epoch: the engine requests a checkpoint."""

    def outdate(self, epoch: int) -> None:
        """Have the flow judged again when it is next seen, by the rules of this epoch."""
        self.new_epoch(epoch)
        self.epoch = LONG_AGO

    def judged(self, verdict: Verdict) -> None:
        """Take the verdict of the rules in force, which is the same action as before."""
        self.verdict = verdict

    def removed(self) -> None:
        """Note that the flow has been removed from the tables."""

    def reclaim(self) -> Comparer:
        """Return the flow itself, since it is not offloaded."""
        return self

    def stands_for(self, flow: object) -> bool:
        """Return whether this object represents `flow` in the tables."""
        return flow is self
