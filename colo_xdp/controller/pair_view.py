# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that one host knows of the pair: its own guest, the peer, their life as a pair. Pure.

This knowledge changes only here (tests/unit/controller/test_pair_view.py), and facts() is all of it
that the decision (failover/decision.py) sees. Knowledge that ends with a guest or a pair is kept in
an object that is replaced when the guest or the pair is: with a list of fields to clear, one could
be forgotten.

Times: `_ns` is CLOCK_MONOTONIC, `_boot_ns` CLOCK_BOOTTIME (what heartbeats carry), `_s` monotonic
seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..abi import Mode
from ..failover.facts import ArbiterView, Ending, Facts, LinkView, OtherGuest, OwnGuest, other_guest
from ..failover.mark import Standing
from ..failover.states import Role, State, sends_nothing
from .copy_health import NO_TRAFFIC, Traffic

log = logging.getLogger("colo_xdp")

#: what of a heartbeat can change a decision, besides that the peer lives
_SAID = ("state", "epoch", "role", "vm", "shut", "over", "standalone", "shadow", "promise")


@dataclass
class LocalGuest:
    """Knowledge of this host's guest, until the next one takes its place."""

    gone: bool = False  # its QEMU is gone, or hangs for good
    hung: bool = False  # it counts as gone because its QEMU hangs
    absent: bool = False  # no QEMU is there (yet), which is no death
    why: str = ""  # what QEMU reported before it went
    halted: str = ""  # why it stands still until somebody repairs something
    colo_exit: bool = False  # QEMU has lost its COLO channel
    copy_lost: str = ""  # why the SVM is no copy: its disks are not mirrored, or it answers nothing
    #: clients may know bytes of this guest that the other one never received (abi.SyncState)
    standalone: bool = False
    demoted: bool = False  # shut in because the primary asked
    # why the pair is over: one of its guests has ended itself, and the other must not go on
    # (controller/guest_lifecycle.py)
    over: str = ""


@dataclass
class PeerView:
    """Knowledge of the other host, as its controller reports it.

    A report about its guest counts only on the connection on which it came.
    """

    guest_since_boot_ns: int  # since when the peer has its present guest
    boot: str = ""  # the process of the peer whose clock the times below are of
    role: str = ""
    state: str = ""
    epoch: int = 0
    guest: OtherGuest = OtherGuest.UNKNOWN
    shut: bool = False  # its data path drops everything: certain silence
    shut_why: str = ""  # the reason that it gave for that
    #: its guest ran standalone and is gone. This outlives what it says later of another guest, and
    #: ends when one transmits there
    ended: bool = False
    slow_ns: int = 0  # when it last reported that its loop stood still
    answer_boot_ns: int = 0  # its clock in the newest heartbeat, until that is answered
    heard_boot_ns: int = 0  # its clock in the newest heartbeat, whatever carried it
    traffic: Traffic = NO_TRAFFIC  # of its guest, while that is the SVM
    said: tuple[object, ...] = ()  # what the last heartbeat on this connection said (_SAID)


@dataclass
class Fence:
    """The result of the fence command for the present peer."""

    result: bool | None = None
    failed_ns: int = 0
    ended_boot_ns: int = 0


@dataclass(frozen=True, slots=True)
class OperatorOrder:
    """An operator request for a failover; it is not carried out later than `until_s`."""

    forced: bool  # the operator has made sure that the other guest is silent
    until_s: float


