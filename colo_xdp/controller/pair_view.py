# SPDX-License-Identifier: GPL-2.0-or-later
"""All that one host knows of the pair: its own guest, the peer, their life as a pair. Pure.

This is the only place where what is known changes (tests/unit/controller/test_pair_view.py), and
facts() is all that the decision (failover/decision.py) gets to see of it. What ends with a guest or
a pair is an object that is thrown away with it: there is no list of fields to be cleared, of which
one could be forgotten.

Times: `_ns` is CLOCK_MONOTONIC, `_boot_ns` CLOCK_BOOTTIME (what heartbeats carry), `_s` monotonic
seconds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from ..abi import Mode
from ..failover.decision import (
    ArbiterView,
    Ending,
    Facts,
    Heard,
    OtherGuest,
    OwnGuest,
    Role,
    State,
    other_guest,
)
from ..failover.states import sends_nothing

log = logging.getLogger("colo_xdp")


@dataclass
class LocalGuest:
    """This host's guest, until the next one takes its place."""

    gone: bool = False  # its QEMU is, or hangs for good
    hung: bool = False  # it is gone for all that it answers
    absent: bool = False  # no QEMU is there (yet), which is no death
    why: str = ""  # what QEMU said before it went
    halted: str = ""  # it stands still until somebody repairs something
    colo_exit: bool = False  # QEMU has lost its COLO channel
    #: clients may know bytes of this guest that the other one has never heard of (abi.Bond)
    standalone: bool = False
    demoted: bool = False  # shut in because the primary asked
    # a guest of the pair has ended itself: nobody is to go on (controller/guest_lifecycle.py)
    over: str = ""


@dataclass
class PeerView:
    """The other host, by what its controller says. What it says of its guest counts on the
    connection that there is now."""

    guest_since_boot_ns: int  # since when the other guest is the one that it is
    boot: str = ""  # which process of the peer the times below are of
    role: str = ""
    state: str = ""
    epoch: int = 0
    guest: OtherGuest = OtherGuest.UNKNOWN
    shut: bool = False  # its data path drops everything: certain silence
    shut_why: str = ""  # what it said with that
    slow_ns: int = 0  # when it last said that its loop stood still
    answer_boot_ns: int = 0  # its clock in the newest heartbeat, while that is not answered yet
    heard_boot_ns: int = 0  # its clock in the newest heartbeat, whatever carried it


@dataclass
class Fence:
    """What the fence command has said of the peer that there is now."""

    result: bool | None = None
    failed_ns: int = 0
    ended_boot_ns: int = 0


@dataclass(frozen=True, slots=True)
class OperatorOrder:
    """A failover that a person has asked for; not carried out later than `until_s`."""

    forced: bool  # the person has made sure that the other guest is silent
    until_s: float


