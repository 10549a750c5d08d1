# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the status document: the output of `colo-xdp status --json`, and the metrics' source.
Pure.

SCHEMA grows when a key changes its meaning or is removed; new keys do not change it, and readers
must ignore keys they do not know. A key is described in FIELDS and begins with its value in
empty(). status/builder.py fills the document from a live controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
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
from .fields import (
    Field,
    StatusError,
    count,
    flag,
    hexadecimal,
    list_of,
    map_of,
    number,
    object_of,
    one_of,
    or_null,
    text,
    wrong,
)

SCHEMA = 1

#: upper bounds of the histogram of waiting times in the fast path, in seconds; one more bucket is
#: above the last
OFFLOAD_WAIT_BUCKETS: tuple[float, ...] = tuple(2.0**i / 1e6 for i in range(23))

#: counters of the secondary's controller in `engine`: name, meaning
SECONDARY_COUNTERS: tuple[tuple[str, str], ...] = (
    ("hold_overflow", "frames dropped during a checkpoint because too many were waiting"),
    ("svm_stale", "frames that the secondary guest sent before it resumed after a checkpoint"),
)


def _schema(meaning: str) -> Field:
    def check(key: str, v: Any) -> None:
        if type(v) is not int or v != SCHEMA:
            raise wrong(key, f"{SCHEMA} (this release's schema)", v)

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
    "pair": text("name of the pair"),
    "role": one_of(Role, "which guest this host runs now"),
    "state": one_of(State, "state of the pair as this host sees it"),
    "reason": text("why the pair is in this state, in one sentence"),
    "uptime_s": number("time since the controller started, in seconds"),
    "since": number("Unix time of the last change of state, in seconds"),
    "epoch": count("number of the checkpoint from which both guests started"),
    "mode": one_of((m.name.lower() for m in abi.Mode), "mode of the data path"),
    "hook": one_of(
        ("xdp", "tc", ""), 'where the SVM\'s output is intercepted; "": no program is loaded'
    ),
    "events": one_of(
        ("ring", "perf", ""), 'buffer that carries frames to the controller; "": none is loaded'
    ),
    "paused": flag("failover decisions are left to an operator"),
    "active": object_of(
        "whether this host's guest reaches the network, and by which right",
        transmitting=flag("the guest reaches the network"),
        undecided=flag(
            "nothing was pinned when the controller started, so it is not decided yet "
            "whether the guest may transmit"
        ),
        disks_unproven=flag(
            "whether the disks here may lack what was written before the last checkpoint, so that "
            "only an operator may let this guest take over"
        ),
        lease=one_of(
            ("", "held", "promised", "none"),
            "with a lease as the arbiter: the lease is held, or the other host promises to stay "
            'silent, or neither; "": the arbiter is not a lease',
        ),
        remaining_s=or_null(
            number("seconds for which the right holds; null: the arbiter is not a lease")
        ),
        sync=one_of(
            (b.name.lower() for b in abi.SyncState),
            "what the guest is to the other one: nothing is known (none), a checkpoint was "
            "confirmed and nobody has run alone since (in_sync), it has run alone (standalone)",
        ),
    ),
    "failover": object_of(
        "what decides when the other host is lost",
        arbiter=one_of(
            ("", "fence", "lease", "manual"), 'as configured; "": nothing is loaded yet'
        ),
        automatic=flag("whether no operator is needed"),
        fence=flag("whether a fence command is configured"),
        trouble=text('why the arbiter cannot be asked now; "": it can, or none is needed'),
    ),
    "if_peer_died": object_of(
        "what would happen if the other host died now, by the same rules that would decide then",
        outcome=one_of(
            Outcome,
            "the guest here serves alone already (unchanged), it would take over (takes_over) or "
            "go on alone (goes_solo), nothing happens before an operator decides (operator) or "
            "before the arbiter answers (waits), or no guest would serve (lost)",
        ),
        needs=list_of("what has to succeed first", one_of(Need, "")),
        within_s=or_null(
            number(
                "longest time until the death is acted upon, in seconds; null: nothing is done by "
                "itself"
            )
        ),
        sentence=text("the same for people"),
    ),
    "port": one_of(
        ("", *PORT_STATES), 'state of the tap as a bridge port; "": the tap is in no bridge'
    ),
    "qemu": object_of(
        "this host's QEMU",
        connected=flag("QMP is connected"),
        version=text("version of QEMU"),
        accel=text('"kvm" or "tcg"; "": not known'),
        gone=flag("this host's guest is lost"),
    ),
    "peer": object_of(
        "the other host's controller",
        connected=flag("the control channel is up"),
        silent_ms=or_null(number("time since its last message, in ms; null: there was none")),
        state=text("the state that it reported last"),
        rtt_us=number("round-trip time of the last heartbeat on the control channel, in µs"),
        gone=flag("it reported that its data path is shut, so its guest is certainly silent"),
        ending=one_of(
            Ending,
            "how the silence on the control channel began: its host closed the connection, "
            "acknowledged data that nobody answered, acknowledged nothing any more, or the "
            'controller was stopped on purpose; "": not known',
        ),
    ),
    "heartbeat_links": list_of(
        "the links that carry heartbeats in addition to the control channel",
        object_of(
            "",
            name=text("name of the link"),
            silent_ms=or_null(number("time since the last heartbeat, in ms; null: there was none")),
            echo_age_ms=or_null(
                number(
                    "age of the newest of this host's heartbeats that the peer has "
                    "acknowledged on this link, in ms; null: none"
                )
            ),
            rtt_us=number("round-trip time of the last heartbeat, in µs"),
            sent=count("heartbeats sent"),
            received=count("heartbeats accepted"),
            refused=object_of(
                "datagrams that were not accepted, by reason",
                **{name: count(_REFUSED[name]) for name in REFUSALS},
            ),
            trouble=text('why the link cannot be used; "": it can'),
        ),
    ),
    "data_path": object_of(
        "whether devices and programs are complete",
        trouble=text('what is missing or does not arrive; "": the data path is whole'),
        restored=count("programs and devices that were missing and have been restored"),
        silent_checkpoints=count(
            "consecutive checkpoints for waiting output during which no frame of the SVM arrived"
        ),
    ),
    "programs": map_of(
        "for each program and reason, [packets, bytes]; see reasons.md",
        map_of("", list_of("", count(), 2)),
    ),
    "engine": map_of("counters of the compare engine, by name; see metrics.md", count()),
    "held": object_of(
        "frames that wait: on the primary host frames of the PVM, on the secondary host what a "
        "checkpoint holds",
        packets=count("number of frames"),
        bytes=count("their bytes"),
        limit=count("limit of `packets`"),
    ),
    "wait": object_of(
        "how long frames of the PVM were held by the controller",
        buckets=list_of(
            "frames per bucket of WAIT_BUCKETS, not cumulative; the last one counts what is above",
            count(),
            len(WAIT_BUCKETS) + 1,
        ),
        sum=number("sum of the waiting times, in seconds"),
    ),
    "patience": object_of(
        "how long a frame of the PVM waits for its counterpart before a checkpoint is requested",
        ms=number("the time, in ms"),
        source=one_of(
            ("", *SOURCES),
            "what it comes from: compare.wait is fixed, compare_timeout is the ceiling, the lag of "
            'the SVM, the cost of a checkpoint, or min_wait; "": this host runs no PVM',
        ),
        lag_ms=number("lag with which the SVM has answered lately (a high quantile), in ms"),
        checkpoint_ms=number("what a checkpoint takes (smoothed), in ms"),
        needless=count("checkpoints for waiting output whose counterpart was on its way"),
    ),
    "offload": object_of(
        "the fast path",
        waits=list_of(
            "as wait.buckets, with the bounds OFFLOAD_WAIT_BUCKETS",
            count(),
            len(OFFLOAD_WAIT_BUCKETS) + 1,
        ),
        buffers=count("number of buffers: connections that can wait at the same time"),
        waiting=count("buffers in use"),
        forgotten=count("connections removed after long disuse"),
    ),
    "flows": object_of(
        "tracked connections",
        tracked=count("number of connections"),
        opening=count("handshakes of the SVM in progress, in addition"),
        limit=count("limit of `tracked`"),
        translated=count("connections of the SVM whose sequence numbers are translated"),
        aged=count("connections removed because of their age"),
    ),
    "checkpoints": object_of(
        "checkpoints since the controller started",
        total=count("completed"),
        failed=count("not completed"),
        delayed=count("delayed to keep within checkpoint.share"),
        delay_s=number("sum of these delays, in seconds"),
        folded=count("requests that were served by a checkpoint already requested"),
        by_cause=map_of("completed, by cause", count()),
        price=map_of(
            "sums over the completed ones, by cause; without a cause of which there was none",
            object_of(
                "",
                pause_ms=number("how long the PVM was stopped, in ms"),
                total_ms=number("time from the beginning to the end, in ms"),
            ),
        ),
        last=or_null(
            object_of(
                "the last one; null: there was none",
                cause=text("its cause; see reasons.md"),
                detail=text("what exactly caused it"),
                pause_ms=number("how long the PVM was stopped, in ms"),
                total_ms=number("time from the request to the end, in ms"),
                at=number("Unix time, in seconds"),
            )
        ),
    ),
    "ring": object_of(
        "the event buffer",
        lost=count("frames that did not fit"),
        capacity_bytes=count("its size"),
    ),
    "inject": object_of(
        "frames that the controller released to the kernel",
        sent=count("frames that the kernel accepted"),
        failed=count("frames that the kernel refused"),
    ),
    "history": list_of(
        "changes of state, oldest first",
        object_of(
            "",
            at=number("Unix time, in seconds"),
            state=one_of(State, "the new state"),
            reason=text("why"),
        ),
    ),
    "divergences": list_of(
        "the last differences between the guests, oldest first",
        object_of(
            "",
            cause=text("kind of the difference; see reasons.md"),
            flow=text("the flow, as text"),
            proto=text("its protocol"),
            port=count("port of the service; 0: there is none"),
            rule=text("rule of the policy that judged the flow"),
            nic=text("name of the guest's NIC"),
            asked=flag("it counted as a reason for a checkpoint; false: the flow is only watched"),
            offset=count("position in the stream or datagram"),
            at_index=count("index of the first differing byte in `pvm` and `svm`"),
            pvm=hexadecimal("bytes of the PVM around the difference"),
            svm=hexadecimal("bytes of the SVM around the difference"),
        ),
    ),
    "rules": list_of(
        "the rules of the policy in their order, then former ones",
        object_of(
            "",
            name=text("name of the rule"),
            action=text('its action; "": the rule is no longer in force'),
            flows=count("connections and datagram flows under it"),
            uncompared=count("frames that left uncompared"),
            differences=count("differences found"),
        ),
    ),
    "nics": list_of(
        "the guest's NICs: what is of one of them alone; the keys above are sums over all, and "
        "`hook` and `port` the first one's",
        object_of(
            "",
            name=text("name of the NIC"),
            tap=text("its tap"),
            peer_link=text("device that carries its frames to the other host"),
            bridge=text('bridge that its tap joins; "": none'),
            mac=text('MAC address; "": not known yet'),
            hook=one_of(("xdp", "tc"), "where the SVM's output is intercepted"),
            port=one_of(
                ("", *PORT_STATES), 'state of the tap as a bridge port; "": it is in no bridge'
            ),
            arrived=count("tagged frames that have come over the peer link"),
            lost=count("frames that did not fit into its event buffer"),
            sent=count("frames that the controller released to the kernel"),
            held=count("frames of the PVM that wait (primary)"),
            flows=count("tracked connections"),
            trouble=text('why its peer link delivers nothing; "": it delivers'),
        ),
    ),
    "disks": object_of(
        "the replicated disks of this host's guest",
        names=list_of("their names", text()),
        mirrored=flag("whether each write goes to both hosts' images (primary)"),
        lost=text("why a disk is no longer mirrored (primary)"),
        copying=or_null(
            object_of(
                "the first copy, as long as it takes (primary); null: none",
                done=count("bytes copied"),
                total=count("bytes to copy"),
                rate=number("bytes per second so far"),
                left_s=or_null(number("seconds left at that rate; null: unknown")),
            )
        ),
        exported=flag("whether the other host can write to the images (secondary)"),
        committing=flag("whether QEMU still merges the overlays after a takeover"),
        overlays=map_of("size of the larger overlay of each disk, in bytes", count()),
        room_trouble=text("why there may be too little room for the overlays (secondary)"),
        proof_ms=number(
            "how long the last checkpoint waited here for the primary's confirmation that its "
            "disks were whole, in ms; meanwhile this guest could not take over"
        ),
    ),
    "event_log": object_of(
        "the file that `colo-xdp events` reads",
        path=text("its path"),
        lost=count("events that are not in it: too many, or the disk did not take them"),
        trouble=text('why the last event was lost; "": it was not'),
    ),
    "failures": list_of("the last internal errors", text()),
    "last_failover": or_null(
        object_of(
            "the last switchover; null: there was none",
            gap_ms=number("how long the network received nothing from the guest, in ms"),
            took_ms=number("duration of the switchover, in ms"),
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
            raise wrong("document", "an object", document)
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
