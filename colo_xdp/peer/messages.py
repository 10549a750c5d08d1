# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between the two controllers: one JSON object per line, checked on arrival.

Pure: bytes in, dicts out. peer/channel.py carries them.

Versions: each side offers a range in its hello, both speak the newest that both know. The number
counts the messages, and what crosses the peer link (tags, heartbeats). A hello may gain fields in
later versions, so it alone may have unknown ones; all that follows is checked by the table of the
version that was agreed on. The range travels inside TLS: who could change it could as well speak
for the peer. A side refuses what is below its own minimum, so a peer that was made to offer only
old versions gets no connection, not an old one.
"""

from __future__ import annotations

import json
from typing import Any

VERSION = 5
MIN_VERSION = 5  # of what this release can still speak
MAX_LINE = 65536
MAX_TEXT = 4096
MAX_FLOWS_TEXT = 61440
LONG = ("flows", "addresses")

#: type -> {field: type}. Every field is required; unknown ones are refused (but in hello).
MESSAGES: dict[str, dict[str, type]] = {
    # first word of both sides; `min` to `v`: the versions that it speaks; `boot`: which process.
    # Besides, since `v` alone does not need it, `beacon`: a nonce for the key of peer/heartbeat.py
    "hello": {"v": int, "min": int, "pair": str, "role": str, "boot": str},
    # heartbeat; `echo` is the peer's `t` (CLOCK_BOOTTIME, ns) sent back, for the round trip;
    # `promise`: see failover/lease.py; `over`: its guest has ended itself, nobody is to go on
    "heartbeat": {
        "t": int,
        "echo": int,
        "state": str,
        "epoch": int,
        "vm": bool,
        "shut": bool,
        "over": bool,
        "alone": bool,
        "shadow": bool,
        "promise": bool,
        "role": str,
    },
    # P, before `begin n`: addresses that its guest has said to have, and MAC addresses that it
    # sends with, as AddressTable.export() gives them, in hexadecimal; not sent if there are none
    "claims": {"n": int, "addresses": str, "macs": str},
    # S: QEMU waits for the migration and the data path is ready; `qemu`: which one since this
    # controller started
    "ready": {"epoch": int, "qemu": int},
    # P: a checkpoint to epoch n begins: hold everything
    "begin": {"n": int, "cause": str, "initial": bool},
    # S: held from here on
    "begin_ack": {"n": int},
    # P, at the end of the first checkpoint: offsets that its guest has kept, part n of them, as
    # struct colo_flow_key and struct colo_flow in hexadecimal; the first part replaces all
    "offsets": {"n": int, "last": bool, "flows": str},
    # S: part n has been taken over
    "offsets_ack": {"n": int},
    # the other host's guest goes on alone: start a QEMU that waits for its migration
    "reprotect": {"why": str},
    # S: its guest runs again under epoch n
    "resumed": {"n": int, "pause_us": int},
    # either: the checkpoint did not happen
    "failed": {"n": int, "why": str},
    # either: my data path is shut; `alone`: my guest has spoken alone before
    "shut": {"why": str, "alone": bool},
    # either: my guest has shut itself down: do not take over
    "guest_off": {"why": str},
    # S: my guest is another one than its copy: make a checkpoint
    "request": {"why": str},
    # P, with `gone` by plan: the time since its guest's last frame left
    "downtime_start": {"us": int},
    # S: its guest's first frame has left; how long the network heard nothing
    "downtime": {"gap_us": int, "took_us": int},
    # P: shut your guest in, mine speaks alone from now on or wants to
    "demote": {"why": str},
    # S: programs or devices were gone there, frames between the guests were missed
    "missed": {"why": str},
    # S: hand over, as a planned failover asked for on this side
    "switchover": {"why": str},
    # S: it speaks for the guest from now on
    "promoted": {"why": str},
    # the controller ends and the guests go on; `planned`: on purpose, and not for an error; `back`:
    # when it expects to be here again, in ms from now (0: nobody knows)
    "bye": {"why": str, "planned": bool, "back": int},
}


class WireError(ValueError):
    """A message that is not ours; the text says what is wrong with it."""


def encode(kind: str, **fields: Any) -> bytes:
    """One line. Raises WireError on a message that the table does not know.

    A sentence is cut where it is too long: others' names are in it, of files for instance.
    """
    if isinstance(fields.get("why"), str):
        fields["why"] = fields["why"][:MAX_TEXT]
    check({"type": kind, **fields})
    return json.dumps({"type": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def check(msg: dict[str, Any]) -> None:
    """Raise WireError unless the message has exactly its fields, each of its type."""
    kind = msg.get("type")
    want = MESSAGES.get(kind) if isinstance(kind, str) else None
    if want is None:
        raise WireError(f"unknown message type {kind!r:.40}")
    have = set(msg) - {"type"}
    if have != set(want) and not (kind == "hello" and have > set(want)):
        raise WireError(f"{kind}: fields {sorted(have)} where {sorted(want)} are needed")
    for name, typ in want.items():
        v = msg[name]
        if type(v) is not typ:
            raise WireError(f"{kind}.{name}: {type(v).__name__} where {typ.__name__} is needed")
        if isinstance(v, int) and not 0 <= v < 1 << 64:
            raise WireError(f"{kind}.{name}: {v} out of range")
        if isinstance(v, str) and len(v) > (MAX_FLOWS_TEXT if name in LONG else MAX_TEXT):
            raise WireError(f"{kind}.{name}: {len(v)} characters")


def decode(line: bytes) -> dict[str, Any]:
    """A message from one line.

    Raises WireError for anything that is not a known, complete message.
    """
    if len(line) > MAX_LINE:
        raise WireError(f"line of {len(line)} bytes")
    try:
        msg = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise WireError(f"not JSON: {e}") from e
    if not isinstance(msg, dict):
        raise WireError(f"{type(msg).__name__} where an object is needed")
    check(msg)
    return msg


def agree(mine: tuple[int, int], theirs: tuple[int, int]) -> int:
    """The version to speak, from (oldest, newest) of both sides.

    Raises WireError when there is none; the text names both ranges.
    """
    version = min(mine[1], theirs[1])
    if theirs[0] > theirs[1] or version < max(mine[0], theirs[0]):
        raise WireError(
            f"the peer speaks versions {theirs[0]} to {theirs[1]}, this side {mine[0]} to "
            f"{mine[1]}: bring both hosts to releases that overlap"
        )
    return version
