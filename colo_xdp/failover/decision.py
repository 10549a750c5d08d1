# SPDX-License-Identifier: GPL-2.0-or-later
"""The failover decision: a pure function from what is known to what to do, and why.

Read the tables from the top: the first row whose conditions hold decides. Each
answer carries one sentence, which goes to the log, the status and the history.

The one rule behind all rows: a guest may speak alone only if the other one is
certain to be silent. Certain means: the other controller itself says so (its
QEMU is gone and its data path is shut), a fence command has succeeded, or a
person has said so. A timer alone never is. With a lease as the arbiter (failover/lease.py)
it means that the lease is held, for a person too: the kernel of a host that does
not hold it lets nothing out.

Suspicion is a state of its own (`degraded`), and so is what it is about. The controllers hear each
other on the control channel and by beacons on further paths (peer/heartbeat.py). What is told
apart:

- *cut link*: the control channel is silent, beacons arrive. The peer lives; nobody is fenced.
- *slow*: the same, and the peer's beacons say that its loop stood still.
- *hung controller*: no word on any path, but its host still acknowledged the control channel.
- *ended controller*: its host closed the channel.
- *hung or dead QEMU*: its own controller says which.
- *dead host or all links cut*: silence on every path. Nobody can tell these apart from here.

The last four have different sentences and the same consequences: the arbiter decides. Further paths
only make a decision more careful: with them no facts lead to speaking alone, or to a fence, that
would not without them (tests/property/test_paths.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Which guest this host runs."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class State(StrEnum):
    """State of the pair as this host sees it (DESIGN: roles and failover)."""

    STARTING = "starting"
    PROTECTED = "protected"
    CHECKPOINTING = "checkpointing"
    DEGRADED = "degraded"
    SOLO = "solo"
    PROMOTED = "promoted"
    PAUSED = "paused"
    SHADOW = "shadow"  # compared, but nothing is held
    STOPPED = "stopped"


class Action(StrEnum):
    """What to do now."""

    NONE = "none"
    DEGRADE = "degrade"  # hold, suspect, wait
    FENCE = "fence"  # run the fence command; its success is asked about again
    GO_SOLO = "go_solo"  # primary: release what is held, leave COLO, bypass
    TAKE_OVER = "take_over"  # secondary: leave COLO, open the network side
    STOP = "stop"  # own QEMU is gone: shut the data path, say so to the peer
    REARM = "rearm"  # primary: the peer is back: checkpoint
    ASK_SHUT = "ask_shut"  # primary: ask the secondary's controller to shut its guest in
    ACQUIRE = "acquire"  # get the lease, and have it recorded that this guest speaks alone
    WAIT = "wait"  # primary: stay silent, and say what is waited for
    OPEN = "open"  # primary: this guest may speak, since the other one does not


class Ending(StrEnum):
    """How the silence on the control channel began, as the kernel's socket tells. A hint only."""

    UNKNOWN = ""
    CLOSED = "closed"  # by the other host: the process has ended
    HUNG = "hung"  # the other host acknowledged what nobody answered
    LOST = "lost"  # nothing was acknowledged any more
    STOPPED = "stopped"  # on purpose, as it said itself: its guest goes on


class OtherGuest(StrEnum):
    """What the peer's controller says of its guest, on the connection that there is now."""

    UNKNOWN = ""  # nothing was heard yet
    IDLE = "idle"  # silent, and nobody has confirmed that it is a copy
    COPY = "copy"  # silent, and a copy of what the pair's guest was
    TRANSMITTING = "speaks"
    ENDED = "ended"  # it spoke alone, and is gone


def other_guest(role: str, state: str, *, alone: bool, shut: bool) -> OtherGuest:
    """From the words of a heartbeat (peer/messages.py)."""
    if shut:
        return OtherGuest.ENDED if alone else OtherGuest.IDLE
    if role == Role.PRIMARY and not alone and state == State.STARTING:
        return OtherGuest.UNKNOWN  # undecided as well
    if alone or role == Role.PRIMARY or state in (State.PROMOTED, State.SOLO):
        return OtherGuest.TRANSMITTING
    return OtherGuest.IDLE if state in (State.STARTING, State.STOPPED) else OtherGuest.COPY


class OwnGuest(StrEnum):
    """What this host's QEMU says of its guest."""

    UNKNOWN = ""  # it does not answer, or is not there
    NEW = "new"  # it has never been migrated: booted since
    PAIRED = "paired"  # in COLO: this is the pair's PVM
    OLD = "old"  # it once was


