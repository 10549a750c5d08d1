# SPDX-License-Identifier: GPL-2.0-or-later
"""Decide what to do about the pair: a pure function from facts to an action and a reason.

Read the table from the top: the first row whose condition holds decides. Each answer carries one
sentence, which goes to the log, the status and the history. The controller calls decide() on its
timer and when a fact has changed, and carries the action out.

One rule is behind all rows: a guest may run standalone only if the other one is certain to be
silent. It is certain if the other controller reports that its QEMU is gone and its data path shut,
if a fence command has succeeded, or if the operator has confirmed it. A timer alone never makes it
certain. With a lease as the arbiter (failover/lease.py) certainty means holding the lease, even for
an operator request: the kernel of a host without the lease lets nothing out.

Suspicion is a state of its own (`degraded`). The controllers hear from each other on the control
channel and through heartbeat datagrams on further links (peer/heartbeat_datagram.py). The decision
distinguishes these causes:

- *cut link*: the control channel is silent, heartbeat datagrams arrive. The peer lives; nobody is
  fenced.
- *slow*: the same, and the peer's heartbeats report that its event loop stalled.
- *hung controller*: nothing arrives on any link, but its host still acknowledged data on the
  control channel.
- *ended controller*: its host closed the channel.
- *hung or dead QEMU*: its own controller reports which.
- *dead host or all links cut*: silence everywhere. This host cannot tell the two apart.

The last four have different sentences and the same consequence: the arbiter decides. Additional
heartbeat links only make a decision more careful: no set of facts leads to standalone operation or
to a fence with them that would not without them (tests/property/test_heartbeat_links.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .facts import Ending, Facts, OtherGuest, OwnGuest
from .states import Role, State


class Action(StrEnum):
    """What to do now."""

    NONE = "none"
    DEGRADE = "degrade"  # suspect the peer: hold output and wait
    FENCE = "fence"  # run the fence command; its result is a fact of the next decision
    GO_SOLO = "go_solo"  # primary: release what is held, leave COLO, bypass
    TAKE_OVER = "take_over"  # secondary: leave COLO, open the network side
    STOP = "stop"  # own QEMU is gone: shut the data path and report that to the peer
    REARM = "rearm"  # primary: the peer is back, so take a checkpoint
    ASK_SHUT = "ask_shut"  # primary: ask the secondary's controller to demote its guest
    ACQUIRE = "acquire"  # get the lease, and have it recorded that this guest runs standalone
    WAIT = "wait"  # primary: stay silent and report what it waits for
    OPEN = "open"  # primary: this guest may transmit, because the other one does not


@dataclass(frozen=True, slots=True)
class Decision:
    """The action, and a sentence that gives the reason."""

    action: Action
    why: str


_Row = tuple[Callable[[Facts], bool], Action, str | Callable[[Facts], str]]


def _last_heard_ms(f: Facts) -> float:
    """Return the time since the peer's controller was last heard on any link, ms."""
    least = f.peer_silent_ms
    for link in f.links:
        least = min(least, link.silent_ms)
    return least


def _suspect(f: Facts) -> bool:
    # Silence alone is enough: a host that lost its power closes no connection.
    return _last_heard_ms(f) > f.heartbeat_timeout_ms


def _no_control(f: Facts) -> bool:
    """Return whether the control channel is silent, whatever the other links show."""
    return f.peer_silent_ms > f.heartbeat_timeout_ms


def _cut(f: Facts) -> bool:
    """Return whether only the control channel is silent: the peer's controller lives."""
    return _no_control(f) and not _suspect(f)


def _needs_the_other(f: Facts) -> bool:
    """Return whether this is a primary that cannot continue in COLO without the secondary."""
    return f.role is Role.PRIMARY and f.own_qmp and (f.checkpoint_overdue or f.colo_exit)


def _waits_too_long(f: Facts) -> bool:
    """Return whether output waits for a checkpoint that the cut link prevents."""
    return (
        f.role is Role.PRIMARY
        and f.own_qmp
        and f.automatic
        and f.waiting
        and f.peer_silent_ms > f.dead_after_ms
    )


