# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the status document: the output of `colo-xdp status --json`, and the metrics' source.
Pure.

SCHEMA grows when a key changes its meaning or is removed; new keys do not change it, and readers
must ignore keys they do not know. A key is described in FIELDS and begins with its value in
empty(). status/builder.py fills the document from a live controller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .. import abi
from ..compare.causes import Cause
from ..compare.patience import SOURCES
from ..engine.engine import COUNTERS
from ..engine.waits import WAIT_BUCKETS
from ..failover.facts import Ending
from ..failover.prospect import Need, Outcome
from ..failover.states import Role, State
from ..net.bridge import PORT_STATES
from ..peer.heartbeat_datagram import REFUSALS

SCHEMA = 1

#: upper bounds of the histogram of waiting times in the fast path, in seconds; one more bucket is
#: above the last
OFFLOAD_WAIT_BUCKETS: tuple[float, ...] = tuple(2.0**i / 1e6 for i in range(23))

#: counters of the secondary's controller in `engine`: name, meaning
SECONDARY_COUNTERS: tuple[tuple[str, str], ...] = (
    ("hold_overflow", "frames dropped during a checkpoint because too many were waiting"),
    ("svm_stale", "frames that the secondary guest sent before it resumed after a checkpoint"),
)


class StatusError(ValueError):
    """The document is malformed; the text names the key."""


def _fail(key: str, want: str, value: Any) -> StatusError:
    shown = repr(value)
    return StatusError(f"{key}: expected {want}, got {shown[:60]}")


@dataclass(frozen=True, slots=True)
class Field:
    """A value of the document: its type, its meaning and its check.

    `keys` are the fields of an object, `items` describes the elements of a list and the values of
    a map. tests/docs/generate.py makes docs/reference/status.md of these.
    """

    type: str
    meaning: str
    check: Callable[[str, Any], None]
    keys: Mapping[str, Field] = field(default_factory=dict)
    items: Field | None = None


def _text(meaning: str = "") -> Field:
    def check(key: str, v: Any) -> None:
        if not isinstance(v, str):
            raise _fail(key, "a string", v)

    return Field("string", meaning, check)


def _one_of(names: Iterable[str], meaning: str) -> Field:
    values = tuple(names)

    def check(key: str, v: Any) -> None:
        if not isinstance(v, str) or v not in values:
            raise _fail(key, "one of " + ", ".join(values), v)

    return Field(", ".join(f'"{n}"' for n in values), meaning, check)


def _count(meaning: str = "") -> Field:
    def check(key: str, v: Any) -> None:
        if type(v) is not int or v < 0:
            raise _fail(key, "a count", v)

    return Field("count", meaning, check)


def _number(meaning: str) -> Field:
    def check(key: str, v: Any) -> None:
        if type(v) not in (int, float) or not math.isfinite(v):
            raise _fail(key, "a finite number", v)

    return Field("number", meaning, check)


def _flag(meaning: str) -> Field:
    def check(key: str, v: Any) -> None:
        if not isinstance(v, bool):
            raise _fail(key, "true or false", v)

    return Field("boolean", meaning, check)


def _hex(meaning: str) -> Field:
    text = _text()

    def check(key: str, v: Any) -> None:
        text.check(key, v)
        try:
            bytes.fromhex(v)
        except ValueError:
            raise _fail(key, "bytes in hexadecimal", v) from None

    return Field("bytes in hexadecimal", meaning, check)


def _or_null(inner: Field) -> Field:
    def check(key: str, v: Any) -> None:
        if v is not None:
            inner.check(key, v)

    return Field(f"{inner.type} or null", inner.meaning, check, inner.keys)


def _object(meaning: str, **keys: Field) -> Field:
    """An object with at least these keys."""

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise _fail(key, "an object", v)
        for k, inner in keys.items():
            name = f"{key}.{k}" if key else k
            if k not in v:
                raise StatusError(f"{name}: missing")
            inner.check(name, v[k])

    return Field("object", meaning, check, keys)