@dataclass(frozen=True, slots=True)
class Heard:
    """A path besides the control channel. Times in ms; infinite: never."""

    name: str
    silent_ms: float  # since the peer's last beacon
    echo_age_ms: float  # age of our newest beacon that the peer says it has heard


@dataclass(frozen=True, slots=True)
class ArbiterView:
    """What the arbiter (failover/arbiter.py) says: who makes sure that only one guest speaks
    alone."""

    name: str = ""  # of what it grants, for people
    fences: bool = False  # it can make sure of the other host's silence
    fenced: bool | None = None  # whether it has; None: not tried yet
    needs_grant: bool = False  # no guest speaks without its grant; what follows is only meant then
    granted: bool = False
    may_transmit: bool = True  # by the grant, or by the peer's promise to be silent
    peer_standalone: bool = False  # the other guest is recorded to have spoken alone
    recorded: bool = False  # this one is
    requested: bool = False  # that has been asked for, and may happen late


@dataclass(frozen=True, slots=True)
class Facts:
    """What this host knows. Times in ms; None: never."""

    role: Role
    state: State
    own_vm_alive: bool
    own_qmp: bool  # QMP answers: without it nobody knows whether this host's guest lives
    peer_connected: bool  # control channel up
    peer_silent_ms: float  # since the last word from the peer's controller
    heartbeat_timeout_ms: float
    peer_vm_gone: bool  # the peer's controller said: my QEMU is dead and my data path is shut
    colo_exit: bool  # our QEMU lost its COLO channel: a hint, not a decision
    automatic: bool
    operator: bool  # a person asked for failover
    checkpoint_overdue: bool = False
    dead_after_ms: float = float("inf")  # silence that counts as death with no other sign
    shadow: bool = False  # clients may have seen what the SVM has never said
    arbiter: ArbiterView = ArbiterView()
    own_vm_hangs: bool = False  # not gone, with own_vm_alive False
    own_vm_why: str = ""  # what it said before
    peer_why: str = ""  # what the peer's controller said with peer_vm_gone
    paths: tuple[Heard, ...] = ()
    peer_slow: bool = False  # its beacons say that its loop stood still
    ending: Ending = Ending.UNKNOWN
    waiting: bool = False  # the primary needs a checkpoint, and output waits for it
    #: nothing was pinned when the controller of this (primary's) host began, so nobody knows what
    #: was before, and nobody has said yet that its guest may speak
    undecided: bool = False
    other_guest: OtherGuest = OtherGuest.UNKNOWN
    own_guest: OwnGuest = OwnGuest.UNKNOWN


@dataclass(frozen=True, slots=True)
class Decision:
    """The action, and the sentence that says why."""

    action: Action
    why: str


_Row = tuple[Callable[[Facts], bool], Action, str | Callable[[Facts], str]]


def _last_heard_ms(f: Facts) -> float:
    """Since the last word of the peer's controller, on any path."""
    return min([f.peer_silent_ms, *(p.silent_ms for p in f.paths)])


def _suspect(f: Facts) -> bool:
    # Silence alone: a host that lost its power closes no connection.
    return _last_heard_ms(f) > f.heartbeat_timeout_ms


def _no_control(f: Facts) -> bool:
    """The control channel is silent, whatever the other paths say."""
    return f.peer_silent_ms > f.heartbeat_timeout_ms


def _cut(f: Facts) -> bool:
    """Only the control channel is silent: the peer's controller lives."""
    return _no_control(f) and not _suspect(f)


def _needs_the_other(f: Facts) -> bool:
    """A primary that cannot go on in COLO without a word of the secondary."""
    return f.role is Role.PRIMARY and f.own_qmp and (f.checkpoint_overdue or f.colo_exit)


def _waits_too_long(f: Facts) -> bool:
    """Output waits for a checkpoint that the cut does not let happen."""
    return (
        f.role is Role.PRIMARY
        and f.own_qmp
        and f.automatic
        and f.waiting
        and f.peer_silent_ms > f.dead_after_ms
    )


def _deaf(f: Facts) -> bool:
    """A secondary that lives behind a cut and has not stood down, though asked for dead_after:
    it does not hear this side. As for a dead one, the arbiter decides."""
    return (
        f.role is Role.PRIMARY
        and f.own_qmp
        and (f.checkpoint_overdue or f.colo_exit or f.waiting)
        and f.peer_silent_ms > 2 * f.dead_after_ms
    )