def _deaf(f: Facts) -> bool:
    """Return whether a live secondary behind a cut link ignored the request to demote itself.

    It was asked for dead_after, so it does not receive this side's datagrams. The arbiter decides,
    as it does for a dead secondary.
    """
    return (
        f.role is Role.PRIMARY
        and f.own_qmp
        and (f.checkpoint_overdue or f.colo_exit or f.waiting)
        and f.peer_silent_ms > 2 * f.dead_after_ms
    )


def _peer_dead(f: Facts) -> bool:
    """Return whether the controller is silent and our QEMU lost its COLO channel to the other QEMU.

    A primary's QEMU notices a dead secondary only when it attempts a checkpoint, so an overdue
    checkpoint counts as the second sign on the primary.
    """
    return _suspect(f) and (f.colo_exit or (f.role is Role.PRIMARY and f.checkpoint_overdue))


def _unreachable(f: Facts) -> bool:
    """Return whether the silence is so long that a fence must tell a dead host from a cut link.

    A host that lost its power gives no other sign. The secondary waits longer (see
    Controller.facts), so that over a cut link the guest that is in use wins.
    """
    if _peer_dead(f) or (_stopped(f) and not _cannot_wait(f)):
        return False
    return _last_heard_ms(f) > f.dead_after_ms or _deaf(f)


def _stopped(f: Facts) -> bool:
    """Return whether the silence is that of a controller that was stopped on purpose.

    Such silence is a sign of nothing. Whoever stopped it is responsible for what follows, unless
    its QEMU gives a sign of death (_peer_dead).
    """
    return f.ending is Ending.STOPPED and not f.peer_connected


def _cannot_wait(f: Facts) -> bool:
    """Return whether a stopped controller cannot be waited for.

    With a lease nobody is fenced, and a primary without a controller falls silent in any case.
    """
    return f.arbiter.needs_grant and (f.role is Role.SECONDARY or f.waiting)


_ENDINGS = {
    Ending.CLOSED: "its host closed the control channel, so the controller there has ended",
    Ending.HUNG: "its host still acknowledged the control channel, so the controller there hangs",
    Ending.LOST: "its host acknowledged nothing any more: dead, or cut off",
    Ending.STOPPED: "the controller there was stopped on purpose before",
}


def _silence(f: Facts) -> str:
    """Describe the silence."""
    if _cut(f):
        return (
            f"it lives ({_heard(f)}), but does not demote itself when asked: it receives nothing "
            "from here"
        )
    where = ""
    if f.links:
        where = f"silent on all links (control channel, {', '.join(p.name for p in f.links)}); "
    if f.ending:
        return where + _ENDINGS[f.ending]
    if f.links:
        return where + "a dead host, or every link is cut: these cannot be told apart from here"
    return "a dead host or a cut link"


def _heard(f: Facts) -> str:
    """Describe the links over which the peer is heard."""
    live = [p for p in f.links if p.silent_ms <= f.heartbeat_timeout_ms]
    text = "its heartbeats arrive over " + ", ".join(p.name for p in live)
    if all(p.echo_age_ms > f.heartbeat_timeout_ms for p in live):
        text += ", but it does not receive this side's"
    return text


def _cut_why(f: Facts) -> str:
    if f.peer_slow:
        return f"the peer's controller is slow, not dead: its loop stalled, and {_heard(f)}"
    if f.ending is Ending.CLOSED:
        return f"the peer's controller is not on the control channel, but {_heard(f)}: it lives"
    return f"the control channel is cut, but the peer lives: {_heard(f)}"


def _long_silence(f: Facts) -> str:
    if _cut(f):
        return f"the control channel was silent for twice dead_after; the peer: {_silence(f)}"
    return f"nothing was heard from the peer for dead_after: {_silence(f)}"


def _shut_why(f: Facts) -> str:
    if f.peer_why:
        return f"the peer's controller reports that its data path is shut: {f.peer_why}"
    return "the peer's controller reports that its QEMU is dead and its data path is shut"


def _alone(f: Facts) -> bool:
    return f.state in (State.SOLO, State.PROMOTED)