@dataclass
class PairLife:
    """What is true of this pair, and of no other that may follow."""

    in_colo: bool = False  # the SVM runs in COLO
    #: the primary's beat has confirmed a checkpoint. Until then it may have given up entering and
    #: let the PVM speak uncompared, whatever this QEMU has loaded: no takeover
    confirmed: bool = False
    checkpoint_overdue: bool = False
    fence: Fence = field(default_factory=Fence)
    order: OperatorOrder | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is measured or read anew for each decision, as it is not known but seen."""

    now_ns: int
    state: State
    own_qmp: bool
    undecided: bool
    own_guest: OwnGuest
    waiting: bool
    peer_connected: bool
    peer_silent_ms: float
    ending: Ending
    paths: tuple[Heard, ...]
    heartbeat_timeout_ms: int
    dead_after_ms: int
    automatic: bool
    arbiter: ArbiterView


class PairView:
    """One host's knowledge. Methods are what happens; who asks reads the fields."""

    def __init__(self, role: Role, now_ns: int, now_boot_ns: int) -> None:
        self.role = role
        self.born_ns = now_ns
        self.guest = LocalGuest()
        self.peer = PeerView(now_boot_ns)
        self.pair = PairLife()
        self.paused = False  # by a person
        #: clients may have seen what the SVM has never said. Outlives a pair: it ends with a later
        #: checkpoint only
        self.shadow = False

    # ---- answers

    @property
    def operator(self) -> bool:
        """A person has asked for a failover."""
        return self.pair.order is not None

    @property
    def forced(self) -> bool:
        """And has made sure that the other guest is silent."""
        return self.pair.order is not None and self.pair.order.forced

    def heard(self, mode: Mode, *, forwarding: bool, permitted: bool) -> bool:
        """Whether the network hears this host's guest: what status, metrics, the health paths and
        the cluster's agent say. `permitted`: by the arbiter, now."""
        there = not (self.guest.gone or self.guest.absent)
        return there and not sends_nothing(self.role, mode) and forwarding and permitted

    def facts(self, s: Surroundings) -> Facts:
        """What is known now, for the decision."""
        self._expire(s)
        guest, peer, pair = self.guest, self.peer, self.pair
        return Facts(
            role=self.role,
            state=s.state,
            own_vm_alive=not guest.gone,
            own_qmp=s.own_qmp,
            peer_connected=s.peer_connected,
            # a controller that has just started has heard nothing, and knows nothing of it
            peer_silent_ms=min(s.peer_silent_ms, (s.now_ns - self.born_ns) / 1e6),
            heartbeat_timeout_ms=s.heartbeat_timeout_ms,
            dead_after_ms=s.dead_after_ms * (1 + (self.role is Role.SECONDARY)),
            peer_vm_gone=peer.shut,
            colo_exit=guest.colo_exit,
            automatic=s.automatic and not self.paused,
            operator=self.operator,
            checkpoint_overdue=pair.checkpoint_overdue,
            shadow=self.shadow,
            arbiter=replace(
                s.arbiter,
                fences=s.arbiter.fences and not self.forced,
                fenced=pair.fence.result,
            ),
            own_vm_hangs=guest.hung,
            own_vm_why=guest.why,
            peer_why=peer.shut_why,
            paths=s.paths,
            peer_slow=s.now_ns - peer.slow_ns < 3 * s.heartbeat_timeout_ms * 1_000_000,
            ending=s.ending,
            waiting=s.waiting,
            undecided=s.undecided,
            other_guest=peer.guest if s.peer_connected else OtherGuest.UNKNOWN,
            own_guest=s.own_guest,
        )

    def _expire(self, s: Surroundings) -> None:
        fence, order = self.pair.fence, self.pair.order
        if fence.result is False and s.now_ns - fence.failed_ns > s.dead_after_ms * 1_000_000:
            fence.result = None  # nobody is awake to do it: try again
        if order is not None and s.now_ns / 1e9 > order.until_s:
            if s.state not in (State.SOLO, State.PROMOTED, State.STOPPED):
                log.error("the failover that was asked for did not come about: ask for it again")
            self.pair.order = None

    # ---- this host's guest

    def guest_gone(self, *, hung: bool = False) -> None:
        """Its QEMU is gone, or `hung` for good."""
        self.guest.gone = True
        self.guest.hung |= hung

    def qemu_found(self, *, there: bool) -> None:
        """Somebody has looked for a QEMU."""
        self.guest.absent = not there

    def guest_event(self, why: str) -> None:
        """What it says before its end; empty: it has begun anew."""
        self.guest.why = why

    def guest_halted(self, why: str) -> None:
        """It stands still; empty: it runs again."""
        self.guest.halted = why

    def guest_over(self, why: str) -> None:
        """A guest of the pair has ended itself."""
        self.guest.over = why

    def colo_lost(self) -> None:
        """QEMU says that its COLO channel is gone (COLO_EXIT)."""
        self.guest.colo_exit = True

    def went_standalone(self) -> None:
        """From now on clients may know what the other guest does not."""
        self.guest.standalone = True

    def demoted(self) -> None:
        """Shut in, as the primary asked; one that is dead does not come back."""
        self.guest.demoted = not self.guest.gone

    def promise_ends(self) -> None:
        """Who asked this guest to be silent is gone: it is no longer bound by that."""
        self.guest.demoted = False

    # ---- the pair

    def entering(self) -> None:
        """The first checkpoint begins: signs of an earlier pair count no more."""
        self.guest.colo_exit = False
        if self.role is Role.SECONDARY:
            self.peer.shut = False

    def in_colo(self) -> None:
        """The SVM has loaded a checkpoint."""
        self.pair.in_colo = True

    def not_in_colo(self) -> None:
        """It has not entered, or its QEMU is gone."""
        self.pair.in_colo = False

    def adopted(self, *, confirmed: bool) -> None:
        """What a former controller has left says whether this guest counts as a copy."""
        self.pair.confirmed = confirmed

    def copy_confirmed(self) -> None:
        """The primary counts this host's guest as a copy."""
        self.pair.confirmed = True

    def no_copy(self) -> None:
        """Neither guest counts as the other's copy any more, so nor does a promise made as one."""
        self.guest.demoted = self.pair.confirmed = False

    def waits_for_migration(self) -> None:
        """A QEMU is here that has loaded nothing yet."""
        self.pair.in_colo = self.pair.confirmed = False

    def checkpointed(self) -> None:
        """The guests are equal."""
        self.guest.standalone = False

    def checkpoint_due(self, overdue: bool) -> None:
        """The last one did not come to its end, or that is no sign of anything any more."""
        self.pair.checkpoint_overdue = overdue

    def set_shadow(self, on: bool) -> None:
        """The PVM's output may pass uncompared, or not any more."""
        self.shadow = on

    def set_paused(self, on: bool) -> None:
        """Nothing is decided without a person."""
        self.paused = on

    def ordered(self, *, forced: bool, until_s: float) -> None:
        """A person asks for a failover. What was true of the other host then may change."""
        self.pair.order = OperatorOrder(forced, until_s)

    def order_withdrawn(self) -> None:
        """It cannot be carried out, or something else was asked for since."""
        self.pair.order = None

    def fenced(self, success: bool, now_ns: int, now_boot_ns: int) -> None:
        """The fence command has ended."""
        self.pair.fence = Fence(success, now_ns, now_boot_ns)

    def fence_is_void(self) -> None:
        """The peer lives, or the command is to run another time."""
        self.pair.fence.result = None

    def new_pair(self) -> None:
        """Another pair begins, with the guest that is here."""
        self.pair = PairLife()

    def new_guest(self) -> None:
        """Another guest is here than the one that is over: nothing of that counts any more."""
        self.guest, self.pair = LocalGuest(), PairLife()
        self.peer.shut = False

    # ---- the peer

    def connected(self, boot: str) -> None:
        """The control channel is up; what was said on the one before is over."""
        peer = self.peer
        peer.state = peer.role = ""
        peer.guest = OtherGuest.UNKNOWN
        if boot != peer.boot:
            peer.boot, peer.heard_boot_ns = boot, 0

    def heartbeat(self, msg: dict[str, Any]) -> None:
        """One on the control channel (peer/messages.py)."""
        peer = self.peer
        peer.state, peer.epoch, peer.role = msg["state"], msg["epoch"], msg["role"]
        peer.guest = other_guest(msg["role"], msg["state"], alone=msg["alone"], shut=msg["shut"])

    def heartbeat_read(self, t: int) -> None:
        """It has been acted upon, and waits for an answer."""
        self.peer.answer_boot_ns = self.peer.heard_boot_ns = t

    def answered(self) -> int:
        """The peer's clock in the heartbeat that is answered now; 0: it was before."""
        t, self.peer.answer_boot_ns = self.peer.answer_boot_ns, 0
        return t

    def beacon(self, t: int, epoch: int) -> None:
        """One on another path that says more than the control channel could."""
        self.peer.heard_boot_ns, self.peer.epoch = t, epoch

    def peer_slow(self, now_ns: int) -> None:
        """It says that its loop stood still."""
        self.peer.slow_ns = now_ns

    def peer_gave_reason(self, why: str) -> None:
        """Why its data path is shut."""
        self.peer.shut_why = why

    def peer_shut(self) -> None:
        """Its data path is shut."""
        self.peer.shut = True

    def peer_open(self) -> None:
        """It may speak again, or it is not known any more that it does not."""
        self.peer.shut = False

    def peer_guest_is_new(self, now_boot_ns: int) -> None:
        """What was said of the one before is over."""
        self.peer.guest_since_boot_ns, self.peer.shut_why = now_boot_ns, ""
