# SPDX-License-Identifier: GPL-2.0-or-later
"""A checkpoint: what is wanted, what is under way and how far, and how it fails."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..compare.causes import Cause
from ..engine.journal import Divergence
from ..qemu.event import QmpEvent

log = logging.getLogger("colo_xdp.controller.primary")


class CheckpointFailed(RuntimeError):
    """A checkpoint did not complete; what is held stays held.

    `refused`: the secondary's controller said no before QEMU was asked, so it can be tried again.
    `channel`: its controller cannot be heard, which says nothing of its QEMU.
    """

    def __init__(self, why: str, *, refused: bool = False, channel: bool = False) -> None:
        super().__init__(why)
        self.refused, self.channel = refused, channel


class Step(StrEnum):
    """How far a checkpoint has come."""

    PREPARING = "preparing"  # the secondary is asked to hold everything
    HELD = "held"  # both hosts do
    TRIGGERED = "triggered"  # QEMU has been asked
    STOPPED = "stopped"  # the PVM stands still
    RESUMED = "resumed"  # both guests run the same state
    COMMITTED = "committed"  # what the PVM sent before its STOP has left
    FAILED = "failed"


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint in progress. Times: CLOCK_MONOTONIC, ns."""

    n: int
    cause: str
    began_ns: int
    begun: bool = False
    triggered: bool = False
    stop_ns: int = 0
    resume_ns: int = 0
    done: bool = False
    based: int = 0  # parts of the guest's own offsets that the secondary has taken over
    failed: str = ""
    ended: Step | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def step(self) -> Step:
        """The state of this run. What is heard of both hosts comes in any order; it counts when
        what has to be before it is."""
        if self.ended is not None:
            return self.ended
        if not self.begun:
            return Step.PREPARING
        if self.resume_ns and self.done:
            return Step.RESUMED
        if not self.triggered:
            return Step.HELD
        return Step.STOPPED if self.stop_ns else Step.TRIGGERED

    @property
    def initial(self) -> bool:
        """The first one of a pair: QEMU enters COLO by it."""
        return self.cause == Cause.INITIAL

    def trigger(self, still_ns: int) -> None:
        """QEMU is about to be asked. Of a guest that stands still there is no STOP; one before this
        is not of it."""
        self.stop_ns, self.resume_ns = still_ns, 0

    def pvm_stopped(self, event: QmpEvent) -> None:
        """Its STOP: what it sent until then is in the checkpoint."""
        self.stop_ns = event.ts_ns
        if not self.began_ns <= event.ts_ns <= event.seen_ns:
            # The clock was set meanwhile. Too early a STOP only costs a checkpoint more.
            log.warning("STOP has an impossible time stamp: the clock was set")
            self.stop_ns = self.began_ns

    def pvm_resumed(self, event: QmpEvent) -> None:
        """Its RESUME, of a STOP that is known."""
        if self.stop_ns and not self.resume_ns:
            self.resume_ns = event.ts_ns

    def heard(self, msg: dict[str, Any]) -> None:
        """What the secondary says of it: `begun`, `done`, `failed` or `based`
        (peer/messages.py)."""
        kind = msg["type"]
        if kind == "offsets_ack":
            self.based = max(self.based, msg["n"] + 1)
        elif msg["n"] != self.n:
            return
        elif kind == "begin_ack":
            self.begun = True
        elif kind == "resumed":
            self.done = True
        else:
            self.failed = msg["why"]
        self.changed.set()


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """A checkpoint that is asked for; `why`: the divergence that did, if one did."""

    cause: str
    detail: str
    why: Divergence | None = None