def _map(meaning: str, inner: Field) -> Field:
    """An object with any keys, all values alike."""
    text = _text()

    def check(key: str, v: Any) -> None:
        if not isinstance(v, dict):
            raise _fail(key, "an object", v)
        for k, item in v.items():
            text.check(f"{key} (a key)", k)
            inner.check(f"{key}.{k}", item)

    return Field("map", meaning, check, items=inner)


def _list(meaning: str, inner: Field, length: int | None = None) -> Field:
    def check(key: str, v: Any) -> None:
        if not isinstance(v, list):
            raise _fail(key, "a list", v)
        if length is not None and len(v) != length:
            raise StatusError(f"{key}: expected {length} entries, got {len(v)}")
        for i, item in enumerate(v):
            inner.check(f"{key}[{i}]", item)

    return Field("list" if length is None else f"list of {length}", meaning, check, items=inner)


def _schema(meaning: str) -> Field:
    def check(key: str, v: Any) -> None:
        if type(v) is not int or v != SCHEMA:
            raise _fail(key, f"{SCHEMA} (this release's schema)", v)

    return Field("count", meaning, check)


_REFUSED = {
    "stranger": "not a heartbeat datagram of this version",
    "other_pair": "of another pair, which may share the link",
    "other_key": "signed under the key of another connection",
    "forged": "the signature is wrong",
    "own": "sent by this host itself",
    "replayed": "its counter was used before, or is too old to tell",
}