def _peer_dead(f: Facts) -> bool:
    """Controller silent, and our QEMU has lost its COLO channel to the other QEMU.

    A primary's QEMU notices a dead secondary only when it tries a checkpoint, so
    an overdue checkpoint counts as the second sign there.
    """
    return _suspect(f) and (f.colo_exit or (f.role is Role.PRIMARY and f.checkpoint_overdue))


def _unreachable(f: Facts) -> bool:
    """Silent for so long that a fence has to tell a dead host from a cut link.

    A host that lost its power gives no other sign. The secondary waits longer (see
    Controller.facts), so that over a cut link the guest that is being used wins.
    """
    if _peer_dead(f) or (_stopped(f) and not _cannot_wait(f)):
        return False
    return _last_heard_ms(f) > f.dead_after_ms or _deaf(f)


def _stopped(f: Facts) -> bool:
    """The silence is that of a controller which somebody has stopped: no sign of anything. What
    follows is that one's affair, unless its QEMU gives a sign of death (_peer_dead)."""
    return f.ending is Ending.STOPPED and not f.peer_connected


def _cannot_wait(f: Facts) -> bool:
    """With a lease nobody is fenced, and a primary without a controller is silent in any case."""
    return f.arbiter.needs_grant and (f.role is Role.SECONDARY or f.waiting)


_ENDINGS = {
    Ending.CLOSED: "its host closed the control channel, so the controller there has ended",
    Ending.HUNG: "its host still acknowledged the control channel, so the controller there hangs",
    Ending.LOST: "its host acknowledged nothing any more: dead, or cut off",
    Ending.STOPPED: "the controller there was stopped on purpose before",
}


def _silence(f: Facts) -> str:
    """What the silence looks like."""
    if _cut(f):
        return f"it lives ({_heard(f)}), but does not stand down when asked: it hears nothing"
    where = ""
    if f.paths:
        where = f"silent on all paths (control channel, {', '.join(p.name for p in f.paths)}); "
    if f.ending:
        return where + _ENDINGS[f.ending]
    if f.paths:
        return where + "a dead host, or every link is cut: these cannot be told apart from here"
    return "a dead host or a cut link"


def _heard(f: Facts) -> str:
    """Over which paths the peer is heard."""
    live = [p for p in f.paths if p.silent_ms <= f.heartbeat_timeout_ms]
    text = "its beacons arrive over " + ", ".join(p.name for p in live)
    if all(p.echo_age_ms > f.heartbeat_timeout_ms for p in live):
        text += ", where it does not hear this side's"
    return text


def _cut_why(f: Facts) -> str:
    if f.peer_slow:
        return f"the peer's controller is slow, not dead: its loop stood still, and {_heard(f)}"
    if f.ending is Ending.CLOSED:
        return f"the peer's controller is not on the control channel, but {_heard(f)}: it lives"
    return f"the control channel is cut, but the peer lives: {_heard(f)}"


def _long_silence(f: Facts) -> str:
    if _cut(f):
        return f"the control channel was silent for twice dead_after; the peer: {_silence(f)}"
    return f"nothing was heard of the peer for dead_after: {_silence(f)}"


def _shut_why(f: Facts) -> str:
    if f.peer_why:
        return f"the peer's controller says that its data path is shut: {f.peer_why}"
    return "the peer's controller says that its QEMU is dead and its data path is shut"


def _alone(f: Facts) -> bool:
    return f.state in (State.SOLO, State.PROMOTED)


def _gone_why(f: Facts) -> str:
    how = "hangs" if f.own_vm_hangs else "is gone"
    how += f" ({f.own_vm_why})" if f.own_vm_why else ""
    if _alone(f):
        return f"the QEMU of this host {how} after its guest spoke alone: now nobody speaks"
    return f"the QEMU of this host {how}: nothing more may leave from here"


def _stopped_why(f: Facts) -> str:
    text = "the peer's controller was stopped on purpose, which is no death: nobody is fenced"
    if f.role is Role.PRIMARY:
        text += ", and what needs a checkpoint waits"
    return f"{text}; start it again, or `colo-xdp failover` decides"


def _may_open(f: Facts) -> bool:
    """Certain that no other guest speaks, nor one that knows more than this one."""
    if f.other_guest is OtherGuest.ENDED or f.peer_vm_gone:
        # If this one is as old as the pair it lacks what the other one has said since.
        return f.own_guest is OwnGuest.NEW or f.other_guest is OtherGuest.IDLE
    if f.other_guest is OtherGuest.COPY:
        return f.own_guest is OwnGuest.PAIRED
    return f.other_guest is OtherGuest.IDLE


