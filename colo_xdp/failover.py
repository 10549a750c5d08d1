# SPDX-License-Identifier: GPL-2.0-or-later
"""The failover decision: a pure function from what is known to what to do, and why.

Read the tables from the top: the first row whose conditions hold decides. Each
answer carries one sentence, which goes to the log, the status and the history.

The one rule behind all rows: a guest may speak alone only if the other one is
certain to be silent. Certain means: the other controller itself says so (its
QEMU is gone and its data path is shut), a fence command has succeeded, or a
person has said so. A timer alone never is. With a lease as the arbiter (speaker.py)
it means that the lease is held, for a person too: the kernel of a host that does
not hold it lets nothing out.
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
    TAKEN_OVER = "taken-over"
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
    fence_configured: bool
    fence_result: bool | None  # None: not run yet
    operator: bool  # a person asked for failover
    checkpoint_overdue: bool = False
    dead_after_ms: float = float("inf")  # silence that counts as death with no other sign
    shadow: bool = False  # clients may have seen what the SVM has never said
    lease: bool = False  # the arbiter is a lease; what follows is only meant then
    lease_held: bool = False
    may_speak: bool = True  # by the lease, or by the peer's promise to be silent
    other_alone: bool = False  # the other guest is recorded to have spoken alone
    recorded: bool = False  # this one is
    committed: bool = False  # it has been asked for, and may happen late


@dataclass(frozen=True, slots=True)
class Decision:
    """The action, and the sentence that says why."""

    action: Action
    why: str


_Row = tuple[Callable[[Facts], bool], Action, str]


def _suspect(f: Facts) -> bool:
    # Silence alone: a host that lost its power closes no connection.
    return f.peer_silent_ms > f.heartbeat_timeout_ms


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
    return not _peer_dead(f) and f.peer_silent_ms > f.dead_after_ms


def _alone(f: Facts) -> bool:
    return f.state in (State.SOLO, State.TAKEN_OVER, State.STOPPED)


_OVER = {Role.PRIMARY: Action.GO_SOLO, Role.SECONDARY: Action.TAKE_OVER}

_ROWS: tuple[_Row, ...] = (
    (_alone, Action.NONE, "this host has decided before"),
    (
        lambda f: not f.own_vm_alive,
        Action.STOP,
        "the QEMU of this host is gone or hangs: nothing more may leave from here",
    ),
    (
        lambda f: f.lease and f.other_alone and f.role is Role.PRIMARY,
        Action.STOP,
        "the lease store says that the secondary's guest has spoken alone: this one's state is old",
    ),
    (
        lambda f: f.state is State.STARTING,
        Action.NONE,
        "the pair is not protected yet: there is nothing to fail over to",
    ),
    (
        lambda f: (
            f.shadow
            and f.role is Role.SECONDARY
            and not f.operator
            and (f.peer_vm_gone or f.colo_exit or _suspect(f))
        ),
        Action.DEGRADE,
        "the peer is lost, but the pair was in shadow mode: clients may know bytes that this guest "
        "never sent, so a person decides",
    ),
    (
        lambda f: f.lease and f.committed and f.role is Role.SECONDARY,
        Action.TAKE_OVER,
        "the lease store was asked to record a takeover, which may have happened: it is finished",
    ),
    (
        lambda f: f.peer_vm_gone,
        Action.TAKE_OVER,
        "the peer's controller says that its QEMU is dead and its data path is shut",
    ),
    (
        lambda f: f.operator and f.fence_configured and f.fence_result is None,
        Action.FENCE,
        "failover asked by the operator: fencing the peer first",
    ),
    (
        lambda f: f.operator and f.fence_configured and f.fence_result is False,
        Action.DEGRADE,
        "failover asked by the operator, but the fence command failed: the peer may be alive",
    ),
    (lambda f: f.operator, Action.TAKE_OVER, "failover asked by the operator"),
    (
        lambda f: f.state is State.PAUSED and (_suspect(f) or f.colo_exit),
        Action.DEGRADE,
        "the peer is suspected, but the pair is paused: a person decides",
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.fence_configured and f.fence_result is True,
        Action.TAKE_OVER,
        "the peer's controller is silent, its QEMU has dropped the COLO channel, "
        "and the fence command has succeeded",
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.fence_result is False,
        Action.DEGRADE,
        "the peer looks dead but the fence command failed: it may be alive, so nothing is opened",
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.fence_configured,
        Action.FENCE,
        "the peer's controller is silent and its QEMU has dropped the COLO channel: fencing it",
    ),
    (
        lambda f: _peer_dead(f) and f.automatic and f.lease,
        Action.TAKE_OVER,
        "the peer's controller is silent and its QEMU has dropped the COLO channel",
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.lease,
        Action.TAKE_OVER,
        "nothing was heard of the peer for dead_after: a dead host or a cut link",
    ),
    (
        lambda f: f.lease and not f.may_speak and f.role is Role.PRIMARY,
        Action.DEGRADE,
        "the lease could not be renewed and the peer promises nothing: nothing leaves this host",
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.fence_result is True,
        Action.TAKE_OVER,
        "nothing was heard of the peer for dead_after, and the fence command has succeeded",
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.fence_result is False,
        Action.DEGRADE,
        "nothing was heard of the peer for dead_after, but the fence command failed: "
        "it may be alive, so nothing is opened",
    ),
    (
        lambda f: _unreachable(f) and f.automatic and f.fence_configured,
        Action.FENCE,
        "nothing was heard of the peer for dead_after: a dead host or a cut link; fencing it",
    ),
    (
        _peer_dead,
        Action.DEGRADE,
        "the peer looks dead; automatic failover is off: `colo-xdp failover` decides",
    ),
    (
        _suspect,
        Action.DEGRADE,
        "the peer's controller is silent, but its QEMU still holds the COLO channel: "
        "a slow or cut link, not a death",
    ),
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
        "the peer is back and both guests still run in COLO: a checkpoint re-arms the pair",
    ),
)


def _arbitrate(f: Facts, why: str) -> Decision:
    """A guest is to speak alone; with a lease, only who holds it does."""
    over = Decision(_OVER[f.role], why)
    if not f.lease or (f.role is Role.PRIMARY and f.peer_vm_gone):
        return over  # a secondary that has shut itself does not take over, whoever holds the lease
    if f.other_alone:
        return Decision(
            Action.DEGRADE,
            f"{why}; but the lease store says that its guest has spoken alone, so a person decides",
        )
    if f.lease_held and f.recorded:
        return Decision(over.action, f"{why}; the lease is held")
    return Decision(Action.ACQUIRE, f"{why}: waiting for the lease")


def decide(f: Facts) -> Decision:
    """The action for these facts."""
    for cond, action, why in _ROWS:
        if cond(f):
            if action is Action.TAKE_OVER:
                return _arbitrate(f, why)
            return Decision(action, why)
    return Decision(Action.NONE, "both guests run and the peer answers")
