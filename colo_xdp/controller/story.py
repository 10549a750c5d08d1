# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened to this host's guest and to the pair, as events for `colo-xdp events`. Pure.

The controller tells what happens; `keep` stores it (service/event_log.py). An event is an object
with `kind` and `why`, and what belongs to the kind (status/events.py makes sentences of them).
Checkpoints that succeed are no events: there may be many in a second, and `explain` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from ..failover.states import Role, State

_FLIPS = (State.PROTECTED, State.CHECKPOINTING)


class Kind(StrEnum):
    """What an event is about."""

    START = "start"  # a controller has started
    STOP = "stop"  # it ends
    STATE = "state"  # a change of state, or of the reason
    STEP = "step"  # a decision that is carried out
    FENCED = "fenced"  # the fence command has ended
    SWITCHED = "switched"  # a switchover is over: the gap that clients saw
    CHECKPOINT_FAILED = "checkpoint_failed"
    PEER = "peer"  # the control channel is up or down
    QEMU = "qemu"  # QEMU answers with errors only, or no more
    DATA_PATH = "data_path"  # a device or program is missing, or is back
    OPERATOR = "operator"  # a command that changes something
    SHUTDOWN = "shutdown"  # the host shuts down
    MARK = "mark"  # what the mark of a guest that ran standalone says, or why it cannot be kept
    ROLE = "role"  # the next controller of this host has the other role


def _forget(event: dict[str, Any]) -> None:
    """Keep nothing."""


class Story:
    """Tells `keep` what happens, each thing once."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.keep: Callable[[dict[str, Any]], None] = _forget
        self._state: State | None = None
        self._why = ""

    def tell(self, kind: Kind, why: str, **more: Any) -> None:
        """Tell one event."""
        self.keep({"kind": kind.value, "role": self.role.value, "why": why, **more})

    def began(self, pid: int, state: State, why: str) -> None:
        """Tell that a controller has started, and in what state it found the data path."""
        found = "" if state is State.STARTING else f", {state.value}: {why}"
        self.tell(Kind.START, f"process {pid}{found}")

    def became(self, state: State, why: str) -> None:
        """Tell a state; checkpoints of a protected pair are left out."""
        if state in _FLIPS and self._state is State.PROTECTED:
            return
        if state is self._state and (state in _FLIPS or why == self._why):
            return
        self._state, self._why = state, why
        self.tell(Kind.STATE, why, state=state.value)
