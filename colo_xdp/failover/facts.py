# SPDX-License-Identifier: GPL-2.0-or-later
"""What one host knows of the pair, as the decision sees it (failover/decision.py). Pure.

PairView.facts (controller/pair_view.py) fills Facts in. A new fact is a field with a default that
changes nothing, so that tests and replays which do not know it still decide as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .states import Role, State


class Ending(StrEnum):
    """How the silence on the control channel began, judged from the socket; only a hint."""

    UNKNOWN = ""
    CLOSED = "closed"  # the other host closed it: the process has ended
    HUNG = "hung"  # the other host's kernel acknowledged data that no process answered
    LOST = "lost"  # nothing was acknowledged any more
    STOPPED = "stopped"  # stopped on purpose, as it announced: its guest keeps running


class OtherGuest(StrEnum):
    """What the peer's controller reports about its guest, on the current connection."""

    UNKNOWN = ""  # nothing received yet
    IDLE = "idle"  # silent, and nobody has confirmed that it is a copy
    COPY = "copy"  # silent, and a copy of the pair's guest
    TRANSMITTING = "transmits"
    ENDED = "ended"  # it ran standalone and is gone


def other_guest(role: str, state: str, *, standalone: bool, shut: bool) -> OtherGuest:
    """Classify the other guest from the fields of a heartbeat (peer/messages.py)."""
    if shut:
        return OtherGuest.ENDED if standalone else OtherGuest.IDLE
    if role == Role.PRIMARY and not standalone and state == State.STARTING:
        return OtherGuest.UNKNOWN  # it is undecided as well
    if standalone or role == Role.PRIMARY or state in (State.PROMOTED, State.SOLO):
        return OtherGuest.TRANSMITTING
    return OtherGuest.IDLE if state in (State.STARTING, State.STOPPED) else OtherGuest.COPY


class OwnGuest(StrEnum):
    """What this host's QEMU reports about its guest."""

    UNKNOWN = ""  # QEMU does not answer, or is not there
    NEW = "new"  # booted, and never migrated since; if the other one ran standalone, after its end
    OUTDATED = "outdated"  # booted from disks that lack what the other one has written alone
    PAIRED = "paired"  # in COLO: this is the pair's PVM
    OLD = "old"  # it was once the pair's PVM


@dataclass(frozen=True, slots=True)
class LinkView:
    """A heartbeat link besides the control channel. Times in ms; infinite: never."""

    name: str
    silent_ms: float  # since the peer's last heartbeat datagram
    echo_age_ms: float  # age of our newest datagram that the peer reports as received


@dataclass(frozen=True, slots=True)
class ArbiterView:
    """What the arbiter knows (failover/arbiter.py)."""

    name: str = ""  # name of the thing it grants, for messages
    fences: bool = False  # it can make sure that the other host is silent
    fenced: bool | None = None  # result of the last fence; None: not tried yet
    # no guest transmits without its grant; the fields below are meaningful only then
    needs_grant: bool = False
    granted: bool = False
    may_transmit: bool = True  # by the grant, or by the peer's promise of silence
    peer_standalone: bool = False  # the store records that the other guest ran standalone
    recorded: bool = False  # the store records that this guest runs standalone
    requested: bool = False  # that record was requested and may be written late


@dataclass(frozen=True, slots=True)
class Facts:
    """What this host knows. Times in ms; infinite: never."""

    role: Role
    state: State
    own_vm_alive: bool
    own_qmp: bool  # QMP answers; without it nobody knows whether this host's guest lives
    peer_connected: bool  # control channel up
    peer_silent_ms: float  # since the last message from the peer's controller
    heartbeat_timeout_ms: float
    peer_vm_gone: bool  # the peer's controller reported: QEMU dead, data path shut
    # our QEMU lost its COLO channel, or the primary's a mirror of its disks: a hint, not a decision
    colo_exit: bool
    automatic: bool
    operator: bool  # an operator requested failover
    checkpoint_overdue: bool = False
    dead_after_ms: float = float("inf")  # silence that counts as death with no other sign
    shadow: bool = False  # clients may have received data that the SVM never produced
    arbiter: ArbiterView = field(default_factory=ArbiterView)
    own_vm_hangs: bool = False  # not gone but hung; own_vm_alive is False then
    own_vm_why: str = ""  # what QEMU reported before
    peer_why: str = ""  # the reason that came with peer_vm_gone
    links: tuple[LinkView, ...] = ()
    peer_slow: bool = False  # its heartbeats report that its event loop stalled
    ending: Ending = Ending.UNKNOWN
    waiting: bool = False  # the primary needs a checkpoint, and output waits for it
    #: nothing was pinned when the controller of this (the primary's) host started, so nobody knows
    #: what happened before, and nobody has allowed its guest to transmit yet
    undecided: bool = False
    other_guest: OtherGuest = OtherGuest.UNKNOWN
    own_guest: OwnGuest = OwnGuest.UNKNOWN
    #: the SVM runs a checkpoint of which the primary has not said that its disks were whole, and
    #: no operator has accepted that
    disk_unproven: bool = False
    #: a guest of this host ran standalone and is gone, as its mark says (failover/mark.py)
    left_standalone: bool = False
