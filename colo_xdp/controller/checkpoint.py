# SPDX-License-Identifier: GPL-2.0-or-later
"""A checkpoint: the request, its progress and its failure."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..compare.causes import Cause
from ..engine.journal import Divergence
from ..qemu.events import QmpEvent

log = logging.getLogger("colo_xdp.controller.primary")


class CheckpointFailed(RuntimeError):
    """Reports that a checkpoint did not complete; what is held stays held.

    `refused`: the secondary's controller refused before QEMU was asked, so it can be tried again.
    `channel`: nothing arrives from that controller, which proves nothing about its QEMU.
    """

    def __init__(self, why: str, *, refused: bool = False, channel: bool = False) -> None:
        super().__init__(why)
        self.refused, self.channel = refused, channel


class Step(StrEnum):
    """The steps of a checkpoint."""

    PREPARING = "preparing"  # the secondary is asked to hold everything
    HELD = "held"  # both hosts hold
    TRIGGERED = "triggered"  # QEMU has been asked
    STOPPED = "stopped"  # the PVM stands still
    RESUMED = "resumed"  # both guests run the same state
    COMMITTED = "committed"  # what the PVM sent before its STOP has left
    FAILED = "failed"


@dataclass(slots=True)
class Checkpoint:
    """Tracks one checkpoint in progress. Times: CLOCK_MONOTONIC, ns."""

    n: int
    cause: str
    began_ns: int
    begun: bool = False
    triggered: bool = False
    stop_ns: int = 0
    resume_ns: int = 0
    done: bool = False
    disks_whole: bool = False  # the secondary's images have what the PVM wrote until its STOP
    based: int = 0  # parts of the guest's own offsets that the secondary has taken over
    failed: str = ""
    ended: Step | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def step(self) -> Step:
        """How far this checkpoint has come.

        The reports of the two hosts come in any order. Each counts once everything that has to
        come before it is known.
        """
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
        """Whether this is the first checkpoint of a pair, by which QEMU enters COLO."""
        return self.cause == Cause.INITIAL

    def trigger(self, still_ns: int) -> None:
        """Note that QEMU is about to be asked for the checkpoint.

        A STOP from before this call does not belong to it. A guest that stands still already sends
        no STOP: `still_ns` takes its place.
        """
        self.stop_ns, self.resume_ns, self.disks_whole = still_ns, 0, False

    def pvm_stopped(self, event: QmpEvent) -> None:
        """Note the PVM's STOP: the checkpoint includes what it sent until then."""
        self.stop_ns = event.ts_ns
        if not self.began_ns <= event.ts_ns <= event.seen_ns:
            # The clock was set meanwhile. A STOP that is dated too early only costs one more
            # checkpoint.
            log.warning("STOP has an impossible timestamp: the clock was set")
            self.stop_ns = self.began_ns

    def pvm_resumed(self, event: QmpEvent) -> None:
        """Note the PVM's RESUME, if its STOP is known."""
        if self.stop_ns and not self.resume_ns:
            self.resume_ns = event.ts_ns

    def heard(self, msg: dict[str, Any]) -> None:
        """Handle a message of the secondary about this checkpoint (peer/messages.py).

        These are `begin_ack`, `resumed`, `failed` and `offsets_ack`.
        """
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
    """A request for a checkpoint; `why`: the divergence that caused it, if one did."""

    cause: str
    detail: str
    why: Divergence | None = None
