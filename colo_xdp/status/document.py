# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the status document: the output of `colo-xdp status --json`, and the metrics' source.
Pure.

SCHEMA grows when a key changes its meaning or is removed; new keys do not change it, and readers
must ignore keys they do not know. status/builder.py fills the document from a live controller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .. import abi
from ..compare.causes import Cause
from ..engine.engine import COUNTERS
from ..engine.waits import WAIT_BUCKETS
from ..failover.decision import Ending, Role, State
from ..net.bridge import PORT_STATES
from ..peer.heartbeat import REFUSALS

SCHEMA = 1

#: upper bounds of the histogram of waiting times in the kernel, s; one more bucket, as above
OFFLOAD_WAIT_BUCKETS: tuple[float, ...] = tuple(2.0**i / 1e6 for i in range(23))

#: counters of the secondary's controller in `engine`: name, meaning
SECONDARY_COUNTERS: tuple[tuple[str, str], ...] = (
    ("hold_overflow", "frames given up during a checkpoint because too many were waiting"),
    ("svm_stale", "frames of the secondary guest from before its RESUME, discarded"),
)


class StatusError(ValueError):
    """The document is malformed; the text names the key."""


_Check = Callable[[str, Any], None]


def _fail(key: str, want: str, value: Any) -> StatusError:
    shown = repr(value)
    return StatusError(f"{key}: expected {want}, got {shown[:60]}")


def _text(key: str, v: Any) -> None:
    if not isinstance(v, str):
        raise _fail(key, "a string", v)


def _one_of(*names: str) -> _Check:
    def check(key: str, v: Any) -> None:
        if not isinstance(v, str) or v not in names:
            raise _fail(key, "one of " + ", ".join(names), v)

    return check


def _count(key: str, v: Any) -> None:
    if type(v) is not int or v < 0:
        raise _fail(key, "a count", v)


def _number(key: str, v: Any) -> None:
    if type(v) not in (int, float) or not math.isfinite(v):
        raise _fail(key, "a finite number", v)


def _flag(key: str, v: Any) -> None:
    if not isinstance(v, bool):
        raise _fail(key, "true or false", v)


def _hex(key: str, v: Any) -> None:
    _text(key, v)
    try:
        bytes.fromhex(v)
    except ValueError:
        raise _fail(key, "bytes in hexadecimal", v) from None


def _or_null(inner: _Check) -> _Check:
    def check(key: str, v: Any) -> None:
        if v is not None:
            inner(key, v)

    return check


def _object(**keys: _Check) -> _Check:
    """Check for an object with at least these keys."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise _fail(key, "an object", v)
        for k, inner in keys.items():
            name = f"{key}.{k}" if key else k
            if k not in v:
                raise StatusError(f"{name}: missing")
            inner(name, v[k])

    return check


def _map(inner: _Check) -> _Check:
    """Check for an object with arbitrary keys and uniform values."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise _fail(key, "an object", v)
        for k, item in v.items():
            _text(f"{key} (a key)", k)
            inner(f"{key}.{k}", item)

    return check


def _list(inner: _Check, length: int | None = None) -> _Check:
    def check(key: str, v: Any) -> None:
        if not isinstance(v, list):
            raise _fail(key, "a list", v)
        if length is not None and len(v) != length:
            raise StatusError(f"{key}: expected {length} entries, got {len(v)}")
        for i, item in enumerate(v):
            inner(f"{key}[{i}]", item)

    return check


def _schema(key: str, v: Any) -> None:
    if type(v) is not int or v != SCHEMA:
        raise _fail(key, f"{SCHEMA} (this release's schema)", v)


