# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host's data path knows of the pair: slots of the `config` array, as properties.

They outlive the controller. The programs read some of them; the others are the controller's own
(bpf/lib/abi.h). DataPath has them for one NIC, HostDataPath (datapath/host.py) for all of a host's.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod

from .. import abi
from ..abi import Cfg, Mode

log = logging.getLogger("colo_xdp.datapath.datapath")

ORDER_NS = 60_000_000_000  # how long an operator request outlives the controller that received it

#: Slots that say the same for every NIC of a guest. Not among them are CFG_OFFLOAD_SINCE and
#: CFG_PROMOTED_EPOCH, which a change of roles sets for all, but each NIC ends by itself.
OF_THE_PAIR = (
    Cfg.MODE,
    Cfg.SHADOW,
    Cfg.LEASE_EXPIRY_NS,
    Cfg.ORDER,
    Cfg.ROLE,
    Cfg.SYNC_STATE,
    Cfg.UNDECIDED,
    Cfg.PEER_STOPPED,
    Cfg.DISKS_WHOLE,
    Cfg.MIRRORED_UNTIL_NS,
)


class PairSlots(ABC):
    """The pair's slots; `role`: which guest this host runs."""

    role: str

    @abstractmethod
    def slot(self, slot: Cfg) -> int:
        """Return the value of a config slot."""

    @abstractmethod
    def set_slot(self, slot: Cfg, value: int) -> None:
        """Set the value of a config slot."""

    @property
    def mode(self) -> Mode:
        return Mode(self.slot(Cfg.MODE))

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.set_slot(Cfg.MODE, mode)
        log.debug("data path: %s, epoch %d", mode.name, self.epoch)

    @property
    def epoch(self) -> int:
        return self.slot(Cfg.EPOCH)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_slot(Cfg.EPOCH, epoch)
        log.debug("data path: %s, epoch %d", self.mode.name, epoch)

    @property
    def shadowed(self) -> int:
        """Return 1 + the last epoch in which the primary transmitted uncompared; 0: none."""
        return self.slot(Cfg.SHADOW)

    @shadowed.setter
    def shadowed(self, value: int) -> None:
        self.set_slot(Cfg.SHADOW, value)

    @property
    def sync_state(self) -> abi.SyncState:
        """Return the relation of this host's guest to the other one."""
        return abi.SyncState(self.slot(Cfg.SYNC_STATE))

    @sync_state.setter
    def sync_state(self, sync_state: abi.SyncState) -> None:
        self.set_slot(Cfg.SYNC_STATE, sync_state)

    @property
    def undecided(self) -> bool:
        """Return whether it is undecided if the primary's guest may transmit.

        True since this data path began with nothing known, until a decision is made.
        """
        return bool(self.slot(Cfg.UNDECIDED))

    @undecided.setter
    def undecided(self, value: bool) -> None:
        self.set_slot(Cfg.UNDECIDED, int(value))

    @property
    def peer_stopped(self) -> int:
        """Return until when (CLOCK_BOOTTIME, ns) the peer is stopped on purpose; 0: it is not.

        The peer reported this to one process of this host, which may have been stopped since.
        """
        return self.slot(Cfg.PEER_STOPPED)

    @peer_stopped.setter
    def peer_stopped(self, boot_ns: int) -> None:
        self.set_slot(Cfg.PEER_STOPPED, boot_ns)

    @property
    def disks_whole(self) -> int:
        """Return the last epoch of which the primary has said that its disks are whole here."""
        return self.slot(Cfg.DISKS_WHOLE)

    @disks_whole.setter
    def disks_whole(self, epoch: int) -> None:
        self.set_slot(Cfg.DISKS_WHOLE, epoch)

    @property
    def mirrored_until(self) -> int:
        """Return until when (CLOCK_MONOTONIC, ns) a promoted guest still takes mirrored frames.

        0: it takes none. To be set before MODE_TAKEOVER.
        """
        return self.slot(Cfg.MIRRORED_UNTIL_NS)

    @mirrored_until.setter
    def mirrored_until(self, ns: int) -> None:
        self.set_slot(Cfg.MIRRORED_UNTIL_NS, ns)

    @property
    def promoted_epoch(self) -> int:
        """Return the epoch whose offsets are permanent (primary); 0: there are none."""
        return self.slot(Cfg.PROMOTED_EPOCH)

    def change_role(self) -> None:
        """Change the role that this host's next controller will have.

        A guest that took over keeps its offsets; one that is isolated has no valid ones.
        """
        to_primary = self.role == "secondary"
        # Cfg.ROLE is written last: it alone decides, so a controller that dies here has changed
        # nothing.
        self.set_slot(Cfg.PROMOTED_EPOCH, max(1, self.epoch) if to_primary else 0)
        self.set_slot(
            Cfg.OFFLOAD_SINCE, self.epoch + 1
        )  # fast path state of an earlier pair is void
        self.shadowed, self.order = 0, ""
        if not to_primary:
            self.sync_state = abi.SyncState.NONE
        role = abi.HostRole.PRIMARY if to_primary else abi.HostRole.SECONDARY
        self.set_slot(Cfg.ROLE, role)

    @property
    def order(self) -> str:
        """Return the operator request that cannot be carried out yet: "", "failover" or "force".

        It is kept where it dies with the data path, and dated: a controller that is restarted
        within ORDER_NS continues with it, a later one does not.
        """
        value = self.slot(Cfg.ORDER)
        if not value or time.monotonic_ns() - value > ORDER_NS:
            return ""
        return "force" if value & 1 else "failover"

    @order.setter
    def order(self, what: str) -> None:
        now = time.monotonic_ns()
        self.set_slot(Cfg.ORDER, {"": 0, "failover": now & ~1, "force": now | 1}[what])

    def beat(self) -> None:
        """Record that the controller is alive, for the programs."""
        self.set_slot(Cfg.CONTROLLER_NS, time.monotonic_ns())

    def lease_expiry(self, boot_ns: int) -> None:
        """Set the CLOCK_BOOTTIME (ns) at which the guest falls silent (arbiter = "lease" only)."""
        self.set_slot(Cfg.LEASE_EXPIRY_NS, boot_ns)
