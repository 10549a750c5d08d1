# SPDX-License-Identifier: GPL-2.0-or-later
"""What the two roles add to a controller: the questions and steps that differ between the hosts.

controller/primary.py and controller/secondary.py implement this; controller/controller.py, which
owns the state, the parts and the loop, calls it. Nothing here holds state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..compare.limits import NEVER
from ..datapath.ring import CapturedFrame
from ..failover.decision import Action
from ..failover.facts import OwnGuest
from ..peer.heartbeat_datagram import Flag
from ..qemu.events import QmpEvent


class RoleSteps(ABC):
    """The part of a controller that depends on its role."""

    # ---- frames and time

    @abstractmethod
    def on_frame(self, event: CapturedFrame) -> None:
        """Take a captured frame from the event ring."""

    def on_batch(self) -> None:
        """End a batch: all frames that were waiting went to on_frame()."""

    def on_tick(self, now_ns: int) -> None:
        """Do what is due: called every IDLE_S at least, and within TICK_S after tick_ns().

        At rest it is called every REST_S."""

    def tick_ns(self) -> int:
        """Return when on_tick() has something to do that cannot wait for IDLE_S (monotonic)."""
        return NEVER

    @property
    def at_rest(self) -> bool:
        """Whether on_tick() would find nothing that has come up since it was last called."""
        return False

    @property
    def asleep(self) -> bool:
        """Whether nothing can come up that does not wake the event loop by itself."""
        return False

    # ---- the decision

    @abstractmethod
    async def perform(self, action: Action, why: str) -> None:
        """Carry out an action of the decision table."""

    @property
    def undecided(self) -> bool:
        """Whether nobody has decided yet that this host's guest may transmit."""
        return False

    @property
    def own_guest(self) -> OwnGuest:
        """What QEMU reports of this host's guest; asked for only while it matters."""
        return OwnGuest.UNKNOWN

    @property
    def waiting(self) -> bool:
        """Whether output waits for a checkpoint, which needs the peer's controller."""
        return False

    @property
    def disk_unproven(self) -> bool:
        """Whether this guest runs a checkpoint whose disks may not be whole on this host."""
        return False

    def on_arbiter(self) -> None:
        """React to news of the arbiter: a lease is granted or lost, for example."""

    # ---- the peer

    @abstractmethod
    def on_message(self, msg: dict[str, Any]) -> None:
        """Handle a message of the peer, after the controller has."""

    @abstractmethod
    def on_heartbeat_flags(self, flags: Flag) -> None:
        """React to a heartbeat datagram that stands in for a heartbeat on the control channel."""

    def peer_connected(self) -> None:
        """React to a control channel that is up."""

    @abstractmethod
    def paired(self) -> bool:
        """Return whether one of the guests counts as a copy of the other."""

    @abstractmethod
    def outdated(self, why: str) -> None:
        """Make sure that this guest never transmits: the other one has run standalone."""

    # ---- the guest

    def on_qmp(self, event: QmpEvent) -> None:
        """React to STOP, RESUME and the like."""

    @abstractmethod
    async def on_qemu(self) -> None:
        """React to QMP that is connected (again). Raises QmpError."""

    @property
    def needs_copy(self) -> bool:
        """Whether the other guest serves the clients and this host lacks a QEMU for its copy."""
        return False

    @abstractmethod
    def guest_changed(self, why: str) -> None:
        """Note that this guest no longer equals its copy."""

    def release_last(self) -> int:
        """Release what is held of a guest that is off and has no successor; how many frames."""
        return 0

    @abstractmethod
    def forget_copy(self) -> None:
        """Stop counting either guest as the other's copy: one of them has ended itself."""

    @property
    @abstractmethod
    def ends_the_pair(self) -> bool:
        """Whether this guest is the one that clients know: the service ends with it."""

    @abstractmethod
    async def on_replacement_qemu(self) -> None:
        """Accept a new QEMU, which waits for the other guest's state."""

    async def leave_network(self) -> None:
        """Take the tap of a worthless guest out of the bridge."""

    # ---- the data path (controller/device_watch.py)

    @abstractmethod
    def hooks_lost(self, what: str, *, unseen: bool, still: bool) -> None:
        """Make up for programs that were not where they should be.

        They are back, unless `still`. `unseen`: frames of the guest may have left uncompared.
        """

    def data_path_back(self) -> None:
        """React to a data path that is whole again."""

    # ---- the operator (controller/commands.py)

    @abstractmethod
    def failover_steps(self, *, force: bool) -> list[str]:
        """Return what a failover would do now, step by step."""

    @abstractmethod
    def switchover_steps(self) -> list[str]:
        """Return what a switchover would do now, step by step."""

    @abstractmethod
    async def switch_over(self, deadline: float, why: str) -> bool:
        """Make the SVM the live guest by a checkpoint; whether it is, by `deadline` (monotonic, s).

        Raises ValueError when it cannot begin.
        """

    async def keep_shut(self) -> None:
        """See to it that a program is attached which obeys a mode in which nothing leaves."""

    def may_demote(self) -> None:
        """Raise ValueError where this guest must not fall silent now."""

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make one checkpoint. Raises ValueError where there is none."""
        raise ValueError("checkpoints are asked for on the primary host")

    def new_policy(self) -> None:
        """Take over changed rules."""

    def asked_again(self) -> None:
        """Try again what was given up: an operator wants the pair protected."""

    def set_shadow(self, on: bool) -> None:
        """Hold nothing, or hold again. Raises ValueError."""
        if on:
            raise ValueError("shadow mode is set on the primary host, which holds the frames")
