# SPDX-License-Identifier: GPL-2.0-or-later
"""A checkpoint: what is wanted, what is under way, and how it fails."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .journal import Divergence


class CheckpointFailed(RuntimeError):
    """A checkpoint did not complete; what is held stays held.

    `refused`: the secondary's controller said no before QEMU was asked, so it can be tried again.
    `channel`: its controller cannot be heard, which says nothing of its QEMU.
    """

    def __init__(self, why: str, *, refused: bool = False, channel: bool = False) -> None:
        super().__init__(why)
        self.refused, self.channel = refused, channel


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
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Want:
    """A checkpoint that is asked for; `why`: the divergence that did, if one did."""

    cause: str
    detail: str
    why: Divergence | None = None