_OPEN_WHY = {
    OtherGuest.UNKNOWN: "the other host's controller says that its data path is shut",
    OtherGuest.IDLE: "the other host's controller says that its guest does not speak",
    OtherGuest.COPY: "this is the PVM of the pair, and the SVM does not speak",
    OtherGuest.ENDED: "the other host's guest is gone, and this one is new",
}
_NOTHING_KNOWN = "nothing is known here of what was before (a boot, or `cleanup`): "


def _undecided_why(f: Facts) -> str:
    if f.other_guest is OtherGuest.COPY:
        return (
            f"{_NOTHING_KNOWN}the other host has a copy of the pair's guest, so neither speaks "
            "until a person says which, by `colo-xdp failover` there or here"
        )
    if f.other_guest is OtherGuest.ENDED:
        return (
            f"{_NOTHING_KNOWN}the other host's guest spoke alone and is gone; silent until QEMU "
            "says that the guest here is a new one, or a person does by `colo-xdp failover`"
        )
    return (
        f"{_NOTHING_KNOWN}silent until the other host's controller says that its guest does not "
        "speak; if that one is silent for certain, `colo-xdp failover`"
    )


_OVER = {Role.PRIMARY: Action.GO_SOLO, Role.SECONDARY: Action.TAKE_OVER}

