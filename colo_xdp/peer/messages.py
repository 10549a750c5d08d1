# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the messages between the two controllers: one JSON object per line, checked on arrival.

Pure: bytes in, dicts out. peer/channel.py carries them.

Versions: each side offers a range in its hello, and both use the newest version that both know. The
number covers the messages and everything that crosses the peer link (tags, heartbeats). Later
versions may add fields to a hello, so it alone may have unknown fields; all later messages are
checked against the table of the agreed version. The range travels inside TLS: an attacker who could
change it could impersonate the peer anyway. A side refuses versions below its own minimum, so a
peer that was made to offer only old versions gets no connection rather than an old one.
"""

from __future__ import annotations

import json
from typing import Any

from ..validate import printable

VERSION = 9
DOCTOR_SINCE = 9  # the version that has doctor_ask
MIN_VERSION = 8  # oldest version that this release can still use
MAX_LINE = 65536
MAX_TEXT = 4096
MAX_FLOWS_TEXT = 61440
LONG = ("flows", "addresses", "hardware", "report")

#: type -> {field: type}. Every field is required; unknown ones are refused (but in hello).
MESSAGES: dict[str, dict[str, type]] = {
    # Opens the connection, from both sides. `min` to `v`: the versions it supports; `boot`:
    # identifies the process. It also carries `nonce`, for the key of peer/heartbeat_datagram.py,
    # which is not listed because `v` alone does not need it.
    "hello": {"v": int, "min": int, "pair": str, "role": str, "boot": str},
    # Heartbeat. `echo` is the peer's `t` (CLOCK_BOOTTIME, ns) returned, for the round trip;
    # `promise`: see failover/lease.py; `over`: its guest has shut itself down, and neither is to
    # continue. S: `delivered` and `sent` are the frames at its guest's taps so far, 0 on P.
    "heartbeat": {
        "t": int,
        "echo": int,
        "state": str,
        "epoch": int,
        "vm": bool,
        "shut": bool,
        "over": bool,
        "standalone": bool,
        "shadow": bool,
        "promise": bool,
        "role": str,
        "delivered": int,
        "sent": int,
    },
    # P, before `begin n`: addresses that its guest claims and MAC addresses that it sends from, in
    # the format of AddressTable.export(), hexadecimal; not sent if there are none.
    "claims": {"n": int, "nic": int, "addresses": str, "macs": str},
    # S: QEMU waits for the migration and the data path is ready; `qemu`: number of this QEMU since
    # the controller started; `disks`: sizes in bytes of the images that it exports, by name;
    # `hardware`: what its guest will see (qemu/hardware.py); `nics`: the MAC address of each
    # configured NIC by name, in their order ("": unknown). `nic` elsewhere is a place in it.
    "ready": {"epoch": int, "qemu": int, "disks": dict, "hardware": str, "nics": dict},
    # P: a checkpoint to epoch n begins: hold everything.
    "begin": {"n": int, "cause": str, "initial": bool},
    # S: output is held from here on.
    "begin_ack": {"n": int},
    # P, at the end of the first checkpoint: part n of the offsets that its guest has kept, as
    # struct colo_flow_key and struct colo_flow in hexadecimal; the `first` part of a NIC replaces
    # all that is known of it.
    "offsets": {"n": int, "nic": int, "first": bool, "last": bool, "flows": str},
    # S: part n is installed.
    "offsets_ack": {"n": int},
    # The other host's guest continues standalone: start a QEMU that waits for its migration.
    "reprotect": {"why": str},
    # P, after its guest's STOP for checkpoint n: what the guest wrote until then is in the
    # secondary's images.
    "disks_whole": {"n": int},
    # S: its guest runs again in epoch n, and its disks are of that epoch.
    "resumed": {"n": int, "pause_us": int},
    # Either: the checkpoint did not happen.
    "failed": {"n": int, "why": str},
    # Either: the sender's data path is shut; `standalone`: its guest ran standalone before.
    "shut": {"why": str, "standalone": bool},
    # Either: the sender's guest has shut itself down: do not take over.
    "guest_off": {"why": str},
    # S: take a checkpoint; `cause` as in compare/causes.py.
    "request": {"cause": str, "why": str},
    # P, with the `shut` of a planned switchover: the time since its guest's last frame left.
    "downtime_start": {"us": int},
    # S: its guest's first frame has left; `gap_us`: how long the network received nothing.
    "downtime": {"gap_us": int, "took_us": int},
    # P: demote your guest; the sender's guest runs standalone or wants to.
    "demote": {"why": str},
    # S: programs or devices were missing there, so frames between the guests were lost.
    "missed": {"why": str},
    # S: hand over; a switchover was requested on this side.
    "switchover": {"why": str},
    # S: its guest has taken over.
    "promoted": {"why": str},
    # Run your host's `colo-xdp doctor`; `n` is returned with the answer.
    "doctor_ask": {"n": int},
    # Its report as JSON, or {"trouble": ...}; `at`: the sender's clock, ms since 1970.
    "doctor_answer": {"n": int, "at": int, "report": str},
    # The controller exits and the guests keep running. `planned`: on purpose, not because of an
    # error; `back`: when it expects to be back, ms from now (0: unknown).
    "bye": {"why": str, "planned": bool, "back": int},
}


class WireError(ValueError):
    """A message that is not valid; the text describes the error."""


_ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps() would make one each time


def encode(kind: str, **fields: Any) -> bytes:
    """Encode one line. Raises WireError on a message that the table does not know.

    A `why` that is too long is cut: it contains names that others chose, such as file names.
    """
    if isinstance(fields.get("why"), str):
        fields["why"] = fields["why"][:MAX_TEXT]
    check({"type": kind, **fields})
    return _ENCODE({"type": kind, **fields}).encode() + b"\n"


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
        if typ is int and isinstance(v, int) and not 0 <= v < 1 << 64:
            raise WireError(f"{kind}.{name}: {v} out of range")
        if (
            typ is str
            and isinstance(v, str)
            and len(v) > (MAX_FLOWS_TEXT if name in LONG else MAX_TEXT)
        ):
            raise WireError(f"{kind}.{name}: {len(v)} characters")


def decode(line: bytes) -> dict[str, Any]:
    """Decode one line; its texts end up in logs and on terminals, and cannot steer these.

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
    return {k: printable(v) if isinstance(v, str) else v for k, v in msg.items()}


def agree(mine: tuple[int, int], theirs: tuple[int, int]) -> int:
    """Return the version to use, from (oldest, newest) of both sides.

    Raises WireError if there is none; the text names both ranges.
    """
    version = min(mine[1], theirs[1])
    if theirs[0] > theirs[1] or version < max(mine[0], theirs[0]):
        raise WireError(
            f"the peer supports versions {theirs[0]} to {theirs[1]}, this side {mine[0]} to "
            f"{mine[1]}: install releases on both hosts that overlap"
        )
    return version
