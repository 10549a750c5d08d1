# SPDX-License-Identifier: GPL-2.0-or-later
"""The events of a pair (controller/story.py) as sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..controller.story import Kind

_STATE = {
    "starting": "not protected yet",
    "protected": "protected",
    "checkpointing": "a checkpoint is in progress",
    "degraded": "protection is impaired",
    "solo": "the primary guest goes on alone",
    "promoted": "the secondary guest has taken over",
    "stopped": "the guest here is silent",
    "paused": "paused",
    "shadow": "shadow mode",
}


def what(e: Mapping[str, Any]) -> str:
    """Return the sentence of one event, without its time."""
    why = str(e.get("why", ""))
    match e.get("kind"):
        case Kind.START:
            return f"a controller has started: {why}"
        case Kind.STOP:
            return f"the controller ends: {why}"
        case Kind.STATE:
            state = str(e.get("state", ""))
            return f"{_STATE.get(state, state)}: {why}"
        case Kind.STEP:
            return f"failover step `{e.get('action', '?')}`: {why}"
        case Kind.FENCED:
            return f"the fence command has {'succeeded' if e.get('ok') else 'failed'}"
        case Kind.SWITCHED:
            return f"the network received nothing from the guest for {e.get('gap_ms', 0):.0f} ms"
        case Kind.CHECKPOINT_FAILED:
            return f"a checkpoint failed: {why}"
        case Kind.PEER:
            return f"the other host's controller: {why}"
        case Kind.QEMU:
            return f"QEMU of this host: {why}"
        case Kind.DATA_PATH:
            return f"data path: {why}"
        case Kind.OPERATOR:
            return f"an operator asked for `{why}`"
        case Kind.SHUTDOWN:
            return "this host shuts down: the other one is to serve the clients"
        case Kind.MARK:
            return why
        case Kind.ROLE:
            return f"this host changes its role: {why}"
        case kind:
            return f"{kind}: {why}"


def line(e: Mapping[str, Any]) -> str:
    """Return one event as a line: time, role, sentence."""
    at = datetime.fromtimestamp(e["t"])
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d}  {e.get('role', ''):<9}  {what(e)}"