_ROWS: tuple[_Row, ...] = (
    (lambda f: f.state is State.STOPPED, Action.NONE, "this host has decided before"),
    (lambda f: not f.own_vm_alive, Action.STOP, _gone_why),
    (_alone, Action.NONE, "this host has decided before"),
    (
        lambda f: f.arbiter.needs_grant and f.arbiter.peer_standalone and f.role is Role.PRIMARY,
        Action.STOP,
        lambda f: (
            f"the {f.arbiter.name} store says that the secondary's guest has spoken alone: this "
            "one's state is old"
        ),
    ),
    (
        lambda f: f.undecided and f.other_guest is OtherGuest.TRANSMITTING,
        Action.STOP,
        "the other host's guest speaks: this one must not",
    ),
    (
        lambda f: f.undecided and _may_open(f),
        Action.OPEN,
        lambda f: _OPEN_WHY[f.other_guest],
    ),
    (
        lambda f: f.undecided and f.operator and f.other_guest is OtherGuest.COPY,
        Action.ASK_SHUT,
        "failover asked by the operator: the secondary is asked to stand down first",
    ),
    (lambda f: f.undecided and not f.operator, Action.WAIT, _undecided_why),
    (
        lambda f: f.state is State.STARTING and not f.undecided,
        Action.NONE,
        "the pair is not protected yet: there is nothing to fail over to",
    ),
    (
        lambda f: (
            f.shadow
            and f.role is Role.SECONDARY
            and not f.operator
            and (f.peer_vm_gone or f.colo_exit or _no_control(f))
        ),
        Action.DEGRADE,
        "the peer is lost or cut off, but the PVM may have spoken uncompared (shadow mode, or its "
        "host began anew): clients may know bytes that this guest never sent, so a person decides",
    ),
    (
        lambda f: f.arbiter.needs_grant and f.arbiter.requested and f.role is Role.SECONDARY,
        Action.TAKE_OVER,
        lambda f: (
            f"the {f.arbiter.name} store was asked to record a takeover, which may have happened: "
            "it is finished"
        ),
    ),
    (
        lambda f: f.peer_vm_gone and not f.undecided,
        Action.TAKE_OVER,
        _shut_why,
    ),
    (
        lambda f: f.operator and f.arbiter.fences and f.arbiter.fenced is None,
        Action.FENCE,
        "failover asked by the operator: fencing the peer first",
    ),
    (
        lambda f: f.operator and f.arbiter.fences and f.arbiter.fenced is False,
        Action.DEGRADE,
        "failover asked by the operator, but the fence command failed: the peer may be alive",
    ),
    (lambda f: f.operator, Action.TAKE_OVER, "failover asked by the operator"),
    (
        lambda f: f.state is State.PAUSED and (_no_control(f) or f.colo_exit),
        Action.DEGRADE,
        lambda f: (
            f"{_cut_why(f) if _cut(f) else 'the peer is suspected'}, but the pair is paused: "
            "a person decides"
        ),
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.arbiter.fences and f.arbiter.fenced is True,
        Action.TAKE_OVER,
        lambda f: (
            "the peer's controller is silent, its QEMU has dropped the COLO channel, "
            f"and the fence command has succeeded ({_silence(f)})"
        ),
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.arbiter.fenced is False,
        Action.DEGRADE,
        "the peer looks dead but the fence command failed: it may be alive, so nothing is opened",
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.arbiter.fences,
        Action.FENCE,
        lambda f: (
            "the peer's controller is silent and its QEMU has dropped the COLO channel: fencing it "
            f"({_silence(f)})"
        ),
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.arbiter.needs_grant,
        Action.TAKE_OVER,
        lambda f: (
            "the peer's controller is silent and its QEMU has dropped the COLO channel "
            f"({_silence(f)})"
        ),
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.arbiter.needs_grant,
        Action.TAKE_OVER,
        _long_silence,
    ),
    (
        lambda f: f.arbiter.needs_grant and not f.arbiter.may_transmit and f.role is Role.PRIMARY,
        Action.DEGRADE,
        lambda f: (
            f"the {f.arbiter.name} could not be renewed and the peer promises nothing: nothing "
            "leaves this host"
        ),
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.arbiter.fenced is True,
        Action.TAKE_OVER,
        lambda f: f"{_long_silence(f)}; the fence command has succeeded",
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.arbiter.fenced is False,
        Action.DEGRADE,
        lambda f: (
            f"{_long_silence(f)}; but the fence command failed: it may be alive, so nothing is "
            "opened"
        ),
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.arbiter.fences,
        Action.FENCE,
        lambda f: f"{_long_silence(f)}; fencing it",
    ),
    (lambda f: _stopped(f) and not _peer_dead(f) and _no_control(f), Action.DEGRADE, _stopped_why),
    (
        _peer_dead,
        Action.DEGRADE,
        lambda f: (
            "the peer looks dead; automatic failover is off: `colo-xdp failover` decides "
            f"({_silence(f)})"
        ),
    ),
    (
        _suspect,
        Action.DEGRADE,
        lambda f: (
            "the peer's controller is silent, but its QEMU still holds the COLO channel: "
            + ("a slow or cut link, not a death" if not (f.paths or f.ending) else _silence(f))
        ),
    ),
    (
        lambda f: _cut(f) and (_needs_the_other(f) or _waits_too_long(f)),
        Action.ASK_SHUT,
        lambda f: f"{_cut_why(f)}; output waits, so it is asked there to stand down",
    ),
    (_cut, Action.DEGRADE, _cut_why),
    (
        lambda f: (
            f.role is Role.PRIMARY
            and f.own_qmp
            and f.peer_connected
            and (f.checkpoint_overdue or f.colo_exit)
        ),
        Action.ASK_SHUT,
        "QEMU's COLO channel is lost or its checkpoint hangs while both controllers live: "
        "the secondary is asked to stand down",
    ),
    (
        lambda f: f.checkpoint_overdue or f.colo_exit,
        Action.DEGRADE,
        "the last checkpoint did not complete or the COLO channel is lost, "
        "and the peer's controller still answers",
    ),
    (
        lambda f: f.role is Role.PRIMARY and f.state is State.DEGRADED and f.peer_connected,
        Action.REARM,
        lambda f: (
            "the peer is back"
            + (" (its controller was slow)" if f.peer_slow else "")
            + " and both guests still run in COLO: a checkpoint re-arms the pair"
        ),
    ),
)


def _arbitrate(f: Facts, why: str) -> Decision:
    """A guest is to speak alone; where that needs a grant, only who has it does."""
    over = Decision(_OVER[f.role], why)
    if not f.arbiter.needs_grant or (f.role is Role.PRIMARY and f.peer_vm_gone):
        return over  # a secondary that has shut itself does not take over, whoever holds the lease
    if f.arbiter.peer_standalone:
        return Decision(
            Action.DEGRADE,
            f"{why}; but the {f.arbiter.name} store says that its guest has spoken alone, so a "
            "person decides",
        )
    if f.arbiter.granted and f.arbiter.recorded:
        return Decision(over.action, f"{why}; the {f.arbiter.name} is held")
    return Decision(Action.ACQUIRE, f"{why}: waiting for the {f.arbiter.name}")


def decide(f: Facts) -> Decision:
    """The action for these facts."""
    for cond, action, why in _ROWS:
        if cond(f):
            text = why if isinstance(why, str) else why(f)
            if action is Action.TAKE_OVER:
                return _arbitrate(f, text)
            return Decision(action, text)
    return Decision(Action.NONE, "both guests run and the peer answers")