_CHECKS: dict[str, _Check] = {
    "schema": _schema,
    "pair": _text,
    "role": _one_of(*Role),
    "state": _one_of(*State),
    "reason": _text,
    "since": _number,
    "epoch": _count,
    "mode": _one_of(*(m.name.lower() for m in abi.Mode)),
    "hook": _one_of("xdp", "tc", ""),
    "events": _one_of("ring", "perf", ""),
    "paused": _flag,
    "active": _object(
        transmitting=_flag,
        undecided=_flag,
        lease=_one_of("", "held", "promised", "none"),
        remaining_s=_or_null(_number),
        sync=_one_of(*(b.name.lower() for b in abi.SyncState)),
    ),
    "port": _one_of("", *PORT_STATES),
    "qemu": _object(connected=_flag, version=_text, accel=_text, gone=_flag),
    "peer": _object(
        connected=_flag,
        silent_ms=_or_null(_number),
        state=_text,
        rtt_us=_number,
        gone=_flag,
        ending=_one_of(*Ending),
    ),
    "heartbeat_links": _list(
        _object(
            name=_text,
            silent_ms=_or_null(_number),
            echo_age_ms=_or_null(_number),
            rtt_us=_number,
            sent=_count,
            received=_count,
            refused=_object(**dict.fromkeys(REFUSALS, _count)),
            trouble=_text,
        )
    ),
    "data_path": _object(trouble=_text, restored=_count, silent_checkpoints=_count),
    "programs": _map(_map(_list(_count, 2))),
    "engine": _map(_count),
    "held": _object(packets=_count, bytes=_count, limit=_count),
    "wait": _object(buckets=_list(_count, len(WAIT_BUCKETS) + 1), sum=_number),
    "offload": _object(
        waits=_list(_count, len(OFFLOAD_WAIT_BUCKETS) + 1),
        buffers=_count,
        waiting=_count,
        forgotten=_count,
    ),
    "flows": _object(tracked=_count, opening=_count, limit=_count, translated=_count, aged=_count),
    "checkpoints": _object(
        total=_count,
        failed=_count,
        delayed=_count,
        delay_s=_number,
        folded=_count,
        by_cause=_map(_count),
        last=_or_null(
            _object(cause=_text, detail=_text, pause_ms=_number, total_ms=_number, at=_number)
        ),
    ),
    "ring": _object(lost=_count, capacity_bytes=_count),
    "inject": _object(sent=_count, failed=_count),
    "history": _list(_object(at=_number, state=_one_of(*State), reason=_text)),
    "divergences": _list(
        _object(
            cause=_text,
            flow=_text,
            proto=_text,
            port=_count,
            rule=_text,
            asked=_flag,
            offset=_count,
            at_index=_count,
            pvm=_hex,
            svm=_hex,
        )
    ),
    "rules": _list(
        _object(name=_text, action=_text, flows=_count, uncompared=_count, differences=_count)
    ),
    "failures": _list(_text),
    "last_failover": _or_null(_object(gap_ms=_number, took_ms=_number)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One controller's status.

    since, history[].at, checkpoints.last.at: unix time, s; wait.sum: s; ring.capacity_bytes,
    held.bytes: bytes. wait.buckets are not cumulative: one count per bound of WAIT_BUCKETS, and one
    for everything above. Counters start at 0 with the controller, those of `programs` with the data
    path. Keys that only the other role uses are zero.
    """

    schema: int
    pair: str
    role: str
    state: str
    reason: str  # one sentence
    since: float
    epoch: int
    mode: str  # of the data path: abi.Mode, lower case
    hook: str  # "xdp" or "tc"; "": not loaded
    events: str  # "ring" or "perf"; "": not loaded
    paused: bool
    #: transmitting: the guest's frames reach the network; undecided: nobody has allowed that yet;
    #: lease, remaining_s: the guest's entitlement and its duration if a lease is the arbiter
    #: (promised: the other host stays silent); sync: the guest's relation to the other guest
    #: (abi.SyncState)
    active: dict[str, Any]
    port: str  # of the tap in its bridge: PORT_STATES; "": it is in no bridge
    qemu: dict[str, Any]
    peer: dict[str, Any]  # silent_ms: null if it never sent anything; ending: of the channel
    heartbeat_links: list[dict[str, Any]]  # besides the control channel; null: never
    #: trouble: why the data path is incomplete, "": it is complete; restored: programs and devices
    #: that were put back; silent_checkpoints: consecutive ones for waiting output without any frame
    #: from the SVM
    data_path: dict[str, Any]
    programs: dict[str, dict[str, list[int]]]  # {program: {reason: [packets, bytes]}}
    engine: dict[str, int]
    held: dict[str, int]
    wait: dict[str, Any]
    #: waits: like wait.buckets, with OFFLOAD_WAIT_BUCKETS; waiting: buffers in use
    offload: dict[str, Any]
    flows: dict[str, int]
    #: last: null before the first; delayed: number that had to wait for checkpoint.share, delay_s
    #: in total; folded: requests that arrived while one was pending
    checkpoints: dict[str, Any]
    ring: dict[str, int]
    inject: dict[str, int]
    history: list[dict[str, Any]]  # oldest first
    divergences: list[dict[str, Any]]  # oldest first; pvm, svm: hexadecimal
    rules: list[dict[str, Any]]  # in their order; action "": a former rule
    failures: list[str]
    last_failover: dict[str, float] | None  # of the last switchover

    def to_json(self) -> dict[str, Any]:
        """Return the document; it shares its parts with this object."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Status:
        """Parse a document; unknown keys are ignored.

        Raises StatusError, which names the key, if it is malformed.
        """
        if not isinstance(document, Mapping):
            raise _fail("document", "an object", document)
        for key, check in _CHECKS.items():
            if key not in document:
                raise StatusError(f"{key}: missing")
            check(key, document[key])
        return cls(**{key: document[key] for key in _CHECKS})


def empty(pair: str, role: str) -> Status:
    """Return a status with every counter at zero."""
    names = COUNTERS if role == Role.PRIMARY else SECONDARY_COUNTERS
    return Status(
        schema=SCHEMA,
        pair=pair,
        role=role,
        state=State.STARTING.value,
        reason="starting",
        since=0.0,
        epoch=0,
        mode=abi.Mode.DROP.name.lower(),
        hook="",
        events="",
        paused=False,
        active={
            "transmitting": False,
            "undecided": False,
            "lease": "",
            "remaining_s": None,
            "sync": "none",
        },
        port="",
        qemu={"connected": False, "version": "", "accel": "", "gone": False},
        peer={
            "connected": False,
            "silent_ms": None,
            "state": "",
            "rtt_us": 0.0,
            "gone": False,
            "ending": "",
        },
        heartbeat_links=[],
        data_path={"trouble": "", "restored": 0, "silent_checkpoints": 0},
        programs={p: {r: [0, 0] for r in abi.REASONS} for p in abi.PROGRAMS},
        engine={name: 0 for name, _ in names},
        held={"packets": 0, "bytes": 0, "limit": 0},
        wait={"buckets": [0] * (len(WAIT_BUCKETS) + 1), "sum": 0.0},
        offload={
            "waits": [0] * (len(OFFLOAD_WAIT_BUCKETS) + 1),
            "buffers": 0,
            "waiting": 0,
            "forgotten": 0,
        },
        flows={"tracked": 0, "opening": 0, "limit": 0, "translated": 0, "aged": 0},
        checkpoints={
            "total": 0,
            "failed": 0,
            "delayed": 0,
            "delay_s": 0.0,
            "folded": 0,
            "by_cause": {c.value: 0 for c in Cause},
            "last": None,
        },
        ring={"lost": 0, "capacity_bytes": 0},
        inject={"sent": 0, "failed": 0},
        history=[],
        divergences=[],
        rules=[],
        failures=[],
        last_failover=None,
    )
