# SPDX-License-Identifier: GPL-2.0-or-later
"""The mark of a guest that ran standalone: what of it outlives a loss of power. Pure.

What is pinned ends with the host's boot, so without a lease two hosts that have both lost power
know nothing of a takeover. The mark is a file on the survivor's disk (service/mark_file.py) that
says: the guest here ran standalone, and no copy of it has been confirmed since. It is written
beside the takeover, which does not wait for it, and removed when a checkpoint has made the guests
equal.

A file that cannot be used counts as a mark: a mark that is taken seriously without reason costs an
operator's decision, a mark that is overlooked costs data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

FORMAT = 1
MAX_BYTES = 4096


class Standing(StrEnum):
    """What the mark says of this host's guest."""

    NONE = "none"  # there is no mark: no guest here is known to have run standalone
    STANDALONE = "standalone"  # it ran standalone, and nobody has what it wrote since
    #: it did, but the other host's guest has been allowed to run standalone after that
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Mark:
    """The content of the file."""

    pair: str
    standing: Standing
    boot: str  # the kernel's id of the boot in which the guest ran
    at: float  # when it was written, Unix time; 0: unknown
    trouble: str = ""  # why the file cannot be used; it counts as STANDALONE then

    def encode(self) -> bytes:
        """Return the content of the file."""
        raw = {
            "format": FORMAT,
            "pair": self.pair,
            "guest": self.standing.value,
            "boot": self.boot,
            "at": round(self.at, 3),
        }
        return json.dumps(raw).encode() + b"\n"


def unusable(pair: str, why: str) -> Mark:
    """Return the mark that stands for a file which cannot be used."""
    return Mark(pair, Standing.STANDALONE, "", 0.0, why)


def decode(data: bytes, pair: str) -> Mark:
    """Return the mark of `pair` in the content of a file, whatever that is."""
    try:
        raw = json.loads(data)
    except ValueError:  # of UnicodeDecodeError, too
        return unusable(pair, "it is no JSON: truncated, or not written by colo-xdp")
    except RecursionError:
        return unusable(pair, "it is not written by colo-xdp")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return unusable(pair, "its format is unknown")
    return _checked(raw, pair)


def _checked(raw: dict[str, Any], pair: str) -> Mark:
    name, guest, boot, at = (raw.get(k) for k in ("pair", "guest", "boot", "at"))
    if name != pair:
        return unusable(pair, f"it is of another pair, {str(name)[:80]!r}")
    if guest not in (Standing.STANDALONE, Standing.SUPERSEDED):
        return unusable(pair, f"`guest` is {str(guest)[:80]!r}")
    if not isinstance(boot, str) or isinstance(at, bool) or not isinstance(at, int | float):
        return unusable(pair, "`boot` or `at` is missing")
    return Mark(pair, Standing(guest), boot, float(at))


def found_why(mark: Mark, path: str, boot: str) -> str:
    """Return what a controller that knows nothing else says of the mark; "": nothing.

    `boot`: id of the present boot.
    """
    if mark.trouble:
        return (
            f"{path} cannot be used ({mark.trouble}): as a precaution the guest of this host "
            "counts as one that ran standalone; remove the file if that is known to be wrong"
        )
    if mark.standing is not Standing.STANDALONE:
        return ""
    since = "the data path was removed" if mark.boot == boot else "this host booted"
    return (
        f"the guest of this host ran standalone from {_utc(mark.at)} on, until {since}, and no "
        f"copy of it was confirmed ({path})"
    )


def _utc(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