@dataclass
class PairLife:
    """Knowledge of this pair that is void for any later pair."""

    in_colo: bool = False  # the SVM runs in COLO
    #: a heartbeat of the primary has confirmed a checkpoint. Until then there is no takeover,
    #: whatever this QEMU has loaded: the primary may have given up entering COLO and let the PVM
    #: transmit uncompared
    confirmed: bool = False
    checkpoint_overdue: bool = False
    fence: Fence = field(default_factory=Fence)
    order: OperatorOrder | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Values that are measured or read anew for each decision, and not stored."""

    now_ns: int
    state: State
    own_qmp: bool
    undecided: bool
    own_guest: OwnGuest
    waiting: bool
    peer_connected: bool
    peer_silent_ms: float
    ending: Ending
    links: tuple[LinkView, ...]
    heartbeat_timeout_ms: int
    dead_after_ms: int
    automatic: bool
    arbiter: ArbiterView
    disk_unproven: bool


def _forget(standing: Standing) -> None:
    """Keep nothing."""


class PairView:
    """One host's knowledge. Methods record events; callers read the fields."""

    def __init__(self, role: Role, now_ns: int, now_boot_ns: int) -> None:
        self.role = role
        self.born_ns = now_ns
        self.guest = LocalGuest()
        self.peer = PeerView(now_boot_ns)
        self.pair = PairLife()
        self.paused = False  # by an operator
        #: clients may have seen what the SVM never sent. This outlives a pair: only a later
        #: checkpoint ends it
        self.shadow = False
        self._standing = Standing.NONE  # what the mark is to say (failover/mark.py)
        self._keep: Callable[[Standing], None] = _forget
        #: a guest of this host ran standalone, and nobody else is known to have what it wrote, or
        #: to have been allowed to go on without
        self._outlived = False

    # ---- answers

    @property
    def left_standalone(self) -> bool:
        """Whether a guest of this host ran standalone, is gone, and is not superseded."""
        return self._outlived and not self.guest.standalone

    @property
    def operator(self) -> bool:
        """Whether an operator has asked for a failover."""
        return self.pair.order is not None

    @property
    def forced(self) -> bool:
        """Whether that operator has also made sure that the other guest is silent."""
        return self.pair.order is not None and self.pair.order.forced

    def heard(self, mode: Mode, *, forwarding: bool, permitted: bool) -> bool:
        """Return whether frames of this host's guest reach the network.

        Status, metrics, the health paths and the cluster's agent report this. `permitted`: whether
        the arbiter permits it now.
        """
        there = not (self.guest.gone or self.guest.absent)
        return there and not sends_nothing(self.role, mode) and forwarding and permitted

    def facts(self, s: Surroundings) -> Facts:
        """Return what is known now, for the decision."""
        self._expire(s)
        guest, peer, pair = self.guest, self.peer, self.pair
        return Facts(
            role=self.role,
            state=s.state,
            own_vm_alive=not guest.gone,
            own_qmp=s.own_qmp,
            peer_connected=s.peer_connected,
            # a controller that has just started has received nothing, which proves no silence
            peer_silent_ms=min(s.peer_silent_ms, (s.now_ns - self.born_ns) / 1e6),
            heartbeat_timeout_ms=s.heartbeat_timeout_ms,
            dead_after_ms=s.dead_after_ms * (1 + (self.role is Role.SECONDARY)),
            peer_vm_gone=peer.shut,
            colo_exit=guest.colo_exit or bool(guest.copy_lost),
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
            links=s.links,
            peer_slow=s.now_ns - peer.slow_ns < 3 * s.heartbeat_timeout_ms * 1_000_000,
            ending=s.ending,
            waiting=s.waiting,
            undecided=s.undecided,
            other_guest=self._other_guest() if s.peer_connected else OtherGuest.UNKNOWN,
            own_guest=s.own_guest,
            disk_unproven=s.disk_unproven,
            left_standalone=self.left_standalone,
        )

    def _other_guest(self) -> OtherGuest:
        """Return what the peer has there. A QEMU that waits is no successor of a guest that ran
        standalone: it says nothing of what that one wrote."""
        peer = self.peer
        idle = peer.guest is OtherGuest.IDLE
        return OtherGuest.ENDED if idle and peer.ended else peer.guest

    def _expire(self, s: Surroundings) -> None:
        fence, order = self.pair.fence, self.pair.order
        if fence.result is False and s.now_ns - fence.failed_ns > s.dead_after_ms * 1_000_000:
            fence.result = None  # there may be no operator to step in: try again
        if order is not None and s.now_ns / 1e9 > order.until_s:
            if s.state not in (State.SOLO, State.PROMOTED, State.STOPPED):
                log.error("the requested failover did not take place: request it again")
            self.pair.order = None

    # ---- this host's guest

    def guest_gone(self, *, hung: bool = False) -> None:
        """Record that its QEMU is gone, or `hung` for good."""
        self.guest.gone = True
        self.guest.hung |= hung

    def qemu_found(self, *, there: bool) -> None:
        """Record whether a QEMU is there."""
        self.guest.absent = not there

    def guest_event(self, why: str) -> None:
        """Record what it reports before its end; empty: it has started anew."""
        self.guest.why = why

    def guest_halted(self, why: str) -> None:
        """Record why it stands still; empty: it runs again."""
        self.guest.halted = why

    def guest_over(self, why: str) -> None:
        """Record that a guest of the pair has ended itself."""
        self.guest.over = why

    def colo_lost(self) -> None:
        """Record that QEMU has lost its COLO channel (COLO_EXIT)."""
        self.guest.colo_exit = True

    def copy_lost(self, why: str) -> None:
        """Record that no later checkpoint makes the guests equal: a lost mirror, a sick SVM."""
        self.guest.copy_lost = why

    def went_standalone(self) -> None:
        """Record that clients may know from now on what the other guest does not."""
        if not self.guest.standalone:
            self._mark(Standing.STANDALONE)  # also over an older one: this is another guest
        self.guest.standalone = True

    def demoted(self) -> None:
        """Record that this guest is shut in at the primary's request.

        A dead guest is not recorded as demoted, since the end of the demotion cannot bring it back.
        """
        self.guest.demoted = not self.guest.gone

    def promise_ends(self) -> None:
        """Lift the demotion: the primary that asked this guest to be silent is gone."""
        self.guest.demoted = False

    # ---- the mark

    def mark_found(self, found: Standing, keep: Callable[[Standing], None], *, equal: bool) -> None:
        """Record what the mark says; `keep` gets each change from now on.

        What is pinned counts for more: it says that the guest here is alone, or that the guests are
        `equal`, and the controller that died may not have come to change the mark.
        """
        alone = self.guest.standalone
        standing = Standing.STANDALONE if alone else Standing.NONE if equal else found
        self._keep, self._standing = keep, standing
        self._outlived = standing is Standing.STANDALONE
        if standing is not found:
            keep(standing)

    def _mark(self, standing: Standing) -> None:
        self._standing, self._outlived = standing, standing is Standing.STANDALONE
        self._keep(standing)

    def _mark_ends(self) -> None:
        if self._standing is not Standing.NONE:
            self._mark(Standing.NONE)

    def _other_transmits(self, *, alone: bool) -> None:
        """Note that the other host's guest transmits. If it does so `alone`, somebody has decided
        that after the end of the one here, and the next boot must know it, too."""
        if self.guest.standalone and not self.guest.gone:
            return
        self._outlived = False
        if alone and self._standing is Standing.STANDALONE:
            self._mark(Standing.SUPERSEDED)

    # ---- the pair

    def entering(self) -> None:
        """Record that the first checkpoint begins, and drop the signs of an earlier pair."""
        self.guest.colo_exit, self.guest.copy_lost = False, ""
        if self.role is Role.SECONDARY:
            self.peer.shut = False

    def in_colo(self) -> None:
        """Record that the SVM has loaded a checkpoint."""
        self.pair.in_colo = True

    def not_in_colo(self) -> None:
        """Record that the SVM has not entered COLO, or that its QEMU is gone."""
        self.pair.in_colo = False

    def adopted(self, *, confirmed: bool) -> None:
        """Record whether this guest counts as a copy in the data path of a former controller."""
        self.pair.confirmed = confirmed

    def copy_confirmed(self) -> None:
        """Record that the primary counts this host's guest as a copy."""
        self.pair.confirmed = True
        self._mark_ends()

    def no_copy(self) -> None:
        """Record that neither guest is the other's copy, which voids a promise made as a copy."""
        self.guest.demoted = self.pair.confirmed = False

    def waits_for_migration(self) -> None:
        """Record that this host's QEMU has loaded nothing yet."""
        self.pair.in_colo = self.pair.confirmed = False

    def checkpointed(self) -> None:
        """Record that the guests are equal."""
        self.guest.standalone = False
        self._mark_ends()

    def checkpoint_due(self, overdue: bool) -> None:
        """Record whether the last checkpoint failed to complete, which makes the peer suspect."""
        self.pair.checkpoint_overdue = overdue

    def set_shadow(self, on: bool) -> None:
        """Record whether the PVM's output may pass uncompared."""
        self.shadow = on

    def set_paused(self, on: bool) -> None:
        """Record whether nothing is decided without an operator."""
        self.paused = on

    def ordered(self, *, forced: bool, until_s: float) -> None:
        """Record an operator request for a failover. It expires, as the peer's state may change."""
        self.pair.order = OperatorOrder(forced, until_s)

    def order_withdrawn(self) -> None:
        """Drop the operator request: it cannot be carried out, or another one replaces it."""
        self.pair.order = None

    def fenced(self, success: bool, now_ns: int, now_boot_ns: int) -> None:
        """Record the result of the fence command."""
        self.pair.fence = Fence(success, now_ns, now_boot_ns)

    def fence_is_void(self) -> None:
        """Drop the result of the fence command: the peer lives, or the command must run again."""
        self.pair.fence.result = None

    def new_pair(self) -> None:
        """Begin another pair with the guest that is here."""
        self.pair = PairLife()

    def new_guest(self) -> None:
        """Begin with another guest: nothing that was known of the former one counts any more."""
        self.guest, self.pair = LocalGuest(), PairLife()
        self.peer.shut = False

    # ---- the peer

    def connected(self, boot: str) -> None:
        """Record that the control channel is up, and drop what was reported on the former one."""
        peer = self.peer
        peer.state = peer.role = ""
        peer.guest, peer.said = OtherGuest.UNKNOWN, ()
        if boot != peer.boot:
            peer.boot, peer.heard_boot_ns = boot, 0

    def heartbeat(self, msg: dict[str, Any]) -> bool:
        """Record a heartbeat on the control channel (peer/messages.py).

        Returns whether it says anything but what the last one said: it always says that the peer
        lives."""
        peer = self.peer
        said = tuple([msg.get(name) for name in _SAID])
        news, peer.said = said != peer.said, said
        peer.state, peer.epoch, peer.role = msg["state"], msg["epoch"], msg["role"]
        peer.guest = other_guest(
            msg["role"], msg["state"], standalone=msg["standalone"], shut=msg["shut"]
        )
        if peer.guest is OtherGuest.TRANSMITTING:
            peer.ended = False
            self._other_transmits(alone=msg["standalone"])
        elif peer.guest is OtherGuest.ENDED:
            peer.ended = True
        if msg["role"] == Role.SECONDARY.value:
            peer.traffic = Traffic(msg["delivered"], msg["sent"])
        return news

    def heartbeat_read(self, t: int) -> None:
        """Record that a heartbeat has been acted upon and has to be answered."""
        self.peer.answer_boot_ns = self.peer.heard_boot_ns = t

    def answered(self) -> int:
        """Return the peer's clock in the heartbeat to answer now; 0 if it was answered before."""
        t, self.peer.answer_boot_ns = self.peer.answer_boot_ns, 0
        return t

    def datagram(self, t: int, epoch: int) -> None:
        """Record a heartbeat datagram that is newer than all that the control channel brought."""
        self.peer.heard_boot_ns, self.peer.epoch = t, epoch

    def peer_slow(self, now_ns: int) -> None:
        """Record that the peer reports a loop that stood still."""
        self.peer.slow_ns = now_ns

    def peer_gave_reason(self, why: str) -> None:
        """Record why the peer's data path is shut."""
        self.peer.shut_why = why

    def peer_shut(self, *, ended: bool = False) -> None:
        """Record that the peer's data path is shut. `ended`: its guest had run standalone."""
        self.peer.shut = True
        self.peer.ended |= ended

    def peer_open(self) -> None:
        """Record that the peer may transmit, or that its silence is no longer certain."""
        self.peer.shut = False

    def peer_guest_is_new(self, now_boot_ns: int) -> None:
        """Record that the peer has a new guest, and drop the reason given for the former one."""
        self.peer.guest_since_boot_ns, self.peer.shut_why = now_boot_ns, ""