def _gone_why(f: Facts) -> str:
    how = "hangs" if f.own_vm_hangs else "is gone"
    how += f" ({f.own_vm_why})" if f.own_vm_why else ""
    if _alone(f):
        return f"the QEMU of this host {how} after its guest ran standalone: no guest is active now"
    return f"the QEMU of this host {how}: nothing more may leave this host"


def _stopped_why(f: Facts) -> str:
    text = "the peer's controller was stopped on purpose and did not die: nobody is fenced"
    if f.role is Role.PRIMARY:
        text += ", and what needs a checkpoint waits"
    return f"{text}; start it again, or decide with `colo-xdp failover`"


def _may_open(f: Facts) -> bool:
    """Return whether no other guest can transmit or have newer state than this one."""
    if f.own_guest is OwnGuest.OUTDATED:
        return False  # whatever is there now: what is missing here is on the other host's disks
    if f.other_guest is OtherGuest.ENDED or f.peer_vm_gone:
        # If this guest is as old as the pair, it lacks what the other one has sent since.
        return f.own_guest is OwnGuest.NEW or f.other_guest is OtherGuest.IDLE
    if f.other_guest is OtherGuest.COPY:
        return f.own_guest is OwnGuest.PAIRED
    return f.other_guest is OtherGuest.IDLE


_OPEN_WHY = {
    OtherGuest.UNKNOWN: "the other host's controller reports that its data path is shut",
    OtherGuest.IDLE: "the other host's controller reports that its guest does not transmit",
    OtherGuest.COPY: "this is the PVM of the pair, and the SVM does not transmit",
    OtherGuest.ENDED: "the other host's guest is gone, and this one is new",
}
_NOTHING_KNOWN = "this host does not know what happened before (a boot, or `cleanup`): "


def _undecided_why(f: Facts) -> str:
    if f.other_guest is OtherGuest.COPY:
        return (
            f"{_NOTHING_KNOWN}the other host has a copy of the pair's guest, so neither transmits "
            "until an operator chooses one with `colo-xdp failover` there or here"
        )
    if f.own_guest is OwnGuest.OUTDATED and f.left_standalone:
        return (
            f"{_NOTHING_KNOWN}the guests of both hosts ran standalone and are gone, and nothing "
            "tells which one did last (`colo-xdp events` on both says when): bring its disks here, "
            "or serve from those that are here with `colo-xdp failover`"
        )
    if f.own_guest is OwnGuest.OUTDATED:
        return (
            f"{_NOTHING_KNOWN}the other host's guest ran standalone and is gone, and the disks "
            "here lack what it has written: bring its disks here, or give that up with "
            "`colo-xdp failover` here"
        )
    if f.other_guest is OtherGuest.ENDED:
        return (
            f"{_NOTHING_KNOWN}the other host's guest ran standalone and is gone; silent until QEMU "
            "reports that the guest here is a new one, or an operator runs `colo-xdp failover`"
        )
    return (
        f"{_NOTHING_KNOWN}silent until the other host's controller reports that its guest does not "
        "transmit; if that guest is certainly silent, run `colo-xdp failover`"
    )


_OVER = {Role.PRIMARY: Action.GO_SOLO, Role.SECONDARY: Action.TAKE_OVER}

