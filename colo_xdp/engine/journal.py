# SPDX-License-Identifier: GPL-2.0-or-later
"""Journal of checkpoints and their causes, which `explain`, `capture` and `suggest` read.

Pure and bounded. Times are unix seconds (`at`) or ms (`*_ms`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..compare.causes import Cause
from ..net.frame import NO_EVIDENCE, Evidence

MAX_ENTRIES = 2048
MAX_GROUPS = 512
MAX_PAIRS = 64
MAX_FRAME = 65550


@dataclass(frozen=True, slots=True)
class Divergence:
    """One difference that was found, with its evidence."""

    ts_ns: int
    cause: Cause
    flow: str
    proto: str
    port: int  # of the service: the lower one; 0: it has none
    rule: str  # of the policy
    evidence: Evidence = NO_EVIDENCE
    asked: bool = True  # for a checkpoint; False: the flow is only monitored
    nic: str = ""  # name of the guest's NIC
    #: the SVM's kernel has not even acked what the PVM acks: it does not run, or has not got it
    svm_deaf: bool = False
    #: when the frame came that differs, or waits in vain
    since_ns: int = 0


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One checkpoint; `failed` is the reason if it failed."""

    at: float
    cause: str
    detail: str
    proto: str
    port: int
    rule: str
    pause_ms: float  # of the PVM: STOP to RESUME
    total_ms: float  # since the request: how long output was held
    held_packets: int  # most of them arrive while the checkpoint runs
    held_bytes: int
    failed: str = ""
    differed: bool = False  # it was requested because the guests did
    agreed_ms: float = 0.0  # from the checkpoint before to the frame that differed, or to this one
    waited_ms: float = 0.0  # from that frame to the beginning of this one
    #: in shadow mode: from the checkpoint before until the SVM, too, had sent what they agreed on
    followed_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the entry as the control socket sends it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Group:
    """All checkpoints of one cause, protocol, port and rule."""

    count: int = 0
    pause_ms: float = 0.0
    total_ms: float = 0.0
    held_bytes: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class Journal:
    """The latest events, as far as there is room; `groups` forgets only names."""

    entries: deque[JournalEntry] = field(default_factory=lambda: deque(maxlen=MAX_ENTRIES))
    groups: dict[tuple[str, str, int, str], Group] = field(default_factory=dict)
    pairs: deque[tuple[int, float, Divergence]] = field(
        default_factory=lambda: deque(maxlen=MAX_PAIRS)
    )
    seen: int = 0  # divergences ever seen

    def checkpoint(self, e: JournalEntry) -> None:
        """Note that a checkpoint is over."""
        self.entries.append(e)
        if e.failed:
            return
        key = (e.cause, e.proto, e.port, e.rule)
        if key not in self.groups and len(self.groups) >= MAX_GROUPS:
            key = (e.cause, "", 0, "")  # too many ports: the cause stays right
        g = self.groups.setdefault(key, Group(first=e.at))
        g.count += 1
        g.pause_ms += e.pause_ms
        g.total_ms += e.total_ms
        g.held_bytes += e.held_bytes
        g.last = e.at

    def divergence(self, d: Divergence, at: float) -> None:
        """Note that the guests differ."""
        self.seen += 1
        self.pairs.append((self.seen, at, d))

    def since(self, serial: int) -> Iterator[tuple[int, float, Divergence]]:
        """Return the divergences after number `serial` that are still known."""
        return (entry for entry in self.pairs if entry[0] > serial)

    def to_json(self) -> dict[str, Any]:
        """Return the journal without frames, for `explain` and `suggest`."""
        return {
            "entries": [e.to_json() for e in self.entries],
            "groups": [
                {
                    "cause": cause,
                    "proto": proto,
                    "port": port,
                    "rule": rule,
                    "count": g.count,
                    "pause_ms": g.pause_ms,
                    "total_ms": g.total_ms,
                    "held_bytes": g.held_bytes,
                    "first": g.first,
                    "last": g.last,
                }
                for (cause, proto, port, rule), g in self.groups.items()
            ],
            "divergences": [
                {"serial": n, "at": at, **divergence_json(d)} for n, at, d in self.pairs
            ],
        }

    def frames_json(self, after: int, limit: int) -> dict[str, Any]:
        """Return a page of the frames of the divergences after number `after`, for `capture`."""
        page: list[dict[str, Any]] = []
        for n, at, d in self.since(after):
            if len(page) == limit:
                break
            e = d.evidence
            page.append(
                {
                    "serial": n,
                    "at": at,
                    **divergence_json(d),
                    "pvm_frame": e.pvm_frame.frame[:MAX_FRAME].hex() if e.pvm_frame else "",
                    "svm_frame": e.svm_frame[:MAX_FRAME].hex(),
                }
            )
        return {"pairs": page, "seen": self.seen}


def divergence_json(d: Divergence) -> dict[str, Any]:
    """Return a divergence as status and `explain` show it."""
    e = d.evidence
    return {
        "cause": d.cause.value,
        "flow": d.flow,
        "proto": d.proto,
        "port": d.port,
        "rule": d.rule,
        "nic": d.nic,
        "asked": d.asked,
        "offset": e.offset,
        "at_index": e.at,
        "pvm": e.pvm.hex(),
        "svm": e.svm.hex(),
    }