FIELDS: dict[str, Field] = {
    "schema": _schema(f"version of this document; {SCHEMA} in this release"),
    "pair": _text("name of the pair"),
    "role": _one_of(Role, "which guest this host runs now"),
    "state": _one_of(State, "state of the pair as this host sees it"),
    "reason": _text("why the pair is in this state, in one sentence"),
    "uptime_s": _number("time since the controller started, in seconds"),
    "since": _number("Unix time of the last change of state, in seconds"),
    "epoch": _count("number of the checkpoint from which both guests started"),
    "mode": _one_of((m.name.lower() for m in abi.Mode), "mode of the data path"),
    "hook": _one_of(
        ("xdp", "tc", ""), 'where the SVM\'s output is intercepted; "": no program is loaded'
    ),
    "events": _one_of(
        ("ring", "perf", ""), 'buffer that carries frames to the controller; "": none is loaded'
    ),
    "paused": _flag("failover decisions are left to an operator"),
    "active": _object(
        "whether this host's guest reaches the network, and by which right",
        transmitting=_flag("the guest reaches the network"),
        undecided=_flag(
            "nothing was pinned when the controller started, so it is not decided yet "
            "whether the guest may transmit"
        ),
        disks_unproven=_flag(
            "whether the disks here may lack what was written before the last checkpoint, so that "
            "only an operator may let this guest take over"
        ),
        lease=_one_of(
            ("", "held", "promised", "none"),
            "with a lease as the arbiter: the lease is held, or the other host promises to stay "
            'silent, or neither; "": the arbiter is not a lease',
        ),
        remaining_s=_or_null(
            _number("seconds for which the right holds; null: the arbiter is not a lease")
        ),
        sync=_one_of(
            (b.name.lower() for b in abi.SyncState),
            "what the guest is to the other one: nothing is known (none), a checkpoint was "
            "confirmed and nobody has run alone since (in_sync), it has run alone (standalone)",
        ),
    ),
    "failover": _object(
        "what decides when the other host is lost",
        arbiter=_one_of(
            ("", "fence", "lease", "manual"), 'as configured; "": nothing is loaded yet'
        ),
        automatic=_flag("whether no operator is needed"),
        fence=_flag("whether a fence command is configured"),
        trouble=_text('why the arbiter cannot be asked now; "": it can, or none is needed'),
    ),
    "if_peer_died": _object(
        "what would happen if the other host died now, by the same rules that would decide then",
        outcome=_one_of(
            Outcome,
            "the guest here serves alone already (unchanged), it would take over (takes_over) or "
            "go on alone (goes_solo), nothing happens before an operator decides (operator) or "
            "before the arbiter answers (waits), or no guest would serve (lost)",
        ),
        needs=_list("what has to succeed first", _one_of(Need, "")),
        within_s=_or_null(
            _number(
                "longest time until the death is acted upon, in seconds; null: nothing is done by "
                "itself"
            )
        ),
        sentence=_text("the same for people"),
    ),
    "port": _one_of(
        ("", *PORT_STATES), 'state of the tap as a bridge port; "": the tap is in no bridge'
    ),
    "qemu": _object(
        "this host's QEMU",
        connected=_flag("QMP is connected"),
        version=_text("version of QEMU"),
        accel=_text('"kvm" or "tcg"; "": not known'),
        gone=_flag("this host's guest is lost"),
    ),
    "peer": _object(
        "the other host's controller",
        connected=_flag("the control channel is up"),
        silent_ms=_or_null(_number("time since its last message, in ms; null: there was none")),
        state=_text("the state that it reported last"),
        rtt_us=_number("round-trip time of the last heartbeat on the control channel, in µs"),
        gone=_flag("it reported that its data path is shut, so its guest is certainly silent"),
        ending=_one_of(
            Ending,
            "how the silence on the control channel began: its host closed the connection, "
            "acknowledged data that nobody answered, acknowledged nothing any more, or the "
            'controller was stopped on purpose; "": not known',
        ),
    ),
    "heartbeat_links": _list(
        "the links that carry heartbeats in addition to the control channel",
        _object(
            "",
            name=_text("name of the link"),
            silent_ms=_or_null(
                _number("time since the last heartbeat, in ms; null: there was none")
            ),
            echo_age_ms=_or_null(
                _number(
                    "age of the newest of this host's heartbeats that the peer has "
                    "acknowledged on this link, in ms; null: none"
                )
            ),
            rtt_us=_number("round-trip time of the last heartbeat, in µs"),
            sent=_count("heartbeats sent"),
            received=_count("heartbeats accepted"),
            refused=_object(
                "datagrams that were not accepted, by reason",
                **{name: _count(_REFUSED[name]) for name in REFUSALS},
            ),
            trouble=_text('why the link cannot be used; "": it can'),
        ),
    ),
    "data_path": _object(
        "whether devices and programs are complete",
        trouble=_text('what is missing or does not arrive; "": the data path is whole'),
        restored=_count("programs and devices that were missing and have been restored"),
        silent_checkpoints=_count(
            "consecutive checkpoints for waiting output during which no frame of the SVM arrived"
        ),
    ),
    "programs": _map(
        "for each program and reason, [packets, bytes]; see reasons.md",
        _map("", _list("", _count(), 2)),
    ),
    "engine": _map("counters of the compare engine, by name; see metrics.md", _count()),
    "held": _object(
        "frames that wait: on the primary host frames of the PVM, on the secondary host what a "
        "checkpoint holds",
        packets=_count("number of frames"),
        bytes=_count("their bytes"),
        limit=_count("limit of `packets`"),
    ),
    "wait": _object(
        "how long frames of the PVM were held by the controller",
        buckets=_list(
            "frames per bucket of WAIT_BUCKETS, not cumulative; the last one counts what is above",
            _count(),
            len(WAIT_BUCKETS) + 1,
        ),
        sum=_number("sum of the waiting times, in seconds"),
    ),
    "patience": _object(
        "how long a frame of the PVM waits for its counterpart before a checkpoint is requested",
        ms=_number("the time, in ms"),
        source=_one_of(
            ("", *SOURCES),
            "what it comes from: compare.wait is fixed, compare_timeout is the ceiling, the lag of "
            'the SVM, the cost of a checkpoint, or min_wait; "": this host runs no PVM',
        ),
        lag_ms=_number("lag with which the SVM has answered lately (a high quantile), in ms"),
        checkpoint_ms=_number("what a checkpoint takes (smoothed), in ms"),
        needless=_count("checkpoints for waiting output whose counterpart was on its way"),
    ),
    "offload": _object(
        "the fast path",
        waits=_list(
            "as wait.buckets, with the bounds OFFLOAD_WAIT_BUCKETS",
            _count(),
            len(OFFLOAD_WAIT_BUCKETS) + 1,
        ),
        buffers=_count("number of buffers: connections that can wait at the same time"),
        waiting=_count("buffers in use"),
        forgotten=_count("connections removed after long disuse"),
    ),
    "flows": _object(
        "tracked connections",
        tracked=_count("number of connections"),
        opening=_count("handshakes of the SVM in progress, in addition"),
        limit=_count("limit of `tracked`"),
        translated=_count("connections of the SVM whose sequence numbers are translated"),
        aged=_count("connections removed because of their age"),
    ),
    "checkpoints": _object(
        "checkpoints since the controller started",
        total=_count("completed"),
        failed=_count("not completed"),
        delayed=_count("delayed to keep within checkpoint.share"),
        delay_s=_number("sum of these delays, in seconds"),
        folded=_count("requests that were served by a checkpoint already requested"),
        by_cause=_map("completed, by cause", _count()),
        price=_map(
            "sums over the completed ones, by cause; without a cause of which there was none",
            _object(
                "",
                pause_ms=_number("how long the PVM was stopped, in ms"),
                total_ms=_number("time from the beginning to the end, in ms"),
            ),
        ),
        last=_or_null(
            _object(
                "the last one; null: there was none",
                cause=_text("its cause; see reasons.md"),
                detail=_text("what exactly caused it"),
                pause_ms=_number("how long the PVM was stopped, in ms"),
                total_ms=_number("time from the request to the end, in ms"),
                at=_number("Unix time, in seconds"),
            )
        ),
    ),
    "ring": _object(
        "the event buffer",
        lost=_count("frames that did not fit"),
        capacity_bytes=_count("its size"),
    ),
    "inject": _object(
        "frames that the controller released to the kernel",
        sent=_count("frames that the kernel accepted"),
        failed=_count("frames that the kernel refused"),
    ),
    "history": _list(
        "changes of state, oldest first",
        _object(
            "",
            at=_number("Unix time, in seconds"),
            state=_one_of(State, "the new state"),
            reason=_text("why"),
        ),
    ),
    "divergences": _list(
        "the last differences between the guests, oldest first",
        _object(
            "",
            cause=_text("kind of the difference; see reasons.md"),
            flow=_text("the flow, as text"),
            proto=_text("its protocol"),
            port=_count("port of the service; 0: there is none"),
            rule=_text("rule of the policy that judged the flow"),
            nic=_text("name of the guest's NIC"),
            asked=_flag("it counted as a reason for a checkpoint; false: the flow is only watched"),
            offset=_count("position in the stream or datagram"),
            at_index=_count("index of the first differing byte in `pvm` and `svm`"),
            pvm=_hex("bytes of the PVM around the difference"),
            svm=_hex("bytes of the SVM around the difference"),
        ),
    ),
    "rules": _list(
        "the rules of the policy in their order, then former ones",
        _object(
            "",
            name=_text("name of the rule"),
            action=_text('its action; "": the rule is no longer in force'),
            flows=_count("connections and datagram flows under it"),
            uncompared=_count("frames that left uncompared"),
            differences=_count("differences found"),
        ),
    ),
    "nics": _list(
        "the guest's NICs: what is of one of them alone; the keys above are sums over all, and "
        "`hook` and `port` the first one's",
        _object(
            "",
            name=_text("name of the NIC"),
            tap=_text("its tap"),
            peer_link=_text("device that carries its frames to the other host"),
            bridge=_text('bridge that its tap joins; "": none'),
            mac=_text('MAC address; "": not known yet'),
            hook=_one_of(("xdp", "tc"), "where the SVM's output is intercepted"),
            port=_one_of(
                ("", *PORT_STATES), 'state of the tap as a bridge port; "": it is in no bridge'
            ),
            arrived=_count("tagged frames that have come over the peer link"),
            lost=_count("frames that did not fit into its event buffer"),
            sent=_count("frames that the controller released to the kernel"),
            held=_count("frames of the PVM that wait (primary)"),
            flows=_count("tracked connections"),
            trouble=_text('why its peer link delivers nothing; "": it delivers'),
        ),
    ),
    "disks": _object(
        "the replicated disks of this host's guest",
        names=_list("their names", _text()),
        mirrored=_flag("whether each write goes to both hosts' images (primary)"),
        lost=_text("why a disk is no longer mirrored (primary)"),
        copying=_or_null(
            _object(
                "the first copy, as long as it takes (primary); null: none",
                done=_count("bytes copied"),
                total=_count("bytes to copy"),
                rate=_number("bytes per second so far"),
                left_s=_or_null(_number("seconds left at that rate; null: unknown")),
            )
        ),
        exported=_flag("whether the other host can write to the images (secondary)"),
        committing=_flag("whether QEMU still merges the overlays after a takeover"),
        overlays=_map("size of the larger overlay of each disk, in bytes", _count()),
        room_trouble=_text("why there may be too little room for the overlays (secondary)"),
        proof_ms=_number(
            "how long the last checkpoint waited here for the primary's confirmation that its "
            "disks were whole, in ms; meanwhile this guest could not take over"
        ),
    ),
    "event_log": _object(
        "the file that `colo-xdp events` reads",
        path=_text("its path"),
        lost=_count("events that are not in it: too many, or the disk did not take them"),
        trouble=_text('why the last event was lost; "": it was not'),
    ),
    "failures": _list("the last internal errors", _text()),
    "last_failover": _or_null(
        _object(
            "the last switchover; null: there was none",
            gap_ms=_number("how long the network received nothing from the guest, in ms"),
            took_ms=_number("duration of the switchover, in ms"),
        )
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One controller's status. FIELDS has the meaning of each key.

    Counters begin at 0 with the controller, those of `programs` with the data path. What only the
    other role has is zero.
    """

    schema: int
    pair: str
    role: str
    state: str
    reason: str
    uptime_s: float
    since: float
    epoch: int
    mode: str
    hook: str
    events: str
    paused: bool
    active: dict[str, Any]
    failover: dict[str, Any]
    if_peer_died: dict[str, Any]
    port: str
    qemu: dict[str, Any]
    peer: dict[str, Any]
    heartbeat_links: list[dict[str, Any]]
    data_path: dict[str, Any]
    programs: dict[str, dict[str, list[int]]]
    engine: dict[str, int]
    held: dict[str, int]
    wait: dict[str, Any]
    patience: dict[str, Any]
    offload: dict[str, Any]
    flows: dict[str, int]
    checkpoints: dict[str, Any]
    ring: dict[str, int]
    inject: dict[str, int]
    history: list[dict[str, Any]]
    divergences: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    event_log: dict[str, Any]
    failures: list[str]
    disks: dict[str, Any]
    nics: list[dict[str, Any]]
    last_failover: dict[str, float] | None

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
        for key, f in FIELDS.items():
            if key not in document:
                raise StatusError(f"{key}: missing")
            f.check(key, document[key])
        return cls(**{key: document[key] for key in FIELDS})


def empty(pair: str, role: str) -> Status:
    """Return a status with every counter at zero."""
    names = COUNTERS if role == Role.PRIMARY else SECONDARY_COUNTERS
    return Status(
        schema=SCHEMA,
        pair=pair,
        role=role,
        state=State.STARTING.value,
        reason="starting",
        uptime_s=0.0,
        since=0.0,
        epoch=0,
        mode=abi.Mode.DROP.name.lower(),
        hook="",
        events="",
        paused=False,
        active={
            "transmitting": False,
            "undecided": False,
            "disks_unproven": False,
            "lease": "",
            "remaining_s": None,
            "sync": "none",
        },
        failover={"arbiter": "", "automatic": False, "fence": False, "trouble": ""},
        if_peer_died={
            "outcome": Outcome.LOST.value,
            "needs": [],
            "within_s": None,
            "sentence": "no guest would serve: the controller here is still starting",
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
        patience={"ms": 0.0, "source": "", "lag_ms": 0.0, "checkpoint_ms": 0.0, "needless": 0},
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
            "price": {},
            "last": None,
        },
        ring={"lost": 0, "capacity_bytes": 0},
        inject={"sent": 0, "failed": 0},
        history=[],
        divergences=[],
        rules=[],
        event_log={"path": "", "lost": 0, "trouble": ""},
        failures=[],
        disks={
            "names": [],
            "mirrored": False,
            "lost": "",
            "copying": None,
            "exported": False,
            "committing": False,
            "overlays": {},
            "room_trouble": "",
            "proof_ms": 0.0,
        },
        nics=[],
        last_failover=None,
    )