_ROWS: tuple[_Row, ...] = (
    (lambda f: f.state is State.STOPPED, Action.NONE, "this host has already decided"),
    (lambda f: not f.own_vm_alive, Action.STOP, _gone_why),
    (_alone, Action.NONE, "this host has already decided"),
    (
        lambda f: f.arbiter.needs_grant and f.arbiter.peer_standalone and f.role is Role.PRIMARY,
        Action.STOP,
        lambda f: (
            f"the {f.arbiter.name} store records that the secondary's guest ran standalone: this "
            "guest's state is outdated"
        ),
    ),
    (
        lambda f: f.undecided and f.other_guest is OtherGuest.TRANSMITTING,
        Action.STOP,
        "the other host's guest transmits: this one must not",
    ),
    (
        lambda f: f.undecided and _may_open(f),
        Action.OPEN,
        lambda f: _OPEN_WHY[f.other_guest],
    ),
    (
        lambda f: f.undecided and f.operator and f.other_guest is OtherGuest.COPY,
        Action.ASK_SHUT,
        "failover requested by the operator: the secondary is asked to demote itself first",
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
        "the peer is lost or cut off, but the PVM's output may not have been compared (shadow "
        "mode, or its host restarted): clients may have received bytes that this guest never sent, "
        "so an operator decides",
    ),
    (
        lambda f: (
            f.disk_unproven
            and f.role is Role.SECONDARY
            and (f.peer_vm_gone or f.colo_exit or _no_control(f))
        ),
        Action.DEGRADE,
        "the peer was lost between a checkpoint and its confirmation that the disks here have all "
        "that was written before: some of it may be missing, so an operator decides "
        "(`colo-xdp failover --force`)",
    ),
    (
        lambda f: f.arbiter.needs_grant and f.arbiter.requested and f.role is Role.SECONDARY,
        Action.TAKE_OVER,
        lambda f: (
            f"the {f.arbiter.name} store was asked to record a takeover and may have done so: the "
            "takeover is completed"
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
        "failover requested by the operator: fencing the peer first",
    ),
    (
        lambda f: f.operator and f.arbiter.fences and f.arbiter.fenced is False,
        Action.DEGRADE,
        "failover requested by the operator, but the fence command failed: the peer may be alive",
    ),
    (lambda f: f.operator, Action.TAKE_OVER, "failover requested by the operator"),
    (
        lambda f: f.state is State.PAUSED and (_no_control(f) or f.colo_exit),
        Action.DEGRADE,
        lambda f: (
            f"{_cut_why(f) if _cut(f) else 'the peer is suspected'}, but the pair is paused: "
            "an operator decides"
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
            f"the {f.arbiter.name} could not be renewed and the peer does not promise silence: "
            "nothing leaves this host"
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
            f"{_long_silence(f)}; but the fence command failed: the peer may be alive, so nothing "
            "is opened"
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
            "the peer looks dead; automatic failover is off: decide with `colo-xdp failover` "
            f"({_silence(f)})"
        ),
    ),
    (
        _suspect,
        Action.DEGRADE,
        lambda f: (
            "the peer's controller is silent, but its QEMU still holds the COLO channel: "
            + ("a slow or cut link, not a death" if not (f.links or f.ending) else _silence(f))
        ),
    ),
    (
        lambda f: _cut(f) and (_needs_the_other(f) or _waits_too_long(f)),
        Action.ASK_SHUT,
        lambda f: f"{_cut_why(f)}; output waits, so it is asked to demote itself over those links",
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
        "QEMU's COLO channel or a disk's mirror is lost, or its checkpoint hangs, while both "
        "controllers live: "
        "the secondary is asked to demote itself",
    ),
    (
        lambda f: f.checkpoint_overdue or f.colo_exit,
        Action.DEGRADE,
        "the last checkpoint did not complete, or the COLO channel or a disk's mirror is lost, "
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
    """Let this guest run standalone; where that needs a grant, only with the grant."""
    over = Decision(_OVER[f.role], why)
    if not f.arbiter.needs_grant or (f.role is Role.PRIMARY and f.peer_vm_gone):
        return over  # a secondary that shut itself does not take over, whoever holds the lease
    if f.arbiter.peer_standalone:
        return Decision(
            Action.DEGRADE,
            f"{why}; but the {f.arbiter.name} store records that its guest ran standalone, so an "
            "operator decides",
        )
    if f.arbiter.granted and f.arbiter.recorded:
        return Decision(over.action, f"{why}; the {f.arbiter.name} is held")
    return Decision(Action.ACQUIRE, f"{why}: waiting for the {f.arbiter.name}")


def decide(f: Facts) -> Decision:
    """Return the action for these facts."""
    for cond, action, why in _ROWS:
        if cond(f):
            text = why if isinstance(why, str) else why(f)
            if action is Action.TAKE_OVER:
                return _arbitrate(f, text)
            return Decision(action, text)
    return Decision(Action.NONE, "both guests run and the peer answers")
