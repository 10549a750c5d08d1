# SPDX-License-Identifier: GPL-2.0-or-later
"""The health of a pair in one sentence, from one host's status document. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ..failover.prospect import Outcome
from ..failover.states import Role, State

LINK_SILENT_MS = 2000.0
NEARLY_FULL = 0.8


class Level(StrEnum):
    """How urgent it is. The word stands for itself: no reader needs a colour."""

    OK = "OK"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"


@dataclass(frozen=True, slots=True)
class Health:
    """How urgent, and why."""

    level: Level
    sentence: str


#: states in which the other host's controller should answer
_NEEDS_PEER = (State.PROTECTED, State.CHECKPOINTING, State.PAUSED, State.SHADOW)
_WORSE = {Level.OK: 0, Level.WARNING: 1, Level.CRITICAL: 2}


def health(s: Mapping[str, Any]) -> Health:
    """Return the health of the pair as this host sees it."""
    base = _of_state(s)
    notes = _notes(s)
    if not notes:
        return base
    level = base.level if _WORSE[base.level] else Level.WARNING
    return Health(level, f"{base.sentence}; {'; '.join(notes)}")


def _of_state(s: Mapping[str, Any]) -> Health:
    state, reason, active = State(s["state"]), s["reason"], s["active"]["transmitting"]
    primary = s["role"] == Role.PRIMARY
    if state in (State.PROTECTED, State.CHECKPOINTING, State.PAUSED):
        if primary and not active:
            return Health(
                Level.CRITICAL, f"both guests run, but nothing reaches the network: {_mute(s)}"
            )
        if state is State.PAUSED:
            return Health(
                Level.WARNING, "protected but paused: no failover takes place without an operator"
            )
        died = s["if_peer_died"]
        if died["outcome"] in (Outcome.LOST, Outcome.WAITS):
            return Health(
                Level.WARNING, f"both guests run; if the other host died: {died['sentence']}"
            )
        if died["outcome"] == Outcome.OPERATOR:
            return Health(Level.OK, "protected: either host may fail, and an operator decides then")
        return Health(Level.OK, "protected: either host may fail")
    if state is State.SHADOW:
        return Health(Level.WARNING, "not protected: shadow mode compares and holds nothing")
    if state is State.DEGRADED:
        served = active or (s["peer"]["connected"] and not primary)
        level = Level.WARNING if served else Level.CRITICAL
        return Health(level, f"protection is impaired: {reason}")
    if state in (State.SOLO, State.PROMOTED):
        if active:
            return Health(
                Level.WARNING, f"not protected: the guest here runs without a copy ({reason})"
            )
        return Health(Level.CRITICAL, f"the guest here runs alone and is not heard: {_mute(s)}")
    if state is State.STOPPED:
        if _other_serves(s):
            return Health(Level.WARNING, f"not protected: only the other host serves ({reason})")
        return Health(Level.CRITICAL, f"the guest here is silent for good: {reason}")
    if active or _other_serves(s):
        return Health(Level.WARNING, f"not protected yet: {reason}")
    return Health(
        Level.CRITICAL if primary else Level.WARNING, f"the guest here is not heard: {reason}"
    )


def _other_serves(s: Mapping[str, Any]) -> bool:
    """Return whether the other host's controller says that its guest serves alone."""
    p = s["peer"]
    return bool(p["connected"]) and p["state"] in (State.SOLO, State.PROMOTED)


def _mute(s: Mapping[str, Any]) -> str:
    """Say why a guest that may run is not heard."""
    if s["qemu"]["gone"]:
        return "its QEMU is gone"
    if s["active"]["lease"] == "none":
        return "this host has no lease"
    if s["port"] not in ("", "forwarding"):
        return f"its tap is {s['port']} in the bridge"
    return f"the data path is in the mode {s['mode']}"


def _notes(s: Mapping[str, Any]) -> list[str]:
    """Return what needs attention besides the state."""
    notes = []
    if not s["peer"]["connected"] and s["state"] in _NEEDS_PEER:
        notes.append("the control channel to the other host is down")
    trouble = s["data_path"]["trouble"]
    if trouble and trouble not in s["reason"]:
        notes.append(trouble)
    for link in s["heartbeat_links"]:
        silent = link["silent_ms"]
        if link["trouble"]:
            notes.append(f"heartbeat link {link['name']}: {link['trouble']}")
        elif s["peer"]["connected"] and (silent is None or silent > LINK_SILENT_MS):
            notes.append(f"heartbeat link {link['name']} is silent")
    disks = s["disks"]
    notes += [text for text in (disks["lost"], disks["room_trouble"]) if text]
    if s["active"]["disks_unproven"]:
        notes.append("the disks here may lack writes of the last checkpoint")
    if s["failover"]["trouble"]:
        notes.append(f"arbiter: {s['failover']['trouble']}")
    held = s["held"]
    if held["limit"] and held["packets"] >= NEARLY_FULL * held["limit"]:
        notes.append(f"{held['packets']} of {held['limit']} frames are held")
    if s["failures"]:
        notes.append(f"internal error: {s['failures'][-1]}")
    return notes
